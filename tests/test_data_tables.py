"""Tables: types and grids inferred right, errors that name the column, and exact ways there and back."""

import gzip
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from trilemma.core.codec import Codec
from trilemma.core.errors import DataError, MissingExtraError, UsageError
from trilemma.core.spec import Column, DataSpec
from trilemma.data.tables import describe_column, from_frame, load_table, read_rows, to_frame

N = 200
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def write(tmp_path):
    """Write text or bytes to a file and return its path."""

    def _write(content, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


def frame_of(values, name="x") -> pd.DataFrame:
    """A table of one column of interest and one of distinct reals, so that no two rows are equal."""
    filler = np.random.default_rng(1).normal(size=len(values))
    return pd.DataFrame({name: values, "filler": filler})


def column_of(values, **settings) -> Column:
    return load_table(frame_of(values), **settings).spec.columns[0]


def csv_of(rows, header="a,b,c") -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


ROWS = [(i, f"{i * 0.37 % 1:.3f}", "xyz"[i % 3]) for i in range(1, 31)]


# -- numbers and their grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "digits"), [(0.01, 2), (0.005, 3), (0.1, 1), (0.00001, 5), (0.5, 1), (2.5, 1), (100.0, 0), (0.125, 3)]
)
def test_ties_on_an_even_grid_give_its_resolution(rng, step, digits):
    k = rng.integers(3, 103, 1000)
    column = column_of(np.array([float(f"{v * step:.{digits}f}") for v in k]))
    assert column.resolution == step
    assert column.offset == pytest.approx(k.min() * step)
    assert column.kind == "numeric"


def test_distinct_measured_reals_stay_continuous(rng):
    assert not column_of(rng.normal(size=N)).is_discrete
    assert not column_of(np.round(rng.normal(size=N), 6)).is_discrete
    assert not column_of(rng.normal(size=N).astype("float32")).is_discrete


def test_ties_decide_and_not_digits(rng):
    """Two decimals over a range of 1e6 hardly ever repeat; over a range of 1 they must."""
    assert column_of(np.round(rng.uniform(0, 1e6, N), 2)).resolution is None
    assert column_of(np.round(rng.uniform(0, 1, N), 2)).resolution == 0.01


def test_whole_numbers_are_always_on_a_grid(rng):
    assert column_of(rng.integers(0, 10**9, N)).resolution == 1.0
    assert column_of(rng.integers(0, 10**9, N).astype(float)).resolution == 1.0
    assert column_of(rng.integers(-5, 5, N)).offset == -5.0


def test_a_common_divisor_of_few_numbers_is_not_trusted():
    assert column_of([10, 20, 40]).resolution == 1.0
    assert column_of([10, 20, 40] * 50 + [30, 50] * 10).resolution == 10.0


def test_few_uneven_values_become_a_list(rng):
    values = (0.0, 0.5, 3.0, 10.0, 100.0)
    assert column_of(rng.choice(values, N)).values == values
    assert column_of(rng.choice([3, 4, 5, 6, 7, 8], N)).resolution == 1.0
    assert column_of(rng.choice([1, 2, 5, 10, 20, 50, 100], N)).values == (1, 2, 5, 10, 20, 50, 100)


def test_repeated_values_without_a_decimal_grid_become_a_list(rng):
    """Eighths are decimals; thirds, and pixels divided by 255, are not."""
    values = np.arange(100) / 255
    column = column_of(rng.choice(values, 5000))
    assert column.values == tuple(values)


def test_single_precision_written_with_all_its_digits_is_on_its_decimal_grid(rng):
    x = np.round(rng.uniform(-20, 20, 5000), 2).astype("float32").astype("float64")
    data = load_table(frame_of(x))
    assert data.spec.columns[0].resolution == 0.01
    assert "off its grid of 0.01 were rounded" in data.report.notes[0]


def test_rounding_errors_do_not_hide_a_grid(rng):
    computed = np.cumsum(np.full(100, 0.01))  # 0.35000000000000014 and the like
    data = load_table(frame_of(rng.choice(computed, 1000)))
    assert data.spec.columns[0].resolution == 0.01
    assert "were rounded" in data.report.notes[0]


def test_an_atom_among_reals_is_pointed_out(rng):
    rain = np.where(rng.random(N) < 0.6, 0.0, rng.exponential(size=N))
    data = load_table(frame_of(rain))
    assert not data.spec.columns[0].is_discrete
    (note,) = data.report.notes
    assert "0 occurs" in note
    assert "without bound" in note


