"""Settings of the diffusion family, and how they become a schedule and a network."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trilemma.core.config import Config
from trilemma.core.errors import UsageError
from trilemma.core.model import ModelConfig, OptimizerConfig
from trilemma.diffusion import solvers
from trilemma.diffusion.backbone import Kind
from trilemma.diffusion.denoiser import Variance
from trilemma.diffusion.prediction import NEEDS_SIGNAL, Prediction
from trilemma.diffusion.schedule import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    Learned,
    NoiseSchedule,
    Rectified,
    Spacing,
    SubVP,
    cosine_betas,
    discretized,
    linear_betas,
    zero_terminal_snr,
)
from trilemma.diffusion.training import Coupling, Times, Weighting

FAST = {"lr": 3e-3, "betas": (0.9, 0.99)}
"""Optimiser settings of small networks, which bear larger steps."""

Shape = Literal["linear", "cosine", "vp", "sub-vp", "ve", "edm", "rectified", "learned"]


class DiffusionConfig(ModelConfig):
    """Settings of a diffusion model."""

    schedule: Shape = Field(
        "cosine", description="of the noise: linear, cosine, vp, sub-vp, ve, edm, rectified, learned"
    )
    timesteps: int | None = Field(None, ge=21, description="steps T of a discrete chain; null: continuous time")
    zero_terminal_snr: bool = Field(False, description="rescale the chain so that nothing of x is left at T")
    prediction: Prediction = Field("v", description="what the network predicts: x0, eps, v, score, velocity, mean, edm")
    scale_input: bool = Field(False, description="the network sees z / sqrt(alpha^2 var(x) + sigma^2) (EDM)")
    variance: Variance = Field("optimal", description="of reverse steps: small, large, optimal, learned, learned-range")
    loss: Literal["weighted", "bound", "hybrid"] = Field("weighted", description="weighted, bound or hybrid")
    weighting: Weighting = Field("uniform", description="of times: uniform, snr, min-snr, max-snr, likelihood")
    times: Times = Field("uniform", description="density of training times: uniform, log-normal, importance")
    times_mean: float | None = Field(None, description="of the log-normal: mean of log(sigma / alpha), -1.2 by default")
    times_std: float | None = Field(None, gt=0, description="of the log-normal: standard deviation, 1.2 by default")
    stratified: bool = Field(True, description="a batch's times come from equal parts of their density")
    flips: bool = Field(False, description="pictures are mirrored left to right in half of the training examples")
    coupling: Coupling = Field("independent", description="of data and noise: independent or optimal-transport")
    backbone: Kind | None = Field(None, description="unet, dit or mlp; null: mlp for vectors, else unet")
    width: int = Field(64, ge=4, description="channels at full resolution, or of the hidden layers")
    depth: int = Field(2, ge=1, description="residual blocks per resolution (unet), or in all")
    multipliers: tuple[int, ...] | None = Field(
        None, description="unet: channels per resolution, in widths; null: by size"
    )
    attention_below: int | None = Field(None, ge=0, description="unet: attention at so few positions; null: by size")
    patch: int | None = Field(None, ge=1, description="dit: side of a patch, 2 by default")
    heads: int | None = Field(None, ge=1, description="dit: heads of attention, 4 by default")
    time_embedding: Literal["sinusoidal", "fourier"] = Field("sinusoidal", description="sinusoidal or fourier")
    drop_condition: float | None = Field(
        None, ge=0, lt=1, description="share of conditions left out in training, for guidance; 0.1 where conditional"
    )
    classifier: bool = Field(False, description="the class enters through a noisy classifier, not through the network")
    sampler: str = Field("ancestral", description="solver, unless sample() names one: " + ", ".join(solvers.SOLVERS))
    sampling_steps: int = Field(
        30, ge=1, description="times at which samples are denoised, unless sample() gives others"
    )
    sampling_grid: Spacing | None = Field(
        None, description="spacing of these times: linspace, trailing, leading, karras, log-snr; null: the solver's"
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionConfig:
        chain = self.timesteps is not None
        if chain and self.schedule not in ("linear", "cosine", "vp"):
            raise ValueError(f"timesteps is of a variance-preserving chain; schedule={self.schedule} is continuous")
        if not chain:
            for name, wrong in (
                ("schedule=linear", self.schedule == "linear"),
                ("prediction=mean", self.prediction == "mean"),
                (f"variance={self.variance}", self.variance in ("learned", "learned-range")),
                ("zero_terminal_snr", self.zero_terminal_snr),
            ):
                if wrong:
                    raise ValueError(f"{name} is of a discrete chain: give timesteps, for example timesteps=1000")
        if self.variance in ("learned", "learned-range") and self.loss == "weighted":
            raise ValueError(f"variance={self.variance} is not learned by loss=weighted: give loss=hybrid or bound")
        if self.loss == "hybrid" and self.variance not in ("learned", "learned-range"):
            raise ValueError("loss=hybrid trains a learned variance: give variance=learned or learned-range")
        if self.loss == "bound" and self.weighting != "uniform":
            raise ValueError(f"weighting={self.weighting} has no effect on loss=bound, which has its own")
        if self.loss == "bound" and self.variance == "optimal":
            raise ValueError(
                "loss=bound needs the variance while it trains: give small, large, learned or learned-range"
            )
        if (self.times_mean is not None or self.times_std is not None) and self.times != "log-normal":
            raise ValueError(f"times_mean and times_std have no effect on times={self.times}")
        if self.loss == "bound" and self.times == "log-normal":
            raise ValueError("loss=bound is an integral over uniform times: give times=uniform or importance")
        if self.drop_condition is not None and (not self.conditional or self.classifier):
            raise ValueError("drop_condition has no effect without a condition in the network (conditional=true)")
        if self.classifier and not self.conditional:
            raise ValueError("classifier=true needs conditional=true")
        if self.schedule == "rectified" and self.prediction in NEEDS_SIGNAL:
            raise ValueError(
                f"prediction={self.prediction} says nothing of x at t=1, where no signal is left: give velocity"
            )
        if self.zero_terminal_snr and self.prediction in NEEDS_SIGNAL:
            raise ValueError(f"prediction={self.prediction} says nothing of x at zero terminal SNR: give v or x0")
        if self.classifier and (self.schedule == "rectified" or self.zero_terminal_snr):
            raise ValueError("classifier=true needs a signal at the last time, which this schedule does not have")
        if self.backbone != "dit" and (self.patch is not None or self.heads is not None):
            raise ValueError("patch and heads have no effect without backbone=dit")
        if self.schedule == "learned" and self.loss != "bound":
            raise ValueError("schedule=learned needs loss=bound: any other loss falls when the noise grows")
        if self.coupling != "independent" and (self.loss != "weighted" or self.conditional):
            raise ValueError("coupling=optimal-transport is for loss=weighted and p(x): noise then depends on the data")
        self._check_sampler()
        return self

    def _check_sampler(self) -> None:
        """What would be refused by sample() is refused before the training."""
        if self.sampler not in solvers.SOLVERS:
            raise ValueError(f"sampler is one of {', '.join(solvers.SOLVERS)}")
        if self.coupling != "independent" and solvers.SOLVERS[self.sampler]().is_random:
            raise ValueError(f"coupling=optimal-transport trains the flow only, not sampler={self.sampler}: give heun")
        if self.timesteps is not None and self.sampling_steps > self.timesteps and self.sampler != "rk45":
            raise ValueError(
                f"sampling_steps={self.sampling_steps} is more than the chain's timesteps={self.timesteps}"
            )
        if self.schedule == "rectified" or self.zero_terminal_snr:
            if self.sampler in ("sde", "langevin"):
                raise ValueError(f"sampler={self.sampler} needs a signal at the last time: give ancestral or heun")
            if self.sampling_grid in ("karras", "log-snr"):
                raise ValueError(f"sampling_grid={self.sampling_grid} needs a signal at the last time: give trailing")
        if self.sampler == "rk45" and self.sampling_grid is not None:
            raise ValueError("sampling_grid has no effect on sampler=rk45, which chooses its own times")


class SampleSettings(Config):
    """Settings of `sample` that are not its solver's."""

    sampler: str | None = None
    steps: int | None = Field(None, ge=1)
    grid: Spacing | None = None
    clip: bool | None = None
    guidance: float = Field(1.0, allow_inf_nan=False)
    interval: tuple[float, float] | None = None
    rescale: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> SampleSettings:
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"interval is [low, high] of sigma / alpha with 0 <= low < high, got {list(self.interval)}"
            )
        return self


