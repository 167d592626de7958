"""The classical models against closed forms. Stochastic tests allow 5 standard errors (false alarms: 6e-7 each)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from trilemma.classical import GMM, KDE, Histogram, Independent
from trilemma.classical.bins import Bins
from trilemma.classical.forest import (
    Counts,
    Forest,
    chow_liu,
    group_cells,
    leave_one_out,
    maximum_spanning_forest,
    mutual_information,
)
from trilemma.classical.kde import choose_bandwidth
from trilemma.core.errors import DataError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit

TINY_P = 6e-7  # the two-sided tail beyond 5 standard errors


def fit(model: GenerativeModel, x: Tensor, labels: Tensor | None = None, seed: int = 0) -> GenerativeModel:
    model.initialize(seed)
    model.prepare(TensorSplit(x, labels), Noise(seed, "prepare", n=1))
    model.fitted = True
    return model


def points(d: int, levels: int | None = None, classes: int = 0) -> DataSpec:
    condition = ConditionSpec(kind="class", names=tuple("abcdef"[:classes])) if classes else None
    return DataSpec(kind="points", shape=(d,), levels=levels, condition=condition)


def lattice(levels: int, d: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(levels), repeat=d)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("test", seed), dtype=torch.float64)


def quadrature(bins: Bins, d: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of dimension d that are exact for densities constant in cells and exponential beyond."""
    nodes, weights = np.polynomial.laguerre.laggauss(3)
    k, s = int(bins.cells[d]), bins.scale[d].item()
    e = bins.edges[d, : k + 1].numpy()
    y = [e[0] - s * nodes, 0.5 * (e[1:] + e[:-1]), e[-1] + s * nodes]
    tail = s * weights * np.exp(nodes)
    return torch.from_numpy(np.concatenate(y)), torch.from_numpy(np.concatenate([tail, np.diff(e), tail]))


def integral_in_model_space(model: Independent) -> float:
    """The integral of the density over the one or two dimensions of model space."""
    axes = [quadrature(model.bins, d) for d in range(model.codec.dims)]
    y = torch.cartesian_prod(*(n for n, _ in axes)).reshape(-1, len(axes))
    w = torch.cartesian_prod(*(w for _, w in axes)).reshape(-1, len(axes)).prod(1)
    return (model._log_prob(y, None, Noise(0, n=len(y))).value.exp() * w).sum().item()


def chi_square_p(counts: Tensor, p: Tensor) -> float:
    """P-value of the counts under p; cells of small expectation are joined."""
    n = counts.sum()
    small = p * n < 5
    observed, expected = counts[~small].tolist(), (n * p[~small]).tolist()
    if bool(small.any()):
        observed.append(counts[small].sum().item())
        expected.append((n * p[small]).sum().item())
    return float(stats.chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue)


def lattice_p_value(model: GenerativeModel, levels: int, d: int, n: int, condition: Tensor | None = None) -> float:
    states = lattice(levels, d)
    c = None if condition is None else condition[:1].expand(len(states))
    p = model.log_prob(states, c).value.exp()
    x = model.sample(n, condition, generator=1).long()
    index = (x * levels ** torch.arange(d - 1, -1, -1)).sum(1)
    return chi_square_p(torch.bincount(index, minlength=levels**d).double(), p)


# -- independent ---------------------------------------------------------------------------------------------------


