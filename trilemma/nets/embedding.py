r"""Embeddings of real numbers: cosines and sines of many frequencies, so that a network sees every scale at once.

    e(t) = [cos(w_k t), sin(w_k t)],  k = 0 .. K - 1
    sinusoidal:  w_k = period_max^(-k / (K - 1))             (Vaswani et al. 2017, arXiv:1706.03762)
    fourier:     w_k = 2 pi f_k / 1000,  f_k ~ N(0, scale^2)  (Tancik et al. 2020, arXiv:2006.10739; Song et al. 2021,
                 arXiv:2011.13456), f_k drawn once and fixed
A time embedding passes e(t) through two layers (Ho et al. 2020, arXiv:2006.11239).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trilemma.core.noise import make_generator
from trilemma.nets.mlp import ResidualMLP


def sinusoidal(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """t (N,) -> (N, dim) in the dtype of t; `dim` is even and at least 4."""
    if dim < 4 or dim % 2:
        raise ValueError(f"a sinusoidal embedding has an even number of dimensions, at least 4; got {dim}")
    half = dim // 2
    k = torch.arange(half, device=t.device, dtype=t.dtype) / (half - 1)
    angle = t.unsqueeze(1) * torch.exp(-math.log(max_period) * k)
    return torch.cat([angle.cos(), angle.sin()], 1)


class TimeEmbedding(nn.Module):
    """t (N,) -> (N, dim): W_2 silu(W_1 e(t)). Both kinds of e take t in the range 0 .. 1000.

    Arguments:
        dim: size of the embedding; e(t) itself has about min(dim, 128) entries.
        kind: of the frequencies.
        scale: of the Fourier frequencies, in periods over the range of t. They are the same in every network, and
            are saved with it.
    """

    fourier: Tensor | None

    def __init__(self, dim: int, kind: Literal["sinusoidal", "fourier"] = "sinusoidal", scale: float = 16.0) -> None:
        super().__init__()
        self.frequencies = 4 * ((min(dim, 128) + 3) // 4)
        drawn = None
        if kind == "fourier":
            generator = make_generator("time embedding")
            drawn = scale * torch.randn(self.frequencies // 2, generator=generator, device="cpu")
        self.register_buffer("fourier", drawn)
        self.layers = nn.Sequential(nn.Linear(self.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        if self.fourier is None:
            features = sinusoidal(t, self.frequencies)
        else:
            angle = t.unsqueeze(1) * (2.0 * math.pi / 1000.0 * self.fourier)
            features = torch.cat([angle.cos(), angle.sin()], 1)
        result: Tensor = self.layers(features)
        return result


class FourierMLP(nn.Module):
    r"""A residual MLP that sees each input coordinate also as sin(2^k x), cos(2^k x), k = 0 .. octaves - 1.

    An MLP of bare coordinates learns low frequencies first and sharp edges last (Tancik et al. 2020,
    arXiv:2006.10739); with these features it resolves narrow modes in a fraction of the steps.

    Arguments:
        in_dim, out_dim, width, depth, context_dim, zero_init: of `ResidualMLP`.
        octaves: frequencies per coordinate; inputs are of about unit variance.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None,
        *,
        width: int = 128,
        depth: int = 2,
        context_dim: int = 0,
        octaves: int = 4,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.octaves, self.feature_dim = octaves, width
        self.net = ResidualMLP(
            in_dim * (1 + 2 * octaves), out_dim, width=width, depth=depth, context_dim=context_dim, zero_init=zero_init
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, in_dim), context (N, context_dim) or None -> (N, out_dim)."""
        frequency = 2.0 ** torch.arange(self.octaves, device=x.device, dtype=x.dtype)
        angle = (x.unsqueeze(2) * frequency).flatten(1)
        result: Tensor = self.net(torch.cat([x, angle.sin(), angle.cos()], 1), context)
        return result
