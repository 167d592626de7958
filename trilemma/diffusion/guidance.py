r"""Guidance: a denoiser pushed away from a worse one.

    xhat = guide + scale (good - guide)                     scale 1 is the good denoiser alone, larger pushes further

classifier-free     guide: the same network without the condition   (Ho & Salimans 2022, arXiv:2207.12598: scale - 1)
autoguidance        guide: a smaller or less trained model          (Karras et al. 2024, arXiv:2406.02507)
classifier          score = score(z) + scale grad log p(c | z_t): scale 1 is Bayes' rule, 0 ignores the condition
                    (Dhariwal & Nichol 2021, arXiv:2105.05233)

The literature has two scales for the first; the one here is that of Imagen, Stable Diffusion and EDM2. Guidance may be
limited to an interval of noise levels sigma / alpha (Kynkäänniemi et al. 2024, arXiv:2404.07724), and the guided
prediction rescaled towards the standard deviation of the good one (Lin et al. 2024, arXiv:2305.08891, eq. 15-16).
Reverse variances are those of the good denoiser.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.diffusion.denoiser import Denoiser, Estimate
from trilemma.diffusion.schedule import like

FORMULA = (
    "the scale in guided = guide + scale (conditional - guide), where 1 is no guidance and larger is stronger; with a "
    "classifier in score + scale grad log p(class | z), where 1 is Bayes' rule and 0 leaves the class out"
)


class Guided(Denoiser):
    """`good`, guided away from `guide`.

    Arguments:
        scale: see above; 1 costs nothing, `guide` is then not evaluated.
        interval: (low, high) of sigma / alpha inside which guidance acts.
        rescale: phi in 0 .. 1, share of the rescaled prediction.
    """

    def __init__(
        self,
        good: Denoiser,
        guide: Denoiser,
        scale: float,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> None:
        self.schedule, self.good, self.guide = good.schedule, good, guide
        self.scale, self.interval, self.rescale = scale, interval, rescale

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        good = self.good.estimate(z, t)
        if self.scale == 1.0:
            return good
        scale = torch.full_like(t, self.scale)
        if self.interval is not None:
            level = (-0.5 * self.schedule.log_snr(t)).exp()
            scale = torch.where((level >= self.interval[0]) & (level <= self.interval[1]), scale, 1.0)
            if bool((scale == 1.0).all()):
                return good
        guide = self.guide.estimate(z, t).x
        x = good.x + like(scale - 1.0, z) * (good.x - guide)  # good to the last bit where the scale is 1
        if self.rescale:
            ratio = (good.x.flatten(1).std(1) / x.flatten(1).std(1)).reshape(-1, *[1] * (z.ndim - 1))
            x = self.rescale * ratio * x + (1.0 - self.rescale) * x
        return Estimate(x, good.spread)

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor | float:
        return self.good.reverse_variance(z, t, s, spread)


class ClassifierGuided(Denoiser):
    """A denoiser and log p(c | z_t): xhat moves by scale sigma^2 / alpha grad log p(c | z_t).

    Arguments:
        log_prob: (z (N, *), t (N,)) -> log p(c | z_t) (N,) of the condition wanted.
    """

    def __init__(self, denoiser: Denoiser, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float) -> None:
        self.schedule, self.denoiser, self.log_prob, self.scale = denoiser.schedule, denoiser, log_prob, scale

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        plain = self.denoiser.estimate(z, t)
        if self.scale == 0.0:
            return plain
        with torch.enable_grad():
            differentiated = z.requires_grad  # the divergence of the flow asks for the gradient's own derivative
            z_in = z if differentiated else z.detach().requires_grad_(True)
            times = t if t.ndim else t.to(z.device).repeat(len(z))
            log_p = self.log_prob(z_in, times).sum()
            (gradient,) = torch.autograd.grad(log_p, z_in, create_graph=differentiated)
        weight = self.scale * self.schedule.sigma(t).square() / self.schedule.alpha(t)
        return Estimate(plain.x + like(weight, z) * gradient, plain.spread)

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor | float:
        return self.denoiser.reverse_variance(z, t, s, spread)
