"""Flows on circles, tori, spheres and graphs: densities that integrate to 1, volumes in closed form, true samples.

A chi-square test refuses right samples with probability 1e-6.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.flow_oracles import CONTEXT, determinants, normal, randomized, rng
from trilemma.core.errors import DataError
from trilemma.flow.elementwise import Elementwise, ElementwiseMap
from trilemma.flow.linear import ActNorm
from trilemma.flow.manifold import (
    Graph,
    Manifold,
    ManifoldFlow,
    Mobius,
    Sphere,
    Torus,
    sphere_flow,
    torus_flow,
    wrap,
)
from trilemma.flow.splines import CircularSpline

PI = math.pi


def angles(*shape: int, seed: int = 0) -> Tensor:
    return (2.0 * torch.rand(shape, generator=rng(seed), dtype=torch.float64) - 1.0) * PI


def midpoints(n: int, low: float, high: float) -> Tensor:
    return low + (torch.arange(n, dtype=torch.float64) + 0.5) * (high - low) / n


class Doughnut(Manifold):
    """The torus of revolution in R^3, of radii 2 and 1/2: no formula of its volume is given."""

    def __init__(self) -> None:
        super().__init__(2, 3)

    def embed(self, u: Tensor) -> Tensor:
        r = 2.0 + 0.5 * u[:, 1].cos()
        return torch.stack([r * u[:, 0].cos(), r * u[:, 0].sin(), 0.5 * u[:, 1].sin()], 1)

    def coordinates(self, x: Tensor) -> Tensor:
        r = x[:, :2].norm(dim=1)
        return torch.stack([torch.atan2(x[:, 1], x[:, 0]), torch.atan2(x[:, 2], r - 2.0)], 1)


# -- Mobius maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("components", [1, 3, 8])
def test_mobius_is_invertible_with_the_right_jacobian(components: int, context_dim: int) -> None:
    transform = randomized(Elementwise((3,), Mobius(components), context_dim), scale=1.0)
    x = angles(6, 3)
    one = normal(1, context_dim, seed=2) if context_dim else None
    context = None if one is None else one.expand(6, -1)
    z, ladj = transform(x, context)
    assert ((z >= -PI) & (z < PI)).all()
    back, ladj_inverse = transform.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(transform(transform.inverse(x, context)[0], context)[0], x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj_inverse, -ladj, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj, determinants(lambda v: transform(v, one)[0], x), rtol=0, atol=1e-9)
    of_inverse = determinants(lambda v: transform.inverse(v, one)[0], z)
    torch.testing.assert_close(ladj_inverse, of_inverse, rtol=0, atol=1e-8)


def test_gradients_of_mobius() -> None:
    x, parameters = 0.8 * angles(4).requires_grad_(), normal(10, 4).mul(0.5).requires_grad_()
    mobius = Mobius(3)
    assert torch.autograd.gradcheck(lambda x, p: mobius.forward(x, p), (x, parameters))
    assert torch.autograd.gradcheck(lambda x, p: mobius.inverse(x, p), (x, parameters))


def test_one_mobius_map_is_the_formula_of_the_paper() -> None:
    """h(z) = (1 - |w|^2) / |z - w|^2 (z - w) - w on the unit circle."""
    v, theta = torch.tensor([0.8, -1.3]).double(), angles(50)
    w = torch.complex(*(v / (1.0 + v.square().sum()).sqrt()))
    z = torch.polar(torch.ones_like(theta), theta)
    expected = (1.0 - w.abs().square()) / (z - w).abs().square() * (z - w) - w
    parameters = torch.cat([torch.zeros(1).double(), v, torch.tensor([0.7]).double()])[:, None].expand(-1, 50)
    got, _ = Mobius(1).forward(theta, parameters)
    turned = torch.polar(torch.ones_like(got), got)
    torch.testing.assert_close(turned, expected * torch.polar(torch.ones(1).double(), torch.tensor([0.7]).double()))


def test_mobius_starts_close_to_the_identity_and_its_components_differ() -> None:
    x = angles(100)
    parameters = torch.zeros(25, 100, dtype=torch.float64, requires_grad=True)
    y, log_slope = Mobius(8).forward(x, parameters)
    assert wrap(y - x).abs().max() < 2.0 * 0.5**8 / 8 * 1.1
    (gradient,) = torch.autograd.grad(log_slope.square().sum() + y.sin().sum(), parameters)
    pairs = gradient[8:24].view(2, 8, 100).sum(2)
    assert torch.pdist(pairs.T).min() > 1e-3


def test_mobius_with_extreme_parameters() -> None:
    mobius, x = Mobius(4), angles(500)
    parameters = 30.0 * normal(13, 500)
    y, log_slope = mobius.forward(x, parameters)
    assert log_slope.isfinite().all()
    back, _ = mobius.inverse(y, parameters)
    steep = log_slope > -5.0
    assert wrap(back - x)[steep].abs().max() < 1e-8


# -- volumes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_volume_of_the_sphere_in_closed_form(dims: int) -> None:
    """The formula against automatic differentiation, and the whole sphere: 2 pi, 4 pi, 2 pi^2, 8/3 pi^2."""
    sphere = Sphere(dims)
    u = torch.cat([angles(20, 1), 0.9 * angles(20, dims - 1, seed=1) / PI], 1)
    torch.testing.assert_close(sphere.log_volume(u), Manifold.log_volume(sphere, u), rtol=0, atol=1e-10)
    torch.testing.assert_close(sphere.coordinates(sphere.embed(u)), u, rtol=0, atol=1e-12)
    total = {1: 2 * PI, 2: 4 * PI, 3: 2 * PI**2, 4: 8 / 3 * PI**2}[dims]
    assert abs(math.exp(sphere.log_total) - total) < 1e-12 * total


def test_volume_of_a_torus_of_revolution() -> None:
    u = angles(20, 2)
    expected = (0.5 * (2.0 + 0.5 * u[:, 1].cos())).log()
    torch.testing.assert_close(Doughnut().log_volume(u), expected, rtol=0, atol=1e-12)


def test_graph_of_a_function() -> None:
    """sqrt(1 + |grad g|^2), and a Gaussian on a plane: log p(x) = log N(u; 0, I) - log sqrt(1 + |a|^2)."""
    u = normal(10, 2)
    graph = Graph(2, lambda u: (u[:, :1] ** 2 * u[:, 1:]).sin())
    slope = (u[:, 0] ** 2 * u[:, 1]).cos()[:, None] * torch.stack([2.0 * u[:, 0] * u[:, 1], u[:, 0] ** 2], 1)
    torch.testing.assert_close(graph.log_volume(u), 0.5 * (1.0 + slope.square().sum(1)).log(), rtol=0, atol=1e-12)
    a = torch.tensor([[3.0, -1.0]]).double()
    flow = ManifoldFlow(Graph(2, lambda u: u @ a.T), ActNorm(2)).double()
    x = torch.cat([u, u @ a.T], 1)
    expected = -0.5 * u.square().sum(1) - math.log(2 * PI) - 0.5 * math.log(11.0)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-12)


# -- densities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "circle"), [(1, Mobius()), (2, Mobius()), (1, CircularSpline())])
def test_density_on_the_torus_integrates_to_one(dims: int, circle: ElementwiseMap) -> None:
    flow = randomized(torus_flow(dims, circle, width=8), scale=0.5)
    axis = midpoints(
        20_000 if dims == 1 else 192, -PI, PI
    )  # the rectangle rule converges geometrically for smooth periodic functions
    grid = torch.cartesian_prod(*[axis] * dims).view(-1, dims)
    density = flow.log_prob(grid).exp()
    assert abs(density.mean().item() * (2 * PI) ** dims - 1.0) < 1e-6
    assert density.max() / density.min() > 1.5
    torch.testing.assert_close(flow.log_prob(grid[:5] + 2 * PI), flow.log_prob(grid[:5]), rtol=0, atol=1e-10)


def test_density_on_the_doughnut_integrates_to_one() -> None:
    """Any embedding: the uniform angles of `Torus` as the base, on a surface with a volume of its own."""

    class Base(Doughnut):
        base_log_prob = Torus.base_log_prob

    flow = ManifoldFlow(Base(), randomized(torus_flow(2, width=8), scale=0.5).transform)
    axis = midpoints(192, -PI, PI)
    u = torch.cartesian_prod(axis, axis)
    area = 0.5 * (2.0 + 0.5 * u[:, 1].cos())
    integral = (flow.log_prob(flow.manifold.embed(u)).exp() * area).mean().item() * (2 * PI) ** 2
    assert abs(integral - 1.0) < 1e-6


class Fractional(ElementwiseMap):
    """r -> (r + c) / (1 + c r) on [-1, 1], c = tanh of the parameter: smooth, so that quadrature converges quickly."""

    size = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        c = parameters[0].tanh()
        return (x + c) / (1.0 + c * x), (1.0 - c.square()).log() - 2.0 * (1.0 + c * x).log()

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(y, -parameters)


@pytest.mark.parametrize(
    ("dims", "interval", "heights", "angles"),
    [(2, None, 1200, 96), (2, Fractional(), 60, 96), (3, Fractional(), 48, 64)],
)
def test_density_on_the_sphere_integrates_to_one(
    dims: int, interval: ElementwiseMap | None, heights: int, angles: int
) -> None:
    """By midpoints in the angle, and by Gauss's rule in colatitudes (by midpoints where the default has its knots)."""
    flow = randomized(sphere_flow(dims, interval=interval, width=8), scale=0.3)
    if interval is None:
        colatitude, weight = midpoints(heights, 0.0, PI), torch.full((heights,), PI / heights, dtype=torch.float64)
    else:
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(heights))
        colatitude, weight = PI * (nodes + 1.0) / 2.0, PI / 2.0 * weights
    grid = torch.cartesian_prod(midpoints(angles, -PI, PI), *[colatitude] * (dims - 1))
    of_grid = torch.cartesian_prod(
        torch.full((angles,), 2 * PI / angles, dtype=torch.float64), *[weight] * (dims - 1)
    ).prod(1)
    u = torch.cat([grid[:, :1], grid[:, 1:].cos()], 1)
    volume = flow.manifold.log_volume(u).exp() * grid[:, 1:].sin().prod(1)
    density = flow.log_prob(flow.manifold.embed(u)).exp()
    assert abs((density * volume * of_grid).sum().item() - 1.0) < 1e-6
    assert density.max() / density.min() > 1.5


