"""The core of the metrics: distances, errors, moments, clipped scores and memorization against closed forms.

Stochastic tests have fixed seeds; each states how often a correct implementation would fail with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.spatial.distance import cdist
from scipy.stats import betabinom, binom
from torch import Tensor

from trilemma.comparison.report import Report, Row
from trilemma.core.errors import DataError, UsageError
from trilemma.core.noise import make_generator
from trilemma.core.score import Score
from trilemma.core.spec import DataSpec
from trilemma.data.dataset import TensorSplit, from_tensors
from trilemma.metrics import Estimate, distances, evaluate_samples, fit_extractor
from trilemma.metrics.catalogue import METRICS, describe
from trilemma.metrics.distances import _Bounds, nearest, pairs_within, squared_distances
from trilemma.metrics.evaluate import Evaluator, log_likelihood
from trilemma.metrics.frechet import Moments, SampleMoments, frechet, frechet_limit, spread
from trilemma.metrics.kernel import rbf_mmd
from trilemma.metrics.memorization import NeighbourTest, TrainingDistances, neighbour_test
from trilemma.metrics.metric import FEATURE_METRICS, Metric
from trilemma.metrics.neighbours import Balls, expected_clipped_coverage, neighbour_metrics
from trilemma.metrics.statistics import FeatureCache, FeatureStatistics
from trilemma.metrics.uncertain import Source, Uncertain, difference, harmonic_mean, linear, mean, pool, simulate, skill


def normal(*shape: int, key: object = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("test-metrics-core", str(key)), dtype=torch.float64)


def values(x: Tensor, y: Tensor) -> dict[str, float]:
    return {name: u.value for name, u in neighbour_metrics(x, y, interval=False).items()}


def z_of_mean(sample: list[float], expected: float) -> float:
    v = np.array(sample)
    return float((v.mean() - expected) / (v.std(ddof=1) / math.sqrt(len(v))))


# -- distances -----------------------------------------------------------------------------------------------------


def far(n: int, d: int, key: str) -> Tensor:
    return 1e4 + 1e-3 * normal(n, d, key=key)


def duplicates(n: int, d: int, key: str) -> Tensor:
    return normal(n, d, key="pool")[torch.randint(0, n // 4, (n,), generator=make_generator(key))]


def clusters(n: int, d: int, key: str) -> Tensor:
    return 10.0 * (torch.arange(n) % 4)[:, None] + 1e-5 * normal(n, d, key=key)


def outlier(n: int, d: int, key: str) -> Tensor:
    x = normal(n, d, key=key)
    x[n // 2] += 1e6
    return x


CLOUDS: list[Callable[[int, int, str], Tensor]] = [
    lambda n, d, key: normal(n, d, key=key),
    far,
    duplicates,
    clusters,
    outlier,
]
SHAPES = [(30, 50, 1), (90, 70, 3), (65, 64, 3), (70, 40, 200)]


def squared(x: Tensor, y: Tensor) -> np.ndarray:
    return cdist(x.double().numpy(), y.double().numpy(), "sqeuclidean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("cloud", CLOUDS, ids=["normal", "far", "duplicates", "clusters", "outlier"])
def test_nearest_is_exact(
    cloud: Callable[[int, int, str], Tensor],
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles of 32 rows: every case has several, and whole and partial ones."""
    monkeypatch.setattr(distances, "TILE", 32)
    x, y = cloud(n, d, "x").to(dtype), cloud(m, d, "y").to(dtype)
    for other in (y, None):
        among = squared(x, x if other is None else other)
        if other is None:
            np.fill_diagonal(among, np.inf)
        for k in (1, 7):
            d2, index = nearest(x, k, other)
            np.testing.assert_allclose(d2.numpy(), np.sort(among, 1)[:, :k], rtol=1e-12, atol=0)
            np.testing.assert_allclose(np.take_along_axis(among, index.numpy(), 1), d2.numpy(), rtol=1e-12, atol=0)
            assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("cloud", CLOUDS, ids=["normal", "far", "duplicates", "clusters", "outlier"])
