"""What the tests of the diffusion family share: every schedule, and models whose network is a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trilemma.core.noise import make_generator
from trilemma.core.spec import DataSpec
from trilemma.diffusion.denoiser import Denoiser
from trilemma.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.schedule import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    Learned,
    NoiseSchedule,
    Rectified,
    SubVP,
    cosine_betas,
    discretized,
    linear_betas,
    zero_terminal_snr,
)

F64 = torch.float64


def learned(width: int = 8) -> Learned:
    """A learned schedule far from a straight gamma, without gradients."""
    schedule, g = Learned(8.0, -6.0, width=width), make_generator("learned schedule")
    with torch.no_grad():
        schedule.weight.copy_(torch.randn(width, generator=g))
        schedule.rate.copy_(3.0 + torch.randn(width, generator=g))
        schedule.bias.copy_(-3.0 * torch.rand(width, generator=g))
    return schedule.requires_grad_(False)


def remembered(make: Callable[[], NoiseSchedule]) -> Callable[[], NoiseSchedule]:
    """One shared schedule, whose derivatives at single times are computed once: solvers ask for them at every step."""

    @cache
    def made() -> NoiseSchedule:
        schedule = make()
        if isinstance(schedule, Discrete):
            return schedule
        for name in ("rates", "log_snr_rate"):
            plain, known = getattr(schedule, name), {}

            def look_up(t: Tensor, plain: Any = plain, known: dict[float, Any] = known) -> Any:
                if t.ndim or t.dtype != F64:
                    return plain(t)
                if t.item() not in known:
                    known[t.item()] = plain(t)
                return known[t.item()]

            setattr(schedule, name, look_up)
        return schedule

    return made


_MAKERS: dict[str, Callable[[], NoiseSchedule]] = {
    "vp": VP,
    "sub-vp": SubVP,
    "cosine": Cosine,
    "ve": VE,
    "edm": EDM,
    "rectified": Rectified,
    "rectified-open": lambda: Rectified(1e-3, 0.995),
    "learned": learned,
    "chain-linear": lambda: Discrete(linear_betas(60)),
    "chain-cosine": lambda: Discrete(cosine_betas(40)),
    "chain-vp": lambda: discretized(VP(), 50),
    "chain-zero": lambda: Discrete(zero_terminal_snr(linear_betas(60))),
}
SCHEDULES = {name: remembered(make) for name, make in _MAKERS.items()}
"""Every schedule of `trilemma.diffusion.schedule`; the chains are short."""

CHAINS = [name for name in SCHEDULES if name.startswith("chain")]
CONTINUOUS = [name for name in SCHEDULES if name not in CHAINS]
WITHOUT_SIGNAL = ["rectified", "chain-zero"]
WITH_SIGNAL = [name for name in SCHEDULES if name not in WITHOUT_SIGNAL]


def inner_times(schedule: NoiseSchedule, n: int, low: float = -4.0, high: float = 4.0) -> Tensor:
    """n rising times whose log SNR is even between `high` and `low`; of a chain, its steps nearest to these."""
    t = schedule.time(torch.linspace(high, low, n, dtype=F64))
    return t.round().clamp(min=2.0).unique() if isinstance(schedule, Discrete) else t


def all_times(schedule: NoiseSchedule, n: int) -> Tensor:
    """n rising times from t_min to t_max; of a chain, all its steps."""
    if isinstance(schedule, Discrete):
        return torch.arange(1, schedule.steps + 1, dtype=F64)
    return torch.linspace(schedule.t_min, schedule.t_max, n, dtype=F64)


def total_variance(schedule: NoiseSchedule, t: Tensor, std: float) -> Tensor:
    """Var z_t of data with this standard deviation."""
    return schedule.alpha(t).square() * std**2 + schedule.sigma(t).square()


def two_modes(schedule: NoiseSchedule) -> MixtureDenoiser:
    """0.3 N((-1.5, 0.5), 0.4^2) + 0.7 N((1.2, -0.3), 0.5^2)."""
    mean = torch.tensor([[-1.5, 0.5], [1.2, -0.3]], dtype=F64)
    return MixtureDenoiser(schedule, torch.tensor([0.3, 0.7], dtype=F64), mean, torch.tensor([0.4, 0.5], dtype=F64))


def gaussian_flow(schedule: NoiseSchedule, mean: float, std: float, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z_t moved along the probability flow of N(mean, std^2): u = (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays."""
    u = (z - schedule.alpha(t) * mean) / total_variance(schedule, t, std).sqrt()
    return schedule.alpha(s) * mean + total_variance(schedule, s, std).sqrt() * u


def affine_moments(sampler: Callable[[Tensor, Callable[[], Tensor]], Tensor], draws: int) -> tuple[float, float]:
    """Exact mean and variance of the output of a sampler that is affine in its normal draws, `draws` of them at most.

    Row 0 of the batch sees no noise, row k the k-th draw alone.
    """
    index = 0

    def one_hot() -> Tensor:
        nonlocal index
        index += 1
        draw = torch.zeros(draws + 1, 1, dtype=F64)
        draw[index] = 1.0
        return draw

    out = sampler(one_hot(), one_hot).squeeze(1)
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


class OracleModel(Diffusion):
    """A diffusion model whose network predicts what the closed form says, in the prediction of its settings."""

    def __init__(self, spec: DataSpec, oracle: Callable[[NoiseSchedule], Denoiser], **settings: Any) -> None:
        super().__init__(spec, **settings)
        self.make_oracle = oracle
        self.initialize(seed=0)
        self.double()
        self.requires_grad_(False)
        self.fitted = True

    def network(
        self, z: Tensor, t: Tensor, condition: Tensor | None, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.make_oracle(self.schedule).predict(z, t, self.config.prediction), None


def gaussian_model(dims: int, mean: float, std: float, **settings: Any) -> OracleModel:
    """The exact model of x ~ N(mean, std^2 I)."""
    spec = DataSpec(kind="points", shape=(dims,))
    return OracleModel(spec, lambda schedule: GaussianDenoiser(schedule, mean, std), **settings)


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """log N(x; mean, variance) of each entry."""
    variance = torch.as_tensor(variance, dtype=x.dtype)
    return -0.5 * ((x - mean).square() / variance + variance.log() + math.log(2.0 * math.pi))
