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
from trilemma.comparison.worker import OTHER, Job, read_samples, read_scores
from trilemma.core import registry
from trilemma.core.errors import TrilemmaError
from trilemma.core.noise import make_generator
from trilemma.core.score import Score
from trilemma.data import Dataset
from trilemma.data.render import preview_png
from trilemma.engine.run import describe_environment, read_json
from trilemma.metrics import Estimate, FeatureExtractor
from trilemma.metrics.catalogue import METRICS, describe
from trilemma.metrics.distances import nearest
from trilemma.metrics.evaluate import Evaluator, Measured, distinct, log_likelihood
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
    abilities: frozenset[str] = frozenset()
    numbers: dict[str, Uncertain] = field(default_factory=dict)
    copying: list[NeighbourTest] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


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
        # They are training examples, so what is said of copies is said of held-out ones instead.
        numbers = dict(measured.metrics) | self.evaluator.distances.measure(self.evaluator.held_out)
        numbers = {k: u.renamed({"generated": "ceiling"}) for k, u in numbers.items()}
        columns = _describe_columns(measured.columns)
        row = _row("ceiling", REFERENCE, "ok", metrics=self.evaluator.describe(numbers), columns=columns)
        self.ceiling = _Line(row, numbers=numbers)

    def measure_floor(self, jobs: Sequence[Job]) -> None:
        """The model "independent"."""
        self.floor = self._line("floor", REFERENCE, jobs)

    def measure(self, label: str, model: str, jobs: Sequence[Job]) -> None:
        """One model and its seeds."""
        entry = registry.find(model)
        self.lines[label] = self._line(label, entry.family, jobs)
        self.lines[label].abilities = frozenset(entry.model.abilities())

    def _line(self, label: str, family: str, jobs: Sequence[Job]) -> _Line:
        results = [read_json(Path(job.folder) / "result.json") for job in jobs]
        seeds = [result.get("seed", job.seed) for job, result in zip(jobs, results, strict=True)]
        runs = [str(Path(job.run or Path(job.folder) / "run")) for job in jobs]
        row = _row(label, family, *_worst(results), seeds=seeds, runs=[_relative(r, self.folder) for r in runs])
        if row.status != "ok":
            return _Line(row)
        try:
            return self._measured(row, jobs, results)
        except Exception as error:  # one row must not take the others down
            what = str(error) if isinstance(error, TrilemmaError) else f"{type(error).__name__}: {error}"
            return _Line(row.model_copy(update={"status": "failed", "reason": f"it could not be measured: {what}"}))

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
        which = [result.get("other") for result in results]
        with_other = [f for f, weights in zip(folders, which, strict=True) if weights]
        other = _pool([self.evaluator.measure(read_samples(f, OTHER)).metrics for f in with_other], row.model)
        x = read_samples(folders[0])
        update: dict[str, Any] = {
            "metrics": {name: metrics[name] for name in METRICS if name in metrics},
            "samples": self.grid(row.model, x[: self._shown]),
            "columns": _describe_columns(found[0].columns),
            "conditional": any(result.get("conditional") for result in results),
        }
        if row.family != REFERENCE:
            update |= {
                "other": self.evaluator.describe(other),
                "other_weights": next(filter(None, which), None),
                "curve": self._curve(folders[0], results[0]),
                "history": self._history(folders[0], results[0], found[0]),
                "neighbours": self._neighbours(row.model, x, found[0]),
            }
        copying, advice = [m.copying for m in found], _advice([result.get("advice", ()) for result in results])
        return _Line(row.model_copy(update=update), numbers=numbers, copying=copying, advice=advice)

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
        return GRID if self.data.spec.kind in ("image", "volume") else 1000

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
        test_distance, which_test = nearest(measured.features, 1, e.held_out)
        pictures: list[str | None] = [None, None]
        if self.data.spec.kind in ("image", "volume"):
            for i, (name, real, d, index) in enumerate(
                (
                    ("train", self.data.train, distance, which[:, 0]),
                    ("test", self.data.test, test_distance[:, 0], which_test[:, 0]),
                )
            ):
                closest = d.argsort(stable=True)[:CLOSEST]
                pairs = torch.cat([x[closest], real.batch(index[closest]).x])
                pictures[i] = self.grid(f"{label}-nearest-{name}", pairs, len(closest))
        return Neighbours(
            train=pictures[0],
            test=pictures[1],
            edges=edges.tolist(),
            generated=counts[0],
            held_out=counts[1],
            share=measured.copying.share,
            expected=measured.copying.expected,
            p_value=measured.copying.p_value,
            verdict="",  # it depends on how many models are compared; `report` writes it
        )

    # -- the report --------------------------------------------------------------------------------------------------

    def report(self, settings: Mapping[str, Any], budget: float | None) -> Report:
        """All rows with skills, alarms, pairs and advice; `budget` in seconds, where the models were trained here."""
        assert self.ceiling is not None
        assert self.floor is not None
        numbers = {label: line.numbers for label, line in self.lines.items() if line.numbers}
        for line in self.lines.values():
            if line.numbers:
                line.row = self._judged(line, len(numbers))
        metrics = {label: self.lines[label].row.metrics for label in numbers}
        conditional = frozenset(label for label in numbers if self.lines[label].row.conditional)
        plain = {  # log p(x | label) is another number than log p(x)
            label: {k: u for k, u in found.items() if k != "log_likelihood" or label not in conditional}
            for label, found in numbers.items()
        }
        kinds = {label: found["log_likelihood"] for label, found in metrics.items() if "log_likelihood" in found}
        pairs = verdicts.compare_pairs(plain, kinds)
        advice = verdicts.advise(
            verdicts.Evidence(
                numbers=numbers,
                metrics=metrics,
                abilities={label: self.lines[label].abilities for label in numbers},
                pairs=pairs,
                alarms={label: self.lines[label].row.alarms for label in numbers},
                floor=self.floor.numbers,
                conditional=conditional,
                single=frozenset(label for label in numbers if len(self.lines[label].row.seeds) == 1),
            )
        )
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
            notes=self._notes(budget),
            pareto=verdicts.pareto(numbers),
            disagreements=verdicts.disagreements(numbers),
            advice=advice,
            real_samples=self.grid("held-out", self.evaluator.test.x[: self._shown]),
            folder=str(self.folder),
        )

    def _judged(self, line: _Line, models: int) -> Row:
        """The row with its skills, alarms and the verdict on copying."""
        assert self.ceiling is not None
        assert self.floor is not None
        skill = verdicts.skills(line.numbers, self.floor.numbers, self.ceiling.numbers)
        described = {
            name: u.estimate(unit="skill", extractor=self.evaluator.provenance(name)["extractor"], split="test")
            for name, u in skill.items()
        }
        update: dict[str, Any] = {
            "skill": described,
            "alarms": [*verdicts.alarms(line.numbers, skill, line.copying, models), *line.advice],
        }
        if line.row.neighbours is not None:
            level = verdicts.memorization_level(models, len(line.copying))
            verdict = line.copying[0].caveat(level)
            update["neighbours"] = line.row.neighbours.model_copy(update={"verdict": verdict})
        return line.row.model_copy(update=update)

    def _notes(self, budget: float | None) -> list[str]:
        """What limits the comparison as a whole."""
        assert self.ceiling is not None
        assert self.floor is not None
        notes = []
        useful = verdicts.telling(self.floor.numbers, self.ceiling.numbers)
        blind = [f"“{METRICS[name].title}”" for name, tells in useful.items() if tells is False]
        if blind:
            notes.append(
                f"No skill can be given in {', '.join(blind)}: independent dimensions (the floor) already score like "
                "real data there."
            )
        unknown = [name for name, tells in useful.items() if tells is None]
        if "overall" in unknown:
            notes.append(
                f"{self.n} held-out examples are too few for intervals of quality and coverage: no order is certain."
            )
        repeated = 1.0 - len(distinct(self.evaluator.test.x)) / self.n
        if repeated > 0.1:
            notes.append(
                f"{repeated:.0%} of the held-out examples repeat others: coverage, which is calibrated for continuous "
                "data, can exceed 1."
            )
        if budget is not None:
            taken = {m: line.row.metrics["training_seconds"].value for m, line in self.lines.items() if line.numbers}
            late = [f"{m} ({seconds:.0f} s)" for m, seconds in taken.items() if seconds > 1.1 * budget + 1.0]
            if late:
                notes.append(f"More than the budget was taken by {', '.join(late)}: a closed form cannot be cut short.")
        for label, line in self.lines.items():
            if line.row.conditional:
                notes.append(f"{label} is given the held-out data's labels: its classes are theirs.")
        return notes


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


def _advice(by_seed: Sequence[Sequence[str]]) -> list[str]:
    """What the runs themselves found wrong; of several seeds, which."""
    if len(by_seed) == 1:
        return list(by_seed[0])
    return [f"Run {i}: {advice}" for i, found in enumerate(by_seed) for advice in found]