def test_a_constant_column_is_kept_and_breaks_no_codec():
    frame = frame_of(np.full(N, 3.14159))
    data = load_table(frame)
    assert data.spec.columns[0].values == (3.14159,)
    assert "column 'x' is constant (3.14159)" in data.report.notes[0]
    for constant in ("k", True, 7, pd.Timestamp("2020-02-03")):
        frame = frame_of([constant] * N)
        spec = load_table(frame).spec
        x = from_frame(spec, frame)
        codec = Codec(spec, "standard")
        codec.fit(x)
        y, ladj = codec.encode(x, dtype=torch.float64)
        assert y.isfinite().all()
        assert ladj.isfinite().all()
        torch.testing.assert_close(codec.decode(y), x, rtol=1e-12, atol=1e-12)


def test_a_grid_too_fine_for_single_precision_is_pointed_out(rng):
    seconds = pd.to_datetime(rng.integers(0, 10**9, N), unit="s")
    notes = load_table(frame_of(seconds)).report.notes
    assert "too many for single precision" in notes[0]


# -- other kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "resolution"),
    [
        (pd.date_range("1970-01-05", periods=N, freq="D"), 86400.0),
        (pd.date_range("2020-01-01", periods=N, freq="MS"), 86400.0),
        (pd.date_range("2020-01-01", periods=N, freq="3h"), 3600.0),
        (pd.date_range("2020-01-01", periods=N, freq="7min"), 60.0),
        (pd.date_range("2020-01-01", periods=N, freq="11s"), 1.0),
        (pd.date_range("2020-01-01", periods=N, freq="3ms"), None),
        (pd.date_range("2020-06-01", periods=20, freq="D", tz="Asia/Tokyo"), 3600.0),
    ],
)
def test_dates_have_the_coarsest_unit_that_fits(times, resolution):
    column = column_of(times)
    assert column.kind == "date"
    assert column.resolution == resolution


def test_dates_are_seconds_since_1970_in_utc():
    times = pd.to_datetime(["1970-01-02 00:00", "1969-12-31 00:00", "2000-01-01 00:00"]).tz_localize("Europe/Berlin")
    frame = frame_of(times)
    x = from_frame(load_table(frame).spec, frame)
    assert x[:, 0].tolist() == [82800.0, -90000.0, 946681200.0]


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%Y/%m/%d", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S.%f"]
)
def test_dates_in_text_come_back_letter_for_letter(form):
    frame = frame_of(pd.date_range("2019-12-30", periods=N, freq="D").strftime(form))
    spec = load_table(frame).spec
    assert spec.columns[0].kind == "date"
    assert spec.columns[0].resolution == 86400.0
    pd.testing.assert_frame_equal(to_frame(spec, from_frame(spec, frame)), frame)


def test_text_that_is_nearly_dates_is_text():
    assert column_of(["2020-01-01", "2020-13-01"] * 20).kind == "categorical"
    assert column_of(["2020-01-01", "1/2/2020"] * 20).kind == "categorical"


@pytest.mark.parametrize(("no", "yes"), [("no", "yes"), ("False", "True"), ("F", "T"), ("N", "Y"), ("off", "ON")])
def test_pairs_of_words_are_booleans(no, yes):
    column = column_of([yes, no, None, yes] * 10)
    assert column.kind == "boolean"
    assert column.categories == (no, yes)
    assert column.missing


def test_words_that_are_no_pair_are_categories():
    assert column_of(["yes", "no", "maybe"] * 10).kind == "categorical"
    assert column_of(["yes"] * 10).kind == "categorical"
    assert column_of(["yes", "false"] * 10).kind == "categorical"


def test_categories_are_sorted_as_a_person_would():
    assert column_of(["b", "a", "c"] * 9).categories == ("a", "b", "c")
    ordered = pd.Categorical(["mid", "low", "high"] * 9, categories=["low", "mid", "high"], ordered=True)
    assert column_of(ordered).categories == ("low", "mid", "high")
    assert column_of(["10", "9", "1"] * 9).categories == ("1", "9", "10")


