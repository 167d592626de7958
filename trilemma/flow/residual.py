r"""Invertible residual networks: z = x + g(x, c), where g contracts in x.

With a Lipschitz constant L < 1 of g, x <- z - g(x) converges to the one x of each z by Banach's theorem, and
    log |det dz/dx| = tr log(I + J) = sum_{k >= 1} (-1)^{k+1} tr(J^k) / k,   J = dg/dx
(Behrmann et al. 2019, arXiv:1811.00995). A trace is estimated without bias by v^T J^k v, where v has independent signs
(Hutchinson 1989), at the cost of k products v^T J from the layers' transposes. The sum is
- exact: D products give J itself, and its determinant;
- truncated after n terms. What is left out is at most D (-log(1 - L) - sum_{k <= n} L^k / k) in size: a bias;
- Russian roulette (Chen et al. 2019, arXiv:1906.02735): a random number K of terms, each divided by P(K >= k), which
  has the expectation of the whole sum.

Gradient of the series. d tr log(I + J) = tr((I + J)^{-1} dJ) = E sum_{k >= 0} (-1)^k v^T J^k (dJ) v, so with
w = sum_k (-1)^k v^T J^k / P(K > k), summed up without a graph, the gradient of w^T J v at fixed w is an unbiased
estimate of it (ibid., section 3.2). What is kept for it is the graph of one product, whatever the number of terms is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trilemma.core.errors import DivergedError
from trilemma.core.noise import Noise
from trilemma.flow.transforms import Result, Transform, sum_dims
from trilemma.nets.lipschitz import LipschitzNet, Pullback

Series = Literal["exact", "truncated", "roulette"]

TRAINING_TERMS = 2
"""Terms that the roulette always takes in training; two more are expected."""


class Residual(Transform):
    """z = x + g(x, c).

    Arguments:
        net: g.
        series: of ladj: "exact" (D products per example), "truncated" or "roulette".
        terms: how many the truncated series has; how many the roulette always takes in evaluation. Roulettes are played
            for each example in evaluation, so that its result does not depend on its batch. In training one is played
            for the batch, and takes `TRAINING_TERMS` at least.
    """

    numerical = True

    def __init__(self, net: LipschitzNet, series: Series = "exact", terms: int = 20) -> None:
        super().__init__()
        self.net, self.series, self.terms = net, series, terms
        if series != "exact":
            self.kind, self.stochastic = "estimate", True

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        with torch.autocast(x.device.type, enabled=False):
            image, pullback = self.net.bind(context).linearize(x)
            if self.series == "exact":
                return x + image, log_determinant(pullback, x)
            assert noise is not None, "the series draws from noise"
            probe = 2.0 * noise.bernoulli(torch.full_like(x, 0.5)) - 1.0
            return x + image, log_determinant_series(pullback, probe, self._weights(noise, x))

    def _weights(self, noise: Noise, x: Tensor) -> Tensor:
        """(K, N): 1/P(K >= k), 0 after the last term of an example."""
        if self.series == "truncated":
            return x.new_ones(self.terms, x.shape[0])
        always, u = self.terms, noise.uniform(dtype=torch.float64)
        if self.training:
            always, u = TRAINING_TERMS, u[:1]
        more = 1 + (torch.log1p(-u) / math.log(0.5)).floor()  # P(more >= j) = 2^(1 - j), j = 1, 2, ...
        k = torch.arange(1, always + 1 + int(more.max()), device=x.device).unsqueeze(1)
        inverse_probability = 2.0 ** (k - always - 1).clamp(min=0)
        return torch.where(k <= always + more, inverse_probability, 0.0).to(x.dtype).expand(-1, x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        factor = self.net.coefficient
        with torch.autocast(z.device.type, enabled=False):
            g = self.net.bind(context)
            with torch.no_grad():
                x = fixed_point(lambda x: z - g(x), z, factor)
            if torch.is_grad_enabled():
                image, pullback = g.linearize(x)
                # (I + J^T)^{-1} applied to a gradient is a fixed point too.
                x = implicit(x, z - (x + image), lambda v: fixed_point(lambda u: v - pullback(u), v, factor))
            if self.stochastic:
                return x, x.new_full((x.shape[0],), math.nan)
            return x, -log_determinant(g.linearize(x)[1], x)

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        return x + self.net(x, context)  # type: ignore[no-any-return]


def log_determinant(pullback: Pullback, x: Tensor) -> Tensor:
    """log |det(I + J)| (N,) from the D rows of J at x (N, *)."""
    n, d = x.shape[0], x[0].numel()
    basis = torch.eye(d, dtype=x.dtype, device=x.device)
    rows = pullback(basis.repeat_interleave(n, 0).view(d * n, *x.shape[1:])).view(d, n, d)
    return torch.linalg.slogdet(rows.transpose(0, 1) + basis).logabsdet  # type: ignore[no-any-return]


def log_determinant_series(pullback: Pullback, probe: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k (-1)^{k+1} v^T J^k v / k (N,), whose gradient is the estimate of the module's docstring.

    Arguments:
        pullback: v -> v^T J.
        probe: v (N, *).
        weights: (K, N) of the terms; that of term k also stands before v^T J^{k-1} dJ v in the gradient.
    """
    power, total, neumann = probe, probe.new_zeros(probe.shape[0]), torch.zeros_like(probe)
    signs = weights.clone()
    signs[1::2] *= -1.0
    with torch.no_grad():
        for k, weight in enumerate(signs, 1):
            neumann = neumann + weight.view(-1, *[1] * (probe.ndim - 1)) * power
            power = pullback(power)
            total = total + weight / k * sum_dims(power * probe)
    if not torch.is_grad_enabled():
        return total
    surrogate = sum_dims(pullback(neumann) * probe)
    return total + (surrogate - surrogate.detach())


