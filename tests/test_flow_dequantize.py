"""Dequantization: bounds that hold, q(u|x) that integrate to 1, and scales that add up over all levels."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import logsigmoid

from tests.flow_oracles import normal, prove_bijection, randomized
from trilemma.core.noise import Noise
from trilemma.flow.coupling import Coupling
from trilemma.flow.dequantize import (
    ConditionalElementwise,
    Logit,
    PixelContext,
    UniformDequantize,
    VariationalDequantize,
    variational_dequantize,
)
from trilemma.flow.splines import RationalQuadraticSpline
from trilemma.flow.transforms import Compose, Transform, sum_dims

SPLINE = RationalQuadraticSpline(bins=8, bound=8.0)
LEVELS = 4
FEATURES = 3


def draws(n: int, seed: int = 0) -> Noise:
    return Noise("dequantization", seed, n=n, block=n)


def variational(*shape: int, context_dim: int = 0, steps: int = 2) -> Transform:
    return variational_dequantize(LEVELS, shape, SPLINE, steps=steps, width=8, context_dim=context_dim)


def of_vectors(dims: int, steps: int = 2) -> VariationalDequantize:
    model = randomized(variational(dims, steps=steps), scale=0.1)
    assert isinstance(model, VariationalDequantize)
    return model


def log_q(model: VariationalDequantize, u: Tensor, x: Tensor) -> Tensor:
    """log q(u|x), from the inverse of its flow and without the margins, which are 1e-15 wide in double precision."""
    s = u.logit()
    base, ladj = model.flow.inverse(s, model.features((2 * x + 1) / LEVELS - 1, None))

    def slope(t: Tensor) -> Tensor:
        return sum_dims(logsigmoid(t) + logsigmoid(-t))

    return slope(base) + ladj - slope(s)


class Grid(Noise):
    """Every example gets its own point of (0, 1)^dims: means over a grid are integrals over q."""

    def __init__(self, points: Tensor) -> None:
        super().__init__(n=len(points), block=len(points))
        self.points = points

    def uniform_like(self, x: Tensor) -> Tensor:
        return self.points


def cell(n: int, dims: int) -> Tensor:
    """Midpoints of a grid of n^dims cells of (0, 1)^dims."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)


def lattice(dims: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(LEVELS), repeat=dims)), dtype=torch.float64)


class Density:
    """A density of v with known cell masses: a mixture, for v in R^dims, of two narrow normals."""

    def __init__(self, dims: int) -> None:
        self.centres = torch.tensor([[0.27] * dims, [0.4 + 0.2 * i for i in range(dims)]], dtype=torch.float64)
        self.std = torch.tensor([0.06, 0.15], dtype=torch.float64)

    def log_prob(self, v: Tensor) -> Tensor:
        parts = torch.distributions.Normal(self.centres, self.std.unsqueeze(1).to(v.dtype)).log_prob(v.unsqueeze(1))
        return parts.sum(2).logsumexp(1) - math.log(2.0)

    def log_mass(self, x: Tensor) -> Tensor:
        """log P(x): the integral over the cell, by the error function."""
        normal = torch.distributions.Normal(self.centres, self.std.unsqueeze(1))
        x = x.unsqueeze(1)
        masses = normal.cdf((x + 1) / LEVELS) - normal.cdf(x / LEVELS)
        return masses.prod(2).mean(1).log()


