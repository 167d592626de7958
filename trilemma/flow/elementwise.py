r"""Univariate monotone maps, each dimension by its own: z_i = g(x_i; parameters_i), ladj = sum_i log g'(x_i).

The parameters are given by something else (a network, a table, a condition) and stand along the *first* dimension,
(size, *), so that sums over bins or components run along contiguous memory: a softmax over a last dimension of eight is
several times slower. Every map is the identity, or close to it, where all its parameters are 0.
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


class Elementwise(Transform):
    """Each dimension by its own univariate map, whose parameters depend on the context alone.

    It starts as the identity.

    Arguments:
        shape: of one example.
        elementwise: the map.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, shape: tuple[int, ...], elementwise: ElementwiseMap, context_dim: int = 0) -> None:
        super().__init__()
        self.elementwise, self.numerical = elementwise, elementwise.numerical
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

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        z, log_slope = self.elementwise.forward(x, self._parameters_for(x, context))
        return z, sum_dims(log_slope)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        x, log_slope = self.elementwise.inverse(z, self._parameters_for(z, context))
        return x, sum_dims(log_slope)
