r"""Networks g(x, c) that contract in x: |g(x, c) - g(y, c)| <= L |x - y| with L < 1.

A linear or convolution layer x -> W x + b stretches by at most the norm |W| of its operator, so with
    W' = W min(1, c / |W|)
no layer stretches by more than c, and the network by no more than the product of the c, because its activations stretch
by at most 1 (Gouk et al. 2018, arXiv:1804.04368; Behrmann et al. 2019, arXiv:1811.00995). LipSwish,
x sigmoid(b x) / 1.1 with b > 0, is one, since |d swish / dx| < 1.0999 (Chen et al. 2019, arXiv:1906.02735).

In training |W| = u^T W v, differentiable in W, where u and v follow W by a step of the power iteration per training
step: v <- W^T u / |W^T u|, u <- W v / |W v|. A convolution is applied and transposed at the size of its picture, so
this is the norm of what the layer does, not of a reshaped kernel. Iterates approach the norm from below, which training
forgives and an inverse does not. So in evaluation u and v are the leading singular vectors themselves, found once per
value of W: from the singular value decomposition where the operator is small, from Lanczos' iteration on W^T W where it
is large. `lipschitz_bound` of the network is exact in the first case. In the second it holds except with probability
`FAILURE` per layer, because k steps from a random start in n dimensions miss the largest eigenvalue by more than its
share e with probability at most 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)) (Kuczynski & Wozniakowski 1992, theorem 4.2).

The context enters the hidden layers by a free linear map: it shifts, and so changes no difference in x.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, linear, softplus

from trilemma.core.errors import DivergedError
from trilemma.core.noise import make_generator

DENSE = 512
"""Operators of at most that many inputs are decomposed as matrices."""

SHARE, FAILURE = 0.01, 1e-6
"""Lanczos: relative error allowed in |W|^2, and probability of a larger one."""

Pullback = Callable[[Tensor], Tensor]
"""v -> v^T J."""

WARM_UP = 20
"""Power iterations at initialisation."""


class Spectrum(NamedTuple):
    """Leading singular vectors (1, *) of a layer with this weight; |W| lies in [norm, bound]."""

    weight: Tensor
    left: Tensor
    right: Tensor
    norm: float
    bound: float


class Bounded(nn.Module):
    """A linear operator with a bias whose norm is at most `coefficient`.

    Arguments:
        weight: any initial value.
        in_shape, out_shape: of one example, at which the operator's norm is taken.
        bias: number of entries of the bias.
        coefficient: bound c of the norm.
    """

    left: Tensor
    right: Tensor

    def __init__(
        self, weight: Tensor, in_shape: tuple[int, ...], out_shape: tuple[int, ...], bias: int, coefficient: float
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(bias))
        self.in_shape, self.coefficient = in_shape, coefficient
        self.register_buffer("left", _unit(torch.randn(1, *out_shape)))
        self.register_buffer("right", _unit(torch.randn(1, *in_shape)))
        self._spectrum: Spectrum | None = None
        for _ in range(WARM_UP):
            self._iterate()

    def operate(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b, (N, *in_shape) -> (N, *out_shape)."""
        raise NotImplementedError

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """W^T y, (N, *out_shape) -> (N, *in_shape)."""
        raise NotImplementedError

    def bounded_weight(self) -> Tensor:
        """W'. A training step (training mode, with gradients) moves u and v."""
        if not self.training:
            left, right = self.spectrum()[1:3]
        elif torch.is_grad_enabled():
            left, right = self._iterate()
        else:
            left, right = self.left, self.right
        norm = (left * self.operate(self.weight, right)).sum()
        return self.weight * (self.coefficient / norm.clamp(min=self.coefficient))

    @torch.no_grad()
    def _iterate(self) -> tuple[Tensor, Tensor]:
        """A step of the power iteration; what is left of the old vectors keeps them alive where W is 0."""
        right = _unit(self.adjoint(self.weight, self.left) + 1e-12 * self.right)
        left = _unit(self.operate(self.weight, right) + 1e-12 * self.left)
        self.left.copy_(left)
        self.right.copy_(right)
        return left, right  # not the buffers: a graph may hold them when the next step overwrites those

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        """Leading singular vectors, computed anew where the weight is no longer what it was."""
        weight, known = self.weight.detach(), self._spectrum
        here = known is not None and (known.weight.dtype, known.weight.device) == (weight.dtype, weight.device)
        if known is not None and here and torch.equal(known.weight, weight):
            return known
        if not weight.isfinite().all():
            raise DivergedError("a weight of a residual network is not finite; train with a smaller learning rate")
        left, right, norm, bound = self._decompose(weight.double())
        self._spectrum = Spectrum(weight.clone(), left.to(weight.dtype), right.to(weight.dtype), norm, bound)
        return self._spectrum

    def _decompose(self, weight: Tensor) -> tuple[Tensor, Tensor, float, float]:
        n = math.prod(self.in_shape)
        if n <= DENSE:
            basis = torch.eye(n, dtype=weight.dtype, device=weight.device).view(n, *self.in_shape)
            u, s, vh = torch.linalg.svd(self.operate(weight, basis).flatten(1).T, full_matrices=False)
            norm, error = s[0].item(), 0.0
            left, right = u[:, 0].reshape_as(self.left), vh[0].reshape_as(self.right)
        else:
            steps = math.ceil((math.log(1.648 * math.sqrt(n) / FAILURE) / math.sqrt(SHARE) + 1.0) / 2.0)
            start = torch.randn(1, *self.in_shape, generator=make_generator("lanczos", n))
            right, error = (
                lanczos(lambda x: self.adjoint(weight, self.operate(weight, x)), start.to(weight), steps),
                SHARE,
            )
            image = self.operate(weight, right)
            norm, left = image.norm().item(), _unit(image)
        return left, right, norm, norm / math.sqrt(1.0 - error)

    def lipschitz_bound(self) -> float:
        """Bound of the norm of W' in evaluation."""
        spectrum = self.spectrum()
        return spectrum.bound * self.coefficient / max(spectrum.norm, self.coefficient)


