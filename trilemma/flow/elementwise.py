r"""Univariate monotone maps, each dimension by its own: z_i = g(x_i; parameters_i), ladj = sum_i log g'(x_i).

The parameters are given by something else (a network, a table, a condition) and stand along the *first* dimension,
(size, *), so that sums over bins or components run along contiguous memory: a softmax over a last dimension of eight is
several times slower. Every map is the identity, or close to it, where all its parameters are 0.

Here are the simplest: y = x + t (NICE, Dinh et al. 2015, arXiv:1410.8516) and y = x exp(s) + t (RealNVP, Dinh et al.
2017, arXiv:1605.08803; MAF, Papamakarios et al. 2017, arXiv:1705.07057; Glow, Kingma & Dhariwal 2018,
arXiv:1807.03039). See `splines` and `monotone` for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.flow.transforms import Result, Transform, sum_dims


class ElementwiseMap:
    """A family of strictly increasing maps R -> R, the identity where all parameters are 0.

    Attributes:
        size: number of parameters of one map.
        numerical: `inverse` iterates, so it is exact only to its tolerance.
    """

    size: int
    numerical: bool = False

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x (*), parameters (size, *) -> y (*) and log dy/dx (*)."""
        raise NotImplementedError

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """y (*), parameters (size, *) -> x (*) and log dx/dy (*)."""
        raise NotImplementedError


def soft_bound(raw: Tensor, bound: float) -> Tensor:
    """bound tanh(raw / bound): between -bound and bound, and raw itself near 0."""
    return bound * torch.tanh(raw / bound)


class Additive(ElementwiseMap):
    """y = x + t: its slope is 1, so it moves mass but never gathers it."""

    size = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters[0], torch.zeros_like(x)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return y - parameters[0], torch.zeros_like(y)


class Affine(ElementwiseMap):
    """y = x exp(s) + t with s = c tanh(s_raw / c).

    The bound keeps every slope between exp(-c) and exp(c). Without it one large output of a network overflows the
    exponential, and the inverse of a long chain loses all its digits.

    Arguments:
        max_log_scale: c > 0.
    """

    size = 2

    def __init__(self, max_log_scale: float = 5.0) -> None:
        assert max_log_scale > 0.0
        self.max_log_scale = max_log_scale

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = soft_bound(parameters[0], self.max_log_scale)
        return torch.addcmul(parameters[1], x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = soft_bound(parameters[0], self.max_log_scale)
        return (y - parameters[1]) * (-log_scale).exp(), -log_scale


class Mapped(Transform):
    """z_i = g(x_i; parameters_i), with parameters that depend on the context alone: a subclass says how.

    Arguments:
        elementwise: the map g.
    """

    def __init__(self, elementwise: ElementwiseMap) -> None:
        super().__init__()
        self.elementwise, self.numerical = elementwise, elementwise.numerical

    def _parameters_for(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(size, N, *shape)"""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        z, log_slope = self.elementwise.forward(x, self._parameters_for(x, context))
        return z, sum_dims(log_slope)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        x, log_slope = self.elementwise.inverse(z, self._parameters_for(z, context))
        return x, sum_dims(log_slope)


class Elementwise(Mapped):
    """Each dimension by its own learned map, which the context changes linearly in its parameters.

    It starts as the map at parameters 0: the identity, or close to it.

    Arguments:
        shape: of one example.
        elementwise: the map.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, shape: tuple[int, ...], elementwise: ElementwiseMap, context_dim: int = 0) -> None:
        super().__init__(elementwise)
        self.parameters_of_map = nn.Parameter(torch.zeros(elementwise.size, 1, *shape))
        self.context = nn.Linear(context_dim, self.parameters_of_map.numel(), bias=False) if context_dim else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def _parameters_for(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(size, N, *shape)"""
        shared = self.parameters_of_map.expand(-1, *x.shape)
        if self.context is None:
            return shared
        own: Tensor = self.context(context)
        return shared + own.view(x.shape[0], self.elementwise.size, *x.shape[1:]).transpose(0, 1)
