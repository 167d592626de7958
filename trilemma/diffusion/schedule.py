r"""The discrete diffusion: a chain that adds Gaussian noise in T steps, and everything about it in closed form.

Sohl-Dickstein et al. 2015 (arXiv:1503.03585), Ho, Jain & Abbeel 2020 (arXiv:2006.11239). With z_0 = x:

    chain       z_t = sqrt(1 - beta_t) z_{t-1} + sqrt(beta_t) eps_t,      t = 1 .. T,  eps_t ~ N(0, I)
    kernel      z_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps,              abar_t = prod_{s <= t} (1 - beta_s)
    posterior   q(z_{t-1} | z_t, x) = N(a_t x + b_t z_t, btilde_t I),
                a_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t),
                b_t = sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t),
                btilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
    SNR         abar_t / (1 - abar_t), falling in t

A network that predicts x from z_t gives the reverse chain p(z_{t-1} | z_t) = N(a_t xhat + b_t z_t, s_t^2 I), and

    -log p(x) <= L_T + sum_{t=2}^T L_{t-1} + L_0,
    L_T     = KL(q(z_T | x) || N(0, I))
    L_{t-1} = KL(q(z_{t-1} | z_t, x) || p(z_{t-1} | z_t))  =  (SNR_{t-1} - SNR_t) |x - xhat|^2 / 2   at s_t^2 = btilde_t
    L_0     = -log p(x | z_1)

(the SNR form: Kingma et al. 2021, arXiv:2107.00630).

The best s_t^2 is the posterior's variance and that of its mean, which xhat leaves open (Bao et al. 2022,
arXiv:2201.06503): btilde_t + a_t^2 E|x - xhat|^2 / D. Since a_t^2 sigma_t^2 = beta_t - btilde_t, that is
    s_t^2 = btilde_t + rho_t (beta_t - btilde_t),     rho_t = E|x - xhat|^2 / (D sigma_t^2),
between Ho et al.'s two choices, btilde_t (right where x is a point) and beta_t (right for x ~ N(0, I)); rho_t is the
mean squared error of a prediction of v = alpha_t eps - sigma_t x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

ALPHA_LAST = 0.01
"""sqrt(abar_T) of the cosine schedule: as little of x is left in z_T as with the linear schedule."""

Shape = Literal["linear", "cosine"]


def linear_betas(steps: int) -> Tensor:
    """Ho et al.'s linear schedule, 1e-4 .. 0.02 at T = 1000, scaled by 1000 / T so that abar_T stays what it is.

    Raises:
        ValueError: T is so small that the last beta would reach 1.
    """
    if steps <= 20:
        raise ValueError(f"the linear schedule needs more than 20 steps, got {steps}")
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000.0 / steps)


def cosine_betas(steps: int, sigma_min: float) -> Tensor:
    r"""Nichol & Dhariwal's cosine (2021, arXiv:2102.09672): abar_t = cos^2(phi_t) with evenly spaced phi_t.

    Their offset exists to make the first noise level about one step of the data's lattice. Here that level is given
    itself: sin(phi_1) = sqrt(1 - abar_1) = sigma_min, whatever T is; and in place of cutting the last betas at 0.999,
    cos(phi_T) = sqrt(abar_T) = 0.01.
    """
    phi = torch.linspace(math.asin(sigma_min), math.acos(ALPHA_LAST), steps, dtype=torch.float64)
    # 1 - beta_t = cos^2 phi_t / cos^2 phi_{t-1}; the difference of squares keeps the digits of a small beta.
    previous = torch.cat([phi.new_zeros(1), phi[:-1]])
    return (phi - previous).sin() * (phi + previous).sin() / previous.cos().square()


@dataclass(frozen=True, eq=False)
class Schedule:
    """The chain's tables, float64, on the CPU; entry t of a table belongs to step t.

    Attributes:
        betas: (T,) beta_1 .. beta_T, each in (0, 1).
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or self.betas.dtype != torch.float64 or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("betas are a float64 vector of numbers in (0, 1)")

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor) -> Schedule:
        """The chain with these abar_1 > ... > abar_T."""
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return cls(1.0 - alpha_bar / before)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def beta(self) -> Tensor:
        """(T + 1,) with beta_0 = 0."""
        return torch.cat([self.betas.new_zeros(1), self.betas])

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T + 1,) with abar_0 = 1."""
        return (1.0 - self.beta).cumprod(0)

    @cached_property
    def variance(self) -> Tensor:
        """1 - abar_t (T + 1,), accumulated so that small values keep their digits."""
        return -torch.expm1(torch.log1p(-self.beta).cumsum(0))

    @cached_property
    def alpha(self) -> Tensor:
        """sqrt(abar_t) (T + 1,): what is left of x in z_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """sqrt(1 - abar_t) (T + 1,): the noise in z_t."""
        return self.variance.sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """abar_t / (1 - abar_t) (T + 1,); infinite at t = 0."""
        return self.alpha_bar / self.variance

    @cached_property
    def posterior_x(self) -> Tensor:
        """a_t (T + 1,), the weight of x in the posterior's mean; entry 0 is unused and 0."""
        return _from_step_1(self.alpha[:-1] * self.betas / self.variance[1:])

    @cached_property
    def posterior_z(self) -> Tensor:
        """b_t (T + 1,), the weight of z_t in the posterior's mean; entry 0 is unused and 0."""
        return _from_step_1((1.0 - self.betas).sqrt() * self.variance[:-1] / self.variance[1:])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """btilde_t (T + 1,); btilde_1 = 0; entry 0 is unused and 0."""
        return _from_step_1(self.betas * self.variance[:-1] / self.variance[1:])

    def reverse_variance(self, rho: Tensor) -> Tensor:
        """s_t^2 (T + 1,) for rho (T + 1,) float64; entries 0 are unused."""
        return self.posterior_variance + rho * (self.beta - self.posterior_variance)

    def respace(self, times: Sequence[int]) -> Schedule:
        """The shorter chain through these steps, which has the same abar there (Nichol & Dhariwal 2021).

        Arguments:
            times: increasing, in 1 .. T.
        """
        return Schedule.from_alpha_bar(self.alpha_bar[list(times)])


def _from_step_1(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values])


def make_schedule(shape: Shape, steps: int, sigma_min: float) -> Schedule:
    """The named schedule with T = `steps`; `sigma_min` is the cosine's first noise level."""
    return Schedule(linear_betas(steps) if shape == "linear" else cosine_betas(steps, sigma_min))


def spaced_times(total: int, steps: int) -> list[int]:
    """`steps` times out of 1 .. total, evenly spaced and ending with `total`; the first is 1 where steps > 1."""
    if not 1 <= steps <= total:
        raise ValueError(f"between 1 and {total} steps are possible, got {steps}")
    if steps == 1:
        return [total]
    return [1 + round(i * (total - 1) / (steps - 1)) for i in range(steps)]
