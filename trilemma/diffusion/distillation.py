r"""Few steps from a teacher: progressive distillation and reflow.

A student has its teacher's network, schedule and prediction, and starts from its weights. Without a teacher's folder
it is its own: progressive distillation and consistency models (`trilemma.diffusion.consistency`) spend the first half
of the budget on ordinary training.

Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512). One DDIM step of the student lands where two of the
teacher's do. For t > t' > t'' of the teacher's grid, which take z_t to z'',
    x~ = (z'' - (sigma'' / sigma) z_t) / (alpha'' - (sigma'' / sigma) alpha),     L = E w(t) |x~ - xhat(z_t, t)|^2 / D,
and at the end of the grid z'' = x~ is the teacher's estimate. Then the student becomes the teacher, and the steps are
halved again. w = max(SNR, 1).

Reflow (Liu et al. 2023, arXiv:2209.03003). The teacher's flow maps noise eps to x(eps); an ordinary rectified flow
between these pairs, which are no longer independent, has straighter paths, so that fewer Euler steps follow them:
    L = E |x(eps) - eps + u((1 - t) x(eps) + t eps, t)|^2 / D,                    u the velocity towards the noise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trilemma.core import registry
from trilemma.core.config import merge, validate
from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.core.storage import load_model, load_state, model_folder, read_manifest
from trilemma.diffusion import solvers
from trilemma.diffusion.denoiser import Denoiser, NetworkDenoiser
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.schedule import Spacing, like
from trilemma.diffusion.settings import DiffusionConfig

SHARED = (
    "conditional", "classifier", "drop_condition", "schedule", "timesteps", "zero_terminal_snr", "prediction",
    "scale_input", "backbone", "width", "depth", "multipliers", "attention_below", "patch", "heads", "time_embedding",
)  # fmt: skip
"""Settings in which student and teacher agree. A student takes over those that are not given."""

TAKEN = frozenset({"net", "codec", "schedule", "data_variance", "error_sum", "error_count"})
"""Parts of the teacher's state with which a student starts."""


class StudentConfig(DiffusionConfig):
    """Settings of a model that may learn from a trained one."""

    teacher: str | None = Field(
        None, description="folder of a trained diffusion model, or of its run, with the same data and network"
    )


class Student(Diffusion):
    """A diffusion model that starts from a teacher's weights, where a teacher is given.

    The folder is read when the student is made and when its training starts, not when it is loaded or resumed.
    """

    Config = StudentConfig
    config: StudentConfig
    teacher: nn.Module

    def __init__(self, spec: DataSpec, *, name: str | None = None, **settings: Any) -> None:
        path, theirs = settings.get("teacher"), None
        if path is not None and not settings.keys() >= self.Config.model_fields.keys():
            # A saved student brings all its settings, and its teacher may be gone.
            theirs = teacher_config(str(path), spec)
            settings = merge({key: getattr(theirs, key) for key in SHARED}, settings)
        super().__init__(spec, name=name, **settings)
        if theirs is not None:
            self._check_same(theirs)

    def _check_same(self, theirs: DiffusionConfig) -> None:
        for key in SHARED:
            own, other = getattr(self.config, key), getattr(theirs, key)
            if own != other:
                raise UsageError(
                    f"the teacher {self.config.teacher} has {key}={other}, this {self.name} has {key}={own}: "
                    f"give another teacher, or {key}={other}"
                )

    def prepare(self, train: Split, noise: Noise) -> None:
        if self.config.teacher is None:
            super().prepare(train, noise)
            return
        self._check_same(teacher_config(self.config.teacher, self.spec))
        # The codec is the teacher's too: its network knows the data in that scale only.
        taken = load_model(model_folder(self.config.teacher)).state_dict()
        taken = {name: tensor for name, tensor in taken.items() if name.partition(".")[0] in TAKEN}
        load_state(self, {**self.state_dict(), **taken}, self.config.teacher)
        self._data_std = None

    def taught(self, condition: Tensor | None, present: Tensor | None = None) -> Denoiser:
        """The denoiser of the teacher's network."""
        return NetworkDenoiser(
            lambda z, t: self.network(z, t, condition, present, self.teacher),
            self.schedule,
            self.config.prediction,
            data_std=self.data_std,
        )


