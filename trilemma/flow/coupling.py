r"""Coupling: one part of x sets the parameters of an elementwise map of the other.

    z_a = x_a,   z_b = g(x_b; net(x_a, c)),   log |det dz/dx| = sum log g'
(Dinh et al. 2015, arXiv:1410.8516; 2017, arXiv:1605.08803). The net is free: it is never inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from trilemma.flow.splines import ElementwiseMap
from trilemma.flow.transforms import Transform


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
        self.net, self.elementwise = net, elementwise

    def _parameters_for(self, passed: Tensor, context: Tensor | None) -> Tensor:
        """(size, N, b, *)"""
        raw: Tensor = self.net(passed, context).to(passed.dtype)  # the net may run in half precision, the map does not
        raw = raw.reshape(raw.shape[0], self.elementwise.size, len(self.mapped), *raw.shape[2:])
        return raw.transpose(0, 1).contiguous()

    def _join(self, passed: Tensor, mapped: Tensor) -> Tensor:
        return torch.cat([passed, mapped], 1).index_select(1, self.inverse_order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        passed = x.index_select(1, self.passed)
        parameters = self._parameters_for(passed, context)
        z, log_slope = self.elementwise.forward(x.index_select(1, self.mapped), parameters)
        return self._join(passed, z), log_slope.flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        passed = z.index_select(1, self.passed)
        parameters = self._parameters_for(passed, context)
        x, log_slope = self.elementwise.inverse(z.index_select(1, self.mapped), parameters)
        return self._join(passed, x), log_slope.flatten(1).sum(1)


class ResidualConv(nn.Module):
    """A residual network of 3x3 convolutions that keeps the size of the picture; zero until it is trained.

    Pre-activation blocks that start as the identity and that the context is added to, as in `ResidualMLP`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, width: int, depth: int, context_dim: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(in_channels, width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.context = nn.Linear(context_dim, width * (depth + 1), bias=False) if context_dim else None
        self.output = nn.Conv2d(width, out_channels, 1)
        for last in (*self.second, self.output):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, in_channels, H, W), context (N, context_dim) or None -> (N, out_channels, H, W)."""
        h = self.input(x)
        parts = [None] * (len(self.first) + 1)
        if self.context is not None:
            parts = self.context(context)[..., None, None].chunk(len(parts), 1)
            h = h + parts[0]
        for first, second, part in zip(self.first, self.second, parts[1:], strict=True):
            r = first(silu(h))
            h = h + second(silu(r if part is None else r + part))
        return self.output(silu(h))  # type: ignore[no-any-return]
