r"""`Uncertain`: a number, and the independent sources of its error as contrasts.

To first order a statistic deviates from its expectation by a sum over independent sources s (the generated sample,
the held-out data, the training seeds). Of each source we keep contrasts c_1 .. c_R whose mean square is the variance
that it contributes,
    Var = sum_s (1/R_s) sum_r c_{s,r}^2,
with the degrees of freedom nu_s of that estimate. The interval is Student's, with Satterthwaite's
    nu = Var^2 / sum_s (Var_s^2 / nu_s).

Contrasts are linear in the statistic. So the error of a difference or a quotient of statistics that share a source
(two models measured against the same held-out data) follows by adding contrasts source by source (`linear`): what
is common cancels. The same contrasts with random signs and sizes, sum_r w_r c_r with w ~ N(0, 1/R), simulate
many statistics with their joint covariance (`simulate`).

A mean over n independent values v_i has the contrasts (v_i - mean) / sqrt(n - 1), with n - 1 degrees of freedom;
`jackknife` makes them for other statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trilemma.core.noise import make_generator
from trilemma.metrics.estimate import LEVEL, Estimate, t_interval


@dataclass(frozen=True)
class Source:
    """One source of error: contrasts (R,) in float64, and the degrees of freedom of their mean square."""

    contrasts: Tensor
    df: float

    @property
    def variance(self) -> float:
        return float(self.contrasts.square().mean())


@dataclass(frozen=True)
class Uncertain:
    """A number with its sources of error.

    Attributes:
        value: the number.
        sources: by name; empty where no error can be given.
        n: how many examples it was computed from, by sample.
        method: how value and contrasts were made, in a few words.
    """

    value: float
    sources: Mapping[str, Source] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    method: str = ""

    @property
    def variance(self) -> float:
        """Of the value; NaN where there are no sources."""
        return sum(s.variance for s in self.sources.values()) if self.sources else math.nan

    @property
    def se(self) -> float:
        return math.sqrt(self.variance)

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom."""
        terms = sum(s.variance**2 / s.df for s in self.sources.values())
        return self.variance**2 / terms if terms > 0.0 else math.inf

    def renamed(self, names: Mapping[str, str]) -> Uncertain:
        """The same with other names of sources: samples of two models are two sources."""
        return replace(self, sources={names.get(k, k): s for k, s in self.sources.items()})

    def interval(self) -> tuple[float, float] | None:
        """The 95% interval, or None where there is no error or no spread at all."""
        if not self.sources or not math.isfinite(self.se) or self.se == 0.0:
            return None
        return t_interval(self.value, self.se, self.df)

    def estimate(
        self,
        *,
        unit: str = "",
        higher_is_better: bool = True,
        share_of: str | None = None,
        **provenance: Any,
    ) -> Estimate:
        """Value, standard error and interval as plain data.

        Arguments:
            share_of: for a share (a mean of zeros and ones), the sample whose members are counted. Where all of
                them or none count, in every replicate, there is no spread to be seen; the interval is then
                the exact binomial one (Clopper & Pearson 1934), whose far end is 0.025^(1/n) away from 1 (or 0).
            provenance: other fields of `Estimate`: extractor, split, kind.
        """
        se, ci, method = self.se if self.sources else None, self.interval(), self.method
        if se is not None and not math.isfinite(se):
            se = None
        if se == 0.0:
            if share_of is not None and self.value in (0.0, 1.0):
                edge = ((1.0 - LEVEL) / 2.0) ** (1.0 / self.n[share_of])
                ci = (0.0, 1.0 - edge) if self.value == 0.0 else (edge, 1.0)
                method += "; no spread, so the interval is Clopper-Pearson's"
            else:
                se, method = None, f"{method}; no spread, so no interval"
        n = dict(self.n)
        return Estimate(
            value=self.value,
            se=se,
            ci=ci,
            n=next(iter(n.values())) if len(n) == 1 else n,
            unit=unit,
            higher_is_better=higher_is_better,
            method=method,
            **provenance,
        )


def mean(values: Tensor, source: str, method: str = "mean") -> Uncertain:
    """The mean of independent values (n,) that all come from one source; n >= 1, no error for n = 1."""
    values = values.double().cpu()
    n = len(values)
    centre = values.mean()
    sources = {source: Source((values - centre) / math.sqrt(n - 1), n - 1)} if n > 1 else {}
    return Uncertain(float(centre), sources, {source: n}, method)


