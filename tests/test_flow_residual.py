"""Invertible residual networks: spectral bounds, three ways to the determinant, and their gradients.

Stochastic estimates are compared with exact values at 5 standard errors of the mean: a false alarm in 1.7 million
comparisons, of which there are fewer than a thousand.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from tests.flow_oracles import CONTEXT, contexts, determinants, normal, prove_bijection, prove_gradients, randomized
from trilemma.core.errors import DivergedError
from trilemma.core.noise import Noise
from trilemma.flow.residual import (
    Residual,
    fixed_point,
    log_determinant,
    log_determinant_series,
)
from trilemma.flow.transforms import Compose, Squeezed
from trilemma.nets.lipschitz import (
    BoundedConvolution,
    BoundedLinear,
    LipschitzNet,
    LipSwish,
    lanczos,
    lipschitz_bound,
    lipschitz_net,
)

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {  # shape of an example, hidden layers
    "vector": ((4,), 2),
    "number": ((1,), 1),
    "affine": ((3,), 0),
    "picture": ((2, 3, 2), 2),
    "pixel": ((3, 1, 1), 1),
    "row": ((1, 1, 5), 0),
}


def network(name: str, context_dim: int = 0, scale: float = 1.5) -> LipschitzNet:
    """Weights beyond the bound, so that it binds."""
    shape, depth = SHAPES[name]
    net = lipschitz_net(shape, 6, depth, context_dim=context_dim)
    randomized(net, scale=scale)
    return net


def within_errors(draws: Tensor, expected: Tensor) -> None:
    """The mean over the first dimension is `expected` within 5 standard errors, and not by being noisy."""
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5.0 * error + 1e-12).all(), (draws.mean(0), expected, error)


# -- generic proofs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", SHAPES)
def test_invertible_with_the_right_jacobian(name: str, context_dim: int) -> None:
    shape = SHAPES[name][0]
    transform = Residual(network(name, context_dim)).eval()
    prove_bijection(transform, 1.5 * normal(4, *shape, seed=1), contexts(context_dim, 4)[0], atol=1e-11)


@pytest.mark.parametrize("name", ["vector", "picture"])
def test_gradients_of_value_and_ladj(name: str) -> None:
    transform = Residual(network(name, CONTEXT)).eval()
    prove_gradients(transform, *SHAPES[name][0])


def test_gradient_of_weights_is_that_of_finite_differences() -> None:
    """In evaluation, through the norm as well: W' does not grow with W where the bound binds."""
    transform = Residual(network("vector")).eval()
    x = normal(3, 4, seed=1)
    weight = transform.net.layers[1].weight
    direction = normal(*weight.shape, seed=2)

    def value(t: float, inverse: bool) -> Tensor:
        moved = copy.deepcopy(transform)
        moved.net.layers[1].weight.data += t * direction
        image, ladj = moved.inverse(x) if inverse else moved(x)
        return (image.sin().sum() + ladj.sum()).detach()

    for inverse in (False, True):
        image, ladj = transform.inverse(x) if inverse else transform(x)
        (gradient,) = torch.autograd.grad(image.sin().sum() + ladj.sum(), weight)
        expected = (value(1e-5, inverse) - value(-1e-5, inverse)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-8)
        assert expected.abs() > 1e-4
        assert (gradient * weight).sum().abs() < 1e-12


def test_context_made_from_x_adds_nothing_to_the_determinant() -> None:
    """The Jacobian is that at a fixed context, even where the context depends on x."""
    transform = Residual(network("vector", CONTEXT)).eval()
    x = normal(3, 4, seed=1).requires_grad_()
    torch.testing.assert_close(
        transform(x, x[:, :CONTEXT])[1], transform(x.detach(), x[:, :CONTEXT].detach())[1], rtol=0, atol=1e-13
    )


def test_squeezed_to_single_pixels() -> None:
    flow = Squeezed(
        Compose([Residual(lipschitz_net((4, 1, 1), 5, 2)), Residual(lipschitz_net((4, 1, 1), 5, 1))]), (2, 2)
    )
    randomized(flow, scale=1.5)
    x = normal(3, 1, 2, 2, seed=8)
    z, ladj = flow(x)
    assert flow.numerical
    assert (flow.kind, flow.stochastic) == ("exact", False)
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=0, atol=1e-11)
    torch.testing.assert_close(ladj, determinants(lambda v: flow(v)[0], x), rtol=0, atol=1e-10)


