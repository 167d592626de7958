r"""Coupling: one part of x sets the parameters of an elementwise map of the other.

    z_a = x_a,   z_b = g(x_b; net(x_a, c)),   log |det dz/dx| = sum log g'
(Dinh et al. 2015, arXiv:1410.8516; 2017, arXiv:1605.08803). The net is free: it is never inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.flow.elementwise import ElementwiseMap
from trilemma.flow.transforms import Result, Transform, sum_dims


class Coupling(Transform):
    """Coupling over the channels (dimension 1) of x (N, C, *).

    Arguments:
        mask: (C,) bool; True for the a channels that pass and that the net sees, False for the b that are mapped.
        net: (x_a (N, a, *), context) -> (N, elementwise.size * b, *). Where it gives 0 the map is the identity.
        elementwise: the map g.
    """

    passed: Tensor
    mapped: Tensor
    inverse_order: Tensor

    def __init__(self, mask: Tensor, net: nn.Module, elementwise: ElementwiseMap) -> None:
        super().__init__()
        assert 0 < int(mask.sum()) < len(mask), "a coupling needs channels on both sides"
        passed, mapped = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
        self.register_buffer("passed", passed)
        self.register_buffer("mapped", mapped)
        self.register_buffer("inverse_order", torch.cat([passed, mapped]).argsort())
        self.net, self.elementwise, self.numerical = net, elementwise, elementwise.numerical

    def _parameters_for(self, passed: Tensor, context: Tensor | None) -> Tensor:
        """(size, N, b, *)"""
        raw: Tensor = self.net(passed, context).to(passed.dtype)  # the net may run in half precision, the map does not
        raw = raw.reshape(raw.shape[0], self.elementwise.size, len(self.mapped), *raw.shape[2:])
        return raw.transpose(0, 1).contiguous()

    def _join(self, passed: Tensor, mapped: Tensor) -> Tensor:
        return torch.cat([passed, mapped], 1).index_select(1, self.inverse_order)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        passed = x.index_select(1, self.passed)
        parameters = self._parameters_for(passed, context)
        z, log_slope = self.elementwise.forward(x.index_select(1, self.mapped), parameters)
        return self._join(passed, z), sum_dims(log_slope)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        passed = z.index_select(1, self.passed)
        parameters = self._parameters_for(passed, context)
        x, log_slope = self.elementwise.inverse(z.index_select(1, self.mapped), parameters)
        return self._join(passed, x), sum_dims(log_slope)
