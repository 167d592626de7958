r"""Splines: monotone maps in pieces.

The rational-quadratic spline of Durkan et al. 2019 (arXiv:1906.04032), after Gregory & Delbourgo 1982, has
knots (x_k, y_k) with slopes d_k, k = 0..K. With w = x_{k+1} - x_k, h = y_{k+1} - y_k, s = h / w and
t = (x - x_k) / w it is, inside bin k,
    y     = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_k + d_{k+1} - 2 s) t (1 - t))
    dy/dx = s^2 (d_{k+1} t^2 + 2 s t (1 - t) + d_k (1 - t)^2) / (s + (d_k + d_{k+1} - 2 s) t (1 - t))^2.
It goes from (-B, -B) to (B, B) with slope 1 at both ends, and outside it is the identity ("linear tails").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trilemma.flow.elementwise import ElementwiseMap


class RationalQuadraticSpline(ElementwiseMap):
    """Monotone rational-quadratic spline on [-bound, bound], identity outside.

    Its parameters are K logits of widths, K of heights, and K - 1 inner slopes (before the softplus).

    Arguments:
        bins: K >= 2.
        bound: B > 0.
        min_bin: smallest width and height of a bin, as a fraction of 2 B.
        min_slope: smallest slope at a knot.
    """

    def __init__(self, bins: int = 8, bound: float = 5.0, min_bin: float = 1e-3, min_slope: float = 1e-3) -> None:
        assert bins >= 2
        assert bins * min_bin < 1.0
        assert min_slope < 1.0
        self.size = 3 * bins - 1
        self.bins, self.bound, self.min_bin, self.min_slope = bins, bound, min_bin, min_slope

    def _knots(self, parameters: Tensor) -> Tensor:
        """(3, K + 1, *): positions x_k, positions y_k and slopes d_k."""
        k, b = self.bins, self.bound
        sizes, slopes = torch.split(parameters, [2 * k, k - 1])
        fractions = self.min_bin + (1.0 - self.min_bin * k) * sizes.reshape(2, k, *sizes.shape[1:]).softmax(1)
        inner, _ = torch.split(fractions.cumsum(1) * (2.0 * b) - b, [k - 1, 1], 1)
        end = torch.full_like(inner[:, :1], b)  # exactly B, which a sum of K fractions is not
        one = math.log(math.expm1(1.0 - self.min_slope))  # makes the slope 1 where the parameter is 0
        slopes = self.min_slope + softplus(slopes + one)
        slope_at_end = torch.ones_like(slopes[:1])
        return torch.cat(
            [torch.cat([-end, inner, end], 1), torch.cat([slope_at_end, slopes, slope_at_end]).unsqueeze(0)]
        )

    def _bin(self, at: Tensor, parameters: Tensor, axis: int) -> tuple[Tensor, ...]:
        """x_k, w, y_k, h, d_k, d_{k+1} of the bin that `at` lies in along axis 0 (x) or 1 (y)."""
        knots = self._knots(parameters)
        index = (at >= knots[axis, 1:-1].detach()).sum(0, keepdim=True)
        ends = torch.cat([index, index + 1]).expand(3, 2, *at.shape)
        (x0, x1), (y0, y1), (d0, d1) = (pair.unbind() for pair in knots.gather(1, ends).unbind())
        return x0, x1 - x0, y0, y1 - y0, d0, d1

    @staticmethod
    def _log_slope(t: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
        """log dy/dx, and the denominator of y."""
        u = 1.0 - t
        tu = t * u
        denominator = s + (d0 + d1 - 2.0 * s) * tu
        numerator = d1 * t.square() + 2.0 * s * tu + d0 * u.square()
        return (numerator * (s / denominator).square()).log(), denominator

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        x_in = x.clamp(-self.bound, self.bound)  # keeps what `where` does not choose finite, and its gradient too
        x0, w, y0, h, d0, d1 = self._bin(x_in, parameters, 0)
        t, s = (x_in - x0) / w, h / w
        log_slope, denominator = self._log_slope(t, s, d0, d1)
        y = y0 + h * (s * t.square() + d0 * t * (1.0 - t)) / denominator
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < self.bound
        y_in = y.clamp(-self.bound, self.bound)
        x0, w, y0, h, d0, d1 = self._bin(y_in, parameters, 1)
        s, rise = h / w, y_in - y0
        bend = rise * (d0 + d1 - 2.0 * s)
        a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * rise
        # a t^2 + b t + c = 0 has one root in [0, 1]; this form of it does not cancel. The discriminant is positive
        # by monotonicity, so only rounding can take it below 0.
        t = 2.0 * c / (-b - (b.square() - 4.0 * a * c).clamp_min(0.0).sqrt())
        log_slope, _ = self._log_slope(t, s, d0, d1)
        return torch.where(inside, x0 + t * w, y), torch.where(inside, -log_slope, 0.0)
