r"""DDPM: denoising diffusion (Ho, Jain & Abbeel 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672).

Data are noised by z_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, t = 1 .. T, and a network learns to see through the
noise. Training minimises
    L_simple = E_{x, t, eps} |target - f_theta(z_t, t, c)|^2 / D,    target = eps (or v, or x),
and the network's prediction of x gives the reverse chain from z_T ~ N(0, I) to x (`trilemma.diffusion.sampling`) and
the variational bound on log p(x) (`trilemma.diffusion.bound`). The relative error rho_t of the prediction, which sets
the reverse variance, is averaged during training over the last fifth of the steps, in ranges of t.

f is a U-Net for pictures and signals and a residual MLP with Fourier features for points and tables. Time and
condition enter every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.core.spec import Batch, ConditionSpec, DataSpec, Split
from trilemma.diffusion.bound import bound_term, prior_term, strata
from trilemma.diffusion.prediction import Prediction, convert, like
from trilemma.diffusion.sampling import Denoiser, clip_to, sample_ancestral, sample_ddim
from trilemma.diffusion.schedule import Shape, make_schedule, spaced_times
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.embedding import FourierMLP, TimeEmbedding
from trilemma.nets.unet import UNet

ERROR_RANGES = 32
"""Number of ranges of t in which the prediction's error is averaged."""

FAST = {"lr": 3e-3, "betas": (0.9, 0.99)}
"""Optimiser settings of small networks, which bear larger steps."""


class DDPMConfig(ModelConfig):
    """Settings of DDPM."""

    timesteps: int = Field(1000, ge=21, description="number T of noising steps")
    schedule: Shape = Field("cosine", description="of the noise: cosine or linear")
    sigma_min: float = Field(0.01, gt=0, lt=1, description="noise after the first step of the cosine schedule")
    prediction: Prediction = Field("v", description="what the network predicts: eps, v or x")
    variance: Literal["optimal", "small", "large"] = Field(
        "optimal", description="of the reverse steps: from the measured error, or the posterior's, or beta"
    )
    width: int = Field(64, ge=4, description="channels at full resolution, or hidden units for points and tables")
    depth: int = Field(2, ge=1, description="residual blocks per resolution, or in all for points and tables")
    multipliers: tuple[int, ...] = Field((1, 2, 2), min_length=1, description="channels per resolution, in widths")
    attention_below: int = Field(256, ge=0, description="resolutions with at most so many positions get attention")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


