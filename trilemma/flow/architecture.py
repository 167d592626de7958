r"""A flow from its settings: steps of (linear map, normalisation, layer), flat or in several scales.

Larger pictures and signals take the multi-scale architecture (Dinh et al. 2017, arXiv:1605.08803; Kingma & Dhariwal
2018, arXiv:1807.03039): squeeze, steps, then half of the channels are done and the rest goes on at half the resolution.
RealNVP's checkerboards are masks over the four channels that a squeezed picture has for each of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from trilemma.core.errors import UsageError
from trilemma.core.spec import DataSpec
from trilemma.flow.autoregressive import Autoregressive
from trilemma.flow.coupling import Coupling
from trilemma.flow.dequantize import Logit, variational_dequantize
from trilemma.flow.elementwise import Additive, Affine, Elementwise, ElementwiseMap
from trilemma.flow.linear import ActNorm, Dense, Householder, LULinear, Permute
from trilemma.flow.marginal import Marginal
from trilemma.flow.masked_convolution import MaskedConvolution
from trilemma.flow.monotone import Bernstein, LogisticMixture, NeuralMonotone, SumOfSquares
from trilemma.flow.planar import Planar, Radial, Sylvester
from trilemma.flow.residual import Residual
from trilemma.flow.settings import SPATIAL, FlowConfig, Map
from trilemma.flow.splines import CubicSpline, RationalQuadraticSpline
from trilemma.flow.transformer import transformer_flow
from trilemma.flow.transforms import Compose, Inverse, Part, Reshaped, Squeezed, Transform
from trilemma.nets.lipschitz import lipschitz_net
from trilemma.nets.masked import MaskedMLP
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.residual_conv import ResidualConv

FLAT_DIMS = 256
"""Pictures and signals with more dimensions take the multi-scale architecture."""

MARGINALS = 1024
"""Most knots of the first map of tables, whose columns have spikes and long tails."""


def make_map(config: FlowConfig, multiscale: bool) -> ElementwiseMap:
    """The univariate map of coupling and autoregressive layers; with few bins on large pictures, to bound memory."""
    few = multiscale or config.elementwise == "sum-of-squares"
    bins, bound = config.bins or (4 if few else 8), config.bound or 5.0
    makers: dict[Map, Callable[[], ElementwiseMap]] = {
        "additive": Additive,
        "affine": Affine,
        "spline": lambda: RationalQuadraticSpline(bins, bound),
        "cubic-spline": lambda: CubicSpline(bins, bound),
        "bernstein": lambda: Bernstein(bins, bound),
        "logistic-mixture": lambda: LogisticMixture(bins),
        "sum-of-squares": lambda: SumOfSquares(degree=bins // 2),
        "monotone": lambda: NeuralMonotone(bins),
    }
    return makers[config.elementwise or "spline"]()


class Builder:
    """Makes the transform of x (N, *shape).

    Arguments:
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, config: FlowConfig, context_dim: int) -> None:
        self.config, self.context_dim = config, context_dim

    def build(self, spec: DataSpec, shape: tuple[int, ...], name: str) -> Transform:
        """The whole flow, for the data of a spec, which are `shape` in model space."""
        c, dims = self.config, math.prod(shape)
        spatial = spec.kind in ("image", "signal")
        if c.multiscale and not spatial:
            raise UsageError(f"{name}: multiscale=true needs pictures or signals, not {spec.kind} data")
        multiscale = spatial and dims > FLAT_DIMS and c.layer in SPATIAL if c.multiscale is None else c.multiscale
        self.elementwise = make_map(c, multiscale)
        steps: list[Transform] = []
        if c.layer == "transformer":
            sizes = {"blocks": c.steps, "width": c.width, "depth": c.depth, "heads": c.heads or 4}
            patch = c.patch or (2 if spatial and not any(side % 2 for side in shape[1:]) else 1)
            steps.append(transformer_flow(shape, patch=patch, context_dim=self.context_dim, **sizes))
        elif multiscale and dims > 1:
            picture = shape if len(shape) == 3 else (shape[0], 1, shape[1])
            steps.append(Reshaped(self._scale(*picture, c.scales), shape, picture))
        else:
            steps.append(Reshaped(Compose(self._flat(dims)), shape, (dims,)))
        if c.inverted:
            steps = [Inverse(Compose(steps))]
        marginals = (MARGINALS if spec.kind == "table" else 0) if c.marginals is None else c.marginals
        if marginals:
            steps.insert(0, Reshaped(Marginal(dims, marginals), shape, (dims,)))
        if c.dequantization == "variational":
            steps[:0] = self._dequantize(spec, name)
        return steps[0] if len(steps) == 1 else Compose(steps)

    def _dequantize(self, spec: DataSpec, name: str) -> list[Transform]:
        """From the levels of pictures to real numbers of about mean 0 and variance 1."""
        if spec.levels is None or spec.kind not in ("image", "signal"):
            raise UsageError(f"{name}: dequantization=variational needs pictures with levels, not {spec.describe()}")
        first = variational_dequantize(spec.levels, spec.shape, self.elementwise, context_dim=self.context_dim)
        return [first, Logit(), ActNorm(spec.shape[0])]

    def _flat(self, dims: int) -> Iterator[Transform]:
        if dims == 1 and self.config.layer == "coupling":  # nothing to couple with
            yield ActNorm(1)
            yield Elementwise((1,), self.elementwise, self.context_dim)
            return
        for index in range(self.config.steps):
            yield from self._step((dims,), index)
        if self.config.norm == "last":
            yield ActNorm(dims)

    def _step(self, shape: tuple[int, ...], index: int, checkerboard: bool = False) -> Iterator[Transform]:
        """One step on x (N, *shape). Steps 2k and 2k + 1 swap the halves of couplings, so every channel is mapped."""
        channels = shape[0]
        yield from self._mixing(channels, index)
        if self.config.norm == "each":
            yield ActNorm(channels)
        yield from self._layer(shape, index, checkerboard)

    def _mixing(self, channels: int, index: int) -> Iterator[Transform]:
        """Maps between layers. Between couplings every second `lu` is without its permutation: the halves then swap."""
        mixing = self.config.mixing
        if mixing == "lu":
            swap = self.config.layer == "coupling" and index % 2 == 1
            yield LULinear(torch.arange(channels) if swap else torch.randperm(channels))
        elif mixing == "dense":
            yield Dense(channels)
        elif mixing == "householder":
            yield Householder(channels, min(channels, 4))
        elif mixing == "permutation":
            yield Permute(torch.randperm(channels))
        elif mixing == "reverse" and index > 0:
            yield Permute(torch.arange(channels).flip(0))

    def _layer(self, shape: tuple[int, ...], index: int, checkerboard: bool) -> Iterator[Transform]:
        c, dims = self.config, shape[0]
        match c.layer:
            case "coupling":
                yield self._coupling(shape, index, checkerboard)
            case "autoregressive":
                sizes = {"width": c.width, "depth": c.depth, "context_dim": self.context_dim}
                yield Autoregressive(MaskedMLP(dims, self.elementwise.size, **sizes), self.elementwise)
            case "residual":
                net = lipschitz_net(shape, c.width, c.depth, c.lipschitz or 0.97, self.context_dim)
                yield Residual(net, c.series or "roulette", c.terms or 20)
            case "masked-convolution":
                yield MaskedConvolution(shape, c.width, index % 2 == 0, self.context_dim)
            case "planar":
                yield Planar(dims, self.context_dim)
            case "radial":
                yield Radial(dims, self.context_dim)
            case "sylvester":
                yield Sylvester(dims, min(c.width, dims), context_dim=self.context_dim)
            case "none":
                if self.context_dim:
                    yield Elementwise(shape, Affine(), self.context_dim)

    def _coupling(self, shape: tuple[int, ...], index: int, checkerboard: bool) -> Transform:
        channels, even = shape[0], index % 2 == 0
        # The channels of a squeezed picture go through its four corners; opposite ones have the same colour.
        first = torch.arange(channels) % 4 % 3 == 0 if checkerboard else torch.arange(channels) < channels // 2
        mask: Tensor = first == even
        passed = int(mask.sum())
        outputs = (channels - passed) * self.elementwise.size
        sizes = {"width": self.config.width, "depth": self.config.depth, "context_dim": self.context_dim}
        net: nn.Module
        if len(shape) == 1:
            net = ResidualMLP(passed, outputs, **sizes, zero_init=True)
        else:
            net = ResidualConv(passed, outputs, **sizes)
        return Coupling(mask, net, self.elementwise)

    def _scale(self, channels: int, height: int, width: int, scales: int) -> Transform:
        """Steps on the squeezed picture (channels, height, width), then smaller scales on half of its channels.

        A side of odd length is squeezed without its last row and once more without its first.
        """
        factors = (2 if height > 1 else 1, 2 if width > 1 else 1)
        squeezed = channels * math.prod(factors), height // factors[0], width // factors[1]
        corners = list(itertools.product(sorted({0, height % factors[0]}), sorted({0, width % factors[1]})))
        layers: list[Transform] = []
        for corner in corners:
            steps: list[Transform] = []
            n = max(2, self.config.steps // len(corners))
            for index in range(n):
                checkerboard = self.config.checkerboard and math.prod(factors) == 4 and index < n // 2
                steps += self._step(squeezed, index, checkerboard)
            if corner == corners[-1] and scales > 1 and math.prod(squeezed[1:]) >= 16:
                half = squeezed[0] // 2
                steps.append(Part(self._scale(half, *squeezed[1:], scales - 1), slice(half)))
            window = (slice(i, i + f * n) for i, f, n in zip(corner, factors, squeezed[1:], strict=True))
            layers.append(Part(Squeezed(Compose(steps), factors), slice(None), *window))
        if scales == self.config.scales and self.config.norm == "last":
            layers.append(ActNorm(channels))
        return Compose(layers)