# -- the inverse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_to_the_precision_of_its_numbers_in_any_batch(dtype: torch.dtype) -> None:
    transform = Residual(network("vector").to(dtype)).eval()
    z = torch.cat([2.0 * normal(20, 4, seed=3), 1e6 * normal(2, 4, seed=4), torch.zeros(1, 4)]).to(dtype)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        x, _ = transform.inverse(z)
        residual = (transform(x)[0] - z).abs() / (1.0 + z.abs())
        alone = torch.cat([transform.inverse(row)[0] for row in z.split(1)])
    assert residual.max() < 30 * eps
    torch.testing.assert_close(alone, x, rtol=200 * eps, atol=200 * eps)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.97, -0.97])
def test_fixed_point_of_a_linear_contraction(factor: float) -> None:
    """x = b - a x is b / (1 + a); the slowest contraction does not look like none."""
    b = torch.tensor([[1.0, -2.0], [0.0, 0.0], [1e-8, 3e7]], dtype=torch.float64)
    calls = []
    x = fixed_point(lambda x: calls.append(1) or b - factor * x, b, abs(factor))
    torch.testing.assert_close(x, b / (1.0 + factor), rtol=1e-12, atol=0)
    assert len(calls) <= (3 if factor == 0.0 else 4 + math.log(1e-17) / math.log(abs(factor)))


def test_what_does_not_contract_is_refused() -> None:
    with pytest.raises(DivergedError, match="does not converge"):
        fixed_point(lambda x: 1.0 - 1.5 * x, torch.ones(2, 3), 0.97)
    with pytest.raises(DivergedError, match="does not converge"):
        fixed_point(lambda x: x * math.nan, torch.ones(2, 3), 0.97)


def test_a_bound_of_one_or_more_is_refused_in_evaluation() -> None:
    for coefficient, finite in ((1.0, True), (1.3, True), (0.9, False)):
        net = lipschitz_net((3,), 5, 1, coefficient=coefficient)
        randomized(net, scale=3.0)
        if not finite:
            net.layers[0].weight.data[0, 0] = math.nan
        for call in (Residual(net).eval(), Residual(net).eval().inverse):
            with pytest.raises(DivergedError, match=r"Lipschitz bound|not finite"):
                call(normal(2, 3))


# -- spectral bounds ---------------------------------------------------------------------------------------------


def operator(layer: BoundedLinear | BoundedConvolution, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    basis = torch.eye(math.prod(shape), dtype=weight.dtype).view(-1, *shape)
    return layer.operate(weight, basis).flatten(1).T


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 6)])
def test_layers_are_bounded_in_evaluation_and_after_convergence_in_training(
    kernel: int, size: tuple[int, int], scale: float
) -> None:
    layer = (BoundedConvolution(3, 5, kernel, size, 0.9) if kernel else BoundedLinear(3, 5, 0.9)).double()
    shape = (3, *size) if kernel else (3,)
    with torch.no_grad():
        layer.weight.copy_(scale * normal(*layer.weight.shape, seed=kernel))
    raw = torch.linalg.matrix_norm(operator(layer, layer.weight.detach(), shape), 2)
    expected = raw.clamp(max=0.9)
    for _ in range(1000):
        layer.bounded_weight()
    for mode in (True, False):
        layer.train(mode)
        norm = torch.linalg.matrix_norm(operator(layer, layer.bounded_weight(), shape), 2)
        torch.testing.assert_close(norm, expected, rtol=1e-6 if mode else 1e-12, atol=0)
    assert layer.lipschitz_bound() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(  # <y, W x> = <W^T y, x>
        (layer.operate(layer.weight, layer.right) * layer.left).sum(),
        (layer.adjoint(layer.weight, layer.left) * layer.right).sum(),
    )