class Backbone(nn.Module):
    """f(z, t, condition): the time and the condition become one context vector of a U-Net or MLP."""

    def __init__(self, shape: tuple[int, ...], condition: ConditionSpec | None, config: DDPMConfig) -> None:
        super().__init__()
        self.rate = 1000.0 / config.timesteps
        context_dim = config.width if len(shape) == 1 else 4 * config.width
        self.time = TimeEmbedding(context_dim)
        self.condition = ConditionEmbedding(condition, context_dim)
        self.net: nn.Module
        if len(shape) == 1:
            self.net = FourierMLP(
                shape[0], shape[0], width=config.width, depth=config.depth, context_dim=context_dim, zero_init=True
            )
        else:
            self.net = UNet(
                shape,
                width=config.width,
                multipliers=config.multipliers,
                depth=config.depth,
                context_dim=context_dim,
                attention_below=config.attention_below,
            )

    def forward(self, z: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """z (N, *shape), t (N,) int64 -> (N, *shape)."""
        context = self.time(t.to(z.dtype) * self.rate)
        embedded = self.condition(condition)
        result: Tensor = self.net(z, context if embedded is None else context + embedded)
        return result


class DDPM(GenerativeModel):
    """Denoising diffusion with a discrete chain."""

    Config = DDPMConfig
    config: DDPMConfig
    condition_kinds = frozenset({"class", "vector"})
    space = "center"
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128, "ema": 0.999}
    alpha: Tensor
    sigma: Tensor
    error_sum: Tensor
    error_count: Tensor
    range_of: Tensor

    @classmethod
    def sized_for(cls, spec: DataSpec) -> dict[str, Any]:
        # On a lattice the first noise is half a cell: finer noise would make the network spend itself on rounding.
        sizes: dict[str, Any] = {} if spec.levels is None else {"sigma_min": min(0.2, 1.0 / spec.levels)}
        if spec.kind in ("points", "table"):
            return {**sizes, "width": 128, "depth": 3, "optimizer": FAST}
        side, multipliers = max(spec.shape[1:]), [1]
        while side > 4 and len(multipliers) < 4:
            multipliers.append(2 if len(multipliers) < 3 else 4)
            side = -(-side // 2)
        sizes["multipliers"] = tuple(multipliers)
        if spec.dims <= 256:  # small enough for a CPU to train in a minute
            sizes |= {"width": 24, "depth": 1, "attention_below": 16, "optimizer": FAST}
        return sizes

    def build(self) -> None:
        c = self.config
        self.schedule = make_schedule(c.schedule, c.timesteps, c.sigma_min)
        self.register_buffer("alpha", self.schedule.alpha, persistent=False)
        self.register_buffer("sigma", self.schedule.sigma, persistent=False)
        ranges = strata(c.timesteps, ERROR_RANGES)
        sizes = torch.tensor([1] + [size for _, size in ranges])
        self.register_buffer("range_of", torch.arange(-1, len(ranges)).repeat_interleave(sizes), persistent=False)
        self.register_buffer("error_sum", torch.zeros(len(ranges), dtype=torch.float64))
        self.register_buffer("error_count", torch.zeros(len(ranges), dtype=torch.float64))
        self.net = Backbone(self.codec.shape, self.condition, c)

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit_split(train)

    def objectives(self) -> Sequence[Objective]:
        return [
            Objective("denoising", self.net.parameters(), self.loss, optimizer=self.config.optimizer, validate=True)
        ]

    @property
    def levels(self) -> int | None:
        """Number of cells of model space along each dimension, None where it is no lattice."""
        return self.spec.levels if self.codec.discrete else None

    def loss(self, batch: Batch, step: Step) -> Losses:
        """L_simple. The t of a batch are stratified: one from each of N equal parts of 1 .. T."""
        x, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        n = x.shape[0]
        position = torch.arange(n, device=x.device, dtype=torch.float64)
        u = (position + step.noise.uniform(dtype=torch.float64)) / n
        t = (u * self.config.timesteps).long().clamp_(max=self.config.timesteps - 1) + 1
        eps = step.noise.normal_like(x)
        z = like(self.alpha[t], x) * x + like(self.sigma[t], x) * eps
        target = convert(eps, "eps", self.config.prediction, z, self.alpha[t], self.sigma[t])
        error: Tensor = self.net(z, t, batch.condition) - target
        if torch.is_grad_enabled():  # a training step: validation leaves the model as it is
            self._record_error(t, error.detach().square().flatten(1).mean(1).double(), step.index)
        return error.square().mean()

    def _record_error(self, t: Tensor, square: Tensor, index: int) -> None:
        """Average the squared error (N,) as one of v into the ranges of t; step i weighs as i^5, roughly."""
        one = torch.ones_like(square)
        scale = {"eps": one / self.alpha[t].square(), "v": one, "x": one / self.sigma[t].square()}
        member = nn.functional.one_hot(self.range_of[t], len(self.error_sum)).double()
        keep = 1.0 - 5.0 / (index + 6.0)
        self.error_sum.mul_(keep).add_((square * scale[self.config.prediction]) @ member)
        self.error_count.mul_(keep).add_(member.sum(0))

    @property
    def rho(self) -> Tensor:
        """(T + 1,) float64 on the CPU: rho_t of the schedule's docstring; entry 0 is unused.

        A measured rho starts from one imagined example with rho = 1, the value before anything was learned.
        """
        ones = torch.ones(self.config.timesteps + 1, dtype=torch.float64)
        if self.config.variance == "optimal":
            return ((self.error_sum + 1.0) / (self.error_count + 1.0)).cpu()[self.range_of.cpu()]
        if self.config.variance == "small":
            ones[2:] = 0.0  # the posterior at t = 1 is a point: x itself gets the variance beta_1
        return ones

    def predict_x(self, z: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """E[x | z_t] as the network has it: z (N, *), t (N,) int64 in 1 .. T -> (N, *)."""
        return convert(self.net(z, t, condition), self.config.prediction, "x", z, self.alpha[t], self.sigma[t])

    def denoiser(self, condition: Tensor | None) -> Denoiser:
        """`predict_x` as the samplers call it; on a lattice the prediction stays inside [-1, 1]."""

        def denoise(z: Tensor, t: int) -> Tensor:
            return self.predict_x(z, torch.full((z.shape[0],), t, device=z.device), condition)

        return denoise if self.levels is None else clip_to(denoise, -1.0, 1.0)

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The denoiser f(z_t, t): the network's prediction, (N, *shape)."""
        z = torch.zeros(2, *self.codec.shape, dtype=self.dtype, device=self.device)
        t = torch.ones(2, dtype=torch.int64, device=self.device)
        return lambda z, t, condition=None: self.net(z, t, condition), (z, t, *self.example_condition(2))

    def _sample(
        self,
        noise: Noise,
        condition: Tensor | None,
        *,
        steps: int = 100,
        sampler: Literal["ancestral", "ddim"] = "ancestral",
        eta: float = 0.0,
    ) -> Tensor:
        """`steps` evaluations of the network; `eta` is the noise of DDIM, 0 (a map) to 1."""
        total = self.config.timesteps
        if not 1 <= steps <= total:
            raise UsageError(f"{self.name} was made with {total} timesteps, so steps is 1..{total}, got {steps}")
        if sampler not in ("ancestral", "ddim"):
            raise UsageError(f"sampler is ancestral or ddim, got {sampler!r}")

        def normal() -> Tensor:
            return noise.normal(*self.codec.shape, dtype=self.dtype)

        times, denoise = spaced_times(total, steps), self.denoiser(condition)
        if sampler == "ddim":
            return sample_ddim(denoise, self.schedule, times, normal(), normal, eta)
        return sample_ancestral(denoise, self.schedule, times, normal(), normal, self.rho)

    def evaluations(self, *, steps: int = 100, **settings: Any) -> int:
        return steps

    def knob(self) -> tuple[str, tuple[float, ...]]:
        return "steps", tuple(steps for steps in (5, 10, 25, 50, 100) if steps <= self.config.timesteps)

    def _log_prob(
        self, y: Tensor, condition: Tensor | None, noise: Noise, *, terms: int | Literal["all"] = 32
    ) -> Score:
        """An unbiased estimate of the variational bound, which is a lower bound on log p.

        With `terms` = "all" every one of the T terms is evaluated, with one draw of its noise each. Else `terms` is
        the number of evaluations per example: two in each of terms / 2 strata of 1 .. T, and `stderr` is the
        estimate's standard error. Single values may by chance lie above log p; their mean does not.
        """
        if terms != "all" and (not isinstance(terms, int) or terms < 4):
            raise UsageError(f"terms is 'all' or an integer of at least 4, got {terms!r}")
        total, n = self.config.timesteps, y.shape[0]
        everything = terms == "all" or terms >= total
        ranges = [(t, 1) for t in range(1, total + 1)] if everything else strata(total, int(terms) // 2)
        s2 = self.schedule.reverse_variance(self.rho)
        value, square = -prior_term(self.schedule, y.double()), y.new_zeros(n, dtype=torch.float64)
        for first, size in ranges:
            draws = [self._term(y, condition, noise, s2, first, size) for _ in range(1 if everything else 2)]
            value = value - size * torch.stack(draws).mean(0)
            square = square + (size * (draws[0] - draws[-1])).square() / 4.0
        return Score(value, "lower_bound", None if everything else square.sqrt())

    def _term(self, y: Tensor, condition: Tensor | None, noise: Noise, s2: Tensor, first: int, size: int) -> Tensor:
        """One draw of L_{t-1} (N,), t uniform in first .. first + size - 1."""
        t = first + noise.integers(size)
        z = like(self.alpha[t], y) * y + like(self.sigma[t], y) * noise.normal_like(y)
        x_hat = self.predict_x(z, t, condition).double()
        if self.levels is not None:
            x_hat = x_hat.clamp(-1.0, 1.0)
        return bound_term(self.schedule, s2, t.cpu(), y.double(), x_hat, self.levels)
