r"""Precision, recall, density, coverage and their clipped forms, from one pass over the distances.

Reference examples y_1..y_N, generated examples x_1..x_M, and R_k(y_i) the distance from y_i to its k-th nearest
neighbour among the other reference examples (R_k(x_j) likewise among the generated ones).

Kynkaanniemi et al. 2019 (arXiv:1904.06991), k = 3:
    precision = (1/M) #{ j : |x_j - y_i| <= R_k(y_i) for some i }     how many samples look real
    recall    = (1/N) #{ i : |y_i - x_j| <= R_k(x_j) for some j }     how much of the real data is reached
Naeem et al. 2020 (arXiv:2002.09797), k = 5:
    density   = (1/(k M)) sum_j #{ i : |x_j - y_i| <= R_k(y_i) }      can exceed 1; near 1 for equal distributions
    coverage  = (1/N) #{ i : |y_i - x_j| <= R_k(y_i) for some j }     does not trust the generated neighbourhoods
Salvy, Talbot & Thirion 2026 (ICLR; arXiv:2507.01761), k = 5. Radii are cut at their median, R'(y_i) =
min(R_k(y_i), median R_k), so that outliers have no huge balls; no sample counts more than once; and both scores
are calibrated so that they fall in proportion to the share of bad samples:
    clipped density  = D(x) / D(y),   D(x) = (1/M) sum_j min(1, (1/k) #{ i : |x_j - y_i| <= R'(y_i) }),
                       where D(y) leaves each y_j's own ball out
    clipped coverage = f^-1(C) / M,   C = (1/N) sum_i min(1, (1/k) #{ j : |y_i - x_j| <= R_k(y_i) }),
                       f(m) the expectation of C when m of the M samples are drawn from the real distribution and
                       the others lie nowhere. The mass of the ball about y_i is then Beta(k, N - k), so
                       f(m) = E min(J, k) / k with J ~ BetaBinomial(m, k, N - k), whatever the distribution is.
In the paper both end at 1. Here they do not: that would hide noise above 1 and bias the mean; f is continued beyond
m = M by its tangent.

Balls are closed: a sample on the sphere counts as inside, so repeated values of discrete data (radius zero)
match themselves. Two squared distances that differ by less than the rounding of their sums are a tie.

All six depend on the sample sizes: compare only at equal N and M.

Standard errors come from halves of each sample (`jackknife`). The 8 k nearest neighbours of a point hold, but for a
few points which are asked for more, the k nearest in every half, and so its radius there; and the pairs within
the largest of these radii are all that any of the metrics need, in any half. So each distance is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.special import betaln, gammaln
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.distances import nearest, pairs_within, tie
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import GROUPS, HALVES, delete_half, shuffle_into_blocks
from trilemma.metrics.uncertain import Uncertain

K_PRECISION = 3
K_DENSITY = 5
NAMES = ("precision", "recall", "density", "coverage", "clipped_density", "clipped_coverage")


def precision_recall(generated: Tensor, reference: Tensor, k: int = K_PRECISION) -> tuple[float, float]:
    """Improved precision and recall of features (M, d) against (N, d), each in [0, 1]."""
    found = neighbour_metrics(generated, reference, k_precision=k, k_density=k, interval=False)
    return found["precision"].value, found["recall"].value


def density_coverage(generated: Tensor, reference: Tensor, k: int = K_DENSITY) -> tuple[float, float]:
    """Density in [0, N / k] and coverage in [0, 1] of features (M, d) against (N, d)."""
    found = neighbour_metrics(generated, reference, k_precision=k, k_density=k, interval=False)
    return found["density"].value, found["coverage"].value


def clipped_density_coverage(generated: Tensor, reference: Tensor, k: int = K_DENSITY) -> tuple[float, float]:
    """Clipped density and clipped coverage of features (M, d) against (N, d): 0 worst, 1 as good as real."""
    found = neighbour_metrics(generated, reference, k_precision=k, k_density=k, interval=False)
    return found["clipped_density"].value, found["clipped_coverage"].value


def neighbour_metrics(
    generated: Tensor | Balls,
    reference: Tensor | Balls,
    *,
    k_precision: int = K_PRECISION,
    k_density: int = K_DENSITY,
    interval: bool = True,
) -> dict[str, Uncertain]:
    """All six metrics with their delete-half contrasts, from one pass over the distances.

    Arguments:
        generated, reference: features (M, d) and (N, d), or their `Balls`, made with the same settings.
        k_precision: neighbours for precision and recall.
        k_density: neighbours for the others.
        interval: False for the values alone; fewer than 20 examples a side have no interval either, nor have
            samples whose halves hold no k neighbours.

    Returns:
        One number for each of `NAMES`.

    Raises:
        DataError: unlike dimensions, features that are not finite, or too few examples for k.
    """
    ks = (k_precision, k_density)
    x = generated.x if isinstance(generated, Balls) else generated
    y = reference.x if isinstance(reference, Balls) else reference
    check_features(x, y)
    halves = interval and can_be_halved(min(len(x), len(y)), max(ks))
    gen = generated if isinstance(generated, Balls) else Balls.of(x, ks, halves, "generated")
    ref = reference if isinstance(reference, Balls) else Balls.of(y, ks, halves, "reference")
    assert len(gen.kept) == len(ref.kept), "one sample is cut into halves, the other is not"
    return _summarise(_count(gen, ref, *ks), gen, ref, k_density)


def can_be_halved(n: int, k: int = K_DENSITY) -> bool:
    """Whether every half of n examples has more than k."""
    return GROUPS // 2 * (n // GROUPS) > k


@dataclass(frozen=True)
class Balls:
    """One sample in block order, the subsets of it in which the metrics are taken, and the radii of its balls there.

    Row 0 of what is kept per subset is the whole sample; where there are intervals, the halves A_1..A_19 and
    B_1..B_19 follow.

    Attributes:
        x: (N, d).
        block: (N,) the block of each example.
        kept: (S, G) which blocks are in each subset.
        members: (S, N) the same for examples.
        radii: by k, (S, N): squared, with the tie's width added; -inf for examples outside the subset, whose
            balls so contain nothing.
        clipped: (S, N): radii of the largest k, cut at the median of the subset.
        near: squared distances and indices (N, K) of each example's nearest others.
    """

    x: Tensor
    block: Tensor
    kept: Tensor
    members: Tensor
    radii: dict[int, Tensor]
    clipped: Tensor
    near: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, x: Tensor, ks: tuple[int, int], halves: bool, name: str) -> Balls:
        """Of features (N, d); `name` is for errors."""
        n, k = len(x), max(ks)
        if n <= k:
            raise DataError(f"{n} {name} examples are too few for {k} nearest neighbours: give at least {k + 1}")
        block, kept = torch.zeros(n, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
        if halves:
            x, blocks = shuffle_into_blocks(x)
            block = torch.cat([torch.full((b.stop - b.start,), g) for g, b in enumerate(blocks)])
            kept = torch.cat([torch.ones(1, len(blocks), dtype=torch.bool), HALVES, ~HALVES])
        block, kept = block.to(x.device), kept.to(x.device)
        members = kept[:, block]
        ask = min(n - 1, 8 * k if halves else k + 1)
        while True:
            d2, index = nearest(x, ask)
            # rank[s, i, r]: how many of the r nearest neighbours of i are in subset s
            rank = kept[:, block[index]].cumsum(2, dtype=torch.int32)
            if ask == n - 1 or bool((rank[:, :, -1] >= k)[members].all()):
                break
            ask = min(n - 1, 2 * ask)
        wide = 1.0 + tie(x.shape[1])
        radii = {}
        for j in set(ks):
            position = (rank < j).sum(2).clamp(max=ask - 1)
            radii[j] = (d2.expand(len(kept), -1, -1).gather(2, position[:, :, None])[:, :, 0] * wide).masked_fill(
                ~members, -torch.inf
            )
        clipped = torch.stack([_cut_at_median(r, m) for r, m in zip(radii[ks[1]], members, strict=True)])
        return cls(x, block, kept, members, radii, clipped, (d2, index))

    def self_score(self, k: int) -> Tensor:
        """D(y), the score of the sample among its own clipped balls, (S,)."""
        (d2, index), n = self.near, len(self.x)
        widest = self.clipped.amax(0)
        while d2.shape[1] < n - 1 and bool((d2[:, -1] <= widest).any()):  # ties go on beyond what is listed
            d2, index = nearest(self.x, min(n - 1, 4 * d2.shape[1]))
        score = torch.empty(len(self.kept), dtype=torch.float64, device=self.x.device)
        for s, (kept, members) in enumerate(zip(self.kept, self.members, strict=True)):
            inside = kept[self.block[index]] & (d2 <= self.clipped[s][:, None])
            count = torch.bincount(index[inside], minlength=n)
            score[s] = (count[members].double() / k).clamp(max=1.0).mean()
        return score


def _cut_at_median(radius: Tensor, members: Tensor) -> Tensor:
    """Squared radii (N,) cut at the square of the median radius of the members."""
    r = radius[members].sqrt().sort().values
    n = len(r)
    return radius.clamp(max=float((r[(n - 1) // 2] + r[n // 2]) / 2.0) ** 2 * (1.0 + 1e-15))


@dataclass(frozen=True)
class _Hits:
    """Who lies in whose ball; S_x and S_y are the numbers of subsets of the samples."""

    inside: Tensor  # (S_y, M): x_j lies in some ball of the subset of y
    reached: Tensor  # (S_x, N): y_i lies in some ball of the subset of x
    balls: Tensor  # (M,): in how many balls of the whole y x_j lies
    clipped: Tensor  # (S_y, M): in how many clipped balls of the subset of y
    counts: Tensor  # (S_y, N): how many x lie in the ball that y_i has in the subset
    by_block: Tensor  # (G_x, N): how many x of each block lie in the ball that y_i has in the whole y


def _count(gen: Balls, ref: Balls, k_precision: int, k_density: int) -> _Hits:
    m, n, s_x, s_y, device = len(gen.x), len(ref.x), len(gen.kept), len(ref.kept), gen.x.device

    def zeros(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, columns, dtype=dtype, device=device)

    inside, reached = zeros(s_y, m, torch.bool), zeros(s_x, n, torch.bool)
    balls, clipped = zeros(1, m, torch.int32), zeros(s_y, m, torch.int32)
    counts, by_block = zeros(s_y, n, torch.int32), zeros(gen.kept.shape[1], n, torch.int32)
    radii_y = torch.cat([ref.radii[k_precision], ref.radii[k_density], ref.clipped])
    one = torch.ones((), dtype=torch.int32, device=device)
    for i, j, d2 in pairs_within(ref.x, gen.x, radii_y, gen.radii[k_precision]):
        for s in range(s_y):
            inside[s, j[d2 <= ref.radii[k_precision][s, i]]] = True
            hit = d2 <= ref.radii[k_density][s, i]
            counts[s].index_put_((i[hit],), one, accumulate=True)
            if s == 0:
                balls[0].index_put_((j[hit],), one, accumulate=True)
                by_block.index_put_((gen.block[j[hit]], i[hit]), one, accumulate=True)
            clipped[s].index_put_((j[d2 <= ref.clipped[s, i]],), one, accumulate=True)
        for s in range(s_x):
            reached[s, i[d2 <= gen.radii[k_precision][s, j]]] = True
    return _Hits(inside, reached, balls[0], clipped, counts, by_block)


def _summarise(hits: _Hits, gen: Balls, ref: Balls, k: int) -> dict[str, Uncertain]:
    m, n = len(gen.x), len(ref.x)
    own = ref.self_score(k)
    in_ball = gen.kept.double() @ hits.by_block.double()  # (S_x, N): of the subset of x in the ball of y_i
    of_gen = {  # each metric in the subsets of x, with the whole y
        "precision": _means(hits.inside[0], gen.members),
        "recall": hits.reached.double().mean(1),
        "density": _means(hits.balls.double() / k, gen.members),
        "coverage": (in_ball > 0).double().mean(1),
        "clipped_density": _means((hits.clipped[0].double() / k).clamp(max=1.0), gen.members) / own[0],
        "clipped_coverage": _calibrated((in_ball / k).clamp(max=1.0).mean(1), k, [n], gen.members.sum(1).tolist()),
    }
    of_ref = {  # and in the subsets of y, with the whole x
        "precision": hits.inside.double().mean(1),
        "recall": _means(hits.reached[0], ref.members),
        "density": hits.counts.double().sum(1) / (k * m),
        "coverage": _means(hits.counts > 0, ref.members),
        "clipped_density": (hits.clipped.double() / k).clamp(max=1.0).sum(1) / m / own,
        "clipped_coverage": _calibrated(
            _means((hits.counts.double() / k).clamp(max=1.0), ref.members), k, ref.members.sum(1).tolist(), [m]
        ),
    }
    return {name: delete_half(float(of_gen[name][0]), of_gen[name][1:], of_ref[name][1:], m, n) for name in NAMES}


def _means(x: Tensor, members: Tensor) -> Tensor:
    """The mean of x (N,) or of its rows (S, N) over the members (S, N) of each subset, (S,)."""
    return (members.double() * x.double()).sum(1) / members.sum(1)


def _calibrated(c: Tensor, k: int, n: list[int], m: list[int]) -> Tensor:
    """f^-1(C) / M of values (S,), for reference and generated samples of sizes n and m (one, or one per value)."""
    sizes = zip(n * len(c) if len(n) == 1 else n, m * len(c) if len(m) == 1 else m, strict=True)
    return torch.tensor(
        [_invert(float(v), expected_clipped_coverage(k, *size)) for v, size in zip(c, sizes, strict=True)],
        dtype=torch.float64,
    )


@lru_cache(maxsize=64)
def expected_clipped_coverage(k: int, n: int, m: int) -> Tensor:
    """f(0), .., f(m): the expected uncalibrated clipped coverage of that many good samples, (m + 1,) float64.

    Arguments:
        k: of the neighbours, below n.
        n: size of the reference sample.
    """
    good = torch.arange(m + 1, dtype=torch.float64).numpy()
    missing = 0.0 * good
    for j in range(k):
        ways = gammaln(good + 1.0) - gammaln(j + 1.0) - gammaln((good - j).clip(min=0.0) + 1.0)
        log_p = ways + betaln(k + j, n - k + (good - j).clip(min=0.0)) - betaln(k, n - k)
        missing += (good >= j) * torch.from_numpy(log_p).exp().numpy() * (k - j) / k
    return torch.from_numpy(1.0 - missing)


def _invert(value: float, f: Tensor) -> float:
    """The share s of good samples with f(s M) = value: between the entries of f linear, beyond the last its tangent."""
    m = len(f) - 1
    upper = int(torch.searchsorted(f, value).clamp(1, m))
    below, above = float(f[upper - 1]), float(f[upper])
    return (upper - 1 + (value - below) / (above - below)) / m
