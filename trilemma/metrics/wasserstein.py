r"""Wasserstein distances: exact in one dimension, and averaged over directions in many.

In one dimension the distance of order 1 between samples with empirical distribution functions F and G is
    W1 = integral |F(t) - G(t)| dt,
a finite sum over the gaps of the merged values, exact for any sizes of the samples and in the units of the data.

The sliced distance is its mean over directions u on the unit sphere (Bonneel, Rabin, Peyre & Pfister 2015, "Sliced and
Radon Wasserstein barycenters of measures", J. Math. Imaging Vis. 51), here over fixed random ones:
    SW1 = (1/L) sum_l W1(u_l . x, u_l . y).
The directions are the same for all samples of one dimension; their choice is part of the definition, not of the error.

Error: delete-a-block jackknife. The values are sorted once: without a block only the counts change. The distance of
finite samples of one distribution is positive, of order 1/sqrt(n): compare at equal sizes. There it is not smooth, and
the standard error about 1.5 times too large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.noise import make_generator
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import delete_one, shuffle_into_blocks
from trilemma.metrics.uncertain import Uncertain

DIRECTIONS = 128
HELD = 2**19
"""Merged values held at once: a few MB."""


@dataclass(frozen=True)
class MergedSamples:
    """Two samples merged and sorted, K columns at once, with the block that each value comes from.

    Attributes:
        gaps: (K, T - 1) between successive values.
        blocks: (K, T) block of each value in sorted order; those of the second sample count on from the first's.
        counts: (K, 2, T - 1) how many values of each sample are at or below the left end of each gap.
        sizes: (G_a + G_b,) values in each block.
        groups: (G_a, G_b).
    """

    gaps: Tensor
    blocks: Tensor
    counts: Tensor
    sizes: Tensor
    groups: tuple[int, int]

    @classmethod
    def of(cls, a: Tensor, b: Tensor, a_blocks: Tensor, b_blocks: Tensor, groups: tuple[int, int]) -> MergedSamples:
        """Of columns a (K, M) and b (K, N) and the blocks (M,) and (N,) of their values."""
        values, order = torch.cat([a, b], 1).sort(dim=1)
        labels = torch.cat([a_blocks, b_blocks + groups[0]])
        blocks = labels[order]
        first = (blocks < groups[0])[:, :-1].cumsum(1)
        position = torch.arange(1, values.shape[1], device=a.device)
        counts = torch.stack([first, position - first], 1)
        return cls(values.diff(dim=1), blocks, counts, labels.bincount(minlength=sum(groups)), groups)

    def difference(self, without: int | None = None) -> Tensor:
        """F - G (K, T - 1) in each gap, of the whole samples or without one block."""
        f, g = self.counts[:, 0], self.counts[:, 1]
        m, n = int(self.sizes[: self.groups[0]].sum()), int(self.sizes[self.groups[0] :].sum())
        if without is not None:
            gone = (self.blocks[:, :-1] == without).cumsum(1)
            if without < self.groups[0]:
                f, m = f - gone, m - int(self.sizes[without])
            else:
                g, n = g - gone, n - int(self.sizes[without])
        return f.double() / m - g.double() / n

    def w1(self, without: int | None = None) -> Tensor:
        """W1 (K,)."""
        return (self.difference(without).abs_() * self.gaps).sum(1)

    def kolmogorov(self, without: int | None = None) -> Tensor:
        """max |F - G| (K,)."""
        return torch.where(self.gaps > 0.0, self.difference(without).abs_(), 0.0).amax(1)


def wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """W1 between the columns of a (M, K) and b (N, K), as (K,); or of a (M,) and b (N,), as a number.

    Raises:
        DataError: unlike columns, an empty sample, or values that are not finite.
    """
    if a.ndim == 1 and b.ndim == 1:
        return wasserstein_1d(a[:, None], b[:, None])[0]
    a, b = check_features(a, b)
    one = [torch.zeros(len(t), dtype=torch.long, device=t.device) for t in (a, b)]
    return MergedSamples.of(a.T, b.T, one[0], one[1], (1, 1)).w1()


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = DIRECTIONS) -> Uncertain:
    """Mean W1 of the projections of features x (M, d) and y (N, d) on fixed random directions; >= 0, in their units.

    Raises:
        DataError: unlike dimensions, features that are not finite, or fewer than 2 examples a side.
    """
    x, y = check_features(x, y)
    if min(len(x), len(y)) < 2:
        raise DataError(f"a sliced Wasserstein distance needs 2 examples a side, got {len(x)} and {len(y)}")
    (x, x_cuts), (y, y_cuts) = shuffle_into_blocks(x), shuffle_into_blocks(y)
    groups = (len(x_cuts), len(y_cuts))
    x_blocks, y_blocks = (
        torch.cat([torch.full((b.stop - b.start,), g, device=x.device) for g, b in enumerate(cuts)])
        for cuts in (x_cuts, y_cuts)
    )
    u = sphere(directions, x.shape[1]).to(x.device)
    total = x.new_zeros(1 + sum(groups))
    for part in torch.split(u, max(1, HELD // (len(x) + len(y)))):
        merged = MergedSamples.of(part @ x.T, part @ y.T, x_blocks, y_blocks, groups)
        total += torch.stack([merged.w1(g).sum() for g in (None, *range(sum(groups)))])
    found = total / directions
    return delete_one(float(found[0]), found[1 : 1 + groups[0]], found[1 + groups[0] :], len(x), len(y))


def sphere(count: int, d: int) -> Tensor:
    """Fixed directions (count, d), uniform on the unit sphere, float64."""
    g = make_generator("sliced-wasserstein", d)
    u: Tensor = torch.nn.functional.normalize(torch.randn(count, d, generator=g, dtype=torch.float64), dim=1)
    return u
