r"""MintNet: invertible networks of masked convolutions (Song, Meng & Ermon 2019, arXiv:1907.07945).

With the dimensions in some order, of pixels and of the channels in a pixel, a layer is
    z = t x + W3 h(W2 h(W1 x + b1) + b2) + b3,   h = tanh,   t > 0,
where each dimension i owns K units of each hidden layer, and the W are masked such that what belongs to i depends on
the dimensions up to i only. So the Jacobian is triangular. Its diagonal needs the blocks of the W that join what
belongs to the same dimension, W1_i (K), W2_i (K, K), W3_i (K), and these are positive:
    dz_i/dx_i = t_i + W3_i diag(h') W2_i diag(h') W1_i >= t_i > 0.
Below, the blocks are kept apart from the rest of the W, which joins strictly earlier dimensions to later ones.

Inverse. Given the other dimensions, z_i is an increasing function of x_i, whose slope is at least t_i:
    z_i = t_i x_i + a3 + W3_i h(a2 + W2_i h(a1 + W1_i x_i)),
where a1, a2, a3 come from the earlier dimensions. A sweep computes a1, a2, a3 from the last x, and solves for all x_i
at once by Newton's method, kept inside a bracket that is halved where Newton fails. After n sweeps the first n
dimensions are right, so D sweeps are enough for any weights; the residual f(x) - z tells when fewer are. The paper's
iteration x <- x - (f(x) - z) / (dz_i/dx_i) is one Newton step of each sweep: near the solution they are the same, far
from it the paper's may run in circles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, softplus

from trilemma.core.errors import DivergedError
from trilemma.core.noise import Noise
from trilemma.flow.residual import implicit
from trilemma.flow.transforms import Result, Transform, sum_dims

ROUNDING, LIMIT, PATIENCE = 8.0, 1e4, 4
"""Residuals of so many units of rounding end the sweeps, or are the largest accepted after so many in vain."""


class Weights(NamedTuple):
    """What the map is made of for a context: `strict` join different dimensions, `own` the same."""

    strict: tuple[Tensor, Tensor, Tensor]  # of `linear` or `conv2d`, channels (K or 1, C) flattened
    own: tuple[Tensor, Tensor, Tensor]  # (K, C, *), (C, K, K), (K, C, *)
    shifts: tuple[Tensor, Tensor, Tensor]  # (1 or N, K or 1, C, *)
    scale: Tensor  # t, (1 or N, C, *)


class Earlier(NamedTuple):
    """What earlier dimensions add in each layer: a1, a2 (N, K, C, *) and a3 (N, C, *)."""

    first: Tensor
    second: Tensor
    third: Tensor


class MaskedConvolution(Transform):
    """A mint layer on vectors (N, D) or, by masked 3x3 convolutions, on pictures (N, C, H, W).

    It starts close to the identity.

    Arguments:
        shape: of one example, (D,) or (C, H, W).
        filters: K, hidden units per dimension.
        order: True for the order of dimensions from first to last: rows, columns, channels; False for the reverse.
        context_dim: size of the context, 0 for none. It shifts the hidden layers and the result, and scales t.
    """

    numerical = True
    mask: Tensor

    def __init__(self, shape: tuple[int, ...], filters: int = 8, order: bool = True, context_dim: int = 0) -> None:
        super().__init__()
        k, c = filters, shape[0]
        self.filters, self.channels, self.pixels = filters, c, len(shape) - 1
        self.register_buffer("mask", _mask(c, self.pixels > 0, order), persistent=False)
        kernel, fan_in = self.mask.shape[2:], float(self.mask.sum()) / c
        self.first = nn.Parameter(torch.randn(k, c, 1, c, *kernel) / math.sqrt(1.0 + fan_in))
        self.second = nn.Parameter(torch.randn(k, c, k, c, *kernel) / math.sqrt(1.0 + k * fan_in))
        self.third = nn.Parameter(torch.zeros(1, c, k, c, *kernel))
        self.own_first = nn.Parameter(0.5 * torch.randn(k, c))
        self.own_second = nn.Parameter(0.5 * torch.randn(k, k, c) - math.log(k))
        self.own_third = nn.Parameter(torch.full((k, c), -4.0 - math.log(k)))
        self.shift_hidden = nn.Parameter(torch.randn(2, k, c))
        self.shift = nn.Parameter(torch.zeros(c))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.context = nn.Linear(context_dim, (2 * k + 2) * c, bias=False) if context_dim else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def _weights(self, context: Tensor | None) -> Weights:
        k, c, pixels = self.filters, self.channels, (1,) * self.pixels
        mask = self.mask.unsqueeze(1).unsqueeze(0)  # (1, C, 1, C, *kernel)
        strict = [(weight * mask).flatten(2, 3).flatten(0, 1) for weight in (self.first, self.second, self.third)]
        own = [softplus(weight) for weight in (self.own_first, self.own_second, self.own_third)]
        hidden, shift, log_scale = self.shift_hidden.unsqueeze(0), self.shift.unsqueeze(0), self.log_scale.unsqueeze(0)
        if self.context is not None:
            raw = self.context(context).view(-1, 2 * k + 2, c)
            hidden = hidden + raw[:, : 2 * k].unflatten(1, (2, k))
            shift = shift + raw[:, -2]
            log_scale = log_scale + raw[:, -1].view(-1, c, *pixels)
        hidden, shift = hidden.view(*hidden.shape, *pixels), shift.view(-1, c, *pixels)
        return Weights(
            (strict[0], strict[1], strict[2]),
            (own[0].view(k, c, *pixels), own[1].permute(2, 0, 1).contiguous(), own[2].view(k, c, *pixels)),
            (hidden[:, 0], hidden[:, 1], shift),
            log_scale.exp(),
        )

    def _strict(self, weight: Tensor, h: Tensor) -> Tensor:
        """h (N, K_in, C, *) -> (N, K_out, C, *)"""
        h = h.flatten(1, 2)
        result = conv2d(h, weight, padding=1) if self.pixels else linear(h, weight)
        return result.view(h.shape[0], -1, self.channels, *h.shape[2:])

    def _map(self, x: Tensor, w: Weights) -> tuple[Tensor, Tensor, Earlier]:
        """z and dz_i/dx_i, both (N, *shape), and what the dimensions got from earlier ones."""
        first = self._strict(w.strict[0], x.unsqueeze(1)) + w.shifts[0]
        h, slope = _first(x, first, w)
        second = self._strict(w.strict[1], h) + w.shifts[1]
        h, slope = _second(h, slope, second, w)
        third = self._strict(w.strict[2], h).squeeze(1) + w.shifts[2]
        return *_third(x, h, slope, third, w), Earlier(first, second, third)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        with torch.autocast(x.device.type, enabled=False):
            z, slope, _ = self._map(x, self._weights(context))
            return z, sum_dims(slope.log())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        with torch.autocast(z.device.type, enabled=False):
            w = self._weights(context)
            with torch.no_grad():
                x = self._invert(z, w)
            if torch.is_grad_enabled():
                x = self._with_gradient(x, z, w)
            return x, -sum_dims(self._map(x, w)[1].log())

    def _invert(self, z: Tensor, w: Weights) -> Tensor:
        """Sweeps; each example stops by itself, with a residual of rounding, or one that rounding keeps from falling.

        Residuals are relative to the size of the numbers that are added up.
        """
        x, answer, eps = z, z, torch.finfo(z.dtype).eps
        best = z.new_full((z.shape[0],), math.inf)
        since_best = torch.zeros_like(best)
        for _ in range(z[0].numel() + PATIENCE):
            value, slope, earlier = self._map(x, w)
            size = _size(z, earlier, w)
            residual = ((value - z).abs() / size).flatten(1).amax(1)
            active = (best > ROUNDING * eps) & ((since_best < PATIENCE) | (best > LIMIT * eps))
            better = active & (residual < best)
            best, answer = torch.where(better, residual, best), torch.where(_like(better, x), x, answer)
            since_best = torch.where(better, 0.0, since_best + 1.0)
            if (best <= ROUNDING * eps).all() or not active.any():
                break
            x = _solve(x, value, slope, z, earlier, w, size)
        if not (best <= LIMIT * eps).all():
            raise DivergedError(
                "the inverse of a masked convolution does not converge in this precision; "
                "train it with a smaller learning rate, or use float64"
            )
        return answer

    def _with_gradient(self, x: Tensor, z: Tensor, w: Weights) -> Tensor:
        leaf = x.detach().requires_grad_()
        value, slope, _ = self._map(leaf, w)
        diagonal = slope.detach()

        def solve(gradient: Tensor) -> Tensor:
            """J^{-T} gradient: sweeps, D of which are enough because J is triangular."""
            u = gradient / diagonal
            for _ in range(u[0].numel()):
                (row,) = torch.autograd.grad(value, leaf, u, retain_graph=True)
                new = u - (row - gradient) / diagonal
                change, u = (new - u).abs().amax(), new
                if change <= torch.finfo(u.dtype).eps * u.abs().amax():
                    break
            return u

        return implicit(x, z - value, solve)


def _mask(channels: int, picture: bool, order: bool) -> Tensor:
    """(C_out, C_in) or, for pictures, (C_out, C_in, 3, 3): 1 where the input stands strictly before the output."""
    below = torch.ones(channels, channels).tril(-1)
    if not picture:
        return below if order else below.T.contiguous()
    mask = torch.zeros(channels, channels, 3, 3)
    mask[:, :, 0], mask[:, :, 1, 0], mask[:, :, 1, 1] = 1.0, 1.0, below
    return mask if order else mask.transpose(0, 1).flip(2, 3).contiguous()


# The part of the map inside one dimension: values and slopes of the hidden layers (N, K, C, *) and of z (N, C, *).


def _first(x: Tensor, earlier: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    h = torch.tanh(earlier + w.own[0] * x.unsqueeze(1))
    return h, (1.0 - h * h) * w.own[0]


def _second(h: Tensor, slope: Tensor, earlier: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    # One product of matrices per channel, on contiguous memory: an einsum would copy matrix by matrix.
    both = torch.stack([h, slope]).transpose(0, 3).transpose(1, 2).contiguous()  # (C, K, N, 2, *)
    mixed = torch.bmm(w.own[1], both.flatten(2)).view(both.shape).transpose(1, 2).transpose(0, 3)
    h = torch.tanh(earlier + mixed[0])
    return h, (1.0 - h * h) * mixed[1]


def _third(x: Tensor, h: Tensor, slope: Tensor, earlier: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    return w.scale * x + earlier + (w.own[2] * h).sum(1), w.scale + (w.own[2] * slope).sum(1)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """(N,) for broadcasting with x (N, *)."""
    return mask.view(-1, *[1] * (x.ndim - 1))


def _size(z: Tensor, earlier: Earlier, w: Weights) -> Tensor:
    """Of the numbers that add up to z: rounding is of eps times this."""
    return z.abs() + earlier.third.abs() + w.own[2].sum(0)


def _solve(x: Tensor, value: Tensor, slope: Tensor, z: Tensor, earlier: Earlier, w: Weights, size: Tensor) -> Tensor:
    """The x of each dimension such that z is reached, given the earlier dimensions: Newton's method in a bracket.

    Arguments:
        x, value, slope: where to start, z there and dz/dx there.
        size: see `_size`.
    """
    residual, eps = value - z, torch.finfo(z.dtype).eps
    low, high = x - residual.clamp(min=0.0) / w.scale, x - residual.clamp(max=0.0) / w.scale
    shrinks = torch.ones_like(x, dtype=torch.bool)
    for _ in range(200):  # each step halves the residual or the bracket
        done = (residual.abs() <= 4.0 * eps * size) | (high - low <= 2.0 * eps * x.abs())
        if done.all():
            break
        newton = x - residual / slope
        inside = shrinks & (newton >= low) & (newton <= high)
        x = torch.where(done, x, torch.where(inside, newton, 0.5 * (low + high)))
        value, slope = _third(x, *_second(*_first(x, earlier.first, w), earlier.second, w), earlier.third, w)
        shrinks = (value - z).abs() < 0.5 * residual.abs()
        residual = value - z
        low, high = torch.where(residual > 0.0, low, x), torch.where(residual > 0.0, x, high)
    return x
