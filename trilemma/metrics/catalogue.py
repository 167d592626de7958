"""`METRICS`: what each metric is called, what it means, in which unit it is and which direction is good."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trilemma.metrics.estimate import Estimate
from trilemma.metrics.uncertain import Uncertain

Axis = Literal["quality", "coverage", "both", "likelihood", "copying", "labels", "latent", "speed", "cost"]


class MetricInfo(BaseModel):
    """How a metric is headed and explained.

    Attributes:
        title: in the page's table.
        short: in the terminal's; the title by default.
        meaning: what a reader should know, in plain words.
        better: which direction is good.
        unit: of the value; "" where it depends on the data.
        axis: which question it answers.
        of_samples: it compares a sample with held-out examples, so it depends on how many there are.
        share_of: for a mean of zeros and ones, the sample whose members are counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    short: str = ""
    meaning: str
    better: Literal["lower", "higher", "neither"]
    unit: str = ""
    axis: Axis
    of_samples: bool = True
    share_of: Literal["generated", "reference"] | None = None

    @property
    def heading(self) -> str:
        return self.short or self.title


def _samples(
    title: str, axis: Axis, better: Literal["lower", "higher", "neither"], unit: str, meaning: str, **more: str
) -> MetricInfo:
    return MetricInfo.model_validate(
        {"title": title, "axis": axis, "better": better, "unit": unit, "meaning": meaning, **more}
    )


def _cost(
    title: str, better: Literal["lower", "higher", "neither"], unit: str, meaning: str, **more: str
) -> MetricInfo:
    axis = "speed" if unit in ("1/s", "s", "evaluations") and title != "training" else "cost"
    return MetricInfo.model_validate(
        {"title": title, "axis": axis, "better": better, "unit": unit, "meaning": meaning, "of_samples": False, **more}
    )


