r"""How far samples are from data, and which modes of the data they fall into.

All distances are Euclidean, in float64, of points x, x' (samples) and y, y' (data) of a flat space.

Energy distance (Szekely & Rizzo 2013, J. Stat. Plan. Inference 143), 0 only for equal distributions:
    E = 2 E|x - y| - E|x - x'| - E|y - y'|, as a U-statistic: unbiased, so that it can be below 0.

Modes: the classes, where the data have labels, a sample's being that of the nearest of n training examples; else the
cells of k-means on these (Richardson & Weiss 2018, arXiv:1805.12462). Shares of the data are those of n other training
examples, found in the same way. Of n samples a mode with share p expects n p, and it counts where that is at least 20;
it is covered by at least a tenth of these. A generator without fault misses one at most once in 100,000 times.
    turnover of two histograms h, h':  |h - h'|_1 / 2, by chance about  sum_k sqrt(p_k (1 - p_k) / (pi n)).

Precision and recall: share of samples within the k-nearest-neighbour balls of the data, and the reverse, k = 3
(Kynkaanniemi et al. 2019, arXiv:1904.06991). For equal distributions they are below 1, by how much depends on n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from trilemma.core.spec import ConditionSpec

CELLS, MAX_CLASSES = 8, 32
"""Cells of k-means; data with more classes than the other number are cut into cells, too."""
COVERED, TELLING = 0.1, 20.0
"""A mode is covered by this part of its share; it counts if so many samples are expected there."""
NEIGHBOUR = 3


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|, (N, M) in float64: a matrix product, after a shift that saves most of its digits."""
    centre = y.mean(0)
    return torch.cdist(x - centre, y - centre)


def mean_distance(x: Tensor) -> float:
    """Mean |x_i - x_j| over i != j, of (N, D)."""
    return (distances(x, x).fill_diagonal_(0.0).sum() / (len(x) * (len(x) - 1))).item()


def energy_distance(x: Tensor, y: Tensor, owner: Tensor | None = None) -> float:
    """The energy distance of samples x (N, D) and data y (M, D), unbiased; NaN with fewer than two of either.

    Arguments:
        owner: (N,), the row of y whose condition a sample has; pairs of a common owner are left out.
    """
    rows = torch.arange(len(y))
    owner = -1 - torch.arange(len(x)) if owner is None else owner

    def mean(d: Tensor, kept: Tensor) -> Tensor:
        return (d * kept).sum() / kept.sum()

    between = mean(distances(x, y), owner[:, None] != rows)
    within = mean(distances(x, x), owner[:, None] != owner) + mean(distances(y, y), rows[:, None] != rows)
    return (2.0 * between - within).item()


def neighbour_scores(samples: Tensor, data: Tensor, k: int = NEIGHBOUR) -> dict[str, float]:
    """`precision`, `recall` in [0, 1] and `spread` (mean distance over that of the data) of (N, D) and (M, D)."""
    within = [distances(a, a).fill_diagonal_(torch.inf) for a in (samples, data)]
    between = distances(samples, data)
    tie = 1e-6 * between.mean()  # repeated examples are at distance zero, but for rounding
    of_samples, of_data = (d.kthvalue(min(k, len(d) - 1), 1).values + tie for d in within)
    spread = [d.fill_diagonal_(0.0).sum() / (len(d) * (len(d) - 1)) for d in within]
    return {
        "precision": (between <= of_data).any(1).double().mean().item(),
        "recall": (between <= of_samples[:, None]).any(0).double().mean().item(),
        "spread": (spread[0] / spread[1]).item(),
    }


@dataclass(frozen=True)
class Modes:
    """A mode for each point of model space: that of the nearest of some centres (M, D) with modes labels (M,)."""

    centres: Tensor
    labels: Tensor
    count: int

    def histogram(self, x: Tensor) -> Tensor:
        """Share of x (N, D) in each mode, (count,)."""
        found = self.labels[distances(x, self.centres).argmin(1)]
        return torch.bincount(found, minlength=self.count).double() / len(x)


def labelled(condition: ConditionSpec | None) -> bool:
    """Whether the classes of the data are their modes."""
    return condition is not None and condition.kind == "class" and 2 <= condition.size <= MAX_CLASSES


def find_modes(y: Tensor, labels: Tensor | None, count: int) -> Modes:
    """The modes of training examples y (N, D): `count` classes, or without labels (N,) at most so many cells."""
    if labels is not None:
        return Modes(y, labels, count)
    count = min(count, len(torch.unique(y, dim=0)))
    cells = KMeans(count, n_init=2, random_state=0).fit(y.numpy())  # a function of the data alone
    return Modes(torch.from_numpy(cells.cluster_centers_), torch.arange(count), count)


def covered(share: Tensor, of_data: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Which modes n samples cover, and which they are enough to tell; masks (K,) of shares (K,)."""
    telling = n * of_data >= TELLING
    return telling & (share >= COVERED * of_data), telling


def turnover(a: Tensor, b: Tensor) -> float:
    """Share in [0, 1] of samples that have to move to turn histogram a (K,) into b."""
    return (0.5 * (a - b).abs().sum()).item()


def chance_turnover(share: Tensor, n: int) -> float:
    """Expected turnover of two independent histograms of n samples of one distribution (K,), for large n."""
    return (share * (1.0 - share) / (torch.pi * n)).sqrt().sum().item()
