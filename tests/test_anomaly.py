"""Conformal p-values of log-likelihoods, the discoveries among them, and what `trilemma score` says of both."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trilemma as tl
from trilemma.cli import run as cli
from trilemma.core.errors import DivergedError, UsageError
from trilemma.core.noise import hash_key
from trilemma.engine import Run
from trilemma.metrics.anomaly import (
    FILE,
    benjamini_hochberg,
    conformal_p_values,
    find_anomalies,
    reference_scores,
    typicality_p_values,
)


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
    found = reference_scores(run, model, {})
    parts = [
        model.log_prob(data.splits[name], generator=hash_key(0, "held-out", name)).value
        for name in ("test", "validation")
    ]
    assert torch.equal(found, torch.cat(parts))
    assert len(found) < 0.5 * len(data.train)
    same_noise = model.log_prob(data.test).value
    assert not torch.equal(found[: len(same_noise)], same_noise)
    assert torch.equal(reference_scores(run, model, {}, 7), found[:7])


def test_the_reference_is_kept_until_something_changes(run: Run, monkeypatch: Any) -> None:
    model = run.model()
    first = reference_scores(run, model, {})
    again = reference_scores(run, model, {"repeats": 2})
    assert not torch.equal(first, again)

    def gone(self: Run) -> None:
        raise UsageError("gone")

    with monkeypatch.context() as m:
        m.setattr(Run, "load_data", gone)
        assert torch.equal(reference_scores(run, model, {}), first)
        assert torch.equal(reference_scores(run, model, {"repeats": 2}), again)
        with torch.no_grad():
            next(b for b in model.buffers() if b.is_floating_point()).add_(0.5)
        with pytest.raises(UsageError, match="gone"):
            reference_scores(run, model, {})
    (run.path / FILE).write_text("{ cut")
    assert torch.equal(reference_scores(run, run.model(), {}), first)


def test_changed_data_are_no_reference(run: Run, tmp_path: Path) -> None:
    write_table(tmp_path / "data.csv", make_rows(1500, 5))
    with pytest.raises(UsageError, match="have changed"):
        reference_scores(run, run.model(), {})


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
    code, printed, err = call(capsys, "score", str(run.path), source, "--out", str(out))
    assert (code, err) == (0, "")
    table = [line for line in printed.splitlines() if "row" in line]
    assert "row 3" in table[0]
    assert "*" in table[0]
    assert "p-value <= 0.01: 1 of 4" in printed
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
