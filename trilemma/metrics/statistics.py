"""`FeatureStatistics`: the features of one sample, and what the metrics need of them, computed once and kept.

The reference sample is measured against many models; its moments, the radii of its balls and its kernel sums do not
change. They are computed when a metric first asks for them. `FeatureCache` keeps the features that a large network took
long to make.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.storage import parse_tensors, write_tensors
from trilemma.metrics.extractor import FeatureExtractor
from trilemma.metrics.frechet import SampleMoments
from trilemma.metrics.jackknife import shuffle_into_blocks
from trilemma.metrics.kernel import KernelSums, gaussian_sums, polynomial_sums
from trilemma.metrics.neighbours import K_DENSITY, K_PRECISION, Balls, can_be_halved


class FeatureStatistics:
    """The features of one sample in the order of the jackknife's blocks, and what follows from them.

    Neither the order in which features come nor the batches they come in make a difference.

    Arguments:
        features: (N, d), at least one; kept in float64.
        extractor: id of the extractor that made them, or None.

    Raises:
        DataError: another shape, or values that are not finite.
    """

    def __init__(self, features: Tensor, extractor: str | None = None) -> None:
        if features.ndim != 2 or not len(features):
            raise DataError(f"features must be (N, d) with N >= 1, got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise DataError("features hold NaN or infinity; look at those examples")
        features = features.double() + 0.0  # no -0.0: equal examples have equal bytes
        self.features = shuffle_into_blocks(features)[0] if len(features) > 1 else features
        self.extractor = extractor

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Of both samples together: batches, or the shares of several processes."""
        if self.extractor != other.extractor:
            raise DataError(f"features of the extractors {self.extractor} and {other.extractor} cannot be merged")
        return FeatureStatistics(torch.cat([self.features, other.features]), self.extractor)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def id(self) -> str:
        """16 hex digits of a SHA-256 of the features and of their extractor."""
        h = hashlib.sha256(f"{self.extractor} {tuple(self.features.shape)}".encode())
        h.update(self.features.contiguous().cpu().numpy().tobytes())
        return h.hexdigest()[:16]

    @cached_property
    def moments(self) -> SampleMoments:
        """Mean and covariance, whole and without each block."""
        return SampleMoments(self.features)

    @cached_property
    def polynomial(self) -> KernelSums:
        """Sums of the cubic kernel among the examples."""
        return polynomial_sums(self.features)

    @cached_property
    def gaussian(self) -> KernelSums:
        """Sums of the Gaussian kernel among the examples, as wide as their median distance."""
        return gaussian_sums(self.features)

    @cached_property
    def balls(self) -> Balls:
        """The neighbourhoods of each example, in the whole sample and in its halves."""
        halves = can_be_halved(len(self.features))
        return Balls.of(self.features, (K_PRECISION, K_DENSITY), halves, "measured")


class FeatureCache:
    """Features by content: what a large extractor has seen once is read from a file the next time.

    Arguments:
        extractor: makes the features.
        folder: for the files, named after the hash of extractor and examples; or None to keep nothing. Features of
            the extractors that are fitted here are quicker to make than to read, and are never kept.
    """

    def __init__(self, extractor: FeatureExtractor, folder: Path | None) -> None:
        self.extractor = extractor
        self.folder = folder if extractor.is_pretrained else None

    def __call__(self, x: Tensor) -> Tensor:
        """Features (N, dim) of x (N, *spec.shape), in float64."""
        if self.folder is None:
            return self.extractor(x)
        h = hashlib.sha256(f"{self.extractor.id} {x.dtype} {tuple(x.shape)}".encode())
        h.update(x.contiguous().cpu().numpy().tobytes())
        path = self.folder / f"{h.hexdigest()[:32]}.safetensors"
        if path.exists():
            return parse_tensors(path.read_bytes(), path)["features"]
        features = self.extractor(x)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        write_tensors(partial, {"features": features})
        partial.replace(path)
        return features
