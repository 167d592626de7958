"""Kernel, transport, classifier, label, table and path metrics against closed forms, brute force and simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import norm, wasserstein_distance
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.noise import make_generator
from trilemma.core.spec import Column, DataSpec
from trilemma.metrics import kernel as kernels
from trilemma.metrics.jackknife import delete_one, jackknife, shuffle_into_blocks, without
from trilemma.metrics.kernel import KernelSums, gaussian, kernel_distance, median_distance, rbf_mmd, squared_mmd
from trilemma.metrics.labels import Labeller, class_histogram_kl, inception_score, modes_hit
from trilemma.metrics.path_length import interpolate, perceptual_path_length
from trilemma.metrics.tables import (
    _scores,
    column_complements,
    correlation_difference,
    mean_complement,
    train_on_synthetic,
)
from trilemma.metrics.two_sample import ROWS, classifier_auc, delong_components, mean_auc
from trilemma.metrics.uncertain import Uncertain
from trilemma.metrics.wasserstein import sliced_wasserstein, sphere, wasserstein_1d

Statistic = Callable[[Tensor, Tensor], Uncertain]


def normal(*shape: int, key: object = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("test-metrics-more", str(key)), dtype=torch.float64)


def assert_same(a: Uncertain, b: Uncertain, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    assert a.value == pytest.approx(b.value, rel=rtol, abs=atol)
    assert a.sources.keys() == b.sources.keys()
    for name, source in a.sources.items():
        torch.testing.assert_close(source.contrasts, b.sources[name].contrasts, rtol=rtol, atol=atol)


def simulate(statistic: Callable[[int], Uncertain], truth: float | None = None, sims: int = 200) -> list[Uncertain]:
    """Statistics of 200 data sets, after a check that 90% to 99% of their intervals hold the truth (or their mean).

    False alarms for a true coverage of 95%: one in 700.
    """
    found = [statistic(s) for s in range(sims)]
    centre = sum(u.value for u in found) / sims if truth is None else truth
    hits = 0
    for u in found:
        interval = u.interval()
        assert interval is not None
        hits += interval[0] <= centre <= interval[1]
    assert 0.90 * sims <= hits <= 0.99 * sims, hits
    return found


def table(**kinds: str) -> DataSpec:
    """A spec of columns by name; a number in place of a kind is a number of categories."""
    columns = tuple(
        Column(name=name, kind="categorical", dtype="int64", categories=tuple(range(int(kind))))
        if kind.isdigit()
        else Column(name=name, kind=kind, dtype="float64")
        for name, kind in kinds.items()
    )
    return DataSpec(kind="table", shape=(len(columns),), columns=columns)


# -- kernels -----------------------------------------------------------------------------------------------------


def brute_mmd(k: kernels.Kernel) -> Callable[[Tensor, Tensor], Tensor]:
    def statistic(x: Tensor, y: Tensor) -> Tensor:
        def own(a: Tensor) -> Tensor:
            return (k(a, a).sum() - k(a, a).diagonal().sum()) / (len(a) * (len(a) - 1))

        return own(x) + own(y) - 2.0 * k(x, y).mean()

    return statistic


@pytest.mark.parametrize(("m", "n"), [(47, 61), (7, 3)])
@pytest.mark.parametrize("tile", [512, 10])
def test_mmd_equals_brute_force_with_and_without_each_block(
    m: int, n: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TILE", tile)
    x, y = normal(m, 5, key="x") + 0.5, normal(n, 5, key="y")

    def cubic(a: Tensor, b: Tensor) -> Tensor:
        return ((a[:, None] * b).sum(2) / 5 + 1.0) ** 3

    def rbf(a: Tensor, b: Tensor) -> Tensor:
        distances = torch.pdist(y)
        return torch.exp(-(a[:, None] - b).square().sum(2) / (2.0 * distances.median() ** 2))

    assert_same(kernel_distance(x, y), jackknife(brute_mmd(cubic), x, y))
    assert_same(rbf_mmd(x, y), jackknife(brute_mmd(rbf), x, y))


def test_mmd_of_gaussians_has_its_closed_form_and_coverage() -> None:
    """E k(x, y) = (h^2 / (h^2 + v))^(d/2) exp(-|mu|^2 / (2 (h^2 + v))) where x - y ~ N(mu, v I)."""
    d, h, s, shift = 3, 1.5, 1.4, 0.8

    def expected(v: float, mu: float) -> float:
        return float((h**2 / (h**2 + v)) ** (d / 2) * math.exp(-(mu**2) / (2.0 * (h**2 + v))))

    truth = expected(2.0 * s**2, 0.0) + expected(2.0, 0.0) - 2.0 * expected(s**2 + 1.0, shift)

    def once(sim: int) -> Uncertain:
        x = s * normal(60, d, key=("x", sim))
        x[:, 0] += shift
        return squared_mmd(x, KernelSums.of(normal(80, d, key=("y", sim)), gaussian(h)))

    found = simulate(once, truth)
    values = torch.tensor([u.value for u in found])
    assert abs(float(values.mean()) - truth) < 4.0 * float(values.std()) / math.sqrt(len(found))  # false: 6e-5


def test_bandwidth_is_the_median_of_positive_distances_of_the_reference() -> None:
    line = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [3.0]])
    assert median_distance(line) == 2.0  # of four 1, one 2 and four 3; with the six 0 it would be 1
    with pytest.raises(DataError, match="all equal"):
        rbf_mmd(normal(5, 2), torch.ones(5, 2))


def test_sums_of_the_reference_can_be_reused() -> None:
    x, y = normal(40, 4, key="x"), normal(50, 4, key="y") + 100.0
    assert_same(kernel_distance(x, y), kernel_distance(x, kernels.polynomial_sums(y)), rtol=0)
    assert_same(rbf_mmd(x, y), rbf_mmd(x, kernels.gaussian_sums(y)), rtol=0)


# -- transport ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(50, 50), (1, 7), (33, 20)])
def test_w1_equals_scipy(m: int, n: int) -> None:
    a, b = normal(m, 3, key="a").mul(3).round() / 3, normal(n, 3, key="b").add(0.4)  # with ties
    expected = [wasserstein_distance(a[:, i], b[:, i]) for i in range(3)]
    assert wasserstein_1d(a, b).tolist() == pytest.approx(expected, rel=1e-12)
    assert float(wasserstein_1d(a[:, 0], b[:, 0])) == pytest.approx(expected[0], rel=1e-12)


def test_w1_of_a_shifted_and_of_a_scaled_sample() -> None:
    a = normal(101, 2)
    torch.testing.assert_close(wasserstein_1d(a, a - 2.5), torch.full((2,), 2.5).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(wasserstein_1d(3.0 * a, a), 2.0 * a.abs().mean(0), rtol=1e-12, atol=0)
    assert wasserstein_1d(a, a.flip(0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("m", "n", "held"), [(47, 61, 2**19), (9, 30, 100)])
def test_sliced_wasserstein_equals_recomputation(m: int, n: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilemma.metrics.wasserstein.HELD", held)
    x, y, u = normal(m, 4, key="x") + 0.3, normal(n, 4, key="y"), sphere(16, 4)
    assert_same(sliced_wasserstein(x, y, 16), jackknife(lambda a, b: wasserstein_1d(a @ u.T, b @ u.T).mean(), x, y))


def test_sliced_wasserstein_of_a_shift() -> None:
    """W1 between the projections of x and x + v is |u . v|; its mean over the circle is 2 |v| / pi."""
    x, v = normal(30, 2), torch.tensor([3.0, 4.0]).double()
    directions = sphere(4000, 2)
    found = sliced_wasserstein(x + v, x, 4000).value
    assert found == pytest.approx(float((directions @ v).abs().mean()), rel=1e-12)
    assert found == pytest.approx(2.0 * 5.0 / math.pi, rel=4 * 0.48 / math.sqrt(4000))  # 4 standard errors


def test_sliced_wasserstein_coverage() -> None:
    simulate(lambda s: sliced_wasserstein(normal(60, 3, key=("x", s)) + 0.7, normal(50, 3, key=("y", s)), 16))


# -- classifiers -------------------------------------------------------------------------------------------------


def test_auc_of_shifted_normals() -> None:
    """Phi(delta / sqrt 2) for the best, linear score; four standard errors: a false alarm in 16,000."""
    x, y = normal(1000, 2, key="x"), normal(800, 2, key="y")
    x[:, 0] += 1.0
    u = classifier_auc(x, y, "linear")
    assert abs(u.value - norm.cdf(1.0 / math.sqrt(2.0))) < 4.0 * u.se
    assert u.n == {"generated": 1000, "reference": 800}


def test_auc_of_equal_distributions_is_one_half_on_average() -> None:
    """Whatever the folds are cut from must not tie test to training examples; four standard errors: one in 16,000."""
    aucs = [
        classifier_auc(normal(60, 1, key=("x", s)), normal(60, 1, key=("y", s)), "linear").value for s in range(200)
    ]
    found = torch.tensor(aucs)
    assert abs(float(found.mean()) - 0.5) < 4.0 * float(found.std()) / math.sqrt(200)


def test_auc_turns_round_with_the_samples() -> None:
    x, y = normal(60, 2, key="x") + 0.5, normal(90, 2, key="y")
    assert classifier_auc(x, y, "linear").value == pytest.approx(classifier_auc(y, x, "linear").value, abs=1e-4)


def test_a_ring_is_told_from_a_disc_only_by_the_nonlinear_classifier() -> None:
    x, y = normal(400, 2, key="x"), normal(400, 2, key="y")
    x = 2.0 * x / x.norm(dim=1, keepdim=True)
    linear, nonlinear = classifier_auc(x, y, "linear"), classifier_auc(x, y, "nonlinear")
    assert abs(linear.value - 0.5) < 4.0 * linear.se
    assert nonlinear.value > 0.9


def test_delong_components_and_variance_by_hand() -> None:
    x, y = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([2.0, 0.0]).double()
    v10, v01 = delong_components(x, y)
    assert v10.tolist() == [1.0, 0.5, 0.75]
    assert v01.tolist() == [0.5, 1.0]
    u = mean_auc([(v10, v01)], "one fold")
    assert u.value == 0.75
    assert u.variance == pytest.approx(float(v10.var() / 3 + v01.var() / 2), rel=1e-12)
    two = mean_auc([(v10, v01), (v10 / 2, v01 / 2)], "two folds")  # independent: Var of the mean = sum / 4
    assert two.variance == pytest.approx((1.0 + 0.25) * u.variance / 4.0, rel=1e-12)
    assert [two.sources[name].df for name in ("generated", "reference")] == [4, 2]


def test_delong_coverage_over_simulated_scores() -> None:
    def once(s: int) -> Uncertain:
        x, y = normal(2, 30, key=("x", s)) + 1.0, normal(2, 25, key=("y", s))
        return mean_auc([delong_components(a, b) for a, b in zip(x, y, strict=True)], "two folds")

    simulate(once, float(norm.cdf(1.0 / math.sqrt(2.0))))


# -- labels ------------------------------------------------------------------------------------------------------


def test_inception_score_of_even_one_hot_classes_is_their_number() -> None:
    logits = 1000.0 * torch.eye(7).repeat(30, 1)
    assert inception_score(logits).value == pytest.approx(7.0, rel=1e-12)
    assert inception_score(torch.zeros(40, 7)).value == pytest.approx(1.0, rel=1e-12)


def test_inception_score_equals_recomputation() -> None:
    logits = 3.0 * normal(70, 5)

    def score(z: Tensor) -> float:
        p = z.softmax(1)
        return float((p * (p / p.mean(0)).log()).sum(1).mean().exp())

    z, blocks = shuffle_into_blocks(logits)
    rest = torch.tensor([score(without(z, b)) for b in blocks], dtype=torch.float64)
    expected = delete_one(score(z), rest, rest, 70, 70)
    found = inception_score(logits)
    assert_same(found, Uncertain(expected.value, {"generated": expected.sources["generated"]}))


def test_class_histogram_by_hand_and_by_recomputation() -> None:
    p, q = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1])
    a, b = np.array([3.5, 1.5, 0.5]) / 5.5, np.array([1.5, 1.5, 0.5]) / 3.5
    assert class_histogram_kl(p, q, 3).value == pytest.approx(float((a * np.log(a / b)).sum()), rel=1e-12)

    def kl(x: Tensor, y: Tensor) -> Tensor:
        f, g = ((t.bincount(minlength=4) + 0.5) / (len(t) + 2.0) for t in (x, y))
        return (f.double() * (f.double() / g.double()).log()).sum()

    x, y = (normal(n, key=n).mul(2).round().long().clamp(0, 3) for n in (53, 81))
    assert_same(class_histogram_kl(x, y, 4), jackknife(kl, x, y), rtol=1e-5, atol=1e-6)  # bincount + 0.5 is float32
    with pytest.raises(DataError, match="0 to 2"):
        class_histogram_kl(x, y, 3)


def test_class_histogram_coverage() -> None:
    p, q = (torch.tensor(w, dtype=torch.float64) for w in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))

    def draw(w: Tensor, n: int, s: int) -> Tensor:
        return w.multinomial(n, replacement=True, generator=make_generator("labels", n, s))

    simulate(lambda s: class_histogram_kl(draw(p, 90, s), draw(q, 100, s), 3))


def test_modes_hit() -> None:
    reference = torch.tensor([0] * 50 + [1] * 40 + [2] * 10)
    generated = torch.tensor([0] * 95 + [1] * 4 + [2] * 1 + [3] * 10)  # a tenth of class 1's share is 4.4 of 110
    u = modes_hit(generated, reference, 4)
    assert u.value == 1.0
    assert not u.sources
    assert modes_hit(generated[:100], reference, 4).value == 3.0


def test_labeller_takes_the_majority() -> None:
    x = torch.cat([normal(50, 2, key="a"), normal(50, 2, key="b") + 20.0])
    label = Labeller(x, torch.tensor([3] * 50 + [5] * 50))
    assert label(torch.tensor([[1.0, 0.0], [19.0, 20.0]])).tolist() == [3, 5]
    with pytest.raises(DataError, match="too few"):
        Labeller(x[:14], torch.zeros(14))


# -- tables ------------------------------------------------------------------------------------------------------

NAN = math.nan


def test_complements_by_hand() -> None:
    spec = table(number="numeric", word="3", flag="boolean", gone="numeric", lost="numeric")
    x = torch.tensor([[1, 0, 1, NAN, 1], [2, 0, 1, NAN, 1], [NAN, NAN, 0, NAN, 1]]).double()
    y = torch.tensor([[2, 0, 0, 1, NAN], [3, 1, 0, 1, NAN], [4, 2, 1, NAN, NAN], [5, 0, 1, 1, NAN]]).double()
    found = column_complements(x, y, spec)
    assert found["number"].value == pytest.approx(1.0 - 0.75)  # below 3: all of (1, 2), a quarter of (2, 3, 4, 5)
    assert found["word"].value == pytest.approx(1.0 - 0.5)  # (1, 0, 0) and (1/2, 1/4, 1/4)
    assert found["flag"].value == pytest.approx(1.0 - 1.0 / 6.0)
    assert found["gone"].value == 0.0
    assert math.isnan(found["lost"].value)
    mean = mean_complement(x, y, spec)
    assert mean.value == pytest.approx((0.25 + 0.5 + 5.0 / 6.0) / 4.0)
    assert "lost" in mean.method


def mixed(n: int, key: object) -> tuple[Tensor, DataSpec]:
    z = normal(n, 4, key=key)
    z[:, 1] = z[:, 0].round().clamp(-1, 1) + 1.0
    z[:, 2] += z[:, 3]
    z[:, 2] = torch.where(z[:, 2] > 1.5, NAN, z[:, 2])
    return z, table(a="numeric", b="3", c="numeric", d="numeric")


def test_complements_and_correlations_equal_recomputation() -> None:
    (x, spec), (y, _) = mixed(57, "x"), mixed(83, "y")
    x[:, 0] += 0.4
    (x, x_blocks), (y, y_blocks) = (shuffle(t) for t in (x, y))

    def recompute(f: Callable[[Tensor, Tensor], float]) -> Uncertain:
        rest_x = torch.tensor([f(without(x, b), y) for b in x_blocks], dtype=torch.float64)
        rest_y = torch.tensor([f(x, without(y, b)) for b in y_blocks], dtype=torch.float64)
        return delete_one(f(x, y), rest_x, rest_y, len(x), len(y))

    assert_same(mean_complement(x, y, spec), recompute(lambda a, b: mean_complement(a, b, spec).value))

    def correlations(a: Tensor, b: Tensor) -> float:
        differences = []
        for i, j in ((0, 2), (0, 3), (2, 3)):
            rho = [torch.corrcoef(t[~t[:, 2].isnan() | (i + j == 3)][:, [i, j]].T)[0, 1] for t in (a, b)]
            differences.append(float((rho[0] - rho[1]).abs()) / 2.0)
        return sum(differences) / 3.0

    found = correlation_difference(x, y, spec)
    assert found is not None
    assert_same(found, recompute(correlations))


def shuffle(x: Tensor) -> tuple[Tensor, Sequence[slice]]:
    """The blocks of rows with missing values, which count as zeros and are marked."""
    missing = x.isnan()
    rows, blocks = shuffle_into_blocks(torch.cat([x.masked_fill(missing, 0.0), missing.double()], 1))
    return rows[:, : x.shape[1]].masked_fill(rows[:, x.shape[1] :] > 0, NAN), blocks


def test_correlation_difference_by_hand_and_of_constant_columns() -> None:
    spec = table(a="numeric", b="numeric")
    line = torch.arange(30).double()
    rising, falling = torch.stack([line, 2 * line + 0.1], 1), torch.stack([line, 5 - line], 1)
    constant = torch.stack([line, torch.full((30,), 0.1).double()], 1)
    for x, expected in ((rising, 0.0), (falling, 1.0), (constant, 0.5)):
        found = correlation_difference(x, rising, spec)
        assert found is not None
        assert found.value == pytest.approx(expected, abs=1e-12)
    assert correlation_difference(rising[:, :1], rising[:, :1], table(a="numeric")) is None


def test_train_on_synthetic_learns_from_real_rows_and_not_from_shuffled_columns() -> None:
    (x, spec), (y, _) = mixed(600, "train"), mixed(400, "test")
    x[:, 0] = x[:, 1] + 0.1 * x[:, 0]
    y[:, 0] = y[:, 1] + 0.1 * y[:, 0]
    order = [torch.randperm(600, generator=make_generator("columns", i)) for i in range(4)]
    shuffled = torch.stack([x[order[i], i] for i in range(4)], 1)
    real, fake = train_on_synthetic(x, y, spec), train_on_synthetic(shuffled, y, spec)
    assert real.value > 0.5
    assert -0.15 < fake.value < 0.05  # trees that fit noise are worse than a constant
    assert set(real.sources) == {"reference"}
    assert 0.0 < real.se < 0.1


def test_train_on_synthetic_by_hand() -> None:
    """Generated rows of one category and one number predict these everywhere."""
    spec = table(word="3", number="numeric")
    y = torch.tensor([[0, 0.0], [1, 1.0], [1, 2.0], [2, 3.0], [NAN, 4.0]]).double()
    u = train_on_synthetic(torch.tensor([[0, 1.0], [0, 1.0]]).double(), y, spec)
    word, number = (0.25 - 0.5) / (1.0 - 0.5), 1.0 - (1 + 0 + 1 + 4 + 9) / 10.0
    assert u.value == pytest.approx((word + number) / 2.0, rel=1e-12)
    empty = train_on_synthetic(torch.tensor([[0, NAN], [0, NAN]]).double(), y, spec)
    assert empty.value == pytest.approx(word / 2.0, rel=1e-12)
    assert "'number' has no generated value" in empty.method


def test_scores_without_each_block_equal_recomputation() -> None:
    y, f = normal(50, key="y"), normal(50, key="f")
    y[::9] = f[::9] = NAN
    (_, blocks), word = shuffle_into_blocks(y[:, None].nan_to_num()), y.round().clamp(-1, 1) + 1.0
    kept = [slice(0, 0), *blocks]
    for column, truth, guess in (("numeric", y, f), ("3", word, f.round().clamp(-1, 1) + 1.0)):
        found = _scores(truth, guess, table(a=column).columns[0], blocks)
        for score, block in zip(found.tolist(), kept, strict=True):
            a, b = (without(t, block)[~without(truth, block).isnan()] for t in (truth, guess))
            if column == "numeric":
                expected = 1.0 - float((a - b).square().sum() / (a - a.mean()).square().sum())
            else:
                base = float(a.long().bincount().max()) / len(a)
                expected = (float((a == b).double().mean()) - base) / (1.0 - base)
            assert score == pytest.approx(expected, rel=1e-10)


def test_train_on_synthetic_without_a_predictor_predicts_the_mean() -> None:
    spec = table(a="numeric", b="numeric")
    x, y = normal(50, 2, key="x"), normal(30, 2, key="y")
    x[:, 1] = NAN
    expected = 1.0 - float((y[:, 0] - x[:, 0].mean()).square().sum() / (y[:, 0] - y[:, 0].mean()).square().sum())
    assert train_on_synthetic(x, y, spec).value == pytest.approx(expected / 2.0, abs=1e-6)  # b scores 0


# -- paths -------------------------------------------------------------------------------------------------------


def test_path_length_of_a_linear_decoder() -> None:
    """On straight paths E |W (z_b - z_a)|^2; on arcs between perpendicular codes of one length r, (pi r / 2)^2."""
    w, a, b = normal(6, 5, key="w"), normal(300, 5, key="a"), normal(300, 5, key="b")
    found = perceptual_path_length(lambda z: z @ w.T, a, b, lambda x: x, interpolation="lerp", batch=64)
    values = ((b - a) @ w.T).square().sum(1)
    assert found.value == pytest.approx(float(values.mean()), rel=1e-10)
    assert found.se == pytest.approx(float(values.std()) / math.sqrt(300), rel=1e-8)
    arc = perceptual_path_length(
        lambda z: z, 3 * torch.eye(4)[:2].double(), 3 * torch.eye(4)[2:].double(), lambda x: x, epsilon=1e-4
    )
    assert arc.value == pytest.approx((1.5 * math.pi) ** 2, rel=1e-7)


def test_a_step_of_a_hundredth_does_not_drown_in_float32() -> None:
    w, a, b = normal(64, 64, key="w").float() / 8, normal(200, 64, key="a").float(), normal(200, 64, key="b").float()
    exact = float(((b - a).double() @ w.double().T).square().sum(1).mean())

    def error(epsilon: float) -> float:
        found = perceptual_path_length(
            lambda z: z @ w.T + 1000.0, a, b, lambda x: x, interpolation="lerp", epsilon=epsilon
        )
        return abs(found.value / exact - 1.0)

    assert error(1e-4) > 1e-2
    assert error(1e-2) < 1e-4


def test_slerp_keeps_the_length_and_ends_at_its_ends() -> None:
    a, b = (torch.nn.functional.normalize(normal(9, 2, 3, key=k).flatten(1)).view(9, 2, 3) for k in "ab")
    t = torch.linspace(0, 1, 9).double()
    assert interpolate(a, b, t, "slerp").flatten(1).norm(dim=1).tolist() == pytest.approx([1.0] * 9, rel=1e-12)
    torch.testing.assert_close(interpolate(a, b, t, "slerp")[[0, 8]], torch.stack([a[0], b[8]]))
    torch.testing.assert_close(interpolate(a, a, t, "slerp"), a)


# -- all of them -------------------------------------------------------------------------------------------------


def test_order_and_repetition_make_no_difference() -> None:
    (x, spec), (y, _) = mixed(100, "order x"), mixed(90, "order y")
    fx, fy = normal(100, 3, key="fx") + 0.2, normal(90, 3, key="fy")
    lx, ly = fx[:, 0].round().long().clamp(0, 2), fy[:, 0].round().long().clamp(0, 2)
    perms = [torch.randperm(n, generator=make_generator("order", n)) for n in (100, 90)]
    features: list[Statistic] = [
        kernel_distance, rbf_mmd, lambda a, b: sliced_wasserstein(a, b, 8), lambda a, b: inception_score(a),
        lambda a, b: classifier_auc(a, b, "linear"), lambda a, b: classifier_auc(a, b, "nonlinear"),
    ]  # fmt: skip
    rows: list[Statistic] = [
        lambda a, b: mean_complement(a, b, spec),
        lambda a, b: train_on_synthetic(a, b, spec, targets=2),
        lambda a, b: correlation_difference(a, b, spec) or Uncertain(0.0),
    ]
    cases = [(f, fx, fy) for f in features] + [(f, x, y) for f in rows]
    cases.append((lambda a, b: class_histogram_kl(a, b, 3), lx, ly))
    for f, a, b in cases:
        assert_same(f(a, b), f(a, b), rtol=0, atol=0)
        assert_same(f(a, b), f(a[perms[0]], b[perms[1]]), rtol=0, atol=0)


def test_large_samples_are_cut_for_the_classifiers() -> None:
    u = classifier_auc(normal(ROWS + 50, 1, key="x"), normal(20, 1, key="y"), "linear")
    assert u.n == {"generated": ROWS, "reference": 20}
