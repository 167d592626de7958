"""`compare`: equal training budgets, held-out data, one page.

Every model trains in a process of its own (worker.py), one after the other, so that timings are not disturbed.
Then this process measures all samples in the features of one extractor, fitted on the real training split, between
two reference rows: the ceiling (real training data in the place of samples) and the floor (the model "independent").
A comparison that was killed goes on where it stopped when it is started again with the same folder.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma.comparison.report import REFERENCE, Report, Row, Status, rank
from trilemma.comparison.worker import MAX_SAMPLES, Job
from trilemma.core import registry
from trilemma.core.errors import CheckpointError, TrilemmaError, UsageError
from trilemma.core.noise import make_generator
from trilemma.core.storage import MANIFEST, parse_tensors, read_manifest, replace_file, to_json
from trilemma.data import Dataset, load_data, save_dataset
from trilemma.data.render import preview_png
from trilemma.engine.config import parse_duration
from trilemma.engine.run import describe_environment, read_json
from trilemma.metrics import Estimate, FeatureExtractor, evaluate_samples, fit_extractor, load_extractor
from trilemma.metrics.estimate import t_interval

DEFAULT_MODELS = ("histogram", "kde", "gmm", "rbm", "vae", "nsf", "r3gan", "ddpm")
FLOOR = "independent"
DEFAULT_BUDGET = "60s"
GRID = 64
PATIENCE = {"training": 1.5, "sampling": 3.0, "timing": 3.0, "scoring": 3.0}
"""How many budgets (and a minute) each stage may take before the model counts as out of budget."""


def compare(
    data: Any,
    models: Sequence[str] | None = None,
    *,
    budget: str | float = DEFAULT_BUDGET,
    seeds: int = 1,
    out: str | Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    show: bool = True,
) -> Report:
    """Train several models on the same data for the same time and measure them on held-out data.

    Arguments:
        data: a `Dataset`, or anything that `load_data` takes.
        models: registered names; by default one strong model of each family that can model these data.
        budget: training time of each model and seed; closed-form models stop when they are done.
        seeds: training seeds 0 .. seeds - 1; intervals then include the spread over training runs.
        out: folder for report.json, report.html, sample grids and runs; by default compare-DATA. An interrupted
            comparison with the same settings is continued.
        settings: settings of single models, {"vae": {"latent_dim": 8}}.
        show: say on stderr what is going on.

    Raises:
        UsageError: unknown models or settings, or `out` holds another comparison.
    """
    data = data if isinstance(data, Dataset) else load_data(data)
    names = _choose(data, models)
    settings = settings or {}
    for name in settings:
        if name not in names:
            raise UsageError(f"settings for {name!r}, which is not compared; compared are: {', '.join(names)}")
    for name in names:
        registry.create(name, data.spec, **settings.get(name, {}))  # a wrong setting shows before any work
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    folder = Path(out) if out is not None else Path(f"compare-{data.name}")
    plan = {
        "fingerprint": data.fingerprint,
        "models": list(names),
        "budget": parse_duration(budget),
        "seeds": seeds,
        "settings": {k: dict(v) for k, v in settings.items()},
        "samples": min(len(data.test), MAX_SAMPLES),
    }
    _claim(folder, plan)
    return Comparison(data, folder, plan, show).run()


def _choose(data: Dataset, models: Sequence[str] | None) -> list[str]:
    if models is None:
        return [n for n in DEFAULT_MODELS if data.spec.kind in registry.find(n).model.data_kinds]
    names = list(dict.fromkeys(models))
    if not names:
        raise UsageError(f"no models to compare; there are: {', '.join(sorted(registry.entries()))}")
    for name in names:
        registry.find(name)
    return names


def _claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder, or find that it holds the same comparison."""
    file = folder / "plan.json"
    if file.exists():
        before = read_json(file)
        different = sorted(k for k in plan if before.get(k) != json.loads(json.dumps(plan[k])))
        if different:
            raise UsageError(
                f"{folder} holds another comparison (different: {', '.join(different)}); give another folder with --out"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and holds something else; give another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, to_json(plan))


