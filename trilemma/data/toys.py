r"""Toy distributions whose density is known exactly, to judge every model against the truth.

eight-gaussians, gaussian-mixture: p(x) = sum_k w_k N(x; m_k, s_k^2 I).

ring: a point uniform on the circle of radius R plus N(0, s^2 I). In polar coordinates (Rice 1945)
    p(x) = 1 / (2 pi s^2) exp(-(r^2 + R^2) / (2 s^2)) I_0(r R / s^2),   r = |x|.

two-moons, spiral: a point c(t) of a curve plus N(0, s^2 I), t in [0, T] with density a t^(a-1) / T^a:
    p(x) = int_0^T N(x; c(t), s^2 I) a t^(a-1) / T^a dt,
by composite 16-point Gauss-Legendre quadrature on panels at most a few s long, exact to rounding.

checkerboard: uniform on the 8 black squares of a 4 x 4 board on [-4, 4]^2, so p = 1/32 there and 0 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trilemma.core.noise import Noise
from trilemma.core.spec import Batch

F64 = torch.float64


class Toy:
    """A distribution on R^dim that can be sampled and whose density is known.

    Attributes:
        dim: dimension of x.
        classes: names of the classes that come with each x, or ().
    """

    dim: int = 2
    classes: tuple[str, ...] = ()

    def sample(self, n: int, noise: Noise) -> Batch:
        """n points (n, dim) in float64, and their classes (n,) if there are any; `noise` has n samples too."""
        raise NotImplementedError

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) (N,) in float64, of x (N, dim)."""
        raise NotImplementedError

    def box(self) -> tuple[Tensor, Tensor, float]:
        """Corners (dim,) of a box that holds all but a negligible part, and the smallest standard deviation."""
        raise NotImplementedError

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes (M, dim) and weights (M,) with sum_m w_m f(x_m) ~ int f(x) dx for f of about p's smoothness.

        A regular grid of 0.6 standard deviations: for Gaussians its error is exp(-2 pi^2 / 0.6^2), below rounding.
        Nodes whose density is below 1e-16 of the largest are left out.
        """
        low, high, std = self.box()
        step = 0.6 * std
        axes = [torch.arange(float(a), float(b) + step, step, dtype=F64) for a, b in zip(low, high, strict=True)]
        x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, self.dim)
        log_p = self.log_density(x)
        x = x[log_p > log_p.max() + math.log(1e-16)]
        return x, torch.full((len(x),), step**self.dim, dtype=F64)


class Mixture(Toy):
    """sum_k w_k N(m_k, s_k^2 I); the class is k."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        self.means, self.stds, self.weights = means, stds, weights
        self.dim = means.shape[1]
        self.classes = tuple(str(k) for k in range(len(weights)))

    def box(self) -> tuple[Tensor, Tensor, float]:
        reach = 9.0 * self.stds[:, None]
        return (self.means - reach).amin(0), (self.means + reach).amax(0), float(self.stds.min())

    def sample(self, n: int, noise: Noise) -> Batch:
        k = noise.categorical(self.weights)
        return Batch(self.means[k] + self.stds[k, None] * noise.normal(self.dim, dtype=F64), k)

    def log_density(self, x: Tensor) -> Tensor:
        means, stds, weights = (t.to(x.device) for t in (self.means, self.stds, self.weights))
        squares = (x.double()[:, None] - means).square().sum(-1)
        logs = weights.log() - 0.5 * squares / stds**2 - self.dim * (stds.log() + 0.5 * math.log(2.0 * math.pi))
        return logs.logsumexp(1)


class Ring(Toy):
    """Uniform on a circle plus isotropic noise."""

    def __init__(self, radius: float, std: float) -> None:
        self.radius, self.std = radius, std

    def box(self) -> tuple[Tensor, Tensor, float]:
        corner = torch.full((2,), self.radius + 9.0 * self.std, dtype=F64)
        return -corner, corner, self.std

    def sample(self, n: int, noise: Noise) -> Batch:
        angle = 2.0 * math.pi * noise.uniform(dtype=F64)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        return Batch(self.radius * circle + self.std * noise.normal(2, dtype=F64))

    def log_density(self, x: Tensor) -> Tensor:
        r, variance = x.double().norm(dim=1), self.std**2
        # i0e(z) = exp(-z) I_0(z) keeps the exponents from overflowing.
        bessel = torch.special.i0e(r * self.radius / variance).log()
        log_p: Tensor = bessel - 0.5 * (r - self.radius).square() / variance
        return log_p - math.log(2.0 * math.pi * variance)


