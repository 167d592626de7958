r"""StyleGAN2: a generator that w steers layer by layer, and its residual discriminator.

The generator starts from a learned constant. Each level doubles the resolution and has two styled convolutions,
    y = phi(d(s) (W * (s x)) + strength noise + bias),   s = A w,   phi = sqrt(2) leaky ReLU,
the first of which doubles (Karras et al. 2020, arXiv:1912.04958; the convolution is that of `style`). Doubling is a
transposed convolution of stride 2 followed by the filter [1, 3, 3, 1]. An output layer is a modulated 1x1 convolution
without demodulation, or else it could not set the size of anything. Two ways lead to the result:
    skip:      each level adds its output to the doubled sum of those before,
    residual:  x <- (convolutions(x) + W_skip x, doubled) / sqrt(2) at each level, and one output at the end.
An output layer shares its w with the first convolution of the next level. The discriminator has residual blocks that
halve the resolution, and near its end the standard deviation over the batch as one more channel, which tells a
generator that repeats itself (Karras et al. 2018, arXiv:1710.10196). Settings for small data and classes: Karras et
al. 2020, arXiv:2006.06676.

Path length regularisation (arXiv:1912.04958, section 3.2) asks that a step in w changes the result by the same amount
wherever it starts and whatever its direction:
    E (|J_w^T y~| - a)^2,   J_w = dy/dw,   y~ ~ N(0, I / places),   a = running mean of |J_w^T y~|,
which is least, in many dimensions, where the columns of J_w are orthogonal and of the same length at every w.

Vectors (D,) are D channels at a single place: there are the same layers without a grid to double.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.adversarial.discriminator import Trunk
from trilemma.adversarial.style import (
    EPS,
    GAIN,
    SLOPE,
    EqualizedConv,
    EqualizedLinear,
    StyleGenerator,
    convolve,
    demodulation,
    over_channels,
)
from trilemma.core.noise import Noise
from trilemma.core.spec import ConditionSpec
from trilemma.nets.resample import BINOMIAL, CONV_TRANSPOSE, canvas, channels_last, crop, taps_of, upfirdn
from trilemma.nets.resnet import level_widths

HALF = math.sqrt(0.5)
"""Weight of each of the two summands of a residual connection, so that variances stay about 1."""

GROUP = 4
"""Examples over which the standard deviation of a batch is taken, at most."""


def levels_of(space: tuple[int, ...], width: int, depth: int) -> tuple[tuple[int, ...], list[int]]:
    """The smallest grid and the channels of each level, from the largest grid to the smallest.

    Channels double with every halving, up to `GROWTH` times. Vectors (`space` is empty) have 1 + `depth` equal levels.
    """
    if not space:
        return (), [width] * (depth + 1)
    base, doublings, _ = canvas(space)
    return base, level_widths(width, doublings + 1)


class StyledConvolution(nn.Module):
    """x (N, I, *space), w (N, w_dim) -> (N, O, *space'), where `up` doubles space.

    The variance of demodulated values does not depend on the scale of the weights, so these are N(0, 1).

    Arguments:
        space: of the result; () for linear layers, which cannot double.
        noise: add noise, one image for all channels, with a learned strength that starts at 0.
    """

    image: Tensor | None
    taps: Tensor

    def __init__(
        self, w_dim: int, channels_in: int, channels_out: int, space: tuple[int, ...], *, up: bool, noise: bool
    ) -> None:
        super().__init__()
        self.space, self.up = space, up and bool(space)
        self.affine = EqualizedLinear(w_dim, channels_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, *(3,) * len(space)))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.strength = nn.Parameter(torch.zeros(())) if noise else None
        self.register_buffer("image", torch.randn(1, 1, *space) if noise else None)
        self.register_buffer("taps", 2.0 * taps_of(BINOMIAL), persistent=False)  # makes up for the zeros put in

    def forward(self, x: Tensor, w: Tensor, noise: Noise | None = None, gain: float = 1.0) -> Tensor:
        """The result times `gain`; `noise` None is the fixed image."""
        style = self.affine(w)
        x = x * over_channels(style, x)
        if self.up:
            y = CONV_TRANSPOSE[len(self.space)](x, self.weight.transpose(0, 1), stride=2)
            y = upfirdn(y, self.taps, padding=(1, 1))
        else:
            y = convolve(x, self.weight, padding=1)
        gain *= GAIN  # phi is of degree one: the gain goes into the small tensors before it
        shift = over_channels(self.bias * gain, y)
        if self.strength is not None and self.image is not None:
            image = self.image if noise is None else noise.normal(1, *self.space, dtype=self.image.dtype)
            shift = shift + image * (self.strength * gain)
        scale = over_channels(demodulation(self.weight, style) * gain, y)
        return F.leaky_relu((y * scale).add_(shift), SLOPE, inplace=True)


class Output(nn.Module):
    """Modulated 1x1 convolution without demodulation, x (N, I, *space), w (N, w_dim) -> (N, O, *space)."""

    def __init__(self, w_dim: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, channels_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in))
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        # Few channels come out: a small matrix for each example is cheaper than to scale all of x.
        kernels = self.weight * self.affine(w, gain=self.weight.shape[1] ** -0.5).unsqueeze(1)
        places = x.reshape(*x.shape[:2], -1).transpose(1, 2)
        y = torch.baddbmm(self.bias, places, kernels.transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Level(nn.Module):
    """The layers at one resolution; the first level has neither `up` nor `skip`."""

    taps: Tensor

    def __init__(
        self,
        w_dim: int,
        channels_in: int,
        channels: int,
        space: tuple[int, ...],
        output: Output | None,
        *,
        first: bool,
        residual: bool,
        noise: bool,
    ) -> None:
        super().__init__()
        self.up = None if first else StyledConvolution(w_dim, channels_in, channels, space, up=True, noise=noise)
        self.conv = StyledConvolution(w_dim, channels, channels, space, up=False, noise=noise)
        project = residual and not first
        self.skip = EqualizedConv(len(space), channels_in, channels, 1, bias=False) if project else None
        self.output = output
        self.register_buffer("taps", 2.0 * taps_of(BINOMIAL), persistent=False)

    def upsample(self, x: Tensor) -> Tensor:
        """Twice as many places along each axis, with the same mean."""
        return upfirdn(x, self.taps, up=2, padding=(2, 1))

    def forward(
        self, x: Tensor, y: Tensor | None, ws: Sequence[Tensor], noise: Noise | None
    ) -> tuple[Tensor, Tensor | None]:
        """x and the sum y of the outputs, from those of the level before; ws has one w (N, w_dim) for each layer."""
        before = x
        if self.up is not None:
            x = self.up(x, ws[0], noise)
        x = self.conv(x, ws[-2], noise, 1.0 if self.skip is None else HALF)
        if self.skip is not None:
            x = x + self.upsample(self.skip(before, HALF))
        if self.output is not None:
            result = self.output(x, ws[-1])
            y = result if y is None else result + self.upsample(y)
        return x, y


class StyleGAN2Generator(StyleGenerator):
    """z (N, z_dim), c -> y (N, *shape), with the attributes of `StyleGenerator`.

    Noise images let a network draw detail that varies from place to place (hair, grain) without making it up from w.
    A vector has a single place, where noise would only be a latent that no w controls, so vectors have none.

    Arguments:
        shape: (D,), or (C, *space) with one to three axes of any size.
        width: channels at full resolution; doubled with every halving, up to `GROWTH` times.
        depth: levels of two layers that a network for vectors has after its first; other data have one for each
            doubling of the resolution.
        mapping_depth: layers of the mapping network.
        noise: add noise to the result of each convolution.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        z_dim: int,
        condition: ConditionSpec | None,
        *,
        w_dim: int,
        width: int,
        depth: int = 2,
        mapping_depth: int,
        output: Literal["skip", "residual"] = "skip",
        noise: bool = True,
    ) -> None:
        space = tuple(shape[1:])
        base, widths = levels_of(space, width, depth)
        widths.reverse()
        super().__init__(shape, z_dim, w_dim, 2 * len(widths), condition, mapping_depth=mapping_depth)
        residual, last = output == "residual", len(widths) - 1
        self.constant = nn.Parameter(torch.randn(widths[0], *base))
        self.levels = nn.ModuleList(
            Level(
                w_dim,
                widths[max(i - 1, 0)],
                channels,
                tuple(side << i for side in base),
                Output(w_dim, channels, shape[0]) if i == last or not residual else None,
                first=i == 0,
                residual=residual,
                noise=noise and bool(base),
            )
            for i, channels in enumerate(widths)
        )

    def synthesis(self, ws: Tensor, noise: Noise | None = None) -> Tensor:
        w = ws.unbind(1)
        x, y = channels_last(self.constant.expand(ws.shape[0], *self.constant.shape)), None
        for i, level in enumerate(self.levels):
            x, y = level(x, y, w[max(2 * i - 1, 0) : 2 * i + 2], noise)
        assert y is not None
        return crop(y, self.shape[1:])


