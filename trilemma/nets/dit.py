r"""A diffusion transformer for signals, pictures and volumes (DiT: Peebles & Xie 2023, arXiv:2212.09748).

Patches of the input become tokens by a linear map, plus a fixed sine-cosine code of their position. A block reads the
context c (time, condition) as shifts, scales and gates of its two branches (adaLN-zero):
    h <- h + g_1 * attention((1 + s_1) * LN(h) + b_1)
    h <- h + attention(LN(h), y)                         with the tokens y of a condition, if there are any
    h <- h + g_2 * mlp((1 + s_2) * LN(h) + b_2),         [b_1, s_1, g_1, b_2, s_2, g_2] = W silu(c) + b.
W and b start at zero, and so do the gates: a block starts as the identity. Cross-attention is not gated; its last
layer starts at zero (Chen et al. 2023, arXiv:2310.00426). After the last block, a map of (1 + s) * LN(h) + b gives
each patch of the result; it starts at zero too.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from trilemma.core.errors import UsageError
from trilemma.nets.attention import Attention, zero_init
from trilemma.nets.embedding import sinusoidal

MLP_RATIO = 4
"""Hidden units of a block's MLP, in widths."""


def patchify(x: Tensor, patch: int) -> Tensor:
    """(N, C, *space) -> (N, P, C * patch^d): the P patches row by row, the entries of each in the order of x."""
    n, channels, *space = x.shape
    dims = len(space)
    x = x.reshape(n, channels, *itertools.chain.from_iterable((side // patch, patch) for side in space))
    grid, inside = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, *grid, 1, *inside).flatten(1 + dims).flatten(1, dims)


def unpatchify(tokens: Tensor, patch: int, space: tuple[int, ...]) -> Tensor:
    """(N, P, C * patch^d) -> (N, C, *space): the inverse of `patchify`."""
    dims = len(space)
    x = tokens.reshape(-1, *(side // patch for side in space), tokens.shape[2] // patch**dims, *[patch] * dims)
    order = itertools.chain.from_iterable((1 + axis, 2 + dims + axis) for axis in range(dims))
    return x.permute(0, 1 + dims, *order).reshape(x.shape[0], x.shape[1 + dims], *space)


def positions(grid: tuple[int, ...], width: int) -> Tensor:
    """(P, width): for each axis of the grid the sinusoidal embedding of the index along it, side by side.

    What an even share per axis leaves of `width` stays zero.
    """
    share = width // (2 * len(grid)) * 2
    axes = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) for side in grid], indexing="ij")
    codes = [sinusoidal(axis.flatten(), share) for axis in axes]
    rest = torch.zeros(math.prod(grid), width - share * len(grid), dtype=torch.float64)
    return torch.cat([*codes, rest], 1)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * h + shift: h (N, P, width), shift and scale (N, width)."""
    return h * (1.0 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if `cross_dim` > 0, and an MLP; the identity at the start."""

    def __init__(self, width: int, heads: int, context_dim: int, cross_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.first = nn.Linear(width, MLP_RATIO * width)
        self.second = nn.Linear(MLP_RATIO * width, width)
        self.cross = Attention(width, heads, cross_dim) if cross_dim else None
        self.modulation = nn.Linear(context_dim, 6 * width)

    def forward(self, h: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
        """h (N, P, width), context (N, context_dim), tokens (N, L, cross_dim) or None -> (N, P, width)."""
        b1, s1, g1, b2, s2, g2 = self.modulation(silu(context)).chunk(6, 1)
        h = h + g1.unsqueeze(1) * self.attention(modulate(self.norm(h), b1, s1))
        if self.cross is not None:
            h = h + self.cross(self.norm(h), tokens)
        hidden = self.first(modulate(self.norm(h), b2, s2))
        return h + g2.unsqueeze(1) * self.second(gelu(hidden, approximate="tanh"))  # type: ignore[no-any-return]


class DiT(nn.Module):
    """A map from pictures or signals to pictures or signals of the same resolution.

    Arguments:
        shape: (C, *space) of the picture, with 1, 2 or 3 spatial dimensions, each a multiple of `patch`.
        channels_in: channels of the input, where a condition is concatenated to the picture; None for C.
        channels_out: channels of the result; None for C.
        width: of the tokens, a multiple of `heads` and at least 4 per spatial dimension.
        depth: number of blocks.
        heads: of each attention.
        patch: side of a patch, the same along every dimension.
        context_dim: length of the context vector.
        cross_dim: channels of the tokens of a condition, 0 for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        channels_in: int | None = None,
        channels_out: int | None = None,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        patch: int = 2,
        context_dim: int,
        cross_dim: int = 0,
    ) -> None:
        super().__init__()
        channels, *space = shape
        if any(side % patch for side in space):
            raise UsageError(
                f"patches of side {patch} do not tile {tuple(space)}: choose one that divides {math.gcd(*space)}"
            )
        if width % heads or width < 4 * len(space):
            least = 4 * len(space)
            raise UsageError(f"a width of {width} does not suit: take a multiple of {heads} (heads), at least {least}")
        self.patch, self.space, self.cross_dim = patch, tuple(space), cross_dim
        size = patch ** len(space)
        self.stem = nn.Linear((channels_in or channels) * size, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, context_dim, cross_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(context_dim, 2 * width)
        self.head = nn.Linear(width, (channels_out or channels) * size)
        grid = tuple(side // patch for side in space)
        self.register_buffer("position", positions(grid, width).to(self.stem.weight.dtype), persistent=False)
        self._initialise()

    position: Tensor

    def _initialise(self) -> None:
        """Xavier weights and no biases, as in the paper; then the zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero_init(block.modulation)
            if block.cross is not None:
                zero_init(block.cross.out)
        zero_init(self.modulation)
        zero_init(self.head)

    def forward(self, x: Tensor, context: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x (N, channels_in, *space), context (N, context_dim), tokens (N, L, cross_dim) or None if cross_dim is 0
        -> (N, channels_out, *space)."""
        assert (tokens is None) == (self.cross_dim == 0), f"cross_dim is {self.cross_dim}"
        h = self.stem(patchify(x, self.patch)) + self.position
        for block in self.blocks:
            h = block(h, context, tokens)
        shift, scale = self.modulation(silu(context)).chunk(2, 1)
        return unpatchify(self.head(modulate(self.norm(h), shift, scale)), self.patch, self.space)
