r"""What a network may predict, and how one prediction is turned into another.

Given z = alpha x + sigma eps, every target of the literature is p x + q eps with two numbers of the time t:

                 p                        q
    x0           1                        0                       the clean data
    eps          0                        1                       the noise (Ho et al. 2020, arXiv:2006.11239)
    v           -sigma                    alpha                   (Salimans & Ho 2022, arXiv:2202.00512)
    score        0                       -1 / sigma               of q(z_t | x) (Song et al. 2021, arXiv:2011.13456)
    velocity     alpha'                   sigma'                  dz/dt (Lipman et al. 2023, arXiv:2210.02747)
    mean         a + b alpha              b sigma                 of q(z_{t-1} | z_t, x) = N(a x + b z_t, ..): a chain's
    edm          sigma / (s d)           -alpha d / s             (x - c_skip z) / c_out (Karras et al. 2022,
                                                                  arXiv:2206.00364), d = std(x),
                                                                  s^2 = alpha^2 d^2 + sigma^2

As z gives one equation and the prediction another, (x, eps) solves a system of determinant D = alpha q - sigma p, and
the target (p', q') is
    prediction' = [ (p' q - q' p) z + (alpha q' - sigma p') prediction ] / D.
Where D = 0 the prediction says nothing: eps and score at alpha = 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from trilemma.diffusion.schedule import Discrete, NoiseSchedule, like

Prediction = Literal["x0", "eps", "v", "score", "velocity", "mean", "edm"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

NEEDS_SIGNAL = frozenset({"eps", "score"})
"""Predictions from which x cannot be had where alpha = 0."""


def weights(name: Prediction, schedule: NoiseSchedule, t: Tensor, data_std: float = 1.0) -> tuple[Tensor, Tensor]:
    """(p, q) of a target at t.

    Raises:
        ValueError: "mean" of a schedule that is no chain.
    """
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    if name == "x0":
        return one, zero
    if name == "eps":
        return zero, one
    if name == "velocity":
        return schedule.rates(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if name == "v":
        return -sigma, alpha
    if name == "score":
        return zero, -1.0 / sigma
    if name == "edm":
        s = (alpha.square() * data_std**2 + sigma.square()).sqrt()
        return sigma / (s * data_std), -alpha * data_std / s
    if not isinstance(schedule, Discrete):
        raise ValueError("the prediction 'mean' is of a chain's next step: it needs a discrete schedule (timesteps=T)")
    back = schedule.back(t, t - 1.0)
    return back.x_weight + back.z_weight * alpha, back.z_weight * sigma


def convert(
    value: Tensor,
    source: Prediction,
    target: Prediction,
    z: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    data_std: float = 1.0,
) -> Tensor:
    """The prediction `value` of `source` as one of `target`.

    Arguments:
        value, z: (N, *).
        t: (N,) or (), float64.
        data_std: d, for "edm".
    """
    if source == target:
        return value
    of_z, of_value = conversion(source, target, t, schedule, data_std)
    return like(of_z, z) * z + like(of_value, z) * value


def conversion(
    source: Prediction, target: Prediction, t: Tensor, schedule: NoiseSchedule, data_std: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The weights of z and of the prediction in the converted prediction, float64."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    p, q = weights(source, schedule, t, data_std)
    p_to, q_to = weights(target, schedule, t, data_std)
    determinant = alpha * q - sigma * p
    return (p_to * q - q_to * p) / determinant, (alpha * q_to - sigma * p_to) / determinant