@pytest.mark.parametrize("name", ["vector", "picture"])
@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
def test_networks_contract_by_their_bound(name: str, scale: float) -> None:
    """The bound is the coefficient where weights are large, and no Jacobian and no pair of points exceeds it."""
    net = network(name, CONTEXT, scale)
    shape, context = SHAPES[name][0], normal(1, CONTEXT)
    bound = lipschitz_bound(net)
    assert bound <= 0.97 * (1.0 + 1e-12)
    if scale > 1.0:
        assert bound == pytest.approx(0.97, rel=1e-12)
    for seed in range(5):
        j = jacobian(lambda v: net(v, context), normal(1, *shape, seed=seed)).view(math.prod(shape), -1)
        assert torch.linalg.matrix_norm(j, 2) <= bound
    x, y = normal(500, *shape, seed=1), normal(500, *shape, seed=2)
    c = context.expand(500, -1)
    ratio = (net(x, c) - net(y, c)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert (ratio <= bound).all()


def test_power_iteration_follows_weights_in_training() -> None:
    """100 steps of growth and turning by optimiser-sized steps: the norm stays within 1 % of the coefficient."""
    layer = BoundedLinear(20, 20, 0.9).double().train()
    for step in range(100):
        with torch.no_grad():
            layer.weight += 0.01 * normal(20, 20, seed=step)
        bounded = layer.bounded_weight()
    assert torch.linalg.matrix_norm(layer.weight, 2) > 1.0
    assert torch.linalg.matrix_norm(bounded, 2) < 0.9 * 1.01


def test_power_iteration_survives_a_weight_of_zero() -> None:
    layer = BoundedLinear(4, 4, 0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    layer.bounded_weight().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    with torch.no_grad():
        layer.weight.copy_(3.0 * torch.eye(4))
    for _ in range(3):
        bounded = layer.bounded_weight()
    torch.testing.assert_close(bounded, 0.5 * torch.eye(4))


def test_vectors_move_in_training_steps_only_and_are_saved() -> None:
    torch.manual_seed(0)
    net = lipschitz_net((3,), 5, 1)
    before = copy.deepcopy(net.state_dict())
    assert {"layers.0.left", "layers.0.right"} <= set(before)
    with torch.no_grad():
        net(torch.randn(2, 3))
    net.eval()(torch.randn(2, 3))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        net.layers[0].weight += 0.1 * torch.randn(5, 3)
    net.train()(torch.randn(2, 3))
    assert not torch.equal(net.layers[0].left, before["layers.0.left"])


def test_two_passes_before_one_backward() -> None:
    net = lipschitz_net((3,), 5, 1)
    (net(torch.randn(2, 3)) + net(torch.randn(2, 3))).sum().backward()


def test_spectrum_is_of_the_weight_as_it_is_now() -> None:
    """Even where the weight was changed behind autograd's back, as with moving averages and `data`."""
    layer = BoundedLinear(3, 3, 0.5).eval()
    for factor in (1.0, 2.0, 4.0):
        layer.weight.data.copy_(factor * torch.eye(3))
        assert layer.spectrum().norm == pytest.approx(factor)
        assert layer.spectrum() is layer.spectrum()


def test_lanczos_finds_the_leading_eigenvector() -> None:
    basis, _ = torch.linalg.qr(normal(80, 80))
    values = torch.linspace(0, 1, 80, dtype=torch.float64) ** 2
    a = basis @ values.diag() @ basis.T
    v = lanczos(lambda x: a @ x, normal(80, seed=1), 60)
    torch.testing.assert_close((v @ basis[:, -1]).abs(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-9)
    one = lanczos(lambda x: 2.0 * x, normal(80, seed=1), 60)  # found at once; nothing is left to look for
    torch.testing.assert_close(one, normal(80, seed=1) / normal(80, seed=1).norm())


def test_large_convolutions_are_bounded_by_lanczos() -> None:
    """768 inputs: the decomposition of the matrix, which the layer avoids, lies between its norm and its bound."""
    layer = BoundedConvolution(3, 4, 3, (16, 16), 0.9).double().eval()
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape))
    exact = torch.linalg.matrix_norm(operator(layer, layer.weight.detach(), (3, 16, 16)), 2).item()
    spectrum = layer.spectrum()
    assert spectrum.norm == pytest.approx(exact, rel=1e-6)
    assert exact <= spectrum.bound <= 1.006 * exact
    assert 0.9 <= layer.lipschitz_bound() <= 1.006 * 0.9


def test_lip_swish_is_lipschitz_for_any_sharpness() -> None:
    act = LipSwish().double()
    x = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    for raw in (-5.0, 0.5, 20.0):
        act.raw_sharpness.data.fill_(raw)
        slope = act(x).diff() / x.diff()
        assert slope.abs().max() <= 1.0
        y, exact = act.with_slope(x.requires_grad_())
        torch.testing.assert_close(y, act(x))
        torch.testing.assert_close(exact, torch.autograd.grad(act(x).sum(), x)[0], rtol=0, atol=1e-14)
        x = x.detach()


# -- series ------------------------------------------------------------------------------------------------------


def linear_net(matrix: Tensor) -> LipschitzNet:
    layer = BoundedLinear(*matrix.shape, 0.97).double()
    layer.weight.data.copy_(matrix)
    return LipschitzNet([layer], 0).eval()


def contraction(seed: int, symmetric: bool = False, norm: float = 0.8) -> Tensor:
    a = normal(4, 4, seed=seed)
    a = a + a.T if symmetric else a
    return norm * a / torch.linalg.matrix_norm(a, 2)


def all_probes(n: int) -> Tensor:
    """Every vector of n signs: the mean of v^T A v over them is tr A exactly."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n)


def test_series_of_a_linear_map_over_all_probes_is_the_sum_of_traces() -> None:
    a, weights = contraction(0), normal(7, 1, seed=1).abs().expand(-1, 16)
    got = log_determinant_series(lambda v: v @ a, all_probes(4), weights).mean()
    powers = [torch.linalg.matrix_power(a, k).trace() for k in range(1, 8)]
    expected = sum((-1) ** (k + 1) * weights[k - 1, 0] * t / k for k, t in enumerate(powers, 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def basic_series(image: Tensor, leaf: Tensor, probe: Tensor, weights: Tensor) -> Tensor:
    """The series by automatic differentiation, with all of its graph."""
    power, total = probe, torch.zeros_like(probe[:, 0])
    for k, weight in enumerate(weights, 1):
        (power,) = torch.autograd.grad(image, leaf, power, create_graph=True)
        total = total + (-1) ** (k + 1) * weight / k * (power * probe).sum(1)
    return total


@pytest.mark.parametrize("make", [lambda: linear_net(contraction(1)), lambda: network("vector")])
def test_gradient_without_the_graph_is_that_of_the_basic_series(make: Callable[[], LipschitzNet]) -> None:
    """Exactly, over all probes and for any weights of the terms, with respect to parameters and to x."""
    net, weights, probes = make(), normal(6, 1, seed=2).abs().expand(-1, 16), all_probes(4)
    x = normal(1, 4, seed=3).requires_grad_()
    leaf = x.expand(16, -1) + 0.0
    totals = (
        log_determinant_series(net.bind(None).linearize(leaf)[1], probes, weights).mean(),
        basic_series(net(leaf), leaf, probes, weights).mean(),
    )
    torch.testing.assert_close(*totals, rtol=0, atol=1e-12)
    inputs = [x, *net.parameters()]
    got, expected = (torch.autograd.grad(t, inputs, allow_unused=True, materialize_grads=True) for t in totals)
    assert any(g.any() for g in got[1:])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradient_for_one_probe_is_that_of_the_basic_series_of_a_symmetric_map() -> None:
    """z = x + s A x with symmetric A: dJ/ds = A commutes with J, so every draw agrees, not the mean alone."""
    a, probe = contraction(4, symmetric=True), all_probes(4)
    s = torch.ones(16, 1, dtype=torch.float64, requires_grad=True)
    leaf, weights = normal(16, 4).requires_grad_(), torch.ones(9, 16, dtype=torch.float64)
    (got,) = torch.autograd.grad(log_determinant_series(lambda v: s * (v @ a), probe, weights).sum(), s)
    (expected,) = torch.autograd.grad(basic_series(s * (leaf @ a), leaf, probe, weights).sum(), s)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert got.unique().numel() > 4


@pytest.mark.parametrize("symmetric", [True, False])
def test_truncated_series_is_within_its_bound_of_the_determinant(symmetric: bool) -> None:
    a, n = contraction(5, symmetric), 6
    got = log_determinant_series(lambda v: v @ a, all_probes(4), torch.ones(n, 16, dtype=torch.float64)).mean()
    exact = torch.linalg.slogdet(torch.eye(4, dtype=torch.float64) + a).logabsdet
    bound = 4 * (-math.log(1 - 0.8) - sum(0.8**k / k for k in range(1, n + 1)))
    assert 1e-6 < (got - exact).abs() < bound
    torch.testing.assert_close(log_determinant(lambda v: v @ a, normal(3, 4)), exact.expand(3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SHAPES)
def test_products_of_the_linearisation_are_those_of_autograd(name: str) -> None:
    """Two vectors for each example, with another context each."""
    net, x, c = network(name, CONTEXT), normal(3, *SHAPES[name][0]).requires_grad_(), normal(3, CONTEXT, seed=1)
    v = normal(6, *SHAPES[name][0], seed=2)
    value, pullback = net.bind(c).linearize(x)
    torch.testing.assert_close(value, net(x, c), rtol=0, atol=1e-14)
    expected = [torch.autograd.grad(net(x, c), x, part)[0] for part in v.split(3)]
    torch.testing.assert_close(pullback(v), torch.cat(expected), rtol=0, atol=1e-13)


def draws(transform: Residual, x: Tensor, n: int, key: str) -> Tensor:
    """(n, *) values of ladj, and of its gradients by the first weight and x where gradients are on."""
    many = x.expand(n, -1, *x.shape[1:]).flatten(0, 1) if x.ndim > 1 else x
    return transform(many, None, Noise(key, n=len(many)))[1].view(n, -1)


@pytest.mark.parametrize("name", ["vector", "picture"])
@pytest.mark.parametrize("terms", [1, 4])
def test_roulette_is_unbiased(name: str, terms: int) -> None:
    net = network(name)
    x = normal(3, *SHAPES[name][0], seed=1)
    with torch.no_grad():
        exact = Residual(net).eval()(x)[1]
        values = draws(Residual(net, "roulette", terms).eval(), x, 4000, "roulette")
    within_errors(values, exact)


def test_truncated_series_is_biased_as_stated() -> None:
    net, x = linear_net(contraction(6)), normal(2, 4)
    a = net.bind(None)(torch.eye(4, dtype=torch.float64)).T
    with torch.no_grad():
        values = draws(Residual(net, "truncated", 2).eval(), x, 4000, "truncated")
    within_errors(values, (a.trace() - (a @ a).trace() / 2).expand(2))


def gradients(transform: Residual, x: Tensor, noise: Noise | None) -> Tensor:
    """The gradient of the mean ladj by x and all weights, as one vector."""
    x = x.clone().requires_grad_()
    ladj = transform(x, None, noise)[1].mean()
    parts = torch.autograd.grad(ladj, [x, *transform.parameters()], allow_unused=True, materialize_grads=True)
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_the_roulette_is_that_of_the_determinant(training: bool) -> None:
    """In training one roulette serves the batch, in evaluation each example has its own.

    In training mode the power iteration has converged, and the gradients through the norm agree as well.
    """
    net = network("vector")
    net.train()
    for _ in range(300):
        net(torch.zeros(1, 4, dtype=torch.float64))
    x = normal(2, 4, seed=1)
    exact = gradients(Residual(net).train(training), x, None)
    stochastic = Residual(net, "roulette", 3).train(training)
    estimates = torch.stack([gradients(stochastic, x, Noise("g", i, n=2, block=2)) for i in range(1500)])
    assert (exact.abs() > 1e-3).sum() > 20
    error = estimates.std(0) / 1500**0.5
    assert ((estimates.mean(0) - exact).abs() <= 5.0 * error + 1e-6).all()


def test_draws_do_not_depend_on_the_batch() -> None:
    net, x = network("vector"), normal(40, 4, seed=1)
    for series in ("truncated", "roulette"):
        transform = Residual(net, series, 3).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            whole = transform(x, None, Noise("k", n=40))[1]
            parts = [
                transform(x[i : i + 7], None, Noise("k", n=len(x[i : i + 7]), start=i))[1] for i in range(0, 40, 7)
            ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-13)
        assert len(whole.unique()) == 40


def test_roulette_weights() -> None:
    """1/P(K >= k): `terms` + 1 ones, then doubling, for as many terms as the example has."""
    transform, x = Residual(network("vector"), "roulette", 3).eval(), torch.zeros(4000, 4)
    weights = transform._weights(Noise("w", n=4000), x)
    assert torch.equal(weights[:4], torch.ones(4, 4000))
    for k in range(4, len(weights)):
        own = weights[k]
        assert torch.equal(own[own > 0.0], torch.full_like(own[own > 0.0], 2.0 ** (k - 3)))
    # The share of examples with a term has the binomial law of P(K >= k); 5 standard deviations.
    for k in range(4, 9):
        p = 2.0 ** (3 - k)
        assert abs((weights[k] > 0).float().mean() - p) < 5.0 * math.sqrt(p * (1 - p) / 4000)
    shared = transform.train()._weights(Noise("w", n=4000), x)
    assert (shared == shared[:, :1]).all()
    assert torch.equal(shared[:3], torch.ones(3, 4000))


def test_stochastic_series_say_what_they_are() -> None:
    net = network("vector")
    for series in ("truncated", "roulette"):
        transform = Residual(net, series).eval()  # type: ignore[arg-type]
        assert (transform.kind, transform.stochastic, transform.numerical) == ("estimate", True, True)
        z = transform(normal(2, 4), None, Noise("s", n=2))[0]
        x, ladj = transform.inverse(z)
        torch.testing.assert_close(x, normal(2, 4), rtol=0, atol=1e-12)
        assert ladj.isnan().all()
        torch.testing.assert_close(transform.initialize(normal(2, 4)), z, rtol=0, atol=1e-14)


def test_memory_does_not_grow_with_the_number_of_terms() -> None:
    """The numbers kept for the backward pass; the basic series keeps more for each term."""
    net, x = network("picture"), normal(3, 2, 3, 2).requires_grad_()

    def saved(function: Callable[[], Any]) -> int:
        count = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal count
            count += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = function()
        assert kept is not None
        return count

    def run(terms: int) -> Callable[[], Any]:
        return lambda: Residual(net, "truncated", terms).eval()(x, None, Noise("m", n=3))

    def basic(terms: int) -> Callable[[], Any]:
        leaf, probe = normal(3, 4).requires_grad_(), torch.ones(3, 4, dtype=torch.float64)
        return lambda: basic_series(vector_net(leaf), leaf, probe, torch.ones(terms, 3, dtype=torch.float64))

    vector_net = network("vector")
    assert saved(run(2)) == saved(run(50))
    assert saved(basic(50)) > 10 * saved(basic(2))


# -- training ----------------------------------------------------------------------------------------------------


def test_learns_and_stays_invertible() -> None:
    """A bimodal density by maximum likelihood with the roulette; every bound still holds, and z goes back to x."""
    torch.manual_seed(0)
    blocks = [Residual(lipschitz_net((2,), 16, 2), "roulette") for _ in range(3)]
    flow = Compose(blocks).train()
    side = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)
    x = torch.stack([1.5 * side, torch.zeros(256)], 1) + 0.4 * normal(256, 2).float()
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    losses = []
    for step in range(120):
        z, ladj = flow(x, None, Noise("t", step, n=256, block=256))
        loss = (0.5 * z.square().sum(1) - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < losses[0] - 0.3
    flow.eval()
    for block in blocks:
        assert lipschitz_bound(block.net) <= 0.9701
    with torch.no_grad():
        torch.testing.assert_close(flow.inverse(flow(x, None, Noise("e", n=256))[0])[0], x, rtol=0, atol=1e-4)
