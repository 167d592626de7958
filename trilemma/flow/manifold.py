r"""Flows on manifolds: densities of points that lie on a surface in R^D.

For an embedding phi: R^d -> R^D with Jacobian J (D x d) and coordinates u = phi^-1(x), the density of x with respect to
the manifold's own volume is (Gemici, Rezende & Mohamed 2016, arXiv:1611.02304)
    log p(x) = log p_U(u) - 1/2 log det J^T J.
Here p_U is a flow in the coordinates: w = f(u), log p_U(u) = log b(w) + log |det df/du|, where b is N(0, I), or on
compact manifolds the uniform density written in coordinates, b(w) = sqrt(det J^T J)(w) / volume.

- `Graph`: x = (u, g(u)).
- `Torus`: d angles. Maps of circles are `Mobius` mixtures (Rezende et al. 2020, arXiv:2002.02428, section 2.1): for w
  in the open unit disc the Moebius transformation turns an angle into theta + 2 arg(1 - w e^{-i theta}), and a convex
  combination of such maps again increases and goes once around,
      f(theta) = theta + shift + 2 sum_k rho_k arg(1 - w_k e^{-i theta}),
      f'(theta) = sum_k rho_k (1 - |w_k|^2) / |e^{i theta} - w_k|^2.
- `Sphere`: S^n by the recursion there (section 2.2), x = (sqrt(1 - r^2) x', r) with x' on S^{n-1}. The volume is
  prod_{k=2..n} (1 - r_k^2)^{(k-2)/2} dr_k dtheta; on S^2 it is dr dtheta (Archimedes): a flow on a cylinder.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from trilemma.core.errors import DataError
from trilemma.flow.coupling import Coupling
from trilemma.flow.elementwise import Elementwise, ElementwiseMap
from trilemma.flow.planar import implicit_root
from trilemma.flow.splines import RationalQuadraticSpline, wrap
from trilemma.flow.transforms import Compose, Transform, standard_log_prob
from trilemma.nets.mlp import ResidualMLP

PI = math.pi


class Manifold(nn.Module):
    """A manifold of `dims` dimensions in R^ambient with one chart. This base class is the general case.

    A subclass defines `embed` and `coordinates`; `log_volume` and the base density have defaults.
    """

    def __init__(self, dims: int, ambient: int) -> None:
        super().__init__()
        self.dims, self.ambient = dims, ambient

    def embed(self, u: Tensor) -> Tensor:
        """u (N, dims) -> x (N, ambient)."""
        raise NotImplementedError

    def coordinates(self, x: Tensor) -> Tensor:
        """x (N, ambient) -> u (N, dims), the inverse of `embed` on the manifold."""
        raise NotImplementedError

    def log_volume(self, u: Tensor) -> Tensor:
        """1/2 log det J^T J at u (N, dims), (N,); here by automatic differentiation."""
        j = vmap(jacfwd(lambda v: self.embed(v.unsqueeze(0)).squeeze(0)))(u)
        return 0.5 * torch.linalg.slogdet(j.mT @ j).logabsdet  # type: ignore[no-any-return]

    def base_log_prob(self, w: Tensor) -> Tensor:
        """log b(w) of w (N, dims), (N,)."""
        return standard_log_prob(w)

    def base_sample(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """w (n, dims) ~ b, with the device and dtype of `like`."""
        return _normal(n, self.dims, generator, like)

    def check(self, x: Tensor) -> None:
        """Raise a `DataError` unless x (N, ambient) lies on the manifold, to half the digits of its numbers."""
        if x.ndim != 2 or x.shape[1] != self.ambient:
            raise DataError(f"{type(self).__name__}: points must be (N, {self.ambient}), got {tuple(x.shape)}")
        off = (self.embed(self.coordinates(x)) - x).abs().amax(1) / (1.0 + x.abs().amax(1))
        wrong = ~(off <= torch.finfo(x.dtype).eps ** 0.5)  # NaN is wrong too
        if bool(wrong.any()):
            raise DataError(
                f"{type(self).__name__}: {int(wrong.sum())} of {len(x)} points do not lie on the manifold, "
                f"such as point {int(wrong.int().argmax())}: project them onto it first"
            )


def _normal(n: int, dims: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(n, dims, generator=generator, device=like.device, dtype=like.dtype)


class Graph(Manifold):
    """The graph of a function: x = (u, g(u)).

    Arguments:
        dims: of u.
        function: g, u (N, dims) -> (N, codims).
        codims: number of values of g.
    """

    def __init__(self, dims: int, function: Callable[[Tensor], Tensor], codims: int = 1) -> None:
        super().__init__(dims, dims + codims)
        self.function = function

    def embed(self, u: Tensor) -> Tensor:
        return torch.cat([u, self.function(u)], 1)

    def coordinates(self, x: Tensor) -> Tensor:
        return x[:, : self.dims]


class Torus(Manifold):
    """d angles, each modulo 2 pi; densities are per unit of angle, and samples lie in [-pi, pi)."""

    def __init__(self, dims: int) -> None:
        super().__init__(dims, dims)

    def embed(self, u: Tensor) -> Tensor:
        return wrap(u)

    def coordinates(self, x: Tensor) -> Tensor:
        return wrap(x)

    def log_volume(self, u: Tensor) -> Tensor:
        return u.new_zeros(len(u))

    def base_log_prob(self, w: Tensor) -> Tensor:
        return w.new_full((len(w),), -self.dims * math.log(2.0 * PI))

    def base_sample(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        u = torch.rand(n, self.dims, generator=generator, device=like.device, dtype=like.dtype)
        return (2.0 * u - 1.0) * PI

    def check(self, x: Tensor) -> None:
        super().check(wrap(x))


class Sphere(Manifold):
    """S^n in R^{n+1}: coordinates (theta, r_2, ..., r_n), an angle in [-pi, pi) and heights in [-1, 1]."""

    def __init__(self, dims: int) -> None:
        super().__init__(dims, dims + 1)
        half = 0.5 * (dims + 1)
        self.log_total = math.log(2.0) + half * math.log(PI) - math.lgamma(half)

    def embed(self, u: Tensor) -> Tensor:
        x = torch.stack([u[:, 0].cos(), u[:, 0].sin()], 1)
        for k in range(1, self.dims):
            r = u[:, k : k + 1]
            x = torch.cat([((1.0 - r) * (1.0 + r)).clamp_min(0.0).sqrt() * x, r], 1)
        return x

    def coordinates(self, x: Tensor) -> Tensor:
        heights = []
        for _ in range(self.dims - 1):
            r = x[:, -1:].clamp(-1.0, 1.0)  # rounding can leave the interval; `check` refuses what is more
            x = x[:, :-1]
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            # At a pole every x' is as good as any other.
            x = torch.where(norm > 0, x / norm.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
            heights.append(r)
        return torch.cat([torch.atan2(x[:, 1:], x[:, :1]), *reversed(heights)], 1)

    def log_volume(self, u: Tensor) -> Tensor:
        powers = 0.5 * torch.arange(self.dims - 1, dtype=u.dtype, device=u.device)
        # At a pole the volume vanishes, there and in the base, and the two cancel if neither is infinite.
        squares = ((1.0 - u[:, 1:]) * (1.0 + u[:, 1:])).clamp_min(torch.finfo(u.dtype).tiny)
        return torch.xlogy(powers, squares).sum(1)

    def base_log_prob(self, w: Tensor) -> Tensor:
        return self.log_volume(w) - self.log_total

    def base_sample(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        x = _normal(n, self.ambient, generator, like)
        return self.coordinates(x / torch.linalg.vector_norm(x, dim=1, keepdim=True))


class ManifoldFlow(nn.Module):
    """A density on a manifold: its base, moved by a transform of the coordinates.

    Arguments:
        manifold: where the points lie.
        transform: u (N, dims) -> w (N, dims), onto the same range of coordinates.
    """

    def __init__(self, manifold: Manifold, transform: Transform) -> None:
        super().__init__()
        self.manifold, self.transform = manifold, transform

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats per unit of the manifold's volume, for x (N, ambient); (N,).

        Raises:
            DataError: a point does not lie on the manifold.
        """
        self.manifold.check(x)
        u = self.manifold.coordinates(x)
        w, ladj = self.transform(u, context)
        return self.manifold.base_log_prob(w) + ladj - self.manifold.log_volume(u)  # type: ignore[no-any-return]

    def sample(self, n: int, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Points (n, ambient), differentiable with respect to the parameters."""
        like = next(self.parameters(), torch.empty(0))
        w = self.manifold.base_sample(n, generator, like)
        return self.manifold.embed(self.transform.inverse(w, context)[0])


class Mobius(ElementwiseMap):
    """Mixtures of K Moebius transformations of an angle, onto [-pi, pi).

    Parameters: K logits of the weights, K times 2 numbers v_k, w_k = v_k / sqrt(1 + |v_k|^2), and a shift. Where they
    are 0 the w_k form a ring of radius 1/2, so that components can become different, and the map is the identity up
    to 2^(1-K) / K.

    Arguments:
        components: K >= 1.
    """

    numerical = True

    def __init__(self, components: int = 8) -> None:
        assert components >= 1
        self.size, self.components = 3 * components + 1, components
        angles = [2.0 * PI * k / components for k in range(components)]
        radius = 3.0**-0.5 if components > 1 else 0.0  # v of |w| = 1/2
        self.ring = ([radius * math.cos(a) for a in angles], [radius * math.sin(a) for a in angles])

    def _function(self, parameters: Tensor) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
        """theta -> f(theta) - shift and f'(theta), and the shift."""
        k = self.components
        logits, a, b, shift = torch.split(parameters, [k, k, k, 1])
        weights = logits.softmax(0)
        column = (k, *[1] * (parameters.ndim - 1))
        a = a + parameters.new_tensor(self.ring[0]).view(column)
        b = b + parameters.new_tensor(self.ring[1]).view(column)
        inverse_square = 1.0 / (1.0 + a.square() + b.square())  # 1 - |w|^2
        a, b = a * inverse_square.sqrt(), b * inverse_square.sqrt()

        def function(theta: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = theta.cos(), theta.sin()
            real, imaginary = 1.0 - (a * cos + b * sin), a * sin - b * cos  # of 1 - w e^{-i theta}
            turned = theta + 2.0 * (weights * torch.atan2(imaginary, real)).sum(0)
            return turned, (weights * inverse_square / (real.square() + imaginary.square())).sum(0)

        return function, shift.squeeze(0)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        function, shift = self._function(parameters)
        y, slope = function(x)
        return wrap(y + shift), slope.log()

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        function, shift = self._function(parameters)
        target = y - shift
        x = implicit_root(function, target, target - PI, target + PI)  # every |arg| < pi / 2
        return wrap(x), -function(x)[1].log()


class OfAngles(nn.Module):
    """A net that sees angles as their cosines and sines, so that it is continuous on the circle.

    Arguments:
        net: (features (N, dims + angles), context) -> (N, out).
        angles: the first so many columns of x are angles, the rest is passed as it is.
    """

    def __init__(self, net: nn.Module, angles: int) -> None:
        super().__init__()
        self.net, self.angles = net, angles

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        theta, rest = x[:, : self.angles], x[:, self.angles :]
        return self.net(torch.cat([theta.cos(), theta.sin(), rest], 1), context)  # type: ignore[no-any-return]


def torus_flow(
    dims: int, circle: ElementwiseMap | None = None, *, layers: int = 4, width: int = 32, context_dim: int = 0
) -> ManifoldFlow:
    """Couplings of maps of the circle, `Mobius()` by default, on `dims` angles; it starts near the uniform density."""
    circle = circle or Mobius()
    if dims == 1:  # nothing to couple with
        return ManifoldFlow(Torus(1), Elementwise((1,), circle, context_dim))
    parts = []
    for layer in range(layers):
        mask = torch.arange(dims) % 2 == layer % 2
        passed = int(mask.sum())
        parts.append(Coupling(mask, _net(passed, 0, (dims - passed) * circle.size, width, context_dim), circle))
    return ManifoldFlow(Torus(dims), Compose(parts))


def sphere_flow(
    dims: int,
    circle: ElementwiseMap | None = None,
    interval: ElementwiseMap | None = None,
    *,
    layers: int = 4,
    width: int = 32,
    context_dim: int = 0,
) -> ManifoldFlow:
    """On S^dims, dims >= 2: in turn maps of the heights given the angle, and of the angle given the heights.

    Arguments:
        circle: by default `Mobius()`.
        interval: onto [-1, 1], by default a rational-quadratic spline.
    """
    assert dims >= 2, "the circle is a torus_flow(1)"
    circle, interval = circle or Mobius(), interval or RationalQuadraticSpline(bound=1.0)
    angle = torch.arange(dims) == 0
    parts = []
    for layer in range(layers):
        if layer % 2 == 0:
            parts.append(Coupling(angle, _net(1, 0, (dims - 1) * interval.size, width, context_dim), interval))
        else:
            parts.append(Coupling(~angle, _net(0, dims - 1, circle.size, width, context_dim), circle))
    return ManifoldFlow(Sphere(dims), Compose(parts))


def _net(angles: int, others: int, outputs: int, width: int, context_dim: int) -> OfAngles:
    inner = ResidualMLP(2 * angles + others, outputs, width=width, depth=1, context_dim=context_dim, zero_init=True)
    return OfAngles(inner, angles)