def test_identifiers_and_free_text_are_refused_with_a_way_out():
    frame = frame_of([f"person {i}" for i in range(N)], name="who")
    with pytest.raises(DataError, match=r"'who' has 200 different texts in 200 rows.*'drop'"):
        load_table(frame)
    dropped = load_table(frame, types={"who": "drop"})
    assert [c.name for c in dropped.spec.columns] == ["filler"]
    assert "column 'who' was dropped as asked" in dropped.report.notes
    assert len(load_table(frame, types={"who": "categorical"}).spec.columns[0].categories) == N


def test_objects_are_read_or_refused():
    assert column_of(pd.Series([True, False, None] * 9, dtype=object)).kind == "boolean"
    assert column_of(pd.Series([1, 2.5, None] * 9, dtype=object)).dtype == "float64"
    with pytest.raises(DataError, match="'x' holds Python objects of type dict"):
        load_table(frame_of(pd.Series([{}] * 9, dtype=object)))
    with pytest.raises(DataError, match="'x' has dtype timedelta64"):
        load_table(frame_of(pd.to_timedelta(range(9), unit="s")))
    with pytest.raises(DataError, match="'x' has dtype complex128"):
        load_table(frame_of(np.arange(9) * 1j))


def test_types_overrule_inference(write):
    path = write(csv_of([(1000 + i % 7, i % 2, f"2020-01-{i:02d}") for i in range(1, 31)], "zip,flag,day"))
    kinds = {c.name: c for c in load_table(path).spec.columns}
    assert [c.kind for c in kinds.values()] == ["numeric", "numeric", "date"]
    columns = load_table(path, types={"zip": "categorical", "flag": "boolean", "day": "drop"}).spec.columns
    assert [c.kind for c in columns] == ["categorical", "boolean"]
    assert columns[0].categories == tuple(str(1000 + k) for k in range(7))
    with pytest.raises(DataError, match="'zip' cannot be boolean"):
        load_table(path, types={"zip": "boolean"})
    with pytest.raises(DataError, match="'flag' is a date, but"):
        load_table(path, types={"flag": "date"})


def test_wrong_types_are_usage_errors(write):
    path = write(csv_of(ROWS))
    with pytest.raises(UsageError, match="unknown column 'bb'; did you mean 'b'"):
        load_table(path, types={"bb": "drop"})
    with pytest.raises(UsageError, match="'catgorical'; did you mean 'categorical'"):
        load_table(path, types={"a": "catgorical"})


def test_descriptions_say_the_resolution():
    assert describe_column(column_of(np.arange(N) % 40 / 100)) == "numeric on a grid of 0.01"
    assert describe_column(column_of([0.0, 7.0, 100.0, None] * 30)) == "numeric, 3 values, with missing values"
    assert describe_column(column_of(pd.date_range("2020", periods=9))) == "date on a grid of 1 day"
    assert describe_column(column_of(["a", "b"] * 9)) == "categorical, 2 categories"


# -- there and back --------------------------------------------------------------------------------------------------


def _with_gaps(values, dtype):
    gaps = np.random.default_rng(3).random(len(values)) < 0.3
    return pd.array([None if g else v for v, g in zip(values, gaps, strict=True)], dtype=dtype)


def every_dtype() -> dict[str, object]:
    """A column of each dtype that a table may have."""
    rng = np.random.default_rng(2)
    n = 60
    words, small, real = rng.choice(["a", "b", "?"], n), rng.integers(0, 9, n), rng.normal(size=n)
    coin, days = rng.random(n) < 0.5, pd.Series(pd.date_range("2020-01-01", periods=n))
    whole = {
        dtype: rng.integers(max(np.iinfo(dtype).min, -(2**45)), min(np.iinfo(dtype).max, 2**45), n).astype(dtype)
        for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    }
    columns = {
        **whole,
        "float64": real,
        "float32": real.astype("float32"),
        "float32 on a grid": real.round(1).astype("float32"),
        "float16": real.astype("float16"),
        "float64 with gaps": np.where(coin, np.nan, real),
        "bool": coin,
        "object of bool": pd.Series(np.where(rng.random(n) < 0.3, None, coin), dtype=object),
        "text": words,
        "object of text": pd.Series(np.where(coin, None, words), dtype=object),
        "object of mixed": pd.Series([1, "a", 2.5] * 20, dtype=object),
        "words": rng.choice(["Yes", "No"], n),
        "ordered category": pd.Categorical(words, categories=["?", "b", "a", "never"], ordered=True),
        "category of numbers": pd.Categorical(np.where(coin, None, small)),
        "category of bool": pd.Categorical(coin),
        "category of reals": pd.Categorical(rng.choice([0.5, 1.5], n)),
        "days ns": days.astype("datetime64[ns]"),
        "hours s": (days + pd.Timedelta("5h")).astype("datetime64[s]"),
        "microseconds": pd.Series(pd.to_datetime(rng.integers(-(10**15), 2 * 10**15, n), unit="us")),
        "days with gaps": days.where(coin),
        "days in Berlin": days.dt.tz_localize("Europe/Berlin"),
        "constant": np.full(n, 2.5),
    }
    for dtype, values in (("Int64", small), ("UInt8", small), ("Float64", real), ("Float32", real), ("boolean", coin)):
        columns[f"{dtype} with gaps"] = _with_gaps(values, dtype)
    columns["string with gaps"] = _with_gaps(words, "string")
    if HAS_PYARROW:
        for dtype, values in (("int64", small), ("uint8", small), ("double", real), ("float", real), ("bool", coin)):
            columns[f"{dtype} of arrow"] = _with_gaps(values, f"{dtype}[pyarrow]")
        columns["timestamp of arrow"] = days.astype("timestamp[us][pyarrow]")
    return columns


