"""Univariate monotone maps: inverses, slopes, derivatives of both directions, tails, and their formulas."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import BPoly, CubicHermiteSpline
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.flow_oracles import CONTEXT, determinants, normal, randomized
from trilemma.flow.elementwise import Additive, Affine, Elementwise, ElementwiseMap
from trilemma.flow.monotone import Bernstein, LogisticMixture, NeuralMonotone, SumOfSquares, powers, solve
from trilemma.flow.splines import CircularSpline, CubicSpline, RationalQuadraticSpline

MAPS: dict[str, ElementwiseMap] = {
    "additive": Additive(),
    "affine": Affine(),
    "rational quadratic": RationalQuadraticSpline(bins=5, bound=2.0),
    "cubic": CubicSpline(bins=5, bound=2.0),
    "circular": CircularSpline(bins=5),
    "logistic mixture": LogisticMixture(components=4),
    "Bernstein": Bernstein(degree=6, bound=2.0),
    "sum of squares": SumOfSquares(polynomials=2, degree=2),
    "neural": NeuralMonotone(hidden=3, layers=2),
}
ON_THE_LINE = [name for name in MAPS if name != "circular"]
NUMERICAL = [name for name, m in MAPS.items() if m.numerical]

# The largest |y - x| at parameters 0, where x lies in [-4, 4] (for the circle in [-3.1, 3.1]).
DISTANCE = {"logistic mixture": 0.1, "neural": 0.25}


def inputs(name: str, n: int = 40) -> Tensor:
    """Inside and outside of splines; on the circle, angles."""
    x = 1.7 * normal(n, seed=1)
    return x.clamp(-3.1, 3.1) if name == "circular" else x


def raw(name: str, n: int, scale: float = 1.0, seed: int = 2) -> Tensor:
    return scale * normal(MAPS[name].size, n, seed=seed)


def same(name: str, a: Tensor, b: Tensor, tolerance: float) -> None:
    difference = torch.remainder(a - b + math.pi, 2 * math.pi) - math.pi if name == "circular" else a - b
    assert difference.abs().max() < tolerance


# -- what every map promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_identity_at_zero(name: str) -> None:
    x = torch.linspace(-1, 1, 201, dtype=torch.float64) * (3.1 if name == "circular" else 4.0)
    y, log_slope = MAPS[name].forward(x, torch.zeros(MAPS[name].size, 201, dtype=torch.float64))
    assert (y - x).abs().max() < DISTANCE.get(name, 1e-14)
    assert log_slope.abs().max() < DISTANCE.get(name, 1e-14)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", MAPS)
def test_inverse_and_slopes(name: str, scale: float) -> None:
    m, x, p = MAPS[name], inputs(name).requires_grad_(), raw(name, 40, scale)
    y, log_slope = m.forward(x, p)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-9)
    with torch.no_grad():
        back, log_slope_back = m.inverse(y, p)
        residual = m.forward(back, p)[0]
        ahead = m.forward(m.inverse(x, p)[0], p)[0]
    same(name, residual, y, 1e-10)
    same(name, ahead, x, 1e-10)
    # Where the slope is small, y does not hold all the digits of x.
    sure = slope > 0.01
    same(name, back[sure], x[sure], 1e-10)
    torch.testing.assert_close(log_slope_back[sure], -log_slope[sure], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MAPS)
def test_derivatives_of_both_directions(name: str) -> None:
    m = MAPS[name]
    n = 2 if name == "neural" else 5  # it has many parameters
    x, p = inputs(name, n).requires_grad_(), raw(name, n, 0.7).requires_grad_()
    assert gradcheck(m.forward, (x, p))
    assert gradcheck(m.inverse, (x, p))
    assert gradgradcheck(m.forward, (x, p))


@pytest.mark.parametrize("name", [name for name in MAPS if name != "cubic"])
def test_second_derivatives_of_the_inverse(name: str) -> None:
    m = MAPS[name]
    x, p = inputs(name, 2).requires_grad_(), raw(name, 2, 0.7).requires_grad_()
    assert gradgradcheck(lambda y, p: m.inverse(y, p)[0], (x, p))


@pytest.mark.parametrize("leaf", ["x", "parameters"])
def test_analytic_gradient_where_only_one_is_asked_for(leaf: str) -> None:
    m, name = MAPS["rational quadratic"], "rational quadratic"
    x, p = inputs(name, 5).requires_grad_(leaf == "x"), raw(name, 5).requires_grad_(leaf == "parameters")
    assert gradcheck(m.forward, (x, p))
    assert gradgradcheck(m.forward, (x, p))


def test_analytic_gradient_is_that_of_autograd() -> None:
    m = MAPS["rational quadratic"]
    assert isinstance(m, RationalQuadraticSpline)
    x, p = (2.0 * normal(500)).requires_grad_(), raw("rational quadratic", 500, 3.0).requires_grad_()
    a, b = normal(2, 500, seed=7)
    results = []
    for function in (m.forward, lambda x, p: m._with_tails(x, p)[:2]):
        y, log_slope = function(x, p)
        results.append((y, log_slope, *torch.autograd.grad((y * a + log_slope * b).sum(), (x, p))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ON_THE_LINE)
def test_monotone_for_large_parameters(name: str) -> None:
    m, x = MAPS[name], torch.linspace(-6, 6, 3001, dtype=torch.float64)
    for seed in range(5):
        y, log_slope = m.forward(x, raw(name, 1, 6.0, seed).expand(-1, 3001))
        assert (y.diff() > 0).all()
        assert log_slope.isfinite().all()


@pytest.mark.parametrize("name", ON_THE_LINE)
def test_large_inputs_are_found_again(name: str) -> None:
    size = torch.tensor([-1e6, -1e3, 1e3, 1e6], dtype=torch.float64)
    y = size.requires_grad_()
    x, log_slope = MAPS[name].inverse(y, raw(name, 4))
    again, _ = MAPS[name].forward(x, raw(name, 4))
    torch.testing.assert_close(again, y, rtol=1e-11, atol=0)
    (gradient,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(gradient.log(), log_slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MAPS)
def test_float32_is_finite_with_extreme_parameters(name: str) -> None:
    m, n = MAPS[name], 500
    largest = 1e3 if name == "sum of squares" else 1e6
    x = torch.cat([10.0 * normal(n - 4, seed=3), torch.tensor([-largest, largest, 0.0, 1e-30])])
    p = raw(name, n, 10.0).clamp(-30, 30).float().requires_grad_()
    x = x.float().requires_grad_()
    for function in (m.forward, m.inverse):
        y, log_slope = function(x, p)
        for result in (y, log_slope, *torch.autograd.grad(y.sum() + log_slope.sum(), (x, p))):
            assert result.isfinite().all()


@pytest.mark.parametrize("name", NUMERICAL)
def test_float32_residual_of_numerical_inverses(name: str) -> None:
    y = inputs(name, 500).float()
    p = raw(name, 500).float()
    x, _ = MAPS[name].inverse(y, p)
    again, log_slope = MAPS[name].forward(x, p)
    rounding = torch.finfo(torch.float32).eps * (1.0 + y.abs() + log_slope.exp() * (1.0 + x.abs()))
    assert ((again - y).abs() < 20.0 * rounding).all()


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", MAPS)
def test_as_a_transform(name: str, context_dim: int) -> None:
    transform = randomized(Elementwise((2, 3), MAPS[name], context_dim))
    assert transform.numerical == MAPS[name].numerical
    x = inputs(name, 18).reshape(3, 2, 3)
    context = normal(1, context_dim, seed=3) if context_dim else None
    c = None if context is None else context.expand(3, -1)
    with torch.no_grad():
        z, ladj = transform(x, c)
        back, ladj_back = transform.inverse(z, c)
    same(name, back, x, 1e-10)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj, determinants(lambda v: transform(v, context)[0], x), rtol=0, atol=1e-9)


# -- borders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rational quadratic", "cubic", "Bernstein"])
def test_tails_are_straight_and_smooth_at_the_borders(name: str) -> None:
    m, p = MAPS[name], raw(name, 1)
    for border in (-2.0, 2.0):
        x = border + torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
        y, log_slope = m.forward(x, p.expand(-1, 3))
        assert (y - y[1]).abs().max() < 1e-8
        assert (log_slope - log_slope[1]).abs().max() < 1e-7
        outside = border * torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
        z, slopes = m.forward(outside, p.expand(-1, 3))
        assert (z[2] - 2 * z[1] + z[0]).abs() < 1e-12
        assert (slopes - slopes[0]).abs().max() < 1e-12


def test_cubic_spline_is_smooth_at_its_knots() -> None:
    m, p = MAPS["cubic"], raw("cubic", 1)
    assert isinstance(m, CubicSpline)
    x, y, d = m._knots(p)[:, :, 0]
    for eps in (-1e-10, 1e-10):
        got, log_slope = m.forward(x + eps, p.expand(-1, 6))
        torch.testing.assert_close(got, y, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_slope, d.log(), rtol=0, atol=1e-7)


def test_circular_spline_is_smooth_across_its_seam_and_blind_to_whole_turns() -> None:
    m, p = MAPS["circular"], raw("circular", 1)
    x = torch.tensor([-math.pi, -math.pi + 1e-10, math.pi - 1e-10], dtype=torch.float64)
    y, log_slope = m.forward(x, p.expand(-1, 3))
    same("circular", y, y[:1], 1e-8)
    assert (log_slope - log_slope[0]).abs().max() < 1e-8
    assert log_slope[0].abs() > 0.01, "the slope at the seam is free"
    angles = inputs("circular")
    y, _ = m.forward(angles, p.expand(-1, 40))
    turned, _ = m.forward(angles + 2 * math.pi, p.expand(-1, 40))
    torch.testing.assert_close(turned, y, rtol=0, atol=1e-12)
    assert (y.abs() <= math.pi).all()
    shifted = p.clone()
    shifted[-1] += 1.0
    same("circular", m.forward(angles, shifted.expand(-1, 40))[0], y + 1.0, 1e-12)


def test_circular_spline_covers_the_circle_once() -> None:
    x = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)
    for seed in range(3):
        _, log_slope = MAPS["circular"].forward(x, raw("circular", 1, 1.0, seed).expand(-1, 20001))
        assert abs(torch.trapezoid(log_slope.exp(), x).item() - 2 * math.pi) < 1e-5


# -- formulas -----------------------------------------------------------------------------------------------------


def test_affine_and_additive_by_hand() -> None:
    x, p = torch.tensor([2.0], dtype=torch.float64), torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    y, log_slope = Affine(max_log_scale=4.0).forward(x, p)
    assert abs(log_slope.item() - 4.0 * math.tanh(0.125)) < 1e-14
    assert abs(y.item() - (2.0 * math.exp(4.0 * math.tanh(0.125)) + 3.0)) < 1e-14
    assert Additive().forward(x, p[1:])[0].item() == 5.0
    extreme = Affine(max_log_scale=4.0).forward(x, torch.tensor([[1e6], [0.0]], dtype=torch.float64))[1]
    assert extreme.item() == 4.0


def test_cubic_spline_is_the_hermite_spline_of_its_knots_with_the_slopes_of_steffen() -> None:
    m, p = CubicSpline(bins=6, bound=3.0), normal(14, 1, seed=5)
    knots, heights, slopes = m._knots(p)[:, :, 0].numpy()
    x = np.linspace(-3.0, 3.0, 501)
    oracle = CubicHermiteSpline(knots, heights, slopes)
    y, log_slope = m.forward(torch.from_numpy(x), p.expand(-1, 501))
    np.testing.assert_allclose(y.numpy(), oracle(x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_slope.exp().numpy(), oracle.derivative()(x), rtol=0, atol=1e-11)
    w, h = np.diff(knots), np.diff(heights)
    s = h / w
    for k in range(1, 6):
        parabola = (s[k - 1] * w[k] + s[k] * w[k - 1]) / (w[k - 1] + w[k])
        assert abs(slopes[k] - 2.0 * min(s[k - 1], s[k], 0.5 * parabola)) < 1e-14


def test_logistic_mixture_in_closed_form() -> None:
    """One logistic: logit F = (x - mu) / s. Two: by the formula, where nothing is close to 0 or 1."""
    x = 2.0 * normal(30)
    p = torch.tensor([0.7, 0.4, -0.6, 0.3, 1.5], dtype=torch.float64)[:, None].expand(-1, 30)
    s, a = math.exp(-3.0 * math.tanh(0.2)), math.exp(3.0 * math.tanh(0.1))
    y, _ = LogisticMixture(components=1, min_slope=0.01).forward(x, p)
    torch.testing.assert_close(y, 0.99 * (a * (x - 0.4) / s + 1.5) + 0.01 * x, rtol=0, atol=1e-12)
    p = normal(8, 1).expand(-1, 30)
    pi, mu = p[:2].softmax(0), p[2:4] + torch.tensor([[-0.5], [0.5]])
    s, a = (3.0 * (p[4:6] / 3.0).tanh()).exp(), (3.0 * (p[6] / 3.0).tanh()).exp()
    expected = a * torch.logit((pi * ((x - mu) / s).sigmoid()).sum(0)) + p[7]
    y, _ = LogisticMixture(components=2, min_slope=0.01).forward(x, p)
    torch.testing.assert_close(y, 0.99 * expected + 0.01 * x, rtol=1e-10, atol=1e-10)


def test_bernstein_is_the_polynomial_of_scipy() -> None:
    m, p = Bernstein(degree=7, bound=3.0, min_slope=0.1), normal(8, 1, seed=4)
    rises = 6.0 / 7.0 * (0.1 + 0.9 * np.log1p(np.exp(p[1:, 0].numpy()) * (math.e - 1.0)))
    theta = np.concatenate([[0.0], rises.cumsum()]) - 3.0 + p[0].item()
    oracle = BPoly(theta[:, None], [-3.0, 3.0])
    x = np.linspace(-3.0, 3.0, 101)
    y, log_slope = m.forward(torch.from_numpy(x), p.expand(-1, 101))
    np.testing.assert_allclose(y.numpy(), oracle(x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_slope.exp().numpy(), oracle.derivative()(x), rtol=0, atol=1e-12)


def test_sum_of_squares_is_the_integral() -> None:
    m, p = SumOfSquares(polynomials=2, degree=3, min_slope=0.01), normal(9, 1, seed=4)
    a = p[:8, 0].reshape(2, 4).numpy()

    def mean_of_squares(u: float) -> float:
        terms = [[a[k, j] * u**j / math.factorial(j) / (1 + abs(j - k)) for j in range(4)] for k in range(2)]
        return sum((1.0 + sum(row)) ** 2 for row in terms) / 2

    for x in (-2.5, -0.3, 1.7):
        integral, _ = quad(mean_of_squares, 0.0, x, epsabs=1e-13)
        y, log_slope = m.forward(torch.tensor([x], dtype=torch.float64), p)
        assert abs(y.item() - (p[8].item() + 0.01 * x + 0.99 * integral)) < 1e-11
        assert abs(log_slope.exp().item() - (0.01 + 0.99 * mean_of_squares(x))) < 1e-11


def test_neural_map_by_its_formula() -> None:
    """Straight from the paper's layers, without logarithms, where nothing saturates."""
    m, p = NeuralMonotone(hidden=2, layers=2, min_slope=0.01), normal(20, seed=6)
    spread, lean = torch.tensor([-0.5, 0.5]), 2.0 * torch.eye(2)
    u1, w1, a1, b1, u2, w2, a2, b2 = p.split([2, 4, 2, 2, 4, 2, 2, 2])
    assert torch.equal(u1.view(2, 1).softmax(1), torch.ones(2, 1))

    def layer(h: Tensor, u: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.logit(w.softmax(1) @ ((3.0 * (a / 3.0).tanh()).exp() * (u.softmax(1) @ h) + b + spread).sigmoid())

    for x in (-1.2, 0.1, 2.0):
        h = layer(torch.tensor([x], dtype=torch.float64), u1.view(2, 1), w1.view(2, 2) + lean, a1, b1)
        h = layer(h, u2.view(2, 2) + lean, w2.view(1, 2), a2, b2)
        y, _ = m.forward(torch.tensor([x], dtype=torch.float64), p[:, None])
        torch.testing.assert_close(y, 0.99 * h + 0.01 * x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["logistic mixture", "neural", "sum of squares"])
def test_gradients_at_zero_tell_the_components_apart(name: str) -> None:
    """Parameters that start equal and have equal gradients would stay equal for ever."""
    m, x = MAPS[name], normal(200)
    p = torch.zeros(m.size, 1, dtype=torch.float64, requires_grad=True)
    y, log_slope = m.forward(x, p.expand(-1, 200))
    (gradient,) = torch.autograd.grad((0.5 * (y - 1.0).square() - log_slope).sum(), p)
    if name == "sum of squares":
        steps = gradient[:-1].reshape(2, -1) * torch.from_numpy(m.scales)  # type: ignore[attr-defined]
        assert (steps[0] / steps[1]).std() > 0.1
    elif name == "logistic mixture":
        assert gradient[4:8].flatten().sort().values.diff().min() > 1e-3
    else:
        assert gradient[-3:].flatten().sort().values.diff().min() > 1e-3


# -- the solver ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda x: x**3, lambda x: 3 * x**2),  # Newton is slow, the slope is 0 at the root
        (torch.atan, lambda x: 1 / (1 + x**2)),  # Newton alone diverges
        (lambda x: x + 0.999 * x.sin(), lambda x: 1 + 0.999 * x.cos()),  # and cycles
    ],
)
def test_solver_where_newton_alone_fails(
    function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]
) -> None:
    target = torch.tensor([-1.2, -0.5, 0.0, 1e-3, 1.3], dtype=torch.float64)
    ends = torch.full_like(target, 1e3)
    calls = []

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x)
        return function(x), slope(x)

    x = solve(both, target, -ends, ends)
    torch.testing.assert_close(function(x), target, rtol=0, atol=1e-14)
    assert len(calls) < 80


def test_powers() -> None:
    x = normal(4)
    for n in (1, 2, 3, 7, 8):
        expected = torch.stack([x**k for k in range(n)])
        torch.testing.assert_close(powers(x, n), expected, rtol=1e-14, atol=0)
