"""MintNet's masked convolutions: triangular Jacobians in both orders, their diagonals, and inverses of any weights."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from tests.flow_oracles import CONTEXT, contexts, determinants, normal, prove_bijection, randomized
from trilemma.core.errors import DivergedError
from trilemma.flow.masked_convolution import MaskedConvolution
from trilemma.flow.transforms import Compose, Squeezed, Transform

SHAPES = {
    "vector": (5,),
    "number": (1,),
    "picture": (2, 3, 2),
    "one channel": (1, 4, 4),
    "pixel": (3, 1, 1),
    "row": (2, 1, 3),
}


def make(name: str, order: bool, context_dim: int = 0, scale: float = 0.4) -> MaskedConvolution:
    layer = MaskedConvolution(SHAPES[name], 3, order, context_dim)
    randomized(layer, scale=scale)
    return layer


def by_order(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A Jacobian with its dimensions sorted by row, column, channel."""
    index = torch.arange(math.prod(shape)).view(shape)
    index = (index if len(shape) == 1 else index.permute(1, 2, 0)).flatten()
    return matrix[index][:, index]


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_invertible_with_the_right_jacobian(name: str, order: bool, context_dim: int) -> None:
    layer, shape = make(name, order, context_dim), SHAPES[name]
    prove_bijection(layer, 1.5 * normal(4, *shape, seed=1), contexts(context_dim, 4)[0])


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_jacobian_is_triangular_full_and_has_the_diagonal_of_the_formula(name: str, order: bool) -> None:
    """In the order of dimensions nothing later is seen, and, within reach of the kernels, everything earlier is."""
    layer, shape = make(name, order), SHAPES[name]
    x = normal(1, *shape, seed=3)
    d = x.numel()
    matrix = by_order(jacobian(lambda v: layer(v)[0], x).view(d, d), shape)
    earlier = matrix.tril(-1) if order else matrix.triu(1)
    later = matrix.triu(1) if order else matrix.tril(-1)
    assert not later.any()
    if name != "one channel":  # elsewhere the three kernels together reach all earlier pixels
        expected = torch.ones(d, d).tril(-1) if order else torch.ones(d, d).triu(1)
        assert torch.equal(earlier != 0.0, expected.bool())
    slope = layer._map(x, layer._weights(None))[1]
    position = slope[0].flatten() if len(shape) == 1 else slope[0].permute(1, 2, 0).flatten()
    torch.testing.assert_close(matrix.diagonal(), position, rtol=0, atol=1e-12)
    assert (position > 0.0).all()


@pytest.mark.parametrize("name", ["vector", "picture"])
def test_gradients_of_value_and_ladj(name: str) -> None:
    layer = make(name, True, CONTEXT, scale=0.2)
    x, c = normal(2, *SHAPES[name], seed=1).requires_grad_(), normal(2, CONTEXT, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: layer(x, c), (x, c))
    assert torch.autograd.gradcheck(lambda z, c: layer.inverse(z, c), (x, c))


def test_gradient_of_the_inverse_with_respect_to_weights() -> None:
    """Against dx/dtheta = -J^-1 dz/dtheta, in the direction of a weight of each layer."""
    layer = make("picture", False)
    x = normal(1, 2, 3, 2, seed=4)
    z = layer(x)[0].detach()
    v = normal(1, 2, 3, 2, seed=5)
    parameters = [layer.first, layer.second, layer.third, layer.own_second, layer.log_scale]
    got = torch.autograd.grad((layer.inverse(z)[0] * v).sum(), parameters)
    j = jacobian(lambda u: layer(u)[0], x).view(12, 12)
    u = torch.linalg.solve(j.T, v.flatten()).view_as(v)
    expected = torch.autograd.grad(-(layer(x)[0] * u).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        assert b.any()


@pytest.mark.parametrize("name", ["vector", "one channel", "number"])
@pytest.mark.parametrize("scale", [3.0, 10.0])
def test_inverse_converges_for_wild_weights_and_inputs(name: str, scale: float) -> None:
    """Least slopes from e^-4 to e^4, and others many times as steep."""
    layer = make(name, True, scale=scale)
    layer.log_scale.data.clamp_(-4.0, 4.0)
    z = torch.cat([3.0 * normal(50, *SHAPES[name], seed=6), 1e6 * normal(3, *SHAPES[name], seed=7)])
    with torch.no_grad():
        x, _ = layer.inverse(z)
        residual = (layer(x)[0] - z).abs() / (1.0 + z.abs())
    assert residual.max() < 1e-10


def test_paper_iteration_runs_in_circles_where_ours_does_not() -> None:
    """A steep step on a gentle slope in one dimension: Newton's method jumps from one side to the other for ever."""
    layer = MaskedConvolution((1,), 1).double()
    with torch.no_grad():
        for p in (layer.shift_hidden, layer.shift):
            p.zero_()
        layer.log_scale.fill_(math.log(0.01))
        layer.own_first.fill_(3.0)
        layer.own_second.fill_(3.0)
        layer.own_third.fill_(5.0)
        z = torch.tensor([[0.3]]).double()
        x = z + 5.0
        for _ in range(100):
            value, slope, _ = layer._map(x, layer._weights(None))
            x = x - (value - z) / slope
        assert (value - z).abs() > 1.0
        torch.testing.assert_close(layer(layer.inverse(z)[0])[0], z, rtol=0, atol=1e-13)


def test_starts_close_to_the_identity() -> None:
    for shape in SHAPES.values():
        x = normal(6, *shape).float()
        z, ladj = MaskedConvolution(shape)(x)
        assert (z - x).abs().max() < 0.1
        assert (ladj / x[0].numel()).abs().max() < 0.1


def test_squeezed_to_single_pixels_and_composed_in_both_orders() -> None:
    layers: list[Transform] = [MaskedConvolution((4, 1, 1), 4, order) for order in (True, False)]
    flow = Squeezed(Compose(layers), (2, 2))
    randomized(flow)
    x = normal(3, 1, 2, 2, seed=8)
    z, ladj = flow(x)
    assert flow.numerical
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj, determinants(lambda v: flow(v)[0], x), rtol=0, atol=1e-9)
    matrix = jacobian(lambda v: flow(v)[0], x[:1]).view(4, 4)
    assert (matrix != 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_in_each_precision_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    layer = make("one channel", True).to(dtype)
    z = 2.0 * normal(20, 1, 4, 4, seed=9).to(dtype)
    with torch.no_grad():
        together = layer.inverse(z)[0]
        alone = torch.cat([layer.inverse(row)[0] for row in z.split(1)])
        residual = (layer(together)[0] - z).abs().max()
    eps = torch.finfo(dtype).eps
    assert residual < 1e3 * eps
    torch.testing.assert_close(together, alone, rtol=0, atol=1e5 * eps)


def test_inverse_says_so_where_there_is_none() -> None:
    layer = make("vector", True)
    with pytest.raises(DivergedError, match="does not converge"):
        layer.inverse(torch.full((1, 5), math.nan, dtype=torch.float64))
