"""The comparison end to end on small budgets, its report, and what becomes of models that fail."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trilemma as tl
from trilemma.comparison.compare import pool_seeds
from trilemma.comparison.report import Report, Row, format_cell, rank
from trilemma.core.errors import UsageError
from trilemma.metrics import Estimate


@pytest.fixture(scope="module")
def toy_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    data = tl.load_data("two-moons")
    report = tl.compare(data, ["kde", "gmm", "nsf"], budget="4s", out=folder, show=False)
    return report, folder


@pytest.mark.slow
def test_the_report_is_complete(toy_report: tuple[Report, Path]) -> None:
    report, folder = toy_report
    assert report.rows[0].model == "ceiling"
    assert report.rows[-1].model == "floor"
    content = json.loads((folder / "report.json").read_text())
    for row in content["rows"]:
        assert {"model", "family", "status", "seeds", "metrics"} <= row.keys()
        for estimate in row["metrics"].values():
            assert {"value", "se", "ci", "n", "unit", "kind", "extractor"} <= estimate.keys()
    for name in ("kde", "gmm", "nsf"):
        row = report.row(name)
        assert row.status == "ok", row.reason
        assert row.metrics["log_likelihood"].kind == "exact"
        assert row.metrics["frechet"].value < report.row("floor").metrics["frechet"].value
        assert (folder / row.runs[0] / "config.yaml").exists()
        assert (folder / str(row.samples)).exists()
    assert Report.load(folder).rows == report.rows


@pytest.mark.slow
def test_the_page_needs_nothing_else(toy_report: tuple[Report, Path]) -> None:
    _, folder = toy_report
    page = (folder / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 4
    assert all("alt=" in image for image in images)


@pytest.mark.slow
def test_a_finished_comparison_is_not_repeated(toy_report: tuple[Report, Path], monkeypatch: Any) -> None:
    report, folder = toy_report

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished job was started again")

    monkeypatch.setattr(runner_module().Comparison, "_watch", refuse)
    again = tl.compare("two-moons", ["kde", "gmm", "nsf"], budget="4s", out=folder, show=False)
    assert again.rows == report.rows
    with pytest.raises(UsageError, match="another comparison"):
        tl.compare("two-moons", ["kde"], budget="4s", out=folder, show=False)


def runner_module() -> Any:
    import importlib

    return importlib.import_module("trilemma.comparison.compare")


@pytest.mark.slow
def test_failures_have_rows_and_the_others_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    """A model that is unknown to the worker fails; one that overruns is stopped; data in memory are handed over."""
    module = runner_module()
    data = tl.load_data(torch.randn(300, 2, generator=torch.Generator().manual_seed(0)))
    original = module.Comparison._train

    def sabotage(self: Any, name: str, seed: int, source: Any, number: str) -> None:
        if name == "gmm":
            source = {"source": str(tmp_path / "nowhere")}
        original(self, name, seed, source, number)

    monkeypatch.setattr(module.Comparison, "_train", sabotage)
    monkeypatch.setattr(module.Comparison, "_overrun", _slow_nsf)
    report = tl.compare(data, ["kde", "gmm", "nsf"], budget="2s", out=tmp_path / "out", show=False)
    assert report.row("kde").status == "ok"
    assert report.row("gmm").status == "failed"
    assert "nowhere" in str(report.row("gmm").reason)
    assert report.row("nsf").status == "out_of_budget"
    assert report.row("nsf").metrics == {}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "out of budget" in page


def _slow_nsf(self: Any, folder: Path) -> str | None:
    return "training took more than 0 s" if folder.name.startswith("nsf") and (folder / "stage.json").exists() else None


def estimate(value: float, se: float | None = 0.1, **more: Any) -> Estimate:
    settings = {"n": 10, "unit": "share", "higher_is_better": True, "method": "test", "ci": None, **more}
    return Estimate(value=value, se=se, **settings)


def test_seeds_are_pooled_with_the_larger_error() -> None:
    pooled = pool_seeds([{"m": estimate(v)} for v in (1.0, 2.0, 3.0)])["m"]
    assert pooled.value == 2.0
    assert pooled.se == pytest.approx(1.0 / 3**0.5)
    assert pooled.ci is not None
    assert pooled.ci[1] - 2.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)  # Student's t with 2 degrees of freedom
    close = pool_seeds([{"m": estimate(v, se=0.5)} for v in (1.0, 1.0, 1.0)])["m"]
    assert close.se == pytest.approx(0.5)


def test_a_column_does_not_mix_unlike_things() -> None:
    rows = [
        Row(model="a", family="x", status="ok", seeds=[0], metrics={"precision": estimate(0.5, extractor="one")}),
        Row(model="b", family="x", status="ok", seeds=[0], metrics={"precision": estimate(0.5, extractor="two")}),
    ]
    with pytest.raises(ValueError, match="mixes"):
        Report(data={}, settings={}, extractor={}, environment={}, rows=rows)


def test_bits_per_dimension_are_better_low() -> None:
    def report(better: bool, unit: str) -> Report:
        cell = estimate(3.0, unit=unit, higher_is_better=better)
        row = Row(model="a", family="x", status="ok", seeds=[0], metrics={"log_likelihood": cell})
        return Report(data={}, settings={}, extractor={}, environment={}, rows=[row])

    assert report(False, "bits/dim").arrow("log_likelihood") == " ↓"
    assert report(True, "nats/dim").arrow("log_likelihood") == " ↑"


def test_ranking_and_cells() -> None:
    def row(model: str, frechet: float | None) -> Row:
        metrics = {} if frechet is None else {"frechet": estimate(frechet)}
        status: Any = "failed" if frechet is None else "ok"
        return Row(model=model, family="x", status=status, seeds=[0], metrics=metrics)

    order = rank([row("floor", 1.0), row("bad", None), row("b", 5.0), row("a", 3.0), row("ceiling", 9.0)])
    assert [r.model for r in order] == ["ceiling", "a", "b", "bad", "floor"]
    assert format_cell("precision", estimate(0.91234, 0.0123)) == "0.912 ± 0.012"
    assert format_cell("frechet", estimate(12.3456, 1.5)) == "12.3 ± 1.5"
    assert (
        format_cell("log_likelihood", estimate(-1.5, 0.02, unit="nats/dim", kind="lower_bound"))
        == "≥ -1.500 ± 0.020 nats/dim"
    )
    assert format_cell("parameters", estimate(123456.0)) == "123k"
    assert format_cell("frechet", None) == "–"


def test_unknown_models_and_settings_show_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        tl.compare("digits", ["vae", "nope"], out=tmp_path / "out")
    with pytest.raises(UsageError, match="unknown setting"):
        tl.compare("digits", ["vae"], settings={"vae": {"nope": 1}}, out=tmp_path / "out")
    with pytest.raises(UsageError, match="not compared"):
        tl.compare("digits", ["vae"], settings={"nsf": {}}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_the_workers_own(tmp_path: Path) -> None:
    """A child of a process with a large resident set must not report its parent's."""
    ballast = np.ones(2**27, dtype=np.uint8)
    code = "from trilemma.comparison.worker import _peak_memory; x = bytearray(2**26); print(_peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert ballast.sum() == 2**27
    assert 64 < float(done.stdout) < own
