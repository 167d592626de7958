r"""StyleGAN3, a generator without aliasing (Karras et al. 2021, arXiv:2106.12423).

The signals between its layers stand for continuous, band-limited functions of coordinates x, of which the arrays are
samples. Layers that act on the functions commute with translations, so what the input's coordinates undergo, the
picture undergoes, by fractions of a pixel as well. Coordinates are 0 at the centre of the picture and in units of its
longer side, so frequencies and sampling rates are per picture.

Input: sin(2 pi (f_c . x + p_c)), f_c drawn from the ball of the first band limit, mixed by a linear map. The
coordinates are transformed by a rotation and translation that depend on w, after one that the user gives.

Layers: a modulated convolution over the root of a moving average of its input's mean square, then the filtered
nonlinearity. A leaky ReLU makes frequencies without limit. It is therefore applied at twice the sampling rate, between
a low-pass filter that interpolates and one that removes what the target's sampling rate cannot hold:
    y = down(k' * sqrt(2) leaky_relu(k * up(x))),   k(n) = 2 f_c / s sinc(2 f_c n / s) kaiser(n),
with the cutoffs f_c, and the widths f_h of the transition bands, of source and target, at the common rate s.
With `rotation`, convolutions are 1x1 and k' is radial, f_c / s J_1(2 pi f_c r / s) / r kaiser(n) kaiser(m), except
where sampling is critical, so that layers commute with rotations as well.

Schedule: cutoffs and stopbands f_t grow geometrically from layer to layer, and stay at their last values for two
layers, which are sampled critically (f_c = s / 2). s is the picture's rate, halved as long as it is at least 4 f_t;
f_h = max(f_t, s / 2) - f_c. Around the picture each signal has a margin, so that the zeros behind its edge stay
outside.

Vectors have no coordinates and nothing to alias: a learned constant takes the place of the input, and layers are
modulated linear maps with leaky ReLUs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import signal, special
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.adversarial.style import (
    GAIN,
    SLOPE,
    EqualizedLinear,
    StyleGenerator,
    convolve,
    demodulation,
    over_channels,
)
from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise
from trilemma.core.spec import ConditionSpec
from trilemma.nets.resample import CONV, CONV_TRANSPOSE, channels_last

FIRST_CUTOFF = 2.0
FIRST_STOPBAND, LAST_STOPBAND = 2.0**1.1, 2.0**0.3
"""In units of the cutoff."""

CRITICAL = 2
"""Layers at the end that are sampled critically."""

FILTER_SIZE = 6
"""Taps of a filter, in samples of the lower of its two rates."""

OVERSAMPLING = 2
"""Sampling rate of the nonlinearity, in units of the higher one of source and target."""

MARGIN = 10
OUTPUT_GAIN = 0.25
HALF_LIFE = 20_000
"""Of the average of the inputs' mean squares, in examples."""


class Stage(NamedTuple):
    """A signal between two layers.

    Attributes:
        cutoff, half_width: of its band and of the band's transition, in cycles per picture.
        rate: samples per picture.
        size: samples along each axis, with margins.
    """

    cutoff: float
    half_width: float
    rate: float
    size: tuple[int, ...]
    channels: int


def default_layers(space: tuple[int, ...]) -> int:
    """4 for 8 x 8, 8 for 32 x 32, 14 (the paper's) from 256 x 256 on."""
    return min(max(2 * round(math.log2(max(space))) - 2, 4), 14)


