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
from torch.nn.functional import silu


class MaskedLinear(nn.Linear):
    """A linear map of columns whose weight is kept where `mask` (out, in) is True."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        # Not bool: a product of two types converts one of them each time.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x (in, N), shift (out, N) in place of the bias -> (out, N)."""
        return torch.addmm(self.bias.unsqueeze(1) if shift is None else shift, self.weight * self.mask, x)


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

    def _shifts(self, context: Tensor | None) -> list[Tensor]:
        """What is added in the first hidden layer and within each block: (width, 1), or (width, N) given a context."""
        biases = [layer.bias.unsqueeze(1) for layer in (self.input, *self._first)]
        if self.context is None:
            return biases
        assert context is not None
        shifts = torch.addmm(torch.cat(biases), self.context.weight, context.T)
        return list(shifts.chunk(len(biases)))

    @property
    def _first(self) -> list[MaskedLinear]:
        return list(self.first)  # type: ignore[arg-type]

    @property
    def _second(self) -> list[MaskedLinear]:
        return list(self.second)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, D), context (N, context_dim) or None -> (N, size * D), the s-th output of dimension i at s D + i.

        The result is the transpose of a contiguous tensor: the order in which elementwise maps want their parameters.
        """
        first, *shifts = self._shifts(context)
        h = self.input(x.T, first)
        for one, two, shift in zip(self.first, self.second, shifts, strict=True):
            h = h + two(silu(one(silu(h), shift)))
        return self.output(silu(h)).T  # type: ignore[no-any-return]

    def sequential(self, choose: Callable[[int, Tensor], Tensor], n: int, context: Tensor | None = None) -> Tensor:
        """x (n, D), dimension after dimension.

        Arguments:
            choose: (i, outputs for dimension i (n, size)) -> x_i (n,). The outputs are the transpose of a contiguous
                tensor.
        """
        first, *shifts = self._shifts(context)
        weight = self.input.weight
        x = Rows(weight, self.dims, n)
        known = [Rows(weight, len(weight), n) for _ in range(2 * len(shifts) + 1)]  # silu of each layer's units
        start = 0
        for i in range(self.dims):
            end = self.ends[i]
            if end > start:
                own = slice(start, end)
                h = torch.addmm(first[own], weight[own, :i], x.rows)
                known[0].append(silu(h))
                for k, (one, two, shift) in enumerate(zip(self._first, self._second, shifts, strict=True)):
                    r = torch.addmm(shift[own], one.weight[own, :end], known[2 * k].rows)
                    known[2 * k + 1].append(silu(r))
                    h = h + torch.addmm(two.bias[own].unsqueeze(1), two.weight[own, :end], known[2 * k + 1].rows)
                    known[2 * k + 2].append(silu(h))
                start = end
            own = slice(i, None, self.dims)
            outputs = torch.addmm(self.output.bias[own].unsqueeze(1), self.output.weight[own, :end], known[-1].rows)
            x.append(choose(i, outputs.T).unsqueeze(0))
        return x.rows.T


class Rows:
    """A matrix that grows by rows: in place, or by copies where gradients need what it was.

    Arguments:
        like: of the dtype and device.
        most, n: its final size.
    """

    def __init__(self, like: Tensor, most: int, n: int) -> None:
        self._storage = like.new_empty(0 if torch.is_grad_enabled() else most, n)
        self.rows = self._storage[:0]

    def append(self, rows: Tensor) -> None:
        """Add rows (m, n)."""
        if torch.is_grad_enabled():
            self.rows = torch.cat([self.rows, rows])
        else:
            start, end = len(self.rows), len(self.rows) + len(rows)
            self._storage[start:end] = rows
            self.rows = self._storage[:end]
