"""`Metric`: one metric of samples that come in batches, or from several processes.

    metric = Metric("clipped_density", reference)
    for x in batches:
        metric.update(extractor(x))
    estimate = metric.compute()  # value, se, ci, n, method

Neither the order of the batches nor how they were cut makes a difference. `FEATURE_METRICS` is the list of all that
compare features; `Evaluator` takes them together, so that what they share (distances, moments) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.core.errors import DataError, unknown_name
from trilemma.metrics.catalogue import describe
from trilemma.metrics.estimate import Estimate
from trilemma.metrics.frechet import frechet, frechet_limit, spread
from trilemma.metrics.kernel import kernel_distance, rbf_mmd
from trilemma.metrics.neighbours import NAMES, neighbour_metrics
from trilemma.metrics.statistics import FeatureStatistics
from trilemma.metrics.two_sample import classifier_auc
from trilemma.metrics.uncertain import Uncertain, harmonic_mean
from trilemma.metrics.wasserstein import sliced_wasserstein

FeatureMetric = Callable[[FeatureStatistics, FeatureStatistics], Uncertain]
"""(generated, reference) -> a number with its error."""


def core_metrics(generated: FeatureStatistics, reference: FeatureStatistics) -> dict[str, Uncertain]:
    """Fréchet distance, the six nearest-neighbour metrics from one pass, and their summary "overall"."""
    near = neighbour_metrics(generated.balls, reference.balls)
    return near | {
        "frechet": frechet(generated.moments, reference.moments),
        "overall": harmonic_mean(near["clipped_density"], near["clipped_coverage"]),
    }


def _core(name: str) -> FeatureMetric:
    return lambda x, y: core_metrics(x, y)[name]


OTHER_METRICS: dict[str, FeatureMetric] = {
    "frechet_limit": lambda x, y: frechet_limit(x.moments, y.moments, frechet(x.moments, y.moments)),
    "spread": lambda x, y: spread(x.moments, y.moments),
    "kernel_distance": lambda x, y: kernel_distance(x.features, y.polynomial),
    "rbf_mmd": lambda x, y: rbf_mmd(x.features, y.gaussian),
    "sliced_wasserstein": lambda x, y: sliced_wasserstein(x.features, y.features),
    "auc_linear": lambda x, y: classifier_auc(x.features, y.features, "linear"),
    "auc_nonlinear": lambda x, y: classifier_auc(x.features, y.features, "nonlinear"),
}

FEATURE_METRICS: dict[str, FeatureMetric] = {
    **{name: _core(name) for name in ("overall", "frechet", *NAMES)},
    **OTHER_METRICS,
}


class Metric:
    """A metric of `FEATURE_METRICS` against one reference.

    Arguments:
        name: of the metric.
        reference: features of real examples.

    Raises:
        UsageError: there is no such metric.
    """

    def __init__(self, name: str, reference: FeatureStatistics) -> None:
        if name not in FEATURE_METRICS:
            raise unknown_name("metric", name, sorted(FEATURE_METRICS))
        self.name, self.reference = name, reference
        self._batches: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Add generated features (N, d) of the reference's extractor."""
        self._batches.append(features.detach().cpu().double())

    def merge(self, other: Metric) -> None:
        """Add what another process has collected for the same metric and reference.

        Raises:
            DataError: another metric or reference.
        """
        if other.name != self.name or other.reference.id != self.reference.id:
            raise DataError(f"{other.name} cannot be merged into {self.name}: another metric, or another reference")
        self._batches += other._batches

    def compute(self) -> Estimate:
        """The estimate from all features so far.

        Raises:
            DataError: none were given, or too few for the metric.
        """
        if not self._batches:
            raise DataError(f"{self.name}: no features were given; call update first")
        generated = FeatureStatistics(torch.cat(self._batches), self.reference.extractor)
        number = FEATURE_METRICS[self.name](generated, self.reference)
        return describe(self.name, number, extractor=self.reference.extractor)
