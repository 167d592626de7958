"""What is measured of samples and likelihoods, always with its uncertainty.

Metrics are pure functions of features (`frechet`, `neighbours`); `jackknife` gives any of them a standard
error; `extractor` makes the features; `evaluate` puts the parts together.
"""

from trilemma.metrics.estimate import Estimate, t_interval
from trilemma.metrics.evaluate import evaluate_samples, mean_log_likelihood
from trilemma.metrics.extractor import FeatureExtractor, fit_extractor, load_extractor, pixel_pca
from trilemma.metrics.frechet import frechet_distance, frechet_from_moments
from trilemma.metrics.jackknife import Replicates, jackknife
from trilemma.metrics.neighbours import density_coverage, precision_recall

__all__ = [
    "Estimate",
    "FeatureExtractor",
    "Replicates",
    "density_coverage",
    "evaluate_samples",
    "fit_extractor",
    "frechet_distance",
    "frechet_from_moments",
    "jackknife",
    "load_extractor",
    "mean_log_likelihood",
    "pixel_pca",
    "precision_recall",
    "t_interval",
]
