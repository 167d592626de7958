"""Boltzmann machines small enough to enumerate, in float64. Stochastic tests allow 5 standard errors (6e-7 each)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from trilemma.core.errors import DataError, UsageError
from trilemma.core.model import Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit, from_tensors
from trilemma.energy import RBM, anneal, linear_betas, log_mean_exp
from trilemma.energy.visible import Gaussian

TINY_P = 6e-7  # the two-sided tail beyond 5 standard errors
LATTICES = [("ordinal", 2, 4), ("ordinal", 4, 4), ("binomial", 2, 4), ("binomial", 4, 4)]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("test", seed), dtype=torch.float64)


def states(levels: int, d: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(levels), repeat=d)))


def points(d: int, levels: int | None = None, classes: int = 0) -> DataSpec:
    condition = ConditionSpec(kind="class", names=tuple("abcdef"[:classes])) if classes else None
    return DataSpec(kind="points", shape=(d,), levels=levels, condition=condition)


def prepared(spec: DataSpec, x: Tensor, labels: Tensor | None = None, **settings: object) -> RBM:
    """A machine that has seen the data but has not been trained, in float64."""
    model = RBM(spec, **settings)
    model.initialize(0)
    model.double()
    model.prepare(TensorSplit(x, labels), Noise(0, "prepare", n=1))
    model.fitted = True
    return model


def randomize(model: RBM, size: float = 1.0) -> RBM:
    """Random parameters of a strength that couples the units."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(size * draws(*parameter.shape, seed=100 + i))
    return model


def lattice_machine(visible: str, levels: int, d: int, *, size: float = 1.0, conditional: bool = False) -> RBM:
    x = torch.randint(levels, (50, d), generator=make_generator("data"))
    spec = points(d, levels, classes=2)
    labels = torch.arange(50) % 2
    return randomize(prepared(spec, x, labels, visible=visible, hidden=3, conditional=conditional, chains=8), size)


def gaussian_machine(d: int, hidden: int = 3) -> RBM:
    model = randomize(prepared(points(d), 2 * draws(100, d) + 1, hidden=hidden), 0.8)
    with torch.no_grad():
        assert isinstance(model.visible, Gaussian)
        model.visible.log_sigma.copy_(-0.3 + 0.2 * draws(d, seed=7))
    return model


def hidden_states(model: RBM) -> Tensor:
    return states(2, model.config.hidden).double() - 0.5


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def chi_square_p(counts: Tensor, p: Tensor) -> float:
    """P-value of the counts under p; cells of small expectation are joined."""
    expected = p * counts.sum()
    small = expected < 5
    observed = [*counts[~small].tolist(), counts[small].sum().item()]
    wanted = [*expected[~small].tolist(), expected[small].sum().item()]
    keep = [(o, w) for o, w in zip(observed, wanted, strict=True) if w > 0]
    return float(stats.chisquare(*zip(*keep, strict=True), sum_check=False).pvalue)


def histogram(x: Tensor, levels: int) -> Tensor:
    d = x.shape[1]
    return torch.bincount((x.long() * levels ** torch.arange(d - 1, -1, -1)).sum(1), minlength=levels**d).double()


# -- the distribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("visible", "levels", "d"), LATTICES)
def test_probabilities_sum_to_one(visible: str, levels: int, d: int) -> None:
    model = lattice_machine(visible, levels, d, conditional=True)
    x = states(levels, d)
    for c in (0, 1):
        score = model.log_prob(x, torch.full((len(x),), c))
        assert score.kind == "exact"
        assert score.value.exp().sum().item() == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize(("visible", "levels", "d"), LATTICES)
def test_free_energy_sums_the_hidden_units_out(visible: str, levels: int, d: int) -> None:
    model = lattice_machine(visible, levels, d)
    x, h, c = states(levels, d).double(), hidden_states(model), zeros(levels**d)
    for beta in (0.0, 0.4, 1.0):
        coupled = (model.visible.feature(x) @ model.weight + model.bias[c]) @ h.T
        expected = model.visible.log_base(x, beta, c) + (beta * coupled).logsumexp(1)
        torch.testing.assert_close(model.log_unnormalized(x, c, beta), expected, rtol=0, atol=1e-10)


def test_two_levels_are_the_bernoulli_machine() -> None:
    """E(v, h) = -a v - b h - v W h with h in {0, 1}: Smolensky's machine, up to a constant."""
    model = lattice_machine("binomial", 2, 4)
    x, c = states(2, 4).double(), zeros(16)
    w, mean = model.weight, model.visible.mean
    a, b = model.visible.bias[0] - 0.5 * w.sum(1), model.bias[0] - mean @ w
    free_energy = -x @ a - torch.nn.functional.softplus(x @ w + b).sum(1)
    difference = model.log_unnormalized(x, c) + free_energy
    torch.testing.assert_close(difference, difference[0].expand(16), rtol=0, atol=1e-10)