def teacher_config(path: str, spec: DataSpec) -> DiffusionConfig:
    """The settings of the model saved in a folder.

    Raises:
        CheckpointError: there is no model.
        UsageError: it is no denoiser, or of other data.
    """
    manifest, _ = read_manifest(model_folder(path))
    model = registry.find(manifest["model"]).model
    if not issubclass(model, Diffusion) or not model.teaches:
        raise UsageError(f"the teacher {path} is a {manifest['model']}: give a diffusion model that denoises")
    theirs = DataSpec.model_validate(manifest["spec"])
    if theirs != spec:
        raise UsageError(f"the teacher {path} was made for {theirs.describe()}, the data are {spec.describe()}")
    config = validate(model.Config, manifest["settings"], f"the teacher {path}")
    assert isinstance(config, DiffusionConfig)
    if config.variance in ("learned", "learned-range"):
        raise UsageError(f"the teacher {path} learns its variance, which a student has no use for: give another one")
    return config


def frozen(network: nn.Module) -> nn.Module:
    """A copy whose weights are buffers: saved with the model, but neither trained nor averaged."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name in [name for name, weight in module._parameters.items() if weight is not None]:
            weight = module._parameters.pop(name)
            assert weight is not None
            module.register_buffer(name, weight.detach())
    return network


def follow(teacher: nn.Module, network: nn.Module) -> None:
    """Copy a network's weights into its frozen copy."""
    weights = dict(network.named_parameters())
    for name, buffer in teacher.named_buffers():
        if name in weights:
            buffer.copy_(weights[name].detach())


class FewStepsConfig(StudentConfig):
    """Settings of a model with a sampler of its own."""

    @model_validator(mode="after")
    def _few_steps(self) -> FewStepsConfig:
        if self.loss != "weighted" or self.classifier:
            raise ValueError("a model of few steps trains with loss=weighted and without a noisy classifier")
        if self.variance != "small":
            raise ValueError(f"variance={self.variance} has no effect on a model of few steps, which has no chain")
        if self.teacher is not None and (self.times == "importance" or self.times_mean is not None or self.times_std):
            raise ValueError("times, times_mean and times_std have no effect on a student of a teacher")
        if self.sampling_grid in ("trailing", "leading"):
            raise ValueError(
                f"sampling_grid={self.sampling_grid} does not halve into itself: give linspace, karras or log-snr"
            )
        return self


class FewSteps(Student):
    """A student whose network jumps along the flow. It is no E[x | z_t], so that its flow and chain say nothing of p.

    Without a teacher the first half of the budget trains an ordinary denoiser.
    """

    Config = FewStepsConfig
    config: FewStepsConfig
    own_sampler: ClassVar[str]
    teaches = False
    _log_prob = GenerativeModel._log_prob  # type: ignore[assignment]

    def learned(self, progress: float) -> float | None:
        """Share of the tuning that is done, in [0, 1]; None while the model trains as its own teacher."""
        if self.config.teacher is not None:
            return progress
        return None if progress < 0.5 else 2.0 * progress - 1.0

    def objectives(self) -> Sequence[Objective]:
        # The loss changes its meaning on the way, so held-out data cannot pick the best weights by it.
        return [replace(objective, validate=False) for objective in super().objectives()]

    def solver(self, sampler: str | None = None, **settings: Any) -> solvers.Solver:
        if sampler not in (None, self.own_sampler) or self.config.sampler != self.own_sampler:
            wrong = sampler or self.config.sampler
            raise UsageError(f"sampler={wrong}: {self.name} has learned the steps of sampler={self.own_sampler} only")
        return solvers.make_solver(self.own_sampler, **settings)

    def open_grid(self, n: int, spacing: Spacing | None = None) -> Tensor:
        """n + 1 times of the spacing without the last (n,), whose place the last prediction takes.

        The grid of n is every second time of the grid of 2 n.
        """
        spacing = spacing or self.config.sampling_grid or self.schedule.grid
        if n < 1 or spacing in ("trailing", "leading"):
            raise UsageError(f"{self.name} takes at least 1 step on a grid of linspace, karras or log-snr")
        return time_grid(self.schedule, n + 1, spacing)[:-1]