class BoundedLinear(Bounded):
    """(N, in_dim) -> (N, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, coefficient: float) -> None:
        super().__init__(nn.Linear(in_dim, out_dim).weight.detach(), (in_dim,), (out_dim,), out_dim, coefficient)

    def operate(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return linear(y, weight.T)


class BoundedConvolution(Bounded):
    """(N, in_channels, H, W) -> (N, out_channels, H, W) by an odd kernel, zeros around the picture.

    A 1x1 convolution is the same matrix at every pixel, so its norm is taken at one.

    Arguments:
        pixels: (H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, pixels: tuple[int, int], coefficient: float
    ) -> None:
        weight = nn.Conv2d(in_channels, out_channels, kernel).weight.detach()
        size = pixels if kernel > 1 else (1, 1)
        super().__init__(weight, (in_channels, *size), (out_channels, *size), out_channels, coefficient)

    def operate(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return conv_transpose2d(y, weight, padding=weight.shape[-1] // 2)


class LipSwish(nn.Module):
    """x sigmoid(b x) / 1.1 with a learned b > 0 (Chen et al. 2019, arXiv:1906.02735, section 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.raw_sharpness = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(softplus(self.raw_sharpness) * x) / 1.1

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and its derivative by x."""
        sharpness = softplus(self.raw_sharpness)
        gate = torch.sigmoid(sharpness * x)
        y = x * gate / 1.1
        return y, torch.addcmul(gate / 1.1, sharpness * y, 1.0 - gate)


class Contraction:
    """x (N, *shape) -> g(x, c) of the same shape for given contexts, with weights and shifts computed once."""

    def __init__(
        self, layers: list[Bounded], activations: list[LipSwish], weights: list[Tensor], shifts: list[Tensor | None]
    ) -> None:
        self._layers, self._activations, self._weights, self._shifts = layers, activations, weights, shifts

    def _affine(self, index: int, x: Tensor) -> Tensor:
        layer, shift = self._layers[index], self._shifts[index]
        x = layer.operate(self._weights[index], x, layer.bias)
        return x if shift is None else x + shift

    def __call__(self, x: Tensor) -> Tensor:
        x = self._affine(0, x)
        for index, activation in enumerate(self._activations, 1):
            x = self._affine(index, activation(x))
        return x

    def linearize(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """g(x, c) and v -> v^T dg/dx, for v (m N, *shape) with m vectors of each example, example by example.

        Slopes of the activations are computed once, so a product costs no more than its matrices. It has a graph where
        gradients are on.
        """
        slopes: list[Tensor] = []
        x = self._affine(0, x)
        for index, activation in enumerate(self._activations, 1):
            y, slope = activation.with_slope(x)
            slopes.append(slope)
            x = self._affine(index, y)

        def pullback(v: Tensor) -> Tensor:
            v = self._layers[-1].adjoint(self._weights[-1], v)
            for layer, weight, slope in zip(self._layers[-2::-1], self._weights[-2::-1], slopes[::-1], strict=True):
                v = layer.adjoint(weight, (v.view(-1, *slope.shape) * slope).view(v.shape))
            return v

        return x, pullback


class LipschitzNet(nn.Module):
    """Bounded layers with LipSwish between them; `lipschitz_net` makes one.

    Arguments:
        layers: in their order.
        context_dim: size of the context, 0 for none. It shifts the result of each layer but the last, or of the only
            one.
    """

    def __init__(self, layers: list[Bounded], context_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(LipSwish() for _ in layers[1:])
        self.widths = [len(layer.bias) for layer in (layers[:-1] or layers)]
        self.context = nn.Linear(context_dim, sum(self.widths), bias=False) if context_dim else None

    @property
    def coefficient(self) -> float:
        """Bound of the Lipschitz constant that the layers are set to."""
        return math.prod(layer.coefficient for layer in self._layers())

    def _layers(self) -> list[Bounded]:
        return list(self.layers)  # type: ignore[arg-type]

    def bind(self, context: Tensor | None) -> Contraction:
        """x -> g(x, context); context (N, context_dim) or None.

        Raises:
            DivergedError: in evaluation, if the Lipschitz constant is not known to be below 1.
        """
        layers = self._layers()
        if not self.training and not (bound := lipschitz_bound(self)) < 1.0:
            raise DivergedError(
                f"a residual network has the Lipschitz bound {bound:.4g}, so it cannot be inverted or scored; "
                "train it with a smaller coefficient"
            )
        shifts: list[Tensor | None] = [None] * len(layers)
        if self.context is not None:
            pixels = (1,) * (len(layers[0].in_shape) - 1)
            parts = self.context(context).split(self.widths, 1)
            shifts[: len(parts)] = [part.view(*part.shape, *pixels) for part in parts]
        weights = [layer.bounded_weight() for layer in layers]
        return Contraction(layers, list(self.activations), weights, shifts)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, *shape), context (N, context_dim) or None -> (N, *shape)."""
        return self.bind(context)(x)


def lipschitz_net(
    shape: tuple[int, ...], width: int = 128, depth: int = 2, coefficient: float = 0.97, context_dim: int = 0
) -> LipschitzNet:
    """A network for vectors or pictures with Lipschitz constant at most `coefficient` in x; it starts close to 0.

    Arguments:
        shape: of one example: (D,) for linear layers; (C, H, W) for convolutions, of which the first and the last are
            3x3 and the rest 1x1.
        width: of the hidden layers, in units or channels.
        depth: number of hidden layers, 0 for one affine map.
        coefficient: in (0, 1), shared out evenly over the layers.
        context_dim: size of the context, 0 for none.
    """
    sizes = [shape[0], *[width] * depth, shape[0]]
    share = coefficient ** (1.0 / (depth + 1))
    layers: list[Bounded] = []
    for index, (a, b) in enumerate(itertools.pairwise(sizes)):
        if len(shape) == 1:
            layers.append(BoundedLinear(a, b, share))
        else:
            kernel = 3 if index in (0, depth) else 1
            layers.append(BoundedConvolution(a, b, kernel, (shape[1], shape[2]), share))
    layers[-1].weight.data.mul_(0.01)  # not 0, where the power iteration would find no direction
    return LipschitzNet(layers, context_dim)


def lipschitz_bound(net: nn.Module) -> float:
    """Bound of the Lipschitz constant in evaluation: the product over the bounded layers, one after another."""
    return math.prod(layer.lipschitz_bound() for layer in net.modules() if isinstance(layer, Bounded))


def lanczos(gram: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """The leading eigenvector of a symmetric operator as far as `steps` of Lanczos' iteration know it, of norm 1.

    Arguments:
        gram: x -> A x, of the shape of `start`.
        start: random.
        steps: applications of the operator.
    """
    basis = [_unit(start).flatten()]
    images: list[Tensor] = []
    while True:
        images.append(gram(basis[-1].view_as(start)).flatten())
        known = torch.stack(basis)
        rest = images[-1]
        for _ in range(2):  # once leaves rounding errors that bring back directions already found
            rest = rest - known.T @ (known @ rest)
        if len(basis) == min(steps, start.numel()) or rest.norm() <= 1e-12 * images[-1].norm():
            break
        basis.append(_unit(rest))
    projected = known @ torch.stack(images).T
    _, vectors = torch.linalg.eigh(0.5 * (projected + projected.T))
    return _unit((vectors[:, -1] @ known).view_as(start))


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x)  # type: ignore[no-any-return]