def test_uniform_where_nothing_is_learned() -> None:
    x = normal(10, 3)
    x = x / x.norm(dim=1, keepdim=True)
    flow = ManifoldFlow(Sphere(2), sphere_flow(2, layers=1).double().transform)
    torch.testing.assert_close(
        flow.log_prob(x), torch.full((10,), -math.log(4 * PI), dtype=torch.float64), rtol=0, atol=1e-12
    )


def chi_square(counts: Tensor, p: Tensor) -> float:
    return float(stats.chisquare(counts.numpy(), (counts.sum() * p / p.sum()).numpy()).pvalue)


def test_samples_on_the_sphere_have_the_density() -> None:
    """Counts in 8 x 8 cells of equal area against the density's integral over each."""
    flow = randomized(sphere_flow(2, width=8), scale=0.3)
    n, cells, fine = 20_000, 8, 12
    u = torch.cartesian_prod(midpoints(cells * fine, -PI, PI), midpoints(cells * fine, -1.0, 1.0))
    density = flow.log_prob(flow.manifold.embed(u)).exp().view(cells, fine, cells, fine).mean((1, 3))
    x = flow.sample(n, rng(0))
    torch.testing.assert_close(x.norm(dim=1), torch.ones(n).double(), rtol=0, atol=1e-12)
    v = flow.manifold.coordinates(x)
    index = ((v[:, 0] + PI) / (2 * PI) * cells).long() * cells + ((v[:, 1] + 1.0) / 2.0 * cells).long()
    assert chi_square(index.bincount(minlength=cells**2), density.detach().flatten()) > 1e-6


