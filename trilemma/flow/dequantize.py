r"""From integers to real numbers: the first layers of a flow whose data are a lattice of levels 0 .. L - 1.

For v = (x + u) / L with u in (0, 1)^D drawn from q(u|x), and a density p of v (Theis, van den Oord & Bethge 2016,
arXiv:1511.01844; Ho et al. 2019, arXiv:1902.00275; Hoogeboom et al. 2020, arXiv:2001.11235),
    log P(x) = log int p((x + u) / L) L^-D du >= E_q[log p(v) + ladj],   ladj = -log q(u|x) - D log L,
and the gap is KL(q(u|x) || p(u|x)): 0 where q is the posterior, the density of v within the cell. Uniform noise has
log q = 0 and asks of p that it be flat in every cell; a learned q need not.

The variational q is a flow of logistic noise that sees x:
    s_0 = logit(u_0),  u_0 ~ U(0, 1)^D,     s = f(s_0; h(x)),     u = sigmoid(s),
    log q(u|x) = sum log sigmoid'(s_0) - log |det ds/ds_0| - sum log sigmoid'(s).
Ho et al. start from a normal s_0. With a logistic one, a flow f that is the identity gives uniform noise, so learning
begins at the bound of uniform dequantization, not below it. f consists of elementwise maps of each pixel, and of
couplings between the channels of a squeezed picture; the features h(x), one vector for each pixel, come from a
convolutional network and are what the layers of f take as their context.

Numbers u closer to 0 or 1 than a few units in the last place of L would round onto the next level. So u lies in
(m, 1 - m) with such an m: u = m + (1 - 2 m) sigmoid(s), and log q has the term -D log(1 - 2 m) more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from trilemma.core.codec import Logit as LogitStep
from trilemma.core.noise import Noise
from trilemma.core.score import Kind
from trilemma.flow.coupling import Coupling
from trilemma.flow.elementwise import ElementwiseMap, Mapped
from trilemma.flow.transforms import Compose, Reshaped, Result, Squeezed, Transform, sum_dims
from trilemma.nets.attention import zero_init
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.residual_conv import ResidualConv


def _margin(levels: int, dtype: torch.dtype) -> float:
    """m: four times the largest rounding error of a number of the size of `levels`."""
    return levels * 2.0 * torch.finfo(dtype).eps


class UniformDequantize(Transform):
    """v = (x + u) / levels with u ~ U(m, 1 - m), from x (N, *shape), integers 0 .. levels - 1 as real numbers.

    The inverse is floor(levels v). A v outside (0, 1) becomes the nearest level.
    """

    kind: Kind = "lower_bound"
    bijective = False
    stochastic = True

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def _draw(self, x: Tensor, context: Tensor | None, noise: Noise) -> Result:
        """u (N, *shape) in (0, 1) before the margin, and log q(u|x) (N,)."""
        return noise.uniform_like(x), x.new_zeros(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        assert noise is not None, "dequantization draws from `noise`"
        u, log_q = self._draw(x, context, noise)
        m = _margin(self.levels, x.dtype)
        volume = x[0].numel() * (math.log1p(-2.0 * m) - math.log(self.levels))
        return (x + (m + (1.0 - 2.0 * m) * u)) / self.levels, volume - log_q

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        x = (self.levels * z).floor().clamp(0, self.levels - 1)
        return x, z.new_full((z.shape[0],), math.nan)


class VariationalDequantize(UniformDequantize):
    """v = (x + u) / levels with u from a learned q(u|x); see the module. The inverse is that of uniform noise.

    Arguments:
        levels: of x.
        flow: f on (N, *shape), whose context is h(x). Its ladj must be exact.
        features: h: (x scaled to (-1, 1) (N, *shape), context) -> what `flow` takes as context.
    """

    def __init__(self, levels: int, flow: Transform, features: nn.Module) -> None:
        super().__init__(levels)
        assert flow.kind == "exact", "log q must be exact: a bound of it would be one in the wrong direction"
        assert not flow.stochastic
        self.flow, self.features = flow, features

    def _draw(self, x: Tensor, context: Tensor | None, noise: Noise) -> Result:
        h = self.features((2.0 * x + 1.0) / self.levels - 1.0, context)
        m = 2.0 * torch.finfo(x.dtype).eps
        base = (m + (1.0 - 2.0 * m) * noise.uniform_like(x)).logit()  # logistic noise, but for tails of mass 2 m
        s, ladj = self.flow(base, h)
        dims = x[0].numel()
        return s.sigmoid(), sum_dims(_log_slope(base) - _log_slope(s)) - ladj - dims * math.log1p(-2.0 * m)


def _log_slope(s: Tensor) -> Tensor:
    """log sigmoid'(s), for any s."""
    return logsigmoid(s) + logsigmoid(-s)


