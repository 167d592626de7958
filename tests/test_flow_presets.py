"""Every flow of the literature: a bijection whose density integrates to 1, and what its settings refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.flow_oracles import determinants, normal, randomized
from trilemma.core.errors import CapabilityError, UsageError
from trilemma.core.noise import Noise
from trilemma.core.registry import create, entries
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit
from trilemma.flow.linear import ActNorm
from trilemma.flow.marginal import Marginal
from trilemma.flow.model import Flow
from trilemma.nets.lipschitz import Bounded

FLOWS = [name for name, entry in entries().items() if issubclass(entry.model, Flow)]
EXACT = [name for name in FLOWS if name not in ("i-resnet", "residual-flow")]
CLASSES = ConditionSpec(kind="class", names=("a", "b"))
POINTS = DataSpec(kind="points", shape=(2,), condition=CLASSES)
PICTURE = DataSpec(kind="image", shape=(1, 4, 4), condition=CLASSES)
LEVELS = DataSpec(kind="image", shape=(1, 4, 4), levels=17)


def random_flow(name: str, spec: DataSpec = POINTS, scale: float = 0.3, **settings: Any) -> Flow:
    """A small preset in float64 with random weights, ready to use."""
    small = {} if name == "linear-flow" else {"steps": 2} if name == "planar" else {"steps": 2, "width": 4}
    model = create(name, spec, **{**small, **settings})
    assert isinstance(model, Flow)
    model.initialize(0)
    kept = {k: v.double() for k, v in model.state_dict().items() if k.startswith("codec.")}
    for module in model.modules():
        if isinstance(module, Marginal):
            module.initialize(normal(300, module.knots.shape[1], seed=4).exp())
    buffers = {k: v.double() for k, v in model.named_buffers()}
    randomized(model, seed=5, scale=scale)
    model.load_state_dict({**{k: v for k, v in model.state_dict().items() if k not in buffers}, **kept}, strict=False)
    for module in model.modules():
        if isinstance(module, Bounded):
            module.double()
    model.fitted = True
    return model


def test_there_are_all_flows() -> None:
    named = {n for n, e in entries().items() if e.family == "flow"}
    assert named == {
        "linear-flow", "planar", "nice", "realnvp", "glow", "maf", "iaf", "nsf", "naf", "flow++", "i-resnet",
        "residual-flow", "mintnet", "ffjord", "tabak-turner", "tarflow",
    }  # fmt: skip


@pytest.mark.parametrize("condition", [None, 1])
@pytest.mark.parametrize("name", FLOWS)
def test_density_integrates_to_one(name: str, condition: int | None) -> None:
    exact: dict[str, Any] = {} if name in EXACT else {"series": "exact", "terms": None}
    model = random_flow(name, conditional=condition is not None, noise=0.0, **exact)
    samples = model.sample(4000, condition, generator=2)
    margin = 0.5 * (samples.amax(0) - samples.amin(0))
    low, high = samples.amin(0) - margin, samples.amax(0) + margin
    n = 400
    mesh = torch.cartesian_prod(*(torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(low, high, strict=True)))
    score = model.log_prob(mesh, None if condition is None else torch.full((len(mesh),), condition))
    assert score.kind == "exact"
    cell = float((high - low).prod()) / (n - 1) ** 2
    assert score.value.exp().sum().item() * cell == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("spec", [POINTS, PICTURE], ids=["points", "picture"])
@pytest.mark.parametrize("name", EXACT)
def test_log_prob_is_that_of_the_code_and_the_jacobian(name: str, spec: DataSpec) -> None:
    """log p(y) = log N(z; 0, I) + log |det dz/dy| with z = encode(y), and decode(z) = y, given a class."""
    model = random_flow(name, spec, conditional=True, noise=0.0)
    y, c = normal(3, *spec.shape, seed=6), torch.tensor([0, 1, 1])
    with torch.no_grad():
        z = model._encode(y, c)
        torch.testing.assert_close(model._decode(z, c), y, rtol=0, atol=1e-8)
        score = model._log_prob(y, c, Noise("test", n=3))
        base = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    of = torch.cat([determinants(lambda v, k=k: model._encode(v, c[k : k + 1]), y[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(score.value, base + of, rtol=0, atol=1e-8)
    assert not torch.equal(model._encode(y, 1 - c), z), "the condition changes nothing"


@pytest.mark.parametrize("name", ["i-resnet", "residual-flow"])
def test_estimates_say_so_and_average_to_the_exact_determinant(name: str) -> None:
    """Within 4.5 standard errors of the exact one: exceeded by one flow in 10^4."""
    model = random_flow(name, scale=0.5)
    exact = random_flow(name, scale=0.5, series="exact", terms=None)
    exact.load_state_dict(model.state_dict())
    x = normal(4, 2, seed=7)
    score = model.log_prob(x, repeats=300)
    assert score.kind == "estimate"
    truth = exact.log_prob(x)
    assert truth.kind == "exact"
    assert score.stderr is not None
    assert ((score.value - truth.value).abs() < 4.5 * score.stderr + 1e-6).all()


@pytest.mark.parametrize("name", FLOWS)
def test_round_trip_says_how_exact_the_inverse_is(name: str) -> None:
    """The largest error over dimensions, also where the inverse is spoilt by 0.5 in the first."""
    model = random_flow(name, noise=0.0)
    assert model.round_trip(normal(5, 2)).max() < 1e-9
    inverse = model._decode
    model._decode = lambda z, c: inverse(z, c) + torch.tensor([0.5, 0.0]).double()  # type: ignore[method-assign]
    torch.testing.assert_close(model.round_trip(normal(5, 2)), torch.full((5,), 0.5).double(), rtol=0, atol=1e-8)
    with pytest.raises(CapabilityError, match="not a bijection"):
        create("vae", POINTS).round_trip(normal(5, 2))


@pytest.mark.parametrize("name", ["nsf", "flow++"])
def test_bounds_of_all_levels_have_less_than_the_mass_of_the_density(name: str) -> None:
    """Codec, dequantization, levels and logit together: the standard normal has 0.99674 between the logits of 0 and 1
    (alpha 0.05); by Jensen's inequality the bounds (mean of 400 draws, their error below 0.01) sum to less."""
    spec = DataSpec(kind="image", shape=(1, 1, 1), levels=8)
    model = random_flow(name, spec, scale=0.0)
    x = torch.arange(8, dtype=torch.uint8).repeat_interleave(400).view(-1, 1, 1, 1)
    score = model.log_prob(x, generator=0)
    assert score.kind == "lower_bound"
    total = score.value.view(8, 400).mean(1).exp().sum().item()
    assert 0.9 < total < 0.9968