def test_samples_on_the_torus_have_the_density() -> None:
    flow = randomized(torus_flow(2, width=8), scale=0.5)
    cells, fine = 8, 12
    axis = midpoints(cells * fine, -PI, PI)
    density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().view(cells, fine, cells, fine).mean((1, 3))
    index = ((flow.sample(20_000, rng(1)) + PI) / (2 * PI) * cells).long()
    counts = (index[:, 0] * cells + index[:, 1]).bincount(minlength=cells**2)
    assert chi_square(counts, density.detach().flatten()) > 1e-6


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_base_of_the_sphere_is_uniform(dims: int) -> None:
    """E x = 0 and E x x^T = I / (n + 1), within 5 standard errors each (false alarms: 3e-5 in all)."""
    sphere, n = Sphere(dims), 20_000
    x = sphere.embed(sphere.base_sample(n, rng(2), torch.empty(0).double()))
    assert x.mean(0).abs().max() < 5.0 / math.sqrt(n * (dims + 1))
    second = x.square().mean(0) * (dims + 1) - 1.0
    assert second.abs().max() < 5.0 * math.sqrt(2.0 * dims / (dims + 3.0) / n)


def test_context_and_gradients_reach_the_density() -> None:
    flow = randomized(sphere_flow(2, width=8, context_dim=CONTEXT), scale=0.3)
    x, c = flow.sample(4, rng(3), normal(4, CONTEXT)), normal(4, CONTEXT, seed=1).requires_grad_()
    assert (flow.log_prob(x, c) != flow.log_prob(x, normal(4, CONTEXT, seed=2))).all()
    x = x.detach()
    assert torch.autograd.gradcheck(lambda c: flow.log_prob(x, c), (c,))


def test_poles_are_points_like_others() -> None:
    flow = randomized(sphere_flow(2, width=8), scale=0.3)
    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]).double()
    assert flow.log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    ("manifold", "point"),
    [
        (Sphere(2), [0.6, 0.8, 0.1]),
        (Sphere(1), [0.0, 0.0]),
        (Graph(1, lambda u: u**2), [1.0, 1.001]),
        (Torus(2), [0.0, math.nan]),
        (Doughnut(), [1.0, 1.0, 1.0]),
        (Sphere(2), [1.0, 0.0]),
    ],
)
def test_points_off_the_manifold_are_refused(manifold: Manifold, point: list[float]) -> None:
    with pytest.raises(DataError) as error:
        ManifoldFlow(manifold, ActNorm(manifold.dims)).log_prob(torch.tensor([point]).double())
    assert "\n" not in str(error.value)