def linear(value: float, terms: Sequence[tuple[float, Uncertain]], method: str) -> Uncertain:
    """A number that depends on others, with the error sum_i a_i (error of term i) to first order.

    Arguments:
        terms: pairs of the derivative a_i and the number. Contrasts of one source are added; they must have been
            made in the same way, from the same blocks.

    Returns:
        Without sources where a term has none.
    """
    if any(not u.sources for _, u in terms):
        return Uncertain(value, {}, _sizes([u for _, u in terms]), method)
    sources: dict[str, Source] = {}
    for a, u in terms:
        for name, s in u.sources.items():
            if name in sources:
                before = sources[name]
                assert before.contrasts.shape == s.contrasts.shape, f"contrasts of {name} were made in different ways"
                sources[name] = Source(before.contrasts + a * s.contrasts, min(before.df, s.df))
            else:
                sources[name] = Source(a * s.contrasts, s.df)
    return Uncertain(value, sources, _sizes([u for _, u in terms]), method)


def difference(a: Uncertain, b: Uncertain) -> Uncertain:
    """a - b."""
    return linear(a.value - b.value, [(1.0, a), (-1.0, b)], "difference")


def skill(u: Uncertain, floor: Uncertain, ceiling: Uncertain) -> Uncertain:
    """(floor - u) / (floor - ceiling): 0 as bad as the floor, 1 as good as the ceiling; not clipped.

    NaN, without error, where floor and ceiling are equal.
    """
    span = floor.value - ceiling.value
    if span == 0.0:
        return Uncertain(math.nan, {}, u.n, "floor and ceiling are equal")
    s = (floor.value - u.value) / span
    return linear(s, [(-1.0 / span, u), ((1.0 - s) / span, floor), (s / span, ceiling)], "skill, delta method")


def harmonic_mean(a: Uncertain, b: Uncertain) -> Uncertain:
    """2 a b / (a + b) of numbers a, b >= 0; 0 where both are zero."""
    total = a.value + b.value
    if total <= 0.0:
        return linear(0.0, [(0.5, a), (0.5, b)], "harmonic mean")
    slopes = 2.0 * (b.value / total) ** 2, 2.0 * (a.value / total) ** 2
    method = f"harmonic mean, delta method; {a.method}"
    return linear(2.0 * a.value * b.value / total, [(slopes[0], a), (slopes[1], b)], method)


def pool(runs: Sequence[Uncertain], source: str) -> Uncertain:
    """The mean over training seeds.

    One run: itself, its own errors ("generated", and "model", that of an estimated log Z) named after `source`.
    Several: the spread of the values over the seeds, which holds the variation between trainings, between samples
    and between estimates of log Z, is the source `source`; the errors that the runs have in common (the held-out
    data) are averaged contrast by contrast. Runs without errors have a mean without one.
    """
    own = {"generated": source, "model": f"{source}: model"}
    if len(runs) == 1:
        return runs[0].renamed(own)
    values = torch.tensor([u.value for u in runs], dtype=torch.float64)
    spread = mean(values, source)
    method = f"mean over {len(runs)} training seeds; each: {runs[0].method}"
    if not all(u.sources for u in runs):  # the spread alone would leave the held-out data's error out
        return Uncertain(spread.value, {}, runs[0].n, method)
    shared = [replace(u, sources={k: s for k, s in u.sources.items() if k not in own}) for u in runs]
    sources = dict(spread.sources)
    if all(u.sources for u in shared):
        sources |= linear(0.0, [(1.0 / len(runs), u) for u in shared], "").sources
    return Uncertain(spread.value, sources, runs[0].n, method)


def simulate(numbers: Sequence[Uncertain], draws: int, *key: str | int) -> Tensor:
    """Joint draws (draws, len(numbers)) of normal errors about the values, with the covariance of the contrasts.

    Numbers without sources do not vary.
    """
    out = torch.tensor([u.value for u in numbers], dtype=torch.float64).repeat(draws, 1)
    names = sorted({(name, len(s.contrasts)) for u in numbers for name, s in u.sources.items()})
    for name, r in names:
        g = make_generator("simulate", *key, name, r)
        weights = torch.randn(draws, r, generator=g, dtype=torch.float64) / math.sqrt(r)
        for i, u in enumerate(numbers):
            s = u.sources.get(name)
            if s is not None and len(s.contrasts) == r:
                out[:, i] += weights @ s.contrasts
    return out


def _sizes(numbers: Sequence[Uncertain]) -> dict[str, int]:
    merged: dict[str, int] = {}
    for u in numbers:
        merged |= u.n
    return merged
