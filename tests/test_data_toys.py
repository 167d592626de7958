"""Toys: their densities integrate to one and are those of their samples."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from trilemma.core.noise import Noise
from trilemma.data import load_data
from trilemma.data.builtin import TOY_EXAMPLES
from trilemma.data.toys import TOYS, Ring

F64 = torch.float64
HALF = {"two-moons": 3.0, "checkerboard": 4.0}


def cell_probabilities(name: str, cells: int, nodes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the cells of a cube and each cell's probability, by Gauss-Legendre quadrature in it."""
    toy, half = TOYS[name], HALF.get(name, 6.0)
    edges = np.linspace(-half, half, cells + 1)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    width = 2 * half / cells
    grid = torch.from_numpy((edges[:-1, None] + 0.5 * width * (points + 1)).ravel())
    w = np.tile(0.5 * width * weights, cells)
    if toy.dim == 1:
        density = toy.log_density(grid[:, None]).exp().numpy() * w
        return edges, density.reshape(cells, nodes).sum(1)
    x = torch.cartesian_prod(grid, grid)
    density = toy.log_density(x).exp().numpy().reshape(len(grid), -1) * w[:, None] * w
    return edges, density.reshape(cells, nodes, cells, nodes).sum((1, 3))


@pytest.mark.parametrize("name", TOYS)
def test_density_integrates_to_one_and_is_that_of_the_samples(name):
    toy, n = TOYS[name], 20_000
    edges, p = cell_probabilities(name, 16 if toy.dim == 2 else 60)
    assert abs(p.sum() - 1.0) < 1e-4
    x = toy.sample(n, Noise("test", name, n=n)).x.numpy()
    assert x.shape == (n, toy.dim)
    counts = np.histogramdd(x, [edges] * toy.dim)[0].ravel()
    expected = n * p.ravel()
    rare = expected < 5
    observed = np.append(counts[~rare], n - counts[~rare].sum())
    expected = np.append(expected[~rare], n - expected[~rare].sum())
    use = expected > 1
    statistic = ((observed - expected)[use] ** 2 / expected[use]).sum()
    # False-alarm rate 1e-6 (the seed is fixed).
    assert statistic < chi2.isf(1e-6, use.sum() - 1), statistic


def test_ring_is_the_integral_over_its_circle():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.3, 1.4], [0.1, -3.0]], dtype=F64)
    angle = torch.arange(4000, dtype=F64) * 2 * math.pi / 4000
    centres = 2.0 * torch.stack([angle.cos(), angle.sin()], 1)
    squares = (x[:, None] - centres).square().sum(-1)
    expected = (-0.5 * squares / 0.04 - math.log(2 * math.pi * 0.04)).logsumexp(1) - math.log(4000)
    torch.testing.assert_close(Ring(2.0, 0.2).log_density(x), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("name", "panels"), [("two-moons", 500), ("spiral", 1500)])
def test_quadrature_has_converged(name, panels):
    toy = TOYS[name]
    fine = type(toy)(toy.curves, toy.length, toy.power, toy.std, panels)
    x = torch.cat([toy.sample(500, Noise("test", n=500)).x, 1.5 * Noise("far", n=50).normal(2, dtype=F64)])
    torch.testing.assert_close(toy.log_density(x), fine.log_density(x), rtol=1e-11, atol=1e-10)


def test_mixture_classes_are_the_components():
    toy = TOYS["gaussian-mixture"]
    batch = toy.sample(50_000, Noise("test", n=50_000))
    for k, (mean, std, weight) in enumerate(zip(toy.means[:, 0], toy.stds, toy.weights, strict=True)):
        part = batch.x[batch.condition == k, 0]
        # 5 sigma: false-alarm rate 6e-7 each.
        assert abs(len(part) / 50_000 - weight) < 5 * math.sqrt(weight * (1 - weight) / 50_000)
        assert abs(part.mean() - mean) < 5 * std / math.sqrt(len(part))
        assert abs(part.std() - std) < 5 * std / math.sqrt(2 * len(part))


@pytest.mark.parametrize("name", TOYS)
def test_toys_load_with_their_density(name):
    data = load_data(name)
    assert sum(len(split) for split in data.splits.values()) == TOY_EXAMPLES
    assert data.spec.kind == "points"
    assert data.source == {"source": name}
    # Rounding to float32 must not push a point off the board.
    for split in data.splits.values():
        assert data.density.log_density(split.x).isfinite().all()
    assert load_data(name).fingerprint == data.fingerprint


@pytest.mark.parametrize("name", sorted(TOYS))
def test_quadrature_integrates_the_density_to_one_and_its_moments(name: str) -> None:
    toy = TOYS[name]
    x, w = toy.quadrature()
    p = toy.log_density(x).exp()
    assert float(w @ p) == pytest.approx(1.0, abs=1e-9)
    sample = toy.sample(20_000, Noise("quadrature", n=20_000)).x
    error = sample.std(0) / math.sqrt(20_000)
    assert bool(((w * p) @ x - sample.mean(0)).abs().le(5.0 * error).all())  # false alarm: 1e-6