class DownConvolution(EqualizedConv):
    """The filter [1, 3, 3, 1] and a convolution of stride 2: (N, I, *space) -> (N, O, *space / 2)."""

    taps: Tensor

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__(dims, channels_in, channels_out)
        self.register_buffer("taps", taps_of(BINOMIAL), persistent=False)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return convolve(upfirdn(x, self.taps, padding=(2, 2)), *self.scaled(gain), stride=2)

    def downsample(self, x: Tensor) -> Tensor:
        """Half as many places along each axis, with the same mean."""
        return upfirdn(x, self.taps, down=2, padding=(1, 1))


class TrunkBlock(nn.Module):
    """(phi(W_2 phi(W_1 x)) + W_skip x, halved) / sqrt(2); for vectors nothing is halved."""

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv(dims, channels_in, channels_in)
        self.conv2 = DownConvolution(dims, channels_in, channels_out)
        self.skip = EqualizedConv(dims, channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv1(x, GAIN), SLOPE, inplace=True)
        y = F.leaky_relu(self.conv2(y, GAIN * HALF), SLOPE, inplace=True)
        return y + self.skip(self.conv2.downsample(x), HALF)  # type: ignore[no-any-return]


def with_minibatch_std(x: Tensor) -> Tensor:
    """x (N, C, *space) -> (N, C + 1, *space): one more channel, the standard deviation over a group of examples.

    It is averaged over channels and places. Groups have as many examples as divide N, up to `GROUP`: for a prime
    number above that, each example is a group and the channel is 0.
    """
    size = max(k for k in range(1, GROUP + 1) if len(x) % k == 0)
    groups = x.reshape(size, -1, *x.shape[1:])
    std = (groups.var(0, correction=0) + EPS).sqrt().flatten(1).mean(1)
    return torch.cat([x, over_channels(std.repeat(size).unsqueeze(1), x).expand(-1, 1, *x.shape[2:])], 1)


