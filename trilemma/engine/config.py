"""Settings of a training run, and how its budget becomes a plan."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from trilemma.core.anneal import cosine
from trilemma.core.config import Config
from trilemma.core.errors import UsageError

DEFAULT_BUDGET = "5min"

_UNITS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str | float) -> float:
    """Seconds of "30s", "10min", "1h30m", "90" or 90.

    Raises:
        UsageError: not a duration, or not positive.
    """
    whole = str(text).strip().lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|sec|s|min|m|h|d)?", whole)
    if not parts or "".join(number + unit for number, unit in parts) != whole:
        raise UsageError(f"cannot read the duration {text!r}; write for example 30s, 10min or 1h30m")
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"a time budget must be positive, got {text!r}")
    return seconds


class TrainConfig(Config):
    """How a model is trained. At most one of `steps`, `images`, `epochs`, `budget` is given."""

    seed: int = Field(0, ge=0, description="decides weights, data order and noise")
    steps: int | None = Field(None, gt=0, description="optimisation steps")
    images: int | None = Field(None, gt=0, description="examples seen")
    epochs: float | None = Field(None, gt=0, description="passes over the training split")
    budget: float | None = Field(None, gt=0, description="seconds of training, or 30s, 10min, 1h")
    batch_size: int = Field(128, gt=0, description="examples per optimisation step, over all processes")
    micro_batch_size: int | None = Field(None, gt=0, description="examples at once on a device; gradients accumulate")
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the budget over which the learning rate rises")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    final_lr: float = Field(0.01, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient, or null")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the weights' moving average, or null")
    ema_half_life: float | None = Field(
        None, gt=0, description="examples over which the moving average forgets half; in the place of ema"
    )
    ema_ramp: float | None = Field(
        None, gt=0, description="that half-life is at most this fraction of the examples seen so far"
    )
    validations: int = Field(20, ge=0, description="measurements of the validation loss over the run")
    patience: int | None = Field(None, gt=0, description="stop after this many validations without a new best")
    previews: int = Field(4, ge=0, description="sample pictures over the run, spaced by doublings; 0: none")
    snapshots: int = Field(0, ge=0, description="models kept on the way, spaced by doublings of the budget")
    checkpoint_every: float = Field(60.0, gt=0, description="seconds between checkpoints")
    checkpoint_steps: int | None = Field(None, gt=0, description="steps between checkpoints, beside the seconds")
    keep: int = Field(2, gt=0, description="checkpoints that stay on the disk")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on CUDA, else fp32")
    compile: bool | None = Field(None, description="torch.compile; null: on CUDA where the losses allow it")
    threads: int | None = Field(None, gt=0, description="CPU threads; null: chosen from the work per operation")

    @field_validator("budget", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> object:
        return parse_duration(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        given = [k for k in ("steps", "images", "epochs", "budget") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of steps, images, epochs and budget, not {' and '.join(given)}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size")
        if self.ema is not None and self.ema_half_life is not None:
            raise ValueError("give one of ema and ema_half_life, not both")
        if self.ema_ramp is not None and self.ema_half_life is None:
            raise ValueError("ema_ramp has no effect without ema_half_life")
        if self.patience is not None and self.validations == 0:
            raise ValueError("patience has no effect without validations")
        return self

    def total_steps(self, examples: int) -> int | None:
        """Steps of a budget that is not time; None for a time budget."""
        if self.steps is not None:
            return self.steps
        seen = self.images if self.images is not None else (self.epochs or 0) * examples
        return max(1, math.ceil(seen / self.batch_size)) if seen else None

    @property
    def seconds(self) -> float:
        """The time budget, where that is what is given (or nothing is)."""
        return self.budget if self.budget is not None else parse_duration(DEFAULT_BUDGET)

    @property
    def averages(self) -> bool:
        """Whether there is a moving average of the weights."""
        return self.ema is not None or self.ema_half_life is not None

    def ema_decay(self, step: int) -> float:
        """Decay of the moving average after `step` steps: short at first, so that it forgets the initial weights."""
        if self.ema is not None:
            return min(self.ema, (1 + step) / (10 + step))
        assert self.ema_half_life is not None
        seen = step * self.batch_size
        half_life = min(self.ema_half_life, math.inf if self.ema_ramp is None else self.ema_ramp * seen)
        return float(0.5 ** (self.batch_size / half_life))

    def learning_rate(self, progress: float) -> float:
        """Factor on the peak learning rate at `progress` in [0, 1]: linear warm-up, then cosine to `final_lr`."""
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-3)
        if self.schedule == "constant":
            return 1.0
        return cosine(1.0, self.final_lr, min(1.0, (progress - self.warmup) / (1.0 - self.warmup)))
