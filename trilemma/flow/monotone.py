r"""Monotone maps whose inverse has no closed form; it is found by Newton's method between brackets.

At the root x of g(x; p) = y the implicit function theorem gives dx/dy = 1 / g' and dx/dp = -(dg/dp) / g'. One Newton
step from the root, x + (y - g(x)) / g'(x), has this derivative and leaves the value as it is; a second step has the
second derivative too.

- Logistic mixture (Flow++, Ho et al. 2019, arXiv:1902.00275): y = e^a logit(sum_k pi_k sigmoid((x - mu_k) / s_k)) + b.
- Bernstein polynomial (Sick et al. 2021, arXiv:2004.00464; Ramasinghe et al. 2021, arXiv:2102.03509):
  y = sum_k theta_k C(M, k) t^k (1 - t)^(M - k), with theta increasing and t = (x + B) / 2B.
- Sum of squares (Jaini et al. 2019, arXiv:1905.02325): y = c + int_0^x sum_k p_k(u)^2 du with polynomials p_k.
- Deep dense sigmoidal flow (Huang et al. 2018, arXiv:1804.00779), layers of
  h <- logit(W sigmoid(e^a (U h) + b)), where each row of W and U is a distribution.

The first and the last are flat between far-apart sigmoids, flatter than numbers can hold. So min_slope x is a part of
them: y = (1 - min_slope) (...) + min_slope x.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from trilemma.flow.elementwise import ElementwiseMap, soft_bound

Constrained = tuple[Tensor, ...]
"""Parameters after their constraints."""


ONE = math.log(math.expm1(1.0))
"""softplus(ONE) = 1."""


def solve(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    low: Tensor,
    high: Tensor,
    start: Tensor | None = None,
) -> Tensor:
    """x between low and high (*) with function(x)[0] = target, to rounding. No derivative passes.

    Newton's method; where a step leaves the bracket or is not half of the last one, the bracket is halved
    (Press et al. 2007, Numerical Recipes, section 9.4).

    Arguments:
        function: x (*) -> increasing values (*) and their slopes (*).
        start: first guess; the middle of the bracket without it.
    """
    eps = torch.finfo(target.dtype).eps
    x = 0.5 * (low + high) if start is None else start
    last, done = high - low, torch.zeros_like(target, dtype=torch.bool)
    tolerance = 8.0 * eps * (1.0 + target.abs())
    for _ in range(200):  # twice the bits of the widest bracket
        value, slope = function(x)
        error = value - target
        low, high = torch.where(error <= 0, x, low), torch.where(error >= 0, x, high)
        newton = x - error / slope
        good = (newton >= low) & (newton <= high) & ((newton - x).abs() <= 0.5 * last)
        step = torch.where(good, newton, 0.5 * (low + high)) - x
        step = torch.where(done | (error.abs() <= tolerance), 0.0, step)
        x, last = x + step, step.abs()
        done = done | (last <= eps * (1.0 + x.abs()))
        if bool(done.all()):
            break
    return x


def powers(x: Tensor, n: int) -> Tensor:
    """(n, *): x^0, ..., x^(n - 1), in log2(n) operations."""
    result = torch.stack([torch.ones_like(x), x])
    while len(result) < n:
        result = torch.cat([result, result * (result[-1] * x)])
    return result[:n]


def column(values: Tensor | np.ndarray, like: Tensor, ndim: int) -> Tensor:
    """Values (*shape) as (*shape, 1, ..., 1) with `ndim` ones, of the dtype and device of `like`."""
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values.view(*values.shape, *[1] * ndim)


class MonotoneMap(ElementwiseMap):
    """A map that is given by `constrain` and `evaluate` alone. Its slope stays above a positive number.

    The inverse has the first derivatives of x and of the log slope, and the second ones of x.
    """

    numerical = True

    def constrain(self, parameters: Tensor) -> Constrained:
        """What is the same for every x: parameters (size, *) -> tensors (..., *)."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, constrained: Constrained) -> tuple[Tensor, Tensor]:
        """x (*) -> y (*) and log dy/dx (*)."""
        raise NotImplementedError

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.evaluate(x, self.constrain(parameters))

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        constrained = self.constrain(parameters)
        with torch.no_grad():
            x = self._root(y, constrained)
        value, log_slope = self.evaluate(x, constrained)
        x = x + (y - value) * (-log_slope).exp()
        value, log_slope = self.evaluate(x, constrained)
        return x + (y - value) * (-log_slope).exp(), -log_slope

    def _root(self, y: Tensor, constrained: Constrained) -> Tensor:
        """From y, as all maps start near the identity, walk towards the root in growing steps until it is passed."""
        near = far = y
        error = y - self.evaluate(y, constrained)[0]
        direction, step = error.sign(), 1.0 + error.abs()
        passed = direction == 0
        for _ in range(64):  # 4^64 is beyond float32
            if bool(passed.all()):
                break
            near, far = torch.where(passed, near, far), torch.where(passed, far, far + direction * step)
            step = 4.0 * step
            passed = passed | ((self.evaluate(far, constrained)[0] - y) * direction >= 0)

        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = self.evaluate(x, constrained)
            return value, log_slope.exp()

        return solve(function, y, torch.minimum(near, far), torch.maximum(near, far), near)


