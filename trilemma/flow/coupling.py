r"""Coupling: one part of x sets the parameters of an elementwise map of the other.

    z_a = x_a,   z_b = g(x_b; net(x_a, c)),   log |det dz/dx| = sum log g'
(Dinh et al. 2015, arXiv:1410.8516; 2017, arXiv:1605.08803). The net is free: it is never inverted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.flow.elementwise import ElementwiseMap
from trilemma.flow.transforms import Result, Transform, sum_dims
from trilemma.nets.mlp import ResidualMLP


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
        # Where either side is one run of channels, as halves are, it is a view; any other mask takes a copy.
        self.runs = int(mask.diff().count_nonzero()) == 1
        self.passed_first = bool(mask[0]) or not self.runs
        self.net, self.elementwise, self.numerical = net, elementwise, elementwise.numerical

    def _split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """x_a and x_b, channels along `dim`."""
        if not self.runs:
            x = x.index_select(dim, torch.cat([self.passed, self.mapped]))
        sizes = [len(self.passed), len(self.mapped)]
        if self.passed_first:
            passed, mapped = torch.split(x, sizes, dim)
        else:
            mapped, passed = torch.split(x, sizes[::-1], dim)
        return passed, mapped

    def _join(self, passed: Tensor, mapped: Tensor, dim: int) -> Tensor:
        x = torch.cat([passed, mapped] if self.passed_first else [mapped, passed], dim)
        return x if self.runs else x.index_select(dim, self.inverse_order)

    def _columns(self, passed: Tensor, context: Tensor | None) -> Tensor:
        """Parameters (size, b, N) for columns x_a (a, N)."""
        if isinstance(self.net, ResidualMLP):
            raw = self.net.transposed(passed.T, context)
        else:
            raw = self.net(passed.T, context).T
        return raw.to(passed.dtype).reshape(self.elementwise.size, len(self.mapped), passed.shape[1])

    def _pictures(self, passed: Tensor, context: Tensor | None) -> Tensor:
        """Parameters (size, N, b, *) for x_a (N, a, *)."""
        raw: Tensor = self.net(passed, context).to(passed.dtype)  # the net may run in half precision, the map does not
        raw = raw.reshape(raw.shape[0], self.elementwise.size, len(self.mapped), *raw.shape[2:])
        return raw.transpose(0, 1).contiguous()

    def _map(self, g: Callable[[Tensor, Tensor], Result], x: Tensor, context: Tensor | None) -> Result:
        if x.ndim == 2:  # examples last: there the network's last product puts them, and linear layers leave them
            passed, mapped = self._split(x.T, 0)
            y, log_slope = g(mapped.contiguous(), self._columns(passed, context))
            return self._join(passed, y, 0).T, log_slope.sum(0)
        passed, mapped = self._split(x, 1)
        y, log_slope = g(mapped, self._pictures(passed, context))
        return self._join(passed, y, 1), sum_dims(log_slope)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        return self._map(self.elementwise.forward, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return self._map(self.elementwise.inverse, z, context)