class Logit(Transform):
    """(0, 1) to R: y = logit(alpha + (1 - 2 alpha) v), the codec's step as a layer.

    Arguments:
        alpha: in [0, 1/2). It keeps the edges finite; in return y has some mass beyond the logits of 0 and 1.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        self.step = LogitStep(alpha)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        y, ladj = self.step.encode(x, None)
        return y, ladj.to(x.dtype)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return self.step.decode(z), sum_dims(_log_slope(z) - math.log1p(-2.0 * self.step.alpha))


class ConditionalElementwise(Mapped):
    """Each dimension by its own map, with parameters from a network of the context.

    Arguments:
        elementwise: the map g.
        net: context (N, *) -> (N, elementwise.size * C, *) for x (N, C, *).
    """

    def __init__(self, elementwise: ElementwiseMap, net: nn.Module) -> None:
        super().__init__(elementwise)
        self.net = net

    def _parameters_for(self, x: Tensor, context: Tensor | None) -> Tensor:
        raw: Tensor = self.net(context).to(x.dtype)
        return raw.view(x.shape[0], self.elementwise.size, *x.shape[1:]).transpose(0, 1).contiguous()


class PixelContext(nn.Module):
    """A convolutional network whose context is a vector for each pixel, seen as further channels."""

    def __init__(self, in_channels: int, out_channels: int, *, width: int, depth: int, context_dim: int) -> None:
        super().__init__()
        self.net = ResidualConv(in_channels + context_dim, out_channels, width=width, depth=depth, context_dim=0)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (N, in_channels, H, W), context (N, context_dim, H, W) -> (N, out_channels, H, W)."""
        result: Tensor = self.net(torch.cat([x, context], 1))
        return result


def variational_dequantize(
    levels: int,
    shape: tuple[int, ...],
    elementwise: ElementwiseMap,
    *,
    steps: int = 4,
    width: int = 32,
    depth: int = 1,
    context_dim: int = 0,
) -> Transform:
    """Variational dequantization of vectors, signals or pictures x (N, *shape); at the start it is uniform.

    Arguments:
        levels: of x.
        shape: (D,), (C, L) or (C, H, W).
        elementwise: the univariate map of all layers. Only its direct way is used.
        steps: couplings, of alternating halves of the dimensions, or of the channels of pictures squeezed by two along
            each even side. A single dimension or channel has none.
        width, depth: of every network; `width` is also the number of features of x, for each pixel.
        context_dim: size of the context, 0 for none.
    """
    sizes = {"width": width, "depth": depth, "context_dim": width}
    if len(shape) == 1:
        features = ResidualMLP(shape[0], width, width=width, depth=depth, context_dim=context_dim)
        first: nn.Module = nn.Linear(width, elementwise.size * shape[0])
        net = functools.partial(ResidualMLP, **sizes, zero_init=True)
        flow = _noise_flow(shape[0], elementwise, first, net, steps)
        return VariationalDequantize(levels, flow, features)
    c, h, w = shape if len(shape) == 3 else (shape[0], 1, shape[1])
    factors = (1 + (h % 2 == 0), 1 + (w % 2 == 0))
    channels = c * math.prod(factors)
    conv = ResidualConv(channels, width, width=width, depth=depth, context_dim=context_dim)
    nn.init.kaiming_uniform_(conv.output.weight, a=5**0.5)  # the features may not be zero with all that read them
    first = nn.Conv2d(width, elementwise.size * channels, 1)
    flow = _noise_flow(channels, elementwise, first, functools.partial(PixelContext, **sizes), steps)
    squeezed = Squeezed(VariationalDequantize(levels, flow, conv), factors)
    return squeezed if len(shape) == 3 else Reshaped(squeezed, shape, (c, h, w))


def _noise_flow(
    channels: int, elementwise: ElementwiseMap, first: nn.Module, net: Callable[[int, int], nn.Module], steps: int
) -> Transform:
    """f: a map of each dimension for itself, whose parameters `first` gives, and couplings of the channels."""
    layers: list[Transform] = [ConditionalElementwise(elementwise, zero_init(first))]
    for index in range(steps if channels > 1 else 0):
        mask = (torch.arange(channels) + index) % 2 == 0
        passed = int(mask.sum())
        layers.append(Coupling(mask, net(passed, elementwise.size * (channels - passed)), elementwise))
    return Compose(layers)
