"""Particle flows against the formulas written out, against exact moments, and against the Kalman filter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.flow_oracles import normal
from trilemma.core.errors import UsageError
from trilemma.flow.particles import assimilate, map_particles, mixture_score, score_of, stein_direction

COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)


def gaussian_score(x: Tensor, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Tensor:
    return -(x - mean) @ covariance.inverse()


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("covariance", [None, COVARIANCE])
def test_direction_is_the_formula_of_the_paper(kernel: Any, covariance: Tensor | None) -> None:
    """phi(x_i) = 1/N sum_j [k(x_j, x_i) s(x_j) + grad_{x_j} k(x_j, x_i)], the gradient by differentiation."""
    x, s, h = normal(5, 2), normal(5, 2, seed=1), 0.8
    p = torch.eye(2, dtype=torch.float64) if covariance is None else covariance.inverse()

    def k(a: Tensor, b: Tensor) -> Tensor:
        return 1.0 + a @ p @ b if kernel == "linear" else (-0.5 / h**2 * (a - b) @ p @ (a - b)).exp()

    expected = torch.zeros_like(x)
    for i in range(5):
        for j in range(5):
            a = x[j].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(k(a, x[i]), a)
            expected[i] += (k(x[j], x[i]) * s[j] + gradient) / 5
    got = stein_direction(x, s, kernel=kernel, bandwidth=h, covariance=covariance)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_median_heuristic() -> None:
    """Of |x_i - x_j|^2 = 1, 9, 16 the median is 9: h^2 = 9 / (2 log 3)."""
    x, s = torch.tensor([[0.0], [1.0], [4.0]]).double(), normal(3, 1)
    h = math.sqrt(9.0 / (2.0 * math.log(3.0)))
    torch.testing.assert_close(stein_direction(x, s), stein_direction(x, s, bandwidth=h), rtol=0, atol=1e-14)
    with pytest.raises(UsageError, match="coincide"):
        stein_direction(torch.ones(4, 2), torch.ones(4, 2))


def test_one_particle_climbs_to_the_mode() -> None:
    x = map_particles(normal(1, 2), gaussian_score, optimizer="gradient", step_size=0.2, steps=400)
    torch.testing.assert_close(x, MEAN[None], rtol=0, atol=1e-9)


@pytest.mark.parametrize("covariance", [None, COVARIANCE])
def test_linear_kernel_matches_the_moments_of_a_gaussian_exactly(covariance: Tensor | None) -> None:
    settings: dict[str, Any] = {"kernel": "linear", "optimizer": "gradient", "step_size": 0.01, "steps": 6000}
    x = map_particles(MEAN + normal(12, 2), gaussian_score, covariance=covariance, **settings)
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=1e-8)
    torch.testing.assert_close(x.T.cov(correction=0), COVARIANCE, rtol=0, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["gradient", "adagrad", "adam"])
def test_gaussian_kernel_finds_mean_and_spread(optimizer: Any) -> None:
    """For a symmetric p and start the mean is exact; the variance of 100 particles is 2 % short at the fixed point."""
    start = torch.linspace(-1, 1, 100, dtype=torch.float64).unsqueeze(1)
    x = map_particles(
        3.0 + start,
        lambda x: -(x - 3.0) / 4.0,
        optimizer=optimizer,
        step_size=0.5,
        steps=600,
    )
    assert abs(x.mean().item() - 3.0) < 1e-8
    assert abs(x.var(correction=0).item() / 4.0 - 1.0) < 0.05


def test_score_by_differentiation() -> None:
    def log_density(x: Tensor) -> Tensor:
        return -0.5 * torch.einsum("ni,ij,nj->n", x - MEAN, COVARIANCE.inverse(), x - MEAN)

    x = normal(4, 2)
    with torch.no_grad():
        torch.testing.assert_close(score_of(log_density)(x), gaussian_score(x), rtol=0, atol=1e-12)


def test_score_of_the_mixture_that_forecasts_make() -> None:
    x, means = 2.0 * normal(6, 2), normal(4, 2, seed=1)

    def log_density(x: Tensor) -> Tensor:
        d = x[:, None] - means
        return torch.logsumexp(-0.5 * torch.einsum("nmi,ij,nmj->nm", d, COVARIANCE.inverse(), d), 1)

    torch.testing.assert_close(mixture_score(x, means, COVARIANCE), score_of(log_density)(x), rtol=0, atol=1e-12)


def test_any_shape_and_the_same_twice() -> None:
    x = normal(8, 1, 2, 1)
    kept = x.clone()
    a, b = (map_particles(x, lambda v: -v, steps=20) for _ in range(2))
    assert torch.equal(x, kept)
    assert torch.equal(a, b)
    flat = map_particles(x.flatten(1), lambda v: -v, steps=20)
    torch.testing.assert_close(a.flatten(1), flat, rtol=0, atol=0)


def test_unknown_names_are_refused() -> None:
    bad: Any = "adams"
    with pytest.raises(UsageError, match="did you mean 'adam'"):
        map_particles(normal(3, 2), gaussian_score, optimizer=bad)


def test_filter_follows_the_exact_kalman_filter() -> None:
    """A linear-Gaussian model, whose filter is known.

    The particles start at quantiles of the first density, so what is left is the method's own bias. Over 50 series the
    mean was off by 0.078 of the exact standard deviations at most, and the variance ratios lay in [0.83, 1.06].
    """
    for seed in range(2):
        for distance, variances in kalman_comparison(seed):
            assert distance < 0.1
            assert variances.min().item() > 0.8
            assert variances.max().item() < 1.1


def kalman_comparison(seed: int, times: int = 4) -> list[tuple[float, Tensor]]:
    """For each time, the distance of the means and the eigenvalues of the covariance, both in the exact filter's."""
    dtype = torch.float64
    a, q = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=dtype), torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=dtype)
    h, r = torch.tensor([[1.0, 0.5]], dtype=dtype), torch.tensor([[0.4]], dtype=dtype)
    draws = normal(times + 1, 3, seed=100 + seed)
    truth, mean, covariance = draws[0, :2], torch.zeros(2, dtype=dtype), torch.eye(2, dtype=dtype)
    quantiles = torch.special.ndtri((torch.arange(10, dtype=dtype) + 0.5) / 10)
    x = torch.cartesian_prod(quantiles, quantiles)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    found = []
    for draw in draws[1:]:
        truth = a @ truth + torch.linalg.cholesky(q) @ draw[:2]
        y = h @ truth + r[0].sqrt() * draw[2]
        mean, covariance = a @ mean, a @ covariance @ a.T + q
        gain = covariance @ h.T / (h @ covariance @ h.T + r)
        mean, covariance = mean + gain @ (y - h @ mean), covariance - gain @ h @ covariance

        def observation_score(v: Tensor, y: Tensor = y) -> Tensor:
            return (y - v @ h.T) @ r.inverse() @ h

        x = assimilate(x @ a.T, q, observation_score, steps=250, step_size=0.1, bandwidth=1.0)
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mean).T, upper=False)
        found.append((white.mean(1).norm().item(), torch.linalg.eigvalsh(white.cov())))
    return found