@pytest.mark.parametrize("name", every_dtype())
def test_every_dtype_comes_back_exactly(name):
    frame = frame_of(every_dtype()[name])
    spec = load_table(frame).spec
    back = to_frame(spec, from_frame(spec, frame))
    pd.testing.assert_frame_equal(back, frame, check_exact=True)
    again = DataSpec.model_validate_json(spec.model_dump_json())  # as a saved model has it
    assert again == spec
    pd.testing.assert_frame_equal(to_frame(again, from_frame(again, frame)), frame, check_exact=True)


@pytest.mark.parametrize("space", ["standard", "onehot"])
def test_a_whole_table_comes_back_through_the_codec(space):
    frame = pd.DataFrame(every_dtype())
    spec = load_table(frame).spec
    x = from_frame(spec, frame)
    codec = Codec(spec, space)
    codec.fit(x)
    back = to_frame(spec, codec.decode(codec.encode(x, dtype=torch.float64)[0]))
    real = [c.name for c in spec.columns if not c.is_discrete]
    discrete = [c.name for c in spec.columns if c.is_discrete]
    pd.testing.assert_frame_equal(back[discrete], frame[discrete], check_exact=True)
    numbers = [name for name in real if spec.columns[list(frame).index(name)].kind == "numeric"]
    pd.testing.assert_frame_equal(back[numbers], frame[numbers], rtol=1e-6)
    assert (back["microseconds"] - frame["microseconds"]).abs().max() <= pd.Timedelta("1us")


@pytest.mark.parametrize("seed", range(20))
def test_random_decimal_tables_come_back_exactly(seed):
    rng = np.random.default_rng(seed)
    digits, n = int(rng.integers(0, 8)), int(rng.integers(20, 400))
    cells = int(rng.integers(2, 300))
    k = rng.integers(-cells, cells, n) * int(rng.integers(1, 30))
    frame = frame_of(np.array([float(f"{v}e-{digits}") for v in k]))
    spec = load_table(frame).spec
    x = from_frame(spec, frame)
    codec = Codec(spec, "standard")
    codec.fit(x)
    assert torch.equal(codec.decode(codec.encode(x, dtype=torch.float64)[0])[:, 0], x[:, 0])
    pd.testing.assert_frame_equal(to_frame(spec, x), frame, check_exact=True)


def test_rows_and_columns_may_be_in_any_order():
    frame = pd.DataFrame(every_dtype())
    spec = load_table(frame).spec
    x = from_frame(spec, frame)
    shuffled = frame.iloc[::-1, ::-1]
    assert torch.equal(from_frame(spec, shuffled).nan_to_num(-1.0), x.flip(0).nan_to_num(-1.0))


def test_samples_beyond_a_dtype_take_its_ends():
    column = Column(name="x", kind="numeric", dtype="uint8", resolution=1.0)
    x = torch.tensor([[-3.0], [7.0], [300.0]], dtype=torch.float64)
    assert to_frame(DataSpec(kind="table", shape=(1,), columns=(column,)), x)["x"].tolist() == [0, 7, 255]
    date = Column(name="x", kind="date", dtype="datetime64[ns]", resolution=1.0)
    far = to_frame(DataSpec(kind="table", shape=(1,), columns=(date,)), torch.tensor([[1e12], [-1e12]]).double())
    assert far["x"].dt.year.tolist() == [2261, 1678]


