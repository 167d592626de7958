"""What is measured of a model: its samples against real examples, and its likelihood."""

from __future__ import annotations

import math

from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.score import Score
from trilemma.core.spec import DataSpec
from trilemma.metrics.estimate import Estimate, t_interval
from trilemma.metrics.extractor import FeatureExtractor
from trilemma.metrics.frechet import frechet_replicates
from trilemma.metrics.neighbours import neighbour_replicates


def evaluate_samples(generated: Tensor, reference: Tensor, extractor: FeatureExtractor) -> dict[str, Estimate]:
    """Frechet distance, precision, recall, density and coverage of samples against real examples.

    Arguments:
        generated, reference: (N, *spec.shape) each, in data units. All five metrics depend on N, so the two
            numbers must be equal, and the same for everything they will be compared with.
        extractor: what distances are taken in.

    Returns:
        "frechet", "precision", "recall", "density", "coverage".

    Raises:
        UsageError: unequal numbers.
        DataError: examples that are not data of the extractor's spec, or too few.
    """
    if len(generated) != len(reference):
        raise UsageError(
            f"{len(generated)} generated against {len(reference)} reference examples: these metrics depend on the "
            "sample size; take equal numbers"
        )
    x, y = extractor(generated), extractor(reference)
    frechet = frechet_replicates(x, y)
    near = neighbour_replicates(x, y)

    def share(name: str, of: str) -> Estimate:
        return near[name].estimate(unit="share", higher_is_better=True, extractor=extractor.id, share_of=of)

    return {
        "frechet": frechet.estimate(unit="squared distance", higher_is_better=False, extractor=extractor.id),
        "precision": share("precision", "generated"),
        "recall": share("recall", "reference"),
        "density": near["density"].estimate(unit="ratio", higher_is_better=True, extractor=extractor.id),
        "coverage": share("coverage", "reference"),
    }


def mean_log_likelihood(score: Score, spec: DataSpec) -> Estimate:
    """The mean log-likelihood of examples with its kind, in bits/dim for 8-bit data and nats/dim otherwise.

    The interval is Student's over the examples. A mean that is not finite is reported as it is, without one.

    Arguments:
        score: (N,) one value per example.
    """
    if score.value.ndim != 1:
        raise UsageError("mean_log_likelihood needs a score per example, not their mean")
    n = len(score.value)
    mean = score.per_dim(spec).mean()
    value = float(mean.value)
    se = None if mean.stderr is None else float(mean.stderr)
    if se is not None and not math.isfinite(se):
        se = None
    return Estimate(
        value=value,
        se=se,
        ci=None if se is None else t_interval(value, se, n - 1),
        n=n,
        unit=mean.unit,
        kind=mean.kind,
        higher_is_better=mean.unit != "bits/dim",
        method="mean over examples, Student's interval",
    )
