r"""What a denoiser predicts, and how one prediction is turned into another.

From z = alpha x + sigma eps with alpha^2 + sigma^2 = 1 each of
    x,    eps,    v = alpha eps - sigma x
gives the other two (Salimans & Ho 2022, arXiv:2202.00512, for v):
    x   = (z - sigma eps) / alpha = alpha z - sigma v,
    eps = (z - alpha x) / sigma   = sigma z + alpha v.
`eps` is ill-conditioned as x where alpha is small, `x` as eps where sigma is small, `v` nowhere.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["eps", "v", "x"]


def like(values: Tensor, z: Tensor) -> Tensor:
    """values (N,) or () -> (N, 1, ..., 1) or (), in the dtype and on the device of z (N, *)."""
    values = values.to(z)
    return values.reshape(-1, *[1] * (z.ndim - 1)) if values.ndim else values


def convert(value: Tensor, source: Prediction, target: Prediction, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The prediction `value` of `source` as one of `target`.

    Arguments:
        value, z: (N, *).
        alpha, sigma: (N,) or (), alpha^2 + sigma^2 = 1, both positive.
    """
    if source == target:
        return value
    a, s = like(alpha, z), like(sigma, z)
    if source == "eps":
        x, eps = (z - s * value) / a, value
    elif source == "v":
        x, eps = a * z - s * value, s * z + a * value
    else:
        x, eps = value, (z - a * value) / s
    return {"x": x, "eps": eps, "v": a * eps - s * x}[target]
