r"""Splines: monotone maps in pieces, with knots (x_k, y_k) and slopes d_k there, k = 0..K.

With w = x_{k+1} - x_k, h = y_{k+1} - y_k, s = h / w and t = (x - x_k) / w, inside bin k,

the rational-quadratic spline (Durkan et al. 2019, arXiv:1906.04032, after Gregory & Delbourgo 1982) is
    y     = y_k + h P / D,   P = s t^2 + d_k t (1 - t),   D = s + (d_k + d_{k+1} - 2 s) t (1 - t),
    dy/dx = (s / D)^2 N,     N = d_{k+1} t^2 + 2 s t (1 - t) + d_k (1 - t)^2,
with free slopes d_k > 0. It goes from (-B, -B) to (B, B). Either it has slope 1 at both ends and goes on as the
identity ("linear tails"), or it has the same slope at both ends, which close to a circle (Rezende et al. 2020,
arXiv:2002.02428);

the cubic spline (Durkan et al. 2019, arXiv:1906.02145) is Hermite's polynomial
    y     = y_k + h (a t + b t^2 + c t^3),   a = d_k / s, b = 3 - 2 a - d_{k+1} / s, c = a + d_{k+1} / s - 2,
whose inner slopes follow from the knots, such that it is monotone (Steffen 1990).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trilemma.flow.elementwise import ElementwiseMap
from trilemma.flow.monotone import solve


def place_knots(fractions: Tensor, bound: float, min_bin: float) -> Tensor:
    """Fractions of bins (2, K, *) that sum to 1 -> positions of knots along x and y, (2, K + 1, *)."""
    k = fractions.shape[1]
    inner, _ = torch.split(fractions, [k - 1, 1], 1)
    ranks = torch.arange(1, k, dtype=inner.dtype, device=inner.device).view(-1, *[1] * (inner.ndim - 2))
    scale = 2.0 * bound * (1.0 - min_bin * k)
    inner = torch.add(2.0 * bound * min_bin * ranks - bound, inner.cumsum(1), alpha=scale)
    end = inner.new_full((), bound).expand(2, 1, *inner.shape[2:])  # exactly B, which a sum of K fractions is not
    return torch.cat([-end, inner, end], 1)


def beyond(knots: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Knots (K + 1, *), at (*) -> (K, *) twice: 1 where `at` is beyond the left and the right end of a bin, else 0.

    Left minus right is 1 in the bin of `at`. Sums over bins with this mask are as exact as `gather`, and they and
    their derivatives are quicker.
    """
    passed = (at >= knots[1:-1].detach()).to(knots.dtype)
    one = passed.new_ones(()).expand(1, *at.shape)
    passed = torch.cat([one, passed, one - one])
    return passed[:-1], passed[1:]