def test_independent_is_laplace_smoothed_frequency_on_a_lattice() -> None:
    x = torch.tensor([[0, 2], [0, 2], [1, 2], [0, 0]])
    model = fit(Independent(points(2, levels=3), pseudocount=1.0), x)
    first, second = torch.tensor([4.0, 2.0, 1.0]) / 7, torch.tensor([2.0, 1.0, 4.0]) / 7
    states = lattice(3, 2)
    score = model.log_prob(states)
    expected = (first[states[:, 0]] * second[states[:, 1]]).log().double()
    assert score.kind == "exact"
    torch.testing.assert_close(score.value, expected, rtol=0, atol=1e-6)
    assert score.value.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_independent_bound_is_tight_on_categories_and_values() -> None:
    columns = (
        Column(name="city", kind="categorical", dtype="str", categories=("a", "b", "c"), missing=True),
        Column(name="yes", kind="boolean", dtype="bool"),
        Column(name="size", kind="numeric", dtype="float64", values=(1.0, 2.5, 7.0)),
    )
    nan = math.nan
    x = torch.tensor([[0, 1, 1.0], [0, 0, 7.0], [2, 1, 7.0], [nan, 1, 7.0], [1, 1, 2.5]], dtype=torch.float64)
    model = fit(Independent(DataSpec(kind="table", shape=(3,), columns=columns), pseudocount=1.0), x)
    value = model.log_prob(torch.tensor([[nan, 1.0, 7.0], [0.0, 0.0, 1.0]], dtype=torch.float64)).value
    expected = [math.log(2 / 9 * 5 / 7 * 4 / 8), math.log(3 / 9 * 2 / 7 * 2 / 8)]
    np.testing.assert_allclose(value, expected, atol=1e-9)


def test_independent_density_integrates_to_one_and_is_the_histogram() -> None:
    x = torch.cat([normal(300, 1), 6 + 0.3 * normal(200, 1, seed=1)])
    model = fit(Independent(points(1)), x)
    assert isinstance(model, Independent)
    assert integral_in_model_space(model) == pytest.approx(1.0, abs=1e-12)
    edges = (model.bins.edges[0, : int(model.bins.cells[0]) + 1] * x.std(correction=0) + x.mean()).numpy()
    counts, _ = np.histogram(x.numpy(), edges)
    height = (counts + 1) / (500 + len(counts) + 2) / np.diff(edges)
    middle = torch.from_numpy(0.5 * (edges[1:] + edges[:-1]))[:, None]
    np.testing.assert_allclose(model.log_prob(middle).value.exp(), height, rtol=1e-9)
    far = model.log_prob(torch.tensor([[1e3], [-1e3]], dtype=torch.float64)).value
    assert bool(far.isfinite().all())


def test_grid_columns_have_cells_of_whole_steps() -> None:
    column = Column(name="age", kind="numeric", dtype="float64", resolution=0.5, offset=10.0)
    x = 10 + 0.5 * torch.randint(40, (200, 1), generator=make_generator("grid")).double()
    model = fit(Independent(DataSpec(kind="table", shape=(1,), columns=(column,))), x)
    assert isinstance(model, Independent)
    std, mean = (getattr(model.codec.transforms[0].columns[0], k).item() for k in ("std", "mean"))
    index = model.bins.edges[0, : int(model.bins.cells[0]) + 1] * std + mean
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    assert integral_in_model_space(model) == pytest.approx(1.0, abs=1e-12)
    values = 10 + 0.5 * torch.arange(-200, 400).double()[:, None]
    inner = (values[:, 0] >= x.min()) & (values[:, 0] <= x.max())
    a, b = (model.log_prob(values[inner], generator=seed).value for seed in (0, 1))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # tight: the dequantizing noise does not matter


def test_missing_values_have_their_frequency() -> None:
    column = Column(name="x", kind="numeric", dtype="float64", missing=True)
    x = normal(400, 1)
    x[:100] = math.nan
    model = fit(Independent(DataSpec(kind="table", shape=(1,), columns=(column,))), x)
    bound = model.log_prob(torch.full((20_000, 1), math.nan, dtype=torch.float64)).value
    mass = bound.exp()  # an unbiased estimate of P(missing), of which log is the bound
    assert abs(mass.mean() - 101 / 402) < 5 * mass.std() / math.sqrt(len(mass))
    assert bound.mean() > math.log(101 / 402) - 0.15  # and the bound is nearly tight
    sampled = model.sample(4000, generator=0).isnan().double().mean().item()
    assert abs(sampled - 101 / 402) < 5 * math.sqrt(0.25 * 0.75 / 4000)


# -- histogram -----------------------------------------------------------------------------------------------------


