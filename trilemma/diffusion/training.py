r"""How a denoiser is trained: which times, with which weights, on which pairs.

Every objective of the literature is a weighted squared error of the prediction F (`trilemma.diffusion.prediction`),
    L = E_{x, eps, t} w(t) |x - xhat|^2  =  E w(t) B(t)^2 |F* - F|^2,      B = dx / dF,
and they differ in w, in the distribution of t and in F (Kingma & Gao 2023, arXiv:2303.00848):

    weighting     w(t)
    uniform       1 / B^2: the plain error of F   L_simple (Ho et al. 2020, arXiv:2006.11239), denoising score matching
                                                  with lambda = sigma^2 (F = eps; Song et al. 2021), EDM, flow matching
    snr           SNR                             the error of eps, whatever F is
    min-snr       min(SNR, 5)                     (Hang et al. 2023, arXiv:2303.09556)
    max-snr       max(SNR, 1)                     (Salimans & Ho 2022, arXiv:2202.00512)
    likelihood    -lambda' SNR / 2                the bound's own: score matching with lambda = g^2 (Song et al. 2021,
                  chain: T (SNR(t-1) - SNR(t)) / 2     arXiv:2101.09258; Kingma et al. 2021, arXiv:2107.00630)

    times         density of t
    uniform       on [t_min, t_max], or on 1 .. T
    log-normal    log(sigma / alpha) ~ N(m, s^2), cut to the schedule's range (Karras et al. 2022, arXiv:2206.00364);
                  for the rectified path this is the logit-normal of Esser et al. 2024 (arXiv:2403.03206)
    importance    in proportion to the root mean squared loss seen so far, divided out again (Nichol & Dhariwal 2021)

Stratified times (Kingma et al. 2021) come one from each of N equal parts of the distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.diffusion.schedule import Discrete, NoiseSchedule

Weighting = Literal["uniform", "snr", "min-snr", "max-snr", "likelihood"]
Times = Literal["uniform", "log-normal", "importance"]
Coupling = Literal["independent", "optimal-transport"]

CAP = 5.0
"""gamma of min-snr."""


def _snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    return schedule.log_snr(t).exp()


def _likelihood(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    snr = _snr(schedule, t)
    if not isinstance(schedule, Discrete):
        return -0.5 * schedule.log_snr_rate(t) * snr * (schedule.t_max - schedule.t_min)
    before = torch.where(
        t > 1, _snr(schedule, (t - 1.0).clamp(min=1.0)), 2.0 * snr
    )  # L_0 weighs as |x - xhat|^2 SNR / 2
    return 0.5 * schedule.steps * (before - snr)


WEIGHTINGS: dict[str, Callable[[NoiseSchedule, Tensor], Tensor]] = {
    "snr": _snr,
    "min-snr": lambda schedule, t: _snr(schedule, t).clamp(max=CAP),
    "max-snr": lambda schedule, t: _snr(schedule, t).clamp(min=1.0),
    "likelihood": _likelihood,
}
"""w(t) of each weighting but "uniform"."""


def draw_uniform(noise: Noise, stratified: bool) -> Tensor:
    """u (N,) in [0, 1), float64; stratified: u_i in [i, i + 1) / N."""
    u = noise.uniform(dtype=torch.float64)
    return (torch.arange(noise.n, device=u.device) + u) / noise.n if stratified else u


def uniform_times(u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """u (N,) -> t (N,)."""
    if isinstance(schedule, Discrete):
        return (u * schedule.steps).floor().clamp(max=schedule.steps - 1) + 1.0
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def log_normal_times(u: Tensor, schedule: NoiseSchedule, mean: float, std: float) -> Tensor:
    """u (N,) -> t (N,) with log(sigma / alpha) ~ N(mean, std^2) between the schedule's ends."""
    ends = torch.stack(schedule.times).to(u)
    ends = torch.special.ndtr((-0.5 * schedule.log_snr(ends) - mean) / std)
    level = mean + std * torch.special.ndtri(ends[0] + u * (ends[1] - ends[0]))
    t = schedule.time(-2.0 * level).clamp(schedule.t_min, schedule.t_max)
    return t.round().clamp(min=1.0) if isinstance(schedule, Discrete) else t


class ImportanceTimes(nn.Module):
    """Times in proportion to sqrt(E L^2), in `bins` equal parts of the uniform distribution.

    Until every bin has been seen `burn_in` times they are uniform, and always with at least 1% of uniform.
    """

    square: Tensor
    count: Tensor

    def __init__(self, bins: int = 64, burn_in: int = 10) -> None:
        super().__init__()
        self.burn_in = burn_in
        self.register_buffer("square", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.float64))

    @property
    def density(self) -> Tensor:
        """Of u, in each bin (bins,); its mean is 1."""
        root = self.square.sqrt()
        measured = 0.99 * root / root.mean().clamp(min=torch.finfo(root.dtype).tiny) + 0.01
        return torch.where((self.count < self.burn_in).any(), torch.ones_like(root), measured)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (N,) uniform -> u (N,) of the density, and 1 / density there."""
        density = self.density.to(u)
        edges = torch.cat([density.new_zeros(1), density.cumsum(0) / density.sum()])
        k = torch.searchsorted(edges[1:-1], u, right=True)
        place = (u - edges[k]) / (edges[k + 1] - edges[k])
        return ((k + place) / len(density)).clamp(max=1.0 - 1e-12), 1.0 / density[k]

    def record(self, u: Tensor, loss: Tensor) -> None:
        """Take in the losses (N,) at u (N,); old ones fade by 1% with every ten new ones of the bin."""
        member = nn.functional.one_hot((u * len(self.square)).long(), len(self.square)).to(self.square)
        seen = member.sum(0)
        mean = (loss.detach().double().square() @ member) / seen.clamp(min=1.0)
        first = self.count == 0
        keep = torch.where(first, 0.0, 0.999**seen)
        self.square.copy_(torch.where(seen > 0, keep * self.square + (1.0 - keep) * mean, self.square))
        self.count.add_(seen)


def couple(x: Tensor, eps: Tensor) -> Tensor:
    """The noise (N, *) in the order in which sum_i |x_i - eps_i|^2 is least: minibatch optimal transport.

    Tong et al. 2024 (arXiv:2302.00482), Pooladian et al. 2023 (arXiv:2304.14772). Paths of the pairs cross less.
    """
    cost = torch.cdist(x.detach().double().flatten(1), eps.double().flatten(1)).square()
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return eps[torch.from_numpy(order).to(eps.device)]