class ScoreSettings(Config):
    """Settings of `log_prob`."""

    method: Literal["bound", "ode"] | None = None
    terms: Literal["all"] | Annotated[int, Field(ge=4)] | None = None
    trace: Literal["estimate", "exact"] | None = None
    probes: int | None = Field(None, ge=1)
    rtol: float | None = Field(None, gt=0)
    atol: float | None = Field(None, gt=0)


def make_key(config: DiffusionConfig) -> tuple[object, ...]:
    """What two models must share for one to guide the other."""
    return config.schedule, config.timesteps, config.zero_terminal_snr


def make_schedule(config: DiffusionConfig, levels: int | None) -> NoiseSchedule:
    """The configured schedule.

    On a lattice the least noise of the cosine is half a cell: below it the network would spend itself on rounding.
    """
    if config.timesteps is not None:
        if config.schedule == "vp":
            betas = discretized(VP(), config.timesteps).betas
        else:
            betas = (linear_betas if config.schedule == "linear" else cosine_betas)(config.timesteps)
        return Discrete(zero_terminal_snr(betas) if config.zero_terminal_snr else betas)
    if config.schedule == "cosine":
        return Cosine(0.01 if levels is None else min(0.2, 1.0 / levels))
    kinds: dict[str, type[NoiseSchedule]] = {
        "vp": VP, "sub-vp": SubVP, "ve": VE, "edm": EDM, "rectified": Rectified, "learned": Learned,
    }  # fmt: skip
    return kinds[config.schedule]()


def network_settings(config: DiffusionConfig, kind: Kind, shape: tuple[int, ...]) -> dict[str, Any]:
    """The backbone's own settings: those given, the others by the size of the data."""
    if (kind == "mlp") != (len(shape) == 1):
        raise UsageError(
            f"backbone={kind} does not fit data of shape {shape}: mlp is for vectors, the others for grids"
        )
    if kind != "unet" and (config.multipliers is not None or config.attention_below is not None):
        raise UsageError(f"multipliers and attention_below have no effect on backbone={kind}")
    if kind == "mlp":
        return {}
    if kind == "dit":
        return {"patch": config.patch or 2, "heads": config.heads or 4}
    multipliers, side = [1], max(shape[1:])
    while side > 8 or (side > 1 and len(multipliers) == 1):
        multipliers.append(min(2 * multipliers[-1], 4))
        side = -(-side // 2)
    small = math.prod(shape) <= 256
    return {
        "multipliers": config.multipliers or tuple(multipliers),
        "attention_below": (16 if small else 64) if config.attention_below is None else config.attention_below,
    }
