"""A likelihood that says what it is.

``Score(value, kind, stderr, unit)``: `value` holds log p(x) for each example, in nats and in the units of
the user's data (a log-density for real data, a log-probability for discrete data). `kind` says what the
number is: exact, a lower bound (an ELBO, uniform dequantization), an upper bound, or an estimate (annealed
importance sampling, a stochastic trace). Kinds propagate: what is computed from a bound is a bound.

Dequantization (Theis, van den Oord & Bethge 2016, arXiv:1511.01844): for integer x and u ~ U[0,1)^D,
    log P(x) = log E_u p(x + u) >= E_u log p(x + u),
so a density on dequantized data gives a lower bound on the log-probability of the integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.spec import DataSpec

Kind = Literal["exact", "lower_bound", "upper_bound", "estimate"]
Unit = Literal["nats", "nats/dim", "bits/dim"]


def combine_kinds(a: Kind, b: Kind) -> Kind:
    """The kind of a sum of two log-terms."""
    if a == b or b == "exact":
        return a
    if a == "exact":
        return b
    return "estimate"  # a bound plus an estimate, or bounds that point in opposite directions


def flip_kind(kind: Kind) -> Kind:
    """The kind of the negative: minus a lower bound is an upper bound."""
    flipped: dict[Kind, Kind] = {"lower_bound": "upper_bound", "upper_bound": "lower_bound"}
    return flipped.get(kind, kind)


@dataclass(frozen=True)
class Score:
    """Log-likelihoods of examples, or their mean.

    Attributes:
        value: (N,) one number per example, or () for a mean; float64.
        kind: what the number is.
        stderr: Monte-Carlo standard error of `value` where that is known (for a mean: the standard error
            of the mean over examples), else None.
        unit: "nats", "nats/dim" (log-likelihood per dimension; higher is better) or "bits/dim"
            (negative log2-likelihood per dimension of 8-bit data; lower is better).
        shared: standard error of a term that all examples have in common (an estimated log Z): it does not
            average out, so the mean carries it whole.
        method: how it was computed, with tolerances and draws, where there is more than one way; else "".
        evaluations: of the network, one after the other, where they are counted; else 0.
    """

    value: Tensor
    kind: Kind
    stderr: Tensor | None = None
    unit: Unit = "nats"
    shared: float = 0.0
    method: str = ""
    evaluations: int = 0

    def __post_init__(self) -> None:
        if self.stderr is not None and self.stderr.shape != self.value.shape:
            raise ValueError(f"stderr {tuple(self.stderr.shape)} and value {tuple(self.value.shape)} differ")

    def mean(self) -> Score:
        """The mean over examples with its standard error, sqrt(s^2 / N + shared^2).

        The spread s over examples already contains each example's own Monte-Carlo error, so that is not
        added again. An example whose value is not finite makes the mean what it is: nothing is dropped.
        """
        if self.value.ndim == 0:
            return self
        n = self.value.shape[0]
        stderr = (self.value.var(correction=1) / n + self.shared**2).sqrt() if n > 1 else None
        return replace(self, value=self.value.mean(), stderr=stderr)

    def per_dim(self, spec: DataSpec) -> Score:
        """In the unit that compares across data sets: bits/dim for 8-bit data, nats/dim otherwise."""
        if self.unit != "nats":
            return self
        if spec.is_8bit:
            return self.bits_per_dim(spec)
        return self._rescale(1.0 / spec.dims, "nats/dim")

    def bits_per_dim(self, spec: DataSpec) -> Score:
        """Negative log2-likelihood per dimension; only 8-bit data have it."""
        if not spec.is_8bit:
            raise UsageError(
                "bits/dim is defined here for 8-bit data only, and these are "
                f"{spec.describe()}: use nats per dimension, score.per_dim(spec)"
            )
        assert self.unit == "nats"
        return self._rescale(-1.0 / (spec.dims * math.log(2.0)), "bits/dim")

    def _rescale(self, factor: float, unit: Unit) -> Score:
        return replace(
            self,
            value=self.value * factor,
            kind=self.kind if factor > 0 else flip_kind(self.kind),
            stderr=None if self.stderr is None else self.stderr * abs(factor),
            unit=unit,
            shared=self.shared * abs(factor),
        )

    def __str__(self) -> str:
        if self.value.ndim:
            return f"Score({self.value.shape[0]} examples, mean {self.mean()})"
        sign = {"exact": "=", "lower_bound": ">=", "upper_bound": "<=", "estimate": "~"}[self.kind]
        error = "" if self.stderr is None else f" +- {self.stderr.item():.2g}"
        return f"{sign} {self.value.item():.4g}{error} {self.unit} ({self.kind.replace('_', ' ')})"


def cat_scores(scores: list[Score]) -> Score:
    """Join the scores of batches; they must agree in kind and unit."""
    first = scores[0]
    assert all(s.kind == first.kind and s.unit == first.unit for s in scores), "scores of unlike kinds"
    stderrs = [s.stderr for s in scores if s.stderr is not None]
    return Score(
        value=torch.cat([s.value for s in scores]),
        kind=first.kind,
        stderr=torch.cat(stderrs) if len(stderrs) == len(scores) else None,
        unit=first.unit,
        shared=max(s.shared for s in scores),
        method=first.method,
        evaluations=max(s.evaluations for s in scores),
    )