def test_a_gap_where_there_was_none_is_an_error():
    frame = frame_of([1, 2, 3] * 5)
    spec = load_table(frame).spec
    x = from_frame(spec, frame)
    x[2, 0] = math.nan
    with pytest.raises(DataError, match="'x' has 1 NaN"):
        to_frame(spec, x)


def test_labels_come_back_by_name():
    frame = frame_of(np.arange(30.0)).assign(kind=["a", "b", "c"] * 10)
    data = load_table(frame, label="kind")
    back = to_frame(data.spec, data.test.x, data.test.condition, label="kind")
    both = back.merge(frame, on=["x", "filler", "kind"])
    assert len(both) == len(back)


# -- new data against a fitted spec --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="word"), "lacks column\\(s\\) 'word'"),
        (lambda f: f.assign(wrod="a"), "unknown column 'wrod'; did you mean 'word'"),
        (lambda f: f.assign(word="z"), "'word' holds 'z' in 90 row"),
        (lambda f: f.assign(size=f["size"] + 0.5), "'size' holds .*possible values are a grid of 1"),
        (lambda f: f.assign(size=f["size"].astype("Float64").where(f["size"] > 0)), "'size' has 9 missing"),
        (lambda f: f.assign(size="big"), "'size' is numeric, but 90 of its 90 values are not, first 'big'"),
        (lambda f: f.assign(size=math.inf), "'size' holds 90 infinite"),
        (lambda f: f.assign(day="soon"), "'day' is a date, but"),
        (lambda f: f.assign(day=1), "'day' is a date, but the table holds int64"),
        (lambda f: pd.concat([f, f["word"]], axis=1), "several columns named 'word'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, message):
    frame = pd.DataFrame(
        {"word": ["a", "b", "c"] * 30, "size": np.arange(90) % 10, "day": pd.date_range("2020", periods=90)}
    )
    spec = load_table(frame).spec
    assert from_frame(spec, frame).shape == (90, 3)
    with pytest.raises(DataError, match=message):
        from_frame(spec, change(frame))


def test_a_file_is_read_as_the_spec_needs_it(write):
    text = csv_of([(f"{i % 7:03d}", i % 3, i % 5) for i in range(40)], "code,level,kind")
    data = load_table(write(text), label="kind", types={"level": "categorical"})
    assert [c.categories for c in data.spec.columns] == [tuple(f"{k:03d}" for k in range(7)), ("0", "1", "2")]
    x, codes = read_rows(data.spec, write("kind,level,code\n4,2,006\n0,1,000\n", "new.csv"), label="kind")
    assert x.tolist() == [[6.0, 2.0], [0.0, 1.0]]
    assert codes.tolist() == [4, 0]
    with pytest.raises(DataError, match="label 'kind' holds '9', unknown"):
        read_rows(data.spec, write("kind,level,code\n9,2,006\n4,2,006\n", "new.csv"), label="kind")


# -- labels ----------------------------------------------------------------------------------------------------------


def test_a_label_leaves_the_table_and_becomes_the_condition():
    frame = frame_of(np.arange(90.0)).assign(kind=["b", "a", "c"] * 30)
    data = load_table(frame, label="kind")
    assert data.spec.condition.names == ("a", "b", "c")
    assert [c.name for c in data.spec.columns] == ["x", "filler"]
    for split in data.splits.values():
        expected = [1, 0, 2]
        assert split.condition.tolist() == [expected[int(v) % 3] for v in split.x[:, 0]]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2] * 9, ("2", "9", "10")),
        ([1.0, 2.0, 0.0] * 9, ("0", "1", "2")),
        ([True, False, True] * 9, ("False", "True")),
        (pd.Categorical(["lo", "hi", "lo"] * 9, categories=["lo", "hi"]), ("lo", "hi")),
        (["10", "9", "9"] * 9, ("9", "10")),
    ],
)
def test_classes_are_named_and_ordered(labels, names):
    assert load_table(frame_of(np.arange(27.0)).assign(y=labels), label="y").spec.condition.names == names


