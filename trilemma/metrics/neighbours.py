r"""Precision, recall, density and coverage from nearest neighbours, in one pass over the distances.

Reference examples y_1..y_N, generated examples x_1..x_M, and R_k(y_i) the distance from y_i to its k-th nearest
neighbour among the other reference examples (R_k(x_j) likewise among the generated ones).

Kynkaanniemi et al. 2019 (arXiv:1904.06991), k = 3:
    precision = (1/M) #{ j : |x_j - y_i| <= R_k(y_i) for some i }     how many samples look real
    recall    = (1/N) #{ i : |y_i - x_j| <= R_k(x_j) for some j }     how much of the real data is reached
Naeem et al. 2020 (arXiv:2002.09797), k = 5:
    density   = (1/(k M)) sum_j #{ i : |x_j - y_i| <= R_k(y_i) }      can exceed 1; near 1 for equal distributions
    coverage  = (1/N) #{ i : |y_i - x_j| <= R_k(y_i) for some j }     does not trust the generated neighbourhoods

Balls are closed: a sample on the sphere counts as inside, so repeated values of discrete data (radius zero)
match themselves. Squared distances come from |x|^2 + |y|^2 - 2 x.y in float64 about the mean of the reference;
two that differ by less than the rounding of that form are a tie, and ties count as inside.

All four depend on the sample sizes: compare only at equal N and M.

Standard errors come from halves of each sample (`jackknife`). The k nearest neighbours that a point has in each of
20 blocks determine its radius in every union of blocks (the k-th smallest over them), so each distance
is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import GROUPS, HALVES, Replicates, delete_half, shuffle_into_blocks

K_PRECISION = 3
K_DENSITY = 5
CHUNK = 2**16
"""Distances held at once: small enough for a processor's cache, through which each is compared many times."""


def precision_recall(generated: Tensor, reference: Tensor, k: int = K_PRECISION) -> tuple[float, float]:
    """Improved precision and recall of features (M, d) against (N, d), each in [0, 1]."""
    found = neighbour_replicates(generated, reference, k_precision=k, k_density=k, interval=False)
    return found["precision"].value, found["recall"].value


def density_coverage(generated: Tensor, reference: Tensor, k: int = K_DENSITY) -> tuple[float, float]:
    """Density in [0, N / k] and coverage in [0, 1] of features (M, d) against (N, d)."""
    found = neighbour_replicates(generated, reference, k_precision=k, k_density=k, interval=False)
    return found["density"].value, found["coverage"].value


def neighbour_replicates(
    generated: Tensor,
    reference: Tensor,
    *,
    k_precision: int = K_PRECISION,
    k_density: int = K_DENSITY,
    interval: bool = True,
) -> dict[str, Replicates]:
    """All four metrics with their delete-half contrasts, from one pass over the distances.

    Arguments:
        generated, reference: features (M, d) and (N, d).
        k_precision: neighbours for precision and recall.
        k_density: neighbours for density and coverage.
        interval: False for the values alone; fewer than 20 examples a side have no interval either, nor have
            samples whose halves hold no k neighbours.

    Returns:
        "precision", "recall", "density", "coverage".

    Raises:
        DataError: unlike dimensions, features that are not finite, or too few examples for k.
    """
    x, y = check_features(generated, reference)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    norm = torch.maximum(x.square().sum(1).max(), y.square().sum(1).max())
    tie = 4.0 * x.shape[1] * torch.finfo(x.dtype).eps * float(norm)
    smallest_half = GROUPS // 2 * (min(len(x), len(y)) // GROUPS)
    halves = interval and smallest_half > max(k_precision, k_density)
    gen = _prepare(x, (k_precision,), halves, tie, "generated")
    ref = _prepare(y, (k_precision, k_density), halves, tie, "reference")
    return _summarise(_count(gen, ref, k_precision, k_density), gen, ref, k_density)


@dataclass(frozen=True)
class _Sample:
    """One sample in block order, and the subsets of it in which the metrics are taken.

    Row 0 of what is kept per subset is the whole sample; where there are intervals, the halves A_1..A_19 and
    B_1..B_19 follow.

    Attributes:
        x: (N, d).
        blocks: its blocks.
        kept: (S, G) which blocks are in each subset.
        members: (S, N) the same for examples.
        radii: by k, (S, N): squared, with the tie's width added; -inf for examples outside the subset, whose
            balls so contain nothing.
    """

    x: Tensor
    blocks: list[slice]
    kept: Tensor
    members: Tensor
    radii: dict[int, Tensor]


@dataclass(frozen=True)
class _Hits:
    """Who lies in whose ball; S_x and S_y are the numbers of subsets of the samples."""

    inside: Tensor  # (S_y, M): x_j lies in some ball of the subset of y
    balls: Tensor  # (M,): in how many of the whole y
    totals: Tensor  # (S_y,): pairs of an x_j and a ball of the subset that it lies in
    reached: Tensor  # (S_x, N): y_i lies in some ball of the subset of x
    nearest: Tensor  # (G_x, N): squared distance from y_i to the nearest x of each block