def tree_data(n: int, d: int, levels: int, seed: int) -> tuple[Tensor, list[int]]:
    """Draws from a random tree of noisy copies: x_i = (x_parent + shift_i) mod L with probability 0.7, else any."""
    g = make_generator("tree", seed)
    parents = [-1] + [int(torch.randint(i, (), generator=g)) for i in range(1, d)]
    x = torch.randint(levels, (n, d), generator=g)
    for i in range(1, d):
        copy = torch.rand(n, generator=g) < 0.7
        x[:, i] = torch.where(copy, (x[:, parents[i]] + i) % levels, x[:, i])
    return x, parents


def edges(parent: Tensor) -> set[tuple[int, int]]:
    return {(min(i, p), max(i, p)) for i, p in enumerate(parent.tolist()) if p < len(parent)}


def test_chow_liu_recovers_a_known_tree() -> None:
    x, parents = tree_data(4000, 10, 3, seed=3)
    model = fit(Histogram(points(10, levels=3)), x)
    assert isinstance(model, Histogram)
    assert edges(model.forest.parent) == {(p, i) for i, p in enumerate(parents) if p >= 0}


def test_mutual_information_is_the_plug_in_estimate_less_miller_bias() -> None:
    x, _ = tree_data(500, 4, 3, seed=1)
    mi = mutual_information(x, 3, block=3)
    for i, j in itertools.permutations(range(4), 2):
        assert mi[i, j].item() == pytest.approx(mutual_info_score(x[:, i], x[:, j]) - 4 / 1000, abs=1e-6)


def test_spanning_forest_is_the_best_of_all_trees() -> None:
    g = make_generator("weights")
    w = torch.rand((5, 5), generator=g, dtype=torch.float64)
    w = (w + w.T).fill_diagonal_(0)
    parent = maximum_spanning_forest(w.numpy())
    weight = sum(w[i, p].item() for i, p in enumerate(parent.tolist()) if p < 5)
    best = 0.0
    for tree in itertools.combinations(itertools.combinations(range(5), 2), 4):
        reached = {0}
        for _ in range(4):
            reached |= {v for e in tree if set(e) & reached for v in e}
        if len(reached) == 5:
            best = max(best, sum(w[i, j].item() for i, j in tree))
    assert weight == pytest.approx(best, abs=1e-12)
    assert (maximum_spanning_forest(-w.numpy()) == 5).all()  # nothing to gain: no edge


@pytest.mark.parametrize("conditional", [False, True])
def test_tree_is_a_distribution_that_its_samples_follow(conditional: bool) -> None:
    x, _ = tree_data(600, 5, 3, seed=2)
    labels = x[:, 0] % 2
    spec = points(5, levels=3, classes=2)
    model = fit(Histogram(spec, conditional=conditional), x, labels)
    c = torch.ones(243, dtype=torch.int64) if conditional else None
    assert model.log_prob(lattice(3, 5), c).value.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    many = torch.ones(20_000, dtype=torch.int64) if conditional else None
    assert lattice_p_value(model, 3, 5, 20_000, many) > TINY_P


def test_tree_beats_independence_and_coarse_groups_keep_the_lattice_exact() -> None:
    g = make_generator("walk")
    steps = torch.randint(-3, 4, (500, 4), generator=g)
    x = (100 + 20 * torch.randn(500, 1, generator=g) + steps.cumsum(1)).round().long().clamp(0, 255)
    spec = points(4, levels=256)
    tree, flat = fit(Histogram(spec), x), fit(Independent(spec), x)
    assert tree.log_prob(x).mean().value > flat.log_prob(x).mean().value + 2.0
    row = torch.tensor([[101, 0, 99, 100]]).repeat(256, 1)
    row[:, 1] = torch.arange(256)
    joint = tree.log_prob(row).value.logsumexp(0)  # summed over x_1: smaller than the whole, larger than any term
    assert tree.log_prob(row).value.max() < joint < 0.0


