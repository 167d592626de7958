r"""One U-Net for signals (C, L), pictures (C, H, W) and volumes (C, D, H, W) (Ronneberger et al. 2015,
arXiv:1505.04597, in the form of Ho et al. 2020, arXiv:2006.11239, and Dhariwal & Nichol 2021, arXiv:2105.05233).

On the way down each resolution has `depth` residual blocks and then halves (rounding up); on the way up each
resolution takes in what the way down produced there. A residual block sees the context c (time, condition) as the
scale and shift of its second group normalisation (FiLM: Perez et al. 2018, arXiv:1709.07871):
    h <- S h + W_2 silu((1 + scale(c)) * GN(W_1 silu(GN(h))) + shift(c)).
At the coarse resolutions self-attention with h <- h + attention(GN(h)) follows, and then, for a condition that is
a sequence of tokens y, cross-attention with h <- h + attention(GN(h), y) (Rombach et al. 2022, arXiv:2112.10752).
Every branch ends in a layer that starts at zero, and so does the network. A condition that is itself a picture enters
as further channels of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from trilemma.core.errors import UsageError
from trilemma.nets.attention import Attention, zero_init
from trilemma.nets.resnet import average_down, conv, group_norm, halvings, nearest_up


def channels_last(h: Tensor) -> Tensor:
    """h (N, C, H, W) with the channels of a position side by side in memory; signals and volumes as they are.

    Convolutions compute in this layout, so they need not convert to it and back, and attention reads it as (N, P, C).
    """
    return h.contiguous(memory_format=torch.channels_last) if h.ndim == 4 else h


class FiLMBlock(nn.Module):
    """A residual block whose second normalisation is scaled and shifted by the context."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, context_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels_in), group_norm(channels_out)
        self.conv1 = conv(dims, channels_in, channels_out)
        self.conv2 = zero_init(conv(dims, channels_out, channels_out))
        self.film = nn.Linear(context_dim, 2 * channels_out)
        self.skip = nn.Identity() if channels_in == channels_out else conv(dims, channels_in, channels_out, 1)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """h (N, channels_in, *space), context (N, context_dim) -> (N, channels_out, *space)."""
        scale, shift = self.film(silu(context)).unflatten(1, (-1,) + (1,) * (h.ndim - 2)).chunk(2, 1)
        branch = self.norm2(self.conv1(silu(self.norm1(h))))
        result: Tensor = self.skip(h) + self.conv2(silu(branch * (1.0 + scale) + shift))
        return result


class SpatialAttention(nn.Module):
    """h + attention(GN(h), y) over all positions of h, which starts as the identity.

    Arguments:
        token_dim: channels of the tokens y; None for self-attention.
        head_dim: channels of a head, at least, where they divide `channels`.
    """

    def __init__(self, channels: int, token_dim: int | None = None, head_dim: int = 32) -> None:
        super().__init__()
        heads = max(1, channels // head_dim)
        while channels % heads:
            heads -= 1
        self.norm = group_norm(channels)
        self.attention = Attention(channels, heads, token_dim)
        zero_init(self.attention.out)

    def forward(self, h: Tensor, tokens: Tensor | None = None) -> Tensor:
        """h (N, channels, *space), tokens (N, L, token_dim) or None -> the shape of h."""
        mixed = self.attention(self.norm(h).flatten(2).transpose(1, 2), tokens)
        result: Tensor = h + mixed.transpose(1, 2).reshape(h.shape)
        return result


class Stage(nn.Module):
    """A residual block, then self-attention if `attend`, then cross-attention if `cross_dim` > 0."""

    def __init__(
        self, dims: int, channels_in: int, channels_out: int, context_dim: int, attend: bool, cross_dim: int
    ) -> None:
        super().__init__()
        self.block = FiLMBlock(dims, channels_in, channels_out, context_dim)
        self.attention = SpatialAttention(channels_out) if attend else None
        self.cross = SpatialAttention(channels_out, cross_dim) if cross_dim else None

    def forward(self, h: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
        h = self.block(h, context)
        if self.attention is not None:
            h = self.attention(h)
        if self.cross is not None:
            h = self.cross(h, tokens)
        return h


class UNet(nn.Module):
    """A map from pictures or signals to pictures or signals of the same resolution.

    Arguments:
        shape: (C, *space) of the picture, with 1, 2 or 3 spatial dimensions of any size.
        channels_in: channels of the input, where a condition is concatenated to the picture; None for C.
        channels_out: channels of the result; None for C.
        width: channels at full resolution.
        multipliers: channels of each resolution, in units of `width`; one entry per resolution.
        depth: residual blocks per resolution on the way down, and as many on the way up.
        context_dim: length of the context vector.
        attention_below: a resolution with at most this many positions gets self-attention after each block.
        attention_middle: self-attention in the middle, whatever its resolution.
        cross_dim: channels of the tokens of a condition, 0 for none. Cross-attention to them follows each
            self-attention, and there is one in the middle in any case.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        channels_in: int | None = None,
        channels_out: int | None = None,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        depth: int = 2,
        context_dim: int,
        attention_below: int = 256,
        attention_middle: bool = False,
        cross_dim: int = 0,
    ) -> None:
        super().__init__()
        channels, *space = shape
        dims, widths = len(space), [width * m for m in multipliers]
        self.cross_dim = cross_dim
        self.sizes = halvings(tuple(space), 1)[: len(widths)]
        if len(self.sizes) < len(widths):
            raise UsageError(
                f"{shape} cannot be halved {len(widths) - 1} times: give at most {len(self.sizes)} multipliers"
            )
        attends = [math.prod(size) <= attention_below for size in self.sizes]

        def level(first: int, i: int, skip: int) -> nn.ModuleList:
            cross = cross_dim if attends[i] else 0
            inputs = [first, *[widths[i]] * (depth - 1)]
            return nn.ModuleList(Stage(dims, a + skip, widths[i], context_dim, attends[i], cross) for a in inputs)

        last = len(widths) - 1
        self.stem = conv(dims, channels_in or channels, width)
        self.down = nn.ModuleList(level(a, i, 0) for i, a in enumerate([width, *widths[:-1]]))
        self.middle = Stage(dims, widths[last], widths[last], context_dim, attends[last] or attention_middle, cross_dim)
        self.up = nn.ModuleList(level(widths[min(i + 1, last)], i, widths[i]) for i in reversed(range(len(widths))))
        self.norm = group_norm(widths[0])
        self.head = zero_init(conv(dims, widths[0], channels_out or channels))

    def forward(self, x: Tensor, context: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x (N, channels_in, *space), context (N, context_dim), tokens (N, L, cross_dim) or None if cross_dim is 0
        -> (N, channels_out, *space)."""
        assert (tokens is None) == (self.cross_dim == 0), f"cross_dim is {self.cross_dim}"
        h = channels_last(self.stem(x))
        skips: list[Tensor] = []
        for i, stages in enumerate(self.down):
            if i:
                h = average_down(h, self.sizes[i - 1], self.sizes[i])
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(h, context, tokens)
                skips.append(h)
        h = self.middle(h, context, tokens)
        for i, stages in zip(reversed(range(len(self.sizes))), self.up, strict=True):
            if i < len(self.sizes) - 1:
                h = nearest_up(h, self.sizes[i])
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(torch.cat([h, skips.pop()], 1), context, tokens)
        result: Tensor = self.head(silu(self.norm(h)))
        return result
