r"""Cells of one-dimensional histograms.

Dimension d is cut at the edges e_0 < ... < e_K. A value y lies in cell f = 1..K, or beyond them in cell 0 or K + 1.
Inside a cell the density is q(y | f) = 1 / (e_f - e_{f-1}), beyond them it is exponential,
    q(y | 0) = exp(-(e_0 - y) / s) / s,    q(y | K + 1) = exp(-(y - e_K) / s) / s,
with s the standard deviation of the training data. So p(y) = P(f(y)) q(y | f(y)) is positive and integrates to one
for every table P of cell probabilities; on a lattice q is one over the number of levels in the cell, an exact
probability, and there is nothing beyond the cells.

Edges respect what a dimension is: cells hold whole numbers of levels, categories or grid steps; real dimensions get
equal widths. How many is chosen by the leave-one-out likelihood, which has a closed form (Rudemo 1982, Scand. J.
Statist. 9, for the squared error): without example i in cell f of width h and count c, pseudocount a per cell,
    log p_{-i}(y_i) = log (c - 1 + a) / (N - 1 + a (K + 2)) - log h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trilemma.core.codec import Codec, ColumnCodec, TableCodec

MAX_CELLS = 256
CANDIDATES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Axis(NamedTuple):
    """What one dimension of model space is.

    Attributes:
        low: an edge between two values of a discrete dimension; the lowest if it is bounded.
        unit: spacing of its values, 0 for a real dimension.
        values: how many there are, None if unbounded.
    """

    low: float = 0.0
    unit: float = 0.0
    values: int | None = None


def axes_of(codec: Codec) -> list[Axis]:
    """The axes of the flattened model space of a fitted codec."""
    if codec.discrete:
        assert codec.space == "integer"
        assert codec.spec.levels is not None
        return [Axis(-0.5, 1.0, codec.spec.levels)] * codec.dims
    axes: list[Axis] = []
    for step in codec.transforms:
        if isinstance(step, TableCodec):
            for column in step.columns:
                assert isinstance(column, ColumnCodec)
                axes += _column_axes(column)
    return axes or [Axis()] * codec.dims


def _column_axes(codec: ColumnCodec) -> list[Axis]:
    column, mean, std = codec.column, codec.mean.item(), codec.std.item()
    if not column.is_discrete:
        return [Axis(), Axis(-2.0, 2.0, 2)] if codec.has_indicator else [Axis()]
    counts = {"categorical": codec.categories, "boolean": 2}
    count = counts.get(column.kind, len(column.values) or None)
    if codec.has_indicator:  # missing values are filled with normal noise, which knows no bounds
        return [Axis(-mean / std, 1.0 / std), Axis(-2.0, 2.0, 2)]
    return [Axis(-mean / std, 1.0 / std, count)]


def indicator_parents(codec: Codec) -> Tensor:
    """For each dimension the index of its own column's missingness indicator, or D if there is none."""
    parents: list[int] = []
    for step in codec.transforms:
        if isinstance(step, TableCodec):
            for column in step.columns:
                assert isinstance(column, ColumnCodec)
                width = len(_column_axes(column))
                parents += [len(parents) + 1, codec.dims] if width == 2 else [codec.dims]
    return torch.tensor(parents or [codec.dims] * codec.dims)


def edges_for(y: np.ndarray, axis: Axis, cells: int) -> np.ndarray:
    """At most about `cells` cells of equal width that hold the data y (N,) of one dimension: edges (K + 1,)."""
    if axis.values is not None:
        step = math.ceil(axis.values / cells)
        return axis.low + axis.unit * np.minimum(np.arange(math.ceil(axis.values / step) + 1) * step, axis.values)
    low, high = float(y.min()), float(y.max())
    if axis.unit > 0.0:
        first = math.floor((low - axis.low) / axis.unit)
        span = math.floor((high - axis.low) / axis.unit) - first + 1
        step = math.ceil(span / cells)
        return axis.low + axis.unit * (first + step * np.arange(math.ceil(span / step) + 1))
    if high == low:  # a constant: one cell of the width that the codec took for its standard deviation
        return np.array([low - 0.5, low + 0.5])
    width = (high - low) / max(1, cells - 1)  # the extreme examples lie in the middle of their cells
    return low - 0.5 * width + width * np.arange(max(2, cells) + 1)


def choose_edges(y: np.ndarray, axis: Axis, pseudocount: float) -> np.ndarray:
    """The edges with the greatest leave-one-out likelihood; one cell per value where the values are bounded."""
    if axis.values is not None:
        return edges_for(y, axis, MAX_CELLS)
    return max((edges_for(y, axis, k) for k in CANDIDATES), key=lambda e: _leave_one_out(y, e, pseudocount))