@pytest.mark.parametrize("classes", [1, 2])
def test_leave_one_out_of_the_forest_is_refitting_without_the_example(classes: int) -> None:
    x, _ = tree_data(30, 4, 3, seed=5)
    labels = torch.arange(30) % classes
    f, valid = x + 1, torch.tensor([[False, True, True, True, False]]).expand(4, -1)
    parent = torch.tensor([4, 0, 1, 1])
    group = torch.tensor([[0, 0, 0, 1, 1]]).expand(4, -1)
    a, alpha, kappa = 0.7, 3.0, 5.0
    whole = Counts.of(f, labels, classes, valid, group, 2, parent)
    expected = leave_one_out(whole, parent, a, alpha, kappa)
    for i in range(30):
        rest = torch.arange(30) != i
        forest = Forest()
        forest.parent, forest.group = parent, group
        forest._set_tables(Counts.of(f[rest], labels[rest], classes, valid, group, 2, parent), a, alpha, kappa)
        assert forest.log_prob(f[i : i + 1], labels[i : i + 1]).item() == pytest.approx(expected[i].item(), abs=1e-12)


def test_groups_are_neighbours_of_about_equal_mass() -> None:
    counts = torch.tensor([[0.0, 10, 1, 1, 8, 1, 26, 0]])
    valid = torch.tensor([[False] + [True] * 6 + [False]])
    assert group_cells(counts, valid, 4).tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("d", [1, 2])
def test_joint_histogram_integrates_to_one(d: int) -> None:
    x = normal(400, d) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]], dtype=torch.float64)[:d, :d]
    model = fit(Histogram(points(d)), x)
    assert isinstance(model, Histogram)
    assert model.is_joint
    assert integral_in_model_space(model) == pytest.approx(1.0, abs=1e-12)
    if d == 2:
        assert model.log_prob(x).mean().value > fit(Independent(points(d)), x).log_prob(x).mean().value


@pytest.mark.parametrize("classes", [1, 2])
def test_joint_histogram_of_known_counts_and_its_leave_one_out(classes: int) -> None:
    x, _ = tree_data(40, 2, 3, seed=4)
    labels = torch.arange(40) % classes
    spec = points(2, levels=3, classes=2)
    model = fit(Histogram(spec, conditional=classes == 2, pseudocount=0.5), x, labels)
    assert isinstance(model, Histogram)
    f = model.bins.index(x.double())
    alpha = 2.5
    expected = model._leave_one_out(f, labels, alpha)
    for i in (0, 7, 39):
        rest = torch.arange(40) != i
        model._set_joint(f[rest], labels[rest], alpha)
        assert model.log_prob_cells(f[i : i + 1], labels[i : i + 1]).item() == pytest.approx(expected[i].item())
    if classes == 1:
        model._set_joint(f, labels, alpha)
        n = ((x[:, 0] == 1) & (x[:, 1] == 2)).sum().item()
        single = [((x[:, k] == v).sum().item() + 0.5) / 41.5 for k, v in ((0, 1), (1, 2))]
        p = (n + alpha * math.prod(single)) / (40 + alpha)
        assert model.log_prob(torch.tensor([[1, 2]])).value.item() == pytest.approx(math.log(p), abs=1e-9)


def test_joint_samples_follow_the_density() -> None:
    x, _ = tree_data(300, 2, 5, seed=6)
    assert lattice_p_value(fit(Histogram(points(2, levels=5)), x), 5, 2, 20_000) > TINY_P
    real = fit(Histogram(points(1)), normal(500, 1))
    grid = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    density = real.log_prob(grid[:, None]).value.exp().numpy()
    cdf = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * 12 / 24_000)])
    sample = real.sample(4000, generator=0)[:, 0].double().numpy()
    assert stats.kstest(sample, lambda t: np.interp(t, grid.numpy(), cdf)).pvalue > TINY_P


def test_impossible_structures_are_errors() -> None:
    with pytest.raises(UsageError, match="structure=joint fills at most 3"):
        fit(Histogram(points(4), structure="joint"), normal(20, 4))
    with pytest.raises(UsageError, match="at most 4096 dimensions"):
        fit(Histogram(DataSpec(kind="signal", shape=(1, 5000))), torch.zeros(3, 1, 5000))