class Comparison:
    """The work of one `compare`."""

    def __init__(self, data: Dataset, folder: Path, plan: Mapping[str, Any], show: bool) -> None:
        self.data, self.folder, self.plan, self.show = data, folder, plan, show
        self.n: int = plan["samples"]

    def run(self) -> Report:
        """Train what is not trained yet, measure everything, write the report."""
        extractor = self._extractor()
        reference = self.data.test.head(self.n).x
        ceiling = self._ceiling(extractor, reference)  # first: data that cannot be measured are not trained on
        source = self._shareable_source()
        names = [*self.plan["models"], *([] if FLOOR in self.plan["models"] else [FLOOR])]
        jobs = [(name, seed) for name in names for seed in range(self.plan["seeds"])]
        for number, (name, seed) in enumerate(jobs, start=1):
            self._train(name, seed, source, f"[{number}/{len(jobs)}]")
        self._say("measuring")
        rows = [self._row(name, extractor, reference) for name in self.plan["models"]]
        floor = self._row(FLOOR, extractor, reference)
        floor = floor.model_copy(update={"model": "floor", "family": REFERENCE})
        report = Report(
            data={
                "name": self.data.name,
                "description": self.data.spec.describe(),
                "fingerprint": self.data.fingerprint,
                "splits": {k: len(s) for k, s in self.data.splits.items()},
                "notes": list(self.data.report.notes),
                "skipped": len(self.data.report.skipped),
            },
            settings={
                "budget": f"{self.plan['budget']:g} s",
                "seeds": list(range(self.plan["seeds"])),
                "samples": self.n,
                "models": self.plan["settings"],
            },
            extractor={"id": extractor.id, "dim": extractor.dim, "description": extractor.describe()},
            environment=describe_environment(),
            rows=rank([ceiling, *rows, floor]),
            real_samples=self._grid("held-out", reference),
            folder=str(self.folder),
        )
        report.save(self.folder / "report.json")
        report.save(self.folder / "report.html")
        return report

    def _say(self, message: str) -> None:
        if self.show:
            print(message, file=sys.stderr, flush=True)

    def _shareable_source(self) -> dict[str, Any]:
        """What a worker passes to `load_data`; data in memory are saved first."""
        if self.data.source:
            return dict(self.data.source)
        path = self.folder / "data"
        if not (path / MANIFEST).exists():
            save_dataset(self.data, path)
        return {"source": str(path.resolve())}

    # -- training --------------------------------------------------------------------------------------------------

    def job_folder(self, name: str, seed: int) -> Path:
        return self.folder / "runs" / f"{name}-seed{seed}"

    def _train(self, name: str, seed: int, source: Mapping[str, Any], number: str) -> None:
        folder = self.job_folder(name, seed)
        if (folder / "result.json").exists():
            self._say(f"{number} {name}, seed {seed}: already there")
            return
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(
            model=name,
            settings=self.plan["settings"].get(name, {}),
            data=dict(source),
            budget=self.plan["budget"],
            seed=seed,
            samples=self.n,
            folder=str(folder.resolve()),
        )
        replace_file(folder / "job.json", job.model_dump_json(indent=2))
        (folder / "stage.json").unlink(missing_ok=True)
        self._say(f"{number} {name}, seed {seed}: up to {self.plan['budget']:g} s of training")
        started = time.monotonic()
        overrun = self._watch(folder)
        if overrun is not None:
            replace_file(folder / "result.json", to_json({"status": "out_of_budget", "reason": overrun, "metrics": {}}))
        result = read_json(folder / "result.json")
        ending = "done" if result["status"] == "ok" else f"{result['status'].replace('_', ' ')}: {result['reason']}"
        self._say(f"{number} {name}, seed {seed}: {ending} ({time.monotonic() - started:.0f} s)")

    def _watch(self, folder: Path) -> str | None:
        """Run the worker; the reason why it was stopped, or None when it ended by itself."""
        environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        with open(folder / "worker.log", "ab") as log:
            command = [sys.executable, "-m", "trilemma.comparison.worker", str(folder / "job.json")]
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    overrun = self._overrun(folder)
                    if overrun is not None:
                        return overrun
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise TrilemmaError(f"the training of {folder.name} was stopped; the same command again goes on from there")
        if not (folder / "result.json").exists():
            tail = (folder / "worker.log").read_text(errors="replace").strip().splitlines()[-1:]
            reason = f"the process ended with code {process.returncode}. {' '.join(tail)}".strip()
            replace_file(folder / "result.json", to_json({"status": "failed", "reason": reason, "metrics": {}}))
        return None

    def _overrun(self, folder: Path) -> str | None:
        try:
            stage = read_json(folder / "stage.json")
        except CheckpointError:
            return None  # not begun yet
        limit = PATIENCE[stage["stage"]] * self.plan["budget"] + 60.0
        seconds = time.time() - stage["since"]
        if seconds <= limit:
            return None
        return f"{stage['stage']} took more than {limit:.0f} s"

    # -- measuring -------------------------------------------------------------------------------------------------

    def _extractor(self) -> FeatureExtractor:
        path = self.folder / "extractor"
        if (path / MANIFEST).exists():
            return load_extractor(path)
        self._say("fitting the feature extractor on the training split")
        extractor = fit_extractor(self.data.train, self.data.spec, seed=0)
        extractor.save(path)
        return extractor

    def _ceiling(self, extractor: FeatureExtractor, reference: Tensor) -> Row:
        """Real training examples, drawn without replacement, in the place of samples."""
        train = self.data.train
        g = make_generator("ceiling")
        pick = torch.randperm(len(train), generator=g)[: self.n]
        x = train.batch(pick).x
        if len(x) < self.n:
            return Row(
                model="ceiling",
                family=REFERENCE,
                status="failed",
                reason=f"only {len(x)} training examples for {self.n} held-out ones",
                seeds=[],
                metrics={},
            )
        metrics = evaluate_samples(x, reference, extractor)
        return Row(model="ceiling", family=REFERENCE, status="ok", seeds=[], metrics=metrics)

    def _row(self, name: str, extractor: FeatureExtractor, reference: Tensor) -> Row:
        seeds = list(range(self.plan["seeds"]))
        folders = [self.job_folder(name, seed) for seed in seeds]
        results = [read_json(folder / "result.json") for folder in folders]
        status, reason = _worst(results)
        per_seed: list[dict[str, Estimate]] = []
        if status == "ok":
            try:
                for folder, result in zip(folders, results, strict=True):
                    measured = evaluate_samples(_read_samples(folder), reference, extractor)
                    measured |= {k: Estimate.model_validate(v) for k, v in result["metrics"].items()}
                    per_seed.append(measured)
            except Exception as error:  # one row must not take the others down
                status, reason = "failed", f"it could not be measured: {error}"
        return Row(
            model=name,
            family=registry.find(name).family,
            status=status,
            reason=reason,
            seeds=seeds,
            metrics=pool_seeds(per_seed) if status == "ok" else {},
            runs=[str((f / "run").relative_to(self.folder)) for f in folders],
            samples=self._grid(name, _read_samples(folders[0])) if status == "ok" else None,
        )

    def _grid(self, name: str, x: Tensor) -> str:
        """Draw the first samples, as they come."""
        path = self.folder / "grids" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        n = GRID if self.data.spec.kind == "image" else 1000
        path.write_bytes(preview_png(x[:n], self.data.spec))
        return str(path.relative_to(self.folder))


