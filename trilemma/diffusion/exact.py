r"""The denoiser of a Gaussian mixture in closed form: an oracle for samplers and likelihoods.

For x ~ sum_k w_k N(m_k, s_k^2 I) the noised z_t ~ sum_k w_k N(alpha m_k, (alpha^2 s_k^2 + sigma^2) I), and
    E[x | z]   = sum_k r_k c_k,      r_k = p(k | z),    c_k = m_k + g_k (z - alpha m_k),
    g_k        = alpha s_k^2 / (alpha^2 s_k^2 + sigma^2),
    E|x - E[x | z]|^2 = sum_k r_k (D s_k^2 (1 - alpha g_k) + |c_k - E[x | z]|^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trilemma.diffusion.denoiser import Denoiser, Estimate
from trilemma.diffusion.schedule import NoiseSchedule


class MixtureDenoiser(Denoiser):
    """E[x | z_t] for x ~ sum_k w_k N(m_k, s_k^2 I), with the exact reverse variance of its mean.

    Arguments:
        weight: (K,). mean: (K, D). std: (K,). All float64.
    """

    def __init__(self, schedule: NoiseSchedule, weight: Tensor, mean: Tensor, std: Tensor) -> None:
        self.schedule, self.weight, self.mean, self.std = schedule, weight, mean, std

    def _parts(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log of w_k N(z) (N, K), E[x | z, k] (N, K, D), Var[x | z, k] (N, K), z (N, 1, D)."""
        t = t.expand(len(z)).unsqueeze(1)
        alpha, noise = self.schedule.alpha(t), self.schedule.sigma(t).square()  # (N, 1)
        variance = alpha.square() * self.std.square() + noise  # (N, K)
        gain = alpha * self.std.square() / variance
        offset = z.unsqueeze(1) - alpha.unsqueeze(2) * self.mean
        square = offset.square().sum(2) / variance
        log = self.weight.log() - 0.5 * (square + z.shape[1] * (variance.log() + math.log(2.0 * math.pi)))
        return log, self.mean + gain.unsqueeze(2) * offset, self.std.square() * noise / variance, z.unsqueeze(1)

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        log, centre, _, _ = self._parts(z, t)
        return Estimate((log.softmax(1).unsqueeze(2) * centre).sum(1))

    def log_density(self, z: Tensor, t: Tensor) -> Tensor:
        """log q(z_t) (N,)."""
        return self._parts(z, t)[0].logsumexp(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of the data (N,)."""
        square = (x.unsqueeze(1) - self.mean).square().sum(2) / self.std.square()
        normaliser = x.shape[1] * (self.std.square().log() + math.log(2.0 * math.pi))
        return (self.weight.log() - 0.5 * (square + normaliser)).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of the data (n, D)."""
        k = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.mean.shape[1], generator=generator, dtype=self.mean.dtype)
        return self.mean[k] + self.std[k].unsqueeze(1) * noise


class GaussianDenoiser(MixtureDenoiser):
    """x ~ N(mean, std^2 I), D = 1: its reverse variance is exact too, in one jump of any length.

    Var(z_s | z_t) = small + a^2 Var(x | z_t).
    """

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float) -> None:
        one = torch.ones(1, dtype=torch.float64)
        super().__init__(schedule, one, mean * one.unsqueeze(1), std * one)

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor | float:
        alpha, noise = self.schedule.alpha(t), self.schedule.sigma(t).square()
        uncertain = self.std.square() * noise / (alpha.square() * self.std.square() + noise)
        if s is None:
            return uncertain.expand(len(z)).unsqueeze(1)
        back = self.schedule.back(t, s)
        return (back.small + back.x_weight.square() * uncertain).expand(len(z)).unsqueeze(1)
