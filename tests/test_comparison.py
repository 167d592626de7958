"""The comparison end to end on small budgets, its report, and what becomes of models that fail."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import trilemma as tl
from trilemma.comparison import jobs
from trilemma.comparison.cluster import read_folder, write_folder
from trilemma.comparison.compare import compare_runs
from trilemma.comparison.report import Report, Row, format_cell, rank
from trilemma.comparison.verdicts import alarms, compare_pairs, pareto, skills, telling
from trilemma.comparison.worker import Job
from trilemma.core.errors import TrilemmaError, UsageError
from trilemma.core.noise import Noise, make_generator
from trilemma.metrics import Estimate, fit_extractor
from trilemma.metrics.evaluate import Evaluator
from trilemma.metrics.uncertain import Source, Uncertain, mean


@pytest.fixture(scope="module")
def toy_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    data = tl.load_data("two-moons")
    report = tl.compare(data, ["kde", "gmm", "nsf"], budget="8s", out=folder, show=False)
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
        assert (folder / row.runs[0] / "config.yaml").exists()
        assert (folder / str(row.samples)).exists()
    assert Report.load(folder).rows == report.rows


@pytest.mark.slow
def test_the_page_needs_nothing_else(toy_report: tuple[Report, Path]) -> None:
    _, folder = toy_report
    page = (folder / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 4
    assert all("alt=" in image for image in images)


@pytest.mark.slow
def test_a_finished_comparison_is_not_repeated(toy_report: tuple[Report, Path], monkeypatch: Any) -> None:
    report, folder = toy_report

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished job was started again")

    monkeypatch.setattr(jobs, "watch", refuse)
    again = tl.compare("two-moons", ["kde", "gmm", "nsf"], budget="8s", out=folder, show=False)
    assert again.rows == report.rows
    with pytest.raises(UsageError, match="another comparison"):
        tl.compare("two-moons", ["kde"], budget="8s", out=folder, show=False)


@pytest.mark.slow
def test_the_toys_known_answers(toy_report: tuple[Report, Path]) -> None:
    """KL by quadrature is the excess of the held-out likelihood over the entropy; good models beat the floor."""
    report, _ = toy_report
    data = tl.load_data("two-moons")
    truth = float(data.density.log_density(data.test.head(1000).x).mean()) / 2.0
    for name in ("kde", "gmm", "nsf"):
        metrics = report.row(name).metrics
        excess = 2.0 * (truth - metrics["log_likelihood"].value)
        assert metrics["kl"].kind == "exact"
        assert metrics["kl"].value == pytest.approx(excess, abs=0.1)
        assert metrics["overall"].value > 1.5 * report.row("floor").metrics["overall"].value
    assert report.row("ceiling").metrics["overall"].value == pytest.approx(1.0, abs=0.1)
    assert report.row("nsf").curve[-1].default
    assert [p.setting for p in report.row("nsf").curve] == [0.6, 0.7, 0.8, 0.9, 1.0]
    low, high = report.row("nsf").curve[0].metrics, report.row("nsf").curve[-1].metrics
    assert low["clipped_coverage"].value < high["clipped_coverage"].value  # a low temperature drops what is rare
    assert {m.step for m in report.row("nsf").history} == {m.step for m in sorted_by_time(report.row("nsf").history)}
    assert len(report.row("nsf").history) >= 2
    assert set(report.pareto) == {"kde", "gmm", "nsf"}
    assert max(report.pareto.values()) > 0.3
    density = next(a for a in report.advice if a.purpose == "density and anomaly detection")
    assert density.model == max(("kde", "gmm", "nsf"), key=lambda m: report.row(m).metrics["log_likelihood"].value)
    assert next(a for a in report.advice if a.purpose == "latent editing").model == "nsf"


def sorted_by_time(history: list[Any]) -> list[Any]:
    return sorted(history, key=lambda m: m.seconds)


@pytest.mark.slow
def test_finished_runs_are_put_side_by_side(toy_report: tuple[Report, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Runs of a comparison and a run made elsewhere, without training again; runs on other data are refused."""
    report, folder = toy_report
    data = tl.load_data("two-moons")
    model = tl.create("gmm", data.spec, components=3)
    model.fit(data, out=tmp_path / "gmm", show=False)
    again = compare_runs([folder, tmp_path / "gmm"], out=tmp_path / "out", show=False)
    assert {r.model for r in again.rows} == {"ceiling", "kde", "gmm", "nsf", "gmm-2", "floor"}
    for name in ("kde", "gmm", "nsf"):  # the same weights, seeds and held-out data
        for metric in ("overall", "frechet", "log_likelihood"):
            assert again.row(name).metrics[metric] == report.row(name).metrics[metric]
    tl.create("gmm", tl.load_data("ring").spec).fit("ring", out=tmp_path / "ring", show=False)
    with pytest.raises(UsageError, match="other data"):
        compare_runs([folder, tmp_path / "ring"], out=tmp_path / "no", show=False)
    with pytest.raises(UsageError, match="neither a run folder nor a comparison"):
        compare_runs([tmp_path], out=tmp_path / "no", show=False)