class Curves(Toy):
    """A point of one of several plane curves, all equally likely, plus isotropic noise.

    Arguments:
        curves: each maps t (N,) in [0, length] to points (N, 2).
        power: a, of the density a t^(a-1) / length^a of t.
        panels: of the quadrature over t.
    """

    def __init__(
        self, curves: tuple[Callable[[Tensor], Tensor], ...], length: float, power: int, std: float, panels: int
    ) -> None:
        self.curves, self.length, self.power, self.std, self.panels = curves, length, power, std, panels
        self.classes = tuple(str(k) for k in range(len(curves))) if len(curves) > 1 else ()

    def box(self) -> tuple[Tensor, Tensor, float]:
        points = self._quadrature[0]
        return points.amin(0) - 9.0 * self.std, points.amax(0) + 9.0 * self.std, self.std

    def sample(self, n: int, noise: Noise) -> Batch:
        which = noise.categorical(torch.ones(len(self.curves)))
        t = self.length * noise.uniform(dtype=F64) ** (1.0 / self.power)
        points = torch.stack([curve(t) for curve in self.curves])[which, torch.arange(n)]
        return Batch(points + self.std * noise.normal(2, dtype=F64), which if self.classes else None)

    @cached_property
    def _quadrature(self) -> tuple[Tensor, Tensor]:
        """Points of the curves (K, 2) and the logarithms of their weights (K,)."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
        width = self.length / self.panels
        starts = width * torch.arange(self.panels, dtype=F64)
        t = (starts[:, None] + 0.5 * width * (nodes + 1.0)).flatten()
        w = (0.5 * width * weights).repeat(self.panels)
        w = w * self.power * t ** (self.power - 1) / self.length**self.power / len(self.curves)
        return torch.cat([curve(t) for curve in self.curves]), w.log().repeat(len(self.curves))

    def log_density(self, x: Tensor) -> Tensor:
        points, log_weights = (t.to(x.device) for t in self._quadrature)
        parts = []
        for rows in torch.split(x.double(), 1024):
            # Distances from differences: the shortcut by a matrix product would cancel digits.
            distance = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
            parts.append((log_weights - 0.5 * distance.square() / self.std**2).logsumexp(1))
        return torch.cat(parts) - math.log(2.0 * math.pi * self.std**2)


class Checkerboard(Toy):
    """Uniform on the black squares (side 2) of a 4 x 4 board on [-4, 4]^2."""

    def sample(self, n: int, noise: Noise) -> Batch:
        square = noise.integers(8)
        row = square // 2
        column = 2 * (square % 2) + row % 2
        return Batch(2.0 * (torch.stack([column, row], 1) - 2.0 + noise.uniform(2, dtype=F64)))

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """16 x 16 Gauss-Legendre nodes in each black square."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
        inside = torch.cartesian_prod(nodes, nodes) + 1.0
        square = torch.arange(8)
        corner = torch.stack([2 * (square % 2) + (square // 2) % 2, square // 2], 1).double() * 2.0 - 4.0
        return (corner[:, None] + inside).reshape(-1, 2), torch.outer(weights, weights).flatten().repeat(8)

    def log_density(self, x: Tensor) -> Tensor:
        cell = (x.double() / 2.0).floor()
        black = (cell.sum(1).remainder(2.0) == 0.0) & (cell >= -2.0).all(1) & (cell < 2.0).all(1)
        return torch.where(black, 0.0, -torch.inf).to(F64) - math.log(32.0)


def _eight_gaussians() -> Mixture:
    angle = torch.arange(8, dtype=F64) * math.pi / 4.0
    means = 2.0 * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(means, torch.full((8,), 0.2, dtype=F64), torch.full((8,), 0.125, dtype=F64))


def _gaussian_mixture() -> Mixture:
    means, stds, weights = ([[-2.0], [0.0], [2.5]], [0.3, 0.5, 0.8], [0.25, 0.45, 0.3])
    return Mixture(torch.tensor(means, dtype=F64), torch.tensor(stds, dtype=F64), torch.tensor(weights, dtype=F64))


def _upper_moon(t: Tensor) -> Tensor:
    return torch.stack([t.cos(), t.sin()], 1)


def _lower_moon(t: Tensor) -> Tensor:
    return torch.stack([1.0 - t.cos(), 0.5 - t.sin()], 1)


def _spiral(t: Tensor) -> Tensor:
    return torch.stack([t * t.cos(), t * t.sin()], 1) / math.pi


TOYS: dict[str, Toy] = {
    "eight-gaussians": _eight_gaussians(),
    "ring": Ring(radius=2.0, std=0.2),
    "two-moons": Curves((_upper_moon, _lower_moon), length=math.pi, power=1, std=0.1, panels=64),
    "checkerboard": Checkerboard(),
    "spiral": Curves((_spiral,), length=3.0 * math.pi, power=2, std=0.1, panels=192),
    "gaussian-mixture": _gaussian_mixture(),
}
