"""Metrics against closed forms, brute force and simulation; extractors against what a good one must notice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.special import stdtrit
from scipy.stats import betabinom
from sklearn.datasets import load_digits
from torch import Tensor

from trilemma.core.errors import CheckpointError, DataError, UsageError
from trilemma.core.noise import make_generator
from trilemma.core.score import Score
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.data.dataset import Dataset, TensorSplit, from_tensors
from trilemma.metrics import (
    Estimate,
    FeatureExtractor,
    density_coverage,
    evaluate_samples,
    fit_extractor,
    frechet_distance,
    frechet_from_moments,
    jackknife,
    load_extractor,
    mean_log_likelihood,
    pixel_pca,
    precision_recall,
)
from trilemma.metrics.frechet import SampleMoments, frechet, nuclear_norm
from trilemma.metrics.jackknife import GROUPS, HALVES, delete_half, delete_one, shuffle_into_blocks, without
from trilemma.metrics.neighbours import neighbour_metrics


def normal(*shape: int, key: object = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("test-metrics", str(key)), dtype=torch.float64)


def covariance(d: int, key: object) -> Tensor:
    a = normal(d, d, key=key)
    return a @ a.T / d


# -- Frechet distance ----------------------------------------------------------------------------------------------


def test_frechet_of_commuting_gaussians_is_a_distance_of_means_and_deviations() -> None:
    s, t = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([1.5, 1.0, 0.1]).double()
    mu, nu = torch.tensor([1.0, 0.0, -1.0]).double(), torch.tensor([0.0, 2.0, -1.0]).double()
    rotation = torch.linalg.qr(normal(3, 3)).Q
    expected = (mu - nu).square().sum() + (s - t).square().sum()
    for q in (torch.eye(3).double(), rotation):
        found = frechet_from_moments(q @ mu, q @ (s**2).diag() @ q.T, q @ nu, q @ (t**2).diag() @ q.T)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_frechet_of_gaussians_that_do_not_commute_agrees_with_the_matrix_root() -> None:
    a, b, mu, nu = covariance(6, key="a"), covariance(6, key="b"), normal(6, key="mu"), normal(6, key="nu")
    expected = float((mu - nu).square().sum() + (a + b).trace()) - 2.0 * np.trace(sqrtm((a @ b).numpy())).real
    assert float(frechet_from_moments(mu, a, nu, b)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rank_x", "rank_y"), [(3, 6), (6, 2), (4, 3)])
def test_frechet_of_singular_gaussians_that_do_not_commute(rank_x: int, rank_y: int) -> None:
    """A A^T and B B^T have the non-zero eigenvalues of their product in common with (A^T B)(A^T B)^T."""
    a, b = normal(6, rank_x, key="a"), normal(6, rank_y, key="b")
    cross, zero = a.T @ b, torch.zeros(6).double()
    small = cross @ cross.T if rank_x <= rank_y else cross.T @ cross
    expected = a.square().sum() + b.square().sum() - 2.0 * np.trace(sqrtm(small.numpy())).real
    torch.testing.assert_close(frechet_from_moments(zero, a @ a.T, zero, b @ b.T), expected, rtol=1e-9, atol=0)


def test_frechet_of_rank_one_covariances() -> None:
    """C_x = a a^T, C_y = b b^T: tr (C_x C_y)^{1/2} = |a.b|."""
    a, b, zero = normal(5, key="a"), normal(5, key="b"), torch.zeros(5).double()
    found = frechet_from_moments(zero, torch.outer(a, a), zero, torch.outer(b, b))
    torch.testing.assert_close(found, a @ a + b @ b - 2.0 * (a @ b).abs(), rtol=1e-9, atol=0)


def test_frechet_in_one_dimension() -> None:
    x, y = normal(50, 1, key="x"), 2.0 * normal(40, 1, key="y") + 1.0
    expected = (x.mean() - y.mean()).square() + (x.std() - y.std()).square()
    torch.testing.assert_close(frechet_distance(x, y), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "m"), [(12, 15), (12, 100), (100, 12), (30, 31)])
def test_frechet_from_samples_equals_frechet_from_their_moments(n: int, m: int) -> None:
    """N <= d takes the centred samples, N > d the covariances; the moments always take the second path."""
    x, y = normal(n, 30, key="x"), 1.3 * normal(m, 30, key="y") + 0.2
    moments = frechet_from_moments(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    torch.testing.assert_close(frechet_distance(x, y), moments, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [10, 200])
def test_frechet_of_a_sample_with_itself_is_zero_at_any_conditioning(n: int) -> None:
    x = normal(n, 30) * torch.logspace(0, -9, 30, dtype=torch.float64)
    assert abs(float(frechet_distance(x, x.flip(0)))) < 1e-12


def test_nuclear_norm_of_both_paths() -> None:
    a = normal(5, 8)
    thin = a * torch.logspace(0, -12, 5, dtype=torch.float64)[:, None]
    for matrix in (a, a.T, thin):
        torch.testing.assert_close(nuclear_norm(matrix), torch.linalg.svdvals(matrix).sum(), rtol=1e-12, atol=0)


def test_frechet_refuses_what_it_cannot_measure() -> None:
    x = normal(10, 3)
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(x[:1], x)
    with pytest.raises(DataError, match=r"\(N, d\)"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(DataError, match="generated examples hold NaN"):
        frechet_distance(x.log(), x)


# -- nearest neighbours --------------------------------------------------------------------------------------------


def expected_filling(k: int, n: int, m: int) -> float:
    """E min(J, k) / k for J ~ BetaBinomial(m, k, n - k), from SciPy's distribution."""
    j = np.arange(m + 1)
    return float((np.minimum(j, k) / k * betabinom(m, k, n - k).pmf(j)).sum())


