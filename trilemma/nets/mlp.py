r"""A residual network for vectors.

With pre-activation residual blocks (He et al. 2016, arXiv:1603.05027) it computes
    h_0     = W [x, c] + b
    h_{k+1} = h_k + W2_k silu(W1_k silu(h_k) + b1_k + V_k c) + b2_k
    f(x, c) = W_out silu(h_depth) + b_out
Each block starts as the identity (W2_k = 0), so depth costs no trainability. Nothing mixes examples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class ResidualBlock(nn.Module):
    """h (N, width), context (N, context_dim) or None -> h + residual (N, width)."""

    def __init__(self, width: int, context_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        r = self.first(silu(h))
        if self.context is not None:
            r = r + self.context(context)
        return h + self.second(silu(r))  # type: ignore[no-any-return]


class ResidualMLP(nn.Module):
    """Linear in, residual blocks, linear out.

    Arguments:
        in_dim, out_dim: sizes of x and of the result; out_dim=None ends with the last hidden layer (N, feature_dim).
        width: of the hidden layers.
        depth: number of residual blocks; 0 leaves one hidden layer.
        context_dim: size of the context, which every block sees; 0 for none.
        zero_init: the result is 0 for every x until it is trained.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None,
        *,
        width: int = 128,
        depth: int = 2,
        context_dim: int = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.input = nn.Linear(in_dim + context_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, context_dim) for _ in range(depth))
        self.output = None if out_dim is None else nn.Linear(width, out_dim)
        self.context_dim, self.feature_dim = context_dim, width
        if zero_init and self.output is not None:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def features(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """silu(h_depth), (N, feature_dim)."""
        assert (context is None) == (self.context_dim == 0), f"context_dim is {self.context_dim}"
        h = self.input(x if context is None else torch.cat([x, context], 1))
        for block in self.blocks:
            h = block(h, context)
        return silu(h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, in_dim), context (N, context_dim) or None -> (N, out_dim)."""
        h = self.features(x, context)
        return h if self.output is None else self.output(h)

    def transposed(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The result as (out_dim, N), for those who want it in this order in memory."""
        assert self.output is not None
        return torch.addmm(self.output.bias.unsqueeze(1), self.output.weight, self.features(x, context).T)
