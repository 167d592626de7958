r"""Kernel density estimate with a Gaussian kernel (Rosenblatt 1956; Parzen 1962, Ann. Math. Statist. 27, 33).

    p(y) = 1/N sum_j N(y; y_j, h^2 I)
in standardized model space. The bandwidth h maximizes the leave-one-out log-likelihood (Habbema, Hermans & van den
Broek 1974; Duin 1976, IEEE Trans. Comput. 25)
    sum_i log 1/(N-1) sum_{j != i} N(y_i; y_j, h^2 I);
an example is left out together with its exact copies, for else copies would drive h to zero. The maximum is sought
on a logarithmic grid that is refined around its best point. The outer sum runs over all examples, or over the first
so many that 2^24 pairs are compared.

Given classes, each has its own examples and its own h; a class of fewer than 10 examples takes the h of all data.
Where no two examples differ, h is 1, the standard deviation of model space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from trilemma.classical.base import ClosedForm
from trilemma.core.model import ModelConfig
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.core.spec import Split

MIN_EXAMPLES = 10
MAX_PAIRS = 2**24
CHUNK_NUMBERS = 2**22


class KDEConfig(ModelConfig):
    bandwidth: float | None = Field(
        None, gt=0, description="in standard deviations of the data; by default chosen by leave-one-out likelihood"
    )


class KDE(ClosedForm):
    """A mixture of equal Gaussians around the training examples."""

    Config = KDEConfig
    config: KDEConfig
    examples_: Tensor
    start: Tensor
    bandwidth: Tensor

    def build(self) -> None:
        self.register_buffer("examples_", torch.empty(0, dtype=torch.float64))  # (N, D), class after class
        self.register_buffer("start", torch.empty(0, dtype=torch.int64))  # (C + 1,) where each class starts
        self.register_buffer("bandwidth", torch.empty(0, dtype=torch.float64))  # (C,)

    def prepare(self, train: Split, noise: Noise) -> None:
        y, labels = self.examples(train, noise)
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=self.classes)
        self.examples_ = y[order]
        self.start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.bandwidth = torch.tensor(self._bandwidths(y), dtype=torch.float64, device=y.device)

    def _bandwidths(self, y: Tensor) -> list[float]:
        if self.config.bandwidth is not None:
            return [self.config.bandwidth] * self.classes
        if self.classes == 1:
            return [choose_bandwidth(y)]
        groups = [self._of_class(c) for c in range(self.classes)]
        common = choose_bandwidth(y) if any(len(g) < MIN_EXAMPLES for g in groups) else 1.0
        return [choose_bandwidth(g) if len(g) >= MIN_EXAMPLES else common for g in groups]

    def _of_class(self, c: int) -> Tensor:
        return self.examples_[int(self.start[c]) : int(self.start[c + 1])]

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        label = self.class_index(condition, noise.n)
        first, count = self.start[label], self.start.diff()[label]
        chosen = first + (noise.uniform(dtype=torch.float64) * count).long()
        kernel = noise.normal(self.codec.dims, dtype=torch.float64)
        return self.to_model_space(self.examples_[chosen] + self.bandwidth[label, None] * kernel)

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        y, label = y.flatten(1), self.class_index(condition, len(y))
        value = y.new_empty(len(y))
        for c in torch.unique(label).tolist():
            rows = label == c
            value[rows] = log_density(y[rows], self._of_class(c), self.bandwidth[c].item())
        return Score(value, "exact")


def log_density(y: Tensor, centers: Tensor, bandwidth: float) -> Tensor:
    """log 1/N sum_j N(y; centers_j, h^2 I) of y (M, D), (M,); in chunks of bounded memory."""
    n, d = centers.shape
    constant = -0.5 * d * math.log(2.0 * math.pi * bandwidth**2) - math.log(n)
    parts = [(-0.5 / bandwidth**2 * s).logsumexp(1) for s in _squared_distances(y, centers)]
    return torch.cat(parts) + constant


def _squared_distances(y: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """||y_i - c_j||^2 for chunks of y. `cdist` without its matrix product loses no digits to cancellation."""
    for part in torch.split(y, max(1, CHUNK_NUMBERS // len(centers))):
        yield torch.cdist(part, centers, compute_mode="donot_use_mm_for_euclid_dist").square()


def choose_bandwidth(y: Tensor) -> float:
    """The h that maximizes the leave-one-out likelihood of y (N, D)."""
    n, d = y.shape
    queries = y[: max(1, MAX_PAIRS // n)]
    squared = torch.cat(list(_squared_distances(queries, y)))
    squared = squared.masked_fill(squared == 0.0, math.inf)  # itself and its copies
    nearest = squared.min(1).values
    squared = squared[nearest.isfinite()]
    if len(squared) == 0:
        return 1.0

    def score(log_h: float) -> float:
        h = math.exp(log_h)
        return (-0.5 / h**2 * squared).logsumexp(1).mean().item() - d * log_h

    # The best h lies between a fraction of the least distance to a neighbour and the greatest distance there is.
    low = 0.5 * math.log(nearest[nearest.isfinite()].min().item() / d) - 1.0
    high = 0.5 * math.log(squared[squared.isfinite()].max().item()) + 1.0
    points = max(9, math.ceil(2.0 * (high - low)) + 1)  # at most half a unit of log h apart
    while True:
        grid = torch.linspace(low, high, points, dtype=torch.float64).tolist()
        best, step = max(grid, key=score), grid[1] - grid[0]
        if step < 0.01:
            return math.exp(best)
        low, high, points = best - step, best + step, 9