def test_structure_given_classes_is_conditional_on_them() -> None:
    g = make_generator("classes")
    labels = torch.randint(2, (4000,), generator=g)
    x = torch.randint(4, (4000, 4), generator=g) // 2
    x[:, 0], x[:, 1] = labels, labels  # dependent, but not given the class
    x[:, 3] = torch.where(torch.rand(4000, generator=g) < 0.8, x[:, 2], x[:, 3])
    valid = torch.tensor([[False, True, True, False]]).expand(4, -1)
    assert {(0, 1), (2, 3)} <= edges(chow_liu(x + 1, valid, torch.zeros_like(labels), 1))
    given = edges(chow_liu(x + 1, valid, labels, 2))
    assert (2, 3) in given
    assert (0, 1) not in given


# -- kernel density ------------------------------------------------------------------------------------------------


def test_kde_of_two_points_in_data_units() -> None:
    x = torch.tensor([[10.0], [14.0]], dtype=torch.float64)  # standard deviation 2
    model = fit(KDE(points(1), bandwidth=0.5), x)
    at = torch.tensor([[10.0], [12.5]], dtype=torch.float64)
    expected = np.log(0.5 * stats.norm.pdf(at, 10, 1.0) + 0.5 * stats.norm.pdf(at, 14, 1.0))[:, 0]
    np.testing.assert_allclose(model.log_prob(at).value, expected, atol=1e-12)


def test_kde_equals_scikit_learn() -> None:
    x, at = normal(200, 3), 2 * normal(50, 3, seed=1)
    model = fit(KDE(points(3)), x)
    assert isinstance(model, KDE)
    std, mean = x.std(0, correction=0), x.mean(0)
    peer = KernelDensity(bandwidth=model.bandwidth.item(), rtol=1e-12).fit((x - mean) / std)
    expected = peer.score_samples((at - mean) / std) - std.log().sum().item()
    np.testing.assert_allclose(model.log_prob(at).value, expected, atol=1e-8)


def test_bandwidth_maximizes_the_leave_one_out_likelihood() -> None:
    y = normal(60, 2)

    def score(h: float) -> float:
        return sum(
            float(KernelDensity(bandwidth=h, rtol=1e-12).fit(np.delete(y.numpy(), i, 0)).score_samples(y[i : i + 1])[0])
            for i in range(60)
        )

    h = choose_bandwidth(y)
    assert score(h) > max(score(h * 1.1), score(h / 1.1))
    assert all(score(h) >= score(other) - 1e-9 for other in (0.1, 0.2, 0.4, 0.8))


def test_copies_do_not_shrink_the_bandwidth_to_zero() -> None:
    y = normal(50, 2)
    assert choose_bandwidth(y.repeat(2, 1)) == pytest.approx(choose_bandwidth(y), rel=0.02)
    assert choose_bandwidth(y[:1].repeat(9, 1)) == 1.0


def test_kde_samples_have_its_moments_and_its_density_integrates_to_one() -> None:
    x = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64)
    model = fit(KDE(points(1), bandwidth=0.3), x)
    grid = torch.linspace(-10, 14, 4001, dtype=torch.float64)[:, None]
    assert torch.trapezoid(model.log_prob(grid).value.exp(), grid[:, 0]).item() == pytest.approx(1.0, abs=1e-10)
    s = model.sample(20_000, generator=0)[:, 0].double()
    variance = 2.0 * (1 + 0.3**2)
    assert abs(s.mean() - 1.0) < 5 * math.sqrt(variance / 20_000)
    cdf = lambda t: (2 * stats.norm.cdf(t, 0, 0.3 * 2**0.5) + stats.norm.cdf(t, 3, 0.3 * 2**0.5)) / 3  # noqa: E731
    assert stats.kstest(s.numpy(), cdf).pvalue > TINY_P


# -- Gaussian mixture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_gmm_equals_scikit_learn_in_data_units(kind: str) -> None:
    x = torch.cat([normal(150, 2), normal(150, 2, seed=1) @ torch.tensor([[1.0, 2.0], [0.0, 0.5]]).double() + 5])
    model = fit(GMM(points(2), components=2, covariance=kind), x)
    assert isinstance(model, GMM)
    std, mean = x.std(0, correction=0), x.mean(0)
    peer = GaussianMixture(2, covariance_type=kind, random_state=0, tol=1e-3).fit(((x - mean) / std).numpy())
    peer.weights_, peer.means_ = model.log_weight.exp().numpy(), model.mean.numpy()
    inverse = torch.linalg.inv(model.scale).mT.numpy() if kind == "full" else 1 / model.scale.numpy()
    peer.precisions_cholesky_ = inverse
    at = 3 * normal(40, 2, seed=2)
    expected = peer.score_samples(((at - mean) / std).numpy()) - std.log().sum().item()
    np.testing.assert_allclose(model.log_prob(at).value, expected, atol=1e-9)