def place_in_bin(rise: Tensor, h: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """t in [0, 1] at which a rational-quadratic bin has risen by `rise` of its height h."""
    bend = rise * (d0 + d1 - 2.0 * s)
    a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * rise
    # a t^2 + b t + c = 0 has one root in [0, 1]; this form of it does not cancel. The discriminant is positive
    # by monotonicity, so only rounding can take it below 0.
    return 2.0 * c / (-b - (b.square() - 4.0 * a * c).clamp_min(0.0).sqrt())


def wrap(angle: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


class RationalQuadraticSpline(ElementwiseMap):
    """Monotone rational-quadratic spline on [-bound, bound], identity outside.

    Its parameters are K logits of widths, K of heights, and K - 1 inner slopes (before the softplus). Training takes
    `_AnalyticGradient`, which knows reverse mode only: it refuses the transforms of torch.func.

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

    def _fractions(self, parameters: Tensor) -> Tensor:
        """(2, K, *), before the smallest size is added."""
        return parameters[: 2 * self.bins].reshape(2, self.bins, *parameters.shape[1:]).softmax(1)

    def _knots(self, parameters: Tensor) -> Tensor:
        return place_knots(self._fractions(parameters), self.bound, self.min_bin)

    def _ends_of(self, here: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the slopes at both ends of the bin that the mask `here` (K, *) chooses; 0 gives slope 1."""
        return (here[1:] * slopes).sum(0), (here[:-1] * slopes).sum(0)

    def _bin(self, at: Tensor, knots: Tensor, parameters: Tensor, axis: int) -> tuple[Tensor, ...]:
        """x_k, w, y_k, h, d_k, d_{k+1} of the bin that `at` lies in along axis 0 (x) or 1 (y), and its masks."""
        left, right = beyond(knots[axis], at)
        here = left - right
        low, high = (here * knots[:, :-1]).sum(1), (here * knots[:, 1:]).sum(1)
        (x0, y0), (w, h) = low.unbind(), (high - low).unbind()
        one = math.log(math.expm1(1.0 - self.min_slope))  # makes the slope 1 where the parameter is 0
        d0, d1 = (self.min_slope + softplus(d + one) for d in self._ends_of(here, parameters[2 * self.bins :]))
        return x0, w, y0, h, d0, d1, left, right

    @staticmethod
    def _denominators(t: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
        """D and N."""
        u = 1.0 - t
        tu = t * u
        d = torch.addcmul(s, (d0 - s) + (d1 - s), tu)
        return d, torch.addcmul(torch.addcmul(d0 * (u * u), d1, t * t), s, tu, value=2.0)

    def _within(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
        """y and log dy/dx for x in [-B, B], and what `_AnalyticGradient` needs."""
        fractions = self._fractions(parameters)
        knots = place_knots(fractions, self.bound, self.min_bin)
        x0, w, y0, h, d0, d1, left, right = self._bin(x, knots, parameters, 0)
        t, s = (x - x0) / w, h / w
        d, n = self._denominators(t, s, d0, d1)
        p = torch.addcmul(d0 * (t * (1.0 - t)), s, t * t)
        y, log_slope = torch.addcmul(y0, h, p / d), (n * (s / d).square()).log()
        return y, log_slope, fractions, left, right, w, h, s, t, d0, d1, p, d, n

    def _with_tails(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
        inside = x.abs() < self.bound
        # Clamping keeps what `where` does not choose finite, and its gradient too.
        y, log_slope, *rest = self._within(x.clamp(-self.bound, self.bound), parameters)
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0), inside, *rest

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad)
        if needs_grad and not torch.compiler.is_compiling():
            return _AnalyticGradient.apply(x, parameters, self)  # type: ignore[no-any-return, no-untyped-call]
        y, log_slope, *_ = self._with_tails(x, parameters)
        return y, log_slope

    def _within_inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dy for y in [-B, B]."""
        x0, w, y0, h, d0, d1, *_ = self._bin(y, self._knots(parameters), parameters, 1)
        s = h / w
        t = place_in_bin(y - y0, h, s, d0, d1)
        d, n = self._denominators(t, s, d0, d1)
        return x0 + t * w, -(n * (s / d).square()).log()

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < self.bound
        x, log_slope = self._within_inverse(y.clamp(-self.bound, self.bound), parameters)
        return torch.where(inside, x, y), torch.where(inside, log_slope, 0.0)


class _AnalyticGradient(torch.autograd.Function):
    """The derivative of y and L = log dy/dx of a rational-quadratic spline by hand: a third less time than autograd.

    With e_y and e_L the gradients that come in, those of P, N and D are
        e_P = e_y h / D,   e_N = e_L / N,   e_D = -(e_P P + 2 e_L) / D,
    and all else follows by the chain rule. Where a second derivative is wanted, autograd goes the long way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, spline: RationalQuadraticSpline) -> tuple[Tensor, Tensor]:
        y, log_slope, *saved = spline._with_tails(x, parameters)
        ctx.spline = spline
        ctx.save_for_backward(x, parameters, *saved)
        return y, log_slope

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, parameters, inside, *saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_gradients(ctx.spline, inside, *gradients, *saved), None
        inputs = [v for v in (x, parameters) if v.requires_grad]
        outputs = ctx.spline._with_tails(x, parameters)[:2]
        found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True))
        of_x, of_parameters = (next(found) if v.requires_grad else None for v in (x, parameters))
        return of_x, of_parameters, None


