r"""Each dimension to a normal distribution, through the quantiles of the training data.

With knots at the empirical quantiles x_k of levels p_k, and values y_k = Phi^-1(p_k), a monotone rational-quadratic
spline (Gregory & Delbourgo 1982) with the slopes of Fritsch & Butland 1984 is a smooth estimate of Phi^-1(F(x)): the
first step of Gaussianization (Chen & Gopinath 2000). Columns of tables have spikes and long tails that a flow of
standardized columns spends its capacity on; after it, what is left to learn is how the columns depend on each other.
The knots are found from the data and not trained; beyond the outer ones the map goes on as a line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.core.noise import Noise
from trilemma.flow.transforms import Result, Transform, sum_dims

PER_KNOT = 16
"""Examples between two knots, at least."""

NEAREST = 1e-6
"""Least relative distance of two knots."""


class Marginal(Transform):
    """x (N, D) with every dimension near N(0, 1) on the data it was initialised from.

    Arguments:
        dims: D.
        knots: at most so many quantiles; fewer where examples are few.
    """

    knots: Tensor

    def __init__(self, dims: int, knots: int = 64) -> None:
        super().__init__()
        line = torch.linspace(-3.0, 3.0, knots).expand(dims, -1)
        self.register_buffer("knots", torch.stack([line, line, torch.ones(dims, knots)]))  # x, y, slope

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        size = self.knots.shape[2]
        levels = self._levels(len(x)).to(x.device)
        values = torch.special.ndtri(levels)
        for d, at in enumerate(torch.quantile(x.double(), levels, 0).T):
            self.knots[:, d] = _padded(*_apart(at, values), size)
        return self(x, context, noise)[0]  # type: ignore[no-any-return]

    def _levels(self, n: int) -> Tensor:
        """Levels of the quantiles, with `PER_KNOT` of n examples between two; the first and last are outer ones."""
        k = max(2, min(self.knots.shape[2], n // PER_KNOT))
        levels = (torch.arange(k, dtype=torch.float64) + 0.5) / k
        levels[0], levels[-1] = 0.5 / (n + 1), 1.0 - 0.5 / (n + 1)
        return levels

    def _bin(self, at: Tensor, axis: int) -> tuple[Tensor, ...]:
        """x_k, y_k, d_k and x_{k+1}, y_{k+1}, d_{k+1} around `at` (N, D) along axis 0 (x) or 1 (y)."""
        inner = self.knots[axis, :, 1:-1].contiguous()
        index = torch.searchsorted(inner, at.T.contiguous(), right=True)
        low, high = (self.knots.gather(2, (index + i).expand(3, -1, -1)).transpose(1, 2) for i in (0, 1))
        return (*low.unbind(), *high.unbind())

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        x0, y0, d0, x1, y1, d1 = self._bin(x, 0)
        w, h = x1 - x0, y1 - y0
        t, s = (x - x0) / w, h / w
        below, above = t < 0.0, t > 1.0
        t_in = t.clamp(0.0, 1.0)
        tu = t_in * (1.0 - t_in)
        denominator = s + (d0 + d1 - 2.0 * s) * tu
        z = y0 + h * (s * t_in.square() + d0 * tu) / denominator
        slope = (d1 * t_in.square() + 2.0 * s * tu + d0 * (1.0 - t_in).square()) * (s / denominator).square()
        z = torch.where(below, y0 + d0 * (x - x0), torch.where(above, y1 + d1 * (x - x1), z))
        slope = torch.where(below, d0, torch.where(above, d1, slope))
        return z, sum_dims(slope.log())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        x0, y0, d0, x1, y1, d1 = self._bin(z, 1)
        w, h = x1 - x0, y1 - y0
        s, rise = h / w, (torch.minimum(torch.maximum(z, y0), y1) - y0)
        bend = rise * (d0 + d1 - 2.0 * s)
        a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * rise
        t = 2.0 * c / (-b - (b.square() - 4.0 * a * c).clamp_min(0.0).sqrt())
        x = x0 + t * w
        x = torch.where(z < y0, x0 + (z - y0) / d0, torch.where(z > y1, x1 + (z - y1) / d1, x))
        return x, -self(x, context)[1]


def _apart(at: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles (K,) and values without those that single precision can hardly tell from the one before.

    Examples that are equal make equal quantiles; a constant column keeps one, and a second at distance 1.
    """
    kept = [0]
    for k in range(1, len(at)):
        if at[k] - at[kept[-1]] > NEAREST * (1.0 + at[k].abs()):
            kept.append(k)
    if len(kept) == 1:
        return torch.stack([at[0], at[0] + 1.0]), torch.stack([at.new_zeros(()), at.new_ones(())])
    return at[kept], values[kept]


def _padded(x: Tensor, y: Tensor, size: int) -> Tensor:
    """x, y and slopes (3, size) at the knots: weighted harmonic means inside, those of the outer segments at the ends.

    Where knots are too few, more of them follow on the line beyond the last.
    """
    w, s = x.diff(), y.diff() / x.diff()
    left, right = w[1:] + 2.0 * w[:-1], 2.0 * w[1:] + w[:-1]
    inner = (left + right) / (right / s[:-1] + left / s[1:])
    beyond = torch.arange(1, size - len(x) + 1, dtype=x.dtype, device=x.device)
    return torch.stack(
        [
            torch.cat([x, x[-1] + beyond]),
            torch.cat([y, y[-1] + s[-1] * beyond]),
            torch.cat([s[:1], inner, s[-1:].expand(len(beyond) + 1)]),
        ]
    )
