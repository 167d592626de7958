"""`Estimate`: a measured number that carries its uncertainty, sample sizes and provenance.

A metric without an interval cannot decide between two models, and a number without its extractor, unit and
sample sizes cannot be put beside another one. So what is reported is always the whole record.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from scipy.special import stdtrit
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.score import Kind

LEVEL = 0.95
"""Coverage of every confidence interval."""


class Estimate(BaseModel):
    """A number with its uncertainty; plain data, JSON in and JSON out.

    Attributes:
        value: the number itself.
        se: its standard error, or None where none can be given.
        ci: the 95% confidence interval (low, high), or None. It is not cut at the ends of a metric's range.
        n: how many examples it was computed from: one number, or one each for "generated" and "reference".
        unit: of `value`: "bits/dim", "nats/dim", "share", "ratio", "squared distance".
        kind: of a likelihood: exact, lower_bound, upper_bound or estimate; "estimate" for every other metric.
        higher_is_better: which direction is good.
        extractor: id of the feature extractor, or None where features play no part.
        split: which part of the real data it was measured against, or None.
        quartiles: of repeated timings, or None.
        method: how value and interval were computed, in a few words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    value: float
    se: float | None
    ci: tuple[float, float] | None
    n: int | dict[str, int]
    unit: str
    kind: Kind = "estimate"
    higher_is_better: bool
    extractor: str | None = None
    split: Literal["train", "validation", "test"] | None = None
    quartiles: tuple[float, float] | None = None
    method: str

    def __str__(self) -> str:
        interval = "" if self.ci is None else f" [{self.ci[0]:.4g}, {self.ci[1]:.4g}]"
        return f"{self.value:.4g}{interval} {self.unit}"


def t_interval(value: float, se: float, df: float) -> tuple[float, float]:
    """The interval value -+ t se with Student's quantile for `df` degrees of freedom."""
    half = float(stdtrit(df, 0.5 + LEVEL / 2.0)) * se
    return value - half, value + half


def check_features(generated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Features (M, d) and (N, d) in float64.

    Raises:
        DataError: other shapes, an empty sample, or values that are not finite.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise DataError(f"features must be (M, d) and (N, d), got {tuple(generated.shape)}, {tuple(reference.shape)}")
    for name, features in (("generated", generated), ("reference", reference)):
        if not len(features):
            raise DataError(f"there are no {name} examples to measure")
        if not bool(features.isfinite().all()):
            raise DataError(f"features of the {name} examples hold NaN or infinity; look at those examples")
    return generated.double(), reference.double()
