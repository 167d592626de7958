r"""The denoiser: what is known of x when z_t is seen, and the reverse step that follows from it.

A `Denoiser` estimates E[x | z_t]; score, noise and velocity are conversions of it (`trilemma.diffusion.prediction`).
Its reverse step is the posterior with the estimate in the place of x (`NoiseSchedule.back`),
    p(z_s | z_t) = N(a xhat + b z_t, v),
and v lies, by its name, at
    small           the posterior's variance: right where x is a point             (Ho et al. 2020, arXiv:2006.11239)
    large           the jump's variance q(z_t | z_s): right for x ~ N(0, I)         (Ho et al. 2020)
    optimal         small + a^2 V, V the measured E|x - xhat|^2 / D at t            (Bao et al. 2022, arXiv:2201.06503)
    learned         the same with V a second output of the network, per dimension   (Bao et al. 2022, arXiv:2206.07309)
    learned-range   exp(u log large + (1 - u) log small), u a second output (Nichol & Dhariwal 2021, arXiv:2102.09672)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trilemma.diffusion.prediction import Prediction, convert
from trilemma.diffusion.schedule import NoiseSchedule, like

Variance = Literal["small", "large", "optimal", "learned", "learned-range"]


class Posterior(NamedTuple):
    """N(mean, var I): mean (N, *), var a number, (N, 1, ..) or (N, *)."""

    mean: Tensor
    var: Tensor | float


class Estimate(NamedTuple):
    """What is said of x given z_t: its mean (N, *), and the network's second output (N, *) where it has one."""

    x: Tensor
    spread: Tensor | None = None


class Denoiser:
    """Base of everything that can be sampled from. A subclass defines `estimate`.

    Times are float64 tensors on the device of z where they are (N,), on any where they are ().
    """

    schedule: NoiseSchedule

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        """E[x | z_t] for z (N, *) and t () or (N,)."""
        raise NotImplementedError

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor | float:
        """Variance of p(z_s | z_t); s = None is the clean data. The default is the small one."""
        return 0.0 if s is None else like(self.schedule.back(t, s).small, z)

    def predict(self, z: Tensor, t: Tensor, target: Prediction = "x0") -> Tensor:
        """The estimate as a prediction of `target`."""
        return convert(self.estimate(z, t).x, "x0", target, z, t, self.schedule)

    def posterior(self, z: Tensor, t: Tensor, s: Tensor) -> Posterior:
        """p(z_s | z_t)."""
        estimate, back = self.estimate(z, t), self.schedule.back(t, s)
        mean = like(back.x_weight, z) * estimate.x + like(back.z_weight, z) * z
        return Posterior(mean, self.reverse_variance(z, t, s, estimate.spread))


class NetworkDenoiser(Denoiser):
    """A network's prediction as a denoiser.

    Arguments:
        network: (z (N, *), t (N,)) -> prediction (N, *) and second output (N, *) or None; it holds the condition.
        prediction: what the network predicts.
        variance: of the reverse steps.
        error: () or (N,) times -> measured E|x - xhat|^2 / D, for the variance "optimal".
        data_std: for the prediction "edm".
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
        schedule: NoiseSchedule,
        prediction: Prediction = "eps",
        *,
        variance: Variance = "small",
        error: Callable[[Tensor], Tensor] | None = None,
        data_std: float = 1.0,
    ) -> None:
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.variance, self.error, self.data_std = variance, error, data_std

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        times = t if t.ndim else t.to(z.device).repeat(z.shape[0])  # forward-mode differentiation bears no views
        value, spread = self.network(z, times)
        x = convert(value.to(z.dtype), self.prediction, "x0", z, t, self.schedule, self.data_std)
        return Estimate(x, spread)

    def predict(self, z: Tensor, t: Tensor, target: Prediction = "x0") -> Tensor:
        if target == "x0":
            return self.estimate(z, t).x
        times = t if t.ndim else t.to(z.device).repeat(z.shape[0])
        value, _ = self.network(z, times)  # not by way of x, which loses the digits of eps where sigma is small
        return convert(value.to(z.dtype), self.prediction, target, z, t, self.schedule, self.data_std)

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor | float:
        if s is None:  # p(x | z_t): the posterior is a point, the jump's variance that of the noise
            x_weight, small, large = torch.ones_like(t), torch.zeros_like(t), self.schedule.sigma(t).square()
        else:
            x_weight, _, small, large = self.schedule.back(t, s)
        if self.variance == "small":
            return like(large if s is None else small, z)
        if self.variance == "large":
            return like(large, z)
        if self.variance == "optimal":
            assert self.error is not None, "the optimal variance needs measured errors"
            return like(small + x_weight.square() * self.error(t), z)
        assert spread is not None, "a learned variance needs a network with a second output"
        if self.variance == "learned":
            scale = spread_scale(self.schedule, t)
            return like(small, z) + like(x_weight.square() * scale, z) * spread.to(z.dtype).exp()
        if s is None:  # log of a zero variance: the chain's second step stands in (Nichol & Dhariwal's code)
            small = self.schedule.back(t + 1.0, t).small
        low, high = like(small.log(), z), like(large.log(), z)
        share = 0.5 * (spread.to(z.dtype) + 1.0)
        return (share * high + (1.0 - share) * low).exp()


class Clipped(Denoiser):
    """A denoiser, guided or not, whose estimate is kept inside the data's range.

    The other predictions follow from what was kept, so that x and eps stay a pair (Ho et al. 2020).
    """

    def __init__(self, denoiser: Denoiser, low: float, high: float) -> None:
        self.schedule, self.denoiser, self.low, self.high = denoiser.schedule, denoiser, low, high

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        x, spread = self.denoiser.estimate(z, t)
        return Estimate(x.clamp(self.low, self.high), spread)

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor | float:
        return self.denoiser.reverse_variance(z, t, s, spread)


class Counted(Denoiser):
    """Counts its evaluations; without a denoiser inside its estimate is 0."""

    def __init__(self, schedule: NoiseSchedule, denoiser: Denoiser | None = None) -> None:
        self.schedule, self.denoiser, self.count = schedule, denoiser, 0

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        self.count += 1
        return Estimate(torch.zeros_like(z)) if self.denoiser is None else self.denoiser.estimate(z, t)


def spread_scale(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma^2 / (alpha^2 + sigma^2): Var[x | z_t] for x ~ N(0, 1), in which errors of x are measured."""
    variance = schedule.sigma(t).square()
    return variance / (schedule.alpha(t).square() + variance)
