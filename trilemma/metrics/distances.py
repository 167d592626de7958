r"""Nearest neighbours and balls: exact answers at the speed of single-precision matrix products.

Squared distances |x|^2 + |y|^2 - 2 x.y cost one matrix product, but cancel digits. So they only filter. For rows
centred and scaled into the cube [-1, 1]^d, evaluated in float32 (unit roundoff u = 2^-24),
    L = (1 - g) (|x|^2 + |y|^2) - 2 x.y  <=  d^2  <=  L + 2 g (|x|^2 + |y|^2),    g = (2 d + 32) u,
whatever the rounding was. A pair is looked at again only where these bounds leave a question open, and then
its distance is taken from the differences in float64, d^2 = sum_c (x_c - y_c)^2: equal points are at distance zero,
and equal differences give equal distances, as in a k-d tree.

For the neighbours of a sample among itself the product is symmetric, and half of it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SLACK = 3
"""More candidates than neighbours asked for, so that the bound L seldom has to ask for a second look."""
TILE = 2048
"""Rows and columns of one matrix product: large enough for its rate, small enough for memory."""
HELD = 2**18
"""Numbers held at once while distances are taken from differences: a cache's worth."""


def tie(d: int) -> float:
    """Relative width within which two squared distances of d terms are a tie: the rounding of their sums."""
    return 4.0 * d * torch.finfo(torch.float64).eps