def test_labels_that_are_no_classes_are_refused(rng):
    frame = frame_of(np.arange(float(N)))
    with pytest.raises(DataError, match="'y' is a real number"):
        load_table(frame.assign(y=rng.normal(size=N)), label="y")
    with pytest.raises(DataError, match="1200 classes, more than 1000"):
        load_table(frame_of(np.arange(1200.0)).assign(y=[f"c{i}" for i in range(1200)]), label="y")
    with pytest.raises(DataError, match="'y' is missing in 100 row"):
        load_table(frame.assign(y=["a", None] * 100), label="y")
    with pytest.raises(UsageError, match="unknown column 'yy'"):
        load_table(frame, label="yy")
    with pytest.raises(UsageError, match="cannot be dropped too"):
        load_table(frame, label="x", types={"x": "drop"})
    with pytest.raises(DataError, match="no columns to model"):
        load_table(frame[["x"]].astype(int) % 3, label="x")
    one = load_table(frame.assign(y="only"), label="y")
    assert "label 'y' has only one class, 'only'" in one.report.notes


# -- splits ----------------------------------------------------------------------------------------------------------


def test_splits_of_a_discrete_table_are_samples_of_one_distribution(rng):
    """Equal rows are independent draws: every frequent row is in each split in proportion, whatever their order."""
    frame = pd.DataFrame({"a": rng.integers(0, 3, 3000), "b": rng.integers(0, 2, 3000)})
    data = load_table(frame)
    assert data.report.duplicates == int(frame.duplicated().sum()) == 2994
    assert data.report.leaked == 0
    assert sum(len(s) for s in data.splits.values()) == 3000
    for row in ([0.0, 0.0], [2.0, 1.0]):
        share = [float((split.x == torch.tensor(row)).all(1).double().mean()) for split in data.splits.values()]
        assert all(
            abs(p - 1 / 6) < 5.0 * math.sqrt(5 / 36 / len(s)) for p, s in zip(share, data.splits.values(), strict=True)
        )
    shuffled = load_table(frame.sample(frac=1.0, random_state=0))
    assert torch.equal(shuffled.test.x, data.test.x)


def test_the_split_does_not_depend_on_the_order_of_rows(rng):
    frame = frame_of(rng.normal(size=N))
    a, b = load_table(frame), load_table(frame.sample(frac=1.0, random_state=0))
    assert a.fingerprint == b.fingerprint
    assert torch.equal(a.test.x, b.test.x)


def test_a_test_set_of_its_own_keeps_its_rows(write):
    train, test = write(csv_of(ROWS)), write(csv_of([*ROWS[:2], (99, "0.5", "w")]), "test.csv")
    data = load_table(train, test=test)
    assert len(data.test) == 3
    assert len(data.train) + len(data.validation) == len(ROWS)
    assert data.report.leaked == 2
    assert "column 'c': only the test set has 'w'" in data.report.notes
    with pytest.raises(DataError, match="the test set lacks 'c' and has the unknown 'd'"):
        load_table(train, test=write(csv_of(ROWS, "a,b,d"), "other.csv"))
    with pytest.raises(DataError, match="'a' is int64 in the table, and"):
        load_table(train, test=write(csv_of([("x", 1, "x")] * 3), "other.csv"))


def test_missing_values_and_minus_zero_hash_alike():
    first = pd.DataFrame({"a": [0.0, 1.5, np.nan, 2.5] * 5, "b": range(20)})
    second = pd.DataFrame({"a": [-0.0, 1.5, -np.nan, 2.5] * 5, "b": range(20)})
    assert load_table(first).fingerprint == load_table(second).fingerprint


# -- text files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(write, delimiter):
    rows = [(i, f"{i * 0.37 % 1:.3f}", f'"w{delimiter}{i % 3}"') for i in range(1, 31)]
    text = "\n".join(delimiter.join(map(str, r)) for r in [("a", "b", "c"), *rows])
    columns = load_table(write(text)).spec.columns
    assert [c.name for c in columns] == ["a", "b", "c"]
    assert columns[2].categories == tuple(f"w{delimiter}{k}" for k in range(3))


def test_other_delimiters_in_the_text_do_not_mislead(write):
    text = "a;b\n" + "".join(f"{i};x, y and z\n" for i in range(1, 31))
    assert [c.name for c in load_table(write(text)).spec.columns] == ["a", "b"]