def test_learned_dequantization_is_a_bound_on_the_lattice() -> None:
    model = random_flow("flow++", LEVELS)
    assert model.config.dequantization == "variational"
    x = torch.randint(17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert model.log_prob(x).kind == "lower_bound"
    assert model.sample(4, generator=0).dtype == torch.uint8
    with pytest.raises(UsageError, match="needs pictures with levels"):
        create("nsf", POINTS, dequantization="variational").initialize(0)


# -- sampling ----------------------------------------------------------------------------------------------------


def test_rsample_is_differentiable_and_equals_sample() -> None:
    """d samples / d shift of the first normalisation, against a finite difference."""
    model = random_flow("nsf", mixing="none")
    x = model.rsample(5, generator=3)
    torch.testing.assert_close(x.detach(), model.sample(5, generator=3), rtol=0, atol=1e-12)
    first = next(m for m in model.modules() if isinstance(m, ActNorm))
    (gradient,) = torch.autograd.grad(x.sum(), first.shift)
    with torch.no_grad():
        first.shift[0] += 1e-6
    moved = (model.sample(5, generator=3) - x.detach()).sum() / 1e-6
    torch.testing.assert_close(gradient[0], moved, rtol=1e-4, atol=1e-6)
    table = DataSpec(
        kind="table", shape=(1,), columns=(Column(name="n", kind="numeric", dtype="int64", resolution=1.0),)
    )
    with pytest.raises(UsageError, match="discrete"):
        random_flow("nsf", table).rsample(2)


def test_training_noise_is_taken_off_by_tweedie() -> None:
    """A linear flow on data of variance s^2 with noise sigma: samples y ~ N(0, v) become y (1 - sigma^2 / v)."""
    model = random_flow("linear-flow", scale=0.0, noise=0.5)
    noisy, clean = model.sample(6, generator=1, denoise=False), model.sample(6, generator=1)
    torch.testing.assert_close(clean, noisy * (1.0 - 0.25), rtol=0, atol=1e-12)  # the flow is the identity: v = 1
    assert "noise 0.5" in model.log_prob(noisy).method
    with pytest.raises(UsageError, match="without noise"):
        random_flow("nsf").sample(2, denoise=True)


def test_codes_do_not_depend_on_the_batch() -> None:
    """Also where the flow draws: a code is that of the middle of the level's cell."""
    model = random_flow("flow++", LEVELS)
    x = torch.randint(17, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    torch.testing.assert_close(model.encode(x)[2:4], model.encode(x[2:4]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_temperatures_are_numbers_from_zero(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature is a number >= 0"):
        random_flow("nsf").sample(2, temperature=temperature)


def test_margins_stay_first_where_the_flow_is_turned_round() -> None:
    table = DataSpec(kind="table", shape=(1,), columns=(Column(name="a", kind="numeric", dtype="float64"),))
    model = create("iaf", table)
    model.initialize(0)
    model.prepare(TensorSplit(normal(500, 1).exp()), Noise(0, "prepare", n=1))
    (marginal,) = (m for m in model.modules() if isinstance(m, Marginal))
    z = marginal(model.codec.encode(normal(500, 1, seed=2).exp())[0])[0]
    assert abs(z.mean()) < 0.2
    assert abs(z.std() - 1.0) < 0.2


# -- margins -----------------------------------------------------------------------------------------------------


def skewed(n: int) -> Tensor:
    """A log-normal column, a spike of width 1e-4 with a long tail, and a constant."""
    spike = torch.cat(
        [1e-4 * torch.rand(3 * n // 4, generator=torch.Generator().manual_seed(0)).double(), 3 + normal(n // 4)]
    )
    return torch.stack(
        [
            normal(n).exp(),
            spike[torch.randperm(n, generator=torch.Generator().manual_seed(1))],
            torch.full((n,), 2.0).double(),
        ],
        1,
    )


def test_margins_of_a_mirror_image_are_the_mirror_image() -> None:
    """A spike at either end lies in the middle of its mass: z has mean about 0, and the wrong side gets no samples."""
    x = torch.where(torch.arange(4000) % 10 < 7, 0.0, normal(4000).exp()).unsqueeze(1)
    left, right = Marginal(1, 128).double(), Marginal(1, 128).double()
    z, mirrored = left.initialize(x), right.initialize(-x)
    torch.testing.assert_close(mirrored, -z, rtol=0, atol=1e-6)
    assert abs(z.mean()) < 0.2
    drawn = left.inverse(normal(4000, 1, seed=3))[0]
    assert (drawn < -0.01).double().mean() < 0.02
    assert 0.6 < (drawn.abs() < 0.01).double().mean() < 0.8


def test_margins_become_normal_on_new_data() -> None:
    """Kolmogorov-Smirnov against N(0, 1) on other draws: sqrt(n) D exceeds 2.5 once in 10^5 (knots add their error)."""
    x, new = skewed(4000), normal(4000, seed=9).exp()
    marginal = Marginal(3, 128).double()
    marginal.initialize(x)
    z = marginal(torch.stack([new, x[:, 1], x[:, 2]], 1))[0][:, 0].sort().values
    cdf = torch.special.ndtr(z)
    assert (cdf - torch.arange(1, 4001) / 4000).abs().max() * math.sqrt(4000) < 2.5


@pytest.mark.parametrize("n", [3, 40, 2000])
def test_margins_are_invertible_at_and_beyond_their_knots(n: int) -> None:
    x = skewed(2000)[:n]
    marginal = Marginal(3, 64).double()
    marginal.initialize(x)
    at = torch.cat([x[:50], 40.0 * normal(50, 3), marginal.knots[0].T])
    z, ladj = marginal(at)
    back, ladj_inverse = marginal.inverse(z)
    torch.testing.assert_close(back, at, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ladj_inverse, -ladj, rtol=0, atol=1e-6)
    between = 0.3 * marginal.knots[0].T[:-1] + 0.7 * marginal.knots[0].T[1:]
    z, ladj = marginal(between)
    torch.testing.assert_close(ladj, determinants(lambda v: marginal(v)[0], between), rtol=0, atol=1e-8)
    assert (z.sort(0).values == marginal(between.sort(0).values)[0]).all()


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elementwise": "affine", "bins": 4}, "bins has no effect"),
        ({"layer": "planar", "elementwise": "affine"}, "elementwise has no effect"),
        ({"elementwise": "affine", "bound": 3.0}, "bound has no effect"),
        ({"lipschitz": 0.5}, "lipschitz has no effect"),
        ({"layer": "residual", "series": "exact", "terms": 3}, "terms has no effect"),
        ({"patch": 2}, "patch has no effect"),
        ({"layer": "planar", "multiscale": True}, "multiscale=true needs"),
        ({"layer": "residual", "inverted": True}, "exact both ways"),
        ({"inverted": True, "norm": "none", "noise": 0.1}, "does not go with inverted"),
        ({"inverted": True}, "give norm=none"),
        ({"inverted": True, "norm": "none", "elementwise": "bernstein"}, "exact both ways, not elementwise=bernstein"),
        ({"noise": 0.1, "dequantization": "variational"}, "noise is for real numbers"),
        ({"bins": 1}, "takes 2 to 256 bins"),
        ({"elementwise": "bernstein", "bins": 256}, "takes 2 to 64 bins"),
        ({"layer": "planar", "width": 9}, "width has no effect"),
        ({"layer": "masked-convolution", "depth": 5}, "depth has no effect"),
        ({"layer": "transformer", "norm": "last"}, "norm has no effect"),
        ({"scales": 2, "multiscale": False}, "scales has no effect"),
        ({"context_dim": 8}, "context_dim has no effect"),
        ({"multiscale": True}, "needs pictures or signals"),
        ({"layer": "transformer", "patch": 2}, "patch"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create("nsf", POINTS, **settings).initialize(0)


def test_realnvp_passes_the_colours_of_a_checkerboard_then_halves_of_channels() -> None:
    """In the first half of a scale's couplings the passed pixels are those of one colour, and then of the other."""
    spec = DataSpec(kind="image", shape=(1, 4, 4))
    model = create("realnvp", spec, multiscale=True, steps=4, scales=1, norm="none", width=4)
    assert isinstance(model, Flow)
    model.initialize(0)
    randomized(model)
    couplings = [m for m in model.modules() if type(m).__name__ == "Coupling"]
    squeezed = next(m for m in model.modules() if type(m).__name__ == "Squeezed")
    colours = (torch.arange(4).unsqueeze(1) + torch.arange(4)) % 2 == 0
    for coupling, white in zip(couplings[:2], (True, False), strict=True):
        mask = torch.zeros(1, 4, 2, 2)
        mask[:, coupling.passed] = 1.0
        assert torch.equal(squeezed.back(mask)[0, 0].bool(), colours == white)
    assert [m.passed.tolist() for m in couplings[2:]] == [[0, 1], [2, 3]]
