r"""Masked networks: outputs for dimension i see the inputs before i (MADE, Germain et al. 2015, arXiv:1502.03509).

Every hidden unit has a degree m in 0 .. D-1 and sees the inputs x_0 .. x_{m-1}; it may be connected to
    input j if j < m,    a unit of degree m' of the layer before if m' <= m,
and the outputs for dimension i to units of degree m <= i. Residual blocks keep the degrees, so they may add.

Units are sorted by degree. Then what belongs to dimension i are slices of the weights, and the D steps by which x is
drawn compute each unit once: together they cost the arithmetic of one evaluation, not of D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class MaskedLinear(nn.Linear):
    """A linear map whose weight is kept where `mask` (out, in) is True."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * self.mask, self.bias)


class MaskedMLP(nn.Module):
    """A residual network for autoregressive parameters; zero until it is trained.

    Arguments:
        dims: D, numbers of an example.
        size: outputs for each of them.
        width: hidden units of a layer.
        depth: residual blocks.
        context_dim: size of the context, which every unit sees; 0 for none.
    """

    def __init__(self, dims: int, size: int, *, width: int = 64, depth: int = 1, context_dim: int = 0) -> None:
        super().__init__()
        self.dims, self.size = dims, size
        degree = torch.arange(width) * dims // width
        self.ends = torch.searchsorted(degree, torch.arange(dims), right=True).tolist()
        between = degree.unsqueeze(1) >= degree
        after = torch.arange(dims).unsqueeze(1) >= degree
        self.input = MaskedLinear(degree.unsqueeze(1) > torch.arange(dims))
        self.first = nn.ModuleList(MaskedLinear(between) for _ in range(depth))
        self.second = nn.ModuleList(MaskedLinear(between) for _ in range(depth))
        self.output = MaskedLinear(after.repeat(size, 1))
        self.context = nn.Linear(context_dim, width * (depth + 1), bias=False) if context_dim else None
        for last in (*self.second, self.output):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def _shifts(self, context: Tensor | None) -> list[Tensor | None]:
        """What the context adds to the first hidden layer and within each block, (N, width)."""
        if self.context is None:
            return [None] * (len(self.first) + 1)
        return list(self.context(context).chunk(len(self.first) + 1, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, D), context (N, context_dim) or None -> (N, size * D), the s-th output of dimension i at s D + i."""
        first, *shifts = self._shifts(context)
        h = self.input(x)
        h = h if first is None else h + first
        for one, two, shift in zip(self.first, self.second, shifts, strict=True):
            r = one(silu(h))
            h = h + two(silu(r if shift is None else r + shift))
        return self.output(silu(h))  # type: ignore[no-any-return]

    def sequential(self, choose: Callable[[int, Tensor], Tensor], n: int, context: Tensor | None = None) -> Tensor:
        """x (n, D), dimension after dimension.

        Arguments:
            choose: (i, outputs for dimension i (n, size)) -> x_i (n,).
        """
        first, *shifts = self._shifts(context)
        weight = self.input.weight
        x = weight.new_zeros(n, 0)
        layers = 2 * len(self.first) + 1
        active = [weight.new_zeros(n, 0) for _ in range(layers)]  # silu of each layer's known units
        start = 0
        for i in range(self.dims):
            end = self.ends[i]
            if end > start:
                h = linear(x, weight[start:end, :i], self.input.bias[start:end])
                h = h if first is None else h + first[:, start:end]
                active[0] = torch.cat([active[0], silu(h)], 1)
                for k, (one, two, shift) in enumerate(zip(self.first, self.second, shifts, strict=True)):
                    assert isinstance(one, MaskedLinear)
                    assert isinstance(two, MaskedLinear)
                    r = linear(active[2 * k], one.weight[start:end, :end], one.bias[start:end])
                    r = r if shift is None else r + shift[:, start:end]
                    active[2 * k + 1] = torch.cat([active[2 * k + 1], silu(r)], 1)
                    h = h + linear(active[2 * k + 1], two.weight[start:end, :end], two.bias[start:end])
                    active[2 * k + 2] = torch.cat([active[2 * k + 2], silu(h)], 1)
                start = end
            own = slice(i, None, self.dims)
            outputs = linear(active[-1], self.output.weight[own, :end], self.output.bias[own])
            x = torch.cat([x, choose(i, outputs).unsqueeze(1)], 1)
        return x