# -- progressive distillation -----------------------------------------------------------------------------------


class ProgressiveConfig(FewStepsConfig):
    """Settings of progressive distillation."""

    from_steps: int = Field(16, ge=2, description="DDIM steps of the teacher: `sampling_steps` times a power of 2")

    @model_validator(mode="after")
    def _halvings(self) -> ProgressiveConfig:
        if self.timesteps is not None or self.schedule in ("rectified", "learned"):
            raise ValueError("the steps of a continuous schedule with a signal at its end are halved: cosine, vp, edm")
        times, rest = divmod(self.from_steps, self.sampling_steps)
        if rest or times < 2 or times & (times - 1):
            raise ValueError(
                f"from_steps={self.from_steps} is not sampling_steps={self.sampling_steps} times a power of 2"
            )
        return self


class Progressive(FewSteps):
    """The number of DDIM steps is halved from `from_steps` to `sampling_steps`, in equal parts of the budget.

    The saved model holds its last teacher beside itself, so that training can go on bit for bit.
    """

    Config = ProgressiveConfig
    config: ProgressiveConfig
    own_sampler = "ddim"
    stage: Tensor

    def build(self) -> None:
        super().build()
        self.teacher = frozen(self.net)
        self.register_buffer("stage", torch.tensor(-1))

    @property
    def stages(self) -> int:
        """How often the steps are halved."""
        return (self.config.from_steps // self.config.sampling_steps).bit_length() - 1

    def loss(self, batch: Batch, step: Step) -> Losses:
        done, c = self.learned(step.progress), batch.condition
        if done is None:
            return super().loss(batch, step)
        stage = min(int(done * self.stages), self.stages - 1)
        if torch.is_grad_enabled() and int(self.stage) < stage:
            follow(self.teacher, self.net)
            self.stage.fill_(stage)
        n = self.config.from_steps >> (stage + 1)
        times = self.open_grid(2 * n)
        index = 2 * step.noise.integers(n)
        t, middle = times.to(index.device)[index], times.to(index.device)[index + 1]
        alpha = torch.cat([self.schedule.alpha(times[2::2]), torch.ones(1, dtype=torch.float64)])
        sigma = torch.cat([self.schedule.sigma(times[2::2]), torch.zeros(1, dtype=torch.float64)])
        x = self._training_data(batch, step.noise)
        z, _ = self.noised(x, t, step.noise)
        present = self.kept(step.noise)
        end = alpha.to(t)[index // 2], sigma.to(t)[index // 2]
        with torch.no_grad():
            target = two_steps(self.taught(c, present), z, t, middle, *end)
        value, _ = self.network(z, t, c, present)
        eps = (z - like(self.schedule.alpha(t), z) * target) / like(self.schedule.sigma(t), z)
        error = self._weighted_error(target, eps, t, value.to(x.dtype))
        return error.mean(), {"steps": torch.tensor(float(n))}

    def time_grid(self, solver: solvers.Solver, steps: int | None = None, grid: Spacing | None = None) -> Tensor:
        if steps not in (None, self.config.sampling_steps) or grid is not None:
            raise UsageError(
                f"{self.name} was distilled to sampling_steps={self.config.sampling_steps}: steps and grid are fixed"
            )
        return self.open_grid(self.config.sampling_steps)

    def knob(self) -> None:
        return None


def two_steps(denoiser: Denoiser, z: Tensor, t: Tensor, middle: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x~ (N, *) with which one DDIM step from t to (alpha, sigma) lands where two, through `middle`, do.

    With r = sigma'' / sigma' it is w x'' + (1 - w) x', w = (alpha'' - r alpha') / (alpha'' - (sigma'' / sigma) alpha),
    x' and x'' the estimates of the two steps: no difference of large numbers.

    Arguments:
        z: (N, *).
        t, middle, alpha, sigma: (N,) float64; alpha = 1 and sigma = 0 are the clean data.
    """
    schedule = denoiser.schedule
    first, ratio = denoiser.predict(z, t), schedule.sigma(middle) / schedule.sigma(t)
    there = like(schedule.alpha(middle) - ratio * schedule.alpha(t), z) * first + like(ratio, z) * z
    second = denoiser.predict(there, middle)
    share = alpha - sigma / schedule.sigma(middle) * schedule.alpha(middle)
    share = share / (alpha - sigma / schedule.sigma(t) * schedule.alpha(t))
    return first + like(share, z) * (second - first)


# -- reflow -----------------------------------------------------------------------------------------------------


class ReflowConfig(StudentConfig):
    """Settings of a rectified flow."""

    teacher_steps: int | None = Field(None, ge=1, description="times of the teacher's Heun steps for a pair, 8")

    @model_validator(mode="after")
    def _reflow(self) -> ReflowConfig:
        if self.teacher is None:
            if self.teacher_steps is not None:
                raise ValueError("teacher_steps has no effect without a teacher")
            return self
        if self.schedule != "rectified":
            raise ValueError(f"a reflowed path is a straight line: give schedule=rectified, not {self.schedule}")
        if self.loss != "weighted" or self.times == "importance" or self.coupling != "independent" or self.classifier:
            raise ValueError(
                "reflow couples noise with the teacher's samples of it: give the default loss, times and coupling"
            )
        if self.flips:
            raise ValueError("flips has no effect on reflow, which sees no pictures but the teacher's")
        return self


class Reflow(Student):
    """A rectified flow: between independent data and noise, or, with a teacher, between noise and its samples of it.

    Each training step draws new pairs, which costs 2 teacher_steps - 1 evaluations of the teacher. A reflowed model is
    scored by its flow (method=ode): the chain's bound needs noise that is independent of the data.
    """

    Config = ReflowConfig
    config: ReflowConfig

    def build(self) -> None:
        super().build()
        if self.config.teacher is not None:
            self.teacher = frozen(self.net)

    def prepare(self, train: Split, noise: Noise) -> None:
        super().prepare(train, noise)
        if self.config.teacher is not None:
            follow(self.teacher, self.net)

    def objectives(self) -> Sequence[Objective]:
        # With a teacher the loss sees no data, held out or not.
        found = super().objectives()
        return found if self.config.teacher is None else [replace(objective, validate=False) for objective in found]

    def loss(self, batch: Batch, step: Step) -> Losses:
        if self.config.teacher is None:
            return super().loss(batch, step)
        eps = step.noise.normal(*self.codec.shape, dtype=self.dtype)
        solver = solvers.Heun()
        times = self.time_grid(solver, self.config.teacher_steps or 8)
        with torch.no_grad():
            x = solvers.sample(self.taught(batch.condition), solver, times, eps, lambda: eps)
        t, _, _ = self.draw_times(step.noise)
        z = like(self.schedule.alpha(t), x) * x + like(self.schedule.sigma(t), x) * eps
        value, _ = self.network(z, t, batch.condition, self.kept(step.noise))
        error = self._weighted_error(x, eps, t, value.to(x.dtype)).mean()
        return error, {"error": error.detach()}

    @property
    def flow_only(self) -> bool:
        return self.config.teacher is not None or super().flow_only
