"""What is measured of samples and likelihoods, always with its uncertainty.

Metrics are pure functions of features (`frechet`, `neighbours`); `jackknife` gives any of them a standard
error; `extractor` makes the features; `evaluate` puts the parts together.
"""

from trilemma.metrics.estimate import Estimate, t_interval
from trilemma.metrics.evaluate import evaluate_samples, mean_log_likelihood
from trilemma.metrics.extractor import (
    FeatureExtractor,
    dinov2,
    fit_extractor,
    inception,
    load_extractor,
    pixel_pca,
)
from trilemma.metrics.frechet import frechet_distance, frechet_from_moments
from trilemma.metrics.jackknife import jackknife
from trilemma.metrics.metric import Metric
from trilemma.metrics.neighbours import clipped_density_coverage, density_coverage, precision_recall
from trilemma.metrics.statistics import FeatureStatistics
from trilemma.metrics.uncertain import Uncertain

__all__ = [
    "Estimate",
    "FeatureExtractor",
    "FeatureStatistics",
    "Metric",
    "Uncertain",
    "clipped_density_coverage",
    "density_coverage",
    "dinov2",
    "evaluate_samples",
    "fit_extractor",
    "frechet_distance",
    "frechet_from_moments",
    "inception",
    "jackknife",
    "load_extractor",
    "mean_log_likelihood",
    "pixel_pca",
    "precision_recall",
    "t_interval",
]