class StyleGAN2Trunk(Trunk):
    """The discriminator up to its last layer: x (N, *shape) -> features (N, feature_dim).

    Arguments:
        shape, width, depth: as in `StyleGAN2Generator`; `depth` blocks for vectors.
        minibatch_std: append the standard deviation over groups of the batch.

    Attributes:
        feature_dim: size of the features.
        mixes: whether examples of a batch influence each other.
    """

    def __init__(self, shape: tuple[int, ...], *, width: int, depth: int = 2, minibatch_std: bool = True) -> None:
        super().__init__()
        self.mixes, space, dims = minibatch_std, tuple(shape[1:]), len(shape) - 1
        base, widths = levels_of(space, width, depth)
        self.canvas = tuple(side << len(widths) - 1 for side in base)
        self.feature_dim = last = widths[-1]
        self.stem = EqualizedConv(dims, shape[0], width, 1)
        self.blocks = nn.Sequential(*(TrunkBlock(dims, a, b) for a, b in itertools.pairwise(widths)))
        self.conv = EqualizedConv(dims, last + minibatch_std, last)
        self.linear = EqualizedLinear(last * math.prod(base), last)

    def features(self, x: Tensor) -> Tensor:
        h = channels_last(crop(x, self.canvas))
        h = self.blocks(F.leaky_relu(self.stem(h, GAIN), SLOPE, inplace=True))
        h = F.leaky_relu(self.conv(with_minibatch_std(h) if self.mixes else h, GAIN), SLOPE, inplace=True)
        return F.leaky_relu(self.linear(h.flatten(1), GAIN), SLOPE, inplace=True)


def path_lengths(ws: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """|J^T y~| of each example, (N,): the root of the mean over its w of the squared norms of d(y . y~)/dw.

    Differentiable in the parameters of the synthesis.

    Arguments:
        ws: (N, num_ws, w_dim), with a gradient.
        y: (N, *shape), the synthesis of ws, each example a function of its own ws alone.
        noise: draws y~ ~ N(0, I / places).
    """
    direction = noise.normal_like(y) / math.sqrt(math.prod(y.shape[2:]))
    (gradient,) = torch.autograd.grad((y * direction).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


class PathLength(nn.Module):
    """The penalty of path lengths, and their running mean a, which starts at 0.

    Attributes:
        mean: a, of one process: with several, each follows its own batches.
    """

    mean: Tensor

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, ws: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Mean of (length - a)^2 over the batch; `a` first takes in the batch."""
        lengths = path_lengths(ws, y, noise)
        self.mean.lerp_(lengths.detach().mean().to(self.mean.dtype), self.rate)
        return (lengths - self.mean).square().mean()