def test_pairs_within_are_all_pairs_and_on_the_right_side(
    cloud: Callable[[int, int, str], Tensor],
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Radii are squared distances that occur: a pair on the sphere belongs to the ball."""
    monkeypatch.setattr(distances, "TILE", 32)
    y, x = cloud(n, d, "x").to(dtype), cloud(m, d, "y").to(dtype)
    exact = squared_distances(y, torch.arange(n).repeat_interleave(m), x, torch.arange(m).repeat(n)).view(n, m)
    np.testing.assert_allclose(exact.numpy(), squared(y, x), rtol=1e-12, atol=0)
    radii_y = torch.stack([exact.sort(1).values[:, 3], exact.sort(1).values[:, 8]])
    radii_y[0, ::3] = -torch.inf
    radii_x = exact.sort(0).values[2][None]
    found = torch.full_like(exact, torch.nan)
    for i, j, d2 in pairs_within(y, x, radii_y, radii_x):
        assert bool(found[i, j].isnan().all()), "a pair comes twice"
        found[i, j] = d2
    for inside, claimed in [(exact <= r[:, None], found <= r[:, None]) for r in radii_y] + [
        (exact <= r, found <= r) for r in radii_x
    ]:
        assert torch.equal(inside, claimed)


@pytest.mark.parametrize("d", [1, 3, 200, 3000])
@pytest.mark.parametrize("cloud", CLOUDS, ids=["normal", "far", "duplicates", "clusters", "outlier"])
def test_the_bounds_of_squared_distances_hold(cloud: Callable[[int, int, str], Tensor], d: int) -> None:
    x, y = cloud(60, d, "x"), cloud(50, d, "y")
    y[:10] = x[:10]
    for dtype in (torch.float32, torch.float64):
        a, b = x.to(dtype), y.to(dtype)
        bounds = _Bounds(a, b)
        low = bounds.tile(slice(0, 60), slice(0, 50)).double() * bounds.scale**2
        i, j = torch.arange(60).repeat_interleave(50), torch.arange(50).repeat(60)
        high = low + 2.0 * bounds.half_width(i, j).view(60, 50)
        d2 = torch.from_numpy(squared(a, b))
        assert bool((low <= d2).all())
        assert bool((d2 <= high).all())


# -- numbers with errors -------------------------------------------------------------------------------------------


def number(value: float, *names: str, n: int = 20) -> Uncertain:
    contrasts = {s: Source(0.1 * normal(19, key=f"{value} {s}"), 19.0) for s in names}
    return Uncertain(value, contrasts, {"generated": n}, "test")


def contrast(u: Uncertain, source: str) -> Tensor:
    return u.sources[source].contrasts


def test_mean_has_the_textbook_error() -> None:
    v = normal(30) + 2.0
    u = mean(v, "s")
    assert u.value == pytest.approx(float(v.mean()), rel=1e-15)
    assert u.se == pytest.approx(float(v.std()) / math.sqrt(30), rel=1e-12)
    assert u.df == pytest.approx(29.0, rel=1e-12)
    one = mean(v[:1], "s")
    assert one.interval() is None
    assert one.estimate().se is None


def test_degrees_of_freedom_are_satterthwaites() -> None:
    u = Uncertain(0.0, {"a": Source(2.0 * normal(7, key="a"), 6.0), "b": Source(normal(19, key="b"), math.inf)})
    a, b = (float(contrast(u, s).square().mean()) for s in "ab")
    assert u.variance == pytest.approx(a + b, rel=1e-12)
    assert u.df == pytest.approx((a + b) ** 2 / (a**2 / 6.0), rel=1e-12)
    normal_errors = Uncertain(1.0, {"b": u.sources["b"]})
    assert normal_errors.df == math.inf
    assert normal_errors.interval() == pytest.approx((1.0 - 1.959963985 * b**0.5, 1.0 + 1.959963985 * b**0.5), rel=1e-9)


def test_what_is_shared_cancels() -> None:
    a, b = number(2.0, "A", "reference"), number(1.0, "B", "reference")
    assert difference(a, a).variance == 0.0
    d = difference(a, b)
    assert d.value == 1.0
    torch.testing.assert_close(
        contrast(d, "reference"), contrast(a, "reference") - contrast(b, "reference"), rtol=0, atol=0
    )
    expected = sum(float(contrast(d, s).square().mean()) for s in ("A", "B", "reference"))
    assert d.variance == pytest.approx(expected, rel=1e-12)
    twice = linear(0.0, [(2.0, a), (-3.0, a)], "")
    assert twice.variance == pytest.approx(a.variance, rel=1e-12)
    assert not difference(a, Uncertain(1.0)).sources
    with pytest.raises(AssertionError, match="different ways"):
        difference(a, Uncertain(0.0, {"reference": Source(torch.ones(5).double(), 4.0)}))


@pytest.mark.parametrize("formula", ["skill", "harmonic_mean"])
def test_the_delta_method_has_the_numerical_slopes(formula: str) -> None:
    terms = [number(0.7, "A", "reference"), number(0.2, "B", "reference"), number(1.1, "C", "reference")]
    f = skill if formula == "skill" else harmonic_mean
    terms = terms[: 3 if formula == "skill" else 2]

    def value(v: np.ndarray) -> float:
        return f(*(replace(u, value=float(c)) for u, c in zip(terms, v, strict=True))).value

    slopes = approx_fprime(np.array([u.value for u in terms]), value, 1e-7)
    found = f(*terms)
    together = sum(s * contrast(u, "reference") for s, u in zip(slopes, terms, strict=True))
    torch.testing.assert_close(contrast(found, "reference"), together, rtol=0, atol=1e-6)
    for s, u, name in zip(slopes, terms, "ABC", strict=False):
        torch.testing.assert_close(contrast(found, name), s * contrast(u, name), rtol=0, atol=1e-6)


def test_skill_is_exact_at_its_ends() -> None:
    floor, ceiling = number(7.3, "floor", "reference"), number(0.9, "ceiling", "reference")
    for u, expected in ((floor, 0.0), (ceiling, 1.0)):
        s = skill(u, floor, ceiling)
        assert (s.value, s.variance) == (expected, 0.0)
        assert s.interval() is None
    assert skill(number(10.0, "A", "reference"), floor, ceiling).value < 0.0  # not clipped
    same = skill(ceiling, floor, floor)
    assert math.isnan(same.value)
    assert not same.sources


def test_harmonic_mean_of_closed_forms() -> None:
    assert harmonic_mean(number(1.0, "A"), number(1.0, "B")).value == 1.0
    assert harmonic_mean(number(1.0, "A"), number(0.0, "B")).value == 0.0
    assert harmonic_mean(number(0.0, "A"), number(0.0, "B")).value == 0.0
    assert harmonic_mean(number(0.5, "A"), number(1.0, "B")).value == pytest.approx(2.0 / 3.0, rel=1e-15)


def test_one_run_is_itself_and_several_add_their_spread() -> None:
    runs = [number(v, "generated", "reference") for v in (1.0, 2.0, 4.0)]
    one = pool(runs[:1], "nsf")
    assert one.sources.keys() == {"nsf", "reference"}
    assert (one.value, one.variance) == (1.0, runs[0].variance)
    torch.testing.assert_close(contrast(one, "nsf"), contrast(runs[0], "generated"), rtol=0, atol=0)
    three = pool(runs, "nsf")
    assert three.value == pytest.approx(7.0 / 3.0, rel=1e-15)
    assert three.sources["nsf"].variance == pytest.approx(np.var([1.0, 2.0, 4.0], ddof=1) / 3.0, rel=1e-12)
    assert three.sources["nsf"].df == 2
    average = torch.stack([contrast(u, "reference") for u in runs]).mean(0)
    torch.testing.assert_close(contrast(three, "reference"), average, rtol=1e-12, atol=0)
    only_own = pool([number(v, "generated") for v in (1.0, 2.0)], "nsf")
    assert only_own.sources.keys() == {"nsf"}


def test_errors_of_log_z_of_two_models_do_not_cancel() -> None:
    """Each has its own estimate of log Z, of the same standard error: the difference has both."""
    log_z = {"model": Source(torch.tensor([0.3], dtype=torch.float64), math.inf)}
    runs = [Uncertain(v, number(0.0, "reference").sources | log_z) for v in (1.0, 2.0)]
    d = difference(pool(runs[:1], "rbm"), pool(runs[1:], "dbm"))
    assert d.variance == pytest.approx(2 * 0.3**2, rel=1e-12)
    assert pool(runs, "rbm").sources.keys() == {"rbm", "reference"}  # the spread over seeds holds that of log Z


def test_simulate_reproduces_the_covariance() -> None:
    """20000 draws; a covariance c_ij has the error sqrt((c_ii c_jj + c_ij^2) / 20000). 5 sigma: fails once in 10^6."""
    numbers = [number(1.0, "A", "reference"), number(2.0, "B", "reference"), number(3.0, "A"), Uncertain(4.0)]
    draws = simulate(numbers, 20000, "test")
    expected = torch.zeros(4, 4).double()
    for i, u in enumerate(numbers):
        for j, v in enumerate(numbers):
            for s in u.sources.keys() & v.sources.keys():
                expected[i, j] += (contrast(u, s) * contrast(v, s)).mean()
    variance = expected.diagonal()
    error = ((variance[:, None] * variance + expected.square()) / 20000).sqrt()
    assert bool(((draws.T.cov() - expected).abs() <= 5.0 * error).all())
    centre = torch.tensor([u.value for u in numbers]).double()
    assert bool(((draws.mean(0) - centre).abs() <= 5.0 * (variance / 20000).sqrt()).all())
    assert torch.equal(draws, simulate(numbers, 20000, "test"))
    assert not torch.equal(draws, simulate(numbers, 20000, "other"))


def test_paired_differences_cover_and_are_narrower() -> None:
    """Two models on one reference, 200 times: 90% .. 99% hold the mean (a true 95% leaves once in 150 seeds)."""
    covered: dict[str, list[tuple[float, float, float]]] = {"frechet": [], "clipped_coverage": []}
    widths: dict[str, list[float]] = {"frechet": [], "clipped_coverage": []}
    for s in range(200):
        y = normal(60, 2, key=f"pair y{s}")
        a, b = 0.8 * normal(60, 2, key=f"pair a{s}") + 0.8, 0.7 * normal(60, 2, key=f"pair b{s}") + 0.9
        ref, balls = SampleMoments(y), Balls.of(y, (3, 5), True, "reference")
        for name, (of_a, of_b) in {
            "frechet": (frechet(SampleMoments(a), ref), frechet(SampleMoments(b), ref)),
            "clipped_coverage": tuple(neighbour_metrics(t, balls)["clipped_coverage"] for t in (a, b)),
        }.items():
            of_a, of_b = of_a.renamed({"generated": "A"}), of_b.renamed({"generated": "B"})
            d, apart = difference(of_a, of_b), difference(of_a, of_b.renamed({"reference": "another"}))
            interval = d.interval()
            assert interval is not None
            covered[name].append((d.value, *interval))
            widths[name].append(d.se / apart.se)
    for name, found in covered.items():
        expectation = np.mean([v for v, _, _ in found])
        assert 0.90 <= np.mean([low <= expectation <= high for _, low, high in found]) <= 0.99, name
        assert np.median(widths[name]) < 0.95, name


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_merge_in_any_order_and_come_apart(offset: float) -> None:
    x = normal(101, 4) @ normal(4, 4, key="mix") + offset
    whole = Moments.of(x)
    torch.testing.assert_close(whole.covariance, (x - offset).T.cov(), rtol=1e-7 if offset else 1e-12, atol=1e-9)
    parts = [Moments.of(p) for p in (x[:1], x[1:30], x[30:64], x[64:])]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged = parts[order[0]]
        for i in order[1:]:
            merged = merged.merge(parts[i])
        assert merged.n == 101
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        # a mean about 1e6 is rounded by 1e-10, and its error times the number is what the scatter sees
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-7 if offset else 1e-11)
    rest = whole.without(parts[1])
    direct = Moments.of(torch.cat([x[:1], x[30:]]))
    torch.testing.assert_close(rest.mean, direct.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rest.scatter, direct.scatter, rtol=1e-11, atol=1e-7 if offset else 1e-11)
    with pytest.raises(DataError, match="at least 2"):
        _ = parts[0].covariance


def test_statistics_do_not_depend_on_order_or_batches() -> None:
    x, y = normal(83, 3), FeatureStatistics(normal(83, 3, key="y"), "e")
    x[:6, 1] = torch.tensor([0.0, -0.0] * 3)
    x[:6, 0], x[:6, 2] = 0.5, 1.5  # equal examples whose bytes differ
    whole = FeatureStatistics(x, "e")
    halves = FeatureStatistics(x[:40], "e").merge(FeatureStatistics(x[40:], "e"))
    shuffled = FeatureStatistics(x[torch.randperm(83, generator=make_generator("order"))], "e")
    reverse = FeatureStatistics(x.flip(0), "e")
    for other in (halves, shuffled, reverse):
        assert other.id == whole.id
        for ours, theirs in (
            (frechet(whole.moments, y.moments), frechet(other.moments, y.moments)),
            (rbf_mmd(y.features, whole.gaussian), rbf_mmd(y.features, other.gaussian)),
            *zip(
                neighbour_metrics(whole.balls, y.balls).values(),
                neighbour_metrics(other.balls, y.balls).values(),
                strict=True,
            ),
        ):
            assert ours.value == theirs.value
            assert ours.se == theirs.se
    moved = x.clone()
    moved[3, 2] += 1e-12
    assert len({whole.id, FeatureStatistics(x, "f").id, FeatureStatistics(moved, "e").id, y.id}) == 4
    with pytest.raises(DataError, match="cannot be merged"):
        whole.merge(FeatureStatistics(x, "f"))
    with pytest.raises(DataError, match="NaN"):
        FeatureStatistics(x.log())
    with pytest.raises(DataError, match=r"\(N, d\)"):
        FeatureStatistics(x[0])


# -- the limit of the Frechet distance, and the spread ---------------------------------------------------------------


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.3)])
def test_the_limit_of_the_frechet_distance_is_nearly_unbiased(scale: float, shift: float) -> None:
    """d = 8, N = 200, 60 pairs. What is left is of order 1/N^2: under a tenth of the plain bias, plus 3 sigma."""
    d, truth = 8, 8 * ((scale - 1.0) ** 2 + shift**2)
    plain, limit = [], []
    for s in range(60):
        x = SampleMoments(scale * normal(200, d, key=f"limit x{s}") + shift)
        y = SampleMoments(normal(200, d, key=f"limit y{s}"))
        at_n = frechet(x, y)
        plain.append(at_n.value)
        limit.append(frechet_limit(x, y, at_n).value)
    bias, error = np.mean(plain) - truth, np.std(limit, ddof=1) / math.sqrt(60)
    assert bias > 3.0 * error  # there is something to correct
    assert abs(np.mean(limit) - truth) < 0.1 * bias + 3.0 * error
    assert abs(np.mean(limit) - truth) < bias


def test_between_equal_distributions_the_error_is_too_large_by_root_two() -> None:
    """d^2 has no linear term there: 150 pairs; the ratio's own error is about 0.1."""
    found = [
        frechet(SampleMoments(normal(60, 3, key=f"eqf x{s}")), SampleMoments(normal(60, 3, key=f"eqf y{s}")))
        for s in range(150)
    ]
    expected = math.sqrt(float(np.mean([u.variance for u in found])))
    assert 1.1 < expected / np.std([u.value for u in found], ddof=1) < 1.75


def test_the_limit_keeps_the_error_and_refuses_tiny_samples() -> None:
    x, y = SampleMoments(normal(100, 2, key="x")), SampleMoments(normal(100, 2, key="y"))
    at_n = frechet(x, y)
    assert frechet_limit(x, y, at_n).variance == at_n.variance
    few = SampleMoments(normal(39, 2))
    with pytest.raises(DataError, match="fewer than 40 examples"):
        frechet_limit(few, y, frechet(few, y))


def test_spread_of_shrunk_samples() -> None:
    """tr (C / 4) / tr C; the intervals over 100 pairs cover 1/4 in at least 88 (a true 95% fails once in 250)."""
    y = normal(80, 5, key="spread")
    assert spread(SampleMoments(0.5 * y + 7.0), SampleMoments(y)).value == pytest.approx(0.25, rel=1e-12)
    covered = 0
    for s in range(100):
        x, y = 0.5 * normal(100, 3, key=f"spread x{s}"), normal(100, 3, key=f"spread y{s}")
        low, high = spread(SampleMoments(x), SampleMoments(y)).interval() or (math.nan, math.nan)
        covered += low <= 0.25 <= high
    assert covered >= 88


# -- clipped density and coverage ------------------------------------------------------------------------------------

N = 400


def junk(x: Tensor, share: float) -> Tensor:
    """The first part of the samples is put far away from everything and from each other."""
    bad = round(share * len(x))
    far_away = 1e3 * (1.0 + torch.arange(bad, dtype=torch.float64))[:, None].expand(bad, x.shape[1])
    return torch.cat([far_away, x[bad:]])


@pytest.mark.parametrize("d", [2, 16])
def test_equal_distributions_score_one(d: int) -> None:
    """Mean over 30 pairs within 4 sigma of 1 (once in 16000), with 0.01 for a ratio's bias of order 1/N."""
    found = [values(normal(N, d, key=f"eq x{d} {s}"), normal(N, d, key=f"eq y{d} {s}")) for s in range(30)]
    for name in ("clipped_density", "clipped_coverage"):
        sample = np.array([f[name] for f in found])
        assert abs(sample.mean() - 1.0) < 4.0 * sample.std(ddof=1) / math.sqrt(30) + 0.01, name


@pytest.mark.parametrize("d", [2, 16])
def test_both_scores_fall_with_the_share_of_junk(d: int) -> None:
    """15 pairs: clipped coverage is 1 - s within 4.5 sigma; clipped density 1 - s times its value without junk."""
    for share in (0.2, 0.5, 0.8):
        coverage, ratio = [], []
        for s in range(15):
            x, y = normal(N, d, key=f"junk x{s}"), normal(N, d, key=f"junk y{s}")
            clean, found = values(x, y), values(junk(x, share), y)
            coverage.append(found["clipped_coverage"])
            ratio.append(found["clipped_density"] / clean["clipped_density"])
        assert abs(z_of_mean(coverage, 1.0 - share)) < 4.5, share
        assert abs(z_of_mean(ratio, 1.0 - share)) < 4.5, share
        assert np.mean(coverage) == pytest.approx(1.0 - share, abs=0.03)
        assert np.mean(ratio) == pytest.approx(1.0 - share, abs=0.02)


@pytest.mark.parametrize("kept", [2, 5, 8])
def test_dropped_modes_lower_clipped_coverage_and_not_clipped_density(kept: int) -> None:
    """10 modes far apart: C is kept / 10 of that of an M / kept times denser sample, and the calibration follows."""
    centres = 100.0 * torch.arange(10, dtype=torch.float64)[:, None]
    y = normal(N, 2, key="modes y") + centres[torch.arange(N) % 10]
    x = normal(N, 2, key="modes x") + centres[torch.arange(N) % kept]
    whole = normal(N, 2, key="modes w") + centres[torch.arange(N) % 10]
    found, full = values(x, y), values(whole, y)
    assert found["clipped_density"] > full["clipped_density"] - 0.08
    assert found["coverage"] == pytest.approx(kept / 10, abs=0.05)
    # balls of a kept mode hold Binomial-like counts of 10 / kept as many samples; the other balls hold none
    filled = kept / 10 * float(expected_clipped_coverage(5, N, N * 10 // kept)[-1])
    f = expected_clipped_coverage(5, N, N).numpy()
    assert found["clipped_coverage"] == pytest.approx(np.interp(filled, f, np.arange(N + 1)) / N, abs=0.04)
    assert found["clipped_coverage"] < kept / 10 + 0.05


def test_an_outlier_with_a_huge_ball_does_not_rescue_junk() -> None:
    y = normal(N, 2, key="ball y")
    y[0] = 1000.0
    scattered = 900.0 + 30.0 * normal(N, 2, key="ball x")
    found = values(scattered, y)
    assert found["precision"] == 1.0  # all lie in the one ball of radius 1400
    assert found["density"] == pytest.approx(1.0 / 5.0, rel=1e-12)
    assert found["clipped_density"] == 0.0
    assert found["clipped_coverage"] < 0.01


def test_samples_in_the_middle_count_once_each() -> None:
    """In 16 dimensions the mean lies in many balls: density is fooled; a clipped score is at most 1 / D(y)."""
    y = normal(N, 16, key="spot y")
    found = values(1e-3 * normal(N, 16, key="spot x"), y)
    own = float(Balls.of(y, (3, 5), False, "reference").self_score(5))
    assert found["density"] > 10.0
    assert found["clipped_density"] == pytest.approx(1.0 / own, rel=1e-12)
    assert found["clipped_coverage"] < 0.5


@pytest.mark.parametrize(("k", "n", "m"), [(1, 2, 5), (3, 4, 30), (5, 50, 80), (5, 1000, 1000)])
def test_the_expectation_of_clipped_coverage_is_scipys(k: int, n: int, m: int) -> None:
    f = expected_clipped_coverage(k, n, m).numpy()
    assert f.shape == (m + 1,)
    assert f[0] == 0.0
    assert (np.diff(f) > 0.0).all()
    for q in {1, k, m // 2, m}:
        j = np.arange(q + 1)
        expected = (np.minimum(j, k) / k * betabinom(q, k, n - k).pmf(j)).sum()
        assert f[q] == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("d", [1, 3])
def test_the_expectation_of_clipped_coverage_does_not_depend_on_the_distribution(d: int) -> None:
    """400 pairs of exponential samples, n = 30, m = 20: within 4.5 sigma of f(20) (once in 10^5)."""
    found = []
    for s in range(400):
        y, x = (normal(c, d, key=f"f{c} {s}").exp().numpy() for c in (30, 20))
        radius = np.sort(cdist(y, y), 1)[:, 5]
        found.append(float(np.minimum((cdist(y, x) <= radius[:, None]).sum(1) / 5, 1.0).mean()))
    assert abs(z_of_mean(found, float(expected_clipped_coverage(5, 30, 20)[20]))) < 4.5


# -- memorization ----------------------------------------------------------------------------------------------------


def p_values(generator: Callable[[int, Tensor], Tensor], runs: int, n: int = 60) -> np.ndarray:
    """Of generators that are given the training data, against n + n fresh Gaussian examples in 3 dimensions."""
    found = []
    for s in range(runs):
        train, test = normal(n, 3, key=f"train{n} {s}"), normal(n, 3, key=f"test{n} {s}")
        found.append(neighbour_test(generator(s, train), train, test, seed=s).p_value)
    return np.array(found)


HONEST: dict[str, Callable[[int, Tensor], Tensor]] = {
    "the truth": lambda s, train: normal(60, 3, key=f"honest {s}"),
    "underfitted": lambda s, train: 3.0 * normal(60, 3, key=f"honest {s}"),
    "collapsed": lambda s, train: normal(1, 3, key=f"point {s}") + 1e-3 * normal(60, 3, key=f"honest {s}"),
    "one point": lambda s, train: normal(1, 3, key=f"point {s}").expand(60, 3),
}


@pytest.mark.parametrize("kind", HONEST)
def test_the_neighbour_test_raises_no_false_alarm(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """p <= a at most in a share a: of 200 pools, no more than the binomial 99.9% quantile, at a = 0.05 and 0.5 + ties.

    Collapsed models have few labels to look at, so their p-values are few numbers near 1/2 and the test is quieter.
    """
    monkeypatch.setattr("trilemma.metrics.memorization.PERMUTATIONS", 400)
    p = p_values(HONEST[kind], 200)
    assert (p <= 0.05).sum() <= binom(200, 0.05).ppf(0.999)
    assert (p <= 0.01).sum() <= binom(200, 0.01).ppf(0.999)
    assert (p <= 0.25).sum() <= binom(200, 0.25).ppf(0.999)
    if kind in ("the truth", "underfitted"):  # and it is not merely silent
        assert (p <= 0.05).sum() >= binom(200, 0.05).ppf(0.001)
        assert abs(p.mean() - 0.5) < 4.0 / math.sqrt(12 * 200) + 0.03


@pytest.mark.parametrize("seed", range(6))
def test_the_p_value_is_that_of_all_relabellings(seed: int) -> None:
    """4 + 4 examples have 70 labellings: the 4000 drawn ones agree within 5 sigma (once in 10^6)."""
    train, test, x = normal(4, 2, key=f"r{seed}"), normal(4, 2, key=f"s{seed}"), 2.0 * normal(40, 2, key=f"x{seed}")
    x = torch.cat([x, train[:seed]])
    among = cdist(x.numpy(), torch.cat([train, test]).numpy())
    neighbour, order = among.argmin(1), among.min(1).argsort()

    def largest(labels: tuple[int, ...]) -> float:
        scores = []
        for share in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
            closest = neighbour[order[: math.ceil(share * len(x))]]
            a, c = sum(p in labels for p in closest), np.bincount(closest)
            scores.append((a - len(closest) / 2) / math.sqrt((c**2).sum() / 4))
        return max(scores)

    observed = largest((0, 1, 2, 3))
    expected = np.mean([largest(labels) >= observed - 1e-9 for labels in combinations(range(8), 4)])
    found = neighbour_test(x, train, test, seed=seed)
    assert found.share == pytest.approx((neighbour < 4).mean(), rel=1e-12)
    assert found.p_value == pytest.approx(expected, abs=5.0 * math.sqrt(expected * (1.0 - expected) / 4000) + 1e-3)


def test_the_neighbour_test_finds_a_tenth_of_copies() -> None:
    """40 copies among 400 samples have z = sqrt(40) = 6.3 among the closest tenth."""

    def copier(s: int, train: Tensor) -> Tensor:
        return torch.cat([normal(360, 3, key=f"fresh {s}"), train[:40]])

    assert (p_values(copier, 20, n=400) < 0.01).sum() >= 18


def test_one_repeated_training_example_is_not_evidence() -> None:
    """All samples share one neighbour, a training example: with labels exchangeable that has probability 1/2."""
    train, test = normal(100, 3, key="train"), normal(100, 3, key="test")
    found = neighbour_test(train[:1].expand(80, 3), train, test)
    assert found.share == 1.0
    assert found.p_value == pytest.approx(0.5, abs=5.0 * 0.5 / math.sqrt(4000))
    assert "No sign of copying" in found.caveat()
    three = neighbour_test(train[:30].repeat(3, 1), train, test)
    assert three.p_value < 0.01
    assert three.caveat() == "Nearest to training data more often than chance allows."


def test_what_could_be_found_follows_from_all_training_examples() -> None:
    """c visible copies are all nearest to training examples by chance with probability p^c: p^c = level / 3."""
    train, test = normal(500, 3, key="train"), normal(100, 3, key="test")
    found = neighbour_test(normal(200, 3, key="x"), train, test)
    assert (found.n, found.pooled, found.held_out, found.trained) == (200, 500, 100, 500)
    assert found.expected == 500 / 600
    assert found.expected ** (found.detectable(0.01) * 200) == pytest.approx(0.01 / 3.0, rel=1e-9)
    part = neighbour_test(normal(200, 3, key="x"), train, test, trained=1500)
    assert part.detectable(0.001) == pytest.approx(3.0 * found.detectable(0.001), rel=1e-12)
    assert f"below about {part.detectable(0.01):.0%}" in part.caveat(0.01)
    few = NeighbourTest(0.5, 0.5, 1.0, 0.5, 0.5, n=10, pooled=10, held_out=10, trained=10**6)
    assert few.detectable() == 1.0
    assert "nothing can be said" in few.caveat()


def test_what_is_called_detectable_is_found_about_half_of_the_time() -> None:
    """At least 8 of 30 seeds, where 1 in 100 would be chance; also where most of the pool was trained on."""
    for n_test in (200, 60):
        found = 0
        for s in range(30):
            train, test = normal(200, 3, key=f"d train{s}"), normal(n_test, 3, key=f"d test{s}")
            copies = round(200 * neighbour_test(train[:9].repeat(23, 1)[:200], train, test, seed=s).detectable())
            x = torch.cat([normal(200 - copies, 3, key=f"d x{s}"), train[:copies]])
            found += neighbour_test(x, train, test, seed=s).p_value < 0.01
        assert found >= 8


def test_features_whitened_on_the_training_split_raise_no_false_alarm() -> None:
    """In 100 dimensions whitened on 400 examples fresh draws lie beside these; in the pool's own they do not."""
    alarms = {False: 0, True: 0}
    for s in range(8):
        spec = DataSpec(kind="points", shape=(100,))
        x = normal(850, 100, key=f"w{s}").float()
        extractor = fit_extractor(TensorSplit(x[:400]), spec, seed=0)
        train, test, fresh = (extractor(part) for part in (x[:400], x[400:550], x[550:]))
        for whiten in alarms:
            alarms[whiten] += neighbour_test(fresh, train, test, whiten=whiten, seed=s).p_value < 0.01
        copies = torch.cat([fresh[:240], train[:60]])
        assert neighbour_test(copies, train, test, whiten=True, seed=s).p_value < 0.01
    assert alarms[True] == 0
    assert alarms[False] >= 2


def test_runs_without_errors_are_pooled_to_a_mean_without_one() -> None:
    """The spread over seeds alone would leave the error of the held-out data out."""
    assert not pool([Uncertain(v) for v in (1.0, 2.0, 4.0)], "vae").sources


def test_training_distances_of_copies_and_of_fresh_examples() -> None:
    """Fresh draws and held-out examples differ by chance only: within 4 sigma of each other, and ratios near 1."""
    train, test = normal(400, 3, key="train"), normal(400, 3, key="test")
    yardstick = TrainingDistances(train, test)
    copies = yardstick.measure(train[:100])
    assert copies["authenticity"].value == 0.0
    assert copies["training_distance"].value == 0.0
    share = describe("authenticity", copies["authenticity"])
    assert share.ci is not None
    assert share.ci[1] == pytest.approx(1.0 - 0.025**0.01, rel=1e-12)
    of_test, fresh = yardstick.measure(test), yardstick.measure(normal(400, 3, key="fresh"))
    assert of_test["training_distance"].value == pytest.approx(1.0, rel=1e-12)
    a, b = of_test["authenticity"], fresh["authenticity"]
    assert abs(a.value - b.value) < 4.0 * math.hypot(a.se, b.se)
    interval = fresh["training_distance"].interval()
    assert interval is not None
    assert interval[0] < 1.0 < interval[1]
    assert 0.02 < fresh["training_distance"].se < 0.15
    assert yardstick.measure(2.0 * normal(400, 3, key="broad"))["training_distance"].value > 1.2


# -- the evaluator ---------------------------------------------------------------------------------------------------


def test_the_evaluator_measures_against_the_held_out_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real examples score like real data; the number of all training examples is what the caveat is made of."""
    monkeypatch.setattr("trilemma.metrics.evaluate.MAX_TRAIN", 100)
    spec = DataSpec(kind="points", shape=(3,))
    data = from_tensors(normal(900, 3, key="data"), spec, name="normal")
    extractor = fit_extractor(data.train, spec, seed=0)
    n = len(data.test)
    yardsticks = Evaluator(data, extractor, None, n)
    x = data.train.head(n).x
    measured = yardsticks.measure(x)
    assert measured.copying.trained == len(data.train) > 100
    assert len(yardsticks.train) == 100
    assert list(measured.metrics) == [name for name in METRICS if name in measured.metrics]
    assert measured.metrics["training_distance"].value < 0.9  # many of them are training examples
    core = yardsticks.measure_core(x.flip(0))
    again = evaluate_samples(x, data.test.head(n).x, extractor)
    for name, u in core.items():
        assert (u.value, u.se) == (measured.metrics[name].value, measured.metrics[name].se)
        assert describe(name, u, extractor=extractor.id) == again[name]
    described = yardsticks.describe(measured.metrics)
    assert {(e.extractor, e.split) for e in described.values()} == {(extractor.id, "test")}
    both = measured.metrics["clipped_density"].value, measured.metrics["clipped_coverage"].value
    assert core["overall"].value == pytest.approx(2.0 * both[0] * both[1] / sum(both), rel=1e-12)
    with pytest.raises(UsageError, match="take equal numbers"):
        yardsticks.measure(x[:-1])
    with pytest.raises(UsageError, match="held-out examples are asked for"):
        Evaluator(data, extractor, None, n + 1)


def test_an_estimated_log_z_adds_to_the_error() -> None:
    spec = DataSpec(kind="points", shape=(2,))
    score = Score(normal(50, key="nats"), "estimate", shared=0.6)
    number, kind = log_likelihood(score, spec)
    assert kind["unit"] == "nats/dim"
    assert number.variance == pytest.approx(float(score.value.var()) / 4 / 50 + 0.3**2, rel=1e-6)
    other = replace(number, value=number.value + 1.0)
    d = difference(pool([number], "a"), pool([other], "b"))  # the same held-out examples, two estimates of log Z
    assert d.variance == pytest.approx(2 * 0.3**2, rel=1e-6)


# -- the catalogue and the guard of the report -----------------------------------------------------------------------


def test_directions_come_from_the_catalogue() -> None:
    for name, info in METRICS.items():
        assert describe(name, Uncertain(0.5)).higher_is_better == (info.better == "higher")


def row(model: str, **changes: object) -> Row:
    e = Estimate(
        value=1.0, se=0.1, ci=(0.8, 1.2), n={"generated": 100, "reference": 100}, unit="squared distance",
        higher_is_better=False, extractor="classifier-1", split="test", method="m",
    )  # fmt: skip
    return Row(model=model, family="flow", status="ok", seeds=[0], metrics={"frechet": e.model_copy(update=changes)})


@pytest.mark.parametrize(
    "changes",
    [
        {"extractor": "pca-2"},
        {"extractor": None},
        {"n": {"generated": 100, "reference": 99}},
        {"n": 100},
        {"unit": "distance"},
        {"split": "train"},
    ],
)
def test_a_column_holds_like_with_like(changes: dict[str, object]) -> None:
    rest = {"data": {}, "settings": {}, "extractor": {}, "environment": {}}
    Report(rows=[row("a"), row("b")], **rest)
    with pytest.raises(ValueError, match="the column frechet mixes"):
        Report(rows=[row("a"), row("b", **changes)], **rest)


# -- metrics of batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FEATURE_METRICS))
def test_a_metric_of_batches_and_processes_is_that_of_the_whole(name: str) -> None:
    g = make_generator("metric of batches")
    x, y = torch.randn(90, 3, generator=g).double() * 1.2, torch.randn(80, 3, generator=g).double()
    reference = FeatureStatistics(y, "e")
    whole = Metric(name, reference)
    whole.update(x)
    parts = [Metric(name, FeatureStatistics(y.flip(0), "e")) for _ in range(2)]
    parts[0].update(x[60:])
    parts[0].update(x[20:60])
    parts[1].update(x[:20])
    parts[0].merge(parts[1])
    ours, theirs = whole.compute(), parts[0].compute()
    assert ours == theirs
    assert ours.extractor == "e"
    with pytest.raises(DataError, match="cannot be merged"):
        whole.merge(Metric(name, FeatureStatistics(x, "e")))


def test_a_metric_needs_features_and_a_name() -> None:
    reference = FeatureStatistics(torch.randn(40, 2, generator=make_generator("reference")), None)
    with pytest.raises(DataError, match="call update first"):
        Metric("frechet", reference).compute()
    with pytest.raises(UsageError, match="unknown metric 'frechett'"):
        Metric("frechett", reference)


def test_features_of_a_large_network_are_kept_by_content(tmp_path: Path) -> None:
    class Slow:
        id, is_pretrained, calls = "net", True, 0

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x.double().flatten(1) * 2.0

    slow = Slow()
    cache = FeatureCache(slow, tmp_path / "features")  # type: ignore[arg-type]
    x = torch.randint(0, 256, (5, 3), generator=make_generator("cache")).to(torch.uint8)
    assert torch.equal(cache(x), cache(x.clone()))
    assert slow.calls == 1
    cache(x + 1)
    slow.id = "other"
    cache(x)
    assert slow.calls == 3
    slow.is_pretrained = False
    small = FeatureCache(slow, tmp_path / "none")  # type: ignore[arg-type]
    small(x)
    assert not (tmp_path / "none").exists()
