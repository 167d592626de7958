r"""The variational bound of the discrete diffusion, term by term and in nats.

    -log p(x) <= L_T + sum_{t=2}^T L_{t-1} + L_0                            (`trilemma.diffusion.schedule`)
    L_T     = KL(N(alpha_T x, sigma_T^2) || N(0, I))
    L_{t-1} = E KL(N(a_t x + b_t z_t, btilde_t) || N(a_t xhat + b_t z_t, s_t^2))
            = E [ D/2 (btilde/s^2 - 1 - log btilde/s^2) + a_t^2 |x - xhat|^2 / (2 s_t^2) ]
    L_0     = E [ -log p(x | z_1) ]

For real data p(x | z_1) = N(xhat, s_1^2 I). For data on a lattice it is the mass of that Gaussian in the cell of x,
the outermost cells reaching to infinity (Ho et al. 2020, arXiv:2006.11239, eq. 13): a probability.

The sum over t costs T evaluations of the network. A stratified sum costs as many as one likes: 1 .. T is cut into
strata of n_k steps, in each of which two t are drawn; sum_k n_k (L_{t_k1} + L_{t_k2}) / 2 has the right mean and
    Var = sum_k n_k^2 (L_{t_k1} - L_{t_k2})^2 / 4
estimates its variance without bias.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from trilemma.diffusion.prediction import like
from trilemma.diffusion.schedule import Schedule


def gaussian_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std^2 I), summed over all but the first dimension: (N,)."""
    z = (x - mean) / std
    return (-0.5 * z.square() - math.log(std) - 0.5 * math.log(2.0 * math.pi)).flatten(1).sum(1)


def lattice_log_prob(x: Tensor, mean: Tensor, std: float, levels: int) -> Tensor:
    """log of the mass of N(mean, std^2) in the cell of each x, summed over all but the first dimension: (N,).

    Arguments:
        x: (N, *) on the centres (2 k + 1) / levels - 1 of `levels` cells of [-1, 1].
    """
    half = 1.0 / levels
    low = torch.where(x < -1.0 + 1.5 * half, -math.inf, (x - half - mean) / std)
    high = torch.where(x > 1.0 - 1.5 * half, math.inf, (x + half - mean) / std)
    # Phi(high) - Phi(low) is computed in the lower tail, where differences keep their digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    log_mass: Tensor = log_high + torch.log(-torch.expm1(log_low - log_high))
    return log_mass.flatten(1).sum(1)


def prior_term(schedule: Schedule, x: Tensor) -> Tensor:
    """L_T (N,)."""
    alpha2, sigma2 = float(schedule.alpha_bar[-1]), float(schedule.variance[-1])
    return 0.5 * (alpha2 * x.square() + sigma2 - 1.0 - math.log(sigma2)).flatten(1).sum(1)


def bound_term(schedule: Schedule, s2: Tensor, t: Tensor, x: Tensor, x_hat: Tensor, levels: int | None) -> Tensor:
    """L_{t-1} (N,), or L_0 where t = 1, for one prediction x_hat(z_t).

    Arguments:
        s2: (T + 1,) float64, the reverse variances.
        t: (N,) int64 in 1 .. T, on the CPU.
        x, x_hat: (N, *), float64 for digits that survive the large SNRs.
        levels: number of cells of the lattice on which x lies, or None.
    """
    ratio = schedule.posterior_variance[t] / s2[t]
    # At t = 1 the posterior is a point and the divergence infinite: L_0 takes its place.
    mismatch = torch.where(t > 1, 0.5 * (ratio - 1.0 - ratio.log()), 0.0) * x[0].numel()
    error = like(schedule.posterior_x[t].square() / (2.0 * s2[t]), x) * (x - x_hat).square()
    kl = mismatch.to(x.device) + error.flatten(1).sum(1)
    std = math.sqrt(float(s2[1]))
    last = gaussian_log_prob(x, x_hat, std) if levels is None else lattice_log_prob(x, x_hat, std, levels)
    return torch.where((t > 1).to(x.device), kl, -last)


def strata(total: int, count: int) -> list[tuple[int, int]]:
    """Cut 1 .. total into at most `count` ranges (first, size): {1} alone, then growing, since terms fall with t."""
    edges = [1]
    for k in range(count):
        edges.append(max(edges[-1] + 1, 2 + round((total - 1) * (k / max(1, count - 1)) ** 2)))
    edges = sorted({min(e, total + 1) for e in edges} | {total + 1})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]