def _leave_one_out(y: np.ndarray, edges: np.ndarray, pseudocount: float) -> float:
    counts, _ = np.histogram(y, edges)
    seen, n, cells = counts[counts > 0], len(y), len(counts)
    # Laplace's pseudocounts of the two outer cells are part of the normalization.
    p = (seen - 1 + pseudocount) / (n - 1 + pseudocount * (cells + 2))
    return float((seen * np.log(p / (edges[1] - edges[0]))).sum())


class Bins(nn.Module):
    """The cells of D dimensions, with their densities q(y | f)."""

    edges: Tensor
    cells: Tensor
    bounded: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.empty(0, dtype=torch.float64))  # (D, K + 1), padded
        self.register_buffer("cells", torch.empty(0, dtype=torch.int64))  # (D,) inner cells
        self.register_buffer("bounded", torch.empty(0, dtype=torch.bool))  # (D,) nothing lies beyond the cells
        self.register_buffer("scale", torch.empty(0, dtype=torch.float64))  # (D,) decay length beyond the cells

    def fit(self, y: Tensor, axes: Sequence[Axis], edges: Sequence[np.ndarray]) -> None:
        """Take the edges of each dimension; y (N, D) gives the decay lengths."""
        padded = np.full((len(edges), max(map(len, edges))), np.finfo(float).max)
        for row, e in zip(padded, edges, strict=True):
            row[: len(e)] = e
        std = y.std(0, correction=0)
        self.edges = torch.from_numpy(padded).to(y.device)
        self.cells = torch.tensor([len(e) - 1 for e in edges], device=y.device)
        self.bounded = torch.tensor([a.values is not None for a in axes], device=y.device)
        self.scale = torch.where(std > 0, std, torch.ones_like(std))

    @property
    def size(self) -> int:
        """Number of cells F of the dimension that has most, with the two outer ones."""
        return self.edges.shape[1] + 1

    @property
    def valid(self) -> Tensor:
        """(D, F): whether the dimension has that cell."""
        f = torch.arange(self.size, device=self.edges.device)
        inner = (f >= 1) & (f <= self.cells[:, None])
        outer = ((f == 0) | (f == self.cells[:, None] + 1)) & ~self.bounded[:, None]
        return inner | outer

    def index(self, y: Tensor) -> Tensor:
        """The cell 0..F-1 of each value of y (N, D)."""
        f = torch.searchsorted(self.edges, y.T.contiguous(), right=True).T
        # Rounding may lift a bounded value over its outermost edge.
        return torch.where(self.bounded, torch.minimum(f.clamp(min=1), self.cells), f)

    def log_density(self, y: Tensor, f: Tensor) -> Tensor:
        """log q(y | f), (N, D)."""
        _, width, last = self._geometry(f)
        beyond = torch.where(f == 0, self.edges[:, 0] - y, y - last)
        outer = -beyond / self.scale - self.scale.log()
        return torch.where((f == 0) | (f == self.cells + 1), outer, -width.log())

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """y (N, D) from q(y | f) by inversion of uniform u (N, D) in [0, 1)."""
        low, width, last = self._geometry(f)
        decay = -torch.log1p(-u) * self.scale
        outer = torch.where(f == 0, self.edges[:, 0] - decay, last + decay)
        return torch.where((f == 0) | (f == self.cells + 1), outer, low + u * width)

    def _geometry(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower edge and width of each inner cell (1 for outer ones), and the last edge of each dimension."""
        inner = torch.minimum(f.clamp(min=1), self.cells)
        d = torch.arange(f.shape[1], device=f.device)
        low = self.edges[d, inner - 1]
        return low, self.edges[d, inner] - low, self.edges[d, self.cells]


def tally(index: Tensor, size: int, labels: Tensor, classes: int) -> Tensor:
    """Counts (classes, D, size) of the values 0..size-1 of index (N, D), float64."""
    d = index.shape[1]
    flat = (labels[:, None] * d + torch.arange(d, device=index.device)) * size + index
    counts = torch.bincount(flat.flatten(), minlength=classes * d * size)
    return counts.double().reshape(classes, d, size)


def shrink(count: Tensor, total: Tensor | float, prior: Tensor, strength: float | Tensor) -> Tensor:
    """Relative frequency pulled towards a prior that weighs as much as `strength` examples."""
    return (count + strength * prior) / (total + strength)