def default_margin(space: tuple[int, ...]) -> int:
    """Half the picture and 2, at most the paper's 10 samples."""
    return min(max(space) // 2 + 2, MARGIN)


def growth(space: tuple[int, ...]) -> float:
    """Most channels in units of the last layer's: 4 for 256 x 256, as in the paper, and not less than 2.

    Margins make early signals of small pictures nearly as large as late ones, so channels would be dear there.
    """
    return max(max(space) / 64, 2.0)


def schedule(space: tuple[int, ...], *, width: int, layers: int, margin: int) -> list[Stage]:
    """The input of the first layer, of the second, ..., and of the output layer: the last two are alike but for size.

    Returns:
        `layers` stages, since the first layer keeps the sampling of the input, which is stage 0.
    """
    side = max(space)
    first, last, widest = min(FIRST_CUTOFF, side / 4), side / 2, growth(space)
    stages = []
    for index in range(layers):
        progress = min(index / (layers - CRITICAL), 1.0)
        cutoff = first * (last / first) ** progress
        stopband = cutoff * FIRST_STOPBAND * (LAST_STOPBAND / FIRST_STOPBAND) ** progress
        halvings = math.floor(math.log2(side / min(2.0 * stopband, side)) + 1e-9)  # stopbands may be powers of 2
        rate = side / 2.0**halvings
        size = tuple(math.ceil(length * rate / side) + 2 * margin for length in space)
        channels = round(width * min(last / cutoff, widest))
        stages.append(Stage(cutoff, max(stopband, rate / 2) - cutoff, rate, size, channels))
    stages[-1] = stages[-1]._replace(size=space)
    return stages


def lowpass(taps: int, cutoff: float, half_width: float, rate: float, dims: int, *, radial: bool = False) -> Tensor:
    """A filter (taps,) * dims of sum 1 for signals of `rate`, by a Kaiser window; float64.

    Its gain falls from 1 at cutoff - half_width to 0 at cutoff + half_width, along each axis, or of the frequency
    vector's length if `radial` (pictures only).
    """
    kernel: NDArray[np.float64]
    if radial:
        place = np.arange(taps) - (taps - 1) / 2
        radius = np.hypot(*np.meshgrid(place, place))  # never 0, since `taps` is even
        beta = signal.kaiser_beta(signal.kaiser_atten(taps, 4 * half_width / rate))
        window = np.kaiser(taps, beta)
        kernel = special.j1(2 * np.pi * cutoff / rate * radius) / radius * np.outer(window, window)
    else:
        axis = kernel = signal.firwin(taps, cutoff, width=2 * half_width, fs=rate)
        for _ in range(dims - 1):
            kernel = np.multiply.outer(kernel, axis)
    return torch.from_numpy(kernel / kernel.sum())


class FilteredActivation(nn.Module):
    """Leaky ReLU, of a signal of one stage to that of the next: (N, C, *source.size) -> (N, C, *target.size).

    Arguments:
        slope: of the leaky ReLU where it is negative; at 1 it is linear.
    """

    up: Tensor
    down: Tensor

    def __init__(
        self, source: Stage, target: Stage, *, radial: bool, slope: float = SLOPE, filter_size: int = FILTER_SIZE
    ) -> None:
        super().__init__()
        dims, rate = len(source.size), OVERSAMPLING * max(source.rate, target.rate)
        u, d = int(rate / source.rate), int(rate / target.rate)
        self.slope, self.up_factor, self.down_factor = slope, u, d
        # One pass over both axes of a picture is quicker than one for each; in volumes it has too many taps.
        self.passes = [range(dims)] if dims < 3 else [range(i, i + 1) for i in range(dims)]
        joint = len(self.passes[0])
        up = lowpass(filter_size * u, source.cutoff, source.half_width, rate, joint) * u**joint
        radial = radial and 2 * target.cutoff < target.rate
        down = lowpass(filter_size * d, target.cutoff, target.half_width, rate, joint, radial=radial)
        self.register_buffer("up", up.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("down", down.to(torch.get_default_dtype()), persistent=False)
        # Of what the first filter makes, the second needs the centre.
        self.surplus = []
        for n, m in zip(source.size, target.size, strict=True):
            surplus = (n - 1) * u + len(up) - (m - 1) * d - len(down)
            assert surplus >= 0, (source, target)
            assert surplus % 2 == 0, (source, target)
            self.surplus.append(surplus // 2)

    def forward(self, x: Tensor) -> Tensor:
        dims, channels = x.ndim - 2, x.shape[1]
        for axes in self.passes:
            stride = [self.up_factor if i in axes else 1 for i in range(dims)]
            crop = [n if i in axes else 0 for i, n in enumerate(self.surplus)]
            x = CONV_TRANSPOSE[dims](x, _kernel(self.up, axes, x), stride=stride, padding=crop, groups=channels)
        x = F.leaky_relu(x, self.slope, inplace=True)
        for axes in self.passes:
            stride = [self.down_factor if i in axes else 1 for i in range(dims)]
            x = CONV[dims](x, _kernel(self.down, axes, x), stride=stride, groups=channels)
        return x


def _kernel(taps: Tensor, axes: range, x: Tensor) -> Tensor:
    """taps, of as many axes, as the kernel of a convolution that leaves channels apart."""
    size = [len(taps) if i in axes else 1 for i in range(x.ndim - 2)]
    return taps.reshape(size).expand(x.shape[1], 1, *size)


class ModulatedLayer(nn.Module):
    """Modulated convolution, input magnitude, bias: x (N, I, *space), w (N, w_dim) -> activation of (N, O, *space).

    Arguments:
        kernel: side of the kernel.
        activation: None for the output layer, which is linear and not demodulated.
    """

    magnitude: Tensor
    averaged: Tensor

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, w_dim: int, kernel: int, activation: nn.Module | None
    ) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *(kernel,) * dims))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.activation, self.padding = activation, kernel // 2
        self.gain = OUTPUT_GAIN / math.sqrt(self.weight[0].numel())
        self.register_buffer("magnitude", torch.ones(()))
        self.register_buffer("averaged", torch.zeros(()))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self._measure(x)
        style = self.affine(w)
        y = convolve(x * over_channels(style, x), self.weight, None, self.padding)
        bias: Tensor = self.bias
        if self.activation is None:
            scale = (self.gain * self.magnitude.rsqrt()).expand_as(bias)
        else:  # demodulation, taken with the rest into one pass over y
            scale = demodulation(self.weight, style) * (GAIN * self.magnitude.rsqrt())
            bias = bias * GAIN  # what follows is of degree one, so the gain of the activation may go before it
        y = torch.addcmul(over_channels(bias, y), y, over_channels(scale, y))
        if self.activation is not None:
            y = self.activation(y)
        return y

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        """Move the mean square of the inputs towards that of x; the plain mean at first."""
        self.averaged += 1
        rate = self.averaged.reciprocal().clamp(min=1.0 - 0.5 ** (len(x) / HALF_LIFE))
        self.magnitude.lerp_(x.to(self.magnitude.dtype).square().mean(), rate)