def brute_force(x: Tensor, y: Tensor, k_precision: int, k_density: int) -> dict[str, float]:
    """The definitions, example by example, from SciPy's distances."""
    cross = cdist(y.numpy(), x.numpy())
    radius = {}
    for name, points, k in (("y", y, k_precision), ("x", x, k_precision), ("yd", y, k_density)):
        radius[name] = np.sort(cdist(points.numpy(), points.numpy()), 1)[:, k]  # column 0 is the point itself
    n, m = cross.shape
    among = cdist(y.numpy(), y.numpy())
    cut = np.minimum(radius["yd"], np.median(radius["yd"]))
    own = [sum(among[i, j] <= cut[i] for i in range(n) if i != j) for j in range(n)]
    balls = [sum(cross[i, j] <= cut[i] for i in range(n)) for j in range(m)]
    filled = [min(k_density, sum(cross[i, j] <= radius["yd"][i] for j in range(m))) / k_density for i in range(n)]
    score = np.mean([min(1.0, c / k_density) for c in balls]) / np.mean([min(1.0, c / k_density) for c in own])
    good = np.array([expected_filling(k_density, n, q) for q in range(m + 1)])
    level = np.mean(filled)
    share = (
        np.interp(level, good, np.arange(m + 1))
        if level <= good[-1]
        else m + (level - good[-1]) / (good[-1] - good[-2])
    )
    return {
        "clipped_density": float(score),
        "clipped_coverage": float(share) / m,
        "precision": sum(any(cross[i, j] <= radius["y"][i] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(cross[i, j] <= radius["x"][j] for j in range(m)) for i in range(n)) / n,
        "density": sum(cross[i, j] <= radius["yd"][i] for i in range(n) for j in range(m)) / (k_density * m),
        "coverage": sum(any(cross[i, j] <= radius["yd"][i] for j in range(m)) for i in range(n)) / n,
    }


def values(x: Tensor, y: Tensor, k_precision: int = 3, k_density: int = 5) -> dict[str, float]:
    found = neighbour_metrics(x, y, k_precision=k_precision, k_density=k_density, interval=False)
    return {name: r.value for name, r in found.items()}


def test_neighbour_metrics_of_points_on_a_line() -> None:
    """Reference balls [-1, 1], [0, 2], [1, 3], [2, 18]; generated ones [-2.2, .2], [0, .5], [.2, .8], [.5, 59.5]."""
    y = torch.tensor([0.0, 1.0, 2.0, 10.0]).double()[:, None]
    x = torch.tensor([0.5, -1.0, 30.0, 0.25]).double()[:, None]
    precision, recall = precision_recall(x, y, k=1)
    density, coverage = density_coverage(x, y, k=1)
    assert precision == 3 / 4  # -1 lies on the edge of its ball, which counts
    assert density == (2 + 1 + 0 + 2) / 4
    assert coverage == 2 / 4
    assert recall == 1.0  # the outlier's huge ball reaches everything: why coverage exists


@pytest.mark.parametrize(("m", "n", "d"), [(40, 40, 2), (25, 60, 5), (300, 280, 3)])
def test_neighbour_metrics_agree_with_their_definitions(m: int, n: int, d: int) -> None:
    """The largest case takes the distances in two chunks."""
    x, y = 1.2 * normal(m, d, key="x") + 0.3, normal(n, d, key="y")
    assert values(x, y) == pytest.approx(brute_force(x, y, 3, 5), rel=1e-12)


def test_ties_of_discrete_data_count_as_inside() -> None:
    """On a grid most distances tie, and repeated points have radius zero; both far from the origin."""
    grid = make_generator("grid")
    y = torch.randint(0, 4, (80, 3), generator=grid).double() / 4.0 + 1000.0
    x = torch.randint(0, 5, (80, 3), generator=grid).double() / 4.0 + 1000.0
    integers = [4.0 * (t - 1000.0) for t in (x, y)]
    assert values(x, y) == pytest.approx(brute_force(*integers, 3, 5), rel=1e-12)
    repeated = torch.arange(4.0).double().repeat_interleave(10)[:, None]
    assert values(repeated, repeated)["precision"] == 1.0
    assert values(repeated + 0.01, repeated)["precision"] == 0.0


def test_neighbour_metrics_do_not_depend_on_the_order() -> None:
    x, y = normal(90, 3, key="x"), normal(80, 3, key="y")
    shuffled = values(x[torch.randperm(90, generator=make_generator(1))], y.flip(0))
    assert shuffled == pytest.approx(values(x, y), rel=1e-12)
    torch.testing.assert_close(frechet_distance(x.flip(0), y), frechet_distance(x, y), rtol=1e-12, atol=0)


def test_density_of_equal_distributions_is_one() -> None:
    """Each x lies in a given ball with probability k / N exactly: the mean over 200 pairs is 1 within 5 sigma."""
    density = torch.tensor(
        [values(normal(50, 2, key=f"x{s}"), normal(50, 2, key=f"y{s}"))["density"] for s in range(200)]
    )
    assert abs(density.mean() - 1.0) < 5.0 * density.std() / math.sqrt(200)


def test_neighbours_need_enough_examples() -> None:
    with pytest.raises(DataError, match="5 reference examples are too few for 5 nearest neighbours: give at least 6"):
        neighbour_metrics(normal(50, 2), normal(5, 2))
    few = neighbour_metrics(normal(19, 2, key="x"), normal(19, 2, key="y"))["density"]
    estimate = few.estimate(unit="ratio", higher_is_better=True)
    assert estimate.se is None
    assert estimate.ci is None
    assert "too few" in estimate.method


# -- jackknife -----------------------------------------------------------------------------------------------------


def difference(x: Tensor, y: Tensor) -> Tensor:
    return x.mean() - 2.0 * y.mean()


def test_jackknife_of_a_mean_is_the_textbook_standard_error() -> None:
    """Twenty examples make blocks of one: Var = s_x^2 / n + 4 s_y^2 / n, with Satterthwaite's degrees of freedom."""
    x, y = normal(20, key="x"), 3.0 * normal(20, key="y")
    estimate = jackknife(difference, x, y).estimate(unit="m")
    var_x, var_y = float(x.var()) / 20, 4.0 * float(y.var()) / 20
    assert estimate.value == pytest.approx(float(difference(x, y)), rel=1e-12)
    assert estimate.se == pytest.approx(math.sqrt(var_x + var_y), rel=1e-12)
    df = (var_x + var_y) ** 2 / (var_x**2 / 19 + var_y**2 / 19)
    half = stdtrit(df, 0.975) * math.sqrt(var_x + var_y)
    assert estimate.ci == pytest.approx((estimate.value - half, estimate.value + half), rel=1e-12)
    assert estimate.n == {"generated": 20, "reference": 20}


def test_jackknife_with_blocks_of_unequal_size() -> None:
    """For a mean, pseudo-values are block means: Var = (1/G) sum (mean_g - mean)^2 / (n / n_g - 1)."""
    x, y = normal(33, key="x"), torch.zeros(50).double()
    shuffled, blocks = shuffle_into_blocks(x)
    assert sorted({b.stop - b.start for b in blocks}) == [1, 2]
    terms = [(shuffled[b].mean() - x.mean()).square() / (33 / (b.stop - b.start) - 1) for b in blocks]
    assert jackknife(difference, x, y).se == pytest.approx(float(torch.stack(terms).mean().sqrt()), rel=1e-12)


def test_halvings_are_balanced_and_agree_with_the_jackknife_of_a_mean() -> None:
    signs = HALVES.double() * 2.0 - 1.0
    torch.testing.assert_close(signs @ signs.T, 20.0 * torch.eye(19).double(), rtol=0, atol=0)
    assert HALVES.sum(1).tolist() == [10] * 19
    x, _ = shuffle_into_blocks(normal(20, key="x"))
    halves = torch.stack([x[h].mean() for h in torch.cat([HALVES, ~HALVES])])
    contrasts = delete_half(float(x.mean()), halves, halves, 20, 20).sources["generated"].contrasts
    assert float(contrasts.square().mean()) == pytest.approx(float(x.var()) / 20, rel=1e-12)


@pytest.mark.parametrize(("m", "n"), [(203, 187), (20, 41)])
def test_contrasts_of_the_one_pass_equal_recomputation(m: int, n: int) -> None:
    x, y = 1.1 * normal(m, 3, key="x"), normal(n, 3, key="y")

    def halves(t: Tensor, metrics: Callable[[Tensor], dict[str, float]]) -> list[dict[str, float]]:
        shuffled, blocks = shuffle_into_blocks(t)
        kept = [torch.cat([shuffled[b] for b, keep in zip(blocks, row, strict=True) if keep]) for row in HALVES]
        dropped = [torch.cat([shuffled[b] for b, keep in zip(blocks, row, strict=True) if keep]) for row in ~HALVES]
        return [metrics(part) for part in kept + dropped]

    of_x, of_y = halves(x, lambda part: values(part, y)), halves(y, lambda part: values(x, part))
    for name, found in neighbour_metrics(x, y).items():
        theta_x, theta_y = (torch.tensor([v[name] for v in of], dtype=torch.float64) for of in (of_x, of_y))
        expected = delete_half(values(x, y)[name], theta_x, theta_y, m, n)
        assert found.value == pytest.approx(expected.value, rel=1e-12)
        torch.testing.assert_close(
            found.sources["generated"].contrasts, expected.sources["generated"].contrasts, rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            found.sources["reference"].contrasts, expected.sources["reference"].contrasts, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("m", "n", "d"), [(90, 107, 4), (15, 12, 30)])
def test_frechet_contrasts_equal_recomputation(m: int, n: int, d: int) -> None:
    x, y = 1.1 * normal(m, d, key="x") + 5.0, normal(n, d, key="y") + 5.0
    shuffled_x, x_blocks = shuffle_into_blocks(x)
    shuffled_y, y_blocks = shuffle_into_blocks(y)
    of_x = torch.stack([frechet_distance(without(shuffled_x, b), y) for b in x_blocks])
    of_y = torch.stack([frechet_distance(x, without(shuffled_y, b)) for b in y_blocks])
    expected = delete_one(float(frechet_distance(x, y)), of_x, of_y, m, n)
    found = frechet(SampleMoments(x), SampleMoments(y))
    torch.testing.assert_close(
        found.sources["generated"].contrasts, expected.sources["generated"].contrasts, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        found.sources["reference"].contrasts, expected.sources["reference"].contrasts, rtol=1e-9, atol=1e-9
    )
    assert found.value == pytest.approx(expected.value, rel=1e-12)


def test_intervals_cover_the_expectation() -> None:
    """95% intervals over 200 simulations cover in 90% .. 99% (a true 95% leaves that band once in 150 seeds)."""
    estimates: dict[str, list[Estimate]] = {}
    for s in range(200):
        x, y = 0.8 * normal(60, 2, key=f"gx{s}") + 0.5, normal(60, 2, key=f"gy{s}")
        for name, r in {"frechet": frechet(SampleMoments(x), SampleMoments(y)), **neighbour_metrics(x, y)}.items():
            estimates.setdefault(name, []).append(r.estimate(unit="", higher_is_better=True))
    for name, found in estimates.items():
        expectation = sum(e.value for e in found) / len(found)
        covered = sum(e.ci is not None and e.ci[0] <= expectation <= e.ci[1] for e in found) / len(found)
        assert 0.90 <= covered <= 0.99, f"{name}: {covered}"


def test_a_share_without_spread_has_the_binomial_interval() -> None:
    """All of 40 samples are far away: precision 0, and (1 - p)^40 = 0.025 at the interval's end."""
    precision = neighbour_metrics(normal(40, 2) + 100.0, normal(40, 2))["precision"]
    estimate = precision.estimate(unit="share", higher_is_better=True, share_of="generated")
    assert estimate.value == 0.0
    assert estimate.ci is not None
    assert (1.0 - estimate.ci[1]) ** 40 == pytest.approx(0.025, rel=1e-9)


def test_jackknife_needs_two_examples() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        jackknife(difference, normal(1), normal(5))
    assert len(shuffle_into_blocks(normal(7))[1]) == 7
    assert len(shuffle_into_blocks(normal(700))[1]) == GROUPS


# -- likelihood ----------------------------------------------------------------------------------------------------


def test_mean_log_likelihood_has_kind_unit_and_interval() -> None:
    score = Score(torch.tensor([-8.0, -10.0, -12.0]).double(), "lower_bound")
    grey = mean_log_likelihood(score, DataSpec(kind="image", shape=(1, 2, 2), levels=17))
    assert (grey.value, grey.unit, grey.kind, grey.n) == (-2.5, "nats/dim", "lower_bound", 3)
    assert grey.higher_is_better
    assert grey.se == pytest.approx(0.5 / math.sqrt(3))
    assert grey.ci == pytest.approx((-2.5 - 4.302652729911 * 0.5 / 3**0.5, -2.5 + 4.302652729911 * 0.5 / 3**0.5))
    byte = mean_log_likelihood(score, DataSpec(kind="image", shape=(1, 2, 2), levels=256))
    assert (byte.unit, byte.kind, byte.higher_is_better) == ("bits/dim", "upper_bound", False)
    assert byte.value == pytest.approx(2.5 / math.log(2.0))


def test_an_impossible_example_makes_the_mean_what_it_is() -> None:
    spec = DataSpec(kind="points", shape=(2,))
    found = mean_log_likelihood(Score(torch.tensor([-1.0, -math.inf]).double(), "exact"), spec)
    assert found.value == -math.inf
    assert found.ci is None
    assert Estimate.model_validate(json.loads(found.model_dump_json())) == found
    with pytest.raises(UsageError, match="per example"):
        mean_log_likelihood(Score(torch.tensor(-1.0), "exact"), spec)


# -- extractors ----------------------------------------------------------------------------------------------------

DIGITS = DataSpec(
    kind="image", shape=(1, 8, 8), levels=17, condition=ConditionSpec(kind="class", names=tuple("0123456789"))
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.uint8)[:, None]
    return from_tensors(x, DIGITS, name="digits", condition=torch.tensor(raw.target))


@pytest.fixture(scope="module")
def classifier(digits: Dataset) -> FeatureExtractor:
    """A fifth of the default training, which is enough to tell digits apart."""
    return fit_extractor(digits.train, DIGITS, seed=0, steps=100)


def real(digits: Dataset, n: int, split: str = "train") -> Tensor:
    return digits.splits[split].head(n).x


def independent_pixels(x: Tensor) -> Tensor:
    """Each pixel permuted over the pictures: right marginals, nothing else."""
    g = make_generator("floor")
    flat = x.flatten(1)
    return torch.stack([flat[torch.randperm(len(flat), generator=g), j] for j in range(flat.shape[1])], 1).view_as(x)


@pytest.mark.parametrize("labelled", [True, False])
def test_an_extractor_is_a_function_of_data_and_seed(digits: Dataset, labelled: bool) -> None:
    spec = DIGITS if labelled else DIGITS.model_copy(update={"condition": None})
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    a = fit_extractor(digits.train, spec, seed=0, steps=3)
    torch.manual_seed(12345)
    try:
        torch.set_num_threads(2)
        b = fit_extractor(digits.train, spec, seed=0, steps=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    other = fit_extractor(digits.train, spec, seed=1, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.id == b.id
    assert a.id != other.id
    x = real(digits, 32)
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=0)
    assert a(x).dtype == torch.float64
    assert a(x).shape == (32, a.dim)
    assert a(digits.train.head(10**6).x).var(0, correction=0).mean() == pytest.approx(
        1.0, rel=0.02
    )  # exact on the part that is not held out


def test_a_saved_extractor_gives_identical_features(
    digits: Dataset, classifier: FeatureExtractor, tmp_path: Path
) -> None:
    x = real(digits, 64)
    for i, extractor in enumerate((classifier, pixel_pca(digits.train, DIGITS))):
        extractor.save(tmp_path / str(i))
        again = load_extractor(tmp_path / str(i))
        assert (again.id, again.dim, again.accuracy, again.notes) == (
            extractor.id,
            extractor.dim,
            extractor.accuracy,
            extractor.notes,
        )
        torch.testing.assert_close(again(x), extractor(x), rtol=0, atol=0)


def test_a_changed_extractor_is_not_loaded(digits: Dataset, tmp_path: Path) -> None:
    extractor = pixel_pca(digits.train, DIGITS)
    extractor.save(tmp_path / "e")
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest | {"extractor": "whitened-pca"}))
    with pytest.raises(CheckpointError, match="its manifest says"):
        load_extractor(tmp_path / "e")
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest | {"extractor": "inception"}))
    with pytest.raises(CheckpointError, match="no extractor of kind"):
        load_extractor(tmp_path / "e")


