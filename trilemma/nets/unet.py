r"""One U-Net for signals (C, L), pictures (C, H, W) and volumes (C, D, H, W) (Ronneberger et al. 2015,
arXiv:1505.04597, in the form of Ho et al. 2020, arXiv:2006.11239, and Dhariwal & Nichol 2021, arXiv:2105.05233).

On the way down each resolution has `depth` residual blocks and then halves (rounding up); on the way up each
resolution takes in what the way down produced there. A residual block sees the context c (time, condition) as the
scale and shift of its second group normalisation (FiLM: Perez et al. 2018, arXiv:1709.07871):
    h <- S h + W_2 silu((1 + scale(c)) * GN(W_1 silu(GN(h))) + shift(c)).
At the coarse resolutions self-attention with h <- h + W_o attention(GN(h)) follows. Every branch ends in a layer that
starts at zero, and so does the network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from trilemma.nets.resnet import average_down, conv, group_norm, halvings, nearest_up


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


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


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, as a residual branch."""

    def __init__(self, dims: int, channels: int, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = max(1, channels // head_dim)
        while channels % self.heads:
            self.heads -= 1
        self.norm = group_norm(channels)
        self.qkv = conv(dims, channels, 3 * channels, 1)
        self.out = zero_init(conv(dims, channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """(N, channels, *space) -> the same shape."""
        # (N, 3 * heads * d, positions) -> three of (N, heads, positions, d)
        q, k, v = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        mixed = scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(h.shape)
        result: Tensor = h + self.out(mixed)
        return result


class UNet(nn.Module):
    """A map from pictures or signals to pictures or signals of the same resolution.

    Arguments:
        shape: (C, *space) of the input, with 1, 2 or 3 spatial dimensions of any size.
        channels_out: channels of the result; None for C.
        width: channels at full resolution.
        multipliers: channels of each resolution, in units of `width`; one entry per resolution.
        depth: residual blocks per resolution on the way down.
        context_dim: length of the context vector.
        attention_below: a resolution with at most this many positions gets self-attention.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        channels_out: int | None = None,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        depth: int = 2,
        context_dim: int,
        attention_below: int = 256,
    ) -> None:
        super().__init__()
        channels, *space = shape
        dims, widths = len(space), [width * m for m in multipliers]
        self.sizes = halvings(tuple(space), 1)[: len(widths)]
        if len(self.sizes) < len(widths):
            raise ValueError(
                f"{shape} cannot be halved {len(widths) - 1} times: give at most {len(self.sizes)} multipliers"
            )
        attends = [math.prod(size) <= attention_below for size in self.sizes]

        def level(channels_in: int, i: int, blocks: int, skips: tuple[int, ...]) -> nn.ModuleList:
            inputs = [channels_in, *[widths[i]] * (blocks - 1)]
            return nn.ModuleList(
                nn.ModuleList(
                    [
                        FiLMBlock(dims, a + s, widths[i], context_dim),
                        SelfAttention(dims, widths[i]) if attends[i] else nn.Identity(),
                    ]
                )
                for a, s in zip(inputs, skips, strict=True)
            )

        last = len(widths) - 1
        self.stem = conv(dims, channels, width)
        self.down = nn.ModuleList(level(a, i, depth, (0,) * depth) for i, a in enumerate([width, *widths[:-1]]))
        self.middle = level(widths[last], last, 1, (0,))
        self.up = nn.ModuleList(
            level(widths[min(i + 1, last)], i, depth, (widths[i],) * depth) for i in reversed(range(len(widths)))
        )
        self.norm = group_norm(width * multipliers[0])
        self.head = zero_init(conv(dims, width * multipliers[0], channels_out or channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (N, C, *space), context (N, context_dim) -> (N, channels_out, *space)."""
        h = self.stem(x)
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down):
            if i:
                h = average_down(h, self.sizes[i - 1], self.sizes[i])
            for block, attention in blocks:  # type: ignore[attr-defined]
                h = attention(block(h, context))
                skips.append(h)
        for block, attention in self.middle:  # type: ignore[misc]
            h = attention(block(h, context))
        for i, blocks in zip(reversed(range(len(self.sizes))), self.up, strict=True):
            if i < len(self.sizes) - 1:
                h = nearest_up(h, self.sizes[i])
            for block, attention in blocks:  # type: ignore[attr-defined]
                h = attention(block(torch.cat([h, skips.pop()], 1), context))
        result: Tensor = self.head(silu(self.norm(h)))
        return result
