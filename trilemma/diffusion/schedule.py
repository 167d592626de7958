r"""Noise schedules: how much of x is left in z_t, and how much noise is in it.

    z_t = alpha(t) x + sigma(t) eps,     eps ~ N(0, I),     SNR(t) = alpha^2 / sigma^2 falling in t

(Kingma et al. 2021, arXiv:2107.00630). Everything else follows from alpha, sigma and lambda = log SNR:

    the SDE     dz = f(t) z dt + g(t) dw,   f = alpha' / alpha,   g^2 = -sigma^2 lambda' = 2 sigma sigma' - 2 f sigma^2
                (Song et al. 2021, arXiv:2011.13456)
    a jump      q(z_t | z_s) = N(alpha_t / alpha_s z_s, sigma_t^2 (1 - r) I),       r = SNR(t) / SNR(s),   s < t
    back        q(z_s | z_t, x) = N(alpha_s (1 - r) x + alpha_t sigma_s^2 / (alpha_s sigma_t^2) z_t,
                                    sigma_s^2 (1 - r) I)

For one step of the discrete chain z_t = sqrt(1 - beta_t) z_{t-1} + sqrt(beta_t) eps_t (Sohl-Dickstein et al. 2015,
arXiv:1503.03585; Ho et al. 2020, arXiv:2006.11239) the two variances are beta_t and btilde_t. Nothing in the formulas
asks t and s to be neighbours: a chain that skips steps uses the same lines.

    VP          log alpha = -t^2 (bmax - bmin) / 4 - t bmin / 2,   sigma^2 = 1 - alpha^2       (Song et al. 2021)
    sub-VP      the same alpha,                                    sigma   = 1 - alpha^2       (Song et al. 2021)
    cosine      alpha = cos(pi t / 2),                             sigma   = sin(pi t / 2)     (Nichol & Dhariwal 2021)
    VE          alpha = 1,                                         sigma   = smin (smax / smin)^t   (Song et al. 2021)
    EDM         alpha = 1,                                         sigma   = t         (Karras et al. 2022, 2206.00364)
    rectified   alpha = 1 - t,                                     sigma   = t         (Liu et al. 2023, 2209.03003)
    learned     alpha^2 = sigmoid(-gamma(t)),                      sigma^2 = sigmoid(gamma(t))     (Kingma et al. 2021)
    discrete    alpha_t^2 = prod_{s <= t} (1 - beta_s),            sigma^2 = 1 - alpha^2       (Ho et al. 2020)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

Spacing = Literal["linspace", "trailing", "leading", "karras", "log-snr"]

LABELS = 1000.0
"""Times are shown to networks as labels in 0 .. LABELS (nearly, once a schedule is learned), whatever their unit."""


def like(values: Tensor | float, z: Tensor) -> Tensor | float:
    """values (N,) -> (N, 1, ..., 1) in the dtype and on the device of z (N, *); a single value as a number."""
    if not isinstance(values, Tensor):
        return values
    return values.to(z).reshape(-1, *[1] * (z.ndim - 1)) if values.ndim else values.item()


class Back(NamedTuple):
    """q(z_s | z_t, x) = N(x_weight x + z_weight z_t, small I), and q(z_t | z_s)'s variance `large`; each () or (N,)."""

    x_weight: Tensor
    z_weight: Tensor
    small: Tensor
    large: Tensor