def test_file_formats_agree(write, tmp_path):
    text = csv_of(ROWS)
    plain = load_table(write(text))
    zipped = load_table(write(gzip.compress(text.encode()), "t.csv.gz"))
    tabs = load_table(write(text.replace(",", "\t"), "t.tsv"))
    crlf = load_table(write(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()))
    assert plain.fingerprint == zipped.fingerprint == tabs.fingerprint == crlf.fingerprint
    if HAS_PYARROW:
        path = tmp_path / "t.parquet"
        pd.read_csv(write(text)).to_parquet(path, index=False)
        assert load_table(path).fingerprint == plain.fingerprint


def test_parquet_without_pyarrow_names_the_extra(write, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(pd, "read_parquet", lambda *_, **__: __import__("pyarrow"))
    with pytest.raises(MissingExtraError, match=r"pip install 'trilemma\[parquet\]'"):
        load_table(write(b"PAR1", "t.parquet"))


@pytest.mark.skipif(not HAS_PYARROW, reason="needs pyarrow")
def test_a_broken_parquet_file_is_refused(write):
    with pytest.raises(DataError, match="not a readable Parquet"):
        load_table(write(b"PAR1 nonsense", "t.parquet"))


def test_a_file_without_header_is_noticed(write):
    data = load_table(write("\n".join(f"M,{i / 8},{i}" for i in range(1, 40))))
    assert [c.name for c in data.spec.columns] == ["column_0", "column_1", "column_2"]
    assert sum(len(s) for s in data.splits.values()) == 39
    assert any("the first line looks like data" in note for note in data.report.notes)


def test_a_file_of_letters_without_header_is_noticed(write):
    lines = [f"{'pe'[i % 2]},{'xyz'[i % 3]},{'abcdefg'[i % 7]}" for i in range(60)]
    assert load_table(write("\n".join(lines))).spec.columns[0].categories == ("e", "p")


def test_a_header_that_counts_is_a_header(write):
    data = load_table(write(csv_of([(f"c{i % 3}", i, i**2, i % 5) for i in range(40)], "country,2019,2020,2021")))
    assert [c.name for c in data.spec.columns] == ["country", "2019", "2020", "2021"]
    assert any("numbers count up" in note for note in data.report.notes)


def test_blanks_and_question_marks_as_in_the_adult_data(write):
    lines = [f"{20 + i}, {('State-gov', 'Private', '?')[i % 3]}, {i * 17 % 40}, <=50K" for i in range(60)]
    data = load_table(write("\n".join(lines) + "\n\n"))
    column = data.spec.columns[1]
    assert column.categories == ("Private", "State-gov")
    assert column.missing
    assert "column 'column_1': 20 cell(s) '?' read as missing" in data.report.notes
    assert "blanks around cells were stripped" in data.report.notes


def test_missing_numbers_become_nullable(write):
    path = write(csv_of([(i if i % 4 else "", f"{i / 7:.6f}" if i % 5 else "NA") for i in range(1, 60)], "a,b"))
    spec = load_table(path).spec
    assert [c.dtype for c in spec.columns] == ["Int64", "float64"]
    x, _ = read_rows(spec, path)
    assert int(x[:, 0].isnan().sum()) == 14
    frame = to_frame(spec, x)
    assert frame["a"].dtype == "Int64"
    assert frame["a"].isna().sum() == 14


def test_leading_zeros_are_kept(write):
    spec = load_table(write(csv_of([(f"0{i % 9}", i) for i in range(1, 40)], "zip,x"))).spec
    assert spec.columns[0].kind == "categorical"
    assert spec.columns[0].categories[0] == "00"


def test_a_column_that_counts_the_rows_is_pointed_out(write):
    text = csv_of([(i, i * i % 17) for i in range(30)], ",x")
    notes = load_table(write(text)).report.notes
    assert "columns without a name are called column_0" in notes
    assert any("'column_0' numbers the rows" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("\n\n  \n", "empty"),
        ("a,b,c\n", "has a header and no rows"),
        ("a,b,a\n1,2,3\n4,5,6\n", "several columns named 'a'"),
        ("a,b\n1,2\n3,4,5\n6,7\n", "line 3: 3 field"),
        ("a,b\n1,2\n3\n6,7\n", "line 3: 1 field"),
        ("a b c\n1 2 3\n4 5 6\n7 8 9\n", "one column, whose lines hold several numbers"),
        ("a;b\n1,5;2\n2,5;3\n4,25;4\n", "'a' has decimal commas, such as '1,5'"),
        ("a,b\n1,2\n", "1 example"),
        ("1.5,2\n", "1 example"),
        ("a,b\n1,2\n1,2\n1,2\n1,2\n", "4 examples, all identical"),
        ("a,b\n1,\n2,NA\n3,?\n4,\n", "'b' has no values at all.*'drop'"),
        ("a,b\n1,2\n2,inf\n3,4\n", "'b' holds 1 infinite value\\(s\\), first in row 2"),
        (b"a,b\n1,2\n\xff\xfe,3\n", "not UTF-8 text \\(line 3, byte 0xff\\)"),
        ("a,b\n1,2\n".encode("utf-16"), "save it as UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a text table"),
        ('a,b\n1,"2\n3,4\n', "line 3.*quotation mark"),
        ("a,b\n1," + "x" * 200_000 + "\n2,y\n", "line 2.*field larger than field limit"),
        ('{"a": 1}\n{"a": 2}\n', "HTML, XML or JSON"),
        ("<!DOCTYPE html>\n<html>\n", "HTML, XML or JSON"),
    ],
)
def test_files_that_are_no_tables_say_why(write, content, message):
    with pytest.raises(DataError, match=message) as error:
        load_table(write(content))
    assert "\n" not in str(error.value)