class LogisticMixture(MonotoneMap):
    """e^a logit F(x) + b, where F is the distribution function of a mixture of K logistics, and min_slope x.

    Its parameters are K logits, K means, K log scales, a and b. The means start evenly spread over [-1/2, 1/2]: equal
    components would stay equal for ever. So at 0 it is the identity only to log mean_k e^{mu_k} < 0.13, the
    distance in the tails; by default this is 0.053.

    Arguments:
        components: K >= 1.
        max_log_scale: bound of a and of the log scales, as in `Affine`.
        min_slope: in (0, 1).
    """

    def __init__(self, components: int = 8, max_log_scale: float = 3.0, min_slope: float = 1e-3) -> None:
        self.size = 3 * components + 2
        self.components, self.max_log_scale, self.min_slope = components, max_log_scale, min_slope

    def constrain(self, parameters: Tensor) -> Constrained:
        k = self.components
        logits, means, scales, log_a, b = torch.split(parameters, [k, k, k, 1, 1])
        offsets = torch.linspace(-0.5, 0.5, k) if k > 1 else torch.zeros(1)
        log_s, log_a = soft_bound(scales, self.max_log_scale), soft_bound(log_a, self.max_log_scale)
        return logits.log_softmax(0), means + column(offsets, means, means.ndim - 1), log_s, log_a[0], b[0]

    def evaluate(self, x: Tensor, constrained: Constrained) -> tuple[Tensor, Tensor]:
        log_pi, mu, log_s, log_a, b = constrained
        u = (x - mu) * (-log_s).exp()
        below = logsigmoid(u)
        above = below - u
        log_f, log_1_f, log_density = (log_pi + torch.stack([below, above, below + above - log_s])).logsumexp(1)
        y, log_slope = log_a.exp() * (log_f - log_1_f) + b, log_a + log_density - log_f - log_1_f
        return _with_line(self.min_slope, x, y, log_slope)


