"""`Assembly`: from the samples that the jobs left to the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma.comparison import verdicts
from trilemma.comparison.report import REFERENCE, CurvePoint, Moment, Neighbours, Report, Row, Status, rank
from trilemma.comparison.worker import LAST, Job, read_samples, read_scores
from trilemma.core import registry
from trilemma.core.noise import make_generator
from trilemma.core.score import Score
from trilemma.data import Dataset
from trilemma.data.render import preview_png
from trilemma.engine.run import describe_environment, read_json
from trilemma.metrics import Estimate, FeatureExtractor
from trilemma.metrics.catalogue import METRICS, describe
from trilemma.metrics.distances import nearest
from trilemma.metrics.evaluate import MAX_TRAIN, Evaluator, Measured, log_likelihood
from trilemma.metrics.memorization import NeighbourTest
from trilemma.metrics.uncertain import Uncertain, mean, pool

GRID = 64
CLOSEST = 8
"""Samples shown with their nearest real neighbours."""
BINS = 24


@dataclass
class _Line:
    """What is known of one model before the report is written."""

    row: Row
    numbers: dict[str, Uncertain] = field(default_factory=dict)
    copying: list[NeighbourTest] = field(default_factory=list)


class Assembly:
    """Measures all samples of one comparison with the same yardsticks.

    Arguments:
        folder: of the comparison; pictures go to its subfolder grids.
        main, second: the extractors.
        n: examples on either side.
    """

    def __init__(self, data: Dataset, folder: Path, main: FeatureExtractor, second: FeatureExtractor, n: int) -> None:
        self.data, self.folder, self.n = data, folder, n
        self.evaluator = Evaluator(data, main, second, n, cache=folder / "features")
        self.lines: dict[str, _Line] = {}
        self.ceiling: _Line | None = None
        self.floor: _Line | None = None

    # -- measuring -------------------------------------------------------------------------------------------------

    def measure_ceiling(self) -> None:
        """Real training examples, drawn without replacement, in the place of samples."""
        train = self.data.train
        pick = torch.randperm(len(train), generator=make_generator("ceiling"))[: self.n]
        if len(pick) < self.n:
            reason = f"only {len(pick)} training examples for {self.n} held-out ones"
            self.ceiling = _Line(_row("ceiling", REFERENCE, "failed", reason=reason))
            return
        measured = self.evaluator.measure(train.batch(pick).x)
        # They are training examples: what is said of copies is not said of them.
        numbers = {k: u for k, u in measured.metrics.items() if METRICS[k].axis != "copying"}
        numbers = {k: u.renamed({"generated": "ceiling"}) for k, u in numbers.items()}
        columns = _describe_columns(measured.columns)
        row = _row("ceiling", REFERENCE, "ok", metrics=self.evaluator.describe(numbers), columns=columns)
        self.ceiling = _Line(row, numbers)

    def measure_floor(self, jobs: Sequence[Job]) -> None:
        """The model "independent"."""
        self.floor = self._line("floor", REFERENCE, jobs)

    def measure(self, label: str, model: str, jobs: Sequence[Job]) -> None:
        """One model and its seeds."""
        self.lines[label] = self._line(label, registry.find(model).family, jobs)

    def _line(self, label: str, family: str, jobs: Sequence[Job]) -> _Line:
        seeds = [job.seed for job in jobs]
        results = [read_json(Path(job.folder) / "result.json") for job in jobs]
        runs = [str(Path(job.run or Path(job.folder) / "run")) for job in jobs]
        row = _row(label, family, *_worst(results), seeds=seeds, runs=[_relative(r, self.folder) for r in runs])
        if row.status != "ok":
            return _Line(row)
        try:
            return self._measured(row, jobs, results)
        except Exception as error:  # one row must not take the others down
            return _Line(row.model_copy(update={"status": "failed", "reason": f"it could not be measured: {error}"}))

    def _measured(self, row: Row, jobs: Sequence[Job], results: Sequence[Mapping[str, Any]]) -> _Line:
        folders = [Path(job.folder) for job in jobs]
        found = [self.evaluator.measure(read_samples(folder)) for folder in folders]
        numbers = _pool([m.metrics for m in found], row.model)
        metrics = self.evaluator.describe(numbers)
        scores = [self._log_likelihood(folder) for folder in folders]
        if all(s is not None for s in scores):
            per_seed = [s for s in scores if s is not None]
            numbers["log_likelihood"] = pool([number for number, _ in per_seed], row.model)
            metrics["log_likelihood"] = describe("log_likelihood", numbers["log_likelihood"], **per_seed[0][1])
        metrics |= _pool_plain([result["metrics"] for result in results])
        with_last = [f for f, result in zip(folders, results, strict=True) if result.get("last")]
        last = _pool([self.evaluator.measure(read_samples(f, LAST)).metrics for f in with_last], row.model)
        x = read_samples(folders[0])
        update: dict[str, Any] = {
            "metrics": {name: metrics[name] for name in METRICS if name in metrics},
            "samples": self.grid(row.model, x[: self._shown]),
            "columns": _describe_columns(found[0].columns),
        }
        if row.family != REFERENCE:
            update |= {
                "last": self.evaluator.describe(last),
                "curve": self._curve(folders[0], results[0]),
                "history": self._history(folders[0], results[0], found[0]),
                "neighbours": self._neighbours(row.model, x, found[0]),
            }
        return _Line(row.model_copy(update=update), numbers, [m.copying for m in found])

    def _log_likelihood(self, folder: Path) -> tuple[Uncertain, dict[str, Any]] | None:
        scores = read_scores(folder)
        if scores is None:
            return None
        nats, about = scores
        number, kind = log_likelihood(Score(nats, about["kind"], shared=about["shared"]), self.data.spec)
        return number, kind | {"split": "test"}

    def _core(self, folder: Path, name: str, wanted: Sequence[str]) -> dict[str, Estimate]:
        numbers = self.evaluator.measure_core(read_samples(folder, name))
        return self.evaluator.describe({k: numbers[k] for k in wanted})

    def _curve(self, folder: Path, result: Mapping[str, Any]) -> list[CurvePoint]:
        curve = result.get("curve")
        if curve is None:
            return []
        points = []
        for point in curve["points"]:
            metrics = self._core(
                folder, point["samples"], ("overall", "clipped_density", "clipped_coverage", "frechet")
            )
            metrics |= {k: Estimate.model_validate(v) for k, v in point["metrics"].items()}
            points.append(
                CurvePoint(knob=curve["knob"], setting=point["setting"], default=point["default"], metrics=metrics)
            )
        return points

    def _history(self, folder: Path, result: Mapping[str, Any], final: Measured) -> list[Moment]:
        on_the_way = result.get("history", [])
        moments = [
            Moment(
                seconds=m["seconds"], step=m["step"], frechet=self._core(folder, m["samples"], ("frechet",))["frechet"]
            )
            for m in on_the_way
        ]
        if moments:
            seconds = result["metrics"]["training_seconds"]["value"]
            frechet = self.evaluator.describe({"frechet": final.metrics["frechet"]})["frechet"]
            moments.append(Moment(seconds=seconds, step=result["step"], frechet=frechet))
        return moments

    # -- pictures --------------------------------------------------------------------------------------------------

    @property
    def _shown(self) -> int:
        return GRID if self.data.spec.kind == "image" else 1000

    def grid(self, name: str, x: Tensor, columns: int | None = None) -> str:
        """Draw examples as they come; the file's path, relative to the folder."""
        path = self.folder / "grids" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(preview_png(x, self.data.spec, columns))
        return str(path.relative_to(self.folder))

    def _neighbours(self, label: str, x: Tensor, measured: Measured) -> Neighbours:
        e = self.evaluator
        to_train, which = nearest(measured.features, 1, e.train)
        distance, held_out = to_train[:, 0].sqrt(), e.distances.test
        both = torch.cat([distance, held_out])
        # The farthest hundredth would squeeze the rest into a few bins: the last bin reaches to the end.
        edges = torch.linspace(0.0, float(both.quantile(0.99)) or 1.0, BINS + 1, dtype=torch.float64)
        edges[-1] = torch.maximum(edges[-1], both.max())
        counts = [
            torch.bucketize(t, edges[1:-1], right=True).bincount(minlength=BINS).tolist() for t in (distance, held_out)
        ]
        train = self.data.train.head(MAX_TRAIN).x
        test_distance, which_test = nearest(measured.features, 1, e.held_out)
        pictures: list[str | None] = [None, None]
        if self.data.spec.kind == "image":
            for i, (name, real, d, index) in enumerate(
                (("train", train, distance, which[:, 0]), ("test", e.test.x, test_distance[:, 0], which_test[:, 0]))
            ):
                closest = d.argsort(stable=True)[:CLOSEST]
                pairs = torch.cat([x[closest], real[index[closest]]])
                pictures[i] = self.grid(f"{label}-nearest-{name}", pairs, len(closest))
        return Neighbours(
            train=pictures[0],
            test=pictures[1],
            edges=edges.tolist(),
            generated=counts[0],
            held_out=counts[1],
            share=measured.copying.share,
            p_value=measured.copying.p_value,
            verdict=measured.copying.caveat(),
        )

    # -- the report --------------------------------------------------------------------------------------------------

    def report(self, settings: Mapping[str, Any]) -> Report:
        """All rows with skills, alarms, pairs and advice."""
        assert self.ceiling is not None
        assert self.floor is not None
        numbers = {label: line.numbers for label, line in self.lines.items() if line.numbers}
        for line in self.lines.values():
            if not line.numbers:
                continue
            skill = verdicts.skills(line.numbers, self.floor.numbers, self.ceiling.numbers)
            alarms = verdicts.alarms(line.numbers, skill, line.copying, len(numbers))
            described = {
                name: u.estimate(unit="skill", extractor=self.evaluator.provenance(name)["extractor"], split="test")
                for name, u in skill.items()
            }
            line.row = line.row.model_copy(update={"skill": described, "alarms": alarms})
        metrics = {label: self.lines[label].row.metrics for label in numbers}
        kinds = {label: found["log_likelihood"] for label, found in metrics.items() if "log_likelihood" in found}
        pairs = verdicts.compare_pairs(numbers, kinds)
        warnings = {label: line.row.alarms for label, line in self.lines.items()}
        advice = verdicts.advise(numbers, metrics, self._abilities(), pairs, warnings, len(settings["seeds"]))
        main, second = self.evaluator.extractor, self.evaluator.second
        assert second is not None
        return Report(
            data={
                "name": self.data.name,
                "description": self.data.spec.describe(),
                "fingerprint": self.data.fingerprint,
                "splits": {k: len(s) for k, s in self.data.splits.items()},
                "notes": list(self.data.report.notes),
                "skipped": len(self.data.report.skipped),
            },
            settings=dict(settings),
            extractor=_describe_extractor(main),
            second=_describe_extractor(second),
            environment=describe_environment(),
            rows=rank([self.ceiling.row, *(line.row for line in self.lines.values()), self.floor.row]),
            pairs=pairs,
            notes=self._notes(),
            pareto=verdicts.pareto(numbers),
            disagreements=verdicts.disagreements(numbers),
            advice=advice,
            real_samples=self.grid("held-out", self.evaluator.test.x[: self._shown]),
            folder=str(self.folder),
        )

    def _notes(self) -> list[str]:
        assert self.ceiling is not None
        assert self.floor is not None
        useful = verdicts.telling(self.floor.numbers, self.ceiling.numbers)
        blind = [METRICS[name].title for name, tells in useful.items() if not tells]
        if not blind:
            return []
        return [
            f"Blind on these data, because independent dimensions score like real data: {', '.join(blind)}. Do not "
            "rank models by them here."
        ]

    def _abilities(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for label in self.lines:
            name = label if label in registry.entries() else label.rpartition("-")[0]
            found[label] = frozenset(registry.find(name).model.abilities())
        return found


def _describe_columns(columns: Mapping[str, Uncertain]) -> dict[str, Estimate]:
    """The fit of each column as plain data."""
    return {name: u.estimate(unit="share", split="test") for name, u in columns.items()}


def _describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        "id": extractor.id,
        "dim": extractor.dim,
        "description": extractor.describe(),
        "frechet": extractor.frechet_name,
        "notes": list(extractor.notes),
    }


