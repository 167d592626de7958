"""The proofs of the codec, in float64: it is invertible, its log-determinant is right, its bounds are bounds.

Every likelihood identity here is a closed form; nothing is statistical except where a test says so.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trilemma.core.codec import Codec, check_data
from trilemma.core.errors import DataError, DivergedError
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, Column, DataSpec
from trilemma.core.support import grid_index, grid_value, off_support

F64 = torch.float64
LOG_2PI = math.log(2.0 * math.pi)
N = 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator())


def normals(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=F64)


def table(*columns: Column) -> DataSpec:
    return DataSpec(kind="table", shape=(len(columns),), columns=columns)


def with_gaps(x: Tensor) -> Tensor:
    """Every fourth value missing."""
    return torch.where(torch.arange(len(x)) % 4 == 0, math.nan, x)


GRID = Column(name="grid", kind="numeric", dtype="float64", resolution=0.01, offset=-0.3)
VALUES = Column(name="values", kind="numeric", dtype="float64", values=(-1.5, 0.1, 2.0, 7.25))
REAL = Column(name="real", kind="numeric", dtype="float64")
CATEGORY = Column(name="category", kind="categorical", dtype="str", categories=("a", "b", "c", "d", "e"))
BOOLEAN = Column(name="boolean", kind="boolean", dtype="bool")
DAY = Column(name="day", kind="date", dtype="datetime64[us]", resolution=86400.0, offset=946684800.0)

COLUMN_DATA = {
    "grid": (GRID, (integers(60, N).double() - 30) / 100),
    "values": (VALUES, torch.tensor(VALUES.values, dtype=F64)[integers(4, N)]),
    "real": (REAL, 3.0 * normals(N) + 100.0),
    "category": (CATEGORY, integers(5, N).double()),
    "boolean": (BOOLEAN, integers(2, N).double()),
    "day": (DAY, 946684800.0 + 86400.0 * integers(9000, N).double()),
}
MISSING_DATA = {
    f"{name} with gaps": (column.model_copy(update={"missing": True}), with_gaps(x))
    for name, (column, x) in COLUMN_DATA.items()
}
TABLES = {name: (table(column), x.unsqueeze(1)) for name, (column, x) in {**COLUMN_DATA, **MISSING_DATA}.items()}
ALL_COLUMNS = {**COLUMN_DATA, **MISSING_DATA}
TABLES["all columns"] = (
    table(*(column for column, _ in ALL_COLUMNS.values())),
    torch.stack([x for _, x in ALL_COLUMNS.values()], 1),
)
DATA = {
    "8-bit image": (DataSpec(kind="image", shape=(3, 2, 2), levels=256), integers(256, N, 3, 2, 2).to(torch.uint8)),
    "17 levels": (DataSpec(kind="image", shape=(1, 4, 4), levels=17), integers(17, N, 1, 4, 4).to(torch.uint8)),
    "16-bit image": (DataSpec(kind="image", shape=(1, 2, 2), levels=65536), integers(65536, N, 1, 2, 2)),
    "real image": (DataSpec(kind="image", shape=(1, 2, 2)), 5.0 * normals(N, 1, 2, 2) - 7.0),
    "signal": (DataSpec(kind="signal", shape=(2, 5)), normals(N, 2, 5)),
    "points": (DataSpec(kind="points", shape=(3,)), normals(N, 3) * torch.tensor([1e-3, 1.0, 1e4]) + 10.0),
    "points with levels": (DataSpec(kind="points", shape=(3,), levels=9), integers(9, N, 3)),
    **TABLES,
}
SPACES = ("standard", "logit", "center", "integer", "onehot")


def fitted(spec: DataSpec, x: Tensor, space: str = "standard") -> Codec:
    codec = Codec(spec, space)
    codec.fit(x)
    return codec


def assert_same(decoded: Tensor, x: Tensor, spec: DataSpec) -> None:
    """Equal, missing values included; real numbers to the rounding of float64."""
    columns = spec.columns or (None,)
    real = torch.tensor([spec.levels is None if c is None else not c.is_discrete for c in columns])
    if spec.kind != "table":
        decoded, x, real = decoded.reshape(len(x), -1), x.reshape(len(x), -1), real.expand(spec.dims)
    assert torch.equal(decoded.isnan(), x.isnan())
    assert torch.equal(decoded[:, ~real].nan_to_num(-9e9), x[:, ~real].nan_to_num(-9e9).to(decoded.dtype))
    torch.testing.assert_close(decoded[:, real], x[:, real].to(decoded.dtype), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", DATA)
def test_decode_inverts_encode(kind, space):
    spec, x = DATA[kind]
    codec = fitted(spec, x, space)
    for noise in (None, *(Noise(seed, n=N) for seed in range(5))):
        y, ladj = codec.encode(x, noise, dtype=F64)
        assert y.shape == (N, *codec.shape)
        assert ladj.dtype == F64
        assert_same(codec.decode(y), x, spec)


@pytest.mark.parametrize("kind", DATA)
def test_the_codec_says_whether_it_adds_noise(kind):
    spec, x = DATA[kind]
    codec = fitted(spec, x)
    y, _ = codec.encode(x, Noise(0, n=N), dtype=F64)
    again, _ = codec.encode(x, Noise(1, n=N), dtype=F64)
    assert (codec.kind == "exact") == torch.equal(y, again)


@pytest.mark.parametrize("kind", DATA)
def test_noise_does_not_depend_on_the_batching(kind):
    spec, x = DATA[kind]
    codec = fitted(spec, x)
    y, ladj = codec.encode(x, Noise("k", n=N), dtype=F64)
    part, part_ladj = codec.encode(x[5:24], Noise("k", n=19, start=5), dtype=F64)
    assert torch.equal(part, y[5:24])
    assert torch.equal(part_ladj, ladj[5:24])


# -- log-determinants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["standard", "logit"])
@pytest.mark.parametrize("kind", ["8-bit image", "17 levels", "16-bit image", "points with levels"])
def test_ladj_of_levels_matches_autograd(kind, space):
    """x + u -> y is deterministic: its Jacobian by autograd has the log-determinant that the codec reports."""
    spec, x = DATA[kind]
    codec = fitted(spec, x, space)
    dequantize, *rest = codec.transforms
    z, _ = dequantize.encode(x[:1].double(), Noise(0, n=1))
    y, ladj = codec.encode(x[:1], Noise(0, n=1), dtype=F64)

    def forward(v: Tensor) -> Tensor:
        """v = x + u in units of levels, flat."""
        out = v.reshape(1, *spec.shape) / spec.levels
        for step in rest:
            out = step.encode(out, None)[0]
        return out.flatten()

    v = (z * spec.levels).flatten()
    torch.testing.assert_close(forward(v), y.flatten(), rtol=1e-12, atol=1e-12)
    expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(forward, v)).logabsdet
    torch.testing.assert_close(ladj[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["real image", "signal", "points", "real"])
def test_ladj_of_real_data_matches_autograd(kind):
    spec, x = DATA[kind]
    codec = fitted(spec, x)
    for row in x[:3]:
        jacobian = torch.autograd.functional.jacobian(
            lambda v: codec.encode(v.reshape(1, *spec.shape), dtype=F64)[0].flatten(), row.flatten()
        )
        _, ladj = codec.encode(row.unsqueeze(0), dtype=F64)
        torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-12, atol=1e-12)


def test_a_fitted_codec_standardizes():
    for kind in ("points", "real", "grid", "day", "17 levels"):
        spec, x = DATA[kind]
        many = x.repeat_interleave(400, 0)  # 5 sigma of the dequantization noise is below the tolerance
        y, _ = fitted(spec, x).encode(many, Noise(0, n=len(many)), dtype=F64)
        assert y.mean().abs() < 0.02, kind
        assert abs(y.std(correction=0) - 1.0) < 0.02, kind


# -- likelihoods in data units --------------------------------------------------------------------------------


def test_a_gaussian_has_its_closed_form_in_data_units():
    spec, x = DATA["points"]
    codec = fitted(spec, x)
    mean, std = codec.transforms[0].mean, codec.transforms[0].std
    y, ladj = codec.encode(x, Noise(0, n=N), dtype=F64)
    score = (-0.5 * y.square() - 0.5 * LOG_2PI).sum(1) + ladj
    torch.testing.assert_close(score, torch.distributions.Normal(mean, std).log_prob(x).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("space", ["standard", "logit"])
@pytest.mark.parametrize("kind", ["8-bit image", "17 levels", "16-bit image"])
def test_a_piecewise_constant_density_scores_the_exact_probability(kind, space):
    """p(x + u) = P(x) on each cell makes the dequantization bound tight, for every single draw of u."""
    spec, x = DATA[kind]
    codec = fitted(spec, x, space)
    log_pmf = torch.log_softmax(normals(*spec.shape, spec.levels), -1)

    def decode_to_unit(y: Tensor) -> Tensor:
        for step in reversed(codec.transforms[1:]):
            y = step.decode(y)
        return y

    for seed in range(3):
        y, ladj = codec.encode(x, Noise(seed, n=N), dtype=F64)
        z = decode_to_unit(y.requires_grad_())
        (dz,) = torch.autograd.grad(z.sum(), y)  # elementwise, so this is dz/dy
        level = (z * spec.levels).floor().long()
        assert torch.equal(level, x.long())
        log_p_of_cell = log_pmf.expand(N, *log_pmf.shape).gather(-1, level.unsqueeze(-1)).squeeze(-1)
        log_p_y = log_p_of_cell + math.log(spec.levels) + dz.log()  # the constant density, pushed to model space
        expected = log_pmf.expand(N, *log_pmf.shape).gather(-1, x.long().unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(log_p_y.flatten(1).sum(1) + ladj, expected.flatten(1).sum(1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["grid", "values", "category", "boolean", "day", "category with gaps"])
def test_a_piecewise_constant_density_scores_the_exact_probability_of_a_column(kind):
    """Cells have unit width before standardization, so the constant density is P(code) std."""
    spec, x = DATA[kind]
    codec = fitted(spec, x)
    column = codec.transforms[0].columns[0]
    code = column._to_code(x[:, 0]).long()
    log_pmf = torch.log_softmax(normals(int(code.max()) + 1), 0)
    for seed in range(3):
        y, ladj = codec.encode(x, Noise(seed, n=N), dtype=F64)
        cell = (y[:, 0] * column.std + column.mean).floor().long()
        torch.testing.assert_close(log_pmf[cell] + column.std.log() + ladj, log_pmf[code], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["real", "grid", "values", "boolean", "day"])
def test_missing_values_score_the_probability_of_missingness(kind):
    """A model with the fill N(0, 1) and an indicator uniform on its cells has a tight bound, draw by draw."""
    spec, x = DATA[f"{kind} with gaps"]
    codec = fitted(spec, x)
    column = codec.transforms[0].columns[0]
    missing, q = x[:, 0].isnan(), 0.3
    for seed in range(3):
        y, ladj = codec.encode(x, Noise(seed, n=N), dtype=F64)
        value, indicator = y.unbind(1)
        assert torch.equal(indicator > 0, missing)
        assert indicator.abs().max() < 2.0
        log_indicator = torch.tensor([(1 - q) / 2, q / 2], dtype=F64)[missing.long()].log()
        score = log_indicator - 0.5 * value.square() - 0.5 * LOG_2PI + ladj
        expected = torch.full_like(score, math.log(q))
        torch.testing.assert_close(score[missing], expected[missing], rtol=0, atol=1e-12)
        # Where the value is there: P(present) times the Gaussian in the units of the column, or of its grid.
        present = math.log(1 - q) - 0.5 * value.square() - 0.5 * LOG_2PI - column.std.log()
        torch.testing.assert_close(score[~missing], present[~missing], rtol=0, atol=1e-12)


def test_the_bound_is_below_the_probability_of_the_cell():
    """E_u log p(k + u) <= log of the mass that a Gaussian gives to the cell [k, k + 1), and near it when smooth."""
    column, x = COLUMN_DATA["grid"]
    codec = fitted(table(column), x.unsqueeze(1))
    mean, std = codec.transforms[0].columns[0].mean, codec.transforms[0].columns[0].std
    repeats = 2000
    y, ladj = codec.encode(x.repeat_interleave(repeats).unsqueeze(1), Noise(0, n=N * repeats), dtype=F64)
    bound = (-0.5 * y[:, 0].square() - 0.5 * LOG_2PI + ladj).reshape(N, repeats).mean(1)
    code = grid_index(column, x)
    normal = torch.distributions.Normal(mean, std)
    log_mass = (normal.cdf(code + 1) - normal.cdf(code)).log()
    # Jensen's gap is Var(log p)/2 ~ (d log p/du)^2 / 24 here; 5 standard errors of the mean over draws beside it.
    slope = (code + 0.5 - mean).abs() / std.square() + 1 / std.square()
    slack = 5 * slope / math.sqrt(12 * repeats)
    assert bool((bound <= log_mass + slack).all())
    assert bool((bound >= log_mass - slope.square() / 8 - slack).all())


# -- a grid cannot be exploited ----------------------------------------------------------------------------------


def comb_score(codec: Codec, x: Tensor, width: float) -> float:
    """Mean score of a model that knows the grid: Gaussians of this width (data units) on every value of 0.01 k.

    Each gets the exact frequency of its value. Draws are spread evenly, so the mean is a fixed number.
    """
    centers, weights = x.unique(return_counts=True)
    at = codec.encode(centers.unsqueeze(1), dtype=F64)[0][:, 0]
    y, ladj = codec.encode(x.unsqueeze(1), Noise(0, n=len(x)), dtype=F64)
    scale = codec.transforms[0].columns[0].std * (0.01 if codec.spec.columns[0].is_discrete else 1.0)
    log_p = torch.distributions.Normal(at, width / scale).log_prob(y) + (weights / len(x)).log()
    return (log_p.logsumexp(1) + ladj).mean().item()


def test_spikes_on_a_grid_gain_nothing_once_it_has_a_resolution():
    """As a density each factor 10 in width gains log 10 nats per value; as a probability none passes log P."""
    x = (integers(60, 3000).double() - 30) / 100
    density = fitted(table(REAL), x.unsqueeze(1))
    probability = fitted(table(GRID), x.unsqueeze(1))
    entropy = torch.special.entr(x.unique(return_counts=True)[1] / len(x)).sum().item()
    widths = [10.0**-k for k in range(2, 9)]
    gains = [comb_score(density, x, w) for w in widths]
    for a, b in pairwise(gains[1:]):
        assert b - a == pytest.approx(math.log(10.0), abs=1e-6)
    bounded = [comb_score(probability, x, w) for w in widths]
    assert max(bounded) <= -entropy  # the best any model can score is the negative entropy of the values
    assert bounded[0] > -entropy - 0.5  # and a comb as wide as its steps comes close
    assert all(b < a - 1.0 for a, b in pairwise(bounded))  # narrower spikes only lose


def test_a_constant_column_scores_zero_at_best_and_breaks_nothing():
    column = Column(name="c", kind="numeric", dtype="float64", values=(3.14159,))
    x = torch.full((N, 1), 3.14159, dtype=F64)
    codec = fitted(table(column), x)
    y, ladj = codec.encode(x, Noise(0, n=N), dtype=F64)
    assert torch.equal(codec.decode(y), x)
    std = codec.transforms[0].columns[0].std
    uniform_on_the_cell = std.log()
    torch.testing.assert_close(uniform_on_the_cell + ladj, torch.zeros(N, dtype=F64), rtol=0, atol=1e-14)
    real = fitted(table(REAL), x)  # constant in the training split only: shifted, not divided by zero
    assert torch.equal(real.decode(real.encode(x, dtype=F64)[0]), x)


# -- single precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution", "offset", "cells"),
    [
        ("whole numbers to a million", 1.0, 0.0, 10**6),
        ("prices to 10 000 in cents", 0.01, 0.0, 10**6),
        ("large whole numbers close together", 1.0, 10.0**15, 10**5),
        ("days of a century", 86400.0, -2208988800.0, 36525),
        ("hours of 50 years", 3600.0, 0.0, 438_300),
        ("seconds of a week", 1.0, 1.7e9, 604_800),
    ],
)
def test_grids_survive_single_precision(name, resolution, offset, cells):
    column = Column(name=name, kind="numeric", dtype="float64", resolution=resolution, offset=offset)
    x = grid_value(column, integers(cells, 4000).double()).unsqueeze(1)
    codec = fitted(table(column), x)
    y, _ = codec.encode(x, dtype=torch.float32)
    assert torch.equal(codec.decode(y), x)


@pytest.mark.parametrize("cells", [10**3, 10**6, 10**9, 2**46])
def test_long_grids_survive_dequantization_in_double_precision(cells):
    """The noise keeps off the ends of its cell by more than rounding can move it, also at 10^13 steps."""
    column = Column(name="n", kind="numeric", dtype="int64", resolution=1.0)
    x = integers(cells, 20_000).double().unsqueeze(1)
    codec = fitted(table(column), x)
    for noise in (None, *(Noise(seed, n=20_000) for seed in range(5))):
        assert torch.equal(codec.decode(codec.encode(x, noise, dtype=F64)[0]), x)


def test_seconds_over_decades_do_not_fit_single_precision_and_survive_double():
    """float32 keeps 24 bits: 30 years hold 2^30 seconds. The error stays below the spacing of float32 there."""
    column = Column(name="t", kind="date", dtype="datetime64[us]", resolution=1.0, offset=946684800.0)
    x = 946684800.0 + integers(30 * 31_557_600, 4000).double().unsqueeze(1)
    codec = fitted(table(column), x)
    double, single = codec.encode(x, dtype=F64)[0], codec.encode(x, dtype=torch.float32)[0]
    assert torch.equal(codec.decode(double), x)
    error = (codec.decode(single) - x).abs()
    std = codec.transforms[0].columns[0].std
    assert 1.0 < error.max() <= 1.0 + std * 2.0**-24 * 2.0  # |y| < 2, half a unit in the last place


@pytest.mark.parametrize("kind", ["8-bit image", "17 levels"])
def test_levels_survive_single_precision(kind):
    spec, x = DATA[kind]
    for space in SPACES:
        codec = fitted(spec, x, space)
        assert torch.equal(codec.decode(codec.encode(x, dtype=torch.float32)[0]), x)


# -- the support ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", range(7))
def test_grid_points_are_the_doubles_nearest_to_their_decimals(digits):
    column = Column(name="x", kind="numeric", dtype="float64", resolution=10.0**-digits, offset=-5.0)
    index = torch.arange(0, 100_000, 7, dtype=F64)
    expected = [float(f"{(int(k) - 5 * 10**digits)}e-{digits}") for k in index]
    assert grid_value(column, index).tolist() == expected
    assert torch.equal(grid_index(column, torch.tensor(expected, dtype=F64)), index)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", DATA)
def test_whatever_a_model_draws_decodes_onto_the_support(kind, space):
    spec, x = DATA[kind]
    codec = fitted(spec, x, space)
    drawn = codec.decode(5.0 * normals(500, *codec.shape))
    check_data(spec, drawn)
    for i, column in enumerate(spec.columns):
        assert not off_support(column, drawn[:, i]).any()


def test_a_draw_that_is_not_a_number_is_no_missing_value():
    spec, x = DATA["real with gaps"]
    codec = fitted(spec, x)
    y = torch.zeros(2, 2)
    y[1, 0] = math.nan
    with pytest.raises(DivergedError, match="1 of 4 numbers"):
        codec.decode(y)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("grid", 0.015, "0.015.*a grid of 0.01"),
        ("values", 1.0, "1.*4 values"),
        ("category", 5.0, "5.*5 categories"),
        ("boolean", 2.0, "0 and 1"),
        ("day", 946684801.0, "a grid of 86400"),
        ("real", math.inf, "infinite"),
        ("grid", math.nan, "missing values"),
    ],
)
def test_values_off_the_support_are_refused(kind, value, message):
    spec, x = DATA[kind]
    bad = x.clone()
    bad[3, 0] = value
    with pytest.raises(DataError, match=message):
        check_data(spec, bad)


def test_ranges_and_shapes_are_checked():
    spec, x = DATA["17 levels"]
    with pytest.raises(DataError, match=r"0\.\.16"):
        check_data(spec, x + 1)
    with pytest.raises(DataError, match="shape"):
        check_data(spec, x[:, :, :2])
    points, p = DATA["points"]
    with pytest.raises(DataError, match="3 values are NaN or infinite"):
        check_data(points, torch.where(torch.arange(N).unsqueeze(1) == 2, math.nan, p))


# -- spaces --------------------------------------------------------------------------------------------------------


def test_center_and_onehot_put_levels_on_bin_centres_of_minus_one_to_one():
    spec = DataSpec(kind="points", shape=(4,), levels=4)
    x = torch.tensor([[0, 1, 2, 3]])
    for space in ("center", "onehot"):
        codec = fitted(spec, x, space)
        y, ladj = codec.encode(x, Noise(0, n=1), dtype=F64)
        assert y.tolist() == [[-0.75, -0.25, 0.25, 0.75]]
        assert ladj.tolist() == [0.0]  # a relabelling: probabilities stay
        assert codec.discrete
        assert codec.kind == "exact"
    integer = fitted(spec, x, "integer")
    assert integer.encode(x, None, dtype=F64)[0].tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_onehot_columns_have_no_density():
    spec, x = DATA["category with gaps"]
    codec = fitted(spec, x, "onehot")
    y, ladj = codec.encode(x, Noise(0, n=N), dtype=F64)
    assert codec.shape == (6,)  # five categories and "missing"
    assert not codec.has_density
    assert torch.equal(y.sum(1), torch.ones(N, dtype=F64))
    assert torch.equal(y[:, 5] == 1.0, x[:, 0].isnan())
    assert ladj.isnan().all()


def test_logit_is_the_logit():
    spec, x = DATA["8-bit image"]
    codec = fitted(spec, x.double(), "logit")
    y, _ = codec.encode(x, None, dtype=F64)
    p = 0.05 + 0.9 * (x.double() + 0.5) / 256
    z = torch.logit(p)
    torch.testing.assert_close(y, (z - z.mean()) / z.std(correction=0), rtol=1e-12, atol=1e-12)


def test_fitting_on_a_split_reads_only_what_it_learns_from() -> None:
    """A relabelling reads nothing; a standardization reads a bounded number of examples."""

    class Counting:
        def __init__(self, shape: tuple[int, ...], n: int) -> None:
            self.shape, self.n, self.read = shape, n, 0

        def __len__(self) -> int:
            return self.n

        def batch(self, indices: Tensor) -> Batch:
            raise AssertionError

        def head(self, n: int) -> Batch:
            self.read += n
            return Batch(torch.zeros(n, *self.shape, dtype=torch.uint8))

    spec = DataSpec(kind="image", shape=(3, 64, 64), levels=256)
    for space, expected in (("center", 0), ("integer", 0), ("logit", 2**25 // spec.dims)):
        split = Counting(spec.shape, 100_000)
        Codec(spec, space).fit_split(split)  # type: ignore[arg-type]
        assert split.read == expected


@pytest.mark.parametrize("space", ["standard", "logit", "center", "integer"])
def test_unrounded_levels_are_smooth_and_round_to_the_decoded_ones(space):
    """What is in the cell of level k decodes to k and is unrounded to within half of it; its slope is not zero."""
    spec = DataSpec(kind="image", shape=(1, 2, 2), levels=7)
    codec = Codec(spec, space)
    x = integers(7, 30, 1, 2, 2).to(torch.uint8)
    codec.fit(x)
    y, _ = codec.encode(x, Noise(0, n=30) if codec.has_density and space in ("standard", "logit") else None, dtype=F64)
    y.requires_grad_()
    smooth = codec.unrounded(y)
    assert bool(((smooth - codec.decode(y)).abs() <= 0.5 + 1e-9).all())
    (slope,) = torch.autograd.grad(smooth.sum(), y)
    assert bool((slope > 0.0).all())