@pytest.mark.slow
def test_seeds_widen_the_errors_by_the_spread_of_trainings(tmp_path: Path) -> None:
    report = tl.compare("two-moons", ["gmm"], budget="2s", seeds=3, out=tmp_path / "out", show=False)
    row = report.row("gmm")
    assert row.seeds == [0, 1, 2]
    assert len(row.runs) == 3
    assert "3 training seeds" in row.metrics["overall"].method
    assert row.metrics["overall"].ci is not None
    assert not any("another seed" in doubt for advice in report.advice for doubt in advice.doubts)


@pytest.mark.slow
def test_failures_have_rows_and_the_others_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    """A model whose worker fails; one that overruns is stopped; data in memory are handed over."""
    data = tl.load_data(torch.randn(300, 2, generator=torch.Generator().manual_seed(0)))
    original = jobs.prepare

    def sabotage(job: Any) -> Path:
        wrong = {"source": str(tmp_path / "nowhere")}
        return original(job.model_copy(update={"data": wrong}) if job.model == "gmm" else job)

    monkeypatch.setattr(jobs, "prepare", sabotage)
    monkeypatch.setattr(jobs, "_overrun", _slow_nsf)
    report = tl.compare(data, ["kde", "gmm", "nsf"], budget="2s", out=tmp_path / "out", show=False)
    assert report.row("kde").status == "ok"
    assert report.row("gmm").status == "failed"
    assert "nowhere" in str(report.row("gmm").reason)
    assert report.row("nsf").status == "out_of_budget"
    assert report.row("nsf").metrics == {}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "out of budget" in page


def _slow_nsf(folder: Path, budget: float) -> str | None:
    return "training took more than 0 s" if folder.name.startswith("nsf") and (folder / "stage.json").exists() else None


@pytest.mark.slow
def test_a_cluster_gives_the_same_report(toy_report: tuple[Report, Path], tmp_path: Path) -> None:
    """Two workers of a local Ray cluster: the same samples, hence the same numbers of closed-form models."""
    pytest.importorskip("ray")
    here, _ = toy_report
    there = tl.compare("two-moons", ["kde", "gmm"], budget="4s", out=tmp_path / "out", show=False, cluster="local")
    for name in ("kde", "gmm", "floor"):
        for metric in ("overall", "frechet"):
            ours, theirs = (r.row(name).metrics[metric].value for r in (here, there))
            assert theirs == pytest.approx(ours, rel=1e-9)
    assert (tmp_path / "out" / there.row("kde").runs[0] / "model").exists()
    assert json.loads((tmp_path / "out" / there.row("kde").runs[0] / "data.json").read_text())["source"] == {
        "source": "two-moons"
    }


def test_files_from_a_cluster_stay_in_their_folder(tmp_path: Path) -> None:
    with pytest.raises(TrilemmaError, match="leads out"):
        write_folder(tmp_path / "job", {"../outside": b"x"})
    write_folder(tmp_path / "job", {"a/b": b"1", "result.json": b"{}"})
    assert read_folder(tmp_path / "job") == {"a/b": b"1", "result.json": b"{}"}


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Evaluator:
    data = tl.load_data("digits")
    return Evaluator(data, fit_extractor(data.train, data.spec, seed=0), None, len(data.test))


