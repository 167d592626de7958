"""`Evaluator`: measures samples of one data set against its held-out part, all with the same yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.score import Kind, Score, flip_kind
from trilemma.core.spec import DataSpec
from trilemma.data.dataset import Dataset, get_conditions, hash_examples
from trilemma.data.toys import Toy
from trilemma.metrics.catalogue import METRICS, describe
from trilemma.metrics.estimate import Estimate
from trilemma.metrics.extractor import FeatureExtractor
from trilemma.metrics.labels import Labeller, class_histogram_kl, inception_score, modes_hit
from trilemma.metrics.memorization import NeighbourTest, TrainingDistances, neighbour_test
from trilemma.metrics.metric import OTHER_METRICS, core_metrics
from trilemma.metrics.statistics import FeatureCache, FeatureStatistics
from trilemma.metrics.tables import column_complements, correlation_difference, mean_of_columns, train_on_synthetic
from trilemma.metrics.uncertain import Source, Uncertain, mean

MAX_TRAIN = 10_000
"""Training examples whose distances to samples are taken, at most."""

SECOND = ("frechet", "clipped_density", "clipped_coverage")
"""Metrics that are also taken in the second features."""


@dataclass(frozen=True)
class Measured:
    """What was found of one sample.

    Attributes:
        metrics: by the names of `METRICS`.
        columns: of a table, how well each column's distribution fits, by its name.
        copying: the test on nearest neighbours.
        features: of the sample, (N, d), in its own order.
    """

    metrics: Mapping[str, Uncertain]
    copying: NeighbourTest
    features: Tensor
    columns: Mapping[str, Uncertain] = field(default_factory=dict)


class Evaluator:
    """The yardsticks of one comparison.

    Arguments:
        data: held-out examples are the first `n` of its test split.
        extractor: what distances are taken in.
        second: a second opinion, of another kind; or None.
        n: examples on either side. Most metrics depend on it.
        cache: folder where features of pretrained extractors are kept, or None.

    Raises:
        UsageError: there are fewer held-out examples.
    """

    def __init__(
        self,
        data: Dataset,
        extractor: FeatureExtractor,
        second: FeatureExtractor | None,
        n: int,
        cache: Path | None = None,
    ) -> None:
        if n > len(data.test):
            raise UsageError(f"{n} held-out examples are asked for, {data.name} has {len(data.test)}")
        self.spec, self.extractor, self.second, self.n = data.spec, extractor, second, n
        self.test = data.test.head(n)
        self.features = FeatureCache(extractor, cache)
        self.held_out = self.features(self.test.x)
        self.reference = FeatureStatistics(self.held_out, extractor.id)
        self.reference_second = None if second is None else FeatureStatistics(second(self.test.x), second.id)
        train = data.train.head(MAX_TRAIN).x
        self.train, self.trained = self.features(train), len(data.train)
        self.distances = TrainingDistances(self.train, self.held_out)
        self.pool = self.train, self.held_out
        if self.spec.kind != "table":  # the splits keep identical examples together: only different ones exchange
            self.pool = self.train[distinct(train)], self.held_out[distinct(self.test.x)]
        self.labeller: Labeller | None = None
        spec = data.spec.condition
        self.classes = spec.size if spec is not None and spec.kind == "class" and spec.size > 1 else 0
        if self.classes and extractor.kind != "classifier":
            self.labeller = Labeller(self.train, get_conditions(data.train)[: len(self.train)])

    def measure(self, x: Tensor) -> Measured:
        """Everything that can be said of samples x (n, *spec.shape), in data units.

        Raises:
            UsageError: another number of samples than of held-out examples.
            DataError: not data of this spec.
        """
        features, metrics = self._in_features(x)
        generated, y = FeatureStatistics(features, self.extractor.id), self.reference
        metrics |= _possible({name: partial(m, generated, y) for name, m in OTHER_METRICS.items()})
        metrics |= self.distances.measure(features) | self._labels(x, features)
        if self.second is not None and self.reference_second is not None:
            again = FeatureStatistics(self.second(x), self.second.id)
            second = core_metrics(again, self.reference_second)
            metrics |= {f"{name}_pca": second[name] for name in SECOND}
        columns: dict[str, Uncertain] = {}
        if self.spec.kind == "table":
            columns = column_complements(x, self.test.x, self.spec)
            metrics |= {"column_fit": mean_of_columns(columns)} | self._between_columns(x)
        copying = self.copying(features)
        in_order = {name: metrics[name] for name in METRICS if name in metrics}
        return Measured(in_order, copying, features, columns)

    def copying(self, features: Tensor) -> NeighbourTest:
        """Whether samples with these features are nearer to training than to held-out examples."""
        return neighbour_test(features, *self.pool, whiten=self.extractor.kind == "whitened-pca", trained=self.trained)

    def measure_core(self, x: Tensor) -> dict[str, Uncertain]:
        """The Fréchet distance and the nearest-neighbour metrics alone, for curves."""
        return self._in_features(x)[1]

    def _in_features(self, x: Tensor) -> tuple[Tensor, dict[str, Uncertain]]:
        _check_numbers(len(x), self.n)
        features = self.features(x)
        return features, core_metrics(FeatureStatistics(features, self.extractor.id), self.reference)

    def _labels(self, x: Tensor, features: Tensor) -> dict[str, Uncertain]:
        if not self.classes:
            return {}
        assert self.test.condition is not None
        found: dict[str, Uncertain] = {}
        if self.labeller is None:
            logits = self.extractor.logits(x)
            labels, found["inception_score"] = logits.argmax(1), inception_score(logits)
        else:
            labels = self.labeller(features)
        found["modes"] = modes_hit(labels, self.test.condition, self.classes)
        found["class_kl"] = class_histogram_kl(labels, self.test.condition, self.classes)
        return found

    def _between_columns(self, x: Tensor) -> dict[str, Uncertain]:
        found = {}
        correlations = correlation_difference(x, self.test.x, self.spec)
        if correlations is not None:
            found["correlation_difference"] = correlations
        if len(self.spec.columns) > 1:
            found["tstr"] = train_on_synthetic(x, self.test.x, self.spec)
        return found

    def describe(self, metrics: Mapping[str, Uncertain]) -> dict[str, Estimate]:
        """As plain data with extractor and split."""
        return {name: describe(name, u, **self.provenance(name)) for name, u in metrics.items()}

    def provenance(self, name: str) -> dict[str, str | None]:
        """Which extractor and split a metric of samples was taken with."""
        raw = ("column_fit", "correlation_difference", "tstr")
        second = None if self.second is None else self.second.id
        extractor = None if name in raw else second if name.endswith("_pca") else self.extractor.id
        return {"extractor": extractor, "split": "test"}


def _check_numbers(generated: int, reference: int) -> None:
    if generated != reference:
        raise UsageError(
            f"{generated} generated against {reference} reference examples: these metrics depend on the sample size; "
            "take equal numbers"
        )


def _possible(metrics: Mapping[str, Callable[[], Uncertain]]) -> dict[str, Uncertain]:
    """Those that so few examples allow: a classifier needs more than a distance does."""
    found = {}
    for name, metric in metrics.items():
        with suppress(DataError):
            found[name] = metric()
    return found


def distinct(x: Tensor) -> Tensor:
    """Indices of the first of each set of identical rows of x (N, *), in their order."""
    _, first = np.unique(np.array(hash_examples(x.cpu().numpy())), return_index=True)
    return torch.from_numpy(np.sort(first))


def evaluate_samples(generated: Tensor, reference: Tensor, extractor: FeatureExtractor) -> dict[str, Estimate]:
    """Fréchet distance and the six nearest-neighbour metrics of samples against real examples.

    Arguments:
        generated, reference: (N, *spec.shape) each, in data units. All these metrics depend on N, so the two
            numbers must be equal, and the same for everything they will be compared with.
        extractor: what distances are taken in.

    Returns:
        "frechet", "precision", "recall", "density", "coverage", "clipped_density", "clipped_coverage", "overall".

    Raises:
        UsageError: unequal numbers.
        DataError: examples that are not data of the extractor's spec, or too few.
    """
    _check_numbers(len(generated), len(reference))
    x, y = (FeatureStatistics(extractor(t), extractor.id) for t in (generated, reference))
    return {name: describe(name, u, extractor=extractor.id) for name, u in core_metrics(x, y).items()}


def log_likelihood(score: Score, spec: DataSpec) -> tuple[Uncertain, dict[str, Any]]:
    """The mean log-likelihood of examples, in bits/dim for 8-bit data and nats/dim otherwise.

    The examples are a sample: the source "reference" of its error. What they have in common (an estimated
    log Z) is the source "model". A mean that is not finite is what it is, without an error.

    Arguments:
        score: (N,) one value per example.

    Returns:
        The mean, and unit, kind and direction for `describe`.
    """
    if score.value.ndim != 1:
        raise UsageError("a mean log-likelihood needs a score per example, not their mean")
    per_dim = score.per_dim(spec)
    how = f"; {score.method}" if score.method else ""
    number = mean(per_dim.value, "reference", f"mean over examples, Student's interval{how}")
    if not bool(per_dim.value.isfinite().all()):
        number = Uncertain(number.value, {}, number.n, "some examples have density zero or infinite; no interval")
    elif per_dim.shared:
        shared = Source(torch.tensor([per_dim.shared], dtype=torch.float64), torch.inf)
        number = Uncertain(number.value, {**number.sources, "model": shared}, number.n, number.method)
    kind = {"unit": per_dim.unit, "kind": per_dim.kind, "higher_is_better": per_dim.unit != "bits/dim"}
    return number, kind


def mean_log_likelihood(score: Score, spec: DataSpec) -> Estimate:
    """`log_likelihood` as plain data."""
    number, kind = log_likelihood(score, spec)
    return describe("log_likelihood", number, **kind)


def kl_by_quadrature(density: Toy, model: GenerativeModel) -> tuple[Uncertain, Kind]:
    """KL(p || q) = int p (log p - log q) dx in nats, of a known density p and a model's log_prob.

    Its kind follows from that of log q: a lower bound on log q makes an upper bound on the divergence. Infinite
    where the model has density zero somewhere that p has not.
    """
    x, w = density.quadrature()
    log_p = density.log_density(x)
    score = model.log_prob(x.float())
    value = float((w * log_p.exp() * (log_p - score.value)).sum())
    return Uncertain(value, {}, {"nodes": len(x)}, f"quadrature, {len(x)} nodes"), flip_kind(score.kind)