def _gradients(
    spline: RationalQuadraticSpline, inside: Tensor, of_y: Tensor, of_log_slope: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the parameters."""
    fractions, left, right, w, h, s, t, d0, d1, p, d, n = saved
    e_y, e_l = of_y * inside, of_log_slope * inside
    u = 1.0 - t
    tu, tt, turn = t * u, t * t, u - t
    e_yd = e_y / d
    e_p, e_n = e_yd * h, e_l / n
    minus_e_d = torch.add(e_p * p, e_l, alpha=2.0) / d
    p_t = torch.addcmul(d0 * turn, s, t, value=2.0)  # dP/dt
    half_n_t = torch.addcmul(torch.addcmul(d1 * t, s, turn), d0, u, value=-1.0)  # half of dN/dt
    e_t = torch.addcmul(e_p * p_t, e_n, half_n_t, value=2.0)
    e_t = torch.addcmul(e_t, minus_e_d * turn, (d0 - s) + (d1 - s), value=-1.0)
    e_s = torch.addcmul(e_p * tt - minus_e_d, e_n + minus_e_d, tu, value=2.0)
    e_s = torch.add(e_s, e_l / s, alpha=2.0)
    e_x, e_sw = e_t / w, e_s / w
    minus_e_w = torch.addcmul(e_x * t, e_sw, s)
    e_h = torch.addcmul(e_sw, e_yd, p)
    # A bin before the chosen one moves its left end, the chosen one its size; the softmax is blind to a common term.
    scale = 2.0 * spline.bound * (1.0 - spline.min_bin * spline.bins)
    sizes = scale * torch.stack([minus_e_w - e_x, e_y - e_h, -minus_e_w, e_h])
    before, own = sizes.view(2, 2, 1, *t.shape)
    weighted = fractions * torch.addcmul(before * right, own, left)
    logits = torch.addcmul(weighted, fractions, weighted.sum(1, keepdim=True), value=-1.0)
    # The derivative of softplus is 1 - exp(-softplus).
    e_d0 = torch.expm1(spline.min_slope - d0) * torch.addcmul((minus_e_d - e_p) * tu, e_n, u * u, value=-1.0)
    e_d1 = torch.expm1(spline.min_slope - d1) * torch.addcmul(minus_e_d * tu, e_n, tt, value=-1.0)
    here = left - right
    slopes = torch.addcmul(here[1:] * e_d0, here[:-1], e_d1)
    return torch.where(inside, e_x, of_y), torch.cat([logits.flatten(0, 1), slopes])


class CircularSpline(RationalQuadraticSpline):
    """Rational-quadratic spline of the circle: angles in [-pi, pi) to angles, with the same slope at both ends.

    y = spline(x) + shift, modulo 2 pi; x and x + 2 pi are the same point, and the results lie in [-pi, pi). Its
    parameters are K logits of widths, K of heights, K slopes (before the softplus) and the shift.

    Arguments:
        bins: K >= 2.
        min_bin: smallest width and height of a bin, as a fraction of 2 pi.
        min_slope: smallest slope at a knot.
    """

    def __init__(self, bins: int = 8, min_bin: float = 1e-3, min_slope: float = 1e-3) -> None:
        super().__init__(bins, math.pi, min_bin, min_slope)
        self.size = 3 * bins + 1

    def _ends_of(self, here: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return (here * slopes).sum(0), (here * slopes.roll(-1, 0)).sum(0)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope, *_ = self._within(wrap(x), parameters[:-1])
        return wrap(y + parameters[-1]), log_slope

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope = self._within_inverse(wrap(y - parameters[-1]), parameters[:-1])
        return wrap(x), log_slope


class CubicSpline(ElementwiseMap):
    """Monotone cubic spline on [-bound, bound]; outside it goes on in straight lines, so that it is C1.

    Its parameters are K logits of widths, K of heights, and two for the slopes at the ends, which lie between 0 and
    twice the slope of their bins' secants, as Steffen's inner slopes do. The inverse iterates: the formulas for the
    roots of a cubic lose digits where its leading coefficients nearly vanish, as they do near the identity. It
    has first derivatives only.

    Arguments:
        bins: K >= 2.
        bound: B > 0.
        min_bin: smallest width and height of a bin, as a fraction of 2 B.
        min_slope: smallest slope at an end, as a fraction of that of its bin's secant.
    """

    numerical = True

    def __init__(self, bins: int = 8, bound: float = 5.0, min_bin: float = 1e-3, min_slope: float = 1e-3) -> None:
        assert bins >= 2
        assert bins * min_bin < 1.0
        assert min_slope < 1.0
        self.size = 2 * bins + 2
        self.bins, self.bound, self.min_bin, self.min_slope = bins, bound, min_bin, min_slope

    def _knots(self, parameters: Tensor) -> Tensor:
        """(3, K + 1, *): positions x_k, positions y_k and slopes d_k."""
        logits, ends = torch.split(parameters, [2 * self.bins, 2])
        knots = place_knots(logits.reshape(2, self.bins, *logits.shape[1:]).softmax(1), self.bound, self.min_bin)
        w, h = knots.diff(dim=1).unbind()
        s = h / w
        secants = torch.minimum(s[:-1], s[1:])
        parabolas = (s[:-1] * w[1:] + s[1:] * w[:-1]) / (w[:-1] + w[1:])  # slopes of those through three knots
        inner = torch.minimum(2.0 * secants, parabolas)
        first, last = s[[0, -1]] * (self.min_slope + 2.0 * (1.0 - self.min_slope) * ends.sigmoid())
        return torch.cat([knots, torch.cat([first[None], inner, last[None]])[None]])

    def _bin(self, at: Tensor, parameters: Tensor, axis: int) -> tuple[Tensor, ...]:
        """x_k, w, y_k, h, and the coefficients a, b, c of the bin that `at` lies in along axis 0 (x) or 1 (y)."""
        knots = self._knots(parameters)
        left, right = beyond(knots[axis], at)
        here = left - right
        x0, y0, d0 = (here * knots[:, :-1]).sum(1).unbind()
        x1, y1, d1 = (here * knots[:, 1:]).sum(1).unbind()
        w, h = x1 - x0, y1 - y0
        a, end = d0 * w / h, d1 * w / h
        return x0, w, y0, h, a, 3.0 - 2.0 * a - end, a + end - 2.0

    @staticmethod
    def _cubic(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return t * (a + t * (b + t * c)), a + t * (2.0 * b + 3.0 * t * c)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        x_in = x.clamp(-self.bound, self.bound)
        x0, w, y0, h, *coefficients = self._bin(x_in, parameters, 0)
        value, slope = self._cubic((x_in - x0) / w, *coefficients)
        slope = slope * h / w
        return y0 + h * value + slope * (x - x_in), slope.log()

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y_in = y.clamp(-self.bound, self.bound)
        x0, w, y0, h, *coefficients = self._bin(y_in, parameters, 1)
        target = (y_in - y0) / h
        with torch.no_grad():
            zero, one = torch.zeros_like(target), torch.ones_like(target)
            t = solve(lambda t: self._cubic(t, *coefficients), target, zero, one, start=target)
        value, slope = self._cubic(t, *coefficients)
        # The derivative of the inverse, without a change of t: rounding there would bend the tails.
        error = target - value
        t = t + (error - error.detach()) / slope
        slope = self._cubic(t, *coefficients)[1] * h / w
        return x0 + t * w + (y - y_in) / slope, -slope.log()