def test_a_few_words_in_a_column_of_numbers_are_mistakes(write):
    text = csv_of([(i, i * 1.5 if i != 7 else "unknown") for i in range(1, 60)], "a,b")
    with pytest.raises(DataError, match="'b' is numeric, but 1 of its 59 values are not, first 'unknown' in row 7"):
        load_table(write(text))


def test_files_that_cannot_be_opened_say_so(write, tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        load_table(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match=r"suffix must be \.csv"):
        load_table(write("x", "table.xlsx"))
    with pytest.raises(DataError, match="not a complete gzip file"):
        load_table(write(gzip.compress(b"a,b\n1,2\n" * 99)[:-12], "t.csv.gz"))
    with pytest.raises(DataError, match="not a complete gzip file"):
        load_table(write("a,b\n", "t.csv.gz"))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame(), "empty: 0 rows"),
        (pd.DataFrame({"a": []}), "empty: 0 rows"),
        (pd.DataFrame([[1, 2]] * 3, columns=["a", "a"]), "several columns named 'a'"),
        (pd.DataFrame([[1]] * 3, columns=pd.MultiIndex.from_tuples([("a", "b")])), "several levels"),
        (pd.DataFrame({"a": [1.0, np.inf, 2.0]}), "'a' holds 1 infinite"),
        (pd.DataFrame({"a": [2**60, 1, 2]}), "2\\^53"),
        (pd.DataFrame({"a": [2**50, 1, 2]}), "too far apart"),
        (pd.DataFrame({"a": [None, None, None]}), "'a' has no values at all"),
        (pd.DataFrame({"a": pd.to_datetime([1, 2, 3], unit="ns")}), "'a' has nanoseconds"),
    ],
)
def test_frames_that_cannot_be_used_say_why(frame, message):
    with pytest.raises(DataError, match=message):
        load_table(frame)


def test_importing_the_module_does_not_import_pandas():
    import subprocess

    code = "import sys, trilemma.data.tables; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_long_ids_are_not_merged(tmp_path: Path) -> None:
    """Twenty digits do not fit float64: such a column is text, and as an identifier it is refused by name."""
    rows = "\n".join(f"123456789012345678{i:02d},{i % 7}.5" for i in range(40))
    (tmp_path / "ids.csv").write_text("id,x\n" + rows + "\n")
    with pytest.raises(DataError, match="'id'"):
        load_table(tmp_path / "ids.csv")
    assert [c.name for c in load_table(tmp_path / "ids.csv", types={"id": "drop"}).spec.columns] == ["x"]


def test_a_label_that_is_no_class_is_refused() -> None:
    frame = pd.DataFrame({"x": np.arange(30.0), "y": [1.0] * 29 + [np.inf], "l": [[1]] * 30})
    with pytest.raises(DataError, match="infinite"):
        load_table(frame[["x", "y"]], label="y")
    with pytest.raises(DataError, match="lists"):
        load_table(frame[["x", "l"]], label="l")
    with pytest.raises(DataError, match="'l' holds Python objects of type list"):
        load_table(frame[["x", "l"]], types={"l": "categorical"})