def test_the_classifier_knows_digits_it_has_not_seen(digits: Dataset, classifier: FeatureExtractor) -> None:
    test = digits.test.head(10**6)
    accuracy = (classifier.logits(test.x).argmax(1) == test.condition).double().mean()
    assert classifier.accuracy is not None
    assert classifier.accuracy > 0.95
    assert accuracy > 0.95


@pytest.mark.slow
def test_the_default_classifier_is_right_on_97_of_100_digits(digits: Dataset) -> None:
    extractor = fit_extractor(digits.train, DIGITS, seed=0)
    test = digits.test.head(10**6)
    assert (extractor.logits(test.x).argmax(1) == test.condition).double().mean() > 0.97


def test_real_pictures_and_independent_pixels_are_told_apart(digits: Dataset, classifier: FeatureExtractor) -> None:
    """Intervals do not overlap, in either extractor. Recall is left out: scattered samples have large balls."""
    test = real(digits, 300, "test")
    for extractor in (classifier, pixel_pca(digits.train, DIGITS)):
        ceiling = evaluate_samples(real(digits, 300), test, extractor)
        floor = evaluate_samples(independent_pixels(real(digits, 300)), test, extractor)
        assert {e.extractor for e in ceiling.values()} == {extractor.id}
        for name, best in ceiling.items():
            worst = floor[name]
            if name == "recall":
                continue
            assert best.ci is not None
            assert worst.ci is not None
            assert best.ci[1] < worst.ci[0] if name == "frechet" else best.ci[0] > worst.ci[1], (extractor.kind, name)


