r"""Samplers of the discrete diffusion: flat functions of a denoiser, a schedule and injected noise.

A `Denoiser` maps (z_t, t) to a prediction of x. With times tau_1 < ... < tau_S out of 1 .. T, and abar at those times:

    ancestral (Ho et al. 2020, arXiv:2006.11239; respaced: Nichol & Dhariwal 2021, arXiv:2102.09672)
        z_{i-1} = a_i xhat + b_i z_i + s_i n_i,      with the coefficients of the chain through tau_1 .. tau_S
    DDIM (Song, Meng & Ermon 2021, arXiv:2010.02502)
        z_{i-1} = alpha_{i-1} xhat + sqrt(sigma_{i-1}^2 - s_i^2) epshat + s_i n_i,      s_i^2 = eta^2 btilde_i

DDIM with eta = 1 is ancestral sampling with rho = 0; with eta = 0 it is a first-order solver of the
probability-flow ODE. Both end with z_0 = xhat(z_1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trilemma.diffusion.prediction import convert
from trilemma.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, int], Tensor]
"""(z (N, *), t in 1 .. T) -> prediction of x (N, *)."""


def sample_ancestral(
    denoise: Denoiser,
    schedule: Schedule,
    times: Sequence[int],
    z: Tensor,
    normal: Callable[[], Tensor],
    rho: Tensor,
) -> Tensor:
    """From z_T (N, *) to x (N, *) through `times`.

    Arguments:
        times: increasing, in 1 .. T.
        normal: returns a fresh N(0, I) of z's shape.
        rho: (T + 1,) float64, the denoiser's relative squared error at every t, which sets the reverse variance:
            zeros for the small one, ones for the large one.
    """
    chain = schedule.respace(times)
    s = chain.reverse_variance(rho[[0, *times]]).sqrt().tolist()
    a, b = chain.posterior_x.tolist(), chain.posterior_z.tolist()
    for i in range(len(times), 1, -1):
        z = a[i] * denoise(z, times[i - 1]) + b[i] * z + s[i] * normal()
    return denoise(z, times[0])


def sample_ddim(
    denoise: Denoiser,
    schedule: Schedule,
    times: Sequence[int],
    z: Tensor,
    normal: Callable[[], Tensor],
    eta: float = 0.0,
) -> Tensor:
    """As `sample_ancestral`; `normal` is called only where eta > 0."""
    chain = schedule.respace(times)
    s2 = eta**2 * chain.posterior_variance
    for i in range(len(times), 1, -1):
        x = denoise(z, times[i - 1])
        eps = convert(x, "x", "eps", z, chain.alpha[i], chain.sigma[i])
        z = float(chain.alpha[i - 1]) * x + float((chain.variance[i - 1] - s2[i]).sqrt()) * eps
        if eta > 0:
            z = z + float(s2[i].sqrt()) * normal()
    return denoise(z, times[0])


def clip_to(denoise: Denoiser, low: float, high: float) -> Denoiser:
    """The denoiser with its prediction kept inside the known range of the data (Ho et al.'s practice)."""
    return lambda z, t: torch.clamp(denoise(z, t), low, high)