def _worst(results: Sequence[Mapping[str, Any]]) -> tuple[Status, str | None]:
    for status in ("failed", "out_of_budget"):
        for seed, result in enumerate(results):
            if result["status"] == status:
                reason = str(result["reason"])
                return status, reason if len(results) == 1 else f"seed {seed}: {reason}"
    return "ok", None


def _read_samples(folder: Path) -> Tensor:
    _, content = read_manifest(folder / "samples")
    return parse_tensors(content["samples.safetensors"], folder)["x"]


def pool_seeds(per_seed: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """The mean over training seeds, with the larger of two standard errors.

    One seed: its own estimate. Several: the standard error of the mean over seeds, s / sqrt(S), holds the variation
    between training runs and of their samples, but not that of the held-out data, which all runs share; that is in
    each run's own standard error. The larger is reported, with Student's interval at S - 1 degrees of freedom.
    """
    if len(per_seed) == 1:
        return dict(per_seed[0])
    pooled = {}
    for name in per_seed[0]:
        estimates = [metrics[name] for metrics in per_seed]
        values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
        value = float(values.mean())
        between = float(values.std(correction=1)) / math.sqrt(len(values))
        own = [e.se for e in estimates if e.se is not None]
        se = max([between, math.sqrt(sum(s * s for s in own) / len(own))] if own else [between])
        method = f"mean over {len(values)} training seeds; each: {estimates[0].method}"
        ci = t_interval(value, se, len(values) - 1) if math.isfinite(se) else None
        pooled[name] = estimates[0].model_copy(update={"value": value, "se": se, "ci": ci, "method": method})
    return pooled