def _with_line(weight: float, x: Tensor, y: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - weight) y + weight x, and its log slope."""
    line = log_slope.new_full((), math.log(weight))
    return y + weight * (x - y), torch.logaddexp(log_slope + math.log1p(-weight), line)


class Bernstein(MonotoneMap):
    """Bernstein polynomial of degree M on [-bound, bound]; outside it goes on in straight lines, so that it is C1.

    Its parameters are a shift and M increments of the coefficients (before the softplus).

    Arguments:
        degree: M >= 1.
        bound: B > 0.
        min_slope: smallest slope, in (0, 1).
    """

    def __init__(self, degree: int = 16, bound: float = 5.0, min_slope: float = 1e-3) -> None:
        self.size = degree + 1
        self.degree, self.bound, self.min_slope = degree, bound, min_slope
        self.binomials = torch.tensor([float(math.comb(degree - 1, k)) for k in range(degree)], dtype=torch.float64)

    def constrain(self, parameters: Tensor) -> Constrained:
        """theta_0, ..., theta_{M-1} and the slopes M / 2B (theta_{k+1} - theta_k)."""
        shift, raw = torch.split(parameters, [1, self.degree])
        slopes = self.min_slope + (1.0 - self.min_slope) * softplus(raw + ONE)
        rises = slopes * (2.0 * self.bound / self.degree)
        return torch.cat([shift - self.bound, (shift - self.bound) + rises[:-1].cumsum(0)]), slopes

    def evaluate(self, x: Tensor, constrained: Constrained) -> tuple[Tensor, Tensor]:
        theta, slopes = constrained
        x_in = x.clamp(-self.bound, self.bound)
        t = (x_in + self.bound) / (2.0 * self.bound)
        basis = powers(t, self.degree) * powers(1.0 - t, self.degree).flip(0)
        basis = basis * column(self.binomials, x, x.ndim)
        slope = (slopes * basis).sum(0)
        # The first step of de Casteljau's algorithm takes theta to the basis of degree M - 1.
        y = (theta * basis).sum(0) + (x_in + self.bound) / self.degree * slope
        return y + slope * (x - x_in), slope.log()


class SumOfSquares(MonotoneMap):
    """y = c + min_slope x + (1 - min_slope) int_0^x mean_k p_k(u)^2 du with p_k(u) = 1 + sum_j s_kj a_kj u^j / j!.

    Its parameters are the a_kj and c. The scales s_kj = 1 / (1 + |j - k|) differ between the polynomials, so that
    gradients tell them apart. It grows like x^(2 degree + 1): in float32 it is finite for |x| <= 1e4 at degree 3.

    Arguments:
        polynomials: number of the p_k; two can represent any positive polynomial.
        degree: of the p_k.
        min_slope: in (0, 1).
    """

    def __init__(self, polynomials: int = 2, degree: int = 3, min_slope: float = 1e-3) -> None:
        self.size = polynomials * (degree + 1) + 1
        self.polynomials, self.degree, self.min_slope = polynomials, degree, min_slope
        j = np.arange(degree + 1)
        factorials = np.array([float(math.factorial(i)) for i in j])
        self.scales = 1.0 / (1.0 + abs(j - np.arange(polynomials)[:, None])) / factorials
        nodes, weights = np.polynomial.legendre.leggauss(degree + 1)  # exact for the degree of p_k^2
        nodes = np.append(0.5 * (nodes + 1.0), 1.0)  # the integral from 0 to 1, and the slope at 1
        self.vandermonde, self.weights = nodes[:, None] ** j, 0.5 * weights

    def constrain(self, parameters: Tensor) -> Constrained:
        """Coefficients (K, degree + 1, *) and c."""
        raw, c = torch.split(parameters, [self.size - 1, 1])
        coefficients = raw.reshape(self.polynomials, -1, *raw.shape[1:]) * column(self.scales, raw, raw.ndim - 1)
        one = column(np.arange(self.degree + 1) == 0, raw, raw.ndim - 1)
        return coefficients + one, c[0]

    def evaluate(self, x: Tensor, constrained: Constrained) -> tuple[Tensor, Tensor]:
        coefficients, c = constrained
        terms = (coefficients * powers(x, self.degree + 1)).flatten(2)
        values = (column(self.vandermonde, x, 0) @ terms).view(
            self.polynomials, -1, *x.shape
        )  # p_k(x v), at all the nodes v
        squares = values.square().mean(0)
        mean = (squares[:-1] * column(self.weights, x, x.ndim)).sum(0)
        slope = self.min_slope + (1.0 - self.min_slope) * squares[-1]
        return c + x * (self.min_slope + (1.0 - self.min_slope) * mean), slope.log()


class NeuralMonotone(MonotoneMap):
    """Deep dense sigmoidal flow: a small monotone network whose weights are the parameters, and min_slope x.

    In log space both tails are straight lines, so nothing saturates: any finite x is mapped and found again. For each
    layer the parameters are logits of U (hidden, inputs) and W (outputs, hidden), a and b (hidden). Fixed offsets tell
    the units apart: b is spread over [-1/2, 1/2], and where U and W are square they lean to the diagonal. So at 0 it
    is the identity only to 0.5 for each layer (each b is no further from 0), and by default 0.12.

    Arguments:
        hidden: sigmoids of a layer.
        layers: at least 1.
        max_log_scale: bound of a, as in `Affine`.
        min_slope: in (0, 1).
    """

    def __init__(self, hidden: int = 8, layers: int = 2, max_log_scale: float = 3.0, min_slope: float = 1e-3) -> None:
        self.hidden, self.layers = hidden, layers
        self.max_log_scale, self.min_slope = max_log_scale, min_slope
        widths = [1, *[hidden] * (layers - 1), 1]
        self.shapes = [(hidden, i, o) for i, o in itertools.pairwise(widths)]
        self.sizes = [[h * i, h * o, h, h] for h, i, o in self.shapes]
        self.size = sum(map(sum, self.sizes))

    def constrain(self, parameters: Tensor) -> Constrained:
        """log U, log W, a and b of each layer in turn."""
        h, ndim = self.hidden, parameters.ndim - 1
        lean = column(2.0 * torch.eye(h), parameters, ndim)
        spread = column(torch.linspace(-0.5, 0.5, h) if h > 1 else torch.zeros(1), parameters, ndim)
        result: list[Tensor] = []
        layers = torch.split(parameters, [sum(sizes) for sizes in self.sizes])
        for layer, sizes, (_, inputs, outputs) in zip(layers, self.sizes, self.shapes, strict=True):
            u, w, a, b = torch.split(layer, sizes)
            u, w = u.reshape(h, inputs, *u.shape[1:]), w.reshape(outputs, h, *w.shape[1:])
            u, w = (matrix + lean if matrix.shape[0] == matrix.shape[1] else matrix for matrix in (u, w))
            result += [u.log_softmax(1), w.log_softmax(1), soft_bound(a, self.max_log_scale), b + spread]
        return tuple(result)

    def evaluate(self, x: Tensor, constrained: Constrained) -> tuple[Tensor, Tensor]:
        y, log_slope = x[None], torch.zeros_like(x)[None]
        for layer in range(self.layers):
            log_u, log_w, a, b = constrained[4 * layer : 4 * layer + 4]
            z = a.exp() * (log_u.exp() * y).sum(1) + b
            log_z_slope = a + (log_u + log_slope).logsumexp(1)
            below = logsigmoid(z)
            above = below - z
            terms = torch.stack([below, above, below + above + log_z_slope])[:, None]
            log_f, log_1_f, log_density = (log_w + terms).logsumexp(2)
            y, log_slope = log_f - log_1_f, log_density - log_f - log_1_f
        return _with_line(self.min_slope, x, y[0], log_slope[0])