METRICS: dict[str, MetricInfo] = {
    "overall": _samples(
        "overall", "both", "higher", "ratio",
        "Harmonic mean of quality and coverage: 1 is as good as real data, and a model needs both. Models are ranked "
        "by it.",
    ),
    "clipped_density": _samples(
        "quality", "quality", "higher", "ratio",
        "Clipped Density: how many neighbourhoods of held-out data a sample lies in, each sample counting at most once "
        "and outliers' neighbourhoods cut; 1 is as good as real data, and it falls with the share of bad samples.",
    ),
    "clipped_coverage": _samples(
        "coverage", "coverage", "higher", "ratio",
        "Clipped Coverage: how well the neighbourhoods of held-out data are filled with samples, calibrated so that it "
        "is the share of good samples that would fill them as well; 1 is as good as real data.",
    ),
    "frechet": _samples(
        "Fréchet distance", "both", "lower", "squared distance",
        "Squared Fréchet distance between the means and covariances of features of samples and of held-out "
        "data. It is biased upwards at finite n, equally for all rows, which have the same n.", short="Fréchet",
    ),
    "frechet_limit": _samples(
        "Fréchet, n → ∞", "both", "lower", "squared distance",
        "The Fréchet distance extrapolated to infinitely many examples.", short="Fréchet∞",
    ),
    "kernel_distance": _samples(
        "kernel distance", "both", "lower", "squared distance",
        "Unbiased squared maximum mean discrepancy with the cubic kernel of KID; 0 for equal distributions.",
        short="kernel",
    ),
    "rbf_mmd": _samples(
        "MMD (RBF)", "both", "lower", "squared distance",
        "Unbiased squared maximum mean discrepancy with a Gaussian kernel as wide as the median distance of "
        "held-out data; 0 for equal distributions.", short="MMD",
    ),
    "sliced_wasserstein": _samples(
        "sliced Wasserstein", "both", "lower", "distance",
        "Mean earth mover's distance along fixed random directions of the features.", short="sliced W",
    ),
    "auc_linear": _samples(
        "told apart, linear", "both", "lower", "area",
        "Cross-validated area under the ROC curve of a linear classifier between samples and held-out data; "
        "0.5: it cannot tell them apart, 1: always.", short="AUC lin",
    ),
    "auc_nonlinear": _samples(
        "told apart, trees", "both", "lower", "area",
        "The same of gradient-boosted trees.", short="AUC tree",
    ),
    "precision": _samples(
        "precision", "quality", "higher", "share",
        "Share of samples that lie within the neighbourhoods of held-out data.", share_of="generated",
    ),
    "density": _samples(
        "density", "quality", "higher", "ratio",
        "How many neighbourhoods of held-out data a sample lies in, relative to real data; can exceed 1 for samples "
        "from dense regions only.",
    ),
    "recall": _samples(
        "recall", "coverage", "higher", "share",
        "Share of held-out data that lie within the neighbourhoods of samples.", share_of="reference",
    ),
    "coverage": _samples(
        "coverage (Naeem)", "coverage", "higher", "share",
        "Share of held-out data with a sample in their neighbourhood.", short="cov.", share_of="reference",
    ),
    "frechet_pca": _samples(
        "Fréchet (PCA)", "both", "lower", "squared distance",
        "The Fréchet distance in the second features, principal components of the raw values.", short="Fr. PCA",
    ),
    "clipped_density_pca": _samples(
        "quality (PCA)", "quality", "higher", "ratio", "Clipped Density in the second features.", short="qual. PCA",
    ),
    "clipped_coverage_pca": _samples(
        "coverage (PCA)", "coverage", "higher", "ratio", "Clipped Coverage in the second features.", short="cov. PCA",
    ),
    "inception_score": _samples(
        "classifier score", "labels", "higher", "exp nats",
        "Inception Score's formula with this comparison's own classifier: how sure it is of single samples, and how "
        "even over the classes. It does not compare with real data: more than the ceiling is not better.",
        short="cl. score",
    ),
    "modes": _samples(
        "classes hit", "labels", "higher", "classes",
        "Classes that get at least a tenth of their share of the samples.", short="classes",
    ),
    "class_kl": _samples(
        "class histogram", "labels", "lower", "nats",
        "Kullback-Leibler divergence of the samples' class histogram from that of held-out data.", short="class KL",
    ),
    "column_fit": _samples(
        "columns", "both", "higher", "share",
        "Mean over columns of 1 - Kolmogorov-Smirnov distance (numbers) or 1 - total variation (categories).",
    ),
    "correlation_difference": _samples(
        "correlations", "both", "lower", "difference",
        "Mean over pairs of numeric columns of half the difference of their correlations.", short="corr.",
    ),
    "tstr": _samples(
        "train on synthetic", "both", "higher", "share explained",
        "Trees trained on samples to predict a column from the others, tested on held-out rows: R² or accuracy above "
        "chance, mean over columns. The ceiling's is that of trees trained on real data.", short="TSTR",
    ),
    "spread": _samples(
        "spread", "coverage", "neither", "ratio",
        "Total variance of the samples' features relative to that of held-out data: near 0 for a collapsed model, "
        "1 like real data.",
    ),
    "authenticity": _samples(
        "authenticity", "copying", "neither", "share",
        "Share of samples farther from their nearest training example than that one is from the rest; "
        "0 for copies; the ceiling row has that of unseen real data.", short="authentic", share_of="generated",
    ),
    "training_distance": _samples(
        "training distance", "copying", "neither", "ratio",
        "Median distance of a sample to the training data, relative to that of held-out data: 1 like unseen data, "
        "0 copies.", short="tr. dist.",
    ),
    "round_trip": MetricInfo(
        title="inversion error", better="lower", unit="model space", axis="latent", of_samples=False,
        meaning="For models that are bijections: the largest error of decode(encode(x)) over held-out examples, where "
        "data have about unit variance. Exact inverses leave rounding errors, numerical ones their tolerance.",
    ),
    "path_length": MetricInfo(
        title="path length", better="lower", unit="squared distance", axis="latent", of_samples=False,
        meaning="Perceptual path length: how fast features move along paths between latent codes; smooth latent "
        "spaces have short paths. Depends on the latent space: compare within a family.",
    ),
    "log_likelihood": MetricInfo(
        title="log-likelihood", short="log-lik.", better="higher", axis="likelihood", of_samples=False,
        meaning="Mean log-likelihood of held-out data per dimension: nats/dim, higher is better; for 8-bit data "
        "bits/dim, the negative, lower is better. ≥ and ≤ mark bounds, ≈ an estimate, no mark: exact. A bound that is "
        "worse than another model's exact value does not prove a worse density.",
    ),
    "kl": MetricInfo(
        title="KL to the truth", short="KL", better="lower", unit="nats", axis="likelihood", of_samples=False,
        meaning="Kullback-Leibler divergence of the model from the known density, by quadrature. From a bound on the "
        "likelihood it is an upper bound.",
    ),
    "samples_per_second": _cost(
        "samples/s", "higher", "1/s", "At the best batch size tried on this machine; median of at least 10.",
    ),
    "latency": _cost(
        "one sample", "lower", "s", "Seconds to draw a single sample; median of at least 10.", short="one",
    ),
    "evaluations": _cost(
        "evaluations", "lower", "evaluations", "How often the network is evaluated, one after the other, for a sample.",
        short="NFE",
    ),
    "training_seconds": _cost("training", "neither", "s", "Seconds that fitting took."),
    "parameters": _cost("parameters", "neither", "numbers", "Learned numbers, buffers included.", short="size"),
    "peak_memory": _cost(
        "memory", "lower", "MiB", "Peak MiB while training: of the process on a CPU, of the GPU on CUDA.",
    ),
}  # fmt: skip


def describe(name: str, number: Uncertain, **provenance: Any) -> Estimate:
    """The `Estimate` of a metric: direction and unit are the catalogue's, unless `provenance` says otherwise."""
    info = METRICS[name]
    return number.estimate(
        **{"unit": info.unit, "higher_is_better": info.better == "higher", "share_of": info.share_of, **provenance}
    )


def plain(name: str, value: float, method: str, **provenance: Any) -> Estimate:
    """A number without an error: a count, a time, a size."""
    return describe(name, Uncertain(float(value), {}, {"measurements": 1}, method), **provenance)