class NoiseSchedule:
    """alpha(t) and sigma(t) for t_min <= t <= t_max. Times are float64 tensors, () or (N,).

    A schedule is two formulas and the inverse of their log SNR. The clean data are not a time of it: samplers end with
    the prediction of x at their last time.

    Attributes:
        t_min, t_max: least and most noise.
        prior_std: standard deviation of the latent z at t_max from which samples start.
        variance_preserving: alpha^2 + sigma^2 = 1.
        grid: the spacing of times (`trilemma.diffusion.grid`) that suits its t, unless a solver has its own.
    """

    t_min: float
    t_max: float
    prior_std: float = 1.0
    variance_preserving = False
    grid: Spacing = "linspace"

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time(self, log_snr: Tensor) -> Tensor:
        """The t of a log SNR: the inverse of `log_snr`."""
        raise NotImplementedError

    def label(self, t: Tensor) -> Tensor:
        """t as networks see it."""
        return t * (LABELS / self.t_max)

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda = log(alpha^2 / sigma^2)."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha', sigma'), exact: by forward-mode differentiation."""
        one = torch.ones_like(t)
        return (torch.func.jvp(self.alpha, (t,), (one,))[1], torch.func.jvp(self.sigma, (t,), (one,))[1])

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """lambda' = 2 (alpha' / alpha - sigma' / sigma), negative."""
        da, ds = self.rates(t)
        return 2.0 * (da / self.alpha(t) - ds / self.sigma(t))

    def drift(self, t: Tensor) -> Tensor:
        """f of the SDE; minus infinity where alpha = 0."""
        return self.rates(t)[0] / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g of the SDE."""
        return self.sigma(t) * (-self.log_snr_rate(t)).sqrt()

    def back(self, t: Tensor, s: Tensor) -> Back:
        """The coefficients of q(z_s | z_t, x), s < t; float64."""
        alpha_t, alpha_s, sigma_t, sigma_s = self.alpha(t), self.alpha(s), self.sigma(t), self.sigma(s)
        lost = -torch.expm1(self.log_snr(t) - self.log_snr(s))  # 1 - r keeps its digits when t and s are close
        z_weight = alpha_t * sigma_s.square() / (alpha_s * sigma_t.square())
        return Back(alpha_s * lost, z_weight, sigma_s.square() * lost, sigma_t.square() * lost)

    @property
    def times(self) -> tuple[Tensor, Tensor]:
        """(t_min, t_max) as tensors."""
        return torch.tensor(self.t_min, dtype=torch.float64), torch.tensor(self.t_max, dtype=torch.float64)

    @property
    def ends_without_signal(self) -> bool:
        """Whether alpha(t_max) = 0 (zero terminal SNR): then noise says nothing about x, and eps no longer gives x."""
        return float(self.alpha(self.times[1])) == 0.0


class VP(NoiseSchedule):
    """The variance-preserving SDE with a linear beta(t) = beta_min + t (beta_max - beta_min), t <= 1."""

    variance_preserving = True

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> None:
        self.beta_min, self.slope, self.t_min, self.t_max = beta_min, beta_max - beta_min, t_min, 1.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t.square() * self.slope - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2.0 * self.log_alpha(t))).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time_of(-0.5 * logsigmoid(log_snr))

    def _time_of(self, loss: Tensor) -> Tensor:
        """t with -log alpha(t) = loss."""
        return 4.0 * loss / (self.beta_min + (self.beta_min**2 + 4.0 * self.slope * loss).sqrt())


class SubVP(VP):
    """The sub-VP SDE: the VP's alpha with less noise, sigma = 1 - alpha^2."""

    variance_preserving = False

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2.0 * self.log_alpha(t))

    def time(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = (1 - alpha^2) / alpha = 2 sinh(-log alpha)
        return self._time_of((0.5 * (-0.5 * log_snr).exp()).asinh())


class Cosine(NoiseSchedule):
    """(alpha, sigma) = (cos, sin)(pi t / 2), from sigma_min to alpha_min."""

    variance_preserving = True

    def __init__(self, sigma_min: float = 0.01, alpha_min: float = 0.01) -> None:
        self.t_min, self.t_max = math.asin(sigma_min) * 2 / math.pi, math.acos(alpha_min) * 2 / math.pi

    def alpha(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp().atan() * (2 / math.pi)


class _ByNoise(NoiseSchedule):
    """Schedules whose labels are even in log sigma, because t itself would leave the small levels unresolved."""

    sigma_min: float
    sigma_max: float

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def label(self, t: Tensor) -> Tensor:
        place = (self.sigma(t).log() - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return place * LABELS


class VE(_ByNoise):
    """The variance-exploding SDE, t <= 1."""

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-5) -> None:
        self.sigma_min, self.sigma_max, self.t_min, self.t_max = sigma_min, sigma_max, t_min, 1.0
        self.prior_std = sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


class EDM(_ByNoise):
    """t is the noise level itself."""

    grid: Spacing = "karras"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.sigma_min, self.sigma_max = self.t_min, self.t_max = sigma_min, sigma_max
        self.prior_std = sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp()


class Rectified(NoiseSchedule):
    """The straight line from data to noise: z = (1 - t) x + t eps.

    At t_max = 1 the SNR is zero and the SDE singular; the flow is not.
    """

    grid: Spacing = "trailing"

    def __init__(self, t_min: float = 1e-3, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).sigmoid()


class Learned(nn.Module, NoiseSchedule):
    r"""gamma(t) = -log SNR(t), a monotone network from gamma_0 to gamma_1, learned with the bound (t in 0 .. 1).

    The bound in continuous time depends on the ends alone. On what lies between it has no gradient but noise; choosing
    that for the variance of the estimate (the paper's further step) is not done here.

    gamma(t) = gamma_0 + (gamma_1 - gamma_0) m(t), with m(t) = (h(t) - h(0)) / (h(1) - h(0)) and
    h(t) = w_1 t + sum_k w_2k sigmoid(w_3k t + b_k), all w > 0. At the start m is nearly the identity.
    """

    variance_preserving = True
    t_min, t_max = 0.0, 1.0

    def __init__(self, log_snr_max: float = 13.3, log_snr_min: float = -5.0, width: int = 64) -> None:
        nn.Module.__init__(self)
        self.span = (log_snr_max, log_snr_min)
        self.gamma_0 = nn.Parameter(torch.tensor(-log_snr_max))
        self.gap = nn.Parameter(torch.tensor(math.log(math.expm1(log_snr_max - log_snr_min))))
        self.slope = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.full((width,), -6.0))
        self.rate = nn.Parameter(torch.randn(width))
        self.bias = nn.Parameter(torch.randn(width))

    def _height(self, t: Tensor) -> Tensor:
        slope, weight, rate, bias = (
            p.to(t.device, torch.float64) for p in (self.slope, self.weight, self.rate, self.bias)
        )
        return softplus(slope) * t + (softplus(rate) * t.unsqueeze(-1) + bias).sigmoid() @ softplus(weight)

    def gamma(self, t: Tensor) -> Tensor:
        """-log SNR (float64), rising in t."""
        low, high = self._height(torch.zeros_like(t)), self._height(torch.ones_like(t))
        place = (self._height(t.double()) - low) / (high - low)
        first, gap = (p.to(t.device, torch.float64) for p in (self.gamma_0, self.gap))
        return first + softplus(gap) * place

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.gamma(t)).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return self.gamma(t).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        return -self.gamma(t)

    def log_snr_rate(self, t: Tensor) -> Tensor:
        rate: Tensor = torch.func.jvp(self.gamma, (t,), (torch.ones_like(t),))[1]
        return -rate

    def time(self, log_snr: Tensor) -> Tensor:
        """By bisection, to the last digit."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = self.log_snr(middle) > log_snr
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return 0.5 * (low + high)

    def label(self, t: Tensor) -> Tensor:
        first, last = self.span
        return (first - self.log_snr(t)) * (LABELS / (first - last))


class Discrete(NoiseSchedule):
    """The chain of T steps with these betas: its times are 1 .. T.

    The tables are float64 and accumulated so that small variances keep their digits. Between the steps, where the
    flow's solvers may ask for it, alpha is a monotone cubic with continuous slope (Fritsch & Butland 1984): at a
    linear one's kinks an adaptive solver loses its digits.

    Arguments:
        betas: (T,) float64, beta_1 .. beta_T in (0, 1); the last may be 1 (zero terminal SNR).
    """

    variance_preserving = True
    t_min = 1.0

    def __init__(self, betas: Tensor) -> None:
        good = betas.ndim == 1 and betas.dtype == torch.float64
        if not good or not ((betas > 0) & (betas <= 1)).all() or not (betas[:-1] < 1).all():
            raise ValueError("betas are a float64 vector of numbers in (0, 1); only the last may be 1")
        self.betas, self.t_max = betas, float(len(betas))
        log_alpha2 = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
        alpha = (0.5 * log_alpha2).exp()
        slope = torch.from_numpy(PchipInterpolator(range(len(alpha)), alpha.numpy()).derivative()(range(len(alpha))))
        table = torch.stack([alpha, -torch.expm1(log_alpha2), slope])
        self._tables = {torch.device("cpu"): torch.cat([table, table[:, -1:]], 1)}

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    def _table(self, device: torch.device) -> Tensor:
        """(3, T + 2): alpha_t, sigma_t^2 and alpha'_t; entry 0 is the clean data, the last one stands twice."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u and c_0 .. c_3 with alpha(t) = c_0 + c_1 u + c_2 u^2 + c_3 u^3, u = t - floor(t)."""
        table = self._table(t.device)
        below = t.detach().floor().long().clamp(0, self.steps)
        (start, _, slope), (end, _, slope_end) = table[:, below], table[:, below + 1]
        rise = end - start
        return t - below, start, slope, 3.0 * rise - 2.0 * slope - slope_end, slope + slope_end - 2.0 * rise

    def alpha(self, t: Tensor) -> Tensor:
        u, c0, c1, c2, c3 = self._cubic(t)
        return c0 + u * (c1 + u * (c2 + u * c3))

    def sigma(self, t: Tensor) -> Tensor:
        whole = t == t.detach().round()
        table = self._table(t.device)[1][t.detach().round().long().clamp(0, self.steps)]
        between = (1.0 - self.alpha(t)) * (1.0 + self.alpha(t))
        return torch.where(whole, table + 0.0 * between, between).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        """The step, or by bisection between two."""
        alpha = (0.5 * logsigmoid(log_snr)).exp()
        table = self._table(log_snr.device)[0, : self.steps + 1]
        high = torch.searchsorted(-table, -alpha).clamp(1, self.steps).to(log_snr)
        low = high - 1.0
        for _ in range(52):
            middle = 0.5 * (low + high)
            above = self.alpha(middle) > alpha
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha', sigma') of the interpolation."""
        u, _, c1, c2, c3 = self._cubic(t)
        slope = c1 + u * (2.0 * c2 + 3.0 * u * c3)
        return slope, -self.alpha(t) * slope / self.sigma(t)


# -- betas ------------------------------------------------------------------------------------------------------


def linear_betas(steps: int) -> Tensor:
    """Ho et al.'s linear schedule, 1e-4 .. 0.02 at T = 1000, scaled by 1000 / T so that alpha_T stays what it is.

    Raises:
        ValueError: T is so small that the last beta would reach 1.
    """
    if steps <= 20:
        raise ValueError(f"the linear schedule needs more than 20 steps, got {steps}")
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000.0 / steps)


def cosine_betas(steps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """Nichol & Dhariwal's (2021, arXiv:2102.09672): alpha_t^2 = cos^2 phi_t / cos^2 phi_0, betas cut at 0.999."""
    phi = (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1.0 + offset) * (math.pi / 2)
    # 1 - beta_t = cos^2 phi_t / cos^2 phi_{t-1}; the difference of squares keeps the digits of a small beta.
    betas = (phi[1:] - phi[:-1]).sin() * (phi[1:] + phi[:-1]).sin() / phi[:-1].cos().square()
    return betas.clamp(max=largest)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The chain with alpha shifted and scaled: alpha_T = 0, alpha_1 stays (Lin et al. 2024, arXiv:2305.08891)."""
    alpha = Discrete(betas).alpha(torch.arange(1, len(betas) + 1, dtype=torch.float64))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return betas_of(alpha)


def betas_of(alpha: Tensor) -> Tensor:
    """The betas of the chain with these alpha_1 > ... > alpha_T (T,)."""
    before = torch.cat([alpha.new_ones(1), alpha[:-1]])
    return (1.0 - alpha / before) * (1.0 + alpha / before)


def discretized(schedule: NoiseSchedule, steps: int) -> Discrete:
    """The chain of T steps through a variance-preserving schedule, even in its t."""
    assert schedule.variance_preserving
    t = torch.linspace(schedule.t_min, schedule.t_max, steps, dtype=torch.float64)
    return Discrete(betas_of(schedule.alpha(t)))