class FourierInput(nn.Module):
    """Fourier features of transformed coordinates: w (N, w_dim) -> (N, stage.channels, *stage.size).

    w is mapped to a rotation (pictures only) and a translation by an affine map that starts as the identity.
    """

    frequencies: Tensor
    phases: Tensor
    grid: Tensor

    def __init__(self, stage: Stage, w_dim: int) -> None:
        super().__init__()
        self.stage, dims, channels = stage, len(stage.size), stage.channels
        direction = torch.randn(channels, dims)
        length = stage.cutoff * torch.rand(channels, 1) ** (1 / dims)
        self.register_buffer("frequencies", length * direction / direction.norm(dim=1, keepdim=True))
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        axes = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / stage.rate for n in stage.size]
        grid = torch.stack([g.flatten() for g in torch.meshgrid(axes, indexing="ij")])
        self.register_buffer("grid", grid.to(torch.get_default_dtype()), persistent=False)
        self.affine = EqualizedLinear(w_dim, 4 if dims == 2 else dims)
        nn.init.zeros_(self.affine.weight)
        if dims == 2:
            nn.init.ones_(self.affine.bias[:1])
        self.weight = nn.Parameter(torch.randn(channels, channels))

    def transform(self, w: Tensor) -> Tensor:
        """Homogeneous matrices (N, d+1, d+1) that coordinates are multiplied by."""
        t, dims = self.affine(w), len(self.stage.size)
        linear = torch.eye(dims, dtype=t.dtype, device=t.device).expand(t.shape[0], -1, -1)
        if dims == 2:
            t = t / t[:, :2].norm(dim=1, keepdim=True)
            cos, sin, t = t[:, 0], t[:, 1], t[:, 2:]
            linear = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
        return homogeneous(linear, -(linear @ t.unsqueeze(2)).squeeze(2))

    def features(self, transform: Tensor) -> Tensor:
        """sin(2 pi (f . x' + p)) at x' = transform x, (N, channels, *size).

        Frequencies that a transform raises above the band limit fade out, to 0 at half the sampling rate.
        """
        f = self.frequencies @ transform[:, :-1, :-1]
        phases = transform[:, :-1, -1] @ self.frequencies.T + self.phases
        limit = self.stage.cutoff
        amplitude = (1 - (f.norm(dim=2) - limit) / (self.stage.rate / 2 - limit)).clamp(0, 1)
        angle = torch.baddbmm(phases.unsqueeze(2), f, self.grid.expand(f.shape[0], -1, -1))
        features: Tensor = amplitude.unsqueeze(2) * torch.sin(2 * math.pi * angle)
        return features.view(*features.shape[:2], *self.stage.size)

    def forward(self, w: Tensor, transform: Tensor | None = None) -> Tensor:
        with torch.autocast(w.device.type, enabled=False):  # phases need all digits of the coordinates
            own = self.transform(w.to(self.phases.dtype))
            x = self.features(own if transform is None else own @ transform.to(own)).flatten(2)
        y: Tensor = (self.weight / math.sqrt(len(self.weight))) @ x
        return channels_last(y.view(*y.shape[:2], *self.stage.size))


