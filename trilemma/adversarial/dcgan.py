"""Convolutions of stride 2 with batch normalisation (Radford, Metz & Chintala 2016, arXiv:1511.06434), of any rank.

In training an example's value depends on its batch, and in evaluation on running means, so gradient penalties, which
are taken per example, need `batch_norm=False` in the discriminator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.adversarial.discriminator import Trunk
from trilemma.nets.resample import canvas, channels_last, crop, lay_out
from trilemma.nets.resnet import LEAK

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def grid(space: tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """`canvas` down to sides of 2 where sides of 4 would leave a single layer."""
    return canvas(space, 4 if max(space) >= 16 else 2)


class DCGANDecoder(nn.Module):
    """Transposed convolutions of stride 2 with batch normalisation and ReLU (Radford et al. 2016, arXiv:1511.06434).

    The condition, if any, enters beside z at the first layer (Mirza & Osindero 2014, arXiv:1411.1784). The last layer
    is linear in place of the paper's tanh: what data reach is the codec's concern. Weights are N(0, 0.02^2).

    Arguments:
        shape: (C, *space) of the result.
        width: channels before the last layer; doubled with every halving of the resolution, up to 8 times.
    """

    def __init__(self, in_dim: int, shape: tuple[int, ...], *, width: int, context_dim: int = 0) -> None:
        super().__init__()
        channels, *space = shape
        self.space, dims = tuple(space), len(space)
        self.base, doublings, _ = grid(self.space)
        widths = [width * min(2**i, 8) for i in range(doublings)][::-1] or [width]
        self.stem = nn.Linear(in_dim + context_dim, widths[0] * math.prod(self.base), bias=False)
        self.norms = nn.ModuleList(BATCH_NORM[dims](w) for w in widths)
        outs = [*widths[1:], channels]
        ups = [CONV_UP[dims](a, b, 4, 2, 1, bias=False) for a, b in zip(widths, outs, strict=True)]
        if not doublings:  # nothing to double: a convolution that keeps the resolution
            ups = [CONV_UP[dims](widths[0], channels, 3, 1, 1, bias=False)]
        self.ups = nn.ModuleList(ups)
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * dims))
        for layer in (self.stem, *self.ups):
            nn.init.normal_(layer.weight, std=0.02)
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.02)  # type: ignore[arg-type]
        lay_out(self)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        stem: Tensor = self.stem(z if context is None else torch.cat([z, context], 1))
        h = channels_last(stem.unflatten(1, (-1, *self.base)))  # type: ignore[no-untyped-call]
        for norm, up in zip(self.norms, self.ups, strict=True):
            h = up(F.relu(norm(h), inplace=True))
        return crop(h, self.space) + self.bias


class DCGANTrunk(Trunk):
    """Convolutions of stride 2 with leaky ReLU and batch normalisation but in the first (Radford et al. 2016).

    Arguments:
        shape: (C, *space) of one example.
        width: channels after the first layer, doubled with every halving of the resolution, up to 8 times.
        batch_norm: without it no example influences another, which penalties on gradients need.
    """

    def __init__(self, shape: tuple[int, ...], *, width: int, batch_norm: bool) -> None:
        super().__init__()
        channels, *space = shape
        dims = len(space)
        base, doublings, self.size = grid(tuple(space))
        widths = [width * min(2**i, 8) for i in range(doublings)]
        kernel, stride = (4, 2) if doublings else (3, 1)
        widths = widths or [width]
        self.downs = nn.ModuleList(
            CONV[dims](a, b, kernel, stride, 1, bias=i == 0 or not batch_norm)
            for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.norms = nn.ModuleList(BATCH_NORM[dims](w) for w in widths[1:]) if batch_norm else None
        self.mixes = bool(self.norms)
        self.feature_dim = widths[-1] * math.prod(base)
        for layer in self.downs:
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for norm in self.norms or ():
            nn.init.normal_(norm.weight, 1.0, 0.02)  # type: ignore[arg-type]
        lay_out(self)

    def features(self, x: Tensor) -> Tensor:
        h = channels_last(crop(x, self.size))
        for i, down in enumerate(self.downs):
            h = down(h)
            if i and self.norms is not None:
                h = self.norms[i - 1](h)
            h = F.leaky_relu(h, LEAK)
        return h.flatten(1)
