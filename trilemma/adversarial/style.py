r"""What style generators share: scaled weights, the mapping network, modulated convolutions.

Equalised learning rate (Karras et al. 2018, arXiv:1710.10196): weights are N(0, 1) / m and used as w m / sqrt(fan_in),
so Adam changes all of them at the same relative rate, m times slower than the rest.

Mapping network (Karras et al. 2019, arXiv:1812.04948; for classes Karras et al. 2020, arXiv:2006.06676):
    w = f([z / rms(z), e(c) / rms(e(c))]),   f = fully connected layers with a leaky ReLU, m = 0.01.

Modulated convolution (Karras et al. 2020, arXiv:1912.04958): a style s, affine in w, scales the input channels of the
kernel; demodulation brings each output channel back to the variance that it has for inputs of variance 1:
    W'_oik = s_i W_oik,   W''_oik = W'_oik / sqrt(sum_ik W'_oik^2 + eps).
As s scales the input and the denominator the output, one convolution with the shared kernel W is enough,
    y_o = d_o(s) (W * (s x))_o,   d_o = 1 / sqrt(sum_i s_i^2 sum_k W_oik^2 + eps),
without a kernel for each example.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.adversarial.generator import Generator
from trilemma.core.spec import ConditionSpec
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.resample import CONV

SLOPE = 0.2
GAIN = math.sqrt(2.0)
"""Of the leaky ReLU, so that variances stay about 1."""

EPS = 1e-8
AVERAGING = 0.998
"""Decay of the mean of w, per training step of 16 to 64 examples."""


def activate(x: Tensor) -> Tensor:
    """sqrt(2) leaky_relu(x, 0.2)."""
    return F.leaky_relu(x, SLOPE) * GAIN


def unit_rms(x: Tensor) -> Tensor:
    """x (N, D) over the root of its mean square."""
    return x * (x.square().mean(1, keepdim=True) + EPS).rsqrt()


class EqualizedLinear(nn.Module):
    """(N, in_dim) -> (N, out_dim), with equalised learning rate.

    Arguments:
        slow: m, the factor on the learning rate.
        bias: initial value of the biases.
    """

    def __init__(self, in_dim: int, out_dim: int, *, slow: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / slow)
        self.bias = nn.Parameter(torch.full((out_dim,), bias / slow))
        self.scale, self.slow = slow / math.sqrt(in_dim), slow

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The result times `gain`."""
        return torch.addmm(self.bias, x, self.weight.T, beta=self.slow * gain, alpha=self.scale * gain)


class EqualizedConv(nn.Module):
    """A convolution of any rank with equalised learning rate that keeps the resolution (`kernel` is odd).

    Rank 0 are vectors (N, C), with a kernel of one place.
    """

    def __init__(self, dims: int, channels_in: int, channels_out: int, kernel: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, *(kernel,) * dims))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None
        self.dims, self.padding = dims, kernel // 2
        self.scale = 1.0 / math.sqrt(self.weight[0].numel())

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The result times `gain`."""
        return convolve(x, *self.scaled(gain), self.padding)

    def scaled(self, gain: float) -> tuple[Tensor, Tensor | None]:
        """The kernel and the biases as they are used, times `gain`."""
        bias = self.bias if self.bias is None or gain == 1.0 else self.bias * gain
        return self.weight * (self.scale * gain), bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0, stride: int = 1) -> Tensor:
    """A convolution of the rank of x: (N, C, *space), or (N, C) for a linear layer."""
    dims = x.ndim - 2
    return CONV[dims](x, weight, bias, stride=stride, padding=padding) if dims > 0 else F.linear(x, weight, bias)


def over_channels(values: Tensor, like: Tensor) -> Tensor:
    """(N, C) or (C,) broadcast to the places of (N, C, *space)."""
    return values.reshape(*values.shape, *(1,) * (like.ndim - 2))


def modulated_convolution(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, padding: int = 0
) -> Tensor:
    """x (N, I, *space), weight (O, I, *kernel), style (N, I) -> (N, O, *space')."""
    y = convolve(x * over_channels(style, x), weight, None, padding)
    if not demodulate:
        return y
    return y * over_channels(demodulation(weight, style), y)


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """The scales d (N, O) of a modulated convolution, from weight (O, I, *kernel) and style (N, I)."""
    power = weight.square().flatten(2).sum(2) if weight.ndim > 2 else weight.square()
    return (style.square() @ power.T + EPS).rsqrt()


class MappingNetwork(nn.Module):
    """z (N, z_dim), c -> w (N, w_dim)."""

    def __init__(self, z_dim: int, w_dim: int, condition: ConditionSpec | None, *, depth: int) -> None:
        super().__init__()
        self.embed = ConditionEmbedding(condition, w_dim)
        sizes = [z_dim + self.embed.dim] + [w_dim] * depth
        self.layers = nn.ModuleList(EqualizedLinear(a, b, slow=0.01) for a, b in itertools.pairwise(sizes))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        context = self.embed(c)
        h = unit_rms(z) if context is None else torch.cat([unit_rms(z), unit_rms(context)], 1)
        for layer in self.layers:
            h = F.leaky_relu(layer(h, GAIN), SLOPE, inplace=True)  # of degree one, so the gain may go before it
        return h


class StyleGenerator(Generator):
    """A generator with a mapping network; its synthesis is a subclass's.

    Arguments:
        mapping_depth: layers of the mapping network.

    Attributes:
        w_avg: mean of w, (classes, w_dim), or (1, w_dim) for p(x) and for vectors as conditions.
        averaged: batches in it, for each row.
    """

    w_avg: Tensor
    averaged: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        z_dim: int,
        w_dim: int,
        num_ws: int,
        condition: ConditionSpec | None,
        *,
        mapping_depth: int,
    ) -> None:
        super().__init__(shape, z_dim, w_dim, num_ws)
        self.mapper = MappingNetwork(z_dim, w_dim, condition, depth=mapping_depth)
        self.classes = condition is not None and condition.kind == "class"
        rows = condition.size if condition is not None and self.classes else 1
        self.register_buffer("w_avg", torch.zeros(rows, w_dim))
        self.register_buffer("averaged", torch.zeros(rows, 1))

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        w: Tensor = self.mapper(z, c)
        return w.unsqueeze(1).expand(-1, self.num_ws, -1)

    def centre(self, c: Tensor | None) -> Tensor:
        mean = self.w_avg if c is None or not self.classes else self.w_avg[c]
        return mean.unsqueeze(1)

    @torch.no_grad()
    def track(self, ws: Tensor, c: Tensor | None) -> None:
        """Move the mean of w towards those of a training batch, ws (N, num_ws, w_dim)."""
        w = ws[:, 0].to(self.w_avg.dtype)
        index = torch.zeros(len(w), dtype=torch.int64, device=w.device) if c is None or not self.classes else c
        members = F.one_hot(index, len(self.w_avg)).to(w.dtype)
        count = members.sum(0).unsqueeze(1)
        self.averaged += count > 0
        # The plain mean at first, until it is as long as the memory of the moving one.
        rate = (count > 0) * self.averaged.clamp(min=1.0).reciprocal().clamp(min=1.0 - AVERAGING)
        self.w_avg += rate * (members.T @ w / count.clamp(min=1.0) - self.w_avg)
