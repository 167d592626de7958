r"""Flows of particles: a sample moved towards a density that is known up to its constant, by kernels and scores.

Stein variational gradient descent (Liu & Wang 2016, arXiv:1608.04471) moves N particles along
    phi(x) = 1/N sum_j [k(x_j, x) grad log p(x_j) + grad_{x_j} k(x_j, x)],
the direction in the kernel's space in which KL(particles || p) falls fastest. Each small step x + eps phi(x) is an
invertible map, their composition a flow; but it is made for its particles, and nothing is learned from data.

Kernels:
- "gaussian", k(x, x') = exp(-|x - x'|^2 / (2 h^2)), |.| the Mahalanobis distance where a covariance is given. Without
  a bandwidth h, h^2 = median |x_i - x_j|^2 / (2 log N) over the pairs (the median heuristic there, section 4);
- "linear", k(x, x') = 1 + x.x': its fixed points have the mean and the covariance of a Gaussian p exactly, as soon as
  the particles span the space (Liu & Wang 2018, arXiv:1810.11693).

The mapping particle filter (Pulido & van Leeuwen 2019, J. Comput. Phys. 396, 400; arXiv:1805.10543) is the analysis
step of a state-space model x_k = M(x_{k-1}) + N(0, Q) in this form: with the particles of time k - 1 the prior is
    p(x_k | y_1 .. y_{k-1}) = 1/N sum_j N(x_k; M(x_{k-1}^j), Q),
whose score is known, and the flow takes the particles to its product with p(y_k | x_k). No weights, no resampling.

Particles are moved all together, so samples depend on each other: more particles are not further draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trilemma.core.errors import UsageError, unknown_name

ScoreFunction = Callable[[Tensor], Tensor]
"""Particles (N, *) -> grad log p (N, *)."""
KernelName = Literal["gaussian", "linear"]
OptimizerName = Literal["gradient", "adagrad", "adam"]
KERNELS, OPTIMIZERS = ("gaussian", "linear"), ("gradient", "adagrad", "adam")


def score_of(log_density: Callable[[Tensor], Tensor]) -> ScoreFunction:
    """The score of an unnormalised log-density (N, *) -> (N,), by automatic differentiation."""

    def score(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(log_density(x).sum(), x)[0]

    return score


def stein_direction(
    x: Tensor,
    score: Tensor,
    *,
    kernel: KernelName = "gaussian",
    bandwidth: float | None = None,
    covariance: Tensor | None = None,
) -> Tensor:
    """phi at the particles x (N, D) with their scores (N, D); (N, D).

    Arguments:
        kernel: see the head of this file.
        bandwidth: h > 0 of the Gaussian kernel; None is the median heuristic.
        covariance: (D, D) of the kernel's scalar product x^T C^-1 x' and distance; None is the identity.
    """
    n = x.shape[0]
    scaled = x if covariance is None else torch.linalg.solve(covariance, x.T).T  # C^-1 x
    if kernel == "linear":
        return ((1.0 + x @ scaled.T) @ score) / n + scaled
    white = x if covariance is None else _whiten(x, covariance)
    squared = torch.cdist(white, white, compute_mode="donot_use_mm_for_euclid_dist").square()
    variance = _median_variance(white) if bandwidth is None else bandwidth**2
    k = (-0.5 / variance * squared).exp()
    # grad_{x_j} k(x_j, x_i) = k C^-1 (x_i - x_j) / h^2; its sum over j takes a product, not N^2 differences.
    repulsion = (k.sum(1, keepdim=True) * scaled - k @ scaled) / variance
    return (k @ score + repulsion) / n


def _whiten(x: Tensor, covariance: Tensor) -> Tensor:
    """L^-1 x for C = L L^T."""
    white: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.T, upper=False)
    return white.T


def _median_variance(x: Tensor) -> float:
    """The median heuristic's h^2 for particles (N, D)."""
    if len(x) == 1:
        return 1.0  # k(x, x) = 1 for every h
    median = torch.pdist(x).median().item()
    if median == 0.0:
        raise UsageError("most particles coincide, so the median heuristic gives no bandwidth: give one")
    return median**2 / (2.0 * math.log(len(x)))


def map_particles(
    particles: Tensor,
    score: ScoreFunction,
    *,
    steps: int = 500,
    step_size: float = 0.1,
    optimizer: OptimizerName = "adam",
    kernel: KernelName = "gaussian",
    bandwidth: float | None = None,
    covariance: Tensor | None = None,
) -> Tensor:
    """The particles (N, *) after `steps` steps along phi: a function of its arguments, without random draws.

    Arguments:
        score: grad log p of particles (N, *); see `score_of` for densities without a formula of it.
        step_size: of the plain gradient step, or the learning rate of Adagrad or Adam.
        kernel, bandwidth, covariance: of `stein_direction`, on flat particles.
    """
    for name, value, known in (("kernel", kernel, KERNELS), ("optimizer", optimizer, OPTIMIZERS)):
        if value not in known:
            raise unknown_name(name, value, known)
    with torch.no_grad():
        x = particles.detach().flatten(1).clone().requires_grad_()
        rule: torch.optim.Optimizer = {
            "gradient": torch.optim.SGD,
            "adagrad": torch.optim.Adagrad,
            "adam": torch.optim.Adam,
        }[optimizer]([x], lr=step_size)
        for _ in range(steps):
            at = x.detach()
            s = score(at.view(particles.shape)).flatten(1)
            x.grad = -stein_direction(at, s, kernel=kernel, bandwidth=bandwidth, covariance=covariance)
            rule.step()
    return x.detach().view(particles.shape)


def mixture_score(x: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """grad log 1/N sum_j N(x; means_j, Q) of x (M, D) for means (N, D) and Q (D, D); (M, D)."""
    distance = torch.cdist(_whiten(x, covariance), _whiten(means, covariance))
    weights = (-0.5 * distance.square()).softmax(1)
    solved: Tensor = torch.linalg.solve(covariance, (weights @ means - x).T)
    return solved.T


def assimilate(
    forecast: Tensor,
    model_covariance: Tensor,
    observation_score: ScoreFunction,
    *,
    start: Tensor | None = None,
    covariance: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """One step of the mapping particle filter: particles (N, D) of p(x_k | y_1 .. y_k).

    Arguments:
        forecast: M(x_{k-1}^j) (N, D), the particles of the last time under the model without its noise.
        model_covariance: Q (D, D), positive definite.
        observation_score: x (N, D) -> grad_x log p(y_k | x) (N, D).
        start: (N, D) where the flow begins, such as the forecast with noise of covariance Q; None is the forecast.
        covariance: of the kernel, Q where it is None.
        settings: of `map_particles`.
    """

    def score(x: Tensor) -> Tensor:
        return mixture_score(x, forecast, model_covariance) + observation_score(x)

    return map_particles(
        forecast if start is None else start,
        score,
        covariance=model_covariance if covariance is None else covariance,
        **settings,
    )
