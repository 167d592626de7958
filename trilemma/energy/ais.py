r"""Annealed importance sampling (Neal 2001, Statistics and Computing 11, arXiv:physics/9803008; for Boltzmann machines
Salakhutdinov & Murray 2008, ICML).

Between a tractable f_0 = p_0 Z_0 and the target f_1 = p_1 Z_1 stands a path f_beta, 0 = beta_0 < ... < beta_K = 1.
From x_0 ~ p_0, transitions T_k that leave p_{beta_k} invariant give x_k ~ T_k(. | x_{k-1}), and with the weights
    log w = sum_{k=1}^{K} log f_{beta_k}(x_{k-1}) - log f_{beta_{k-1}}(x_{k-1}),       E[w] = Z_1 / Z_0,
so Z_0 mean(w) is an unbiased estimate of Z_1. Its logarithm is biased downwards (Jensen), by about half its squared
standard error. Without the weights, the same walk is a sampler that starts from nothing but p_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.core.noise import Noise

LogDensity = Callable[[Tensor, float], Tensor]
"""(x (n, *), beta) -> log f_beta(x), (n,)."""
Transition = Callable[[Tensor, float, Noise], Tensor]
"""(x (n, *), beta, noise) -> a move of each chain that leaves p_beta invariant."""


class LogMean(NamedTuple):
    """The logarithm of a mean and its standard error (by the delta method)."""

    value: Tensor
    stderr: Tensor


def linear_betas(steps: int) -> list[float]:
    """0, 1/steps, ..., 1."""
    return [k / steps for k in range(steps + 1)]


def anneal(
    x: Tensor, log_f: LogDensity, transition: Transition, betas: list[float], noise: Noise
) -> tuple[Tensor, Tensor]:
    """Walk n chains along the path.

    Arguments:
        x: (n, *) draws from p_0.
        betas: increasing from 0 to 1.

    Returns:
        x_K (n, *) and log w (n,) in float64.
    """
    log_w = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for before, beta in pairwise(betas):
        log_w += (log_f(x, beta) - log_f(x, before)).double()
        x = transition(x, beta, noise)
    return x, log_w


def log_mean_exp(log_w: Tensor) -> LogMean:
    """log mean exp over the last dimension of log_w (*, n), n >= 2."""
    n = log_w.shape[-1]
    value = log_w.logsumexp(-1) - math.log(n)
    relative = (log_w - value.unsqueeze(-1)).exp()  # mean one
    return LogMean(value, relative.std(-1, correction=1) / math.sqrt(n))
