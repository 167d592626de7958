r"""Low-rank flows of vectors x (N, D): the identity plus a map through few dimensions, ladj in O(D).

- `Planar`, z = x + u tanh(w.x + b), and `Radial`, z = x + beta (x - x0) / (alpha + |x - x0|) (Rezende & Mohamed 2015,
  arXiv:1505.05770, with the constraints of its appendix);
- `Sylvester`, z = x + Q R tanh(R~ Q^T x + b) with D x M orthonormal columns Q, a product of reflections, and upper
  triangular R, R~ (van den Berg et al. 2018, arXiv:1803.05649).

All are invertible whatever their raw parameters. With p = -1 + softplus(.) > -1,
    planar:     w.u = p                       det = 1 + p tanh'(a),               a = w.x + b
    radial:     beta = alpha p                det = (1 + beta h)^(D-1) (1 + beta h + beta h' r),   h = 1 / (alpha + r)
    Sylvester:  r_ii r~_ii = p_i, r~_ii > 0   det = prod_i (1 + p_i tanh'(a_i)).
(tanh is odd, so a positive r~_ii is no loss.) Inverses: the radial one is the root of a quadratic equation. With
a = w.x + b the planar one solves the scalar a + p tanh(a) = w.z + b; Sylvester's solves the same M times, from the last
dimension of the triangle to the first.

Every layer starts as the identity; its parameters may depend on a context, as those of an amortised posterior do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from trilemma.core.noise import Noise
from trilemma.flow.linear import product_of_reflections
from trilemma.flow.monotone import ONE, solve
from trilemma.flow.transforms import Result, Transform


class Amortized(nn.Module):
    """Tensors that are parameters plus a linear map of the context, which starts as 0.

    Arguments:
        initial: one tensor (*) for each.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, *initial: Tensor, context_dim: int = 0) -> None:
        super().__init__()
        self.shapes = [tuple(t.shape) for t in initial]
        self.shared = nn.Parameter(torch.cat([t.flatten() for t in initial]))
        self.context = nn.Linear(context_dim, len(self.shared), bias=False) if context_dim else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def forward(self, context: Tensor | None) -> list[Tensor]:
        """context (N, context_dim) or None -> tensors (N, *), or (1, *) where nothing depends on a context."""
        flat = self.shared.unsqueeze(0)
        if self.context is not None:
            flat = flat + self.context(context)
        parts = torch.split(flat, [math.prod(s) for s in self.shapes], 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def invert_tanh_map(y: Tensor, p: Tensor) -> Tensor:
    """a with a + p tanh(a) = y, for y (*) and p > -1 that can be expanded to (*)."""
    p = p.expand_as(y)

    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        t = a.tanh()
        return a + p * t, 1.0 + p * (1.0 - t.square())

    return implicit_root(function, y, y - p.abs(), y + p.abs())


def implicit_root(function: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x (*) with function(x)[0] = y, as `solve` finds it, with first derivatives to y and to what `function` holds."""
    with torch.no_grad():
        x = solve(function, y, low, high)
    value, slope = function(x)
    error = y - value
    # The value of a Newton step would be noise over a slope that may be next to nothing: only its derivative is taken.
    return x + (error - error.detach()) / slope.detach()


class Planar(Transform):
    """z = x + u tanh(w.x + b) for x (N, D).

    Arguments:
        dims: D.
        context_dim: size of the context, 0 for none.
    """

    numerical = True

    def __init__(self, dims: int, context_dim: int = 0) -> None:
        super().__init__()
        w = torch.randn(dims) / dims**0.5
        self.parameters_of_map = Amortized(w, torch.zeros(dims), torch.zeros(1), context_dim=context_dim)

    def _parameters_for(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w and u (n, D), b and p = w.u (n,)"""
        w, u, b = self.parameters_of_map(context)
        raw = (w * u).sum(1)
        p = softplus(raw + ONE) - 1.0
        return w, u + ((p - raw) / w.square().sum(1)).unsqueeze(1) * w, b.squeeze(1), p

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        w, u, b, p = self._parameters_for(context)
        t = ((w * x).sum(1) + b).tanh()
        return x + u * t.unsqueeze(1), torch.log1p(p * (1.0 - t.square()))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        w, u, b, p = self._parameters_for(context)
        t = invert_tanh_map((w * z).sum(1) + b, p).tanh()
        return z - u * t.unsqueeze(1), -torch.log1p(p * (1.0 - t.square()))


def expand(x: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> Result:
    """The radial expansion z = x + beta (x - center) / (alpha + r), r = |x - center|, and its ladj.

    Arguments:
        x: (N, D).
        center: (n, D), n = 1 or N.
        alpha, beta: (n,), alpha > 0, beta > -alpha.
    """
    difference = x - center
    r = torch.linalg.vector_norm(difference, dim=1)
    stretch = beta / (alpha + r)
    ladj = (x.shape[1] - 1) * torch.log1p(stretch) + torch.log1p(stretch * alpha / (alpha + r))
    return x + stretch.unsqueeze(1) * difference, ladj


def contract(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> Result:
    """The inverse of `expand` and its ladj."""
    difference = z - center
    s = torch.linalg.vector_norm(difference, dim=1)
    # r^2 + (alpha + beta - s) r - alpha s = 0 has one root r >= 0; of its two forms one does not cancel.
    b = alpha + beta - s
    root = (b.square() + 4.0 * alpha * s).sqrt()
    r = torch.where(b > 0, 2.0 * alpha * s / (root + b.abs()), 0.5 * (root - b))
    stretch = beta / (alpha + r)
    ladj = (z.shape[1] - 1) * torch.log1p(stretch) + torch.log1p(stretch * alpha / (alpha + r))
    return center + difference / (1.0 + stretch).unsqueeze(1), -ladj


class Radial(Transform):
    """z = x + beta (x - x0) / (alpha + |x - x0|) for x (N, D).

    Arguments:
        dims: D.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, dims: int, context_dim: int = 0) -> None:
        super().__init__()
        self.parameters_of_map = Amortized(
            torch.randn(dims), torch.full((1,), ONE), torch.zeros(1), context_dim=context_dim
        )

    def _parameters_for(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        center, raw_alpha, raw_beta = self.parameters_of_map(context)
        alpha = softplus(raw_alpha.squeeze(1))
        return center, alpha, alpha * (softplus(raw_beta.squeeze(1) + ONE) - 1.0)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        return expand(x, *self._parameters_for(context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return contract(z, *self._parameters_for(context))


class Sylvester(Transform):
    """z = x + Q R tanh(R~ Q^T x + b) for x (N, D).

    Arguments:
        dims: D.
        rank: M in 1..D, the number of columns of Q.
        reflections: how many have the product Q.
        context_dim: size of the context, 0 for none.
    """

    numerical = True

    def __init__(self, dims: int, rank: int, reflections: int = 4, context_dim: int = 0) -> None:
        super().__init__()
        assert 1 <= rank <= dims
        self.rank = rank
        triangles = torch.zeros(2, rank, rank)
        self.parameters_of_map = Amortized(
            torch.randn(reflections, dims), triangles, torch.zeros(rank), context_dim=context_dim
        )

    def _parameters_for(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q (n, D, M), R and R~ (n, M, M), b and p (n, M)"""
        vectors, triangles, b = self.parameters_of_map(context)
        raw, raw_inner = triangles.unbind(1)
        p = softplus(raw.diagonal(dim1=1, dim2=2) + ONE) - 1.0
        inner_diagonal = raw_inner.diagonal(dim1=1, dim2=2).exp()
        outer = raw.triu(1) + torch.diag_embed(p / inner_diagonal)
        inner = raw_inner.triu(1) + torch.diag_embed(inner_diagonal)
        return product_of_reflections(vectors)[:, :, : self.rank], outer, inner, b, p

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        q, outer, inner, b, p = self._parameters_for(context)
        # For n = 1 the products of the small matrices leave two products with x.
        t = ((x.unsqueeze(1) @ (inner @ q.mT).mT).squeeze(1) + b).tanh()
        z = x + (t.unsqueeze(1) @ (q @ outer).mT).squeeze(1)
        return z, torch.log1p(p * (1.0 - t.square())).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        q, outer, inner, b, p = self._parameters_for(context)
        projected = (z.unsqueeze(1) @ q).squeeze(1)
        t = projected.new_zeros(z.shape[0], 0)
        v = t  # Q^T x; both grow from their last dimension to the first
        for i in reversed(range(self.rank)):
            rest = projected[:, i] - (outer[:, i, i + 1 :] * t).sum(1)
            shift = (inner[:, i, i + 1 :] * v).sum(1) + b[:, i]
            a = invert_tanh_map(inner[:, i, i] * rest + shift, p[:, i])
            v = torch.cat([((a - shift) / inner[:, i, i]).unsqueeze(1), v], 1)
            t = torch.cat([a.tanh().unsqueeze(1), t], 1)
        x = z - (t.unsqueeze(1) @ (q @ outer).mT).squeeze(1)
        return x, -torch.log1p(p * (1.0 - t.square())).sum(1)