def homogeneous(linear: Tensor, offset: Tensor) -> Tensor:
    """x -> linear x + offset as a matrix: (N, d, d), (N, d) -> (N, d+1, d+1)."""
    top = torch.cat([linear, offset.unsqueeze(2)], 2)
    last = torch.eye(top.shape[2])[-1:].to(top).expand(top.shape[0], 1, -1)
    return torch.cat([top, last], 1)


class ConstantInput(nn.Module):
    """A learned vector in place of Fourier features, which nothing transforms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(channels))

    def forward(self, w: Tensor, transform: Tensor | None = None) -> Tensor:
        return self.constant.expand(w.shape[0], -1)


class StyleGAN3Generator(StyleGenerator):
    """z, c -> y (N, *shape), equivariant to translations, and to rotations with `rotation`.

    There is no noise. ws[:, 0] is the input's, then one per layer, and the output layer's. What is clamped in the paper
    for half precision is not clamped.

    Arguments:
        shape: (D,), (C, L), (C, H, W) or (C, D, H, W), of any size.
        width: channels of the last layers; the first have up to `growth` times as many.
        layers: between input and output layer, at least 3; None is `default_layers`, 4 for vectors.
        rotation: whether pictures are equivariant to rotations too. 1x1 convolutions need about twice the width.
        margin: samples around the picture; None is `default_margin`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        z_dim: int,
        condition: ConditionSpec | None,
        *,
        w_dim: int,
        width: int,
        mapping_depth: int = 2,
        layers: int | None = None,
        rotation: bool = False,
        margin: int | None = None,
    ) -> None:
        channels, *rest = shape
        space = tuple(rest)
        layers = layers if layers is not None else default_layers(space) if space else 4
        super().__init__(shape, z_dim, w_dim, layers + 2, condition, mapping_depth=mapping_depth)
        if layers <= CRITICAL:
            raise UsageError(f"stylegan3 needs at least {CRITICAL + 1} layers, got layers={layers}")
        if rotation and len(space) != 2:
            raise UsageError(f"stylegan3: rotation=True is for pictures (C, H, W), and data are {shape}; leave it out")
        kernel, dims = 1 if rotation else 3, len(space)
        self.input: nn.Module
        if space:
            margin = default_margin(space) if margin is None else margin
            stages = schedule(space, width=width, layers=layers, margin=margin)
            self.input = FourierInput(stages[0], w_dim)
            pairs = list(zip([stages[0], *stages], stages, strict=False))
            acts: list[nn.Module] = [FilteredActivation(a, b, radial=rotation) for a, b in pairs]
            sizes = [(a.channels, b.channels) for a, b in pairs]
        else:
            self.input = ConstantInput(width)
            acts, sizes = [nn.LeakyReLU(SLOPE, inplace=True) for _ in range(layers)], [(width, width)] * layers
        self.layers = nn.ModuleList(
            ModulatedLayer(dims, a, b, w_dim, kernel, act) for (a, b), act in zip(sizes, acts, strict=True)
        )
        self.layers.append(ModulatedLayer(dims, sizes[-1][1], channels, w_dim, 1, None))

    def synthesis(self, ws: Tensor, noise: Noise | None = None, transform: Tensor | None = None) -> Tensor:
        """y (N, *shape) from ws (N, num_ws, w_dim).

        Arguments:
            noise: unused; there is none.
            transform: homogeneous matrices (N or 1, d+1, d+1) that the picture's coordinates are multiplied by first:
                the inverse of what the picture is to undergo. Axes in the order of `shape`, the centre at 0, the longer
                side of length 1.
        """
        if transform is not None and len(self.shape) == 1:
            raise UsageError(f"stylegan3: vectors {self.shape} have no coordinates to transform; leave out transform")
        y: Tensor = self.input(ws[:, 0], transform)
        for layer, w in zip(self.layers, ws[:, 1:].unbind(1), strict=True):
            y = layer(y, w)
        return y