def _count(gen: _Sample, ref: _Sample, k_precision: int, k_density: int) -> _Hits:
    m, n, device = len(gen.x), len(ref.x), gen.x.device
    hits = _Hits(
        inside=torch.zeros(len(ref.kept), m, dtype=torch.bool, device=device),
        balls=torch.zeros(m, dtype=torch.float64, device=device),
        totals=torch.zeros(len(ref.kept), dtype=torch.float64, device=device),
        reached=torch.zeros(len(gen.kept), n, dtype=torch.bool, device=device),
        nearest=torch.empty(len(gen.blocks), n, dtype=torch.float64, device=device),
    )
    for rows, d2 in _distances(ref.x, gen.x):
        for s, radius in enumerate(ref.radii[k_precision]):
            hits.inside[s] |= (d2 <= radius[rows, None]).any(0)
        for s, radius in enumerate(ref.radii[k_density]):
            within = d2 <= radius[rows, None]
            hits.totals[s] += within.count_nonzero()
            if s == 0:
                hits.balls.add_(within.sum(0))
        for s, radius in enumerate(gen.radii[k_precision]):
            hits.reached[s, rows] = (d2 <= radius).any(1)
        for g, block in enumerate(gen.blocks):
            hits.nearest[g, rows] = d2[:, block].amin(1)
    return hits


def _summarise(hits: _Hits, gen: _Sample, ref: _Sample, k: int) -> dict[str, Replicates]:
    radius = ref.radii[k]
    nearest = torch.stack([hits.nearest[kept].amin(0) for kept in gen.kept])  # (S_x, N)
    of_gen = {  # each metric in the subsets of x, with the whole y
        "precision": _means(hits.inside[0], gen.members),
        "recall": hits.reached.double().mean(1),
        "density": _means(hits.balls / k, gen.members),
        "coverage": (nearest <= radius[0]).double().mean(1),
    }
    of_ref = {  # and in the subsets of y, with the whole x
        "precision": hits.inside.double().mean(1),
        "recall": _means(hits.reached[0], ref.members),
        "density": hits.totals / (k * len(gen.x)),
        "coverage": (nearest[0] <= radius).double().sum(1) / ref.members.sum(1),
    }
    return {
        name: delete_half(float(of_gen[name][0]), of_gen[name][1:], of_ref[name][1:], len(gen.x), len(ref.x))
        for name in of_gen
    }


def _means(x: Tensor, members: Tensor) -> Tensor:
    """The mean of x (N,) over the members (S, N) of each subset, (S,)."""
    return members.double() @ x.double() / members.sum(1)


def _prepare(x: Tensor, ks: tuple[int, ...], halves: bool, tie: float, name: str) -> _Sample:
    k = max(ks)
    if len(x) <= k:
        raise DataError(f"{len(x)} {name} examples are too few for {k} nearest neighbours: give at least {k + 1}")
    blocks, kept = [slice(0, len(x))], torch.ones(1, 1, dtype=torch.bool)
    if halves:
        x, blocks = shuffle_into_blocks(x)
        kept = torch.cat([torch.ones(1, len(blocks), dtype=torch.bool), HALVES, ~HALVES])
    kept = kept.to(x.device)
    sizes = torch.tensor([b.stop - b.start for b in blocks], device=x.device)
    members = kept.repeat_interleave(sizes, 1)
    near = _nearest_per_block(x, blocks, k)
    smallest = torch.stack([near[subset].flatten(0, 1).topk(k, dim=0, largest=False).values for subset in kept])
    radii = {j: (smallest[:, j - 1] + tie).masked_fill(~members, -torch.inf) for j in ks}
    return _Sample(x, blocks, kept, members, radii)


def _nearest_per_block(x: Tensor, blocks: list[slice], k: int) -> Tensor:
    """Squared distances from each x_i to its k nearest others in each block, (G, k, N); inf where there are fewer."""
    near = torch.full((len(blocks), k, len(x)), torch.inf, dtype=x.dtype, device=x.device)
    for rows, d2 in _distances(x, x):
        itself = torch.arange(rows.start, rows.stop, device=x.device)
        d2[itself - rows.start, itself] = torch.inf
        for g, block in enumerate(blocks):
            size = min(k, block.stop - block.start)
            near[g, :size, rows] = d2[:, block].topk(size, largest=False).values.T
    return near


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances (rows, M) from successive rows of x (N, d) to y (M, d)."""
    size = max(1, CHUNK // len(y))
    y_norm = y.square().sum(1)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        d2 = torch.addmm(y_norm, part, y.T, alpha=-2.0).add_(part.square().sum(1, keepdim=True))
        yield slice(start, start + len(part)), d2
