r"""Residual convolutional encoder and decoder: a picture or signal to a vector, and back.

A block adds a correction to its input,
    h <- h + W_2 * phi(W_1 * phi(h) + b + V c),
with phi the leaky ReLU and c an optional context vector (He et al. 2016, arXiv:1603.05027, without their
normalisation). Resolution is halved (rounding up) by averaging until no side is longer than 4; width doubles with
every halving up to a cap. The decoder is the mirror image and doubles with nearest neighbours.

With ``norm=False`` nothing is normalised: each block starts as the identity (W_2 = 0) and W_1 is scaled down by the
square root of the number of blocks L, so that depth does not change the size of activations and gradients at the
start (Fixup: Zhang, Dauphin & Ma 2019, arXiv:1901.09321; for GANs: Huang et al. 2024, arXiv:2501.05441). Examples
then do not mix and the network is smooth enough for gradient penalties. With ``norm=True`` a group normalisation
(Wu & He 2018, arXiv:1803.08494) precedes each phi.

One code path serves signals (C, L), pictures (C, H, W) and volumes (C, D, H, W).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.2
"""Slope of phi for negative input."""

SMALLEST = 4
"""Sides longer than this are halved."""

GROWTH = 4
"""The widest level is at most this many times as wide as the first."""


def conv(dims: int, channels_in: int, channels_out: int, kernel: int = 3) -> nn.Module:
    """A convolution over `dims` dimensions that keeps the resolution; `kernel` is odd."""
    layers = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if dims not in layers:
        raise ValueError(f"convolutions need data with 1, 2 or 3 spatial dimensions, got {dims}")
    return layers[dims](channels_in, channels_out, kernel, padding=kernel // 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with up to 32 groups of at least four channels each (fewer where they do not divide)."""
    groups = math.gcd(channels, 32)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def halvings(space: tuple[int, ...], smallest: int = SMALLEST) -> list[tuple[int, ...]]:
    """Resolutions from `space` down to sides of at most `smallest`; sides that are short already stay.

    >>> halvings((100, 75))
    [(100, 75), (50, 38), (25, 19), (13, 10), (7, 5), (4, 3)]
    """
    sizes = [space]
    while max(sizes[-1]) > smallest:
        sizes.append(tuple(-(-side // 2) if side > smallest else side for side in sizes[-1]))
    return sizes


def average_down(x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """Average pooling from the resolution `before` to `after`, a halving of some sides that rounds up."""
    stride = tuple(1 if a == b else 2 for a, b in zip(after, before, strict=True))
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(before)]
    return pool(x, stride, stride, ceil_mode=True, count_include_pad=False)


def nearest_up(x: Tensor, after: tuple[int, ...]) -> Tensor:
    """Nearest-neighbour resampling to the exact resolution `after`."""
    return F.interpolate(x, size=after, mode="nearest-exact")


def level_widths(width: int, levels: int) -> list[int]:
    """Channels from full resolution down: doubled at each level, up to `GROWTH` times."""
    return [width * min(2**i, GROWTH) for i in range(levels)]


class ResNetBlock(nn.Module):
    """h + W_2 phi(W_1 phi(h) + V c), at constant resolution and width.

    Arguments:
        blocks: number L of blocks in the whole network, for the scale of W_1 (without `norm`).
    """

    def __init__(self, dims: int, channels: int, context_dim: int, norm: bool, blocks: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels) if norm else nn.Identity()
        self.norm2 = group_norm(channels) if norm else nn.Identity()
        self.conv1 = conv(dims, channels, channels)
        self.conv2 = conv(dims, channels, channels)
        self.context = nn.Linear(context_dim, channels) if context_dim else None
        _init_kaiming(self.conv1, 1.0 if norm else blocks**-0.5)
        nn.init.zeros_(self.conv2.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        branch = self.norm2(self.conv1(F.leaky_relu(self.norm1(h), LEAK)))
        if self.context is not None:
            assert context is not None, "this network was made with a context"
            branch = branch + self.context(context).unflatten(1, (-1,) + (1,) * (h.ndim - 2))
        result: Tensor = h + self.conv2(F.leaky_relu(branch, LEAK))
        return result


class ResNetEncoder(nn.Module):
    """A picture or signal to a vector.

    Arguments:
        shape: (C, *space) of one example, with 1, 2 or 3 spatial dimensions of any size.
        out_dim: length of the result; None leaves out the last, linear layer: the result has length `feature_dim`.
        width: channels at full resolution.
        depth: residual blocks per resolution.
        context_dim: length of the context vector, 0 for none.
        norm: group normalisation (for VAEs; not for critics, whose output must stay free to grow).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        out_dim: int | None,
        *,
        width: int = 64,
        depth: int = 1,
        context_dim: int = 0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        channels, *space = shape
        self.sizes = halvings(tuple(space))
        dims, widths = len(space), level_widths(width, len(self.sizes))
        self.stem = conv(dims, channels, width)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResNetBlock(dims, w, context_dim, norm, depth * len(widths)) for _ in range(depth))
            for w in widths
        )
        self.widen = nn.ModuleList(conv(dims, a, b, 1) for a, b in itertools.pairwise(widths))
        self.norm = group_norm(widths[-1]) if norm else nn.Identity()
        self.feature_dim = widths[-1] * math.prod(self.sizes[-1])
        self.head = nn.Identity() if out_dim is None else nn.Linear(self.feature_dim, out_dim)
        for layer in (self.stem, *self.widen):
            _init_kaiming(layer, 1.0, activation=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, C, *space), context (N, context_dim) or None -> (N, out_dim)."""
        h = self.stem(x)
        for i, blocks in enumerate(self.levels):
            if i:
                h = self.widen[i - 1](average_down(h, self.sizes[i - 1], self.sizes[i]))
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, context)
        result: Tensor = self.head(F.leaky_relu(self.norm(h), LEAK).flatten(1))
        return result


class ResNetDecoder(nn.Module):
    """A vector to a picture or signal: the mirror image of `ResNetEncoder`.

    Arguments:
        in_dim: length of the input vector.
        shape: (C, *space) of the result; C may differ from the data's (a mean and a scale per channel).
        width, depth, context_dim, norm: as in `ResNetEncoder`.
    """

    def __init__(
        self,
        in_dim: int,
        shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 1,
        context_dim: int = 0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        channels, *space = shape
        self.sizes = halvings(tuple(space))[::-1]
        dims, widths = len(space), level_widths(width, len(self.sizes))[::-1]
        self.stem = nn.Linear(in_dim, widths[0] * math.prod(self.sizes[0]))
        self.levels = nn.ModuleList(
            nn.ModuleList(ResNetBlock(dims, w, context_dim, norm, depth * len(widths)) for _ in range(depth))
            for w in widths
        )
        self.narrow = nn.ModuleList(conv(dims, a, b, 1) for a, b in itertools.pairwise(widths))
        self.norm = group_norm(widths[-1]) if norm else nn.Identity()
        self.head = conv(dims, width, channels)
        for layer in (self.stem, *self.narrow):
            _init_kaiming(layer, 1.0, activation=False)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """z (N, in_dim), context (N, context_dim) or None -> (N, C, *space)."""
        h = self.stem(z).unflatten(1, (-1, *self.sizes[0]))
        for i, blocks in enumerate(self.levels):
            if i:
                h = nearest_up(self.narrow[i - 1](h), self.sizes[i])
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, context)
        result: Tensor = self.head(F.leaky_relu(self.norm(h), LEAK))
        return result


def _init_kaiming(layer: nn.Module, scale: float, activation: bool = True) -> None:
    """Normal weights that keep the variance of phi(h) (or of h itself), times `scale`^2; zero biases."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    fan_in = weight[0].numel()
    gain = math.sqrt(2.0 / (1.0 + LEAK**2)) if activation else 1.0
    with torch.no_grad():
        nn.init.normal_(weight, std=scale * gain / math.sqrt(fan_in))
        nn.init.zeros_(bias)
