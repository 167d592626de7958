r"""Visible units of a restricted Boltzmann machine: what p(x | h) is.

Hidden units act on visible unit i through one number, the field t_i. A kind of unit is a base measure m_beta(x), which
goes from that of independent dimensions fitted to the data (beta = 0) to the model's own (beta = 1), and a
feature s(x) that the field multiplies:
    p_beta(x | t) proportional to m_beta(x) exp(sum_i s_i(x_i) t_i).

Levels, x_i in 0..L-1: s_i = (x_i - mu_i) / sqrt(L - 1), mu the mean of the data, and
    log m_1(x) = sum_i A_i(x_i) + a_{c,i} s_i(x_i)
with A_i(l) = log binom(L-1, l) for binomial units, which are L - 1 Bernoulli units with tied weights (Teh & Hinton
2001, NIPS 13), or with A_i learned for ordinal units, whose independent machine has the histograms of the data
(an exponential-family harmonium: Welling, Rosen-Zvi & Hinton 2005, NIPS 17). L = 2 is the Bernoulli machine.

Gaussian, real x_i: s_i = (x_i - mu_i) / sigma_i^2 and log m_1(x) = -sum_i (x_i - mu_i - a_{c,i})^2 / (2 sigma_i^2), so
p(x | t) = N(x; mu + a_c + t, sigma^2), with learned sigma (Liao et al. 2022, arXiv:2210.10318).
The a_c differ between classes where the machine is conditional.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise


class Levels(nn.Module):
    """Units with levels 0..L-1 in D dimensions.

    Arguments:
        learned: ordinal units, else binomial ones.
    """

    mean: Tensor
    histogram: Tensor
    table: Tensor

    def __init__(self, dims: int, levels: int, classes: int, learned: bool) -> None:
        super().__init__()
        self.levels, self.scale, self.learned = levels, math.sqrt(levels - 1), learned
        l = torch.arange(levels, dtype=torch.float64)  # noqa: E741
        log_binomial = math.lgamma(levels) - torch.lgamma(l + 1) - torch.lgamma(levels - l)
        table = log_binomial.to(torch.get_default_dtype()).expand(dims, -1).clone()
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        self.bias = nn.Parameter(torch.zeros(classes, dims))
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("histogram", torch.zeros(dims, levels))  # log of the data's smoothed frequencies

    def fit(self, x: Tensor) -> None:
        """Set the model without hidden units to the data x (N, D)."""
        levels = torch.arange(self.levels, device=x.device)
        counts = torch.stack([(x == level).sum(0) for level in levels], 1)
        p = (counts + 1.0) / (len(x) + self.levels)
        mean = (p * levels).sum(1)
        with torch.no_grad():
            self.mean.copy_(mean)
            self.histogram.copy_(p.log())
            if self.learned:
                self.table.copy_(self.histogram)
            else:
                self.bias.copy_(self.scale * torch.logit(mean / (self.levels - 1)))

    def feature(self, x: Tensor) -> Tensor:
        """s(x), (n, D)."""
        return (x - self.mean) / self.scale

    def log_base(self, x: Tensor, beta: float, c: Tensor) -> Tensor:
        """log m_beta(x), (n,)."""
        d = torch.arange(x.shape[1], device=x.device)
        level = x.long()
        own = self.table[d, level] + self.bias[c] * self.feature(x)
        return own.sum(1) if beta == 1.0 else (beta * own + (1.0 - beta) * self.histogram[d, level]).sum(1)

    def _log_terms(self, field: Tensor, beta: float, c: Tensor) -> Tensor:
        """log m_beta + s t for each level, (L, n, D): levels first, so that sums over them run along memory."""
        base = self.table if beta == 1.0 else beta * self.table + (1.0 - beta) * self.histogram
        levels = torch.arange(self.levels, device=field.device, dtype=field.dtype)
        feature = (levels[:, None] - self.mean) / self.scale
        return torch.addcmul(base.T.unsqueeze(1), field + beta * self.bias[c], feature.unsqueeze(1))

    def draw(self, field: Tensor, beta: float, c: Tensor, noise: Noise) -> Tensor:
        """x (n, D) from p_beta(x | t) for fields t (n, D), by inversion."""
        log_p = self._log_terms(field, beta, c)
        p = (log_p - log_p.amax(0)).exp_()
        threshold = noise.uniform_like(field) * p.sum(0)
        cumulative, x = torch.zeros_like(field), torch.zeros_like(field)
        for level in range(self.levels - 1):
            cumulative += p[level]
            x += cumulative <= threshold
        return x

    def log_normalizer(self, field: Tensor, beta: float, c: Tensor) -> Tensor:
        """log sum_x m_beta(x) exp(s(x) t), (n,)."""
        return self._log_terms(field, beta, c).logsumexp(0).sum(1)


class Gaussian(nn.Module):
    """Real units in D dimensions of about unit variance."""

    mean: Tensor
    std: Tensor

    def __init__(self, dims: int, classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes, dims))
        self.log_sigma = nn.Parameter(torch.zeros(dims))
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("std", torch.ones(dims))

    def fit(self, x: Tensor) -> None:
        """Set the base measure to the data x (N, D); the couplings start with 2 / (D + 2) of the variance."""
        std = x.std(0, correction=0)
        with torch.no_grad():
            self.mean.copy_(x.mean(0))
            self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))
            self.log_sigma.copy_(self.std.log() - 0.5 * math.log1p(2.0 / x.shape[1]))

    def feature(self, x: Tensor) -> Tensor:
        """s(x), (n, D)."""
        return (x - self.mean) * (-2.0 * self.log_sigma).exp()

    def _base(self, beta: float, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Precision (D,) and mean (n, D) of the Gaussian m_beta, and precision (D,) of the model's own."""
        own, data = (-2.0 * self.log_sigma).exp(), self.std.square().reciprocal()
        precision = beta * own + (1.0 - beta) * data
        return precision, self.mean + beta * own * self.bias[c] / precision, own

    def log_base(self, x: Tensor, beta: float, c: Tensor) -> Tensor:
        """log m_beta(x), (n,)."""
        own = (x - self.mean - self.bias[c]).square() * (-2.0 * self.log_sigma).exp()
        data = ((x - self.mean) / self.std).square()
        return -0.5 * (beta * own + (1.0 - beta) * data).sum(1)

    def draw(self, field: Tensor, beta: float, c: Tensor, noise: Noise) -> Tensor:
        """x (n, D) from p_beta(x | t) for fields t (n, D)."""
        precision, mean, own = self._base(beta, c)
        return mean + own * field / precision + noise.normal_like(field) * precision.rsqrt()

    def log_normalizer(self, field: Tensor, beta: float, c: Tensor) -> Tensor:
        """log int m_beta(x) exp(s(x) t) dx, (n,)."""
        precision, mean, own = self._base(beta, c)
        # With y = x - mu: m_beta = exp(-precision (y - shift)^2 / 2 + constant), and s t = own t y.
        shift = mean - self.mean
        constant = 0.5 * (precision * shift.square() - beta * own * self.bias[c].square())
        tilt = own * field * shift + 0.5 * (own * field).square() / precision
        return (constant + tilt - 0.5 * (precision / (2.0 * math.pi)).log()).sum(1)