# -- parts -------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, tuple[tuple[int, ...], Callable[[], Transform]]] = {
    "elementwise": ((2,), lambda: ConditionalElementwise(SPLINE, nn.Linear(FEATURES, 2 * SPLINE.size))),
    "elementwise picture": (
        (2, 2, 3),
        lambda: ConditionalElementwise(SPLINE, nn.Conv2d(FEATURES, 2 * SPLINE.size, 1)),
    ),
    "coupling picture": (
        (3, 2, 2),
        lambda: Coupling(
            torch.tensor([True, False, True]),
            PixelContext(2, SPLINE.size, width=6, depth=1, context_dim=FEATURES),
            SPLINE,
        ),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_conditional_parts_are_invertible_with_the_right_jacobian(name: str) -> None:
    shape, make = TRANSFORMS[name]
    transform, features = randomized(make()), normal(1, FEATURES, *shape[1:], seed=2)
    x = 1.5 * normal(3, *shape, seed=1)
    prove_bijection(transform, x, features)
    args = x[:1].requires_grad_(), features.requires_grad_()
    assert gradcheck(lambda x, c: transform(x, c), args)
    assert gradcheck(lambda x, c: transform.inverse(x, c), args)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_logit_is_invertible_with_the_right_jacobian(alpha: float) -> None:
    logit = Logit(alpha)
    v = torch.rand(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, ladj = logit(v)
    prove_bijection(logit, v, None)
    torch.testing.assert_close(y, (alpha + (1 - 2 * alpha) * v).logit(), rtol=0, atol=1e-12)
    back, ladj_inverse = logit.inverse(y)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj_inverse, -ladj, rtol=0, atol=1e-10)
    assert gradcheck(logit, v.requires_grad_())
    assert gradcheck(logit.inverse, y.detach().requires_grad_())
    extreme = torch.tensor([[-1e30, 1e30, -200.0, 200.0]])
    assert all(part.isfinite().all() for part in logit.inverse(extreme))


# -- the lattice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_scales_add_up_over_all_levels(alpha: float) -> None:
    """A standard logistic y pulled through the logit is a uniform v, so P(x) = (1 - 2 alpha) / 256: 8 bits."""
    flow = Compose([UniformDequantize(256), Logit(alpha)])
    x = torch.arange(256, dtype=torch.float64).unsqueeze(1)
    y, ladj = flow(x, noise=draws(256))
    log_p = sum_dims(logsigmoid(y) + logsigmoid(-y)) + ladj
    assert abs(log_p.exp().sum().item() - (1 - 2 * alpha)) < 1e-10
    bits = -log_p / math.log(2.0) + math.log2(1 - 2 * alpha)
    torch.testing.assert_close(bits, torch.full_like(bits, 8.0), rtol=0, atol=1e-10)
    back, no_ladj = flow.inverse(y)
    assert torch.equal(back, x)
    assert no_ladj.isnan().all()
    assert flow.kind == "lower_bound"
    assert flow.stochastic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 3, 255, 256, 1000])
def test_noise_at_the_ends_of_a_cell_stays_in_it(levels: int, dtype: torch.dtype) -> None:
    class Ends(UniformDequantize):
        def _draw(self, x: Tensor, context: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
            return x[:, :1] * 0 + torch.tensor([0.0, 1.0], dtype=x.dtype), x.new_zeros(len(x))

    x = torch.arange(levels, dtype=dtype).unsqueeze(1).expand(-1, 2)
    dequantize = Ends(levels)
    v, _ = dequantize(x, noise=draws(levels))
    assert torch.equal(dequantize.inverse(v)[0], x)
    assert v.min() > 0
    assert v.max() < 1
    outside = torch.tensor([[-0.3, 1.7]], dtype=dtype)
    assert dequantize.inverse(outside)[0].tolist() == [[0.0, levels - 1.0]]


# -- variational q ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
def test_q_integrates_to_one_in_every_cell_and_is_what_forward_reports(dims: int) -> None:
    model, u = of_vectors(dims), cell(2000 if dims == 1 else 200, dims)
    for x in lattice(dims)[::5]:
        with torch.no_grad():
            density = log_q(model, u, x.expand(len(u), -1)).exp()
        assert abs(density.mean().item() - 1.0) < 5e-4
        assert density.std() > 0.05
    x = lattice(dims).repeat(5, 1)
    v, ladj = model(x, noise=draws(len(x)))
    expected = -log_q(model, LEVELS * v - x, x) - dims * math.log(LEVELS)
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-9)
    assert torch.equal(model.inverse(v)[0], x)
    assert model.inverse(v)[1].isnan().all()


