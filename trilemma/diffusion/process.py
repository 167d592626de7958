r"""The process itself, for pictures of it: chains by the transitions, the reverse in one dimension, recorded samplers.

    q(z_t | z_s)      = N(alpha_t / alpha_s z_s, sigma_t^2 (1 - SNR(t) / SNR(s)))     one transition, s < t
    q(z_t | x)        = N(alpha_t x, sigma_t^2)                                      the kernel: all of them in one
    q(z_s | z_t, x)   = N(a x + b z_t, small)                                        the reverse where x is known
    q(z_s | z_t)      = q(z_t | z_s) q(z_s) / q(z_t)                                 the reverse where it is not

The last is a Gaussian for Gaussian data, and for all data in the limit of small steps (Feller 1949; Sohl-Dickstein et
al. 2015, arXiv:1503.03585): hence the many steps of a sampler that draws from Gaussians. How far it is from one is
KL(q || N(mean of q, variance of q)).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.diffusion.bound import log_normal_density
from trilemma.diffusion.denoiser import Denoiser
from trilemma.diffusion.exact import MixtureDenoiser
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.schedule import Discrete, NoiseSchedule
from trilemma.diffusion.solvers import Normal, Solver, states

LOG_SNR_SHOWN = 6.0
"""Between this log SNR and its negative a picture of the process has its times, besides the two ends."""

PATH_STEPS = 200
"""Times of a smooth path."""

GRID_POINTS = 4001
"""Nodes of the quadrature in one dimension."""


def transition(schedule: NoiseSchedule, z: Tensor, s: Tensor, t: Tensor, normal: Normal) -> Tensor:
    """A draw of z_t (N, *) given z_s, s < t; s and t are ()."""
    ratio = float(schedule.alpha(t) / schedule.alpha(s))
    return ratio * z + math.sqrt(float(schedule.back(t, s).large)) * normal()


def forward_chain(schedule: NoiseSchedule, x: Tensor, times: Tensor, normal: Normal) -> Tensor:
    """z (T, N, *) at the rising `times` (T,) of one chain for each x (N, *), by the transitions."""
    first = times[0]
    chain = [float(schedule.alpha(first)) * x + float(schedule.sigma(first)) * normal()]
    for s, t in itertools.pairwise(times):
        chain.append(transition(schedule, chain[-1], s, t, normal))
    return torch.stack(chain)


def reverse_chain(denoiser: Denoiser, solver: Solver, times: Tensor, z: Tensor, normal: Normal) -> Tensor:
    """z (T, N, *) at the falling `times` (T,) of a sampler, whose sample is the estimate at the last."""
    return torch.stack(list(states(denoiser, solver, times, z, normal)))


def even_times(schedule: NoiseSchedule, n: int) -> Tensor:
    """n times (n,) from t_min to t_max, even in t; of a chain its steps, fewer than n where it has fewer."""
    t = torch.linspace(schedule.t_min, schedule.t_max, n, dtype=torch.float64)
    return torch.unique(t.round()) if isinstance(schedule, Discrete) else t


def path_times(schedule: NoiseSchedule) -> Tensor:
    """PATH_STEPS rising times, or fewer of a chain: even in t, or as EDM spaces them."""
    if schedule.grid == "karras":
        return time_grid(schedule, PATH_STEPS, "karras").flip(0)
    return even_times(schedule, PATH_STEPS)


def shown_times(schedule: NoiseSchedule, n: int) -> Tensor:
    """n rising times (n,) at which the process is worth a look: even in log SNR where x and noise mix, then t_max."""
    high, low = (float(v) for v in schedule.log_snr(torch.stack(schedule.times)).detach())
    log_snr = torch.linspace(min(high, LOG_SNR_SHOWN), max(low, -LOG_SNR_SHOWN), n, dtype=torch.float64)
    t = torch.cat([schedule.time(log_snr[:-1]).detach(), schedule.times[1].unsqueeze(0)])
    t = t.clamp(schedule.t_min, schedule.t_max)
    return torch.unique(t.round()) if isinstance(schedule, Discrete) else t


class Posteriors(NamedTuple):
    """Densities over a grid of values (G,): q(z_t | z_s) of z_t, q(z_s | z_t) and q(z_s | z_t, x) of z_s.

    `distance` is the KL divergence in nats of the second from the Gaussian with its mean and variance.
    """

    value: Tensor
    forward: Tensor
    reverse: Tensor
    known: Tensor
    distance: float


def posteriors(mixture: MixtureDenoiser, t: Tensor, s: Tensor, z: float, x: float) -> Posteriors:
    """The three densities in one dimension, given z_t = z, for data of a mixture of Gaussians.

    q(z_s | z_t) is the product of its factors, normalised by the trapezoidal rule.

    Arguments:
        x: what is known in q(z_s | z_t, x); the z_s from which q(z_t | z_s) starts is the mean of that.
    """
    schedule = mixture.schedule
    back, ratio = schedule.back(t, s), float(schedule.alpha(t) / schedule.alpha(s))
    centre = float(back.x_weight) * x + float(back.z_weight) * z
    spread = math.sqrt(float(schedule.alpha(s)) ** 2 * _variance(mixture) + float(schedule.sigma(s)) ** 2)
    low = min(-5.0 * spread, centre - 6.0 * math.sqrt(float(back.small)), z - 6.0 * math.sqrt(float(back.large)))
    high = max(5.0 * spread, centre + 6.0 * math.sqrt(float(back.small)), z + 6.0 * math.sqrt(float(back.large)))
    value = torch.linspace(low, high, GRID_POINTS, dtype=torch.float64)
    log = log_normal_density(torch.tensor(z, dtype=torch.float64), ratio * value, back.large)
    log = log + mixture.log_density(value.unsqueeze(1), s)
    reverse = (log - log.max()).exp()
    reverse = reverse / torch.trapezoid(reverse, value)
    forward = log_normal_density(value, ratio * centre, back.large).exp()
    known = log_normal_density(value, centre, back.small).exp()
    return Posteriors(value, forward, reverse, known, distance_from_gaussian(value, reverse))


def distance_from_gaussian(value: Tensor, density: Tensor) -> float:
    """KL(q || N(mean, variance)) in nats of a density on a grid."""
    mean = torch.trapezoid(density * value, value)
    variance = torch.trapezoid(density * (value - mean).square(), value)
    log = torch.where(density > 0, density, 1.0).log()
    return float(torch.trapezoid(density * (log - log_normal_density(value, mean, variance)), value))


def _variance(mixture: MixtureDenoiser) -> float:
    """E x^2 of the data in one dimension."""
    return float((mixture.weight * (mixture.mean.square().squeeze(1) + mixture.std.square())).sum())