def test_binomial_units_are_binomial_given_the_hidden() -> None:
    model = lattice_machine("binomial", 5, 1)
    h = hidden_states(model)
    x = torch.arange(5).double()[:, None]
    for state in h:
        field = state @ model.weight.T
        log_p = model.visible.log_base(x, 1.0, zeros(5)) + model.visible.feature(x) @ field
        logit = (model.visible.bias[0] + field).item() / 2.0  # sqrt(L - 1)
        expected = torch.from_numpy(stats.binom.logpmf(range(5), 4, 1 / (1 + math.exp(-logit))))
        torch.testing.assert_close(log_p.log_softmax(0), expected, rtol=0, atol=1e-6)


def test_the_machine_without_couplings_is_that_of_independent_histograms() -> None:
    x = torch.randint(4, (50, 2), generator=make_generator("data"))
    model = prepared(points(2, 4), x, hidden=3)
    with torch.no_grad():
        model.weight.zero_()
    at = states(4, 2)
    p = [(torch.bincount(x[:, i], minlength=4).double() + 1) / 54 for i in (0, 1)]
    expected = (p[0][at[:, 0]] * p[1][at[:, 1]]).log()
    torch.testing.assert_close(model.log_prob(at).value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("d", [1, 2])
def test_gaussian_density_integrates_to_one(d: int) -> None:
    model = gaussian_machine(d)
    axis = torch.linspace(-30, 30, 6001 if d == 1 else 601, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    total = model.log_prob(grid).value.exp().sum() * (axis[1] - axis[0]) ** d
    assert total.item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gaussian_units_on_the_path(beta: float) -> None:
    """`log_normalizer` and `draw` belong to m_beta(x) exp(s(x) t)."""
    model = gaussian_machine(1)
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None]
    field = torch.tensor([[1.7]], dtype=torch.float64)
    log_f = model.visible.log_base(x, beta, zeros(len(x))) + (model.visible.feature(x) * field).sum(1)
    density = log_f.exp() * 0.01
    expected = density.sum().log().item()
    assert model.visible.log_normalizer(field, beta, zeros(1)).item() == pytest.approx(expected, abs=1e-9)
    p = density / density.sum()
    mean, n = (p * x[:, 0]).sum(), 20_000
    variance = (p * (x[:, 0] - mean).square()).sum()
    sample = model.visible.draw(field.expand(n, 1), beta, zeros(n), Noise(0, n=n))
    assert stats.kstest(sample[:, 0].detach().numpy(), "norm", (mean.item(), variance.sqrt().item())).pvalue > TINY_P


# -- Markov chains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("visible", "levels", "d"), LATTICES)
def test_a_gibbs_step_keeps_the_distribution(visible: str, levels: int, d: int) -> None:
    model, n = lattice_machine(visible, levels, d), 40_000
    all_x = states(levels, d)
    p = model.log_prob(all_x).value.exp()
    noise = Noise(1, n=n, block=n)
    x = all_x[noise.categorical(p)].double()
    with torch.no_grad():
        assert chi_square_p(histogram(model.gibbs(x, zeros(n), noise), levels), p) > TINY_P


@pytest.mark.parametrize(("visible", "levels"), [("ordinal", 4), ("binomial", 2)])
def test_samples_follow_the_enumerated_distribution(visible: str, levels: int) -> None:
    model = lattice_machine(visible, levels, 3, size=0.7, conditional=True)
    x = states(levels, 3)
    p = model.log_prob(x, zeros(len(x)) + 1).value.exp()
    assert chi_square_p(histogram(model.sample(10_000, 1, generator=0, steps=60), levels), p) > TINY_P


def test_gaussian_samples_follow_the_density() -> None:
    model = gaussian_machine(1)
    grid = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    cdf = (model.log_prob(grid[:, None]).value.exp() * 0.01).cumsum(0)
    sample = model.sample(5000, generator=0, steps=60)[:, 0].numpy()
    nearest = ((torch.from_numpy(sample) + 30) / 0.01).floor().long()
    assert stats.kstest(cdf[nearest].numpy(), "uniform").pvalue > TINY_P


# -- annealed importance sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ordinal", "binomial", "gaussian"])
def test_annealed_importance_sampling_is_unbiased(kind: str) -> None:
    """Few temperatures: the weights vary a lot, and their mean must still be Z."""
    model = gaussian_machine(2) if kind == "gaussian" else lattice_machine(kind, 4, 3, size=0.7)
    with torch.no_grad():
        exact, estimate = model._enumerate(0), model._estimate(0, chains=5000, steps=5, seed=0)
    ratio = (estimate.value - exact.value).exp().item()
    assert estimate.stderr.item() > 1e-3
    assert abs(ratio - 1) < 5 * estimate.stderr.item() * ratio
    with torch.no_grad():
        close = model._estimate(0, chains=100, steps=1000, seed=0)
    assert abs(close.value - exact.value).item() < 5 * close.stderr.item()
    assert close.stderr.item() < 0.05


def test_annealing_between_gaussians_with_perfect_transitions() -> None:
    """f_beta = exp(-precision_beta x^2 / 2): independent draws at each temperature give E[w] = Z_1 / Z_0 exactly."""
    n, precision = 20_000, 9.0
    scale = lambda beta: 1 + beta * (precision - 1)  # noqa: E731
    noise = Noise(0, n=n, block=n)
    x, log_w = anneal(
        noise.normal(dtype=torch.float64),
        lambda x, beta: -0.5 * scale(beta) * x.square(),
        lambda x, beta, noise: noise.normal_like(x) * scale(beta) ** -0.5,
        linear_betas(10),
        noise,
    )
    result = log_mean_exp(log_w)
    assert abs(result.value + math.log(3.0)) < 5 * result.stderr
    assert abs(x.square().mean() - 1 / 9) < 5 * math.sqrt(2 / n) / 9


def test_log_mean_exp_and_its_error() -> None:
    log_w = torch.tensor([0.0, math.log(2.0), math.log(3.0)], dtype=torch.float64)
    result = log_mean_exp(log_w + 1000.0)
    assert result.value.item() == pytest.approx(1000 + math.log(2.0))
    assert result.stderr.item() == pytest.approx(1.0 / math.sqrt(3) / 2.0)


def test_many_hidden_units_give_an_estimate_that_follows_the_parameters() -> None:
    x = torch.randint(2, (50, 3), generator=make_generator("data"))
    model = randomize(prepared(points(3, 2), x, hidden=17), 0.3)
    at = states(2, 3)
    score = model.log_prob(at, steps=200)
    assert score.kind == "estimate"
    assert score.stderr is not None
    assert bool((score.stderr == score.stderr[0]).all())
    exact = model.log_unnormalized(at.double(), zeros(8)).logsumexp(0)
    error = model.log_unnormalized(at.double(), zeros(8)) - exact - score.value
    assert bool((error.abs() < 5 * score.stderr).all())
    with torch.no_grad():
        model.bias += 2.0
    assert model.log_prob(at, steps=200).value.exp().sum().item() == pytest.approx(1.0, abs=0.1)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visible", ["ordinal", "binomial"])
def test_the_gradient_is_that_of_the_exact_likelihood(visible: str) -> None:
    """The loss is linear in the chains, so its gradients for each state, weighted by p, must sum to the exact one."""
    model = lattice_machine(visible, 3, 3)
    all_x = states(3, 3)
    p = model.log_prob(all_x).value.exp()
    data = Batch(torch.tensor([[0, 1, 2], [2, 2, 0], [1, 1, 1], [0, 0, 2]]))
    step = Step(Noise(0, n=4, block=4))
    parameters = list(model.parameters())

    nll = -(model.log_unnormalized(data.x.double(), zeros(4)).mean() - model._enumerate(0).value)
    exact = torch.autograd.grad(nll, parameters)
    model.eval()  # the chains stay where they are put
    total = [torch.zeros_like(q) for q in parameters]
    for state, weight in zip(all_x, p, strict=True):
        model.chain_x.copy_(state.double().expand_as(model.chain_x))
        loss = model.loss(data, step)
        assert isinstance(loss, tuple)
        for sum_, g in zip(total, torch.autograd.grad(loss[0], parameters), strict=True):
            sum_ += weight * g
    for ours, theirs in zip(total, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def train(model: RBM, x: Tensor, labels: Tensor | None, steps: int, lr: float) -> None:
    model.train()
    (objective,) = model.objectives()
    optimizer = torch.optim.Adam(objective.parameters, lr=lr)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        rows = torch.randint(len(x), (128,), generator=make_generator("rows", i))
        batch = Batch(x[rows], None if labels is None else labels[rows])
        losses = objective.loss(batch, Step(Noise(0, "train", i, n=128, block=128), i / steps, i))
        assert isinstance(losses, tuple)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()


def test_training_moves_an_enumerable_machine_to_the_data() -> None:
    p = torch.full((16,), 0.4 / 16, dtype=torch.float64)
    p[0b0011] += 0.4
    p[0b1101] += 0.2
    counts = (p * 2000).round().long()
    x = states(2, 4).repeat_interleave(counts, 0)
    data = counts / counts.sum()
    model = prepared(points(4, 2), x, hidden=6, chains=256, gibbs_steps=1)

    def divergence() -> float:
        return (data * (data.log() - model.log_prob(states(2, 4)).value)).sum().item()

    before = divergence()
    train(model, x, None, steps=600, lr=0.05)
    assert before > 0.3  # independent units
    assert divergence() < 0.03


def test_a_conditional_machine_learns_its_classes() -> None:
    labels = torch.arange(600) % 2
    x = torch.where(labels[:, None] == 1, torch.tensor([3, 0]), torch.tensor([0, 3]))
    x = (x + torch.randint(2, (600, 2), generator=make_generator("data"))).clamp(max=3)
    model = prepared(points(2, 4, classes=2), x, labels, conditional=True, hidden=4)
    assert torch.bincount(model.chain_c).tolist() == [64, 64]
    train(model, x, labels, steps=150, lr=0.05)
    right, wrong = (model.log_prob(x, c).mean().value.item() for c in (labels, 1 - labels))
    assert right > -1.5  # two equal levels for one unit, and one for the other: -log 2 at best
    assert wrong < right - 3


def test_a_gaussian_machine_learns_two_modes() -> None:
    x = 0.5 * draws(1000, 1) + 2.0 * (torch.arange(1000) % 2 * 2 - 1)[:, None]
    model = prepared(points(1), x, hidden=4, gibbs_steps=5)
    before = model.log_prob(x).mean().value.item()
    train(model, x, None, steps=400, lr=0.01)
    components = torch.stack([(-0.5 * ((x[:, 0] - m) / 0.5).square()) for m in (-2.0, 2.0)])
    truth = (components.logsumexp(0) - math.log(2 * 0.5 * math.sqrt(2 * math.pi))).mean().item()
    after = model.log_prob(x).mean().value.item()
    assert before < truth - 0.4
    assert truth - 0.1 < after < truth + 0.1


def test_chains_move_in_training_only() -> None:
    model = lattice_machine("ordinal", 4, 4)
    batch, step = Batch(states(4, 4)[:16]), Step(Noise(0, n=16, block=16))
    start = model.chain_x.clone()
    model.eval()
    model.loss(batch, step)
    assert torch.equal(model.chain_x, start)
    model.train()
    model.loss(batch, step)
    assert not torch.equal(model.chain_x, start)


# -- settings ------------------------------------------------------------------------------------------------------


def test_impossible_combinations_are_errors() -> None:
    with pytest.raises(UsageError, match="visible=ordinal needs data with levels"):
        RBM(points(2), visible="ordinal").initialize(0)
    with pytest.raises(DataError, match="class 'c' has no training example"):
        prepared(points(2, classes=3), draws(20, 2), torch.arange(20) % 2, conditional=True)
    with pytest.raises(UsageError, match="steps >= 1"):
        lattice_machine("ordinal", 2, 2).sample(1, steps=0)


def test_visible_units_follow_the_data() -> None:
    assert RBM(points(2)).visible_kind == "gaussian"
    assert RBM(points(2, levels=17)).visible_kind == "ordinal"
    assert RBM(points(2, levels=256)).visible_kind == "gaussian"
    assert RBM(points(2, levels=17), visible="gaussian").visible_kind == "gaussian"


def test_repeats_show_the_error_of_the_partition_function() -> None:
    """Each repeat estimates log Z anew, and the mean over examples carries that shared error whole."""
    spec = DataSpec(kind="image", shape=(1, 3, 3), levels=3)
    data = from_tensors(
        torch.randint(3, (200, 1, 3, 3), generator=make_generator("rbm")).to(torch.uint8), spec, name="x"
    )
    model = RBM(spec, name="rbm", hidden=17)
    model.initialize(seed=0)
    model.prepare(data.train, Noise(0, "prepare", n=1))
    model.fitted = True
    one, other = (model.log_prob(data.test, generator=g, chains=16, steps=10) for g in (0, 1))
    gap = one.value - other.value
    assert gap.abs().max() > 0
    torch.testing.assert_close(gap, gap[:1].expand_as(gap), rtol=0, atol=1e-5)
    assert one.mean().stderr > one.shared > 0
    assert model.log_prob(data.test, repeats=4, chains=16, steps=10).stderr.min() > 0
