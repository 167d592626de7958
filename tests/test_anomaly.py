"""Conformal p-values of log-likelihoods, the discoveries among them, and what `trilemma score` says of both."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import trilemma as tl
from trilemma.cli import run as cli
from trilemma.core.errors import DataError, DivergedError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.noise import hash_key
from trilemma.data.examples import load_examples
from trilemma.engine import Run
from trilemma.metrics.anomaly import (
    FILE,
    _First,
    benjamini_hochberg,
    conformal_p_values,
    find_anomalies,
    reference_scores,
    typicality_p_values,
)

ALL = 10**9
"""More held-out examples than there are: validation examples are added."""


def scores_with_ties(n: int, seed: int) -> torch.Tensor:
    """Some values are equal, one is minus infinity."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[::3] = values[::3].round(decimals=0)
    values[1] = -torch.inf
    return values


@pytest.mark.parametrize("n", [1, 2, 3, 10, 31])
def test_p_values_are_those_of_the_definitions(n: int) -> None:
    held_out, new = scores_with_ties(n + 2, 0)[2:], scores_with_ties(42, 1)[2:]
    p, typical = conformal_p_values(held_out, new), typicality_p_values(held_out, new)
    for i, s in enumerate(new.tolist()):
        assert p[i].item() == (1 + sum(r <= s for r in held_out.tolist())) / (n + 1)
        everybody = sorted([*held_out.tolist(), s])
        median = everybody[n // 2]
        distance = abs(s - median)
        assert typical[i].item() == (1 + sum(abs(r - median) >= distance for r in held_out.tolist())) / (n + 1)


@pytest.mark.parametrize("function", [conformal_p_values, typicality_p_values])
@pytest.mark.parametrize("n", [10, 11])
def test_p_values_are_valid_under_exchangeability(function: Any, n: int) -> None:
    """Whichever of n + 1 values is the new one, at most a (n + 1) of the p-values are <= a: exactly, with ties too."""
    values = scores_with_ties(n + 1, 2)
    rest = [torch.cat([values[:i], values[i + 1 :]]) for i in range(n + 1)]
    p = torch.cat([function(r, values[i : i + 1]) for i, r in enumerate(rest)])
    for k in range(1, n + 2):
        assert int((p <= k / (n + 1) + 1e-12).sum()) <= k
    assert p.min() == pytest.approx(1 / (n + 1))


def test_a_likelihood_that_is_too_high_is_not_typical() -> None:
    held_out = torch.arange(-49, 50, dtype=torch.float64) / 49
    found = find_anomalies(held_out, torch.tensor([-5.0, 0.0, 5.0]), 0.01)
    assert found.p_value.tolist() == [0.01, 0.51, 1.0]
    assert found.typicality.tolist() == [0.01, 1.0, 0.01]
    assert found.smallest == 0.01
    assert found.alarms == 1
    assert found.expected == pytest.approx(0.03)
    assert found.needed == 3
    assert find_anomalies(held_out, torch.tensor([-5.0]), 0.005).expected == 0.0


def test_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    assert benjamini_hochberg(torch.tensor([0.04, 0.001, 0.03, 0.9, 0.02]).double(), 0.05).tolist() == [
        True, True, True, False, True,
    ]  # fmt: skip
    assert not benjamini_hochberg(torch.tensor([0.5, 0.04]).double(), 0.05).any()
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        p = torch.rand(30, generator=g, dtype=torch.float64) ** 2
        ordered = sorted(p.tolist())
        k = max((i for i in range(1, 31) if ordered[i - 1] <= i * 0.2 / 30), default=0)
        assert benjamini_hochberg(p, 0.2).tolist() == [v in ordered[:k] for v in p.tolist()]


@pytest.mark.parametrize(("n", "held_out", "level"), [(29, 99, 0.01), (58, 99, 0.01), (116, 199, 0.01)])
def test_equal_fractions_are_equal(n: int, held_out: int, level: float) -> None:
    """N p-values of 1 / (1 + n) <= level, the last of them by equality where 1 + n = 1 / level."""
    p = torch.full((n,), 1 / (1 + held_out), dtype=torch.float64)
    assert int(benjamini_hochberg(p, level).sum()) == n
    fewer = torch.cat([p[: n * 100 // (1 + held_out)], torch.ones(n - n * 100 // (1 + held_out)).double()])
    assert int(benjamini_hochberg(fewer, level).sum()) == n * 100 // (1 + held_out)


@pytest.mark.parametrize("n", [7, 14, 28, 56, 57])
def test_as_many_as_needed_are_needed(n: int) -> None:
    """The smallest p-value 0.01 must be met N times at level 0.01, and N/2 times at 0.02."""
    held_out = torch.arange(99.0)
    for level, needed in ((0.01, n), (0.02, -(-n // 2))):
        new = torch.cat([torch.full((needed,), -1.0), torch.full((n - needed,), 200.0)])
        found = find_anomalies(held_out, new, level)
        assert found.needed == needed
        assert int(found.discovered.sum()) == needed
        new[0] = 200.0
        assert int(find_anomalies(held_out, new, level).discovered.sum()) == 0


def test_false_discoveries_are_controlled() -> None:
    """Of 100 examples 20 are unusual: the mean share of false discoveries is at most 0.8 level (fixed seed; under the
    bound a mean beyond four standard errors has probability 3e-5)."""
    g = torch.Generator().manual_seed(1)
    shares, power = [], []
    for _ in range(300):
        new = torch.randn(100, generator=g, dtype=torch.float64)
        new[:20] -= 4.0
        found = find_anomalies(torch.randn(400, generator=g, dtype=torch.float64), new, 0.1).discovered
        shares.append(int(found[20:].sum()) / max(1, int(found.sum())))
        power.append(found[:20].double().mean().item())
    assert np.mean(shares) <= 0.08 + 4 * np.std(shares) / 300**0.5
    assert np.mean(power) > 0.8


def test_what_is_not_a_number_has_no_rank() -> None:
    one = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(DivergedError, match="1 new example"):
        find_anomalies(one, one * torch.nan, 0.01)
    with pytest.raises(DivergedError, match="1 held-out example"):
        find_anomalies(one * torch.nan, one, 0.01)


@pytest.mark.parametrize("function", [conformal_p_values, typicality_p_values])
def test_without_held_out_examples_there_is_no_rank(function: Any) -> None:
    with pytest.raises(UsageError, match="no held-out examples"):
        function(torch.empty(0).double(), torch.zeros(2).double())


# -- the held-out scores of a run --------------------------------------------------------------------------------


def write_table(path: Path, rows: np.ndarray) -> Path:
    path.write_text("a,b,k\n" + "\n".join(f"{a!r},{b!r},{int(k)}" for a, b, k in rows.tolist()) + "\n")
    return path


def make_rows(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(size=(n, 2)), rng.poisson(3, n)])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    data = tl.load_data(write_table(tmp_path / "data.csv", make_rows(1500, 0)))
    return tl.create("gmm", data.spec).fit(data, out=tmp_path / "run")


def test_the_reference_is_held_out_and_has_noise_of_its_own(run: Run) -> None:
    model, data = run.model(), run.load_data()
    found = reference_scores(run, model, {}, ALL).nats
    parts = [
        model.log_prob(data.splits[name], generator=hash_key(0, "held-out", name)).value
        for name in ("test", "validation")
    ]
    assert torch.equal(found, torch.cat(parts))
    assert len(found) < 0.5 * len(data.train)
    same_noise = model.log_prob(data.test).value
    assert not torch.equal(found[: len(same_noise)], same_noise)
    assert torch.equal(reference_scores(run, model, {}, ALL, 7).nats, found[:7])


def test_the_reference_is_kept_until_something_changes(run: Run, monkeypatch: Any) -> None:
    model = run.model()
    first = reference_scores(run, model, {}, ALL).nats
    again = reference_scores(run, model, {"repeats": 2}, ALL).nats
    assert not torch.equal(first, again)

    def gone(self: Run) -> None:
        raise UsageError("gone")

    with monkeypatch.context() as m:
        m.setattr(Run, "load_data", gone)
        assert torch.equal(reference_scores(run, model, {}, ALL).nats, first)
        assert torch.equal(reference_scores(run, model, {"repeats": 2}, ALL).nats, again)
        with torch.no_grad():
            next(b for b in model.buffers() if b.is_floating_point()).add_(0.5)
        with pytest.raises(UsageError, match="gone"):
            reference_scores(run, model, {}, ALL)
    (run.path / FILE).write_text("{ cut")
    assert torch.equal(reference_scores(run, run.model(), {}, ALL).nats, first)


def test_validation_examples_are_used_only_where_the_test_split_is_short(run: Run) -> None:
    model, test = run.model(), len(run.load_data().test)
    alone = reference_scores(run, model, {}, test)
    both = reference_scores(run, model, {}, test + 1)
    assert (len(alone.nats), alone.validation) == (test, 0)
    assert both.validation == len(run.load_data().validation) == len(both.nats) - test
    assert torch.equal(both.nats[:test], alone.nats)
    assert reference_scores(run, model, {}, test + 1, test + 5).validation == 5


def test_minus_infinity_is_kept(run: Run, monkeypatch: Any) -> None:
    model, score = run.model(), GenerativeModel.log_prob

    def impossible(self: GenerativeModel, x: Any, *args: Any, **settings: Any) -> Any:
        found = score(self, x, *args, **settings)
        found.value[0] = -torch.inf
        return found

    with monkeypatch.context() as m:
        m.setattr(GenerativeModel, "log_prob", impossible)
        first = reference_scores(run, model, {}, 1).nats
    assert first[0] == -torch.inf
    monkeypatch.setattr(Run, "load_data", None)
    assert torch.equal(reference_scores(run, model, {}, 1).nats, first)


def test_changed_data_are_no_reference(run: Run, tmp_path: Path) -> None:
    write_table(tmp_path / "data.csv", make_rows(1500, 5))
    with pytest.raises(UsageError, match="have changed"):
        reference_scores(run, run.model(), {}, ALL)


# -- the command ---------------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_score_finds_the_strange_row(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    new = make_rows(4, 9)
    new[2, 0] = 40.0
    source, out = str(write_table(tmp_path / "new.csv", new)), tmp_path / "scores.csv"
    code, printed, err = call(capsys, "score", str(run.path), source, "--out", str(out), "--alarm", "0.02")
    assert (code, err) == (0, "")
    table = [line for line in printed.splitlines() if "row" in line]
    assert "row 3" in table[0]
    assert "*" in table[0]
    assert "p-value <= 0.02: 1 of 4" in printed
    rows = list(csv.DictReader(out.open()))
    assert [r["example"] for r in rows] == ["row 1", "row 2", "row 3", "row 4"]
    assert rows[2]["rank"] == "1"
    assert rows[2]["discovered"] == "True"
    result = json.loads(call(capsys, "score", str(run.path), source, "--json", "--alarm", "0.05")[1])
    m = result["anomalies"]["held_out"]
    assert result["p_value"] == [float(r["p_value"]) for r in rows]
    assert result["typicality"] == [float(r["typicality"]) for r in rows]
    assert sorted(result["rank"]) == [1, 2, 3, 4]
    assert result["p_value"][2] == result["anomalies"]["smallest_p_value"] == 1 / (m + 1)
    assert result["anomalies"]["level"] == 0.05
    assert result["discovered"] == [False, False, True, False]


def test_long_work_is_announced_once(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("trilemma.cli.score.LONG", 0.0)
    arguments = ["score", str(run.path), str(write_table(tmp_path / "new.csv", make_rows(5, 9)))]
    assert "held-out examples are scored" in call(capsys, *arguments)[2]
    assert call(capsys, *arguments)[2] == ""


def test_score_without_the_runs_data_warns_and_ranks(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = str(write_table(tmp_path / "new.csv", make_rows(5, 9)))
    own = call(capsys, "score", str(run.path), str(tmp_path / "data.csv"), "--held-out", "9")
    assert own[0] == 0
    assert "was trained on" in own[2]
    for target in (run.path, run.path / "model"):
        (tmp_path / "data.csv").unlink(missing_ok=True)
        code, out, err = call(capsys, "score", str(target), source, "--json")
        assert code == 0
        assert "no p-values" in err
        assert err.count("\n") == 1
        result = json.loads(out)
        assert "p_value" not in result
        assert sorted(result["rank"]) == [1, 2, 3, 4, 5]
    code, out, err = call(capsys, "score", str(run.path), source, "--held-out", "0")
    assert (code, err) == (0, "")
    assert "p-value" not in out


def test_a_constant_picture_is_likely_and_not_typical(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.normal(128, 25, (500, 8, 8)).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    new = np.concatenate([np.full((1, 8, 8), 128, np.uint8), pictures[:2]])
    np.save(tmp_path / "new.npy", new)
    run = str(tmp_path / "run")
    arguments = ["train", "gmm", str(tmp_path / "pictures.npy"), "components=1", "--out", run]
    assert call(capsys, *arguments)[0] == 0
    result = json.loads(call(capsys, "score", run, str(tmp_path / "new.npy"), "--json")[1])
    assert result["p_value"][0] == 1.0
    assert result["typicality"][0] == result["anomalies"]["smallest_p_value"]


# -- what has no probability, and what has no score ----------------------------------------------------------------


def make_frame(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    day = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 90, n), "D")
    return pd.DataFrame(
        {
            "a": rng.normal(size=n),
            "const": 3.0,
            "k": rng.poisson(3, n),
            "c": rng.choice(["x", "y"], n),
            "old": rng.random(n) < 0.5,
            "day": day.strftime("%Y-%m-%d"),
        }
    )


IMPOSSIBLE = [
    ("const", 99.0, "const = 99: never seen in training"),
    ("k", 31.5, "k = 31.5: training had a grid of 1"),
    ("c", "z", "c = z: never seen in training"),
    ("old", "maybe", "old = maybe: never seen in training"),
    ("day", "2024-02-01 12:30:00", "day = 2024-02-01 12:30:00: training had a grid of 86400"),
    ("a", None, "a is missing, and never was in training"),
    ("c", None, "c is missing, and never was in training"),
]


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, so that the network does not yet saturate: at 1e20 its bound is inf - inf."""
    folder = tmp_path_factory.mktemp("table")
    make_frame(1200).to_csv(folder / "data.csv", index=False)
    data = tl.load_data(folder / "data.csv")
    tl.create("vae", data.spec).fit(data, steps=3, out=folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("column", "value", "reason"), IMPOSSIBLE)
def test_impossible_rows_are_left_out_with_a_reason(
    table_run: Path, tmp_path: Path, column: str, value: Any, reason: str
) -> None:
    spec, good = Run(table_run).spec, make_frame(5, 1)
    bad = good.astype(object)
    bad.loc[2, column] = value
    good.drop(index=2).to_csv(tmp_path / "good.csv", index=False)
    bad.to_csv(tmp_path / "bad.csv", index=False)
    found = load_examples(str(tmp_path / "bad.csv"), spec, True)
    assert found.impossible == {2: reason}
    assert len(found.names) == 5
    assert torch.equal(found.x, load_examples(str(tmp_path / "good.csv"), spec).x)
    with pytest.raises(DataError, match=f"'{column}'"):
        load_examples(str(tmp_path / "bad.csv"), spec)


def test_malformed_values_stay_errors(table_run: Path, tmp_path: Path) -> None:
    for column, value, words in (("a", "many", "is numeric"), ("a", "inf", "infinite"), ("day", "soon", "is a date")):
        frame = make_frame(5, 1).astype(object)
        frame.loc[2, column] = value
        frame.to_csv(tmp_path / "bad.csv", index=False)
        with pytest.raises(DataError, match=words):
            load_examples(str(tmp_path / "bad.csv"), Run(table_run).spec, True)


def test_errors_count_the_rows_of_the_file(tmp_path: Path) -> None:
    spec = tl.load_data(make_frame(300), given="a").spec
    frame = make_frame(5, 1)
    frame.loc[1, "c"] = "z"
    frame.loc[3, "a"] = np.nan
    frame.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(DataError, match=r"'a' is conditioned on, but missing in 1 row.*first in row 4"):
        load_examples(str(tmp_path / "bad.csv"), spec, True)


def test_rows_without_probability_or_score_do_not_stop_the_others(
    table_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    frame = make_frame(6, 1)
    frame.loc[1, "a"] = 1e20
    frame.loc[3, ["const", "c"]] = [99.0, "z"]
    frame.to_csv(tmp_path / "new.csv", index=False)
    arguments = ["score", str(table_run), str(tmp_path / "new.csv"), "--out", str(tmp_path / "scores.csv")]
    code, printed, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "over the 4 finite ones" in printed
    assert "; 1 is -inf; 1 is nan" in printed
    why = "const = 99: never seen in training; c = z: never seen in training"
    assert f"1 example has probability zero: row 4 ({why})" in printed
    assert "1 example cannot be scored: its log-likelihood is not a number: row 2" in printed
    assert "of 5; " in printed
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    result = json.loads(call(capsys, *arguments, "--json")[1])
    m = result["anomalies"]["held_out"]
    assert (rows[1]["p_value"], rows[1]["rank"], rows[1]["log_likelihood_nats"]) == ("", "", "nan")
    assert (rows[3]["p_value"], rows[3]["rank"], rows[3]["log_likelihood_nats"]) == (repr(1 / (1 + m)), "1", "-inf")
    assert [r["reason"] for r in rows] == ["", "its log-likelihood is not a number", "", why, "", ""]
    assert sorted(r for r in result["rank"] if r is not None) == [1, 2, 3, 4, 5]
    assert (result["rank"][1], result["p_value"][1], result["nats"][1]) == (None, None, "nan")
    assert (result["rank"][3], result["p_value"][3], result["nats"][3]) == (1, 1 / (1 + m), "-inf")
    finite = [v for v in result["nats"] if not isinstance(v, str)]
    assert (result["n"], result["finite"]) == (6, len(finite)) == (6, 4)
    assert result["mean_of_finite"] == pytest.approx(np.mean(finite) / 6, rel=1e-12)
    assert result["mean"] == "nan"
    assert float(result["nats"][3]) == -np.inf


def test_a_file_of_impossible_rows_is_scored(
    table_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_frame(3, 1).assign(c="z").to_csv(tmp_path / "new.csv", index=False)
    arguments = ["score", str(table_run), str(tmp_path / "new.csv")]
    assert "3 examples: 3 are -inf\n" in call(capsys, *arguments)[1]
    result = json.loads(call(capsys, *arguments, "--json")[1])
    assert (result["mean"], result["mean_of_finite"], result["finite"]) == ("-inf", None, 0)
    assert result["nats"] == ["-inf"] * 3
    assert result["anomalies"]["alarms"] == 3


def test_the_note_counts_validation_examples(
    table_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_frame(3, 1).to_csv(tmp_path / "new.csv", index=False)
    data = Run(table_run).load_data()
    test, validation = len(data.test), len(data.validation)
    arguments = ["score", str(table_run), str(tmp_path / "new.csv")]
    assert f"among {test} test examples;" in call(capsys, *arguments, "--alarm", "0.05")[1]
    level = ["--alarm", str(1 / (2 * test))]
    said = f"among {test + validation} held-out examples, {validation} of them validation ones, which may have chosen"
    assert said in call(capsys, *arguments, *level)[1]
    assert json.loads(call(capsys, *arguments, *level, "--json")[1])["anomalies"]["validation"] == validation


def test_without_held_out_examples_scores_are_ranked_without_p_values(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    source = str(write_table(tmp_path / "new.csv", make_rows(4, 9)))
    data = run.load_data()
    empty = replace(data, test=_First(data.test, 0), validation=_First(data.validation, 0))
    monkeypatch.setattr(Run, "load_data", lambda self: empty)
    code, out, err = call(capsys, "score", str(run.path), source, "--json")
    assert code == 0
    assert "no p-values" in err
    assert "neither test nor validation" in err
    assert sorted(json.loads(out)["rank"]) == [1, 2, 3, 4]