def fixed_point(step: Callable[[Tensor], Tensor], start: Tensor, factor: float) -> Tensor:
    """x = step(x) of a contraction, to the precision of its numbers; each example (N, *) stops by itself.

    In exact arithmetic a step moves x by at most `factor` times what the one before did. Where it does not, only
    rounding is left, or the map is no contraction.

    Arguments:
        step: contracts each example.
        start: (N, *).
        factor: bound of the contraction, below 1.

    Raises:
        DivergedError: if the steps stop to contract while they are large.
    """
    x, best = start, start.new_full((start.shape[0],), math.inf)
    active = torch.ones_like(best, dtype=torch.bool)
    size = torch.linalg.vector_norm(start.flatten(1), dim=1)
    first: Tensor | None = None
    while active.any():
        new = step(x)
        moved = torch.linalg.vector_norm((new - x).flatten(1), dim=1)
        first = moved if first is None else first
        active = active & (moved <= 0.5 * (1.0 + factor) * best) & (moved > 0.0)
        stalled = ~active & (moved < best)
        best = torch.where(active | stalled, moved, best)
        x = torch.where(active.view(-1, *[1] * (x.ndim - 1)), new, x)
    assert first is not None
    if not (best <= torch.finfo(x.dtype).eps ** 0.5 * (size + first)).all():
        raise DivergedError(
            "the inverse of a residual network does not converge; train it with a smaller coefficient or learning rate"
        )
    return x


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, defect: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.solve(gradient), None


def implicit(x: Tensor, defect: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """x, a root of z - f(x), with the gradient that the implicit function theorem gives it.

    d x = (df/dx)^{-1} (dz - df at fixed x), and `defect` carries the bracket.

    Arguments:
        x: (N, *) the root, without a graph.
        defect: z - f(x), with a graph in all but x.
        solve: gradient (N, *) -> (df/dx)^{-T} gradient.
    """
    return _Implicit.apply(x, defect, solve)  # type: ignore[no-any-return,no-untyped-call]