def test_gmm_chooses_components_and_its_samples_follow() -> None:
    centers = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0], [8.0, 8.0]], dtype=torch.float64)
    which = torch.arange(1200) % 4
    x = centers[which] + 0.5 * normal(1200, 2)
    model = fit(GMM(points(2)), x)
    assert isinstance(model, GMM)
    assert len(model.mean) == 4
    truth = (torch.cdist(x, centers).square() / -0.5 - math.log(4 * 2 * math.pi * 0.25)).logsumexp(1).mean()
    assert model.log_prob(x).mean().value.item() == pytest.approx(truth.item(), abs=0.05)
    s = model.sample(8000, generator=0).double()
    nearest = torch.cdist(s, centers).argmin(1)
    assert chi_square_p(torch.bincount(nearest, minlength=4).double(), torch.full((4,), 0.25).double()) > 1e-3
    residual = s - centers[nearest]
    assert abs(residual.square().mean() - 0.25) < 0.02


def test_gmm_covariance_of_samples() -> None:
    mix = torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=torch.float64)
    x = normal(2000, 2) @ mix
    model = fit(GMM(points(2), components=1, covariance="full"), x)
    s = model.sample(40_000, generator=0).double()
    # The variance of a sample covariance of Gaussians is (C_ii C_jj + C_ij^2) / n.
    c = torch.cov(x.T, correction=0)
    error = ((c.diagonal()[:, None] * c.diagonal() + c.square()) / 40_000).sqrt()
    assert bool(((torch.cov(s.T) - c).abs() < 5 * error + 1e-4).all())


# -- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Independent, Histogram, KDE, GMM])
def test_a_class_without_examples_is_an_error(kind: type[GenerativeModel]) -> None:
    with pytest.raises(DataError, match="class 'c' has no training example"):
        fit(kind(points(2, classes=3), conditional=True), normal(40, 2), torch.arange(40) % 2)


@pytest.mark.parametrize("kind", [Independent, Histogram, KDE, GMM])
def test_classes_have_their_own_densities(kind: type[GenerativeModel]) -> None:
    labels = torch.arange(400) % 2
    x = 0.5 * normal(400, 2) + 6.0 * labels[:, None]
    model = fit(kind(points(2, classes=2), conditional=True), x, labels)
    right, wrong = model.log_prob(x, labels).mean().value, model.log_prob(x, 1 - labels).mean().value
    assert right > wrong + 3
    s = model.sample(2000, labels.repeat(5), generator=0).double()
    for c in (0, 1):
        own = s[labels.repeat(5) == c]
        assert ((own - 6 * c).abs() < 3).double().mean() > 0.95


def test_small_classes_fall_back_as_stated() -> None:
    labels = (torch.arange(100) >= 97).long()
    x = normal(100, 2)
    spec = points(2, classes=2)
    kde = fit(KDE(spec, conditional=True), x, labels)
    std = x.std(0, correction=0)
    assert isinstance(kde, KDE)
    assert kde.bandwidth[1].item() == pytest.approx(choose_bandwidth((x - x.mean(0)) / std), rel=1e-9)
    gmm = fit(GMM(spec, conditional=True), x, labels)
    assert isinstance(gmm, GMM)
    own = ((x - x.mean(0)) / std)[97:]
    component = gmm.label == 1
    torch.testing.assert_close(gmm.mean[component][0], own.mean(0))
    scale = gmm.scale[component][0]
    variance = (3 * own.var(0, correction=0) + 1) / 4
    torch.testing.assert_close(scale.square() if scale.ndim == 1 else scale.diagonal().square(), variance)
