r"""Each dimension to a normal distribution, through the quantiles of the training data.

With knots at the empirical quantiles x_k of levels p_k, and values y_k = Phi^-1(p_k), a monotone rational-quadratic
spline (Gregory & Delbourgo 1982) with the slopes of Fritsch & Butland 1984 is a smooth estimate of Phi^-1(F(x)): the
first step of Gaussianization (Chen & Gopinath 2000). Columns of tables have spikes and long tails that a flow of
standardized columns spends its capacity on; after it, what is left to learn is how the columns depend on each other.
The knots are found from the data and not trained; beyond the outer ones the map goes on as a line.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trilemma.core.noise import Noise
from trilemma.flow.splines import place_in_bin
from trilemma.flow.transforms import Result, Transform, standard_log_prob, sum_dims

PER_KNOT = 8
"""Examples between two knots, at least."""

NEAREST = 1e-6
"""Smallest relative distance of two quantiles."""

SPIKE = 0.01
"""Width of a value that recurs, in distances to the next quantile."""


class Marginal(Transform):
    """x (N, D) with every dimension near N(0, 1) on the data it was initialised from.

    Arguments:
        dims: D.
        knots: at most so many quantiles of each dimension; how many are taken is found on held-out values.
    """

    knots: Tensor

    def __init__(self, dims: int, knots: int) -> None:
        super().__init__()
        line = torch.linspace(-3.0, 3.0, knots).expand(dims, -1)
        self.register_buffer("knots", torch.stack([line, line, torch.ones(dims, knots)]))  # x, y, slope

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        for d, values in enumerate(x.double().T):
            self.knots[:, d] = _padded(*_fitted(values, self.knots.shape[2]), self.knots.shape[2])
        return self(x, context, noise)[0]  # type: ignore[no-any-return]

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
        rise = torch.minimum(torch.maximum(z, y0), y1) - y0
        x = x0 + place_in_bin(rise, h, h / w, d0, d1) * w
        x = torch.where(z < y0, x0 + (z - y0) / d0, torch.where(z > y1, x1 + (z - y1) / d1, x))
        return x, -self(x, context)[1]


def _fitted(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Knots x (K,) and y (K,) for one dimension's training values (N,).

    K is a power of two. It is the least whose log-density on one half of the values, after a fit to the other, is not
    worse than the best by more than a standard error: smooth columns take few knots, those with favourite values many.
    """
    sizes = [2**k for k in range(2, 12) if 2**k <= min(most, len(values) // PER_KNOT)]
    if len(sizes) < 2:
        return _quantiles(values, max(2, min(most, len(values) // PER_KNOT)))
    held_out = values[1::2]
    scores = torch.stack([_log_density(held_out, *_quantiles(values[::2], k)) for k in sizes])
    best = int(scores.mean(1).argmax())
    behind = scores[best] - scores
    error = behind.std(1) / math.sqrt(len(held_out))
    return _quantiles(values, sizes[int((behind.mean(1) <= error).int().argmax())])


def _quantiles(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k quantiles of values (N,), the outer ones the extremes, and the normal's.

    Quantiles that single precision can hardly tell apart, as equal examples make them, are one; three or more a spike.
    A spike gets three knots, over `SPIKE` of the way to the nearer neighbour, with its first, mean and last level: so
    its mass stays there, and the density of a value that recurs is finite.
    """
    n = len(values)
    levels = (torch.arange(k, dtype=torch.float64, device=values.device) + 0.5) / k
    levels[0], levels[-1] = 0.5 / (n + 1), 1.0 - 0.5 / (n + 1)
    at = torch.quantile(values, levels)
    at[0], at[-1] = values.amin(), values.amax()
    groups = _alike(at.tolist())
    if len(groups) == 1:  # a constant: z = x - constant
        return torch.stack([at[0], at[0] + 1.0]), at.new_tensor([0.0, 1.0])
    x = torch.stack([at[g].mean() for g in groups])
    gaps = torch.cat([x.diff()[:1], x.diff(), x.diff()[-1:]])
    half = 0.5 * SPIKE * torch.minimum(gaps[:-1], gaps[1:])
    knots = [
        (x[i : i + 1], levels[g].mean().view(1))
        if len(g) < 3
        else (
            x[i] + half[i] * torch.linspace(-1, 1, 3).to(x),
            torch.stack([levels[g[0]], levels[g].mean(), levels[g[-1]]]),
        )
        for i, g in enumerate(groups)
    ]
    at, level = (torch.cat(parts) for parts in zip(*knots, strict=True))
    return at, torch.special.ndtri(level)


def _alike(numbers: list[float]) -> list[list[int]]:
    """Indices of rising numbers, in groups that lie within `NEAREST` of their first."""
    groups: list[list[int]] = []
    for index, number in enumerate(numbers):
        if groups and number - numbers[groups[-1][0]] <= NEAREST * (1.0 + abs(number)):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _log_density(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log density (N,) of values (N,) under the map through the knots."""
    one = Marginal(1, len(x)).double()
    one.knots[:, 0] = _padded(x, y, len(x))
    z, ladj = one(values.unsqueeze(1))
    value: Tensor = standard_log_prob(z) + ladj
    return value


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