SHAPES = [(1,), (5,), (2, 6), (1, 4, 4), (3, 2, 3), (1, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_starts_as_uniform_dequantization(shape: tuple[int, ...]) -> None:
    """Logistic noise through the identity: the same bound for every x, up to the margins of double precision."""
    x = Noise("levels", n=6).integers(LEVELS, *shape).double()
    c = normal(6, 2)
    model = variational(*shape, context_dim=2).double()
    v, ladj = model(x, c, draws(6))
    _, uniform = UniformDequantize(LEVELS)(x, None, draws(6))
    torch.testing.assert_close(ladj, uniform, rtol=0, atol=1e-10)
    assert torch.equal(model.inverse(v)[0], x)
    assert model.kind == "lower_bound"
    assert model.stochastic


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_depends_on_x_and_on_the_context_and_stays_in_its_cell(shape: tuple[int, ...]) -> None:
    model = randomized(variational(*shape, context_dim=2), scale=0.4)
    x, c = Noise("levels", n=6).integers(LEVELS, *shape).double(), normal(6, 2)
    other = (x + 1) % LEVELS
    one, two = LEVELS * model(x, c, draws(6))[0] - x, LEVELS * model(other, c, draws(6))[0] - other
    three = LEVELS * model(x, -c, draws(6))[0] - x
    assert ((one - two).abs() > 1e-9).all()
    assert ((one - three).abs() > 1e-9).all()
    again = randomized(model, scale=3.0).float()
    v, ladj = again(x.float(), c.float(), draws(6))
    assert torch.equal(again.inverse(v)[0], x.float())
    assert ladj.isfinite().all()


def test_noise_of_a_pixel_sees_its_neighbourhood_alone() -> None:
    model = randomized(variational(1, 16, 16), scale=0.4)
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    moved = x.clone()
    moved[0, 0, 1, 1] = 3.0
    u = [LEVELS * model(y, None, draws(1))[0] - y for y in (x, moved)]
    changed = (u[0] != u[1])[0, 0]
    assert changed[:4, :4].all()
    # Three nets in a row, each of two 3x3 convolutions, see 6 blocks of 2x2 pixels beyond the first.
    assert not changed[14:, 14:].any()


def log_ratios(model: VariationalDequantize, p: Density, x: Tensor, n: int) -> Tensor:
    """log p(v) + ladj of every x (rows) on a grid of n points along each axis of the noise of `forward` (columns)."""
    grid = cell(n, x.shape[1])
    with torch.no_grad():
        v, ladj = model(x.repeat_interleave(len(grid), 0), noise=Grid(grid.repeat(len(x), 1)))
    return (p.log_prob(v) + ladj).view(len(x), -1)


@pytest.mark.parametrize("dims", [1, 2])
def test_importance_weights_average_to_the_exact_probability(dims: int) -> None:
    """E_q[p(v) exp(ladj)] = P(x), whatever q is."""
    p, x = Density(dims), lattice(dims)[:: 3 * dims]
    got = log_ratios(of_vectors(dims), p, x, 2000 if dims == 1 else 200).exp().mean(1)
    torch.testing.assert_close(got, p.log_mass(x).exp(), rtol=3e-3, atol=0)


@pytest.mark.parametrize("dims", [1, 2])
def test_bound_is_below_the_exact_probability_and_training_tightens_it(dims: int) -> None:
    p, x = Density(dims), lattice(dims)
    torch.manual_seed(0)
    model = variational(dims).double()
    assert isinstance(model, VariationalDequantize)
    before = p.log_mass(x) - log_ratios(model, p, x, 2000 if dims == 1 else 60).mean(1)
    assert (before > 0).all()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    batch = x.repeat(256 // len(x), 1)
    for i in range(100):
        v, ladj = model(batch, noise=draws(len(batch), i))
        optimizer.zero_grad()
        (-(p.log_prob(v) + ladj).mean()).backward()
        optimizer.step()
    after = p.log_mass(x) - log_ratios(model, p, x, 2000 if dims == 1 else 60).mean(1)
    assert (after > -1e-3).all(), "a bound above the probability"
    assert after.mean() < 0.2 * before.mean()