def _row(
    model: str, family: str, status: Status, reason: str | None = None, seeds: Sequence[int] = (), **more: Any
) -> Row:
    return Row(model=model, family=family, status=status, reason=reason, seeds=list(seeds), **{"metrics": {}, **more})


def _relative(path: str, folder: Path) -> str:
    """A path inside the comparison's folder is written relative to it, so that the folder can be moved."""
    inside = Path(path)
    root = folder.resolve()
    return str(inside.relative_to(root)) if inside.is_relative_to(root) else path


def _worst(results: Sequence[Mapping[str, Any]]) -> tuple[Status, str | None]:
    for status in ("failed", "out_of_budget"):
        for seed, result in enumerate(results):
            if result["status"] == status:
                reason = str(result["reason"])
                return status, reason if len(results) == 1 else f"seed {seed}: {reason}"
    return "ok", None


def _pool(runs: Sequence[Mapping[str, Uncertain]], source: str) -> dict[str, Uncertain]:
    """The mean over training seeds of every metric that all of them have."""
    names = [name for name in (runs[0] if runs else {}) if all(name in run for run in runs)]
    return {name: pool([run[name] for run in runs], source) for name in names}


def _pool_plain(runs: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Costs and what workers measured: the mean over training seeds, with its own spread."""
    estimates = [{name: Estimate.model_validate(value) for name, value in run.items()} for run in runs]
    if len(estimates) == 1:
        return estimates[0]
    pooled = {}
    for name, first in estimates[0].items():
        values = torch.tensor([e[name].value for e in estimates], dtype=torch.float64)
        over = mean(values, "seeds").estimate()
        update = {"value": over.value, "se": over.se, "ci": over.ci, "quartiles": None}
        method = f"mean over {len(values)} training seeds; each: {first.method}"
        pooled[name] = first.model_copy(update=update | {"method": method})
    return pooled
