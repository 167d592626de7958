"""Flows are exact or they are nothing: inverses, Jacobians against autograd, and densities that integrate to 1."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.flow_oracles import (
    CONTEXT,
    contexts,
    determinants,
    normal,
    prove_bijection,
    prove_gradients,
    randomized,
    rng,
)
from trilemma.core.model import Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, Column, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit
from trilemma.flow.coupling import Coupling
from trilemma.flow.elementwise import Elementwise
from trilemma.flow.linear import ActNorm, LULinear
from trilemma.flow.model import Flow
from trilemma.flow.splines import RationalQuadraticSpline
from trilemma.flow.transforms import Compose, Part, Reshaped, Squeezed, Transform
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.residual_conv import ResidualConv

SPLINE = RationalQuadraticSpline(bins=5, bound=2.0)


def mlp(a: int, b: int, context: int) -> nn.Module:
    return ResidualMLP(a, b * SPLINE.size, width=8, depth=1, context_dim=context)


def conv(a: int, b: int, context: int) -> nn.Module:
    return ResidualConv(a, b * SPLINE.size, width=6, depth=1, context_dim=context)


def some(*bits: int) -> Tensor:
    return torch.tensor(bits).bool()


# Name -> shape of an example and constructor, given the size of the context.
TRANSFORMS: dict[str, tuple[tuple[int, ...], Callable[[int], Transform]]] = {
    "actnorm vector": ((4,), lambda c: ActNorm(4)),
    "actnorm picture": ((2, 3, 2), lambda c: ActNorm(2)),
    "lu vector": ((4,), lambda c: LULinear(torch.tensor([2, 0, 3, 1]))),
    "lu picture": ((3, 2, 2), lambda c: LULinear(torch.tensor([2, 0, 1]))),
    "elementwise": ((3,), lambda c: Elementwise((3,), SPLINE, c)),
    "elementwise picture": ((1, 2, 2), lambda c: Elementwise((1, 2, 2), SPLINE, c)),
    "coupling vector": ((5,), lambda c: Coupling(some(1, 0, 0, 1, 0), mlp(2, 3, c), SPLINE)),
    "coupling picture": ((3, 2, 4), lambda c: Coupling(some(0, 1, 0), conv(1, 2, c), SPLINE)),
    "squeezed": ((1, 4, 2), lambda c: Squeezed(Coupling(some(1, 1, 0, 0), conv(2, 2, c), SPLINE), (2, 2))),
    "squeezed signal": ((2, 1, 6), lambda c: Squeezed(LULinear(torch.randperm(6, generator=rng(0))), (1, 3))),
    "part": ((3, 3, 3), lambda c: Part(ActNorm(2), slice(1, 3), slice(0, 2), slice(1, 3))),
    "reshaped": (
        (2, 2, 2),
        lambda c: Reshaped(Coupling(some(1, 1, 1, 0, 0, 0, 1, 0), mlp(4, 4, c), SPLINE), (2, 2, 2), (8,)),
    ),
    "compose": (
        (3,),
        lambda c: Compose([ActNorm(3), LULinear(torch.arange(3)), Coupling(some(1, 0, 1), mlp(2, 1, c), SPLINE)]),
    ),
}


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_is_invertible_with_the_right_jacobian(name: str, context_dim: int) -> None:
    shape, make = TRANSFORMS[name]
    # inside and outside of the spline's [-2, 2]
    prove_bijection(randomized(make(context_dim)), 1.5 * normal(4, *shape, seed=1), contexts(context_dim, 4)[0])


@pytest.mark.parametrize("name", ["elementwise", "coupling picture", "compose"])
def test_gradients_of_value_and_ladj(name: str) -> None:
    shape, make = TRANSFORMS[name]
    prove_gradients(randomized(make(CONTEXT)), *shape)


def test_context_changes_only_conditional_parts() -> None:
    shape, make = TRANSFORMS["coupling vector"]
    transform, x = randomized(make(CONTEXT)), normal(4, *shape)
    a, b = (transform(x, normal(4, CONTEXT, seed=s))[0] for s in (1, 2))
    assert torch.equal(a[:, [0, 3]], b[:, [0, 3]])
    assert (a[:, [1, 2, 4]] != b[:, [1, 2, 4]]).any()


# -- the spline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [2, 8])
def test_spline_starts_as_the_identity(bins: int) -> None:
    spline = RationalQuadraticSpline(bins, bound=3.0)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    y, log_slope = spline.forward(x, torch.zeros(spline.size, 101, dtype=torch.float64))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-14)


def test_spline_matches_the_formula_bin_by_bin() -> None:
    spline = RationalQuadraticSpline(bins=4, bound=2.0, min_bin=0.01, min_slope=0.02)
    raw = normal(spline.size)
    width = 4.0 * (0.01 + (1 - 0.04) * raw[:4].softmax(0))
    height = 4.0 * (0.01 + (1 - 0.04) * raw[4:8].softmax(0))
    inner = 0.02 + torch.log1p((raw[8:] + math.log(math.expm1(0.98))).exp())
    slope = [1.0, *inner.tolist(), 1.0]
    for k in range(4):
        x0, y0 = -2.0 + width[:k].sum(), -2.0 + height[:k].sum()
        w, h, d0, d1 = width[k], height[k], slope[k], slope[k + 1]
        for t in (0.001, 0.3, 0.8, 0.999):
            s = h / w
            y = y0 + h * (s * t**2 + d0 * t * (1 - t)) / (s + (d0 + d1 - 2 * s) * t * (1 - t))
            got, _ = spline.forward((x0 + t * w).reshape(1), raw.unsqueeze(1))
            torch.testing.assert_close(got[0], y, rtol=0, atol=1e-12)


def test_spline_is_continuous_and_smooth_at_knots_and_borders() -> None:
    spline, raw = RationalQuadraticSpline(bins=6, bound=2.0), normal(17, seed=3).unsqueeze(1)
    knots = spline._knots(raw)[0, :, 0]
    assert knots[0] == -2.0
    assert knots[-1] == 2.0
    for eps, tolerance in ((1e-8, 1e-6), (0.0, 1e-12)):
        below, above = knots - eps, knots + eps
        y0, l0 = spline.forward(below, raw.expand(-1, 7))
        y1, l1 = spline.forward(above, raw.expand(-1, 7))
        torch.testing.assert_close(y0, y1, rtol=0, atol=tolerance)
        torch.testing.assert_close(l0, l1, rtol=0, atol=10 * tolerance)
    borders = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    y, log_slope = spline.forward(borders, raw.expand(-1, 2))
    assert torch.equal(y, borders)
    assert not log_slope.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-3)])
def test_spline_survives_extreme_parameters_and_inputs(dtype: torch.dtype, tolerance: float) -> None:
    """Parameters up to +-30 drive bins and slopes to their floors and slopes to 30; inputs go far outside."""
    spline = RationalQuadraticSpline(bins=8, bound=5.0)
    raw = (10.0 * normal(spline.size, 2000, seed=4)).clamp(-30, 30).to(dtype).requires_grad_()
    x = torch.cat(
        [10.0 * normal(1990), torch.tensor([-1e30, -1e6, -5.0, 5.0, 1e6, 1e30, 0.0, 4.999999, -4.999999, 1e-30])]
    )
    x = x.to(dtype).requires_grad_()
    y, log_slope = spline.forward(x, raw)
    back, log_slope_inverse = spline.inverse(y, raw)
    outside = x.abs() >= 5.0
    assert torch.equal(y[outside], x[outside])
    assert not log_slope[outside].any()
    # A rounding error in y is magnified by dx/dy <= 1e3 * (width ratio); compare where the map was steep enough.
    steep = log_slope > -3.0
    torch.testing.assert_close(back[steep], x[steep], rtol=1e-6, atol=tolerance)
    (log_slope.sum() + y.clamp(-10, 10).sum()).backward()
    assert x.grad is not None
    assert raw.grad is not None
    assert x.grad.isfinite().all()
    assert raw.grad.isfinite().all()
    assert log_slope_inverse.isfinite().all()


def test_spline_is_monotone() -> None:
    spline, x = RationalQuadraticSpline(bins=8, bound=5.0), torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for seed in range(5):
        y, _ = spline.forward(x, (5.0 * normal(spline.size, 1, seed=seed)).expand(-1, 4001))
        assert (y.diff() > 0).all()


# -- data-dependent initialisation ------------------------------------------------------------------------------


def test_actnorm_initialises_to_zero_mean_and_unit_variance() -> None:
    x = 3.0 + 2.0 * normal(50, 3, 4, 2)
    x[:, 1] = 7.0  # a constant channel is only shifted
    norm = ActNorm(3).double()
    z = norm.initialize(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(z.std(1, correction=0), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm(x)[0].transpose(0, 1).flatten(1), z, rtol=0, atol=0)


# -- the model ---------------------------------------------------------------------------------------------------

POINTS = DataSpec(kind="points", shape=(2,))
CLASSES = ConditionSpec(kind="class", names=("a", "b"))


def random_flow(spec: DataSpec, scale: float, **settings: object) -> Flow:
    """A Flow with random weights, ready to use."""
    model = Flow(spec, **{"steps": 2, "width": 16, "depth": 1, "bins": 5, **settings})
    model.initialize(0)
    codec = {k: v.clone() for k, v in model.codec.state_dict().items()}
    randomized(model, seed=5, scale=scale)
    model.codec.load_state_dict(codec)
    model.fitted = True
    return model


@pytest.mark.parametrize("condition", [None, 1])
def test_density_integrates_to_one_and_its_marginal_is_that_of_the_samples(condition: int | None) -> None:
    spec = POINTS.model_copy(update={"condition": CLASSES})
    model = random_flow(spec, 0.3, conditional=condition is not None)
    h = 0.03
    axis = torch.arange(-12.0, 12.0, h, dtype=torch.float64)
    mesh = torch.cartesian_prod(axis, axis)
    c = None if condition is None else torch.full((len(mesh),), condition)
    score = model.log_prob(mesh, c)
    assert score.kind == "exact"
    density = score.value.exp().view(len(axis), len(axis))
    assert abs(density.sum().item() * h * h - 1.0) < 1e-4
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 3 with probability 3e-8 for samples of the marginal itself.
    n = 4000
    samples = model.sample(n, condition, generator=1)[:, 0]
    marginal = density.sum(1) * h
    cdf = torch.cat([torch.zeros(1, dtype=torch.float64), marginal.cumsum(0) * h])  # at the edges of the cells
    edges = torch.cat([axis - h / 2, axis[-1:] + h / 2])
    empirical = torch.searchsorted(samples.sort().values, edges) / n
    assert (empirical - cdf).abs().max() * math.sqrt(n) < 3.0


SHAPES = {
    "points": DataSpec(kind="points", shape=(5,)),
    "one": DataSpec(kind="points", shape=(1,)),
    "signal": DataSpec(kind="signal", shape=(2, 12)),
    "picture": DataSpec(kind="image", shape=(1, 8, 8), levels=17),
    "odd picture": DataSpec(kind="image", shape=(3, 7, 5)),
    "table": DataSpec(
        kind="table",
        shape=(2,),
        columns=(Column(name="u", kind="numeric", dtype="float64"), Column(name="b", kind="boolean", dtype="bool")),
    ),
}


@pytest.mark.parametrize(
    ("name", "multiscale"),
    [*((name, False) for name in SHAPES), ("signal", True), ("picture", True), ("odd picture", True)],
)
def test_model_is_an_exact_bijection(name: str, multiscale: bool) -> None:
    """log p(y) = log N(z; 0, I) + log |det dz/dy| with z = encode(y), for every kind of data."""
    model = random_flow(SHAPES[name], 0.15, multiscale=multiscale, width=6)
    y = normal(3, *model.codec.shape, seed=6)
    noise = Noise("test", n=3)
    with torch.no_grad():
        z = model._encode(y, None)
        torch.testing.assert_close(model._decode(z, None), y, rtol=0, atol=1e-9)
        score = model._log_prob(y, None, noise)
        base = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    expected = base[:2] + determinants(lambda v: model._encode(v, None), y[:2])
    torch.testing.assert_close(score.value[:2], expected, rtol=0, atol=1e-8)
    assert (z != y).all(), "some dimensions are never transformed"


def test_bound_where_dequantized_and_exact_elsewhere() -> None:
    picture = random_flow(SHAPES["picture"], 0.1)
    x = torch.randint(17, (4, 1, 8, 8), generator=rng(7), dtype=torch.uint8)
    assert picture.log_prob(x).kind == "lower_bound"
    assert random_flow(SHAPES["signal"], 0.1).log_prob(normal(4, 2, 12)).kind == "exact"


def test_temperature_scales_the_latent() -> None:
    model = random_flow(SHAPES["points"], 0.2)
    cold = model.sample(6, generator=3, temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand(6, -1))
    half = model.encode(model.sample(6, generator=3, temperature=0.5))
    torch.testing.assert_close(half, 0.5 * model.encode(model.sample(6, generator=3)), rtol=0, atol=1e-9)


def test_loss_is_the_negative_log_likelihood_per_dimension() -> None:
    model = random_flow(SHAPES["points"], 0.2)
    x = normal(8, 5, seed=8)
    loss = model.loss(Batch(x), Step(noise=Noise("loss", n=8, block=8)))
    expected = -model.log_prob(x).value.mean() / 5
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-12)


def test_learns_a_density_to_its_entropy() -> None:
    """Two far-apart Gaussians, known in closed form: -E log p comes within 0.1 nats of the entropy."""
    n = 4000
    side = torch.randint(2, (n,), generator=rng(9)) * 2 - 1
    x = torch.stack([3.0 * side + 0.5 * normal(n), normal(n, seed=10)], 1).float()
    spec = DataSpec(kind="points", shape=(2,))
    model = Flow(spec, steps=4, width=16, depth=1, bins=8)
    model.initialize(0)
    model.prepare(TensorSplit(x[:3000]), Noise(0, "prepare", n=1))
    (objective,) = model.objectives()
    optimizer = torch.optim.Adam(objective.parameters, lr=1e-2)
    for i in range(120):
        index = torch.randint(3000, (128,), generator=rng(100 + i))
        loss = model.loss(Batch(x[index]), Step(noise=Noise(0, i, n=128, block=128)))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.fitted = True
    held_out = -model.log_prob(x[3000:]).value
    entropy = math.log(2 * math.pi * math.e) + math.log(0.5) + math.log(2.0)  # overlap of the two: none to speak of
    stderr = held_out.std().item() / math.sqrt(1000)
    assert held_out.mean().item() < entropy + 0.1 + 3 * stderr
    assert held_out.mean().item() > entropy - 5 * stderr
