r"""The variational bound, term by term and in nats, of the reverse chain through times t_1 < ... < t_T.

    -log p(x) <= L_T + sum_{i=2}^T L_{i-1} + L_0                       (Ho et al. 2020, arXiv:2006.11239)
    L_T     = KL(N(alpha_T x, sigma_T^2) || prior)
    L_{i-1} = E KL(q(z_s | z_t, x) || p(z_s | z_t)),    t = t_i, s = t_{i-1}
            = E sum_d [ log(v/w) + w/v - 1 + a^2 (x - xhat)^2 / v ] / 2,      w the posterior's variance, v the model's
    L_0     = E [ -log p(x | z_{t_1}) ]
At v = w the sum over d is (SNR(s) - SNR(t)) |x - xhat|^2 / 2 (Kingma et al. 2021, arXiv:2107.00630).

For real data p(x | z) = N(xhat, v). For data on a lattice it is the mass of that Gaussian in the cell of x, the
outermost cells reaching to infinity (Ho et al. 2020, eq. 13): a probability.

The sum costs T evaluations of the network. A stratified sum costs as many as one likes: 1 .. T is cut into
strata of n_k steps, in each of which two are drawn; sum_k n_k (L_k1 + L_k2) / 2 has the right mean and
    Var = sum_k n_k^2 (L_k1 - L_k2)^2 / 4
estimates its variance without bias.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.core.noise import Noise
from trilemma.diffusion.denoiser import Denoiser, Estimate
from trilemma.diffusion.schedule import NoiseSchedule, like


def log_normal_density(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """log N(x; mean, variance) of numbers, elementwise."""
    variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
    return -0.5 * ((x - mean).square() / variance + variance.log() + math.log(2.0 * math.pi))


def gaussian_log_prob(x: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
    """log N(x; mean, variance I), summed over all but the first dimension: (N,)."""
    return log_normal_density(x, mean, variance).flatten(1).sum(1)


def lattice_log_prob(x: Tensor, mean: Tensor, variance: Tensor | float, levels: int) -> Tensor:
    """log of the mass of N(mean, variance) in the cell of each x, summed over all but the first dimension: (N,).

    Arguments:
        x: (N, *) on the centres (2 k + 1) / levels - 1 of `levels` cells of [-1, 1].
    """
    half, std = 1.0 / levels, torch.as_tensor(variance, dtype=x.dtype, device=x.device).sqrt()
    low = torch.where(x < -1.0 + 1.5 * half, -math.inf, (x - half - mean) / std)
    high = torch.where(x > 1.0 - 1.5 * half, math.inf, (x + half - mean) / std)
    # Phi(high) - Phi(low) is computed in the lower tail, where differences keep their digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    log_mass: Tensor = log_high + torch.log(-torch.expm1(log_low - log_high))
    return log_mass.flatten(1).sum(1)


def prior_term(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """L_T (N,) of x (N, *) float64; its gradient reaches a learned schedule."""
    last, prior = schedule.times[1].to(x.device), schedule.prior_std**2
    square, ratio = schedule.alpha(last).square() / prior, schedule.sigma(last).square() / prior
    return 0.5 * (square * x.square() + ratio - 1.0 - ratio.log()).flatten(1).sum(1)


def bound_term(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, x: Tensor, estimate: Estimate) -> Tensor:
    """L_{i-1} (N,) for z_t and what the denoiser says of it; t, s (N,); float64."""
    back = denoiser.schedule.back(t, s)
    variance = torch.as_tensor(denoiser.reverse_variance(z, t, s, estimate.spread), dtype=torch.float64)
    small, x_weight = torch.as_tensor(like(back.small, x)), torch.as_tensor(like(back.x_weight, x))
    ratio = small / variance
    terms = ratio - 1.0 - ratio.log() + x_weight.square() * (x - estimate.x.double()).square() / variance
    return 0.5 * terms.flatten(1).sum(1)


def data_term(denoiser: Denoiser, z: Tensor, t: Tensor, x: Tensor, estimate: Estimate, levels: int | None) -> Tensor:
    """L_0 (N,) for z at the first time."""
    variance = denoiser.reverse_variance(z, t, None, estimate.spread)
    mean = estimate.x.double()
    if levels is None:
        return -gaussian_log_prob(x, mean, variance)
    return -lattice_log_prob(x, mean, variance, levels)


def strata(total: int, count: int) -> list[tuple[int, int]]:
    """Cut 1 .. total into at most `count` ranges (first, size): {1} alone, then growing, since terms fall with t."""
    edges = [1]
    for k in range(count):
        edges.append(max(edges[-1] + 1, 2 + round((total - 1) * (k / max(1, count - 1)) ** 2)))
    edges = sorted({min(e, total + 1) for e in edges} | {total + 1})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def chain_term(
    denoiser: Denoiser, times: Tensor, index: Tensor, z: Tensor, x: Tensor, estimate: Estimate, levels: int | None
) -> Tensor:
    """L_{index - 1} (N,) for what the denoiser says of z at the index-th time; everything in float64.

    Arguments:
        times: (T + 1,) rising; entry 0 is unused.
        index: (N,) in 1 .. T.
    """
    t, first = times[index], index == 1
    s = torch.where(first, 0.5 * t, times[(index - 1).clamp(min=1)])  # any s < t where L_0 takes the place
    value = torch.zeros_like(t) if first.all() else bound_term(denoiser, z, t, s, x, estimate)
    if not first.any():
        return value
    return torch.where(first, data_term(denoiser, z, times[1].expand_as(t), x, estimate, levels), value)


class Terms(NamedTuple):
    """The bound's parts in nats, float64; -log p(x) <= prior + steps.sum(1) + data.

    Attributes:
        prior: L_T (N,). data: L_0 (N,).
        steps: L_1 .. L_{T-1} (N, T - 1), one draw of each.
        times: (T,) t_1 .. t_T: L_{i-1} is the step from t_i to t_{i-1}.
    """

    prior: Tensor
    steps: Tensor
    data: Tensor
    times: Tensor


def bound_terms(denoiser: Denoiser, times: Tensor, x: Tensor, noise: Noise, levels: int | None) -> Terms:
    """Every term of the bound, at one draw of its noise: T evaluations of the network.

    Arguments:
        times: (T,) rising.
        levels: number of cells of the lattice on which x lies, or None.
    """
    padded = torch.cat([times.new_zeros(1), times]).to(x.device)
    draws = [
        _draw(denoiser, padded, torch.full((len(x),), i, device=x.device), x, noise, levels)
        for i in range(1, len(times) + 1)
    ]
    found = torch.stack(draws, 1)
    return Terms(prior_term(denoiser.schedule, x.double()), found[:, 1:], found[:, 0], times)


def _draw(denoiser: Denoiser, times: Tensor, index: Tensor, x: Tensor, noise: Noise, levels: int | None) -> Tensor:
    """L_{index - 1} (N,) at one draw of the noise."""
    schedule, t = denoiser.schedule, times[index]
    z = like(schedule.alpha(t), x) * x + like(schedule.sigma(t), x) * noise.normal_like(x)
    return chain_term(denoiser, times, index, z.double(), x.double(), denoiser.estimate(z, t), levels)


def variational_bound(
    denoiser: Denoiser, times: Tensor, x: Tensor, noise: Noise, levels: int | None, evaluations: int | None
) -> tuple[Tensor, Tensor | None]:
    """An unbiased estimate of the bound on log p(x) (N,) and its standard error (N,), float64.

    Arguments:
        times: (T,) rising, t_1 .. t_T.
        levels: number of cells of the lattice on which x lies, or None.
        evaluations: of the network for each x, two in each of half as many strata; None for every term once, without
            a standard error.
    """
    total = len(times)
    times = torch.cat([times.new_zeros(1), times]).to(x.device)
    everything = evaluations is None or evaluations >= total
    ranges = [(i, 1) for i in range(1, total + 1)] if everything else strata(total, (evaluations or 0) // 2)
    value, square = -prior_term(denoiser.schedule, x.double()), x.new_zeros(len(x), dtype=torch.float64)
    for first, size in ranges:
        count = 1 if everything else 2
        draws = [_draw(denoiser, times, first + noise.integers(size), x, noise, levels) for _ in range(count)]
        value = value - size * torch.stack(draws).mean(0)
        square = square + (size * (draws[0] - draws[-1])).square() / 4.0
    return value, None if everything else square.sqrt()
