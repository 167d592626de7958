"""Maps, couplings and masked flows against zuko, nflows and normflows: same weights, both directions, gradients.

Where a peer constrains its parameters in another way, ours are converted: both then have the same knots and scales.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.flow_oracles import normal, randomized
from trilemma.flow.autoregressive import Autoregressive
from trilemma.flow.coupling import Coupling
from trilemma.flow.elementwise import Affine
from trilemma.flow.monotone import Bernstein, SumOfSquares
from trilemma.flow.planar import ONE
from trilemma.flow.splines import RationalQuadraticSpline
from trilemma.flow.transforms import Transform
from trilemma.nets.masked import MaskedMLP
from trilemma.nets.mlp import ResidualMLP

F64 = torch.float64
BINS, BOUND, TINY = 5, 2.0, 1e-3
SOFT = math.log(TINY)
"""zuko's bound of logarithms: its x / (1 + |x / SOFT|)."""

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


def same(ours: Map, theirs: Map, x: Tensor, parameters: Sequence[Tensor] = (), rtol: float = 1e-9) -> Tensor:
    """Images, ladj, and gradients of x and of the parameters; returns the image."""
    results = []
    for function in (ours, theirs):
        leaf = x.clone().requires_grad_(True)
        z, ladj = function(leaf)
        total = (z * normal(*z.shape, seed=8)).sum() + (ladj * normal(*ladj.shape, seed=9)).sum()
        results.append([z, ladj, *torch.autograd.grad(total, [leaf, *parameters])])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())
    return results[0][0].detach()


def both_ways(ours: Transform, theirs: nn.Module, x: Tensor, parameters: Sequence[Tensor] = ()) -> None:
    """Against a transform of nflows."""
    z = same(lambda v: ours(v), lambda v: theirs(v), x, parameters)
    same(lambda v: ours.inverse(v), lambda v: theirs.inverse(v), z, parameters)