def generated(kind: str, seed: int) -> torch.Tensor:
    """Samples of a made-up model of the digits: real validation digits stand for a good model's."""
    data = tl.load_data("digits")
    g = make_generator("made-up", kind, seed)
    n = len(data.test)
    fresh = torch.cat([data.validation.head(10_000).x, data.test.head(n).x])
    x = fresh[torch.randint(len(fresh), (n,), generator=g)].clone()
    x = (x.double() + torch.randn(x.shape, generator=g).double()).round().clamp(0, 16).to(torch.uint8)
    if kind == "copycat":
        copies = data.train.batch(torch.randperm(len(data.train), generator=g)[: n // 4]).x
        x[: len(copies)] = copies
    if kind == "collapsed":
        x = x[:1].repeat(n, 1, 1, 1)
        noise = torch.randint(0, 2, x.shape, generator=g).to(torch.uint8)
        x = (x + noise).clamp(max=16)
    if kind == "underfitted":
        x = torch.randint(0, 17, x.shape, generator=g).to(torch.uint8)
    return x


@pytest.mark.parametrize(
    ("kind", "word", "others"),
    [
        ("copycat", "Memorization", ("Collapsed", "Underfitted")),
        ("collapsed", "Collapsed", ("Memorization", "Underfitted")),
        ("underfitted", "Underfitted", ("Memorization", "Collapsed")),
        ("good", "", ("Memorization", "Collapsed", "Underfitted")),
    ],
)
def test_bad_models_are_named_as_what_they_are(
    digits: Evaluator, kind: str, word: str, others: tuple[str, ...]
) -> None:
    measured = digits.measure(generated(kind, 0))
    found = " ".join(alarms(measured.metrics, {}, [measured.copying], 8))
    assert word in found
    for other in others:
        assert other not in found


def test_a_tenth_of_copies_is_found_among_the_digits(digits: Evaluator) -> None:
    """At the alarm's own level for eight models, in at least 7 of 8 seeds; and without copies in none of 8."""
    data = tl.load_data("digits")
    n = len(data.test)
    found = quiet = 0
    for seed in range(8):
        x = generated("good", seed)
        copies = data.train.batch(torch.randperm(len(data.train), generator=make_generator("tenth", seed))[: n // 10]).x
        for part, copied in ((x, False), (torch.cat([copies, x[len(copies) :]]), True)):
            measured = digits.measure(part)
            alarm = any(a.startswith("Memorization") for a in alarms(measured.metrics, {}, [measured.copying], 8))
            found += alarm and copied
            quiet += not alarm and not copied
    assert found >= 7
    assert quiet == 8


def test_metrics_tell_floor_from_ceiling_or_do_not_or_cannot() -> None:
    def number(value: float, spread: float | None) -> Uncertain:
        contrasts = None if spread is None else Source(torch.tensor([spread, -spread]).double(), 19)
        return Uncertain(value, {} if contrasts is None else {"reference": contrasts})

    floor = {"recall": number(0.0, 0.0), "precision": number(0.5, 0.3), "density": number(0.1, None)}
    ceiling = {"recall": number(1.0, 0.0), "precision": number(0.5, 0.1), "density": number(0.9, None)}
    assert telling(floor, ceiling) == {"recall": True, "precision": False, "density": None}


def test_a_finite_likelihood_beats_an_infinite_one() -> None:
    def line(values: torch.Tensor) -> tuple[dict[str, Uncertain], Estimate]:
        finite = bool(values.isfinite().all())
        number = mean(values, "reference") if finite else Uncertain(-math.inf, {}, {"reference": len(values)})
        return {"log_likelihood": number}, number.estimate(unit="nats/dim", kind="exact")

    good, bad = line(torch.randn(50, generator=make_generator(0))), line(torch.tensor([-1.0, -math.inf]))
    (pair,) = compare_pairs({"good": good[0], "bad": bad[0]}, {"good": good[1], "bad": bad[1]})
    assert pair.better == "good"


@pytest.mark.slow
def test_no_worker_outlives_a_killed_comparison(tmp_path: Path) -> None:
    """SIGKILL in the middle of training; the worker ends by itself, and the same command goes on to the end."""
    arguments = ["compare", "two-moons", "--models", "vae", "--budget", "8s", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "trilemma", *arguments]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = tmp_path / "out" / "runs" / "vae-seed0" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60.0
    while not status.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.kill()
    first.wait()
    time.sleep(2.0)
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.exists()]
    assert not [c for c in running if str(tmp_path).encode() in c]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in status.read_text().splitlines()]
    assert steps[-1] == max(steps)


def test_bounds_decide_only_what_they_prove() -> None:
    def line(value: float, kind: Any) -> tuple[dict[str, Uncertain], Estimate]:
        number = mean(torch.full((50,), value) + 0.01 * torch.randn(50, generator=make_generator(value)), "reference")
        return {"log_likelihood": number}, number.estimate(unit="nats/dim", kind=kind)

    lines = {
        "exact": line(-1.0, "exact"),
        "bound": line(-2.0, "lower_bound"),
        "worse": line(-3.0, "exact"),
        "loose": line(-4.0, "lower_bound"),
    }
    pairs = compare_pairs({k: v[0] for k, v in lines.items()}, {k: v[1] for k, v in lines.items()})
    found = {(p.a, p.b): p.better for p in pairs}
    assert found[("exact", "worse")] == "exact"
    assert found[("bound", "worse")] == "bound"  # even its lower bound is better than the other's exact value
    assert found[("exact", "bound")] is None  # the bound's true value may be anything above
    assert found[("worse", "loose")] is None
    assert found[("bound", "loose")] is None


def test_the_pareto_front_of_known_numbers() -> None:
    def line(quality: float, coverage: float, source: str) -> dict[str, Uncertain]:
        noise = Source(torch.tensor([0.01, -0.01]).double(), 19)
        return {
            "clipped_density": Uncertain(quality, {source: noise}),
            "clipped_coverage": Uncertain(coverage, {source: noise}),
        }

    front = pareto(
        {"a": line(0.9, 0.3, "a"), "b": line(0.5, 0.8, "b"), "c": line(0.4, 0.2, "c"), "d": line(0.9, 0.3, "d")}
    )
    assert front["b"] == 1.0
    assert front["c"] == 0.0
    # a and d differ by one normal error each, the same in both axes: either is dominated half of the time
    assert front["a"] == pytest.approx(0.5, abs=0.05)
    assert front["a"] + front["d"] == pytest.approx(1.0, abs=1e-9)


def estimate(value: float, se: float | None = 0.1, **more: Any) -> Estimate:
    settings = {"n": 10, "unit": "share", "higher_is_better": True, "method": "test", "ci": None, **more}
    return Estimate(value=value, se=se, **settings)


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
    def row(model: str, overall: float | None) -> Row:
        metrics = {} if overall is None else {"overall": estimate(overall)}
        status: Any = "failed" if overall is None else "ok"
        return Row(model=model, family="x", status=status, seeds=[0], metrics=metrics)

    order = rank([row("floor", 1.0), row("bad", None), row("b", 3.0), row("a", 5.0), row("ceiling", 0.0)])
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


def test_fresh_draws_of_the_truth_have_skill_one_and_the_floor_none() -> None:
    """Skill of the clipped metrics and of the classifiers; five draws, so a false alarm has odds of about 1e-3."""
    data = tl.load_data("eight-gaussians")
    n = 500
    evaluator = Evaluator(data, fit_extractor(data.train, data.spec, seed=0), None, n)
    ceiling = evaluator.measure(data.train.head(n).x).metrics
    columns = [data.train.head(n).x[torch.randperm(n, generator=make_generator("column", i)), i] for i in range(2)]
    floor = evaluator.measure(torch.stack(columns, 1)).metrics
    for seed in range(5):
        x = data.density.sample(n, Noise("fresh", seed, n=n)).x.float()
        found = skills(evaluator.measure(x).metrics, floor, ceiling)
        assert {"overall", "clipped_density", "clipped_coverage", "auc_nonlinear"} <= found.keys()
        for name in ("overall", "clipped_density", "auc_nonlinear"):
            assert abs(found[name].value - 1.0) < 4.0 * found[name].se
    assert skills(floor, floor, ceiling)["overall"].value == 0.0
    assert "frechet" not in telling(floor, ceiling) or not telling(floor, ceiling)["frechet"]


def test_one_job_at_a_time_on_each_gpu(tmp_path: Path, monkeypatch: Any) -> None:
    """Two GPUs, five jobs: two at once, never two on one GPU; a job that is done is not repeated."""
    busy: set[Any] = set()
    most, seen = 0, []

    def fake_watch(folder: Path, budget: float, gpu: int | None, stop: Any) -> None:
        nonlocal most
        assert gpu not in busy
        busy.add(gpu)
        most = max(most, len(busy))
        seen.append(folder.name)
        time.sleep(0.05)
        (folder / "result.json").write_text('{"status": "ok", "reason": null, "metrics": {}}')
        busy.remove(gpu)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(jobs, "watch", fake_watch)
    every = [
        Job(
            model="vae",
            settings={},
            data={},
            budget=1.0,
            seed=i,
            samples=8,
            folder=str(tmp_path / f"j{i}"),
            extractor="",
        )
        for i in range(5)
    ]
    said: list[str] = []
    jobs.run_here(every, said.append)
    assert most == 2
    assert sorted(seen) == [f"j{i}" for i in range(5)]
    assert any("on GPU 1" in line for line in said)
    jobs.run_here(every, said.append)
    assert len(seen) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert jobs._visible(1) == "7"


@pytest.mark.slow
def test_a_table_is_compared_by_its_columns_too(tmp_path: Path) -> None:
    """A good model of a table fits columns and correlations and predicts; the floor fits columns only."""
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, 900)
    frame = pd.DataFrame({"a": a, "b": 2.0 * a + 0.3 * rng.normal(0, 1, 900), "c": np.where(a > 0, "high", "low")})
    report = tl.compare(tl.load_data(frame), ["gmm"], budget="2s", out=tmp_path / "out", show=False)
    gmm, floor, ceiling = (report.row(name) for name in ("gmm", "floor", "ceiling"))
    for row in (gmm, floor, ceiling):
        assert set(row.columns) == {"a", "b", "c"}
        assert row.metrics["column_fit"].value > 0.85
    assert floor.metrics["correlation_difference"].value > 0.4
    assert gmm.metrics["correlation_difference"].value < 0.05
    assert ceiling.metrics["tstr"].value > 0.8
    assert gmm.metrics["tstr"].value > 0.7
    assert floor.metrics["tstr"].value < 0.2
    assert "Fit of each column" in (tmp_path / "out" / "report.html").read_text()