def test_dropped_modes_lower_coverage_and_recall_but_not_precision(
    digits: Dataset, classifier: FeatureExtractor
) -> None:
    train = digits.train.head(10**6)
    assert train.condition is not None
    test = real(digits, 300, "test")
    everything = evaluate_samples(train.x[:300], test, classifier)
    some = evaluate_samples(train.x[train.condition < 5][:300], test, classifier)
    for name in ("coverage", "recall"):
        assert some[name].value < 0.65
        assert everything[name].value > 0.85
    assert some["precision"].value > everything["precision"].value - 0.03
    assert some["frechet"].value > 3.0 * everything["frechet"].value


def test_precision_falls_linearly_with_the_share_of_junk(digits: Dataset, classifier: FeatureExtractor) -> None:
    """Precision is a mean over the samples, so a mixture lies exactly between its parts, and near the line."""
    test, good = classifier(real(digits, 200, "test")), classifier(real(digits, 200))
    junk = classifier(independent_pixels(real(digits, 200)))
    found = [precision_recall(torch.cat([good[n:], junk[:n]]), test)[0] for n in (0, 50, 100, 150, 200)]
    parts = precision_recall(good[100:], test)[0], precision_recall(junk[:100], test)[0]
    assert found[2] == pytest.approx((parts[0] + parts[1]) / 2, rel=1e-12)
    line = np.linspace(found[0], found[4], 5)
    assert found[4] < found[0] - 0.3
    assert np.abs(np.array(found) - line).max() < 0.05


