r"""How well a generator with transformable coordinates commutes with translations and rotations, in decibels.

    EQ-T = 10 log10(I^2 / E |g(t x) - t g(x)|^2),
where t moves the coordinates on the left and the picture on the right, I is the range of the values, and the mean is
over examples, shifts, channels, and the places whose reference lies inside the picture (Karras et al. 2021,
arXiv:2106.12423). EQ-R is the same for rotations.

A picture is moved by whole samples exactly, and by fractions with Lanczos' kernel. A square picture has frequencies
that a rotated one cannot hold, so for rotations both sides pass a filter that is the same in all directions and stops
below the Nyquist frequency: f J_1(2 pi f r) / r with a window cos^2(pi r / 2a), normalised at each place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trilemma.adversarial.stylegan3 import StyleGAN3Generator, homogeneous
from trilemma.core.errors import UsageError

BAND = 0.35
"""Cutoff of the radial filter, in cycles per sample."""


def translation(shift: Tensor) -> Tensor:
    """The transform (M, d+1, d+1) of coordinates that moves a picture by shift (M, d), in units of its longer side."""
    return homogeneous(torch.eye(shift.shape[1]).to(shift).expand(len(shift), -1, -1), -shift)


def rotation(angle: Tensor) -> Tensor:
    """The transform (M, 3, 3) of coordinates that turns a picture by angle (M,), in radians, from axis 0 to axis 1."""
    cos, sin = angle.cos(), angle.sin()
    inverse = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
    return homogeneous(inverse, torch.zeros_like(inverse[:, 0]))


@torch.no_grad()
def eq_t(
    generator: StyleGAN3Generator, ws: Tensor, shifts: Tensor, *, value_range: float = 2.0, lobes: int = 3
) -> Tensor:
    """EQ-T in dB, shape ().

    Arguments:
        ws: (N, num_ws, w_dim).
        shifts: (M, d), in samples of the picture, whole or not.
        value_range: I.
        lobes: half the width of Lanczos' kernel, in samples.
    """
    space = generator.shape[1:]
    y, errors = generator.synthesis(ws), []
    for shift in shifts.to(ws):
        moved = generator.synthesis(ws, transform=translation(shift[None] / max(space)))
        reference = y
        for axis, t in enumerate(shift.tolist(), 2):
            matrix, inside = _shift_matrix(y.shape[axis], t, lobes)
            reference = torch.movedim(torch.movedim(reference, axis, -1) @ matrix.to(y)[inside].T, -1, axis)
            moved = moved.index_select(axis, inside.nonzero().squeeze(1).to(y.device))
        errors.append((moved - reference).square().flatten())
    return _decibels(errors, value_range)


def _shift_matrix(n: int, t: float, lobes: int) -> tuple[Tensor, Tensor]:
    """Samples at i - t from samples at 0 .. n - 1: weights (n, n), and where all that they need exist, (n,)."""
    place = torch.arange(n, dtype=torch.float64)
    source = place - t
    if t == round(t):
        return (source.unsqueeze(1) == place).double(), (source >= 0) & (source < n)
    distance = source.unsqueeze(1) - place
    weights = torch.sinc(distance) * torch.sinc(distance / lobes) * (distance.abs() < lobes)
    inside = (source.floor() >= lobes - 1) & (source.ceil() <= n - lobes)
    return weights / weights.sum(1, keepdim=True), inside


@torch.no_grad()
def eq_r(
    generator: StyleGAN3Generator, ws: Tensor, angles: Tensor, *, value_range: float = 2.0, radius: int = 5
) -> Tensor:
    """EQ-R in dB, shape ().

    Arguments:
        ws: (N, num_ws, w_dim).
        angles: (M,), in radians.
        value_range: I.
        radius: a, of the filter's window, in samples.
    """
    if len(generator.shape) != 3:
        raise UsageError(f"EQ-R is measured on pictures (C, H, W), and the generator makes {generator.shape}")
    y, errors = generator.synthesis(ws), []
    identity = torch.eye(3).to(ws)
    for transform in rotation(angles.to(ws)):
        moved = generator.synthesis(ws, transform=transform[None])
        reference, inside = _radial(y, transform, radius)
        smooth, whole = _radial(moved, identity, radius)
        errors.append((smooth - reference)[..., inside & whole].flatten())
    return _decibels([e.square() for e in errors], value_range)


def _radial(y: Tensor, transform: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """The smoothed picture (N, C, H, W) at the transformed places, (N, C, H W), and where all they need exists."""
    size = torch.tensor(y.shape[2:], device=y.device)
    axes = [torch.arange(n, dtype=y.dtype, device=y.device) - (n - 1) / 2 for n in y.shape[2:]]
    grid = torch.stack([g.flatten() for g in torch.meshgrid(axes, indexing="ij")], 1)
    source = grid @ transform[:2, :2].T + transform[:2, 2] + (size - 1) / 2
    base = source.floor().long()
    inside = ((base >= radius - 1) & (base + radius < size)).all(1)
    result, total = torch.zeros_like(y.flatten(2)), torch.zeros_like(source[:, 0])
    for offset in torch.cartesian_prod(*[torch.arange(1 - radius, radius + 1, device=y.device)] * 2):
        place = base + offset
        r = (source - place).norm(dim=1).clamp(min=1e-6)
        window = torch.cos(0.5 * math.pi * r / radius).square() * (r < radius)
        weight = torch.special.bessel_j1(2 * math.pi * BAND * r) / r * window
        index = torch.minimum(place.clamp(min=0), size - 1)
        result += weight * y[:, :, index[:, 0], index[:, 1]]
        total += weight
    return result / total, inside


def _decibels(squares: list[Tensor], value_range: float) -> Tensor:
    values = torch.cat(squares)
    if not len(values):
        raise UsageError("no place of the picture has all it needs inside the picture; take smaller shifts or filters")
    return 10.0 * torch.log10(value_range**2 / values.mean())
