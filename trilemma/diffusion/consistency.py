r"""Consistency models by easy consistency tuning: one network evaluation from noise to data.

The consistency function f(z_t, t) is the end of the probability flow through z_t (Song et al. 2023, arXiv:2303.01469):
f(z, 0) = z, and f is constant along the flow. With EDM's schedule z_t = x + t eps and prediction
f(z, t) = c_skip(t) z + c_out(t) F(z, t) the boundary holds whatever the network says. It is tuned (Geng et al. 2024,
arXiv:2406.14548) on two points with the same eps,
    L = E 1 / (t - r) (sqrt(|f(z_t, t) - stopgrad f(z_r, r)|^2 / D + c^2) - c),
    r = t max(0, 1 - n(t) / q^a),        n(t) = 1 + 8 sigmoid(-t / (2 d)),        a = 1, 2, .. in equal parts of the
budget. Where r = 0 the target is x itself, as in ordinary training; with growing a it is the model's own estimate from
a little less noise. For r -> t the difference has mean zero at the exact f.

The constants are the paper's, which are for data of standard deviation 1/2; d is that of the data here, and
log t ~ N(-1.1 + log 2 d, 2^2). c = 0.00054 (2 d) is Song & Dhariwal's (2023, arXiv:2310.14189).

Sampling: x <- f(z, t); z <- x + s n with new noise n at the next time s; and so on (`renoise`).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trilemma.core.model import Losses, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch
from trilemma.diffusion import solvers
from trilemma.diffusion.distillation import FewSteps, FewStepsConfig
from trilemma.diffusion.prediction import convert
from trilemma.diffusion.schedule import Spacing, like
from trilemma.diffusion.training import draw_uniform, log_normal_times


class ConsistencyConfig(FewStepsConfig):
    """Settings of a consistency model."""

    stages: int = Field(8, ge=1, description="a = 1 .. stages: r comes as close to t as 1 - n(t) / ratio^stages")
    ratio: float = Field(2.0, gt=1, description="q, by which each stage divides the distance of r to t")
    huber: float | None = Field(0.00054, gt=0, description="c of the pseudo-Huber loss / (2 std(x)); null: squares")

    @model_validator(mode="after")
    def _bounded(self) -> ConsistencyConfig:
        if self.schedule != "edm" or self.prediction != "edm":
            raise ValueError("f(z, 0) = z holds by schedule=edm and prediction=edm: give both")
        if self.weighting != "uniform" or self.times == "importance" or self.coupling != "independent":
            raise ValueError("consistency tuning has its own weights, times and coupling: leave them as they are")
        return self


class Consistency(FewSteps):
    """A consistency model. Without a teacher it is trained as an EDM denoiser first."""

    Config = ConsistencyConfig
    config: ConsistencyConfig
    own_sampler = "renoise"

    def loss(self, batch: Batch, step: Step) -> Losses:
        done, c = self.learned(step.progress), self.config
        if done is None:
            return super().loss(batch, step)
        x = self._training_data(batch, step.noise)
        t = self.pair_times(step.noise)
        r = self.earlier(t, min(1 + int(done * c.stages), c.stages))
        present, eps = self.kept(step.noise), step.noise.normal_like(x)
        square = self.difference(x, eps, t, r, batch.condition, present).square().flatten(1).mean(1)
        error = square
        if c.huber is not None:
            scale = 2.0 * self.data_std * c.huber
            error = (square + scale**2).sqrt() - scale
        loss = (error / (t - r).to(error)).mean()
        return loss, {"rms": square.detach().mean().sqrt()}

    def pair_times(self, noise: Noise) -> Tensor:
        """t (N,)."""
        c = self.config
        mean = -1.1 + math.log(2.0 * self.data_std) if c.times_mean is None else c.times_mean
        return log_normal_times(draw_uniform(noise, c.stratified), self.schedule, mean, c.times_std or 2.0)

    def earlier(self, t: Tensor, stage: int) -> Tensor:
        """r (N,) of each t (N,); 0 where it would lie below the schedule's least noise."""
        n = 1.0 + 8.0 * (-t / (2.0 * self.data_std)).sigmoid()
        r = t * (1.0 - n / self.config.ratio**stage)
        return torch.where(r < self.schedule.t_min, 0.0, r)

    def difference(
        self, x: Tensor, eps: Tensor, t: Tensor, r: Tensor, condition: Tensor | None, present: Tensor | None
    ) -> Tensor:
        """f(z_t, t) - stopgrad f(z_r, r) (N, *), in which f(z, 0) = x."""

        def jump(t: Tensor) -> Tensor:
            z = x + like(t, x) * eps
            value, _ = self.network(z, t, condition, present)
            return convert(value.to(x.dtype), self.config.prediction, "x0", z, t, self.schedule, self.data_std)

        with torch.no_grad():
            later = r > 0
            estimate = jump(torch.where(later, r, self.schedule.t_min))
            target = torch.where(later.reshape(-1, *[1] * (x.ndim - 1)), estimate, x)
        return jump(t) - target

    def time_grid(self, solver: solvers.Solver, steps: int | None = None, grid: Spacing | None = None) -> Tensor:
        return self.open_grid(self.config.sampling_steps if steps is None else steps, grid)

    def knob(self) -> tuple[str, tuple[float, ...]]:
        return "steps", (1, 2, 4)