def test_evaluate_samples_refuses_unequal_numbers_and_bad_data(digits: Dataset, classifier: FeatureExtractor) -> None:
    x = real(digits, 40)
    with pytest.raises(UsageError, match="40 generated against 30 reference"):
        evaluate_samples(x, x[:30], classifier)
    with pytest.raises(DataError, match="shape"):
        evaluate_samples(x.flatten(1), x, classifier)
    with pytest.raises(DataError, match=r"integers 0\.\.16"):
        evaluate_samples(x + 9, x, classifier)


def test_tables_are_standardized_one_hot_and_whitened() -> None:
    g = make_generator("table")
    number = 100.0 + 30.0 * torch.randn(500, generator=g, dtype=torch.float64)
    related = number + torch.randn(500, generator=g, dtype=torch.float64)
    category = torch.randint(3, (500,), generator=g).double()
    constant = torch.full((500,), 7.0, dtype=torch.float64)
    gaps = torch.where(torch.rand(500, generator=g) < 0.2, math.nan, number.square())
    x = torch.stack([number, related, category, constant, gaps], 1)
    columns = (
        Column(name="number", kind="numeric", dtype="float64"),
        Column(name="related", kind="numeric", dtype="float64"),
        Column(name="category", kind="categorical", dtype="str", categories=("a", "b", "c")),
        Column(name="constant", kind="numeric", dtype="float64"),
        Column(name="gaps", kind="numeric", dtype="float64", missing=True),
    )
    extractor = fit_extractor(TensorSplit(x), DataSpec(kind="table", shape=(5,), columns=columns), seed=0)
    features = extractor(x)
    # number, related, category (3 one-hot that sum to 1), gaps and whether it is missing; the constant has no direction
    assert extractor.dim == 6
    assert "2 of 8 directions" in extractor.notes[0]
    torch.testing.assert_close(features.T.cov(correction=0), torch.eye(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(features.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-9)


def test_whitened_distances_do_not_depend_on_units() -> None:
    x = normal(200, 3) @ normal(3, 3, key="mix")
    spec = DataSpec(kind="points", shape=(3,))
    units = x * torch.tensor([1e-3, 1.0, 1e4]) + 5.0
    a = fit_extractor(TensorSplit(x), spec, seed=0)(x)
    b = fit_extractor(TensorSplit(units), spec, seed=0)(units)
    torch.testing.assert_close(torch.cdist(a, a), torch.cdist(b, b), rtol=1e-6, atol=1e-6)


def test_pixel_pca_keeps_distances_up_to_one_factor(digits: Dataset) -> None:
    """Digits have 61 pixels that vary, fewer than 64, so nothing but nearly constant pixels is lost."""
    extractor = pixel_pca(digits.train, DIGITS)
    x = real(digits, 50)
    ratio = torch.pdist(extractor(x)) / torch.pdist(x.flatten(1).double())
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    assert pixel_pca(digits.train, DIGITS, dim=5).dim == 5
    with pytest.raises(DataError, match="nothing varies"):
        pixel_pca(TensorSplit(torch.zeros(10, 1, 8, 8, dtype=torch.uint8)), DIGITS)


def test_the_denoiser_keeps_unlabelled_kinds_of_signals_apart() -> None:
    """Two kinds of signal at random phase: the nearest neighbour of each is of its own kind."""
    g = make_generator("signals")
    kind = torch.randint(2, (300,), generator=g)
    phase = 2.0 * math.pi * torch.rand(300, 1, generator=g)
    t = torch.linspace(0.0, 2.0 * math.pi, 300)
    x = (torch.where(kind == 0, 2.0, 7.0)[:, None] * t + phase).sin()[:, None]
    extractor = fit_extractor(TensorSplit(x), DataSpec(kind="signal", shape=(1, 300)), seed=0, steps=40)
    distance = torch.cdist(extractor(x), extractor(x)).fill_diagonal_(math.inf)
    assert (kind[distance.argmin(1)] == kind).double().mean() > 0.97


def test_large_real_pictures_are_averaged_down() -> None:
    """A picture and its 2x2 block means repeated have the same features when the larger side is 64."""
    x = normal(24, 3, 64, 40).float()
    extractor = fit_extractor(TensorSplit(x), DataSpec(kind="image", shape=(3, 64, 40)), seed=0, steps=2)
    means = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(extractor(means), extractor(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match="NaN"):
        extractor(x.log())