@pytest.fixture
def transforms() -> Iterator[object]:
    """nflows' transforms; some of its calls are deprecated."""
    module = pytest.importorskip("nflows.transforms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


# -- maps of one dimension ----------------------------------------------------------------------------------------

POINTS = torch.tensor([-3.1, -BOUND - 1e-9, -1.9, -0.7, 0.0, 0.01, 1.2, BOUND - 1e-9, BOUND + 1e-9, 4.0], dtype=F64)
"""Inside and outside the borders."""


def raw_parameters(size: int) -> Tensor:
    return (1.5 * normal(size, len(POINTS), seed=3)).requires_grad_(True)


def to_nflows(parameters: Tensor) -> list[Tensor]:
    """Parameters (3 K - 1, *) of our spline -> widths, heights and slopes of nflows', (*, K) and (*, K - 1)."""
    widths, heights, slopes = parameters.movedim(0, -1).split([BINS, BINS, BINS - 1], -1)
    return [widths, heights, slopes + math.log(math.expm1(1.0 - TINY))]


def unsoft(x: Tensor, factor: float = 1.0) -> Tensor:
    """The inverse of zuko's bound x / (1 + |factor x / SOFT|)."""
    return x / (1.0 - (factor * x / SOFT).abs())


def to_zuko(parameters: Tensor) -> list[Tensor]:
    """The same for zuko's, whose bins and slopes have no smallest size."""
    widths, heights, slopes = parameters.movedim(0, -1).split([BINS, BINS, BINS - 1], -1)
    return [unsoft(widths, 2.0), unsoft(heights, 2.0), unsoft(softplus(slopes + ONE).log())]


def test_spline_is_nflows() -> None:
    peer = pytest.importorskip("nflows.transforms.splines").unconstrained_rational_quadratic_spline
    ours, parameters = RationalQuadraticSpline(BINS, BOUND), raw_parameters(3 * BINS - 1)

    def theirs(x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = peer(x, *to_nflows(parameters), inverse=inverse, tail_bound=BOUND)
        return result

    z = same(lambda x: ours.forward(x, parameters), theirs, POINTS, [parameters])
    same(lambda y: ours.inverse(y, parameters), lambda y: theirs(y, True), z, [parameters])
    for border in (-BOUND, BOUND):  # where the log slope jumps, so that gradients are one-sided
        x = torch.full_like(POINTS, border)
        torch.testing.assert_close(ours.forward(x, parameters), theirs(x), rtol=0, atol=1e-12)


def test_spline_is_zukos() -> None:
    peer = pytest.importorskip("zuko.transforms").MonotonicRQSTransform
    ours = RationalQuadraticSpline(BINS, BOUND, min_bin=0.0, min_slope=0.0)
    # zuko's sizes before its bound are below 3.45.
    parameters = (0.8 * raw_parameters(3 * BINS - 1).detach()).clamp(-3.0, 3.0).requires_grad_(True)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = peer(*to_zuko(parameters), bound=BOUND).call_and_ladj(x)
        return result

    def theirs_inverse(y: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = peer(*to_zuko(parameters), bound=BOUND).inv.call_and_ladj(y)
        return result

    z = same(lambda x: ours.forward(x, parameters), theirs, POINTS, [parameters])
    same(lambda y: ours.inverse(y, parameters), theirs_inverse, z, [parameters])
    for border in (-BOUND, BOUND):
        x = torch.full_like(POINTS, border)
        y, log_slope = theirs(x)
        torch.testing.assert_close(ours.forward(x, parameters)[0], y, rtol=0, atol=1e-12)
        if border < 0:  # the upper one counts as inside there
            torch.testing.assert_close(ours.forward(x, parameters)[1], log_slope, rtol=0, atol=1e-12)


def test_bernstein_polynomial_is_zukos() -> None:
    """Theirs has equal increments at either end. Its slope is taken a millionth inside, and its inverse is rough."""
    peer = pytest.importorskip("zuko.transforms").BernsteinTransform
    raw = (1.5 * normal(len(POINTS), 6, seed=4)).requires_grad_(True)
    ours = Bernstein(degree=7, bound=BOUND, min_slope=0.0)

    def parameters() -> Tensor:
        theta = peer(raw, bound=BOUND).theta
        slopes = theta.diff(dim=-1) * (7 / (2.0 * BOUND))
        return torch.cat([theta[:, :1] + BOUND, slopes.expm1().log() - ONE], 1).T

    inside = POINTS.clamp(-0.99 * BOUND, 0.99 * BOUND)
    for x, rtol in ((inside, 1e-9), (POINTS, 1e-5)):
        z = same(lambda v: ours.forward(v, parameters()), peer(raw, bound=BOUND).call_and_ladj, x, [raw], rtol)
    back, _ = ours.inverse(z, parameters())
    torch.testing.assert_close(peer(raw, bound=BOUND)(back), z, rtol=1e-9, atol=1e-9)


def test_sum_of_squares_is_zukos() -> None:
    """Theirs adds the smallest slope, ours mixes it in: ours = (1 - m) theirs + c."""
    peer = pytest.importorskip("zuko.transforms").SOSPolynomialTransform
    ours, m = SumOfSquares(polynomials=3, degree=2, min_slope=0.1), 0.1
    parameters = (0.5 * raw_parameters(ours.size).detach()).requires_grad_(True)
    scales, bound = torch.as_tensor(ours.scales, dtype=F64), 10.0

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        a = parameters[:-1].T.view(-1, 3, 3) * scales * bound ** torch.arange(3)
        y, log_slope = peer(a, slope=m / (1.0 - m), bound=bound).call_and_ladj(x)
        return (1.0 - m) * y + parameters[-1], log_slope + math.log1p(-m)

    z = same(lambda x: ours.forward(x, parameters), theirs, POINTS, [parameters])
    back, ladj = ours.inverse(z, parameters)
    torch.testing.assert_close(theirs(back), (z, -ladj), rtol=1e-9, atol=1e-9)


# -- couplings ----------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A network with its outputs in the other party's order and scale."""

    def __init__(self, net: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.change(self.net(x, context))


def unbounded(log_scale: Tensor, bound: float = 5.0) -> Tensor:
    """The parameter of `Affine` for a log scale."""
    return bound * torch.atanh(log_scale / bound)


def masks() -> list[Tensor]:
    return [torch.tensor(bits).bool() for bits in ((1, 1, 1, 0, 0), (0, 0, 1, 1, 1), (0, 1, 0, 1, 1))]


@pytest.mark.parametrize("mask", masks())
def test_affine_coupling_is_nflows(transforms: object, mask: Tensor) -> None:
    """nflows: [shift, u] with the scale sigmoid(u + 2) + 0.001."""
    net = randomized(ResidualMLP(3, 4, width=8, depth=1))
    theirs = transforms.AffineCouplingTransform((~mask).int(), lambda a, b: net)  # type: ignore[attr-defined]

    def change(raw: Tensor) -> Tensor:
        shift, u = raw.chunk(2, 1)
        return torch.cat([unbounded((torch.sigmoid(u + 2.0) + TINY).log()), shift], 1)

    both_ways(Coupling(mask, Adapted(net, change), Affine()), theirs, 2.0 * normal(6, 5), list(net.parameters()))


def test_affine_coupling_is_normflows() -> None:
    """normflows: shifts and log scales take turns; its parts stay apart."""
    peer = pytest.importorskip("normflows").flows.AffineCoupling
    net = randomized(ResidualMLP(3, 4, width=8, depth=1))
    theirs, halves = peer(net), [3, 2]

    def change(raw: Tensor) -> Tensor:
        return torch.cat([unbounded(raw[:, 1::2]), raw[:, ::2]], 1)

    def joined(method: Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]) -> Map:
        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            parts, ladj = method(list(x.split(halves, 1)))
            return torch.cat(parts, 1), ladj

        return function

    ours = Coupling(masks()[0], Adapted(net, change), Affine())
    z = same(lambda x: ours(x), joined(theirs.forward), 2.0 * normal(6, 5), list(net.parameters()))
    same(ours.inverse, joined(theirs.inverse), z, list(net.parameters()))


def by_dimension(raw: Tensor) -> Tensor:
    """Outputs of one of our networks in nflows' order, all of a dimension in turn."""
    parameters = raw.view(len(raw), 3 * BINS - 1, -1)
    return torch.cat(to_nflows(parameters.transpose(0, 1)), -1).flatten(1)


@pytest.mark.parametrize("mask", masks())
def test_spline_coupling_is_nflows(transforms: object, mask: Tensor) -> None:
    """Our network behind both, and theirs, whose widths and heights nflows divides by the root of its width."""
    resnet = pytest.importorskip("nflows.nn.nets").ResidualNet
    spline, x = RationalQuadraticSpline(BINS, BOUND), 1.5 * normal(6, 5)
    peer = transforms.PiecewiseRationalQuadraticCouplingTransform  # type: ignore[attr-defined]
    settings = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    net = randomized(ResidualMLP(3, 2 * spline.size, width=8, depth=1))
    theirs = peer((~mask).int(), lambda a, b: Adapted(net, by_dimension), **settings)
    both_ways(Coupling(mask, net, spline), theirs, x, list(net.parameters()))

    theirs = peer((~mask).int(), lambda a, b: resnet(a, b, hidden_features=9), **settings)
    net = randomized(theirs.transform_net)

    def change(raw: Tensor) -> Tensor:
        w, h, slopes = raw.view(len(raw), 2, -1).split([BINS, BINS, BINS - 1], 2)
        return torch.cat([w / 3.0, h / 3.0, slopes - math.log(math.expm1(1.0 - TINY))], 2).transpose(1, 2).flatten(1)

    both_ways(Coupling(mask, Adapted(net, change), spline), theirs, x, list(net.parameters()))


# -- autoregressive -----------------------------------------------------------------------------------------------

DIMS = 5


def masked(size: int, context_dim: int = 0) -> MaskedMLP:
    net = randomized(MaskedMLP(DIMS, size, width=16, depth=2, context_dim=context_dim))
    assert isinstance(net, MaskedMLP)
    return net


def affine_of(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Log scale and shift, (N, D)."""
    unbound, shift = raw.view(len(raw), 2, -1).unbind(1)
    return 5.0 * torch.tanh(unbound / 5.0), shift


@pytest.mark.parametrize("context_dim", [0, 3])
def test_masked_affine_flow_is_nflows(transforms: object, context_dim: int) -> None:
    """nflows: (u, shift) of each dimension, with the scale softplus(u) + 0.001."""
    net, context = masked(2, context_dim), normal(6, context_dim, seed=5) if context_dim else None

    def change(raw: Tensor) -> Tensor:
        log_scale, shift = affine_of(raw)
        return torch.stack([(log_scale.exp() - TINY).expm1().log(), shift], 2).flatten(1)

    theirs = transforms.MaskedAffineAutoregressiveTransform(DIMS, 8)  # type: ignore[attr-defined]
    theirs.autoregressive_net = Adapted(net, change)
    ours, parameters = Autoregressive(net, Affine()), list(net.parameters())
    z = same(lambda x: ours(x, context), lambda x: theirs(x, context), 2.0 * normal(6, DIMS), parameters)
    same(lambda y: ours.inverse(y, context), lambda y: theirs.inverse(y, context), z, parameters)


@pytest.mark.parametrize("name", ["affine", "spline"])
def test_masked_flows_are_zukos(name: str) -> None:
    peer, univariate = pytest.importorskip("zuko.flows"), pytest.importorskip("zuko.transforms")
    if name == "affine":
        ours, change = Autoregressive(masked(2), Affine()), lambda raw: affine_to_zuko(*affine_of(raw))
        theirs = peer.MaskedAutoregressiveTransform(DIMS)
    else:
        spline = RationalQuadraticSpline(BINS, BOUND, min_bin=0.0, min_slope=0.0)
        ours, change = Autoregressive(masked(spline.size), spline), splines_to_zuko
        shapes = [(BINS,), (BINS,), (BINS - 1,)]

        def constructor(*phi: Tensor) -> object:
            return univariate.MonotonicRQSTransform(*phi, bound=BOUND)

        theirs = peer.MaskedAutoregressiveTransform(DIMS, univariate=constructor, shapes=shapes)
    theirs.hyper = Adapted(ours.net, change)
    parameters = list(ours.net.parameters())
    z = same(lambda x: ours(x), lambda x: theirs().call_and_ladj(x), 1.5 * normal(6, DIMS), parameters)
    same(ours.inverse, lambda y: theirs().inv.call_and_ladj(y), z, parameters)


def affine_to_zuko(log_scale: Tensor, shift: Tensor) -> Tensor:
    return torch.stack([shift, unsoft(log_scale)], 2).flatten(1)


def splines_to_zuko(raw: Tensor) -> Tensor:
    return torch.cat(to_zuko(raw.view(len(raw), 3 * BINS - 1, -1).transpose(0, 1)), -1).flatten(1)