def squared_distances(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """|x_i - y_j|^2 of pairs of rows (P,), in float64, from the differences."""
    size = max(1, HELD // x.shape[1])
    parts = [
        (x[a].double() - y[b].double()).square_().sum(1)
        for a, b in zip(torch.split(i, size), torch.split(j, size), strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=x.device)


def nearest(x: Tensor, k: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest rows of y (M, d) to each row of x (N, d); without y, among the other rows of x.

    Returns:
        Squared distances (N, k) in float64, ascending, and the indices (N, k) of the neighbours.
    """
    other = x if y is None else y
    total = len(other) - (y is None)
    assert 1 <= k <= total, f"{k} neighbours among {total}"
    bounds = _Bounds(x, other)
    d2 = torch.empty(len(x), k, dtype=torch.float64, device=x.device)
    index = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    rows, ask = torch.arange(len(x), device=x.device), min(total, k + SLACK)
    first = True
    while len(rows):
        open_rows = []
        for part in [rows] if first else torch.split(rows, max(1, 2**22 // ask)):
            found, low = bounds.lowest_within(ask) if first and y is None else bounds.lowest(part, ask, y is None)
            exact = squared_distances(x, part.repeat_interleave(ask), other, found.flatten()).view(-1, ask)
            order = exact.argsort(dim=1, stable=True)[:, :k]
            d2[part], index[part] = exact.gather(1, order), found.gather(1, order)
            if ask < total:  # whoever is not listed is at least as far as the last bound
                open_rows.append(part[d2[part, -1] > low])
        rows = torch.cat(open_rows) if open_rows else rows[:0]
        ask, first = min(total, 4 * ask), False
    return d2, index


def pairs_within(y: Tensor, x: Tensor, radii_y: Tensor, radii_x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of rows that lie within any of their radii, in pieces; some pairs slightly beyond come too.

    Arguments:
        y, x: (N, d) and (M, d).
        radii_y, radii_x: squared radii (A, N) and (B, M) in float64; -inf for none.

    Yields:
        i (P,), j (P,) and squared distances |y_i - x_j|^2 (P,) in float64. They are on the right side of every
        radius: exact where a radius is so near that the bounds cannot tell, else within the bounds.
    """
    bounds = _Bounds(y, x)
    widest_y, widest_x = (((1.0 + 1e-6) * r.amax(0) / bounds.scale**2).float() for r in (radii_y, radii_x))
    size = max(1, min(TILE, 2**23 // len(x)))
    for start in range(0, len(y), size):
        rows = slice(start, min(start + size, len(y)))
        low = bounds.tile(rows, slice(0, len(x)))
        i, j = (low <= torch.maximum(widest_y[rows, None], widest_x)).nonzero(as_tuple=True)
        half = bounds.half_width(i + start, j)
        d2 = low[i, j].double() * bounds.scale**2 + half
        i += start
        near = torch.zeros_like(i, dtype=torch.bool)
        for radius, index in ((radii_y, i), (radii_x, j)):
            for r in radius:
                near |= (d2 - r[index]).abs_() <= half
        d2[near] = squared_distances(y, i[near], x, j[near])
        yield i, j, d2


class _Bounds:
    """The lower bounds L of the squared distances between rows of x and y, in units of `scale`^2."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        # Any centre and scale will do. In the type of the rows their difference is rounded once, and a power of two
        # divides without rounding.
        centre = y.double().mean(0).to(y.dtype)
        moved = [x - centre] if x is y else [x - centre, y - centre]
        largest = max(float(t.abs().max()) for t in moved)
        self.scale = 2.0 ** math.ceil(math.log2(largest)) if largest > 0.0 else 1.0
        moved = [t.div_(self.scale).float() for t in moved]
        self.x, self.y = moved[0], moved[-1]
        self.g = (2.0 * x.shape[1] + 32.0) * 2.0**-24
        self.norm_x, self.norm_y = ((1.0 - self.g) * t.square().sum(1) for t in (self.x, self.y))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """L of some rows of x with some rows of y."""
        low = torch.addmm(self.norm_y[columns], self.x[rows], self.y[columns].T, alpha=-2.0)
        return low.add_(self.norm_x[rows, None])

    def half_width(self, i: Tensor, j: Tensor) -> Tensor:
        """Half of what lies between L and the upper bound, in true units, of pairs (P,)."""
        return (self.norm_x[i].double() + self.norm_y[j].double()) * (self.g / (1.0 - self.g) * self.scale**2)

    def lowest(self, rows: Tensor, ask: int, others: bool) -> tuple[Tensor, Tensor]:
        """For rows of x: which rows of y have the `ask` lowest L, and the highest of these in true units.

        Arguments:
            others: x and y are the same, and a row is not its own neighbour.
        """
        best, found = self._nothing(len(rows), ask)
        norm = self.norm_x[rows]
        for r in range(0, len(rows), TILE):
            some = slice(r, min(r + TILE, len(rows)))
            part = self.x[rows[some]]
            for c in range(0, len(self.y), TILE):
                low = torch.addmm(self.norm_y[c : c + TILE], part, self.y[c : c + TILE].T, alpha=-2.0)
                low.add_(norm[some, None])
                if others:
                    own = rows[some] - c
                    inside = (own >= 0) & (own < low.shape[1])
                    low[inside.nonzero().flatten(), own[inside]] = torch.inf
                _merge(best, found, some, low, c)
        return found, best[:, -1].double() * self.scale**2

    def lowest_within(self, ask: int) -> tuple[Tensor, Tensor]:
        """`lowest` for all rows among themselves, from the upper half of the products."""
        n = len(self.x)
        best, found = self._nothing(n, ask)
        for r in range(0, n, TILE):
            rows = slice(r, min(r + TILE, n))
            for c in range(r, n, TILE):
                columns = slice(c, min(c + TILE, n))
                low = self.tile(rows, columns)
                if c == r:
                    low.fill_diagonal_(torch.inf)
                _merge(best, found, rows, low, c)
                if c > r:
                    _merge(best, found, columns, low.T.contiguous(), r)
        return found, best[:, -1].double() * self.scale**2

    def _nothing(self, n: int, ask: int) -> tuple[Tensor, Tensor]:
        best = torch.full((n, ask), torch.inf, device=self.x.device)
        return best, torch.zeros(n, ask, dtype=torch.long, device=self.x.device)


def _merge(best: Tensor, found: Tensor, rows: slice, low: Tensor, start: int) -> None:
    """Keep the lowest of what was found for some rows and of a tile whose first column is `start`."""
    k = best.shape[1]
    values, index = low.topk(min(k, low.shape[1]), largest=False)
    values, index = torch.cat([best[rows], values], 1), torch.cat([found[rows], index + start], 1)
    best[rows], order = values.topk(k, largest=False)
    found[rows] = index.gather(1, order)
