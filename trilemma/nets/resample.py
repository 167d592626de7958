r"""Resampling of signals, pictures and volumes with a low-pass filter h, the same along each axis.

    y[m] = sum_n x[n] h[down m - up n + K - 1 - before]
which is: put up - 1 zeros behind each sample, pad, convolve with h (K taps), keep every down-th sample. Without the
filter, doubling folds a mirror image of the spectrum into the picture, and halving folds what is above the new Nyquist
frequency into what is below (aliasing).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
BINOMIAL = (1.0, 3.0, 3.0, 1.0)
"""The filter of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), to be divided by its sum."""

JOINT = 144
"""Taps up to which one pass over all axes beats one pass for each: memory, not arithmetic, is the limit."""


def taps_of(weights: Sequence[float]) -> Tensor:
    """A filter that keeps constants: the weights over their sum, (K,)."""
    taps = torch.tensor(weights, dtype=torch.float64)
    return (taps / taps.sum()).to(torch.get_default_dtype())


def channels_last(x: Tensor) -> Tensor:
    """Pictures and volumes in the memory format in which CPUs convolve fastest, (N, *space, C); others as they are.

    Filters take two to five times less time in it, ordinary convolutions up to two times less.
    """
    if x.device.type != "cpu" or x.ndim not in (4, 5):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def lay_out(network: nn.Module) -> None:
    """Kernels of pictures in the memory order in which they are applied fastest."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def upfirdn(x: Tensor, taps: Tensor, *, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """x (N, C, *space) -> (N, C, *space'), with the same separable filter `taps` (K,) for all axes and channels.

    A side of length L becomes (up L + sum(padding) - K) // down + 1 long. Multiply by up^dims to keep the mean.
    Negative padding crops. Vectors (N, C) stay as they are.
    """
    dims = x.ndim - 2
    if dims and len(taps) ** dims <= JOINT:
        return _filter(x, taps, up, down, padding, range(dims))
    for axis in range(dims):
        x = _filter(x, taps, up, down, padding, range(axis, axis + 1))
    return x


def _filter(x: Tensor, taps: Tensor, up: int, down: int, padding: tuple[int, int], axes: range) -> Tensor:
    """One pass over some of the axes of space."""
    dims, channels, size = x.ndim - 2, x.shape[1], len(taps)
    taps = taps.to(x.dtype)
    taps = taps if up > 1 else taps.flip(0)
    kernel = taps
    for _ in axes[1:]:
        kernel = kernel.unsqueeze(-1) * taps
    kernel = kernel.reshape([size if i in axes else 1 for i in range(dims)]).expand(channels, 1, *[-1] * dims)
    before, after = padding
    if up == 1:
        x, inside = _split_padding(x, before, after, axes)
        return CONV[dims](x, kernel, stride=_on(axes, dims, down, 1), padding=inside, groups=channels)
    # The transposed convolution gives every place that a sample reaches. It takes the part of the crop that is the
    # same at both ends.
    before, after = before - (size - 1), after - (size - up)
    both = max(min(-before, -after), 0)
    stride, inside = _on(axes, dims, up, 1), _on(axes, dims, both, 0)
    y = CONV_TRANSPOSE[dims](x, kernel, stride=stride, padding=inside, groups=channels)
    y = _pad(y, before + both, after + both, axes)
    for axis in axes if down > 1 else ():
        y = y[(slice(None),) * (2 + axis) + (slice(None, None, down),)]
    return y


def _on(axes: range, dims: int, value: int, other: int) -> list[int]:
    return [value if i in axes else other for i in range(dims)]


def _split_padding(x: Tensor, before: int, after: int, axes: range) -> tuple[Tensor, list[int]]:
    """x with the padding that only one end has; the rest, which convolutions add themselves without a copy."""
    both = max(min(before, after), 0)
    return _pad(x, before - both, after - both, axes), _on(axes, x.ndim - 2, both, 0)


def _pad(x: Tensor, before: int, after: int, axes: range) -> Tensor:
    if before == after == 0:
        return x
    return F.pad(x, [p for i in reversed(range(x.ndim - 2)) for p in ((before, after) if i in axes else (0, 0))])


def canvas(space: tuple[int, ...], smallest: int = 4) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """(base, doublings, size): a grid whose longer side has `smallest` .. 2 `smallest` - 1 places, doubled so often.

    `size` is at least `space`; what is generated there is cropped to `space`, and what is seen there is padded.

    >>> canvas((28, 28))
    ((7, 7), 2, (28, 28))
    >>> canvas((100, 75))
    ((7, 5), 4, (112, 80))
    """
    doublings = 0
    while max(space) >= 2 * smallest << doublings:
        doublings += 1
    base = tuple(-(-side >> doublings) for side in space)
    return base, doublings, tuple(side << doublings for side in base)


def crop(x: Tensor, space: tuple[int, ...]) -> Tensor:
    """The centre of x (N, C, *size), of the size `space`; padded with zeros where `space` is larger."""
    pads: list[int] = []
    for have, want in zip(reversed(x.shape[2:]), reversed(space), strict=True):
        before = int((want - have) / 2)  # towards 0, so that to crop undoes to pad
        pads += [before, want - have - before]
    return F.pad(x, pads) if any(pads) else x
