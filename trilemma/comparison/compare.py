"""`compare`: equal training budgets, held-out data, one page.

Every model trains in a process of its own (worker.py, jobs.py). Then this process measures all samples with the same
yardsticks (assemble.py), between two reference rows: the ceiling (real training data in the place of samples) and the
floor (the model "independent"). A comparison that was killed goes on where it stopped when it is started again with
the same folder. `compare_runs` puts runs side by side that are finished already.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from trilemma.comparison.assemble import Assembly
from trilemma.comparison.jobs import run_here
from trilemma.comparison.report import REFERENCE, Report
from trilemma.comparison.worker import MAX_SAMPLES, Job
from trilemma.core import registry
from trilemma.core.config import Config
from trilemma.core.errors import UsageError
from trilemma.core.storage import MANIFEST, replace_file, to_json
from trilemma.data import Dataset, load_data, save_dataset
from trilemma.engine import Run
from trilemma.engine.config import parse_duration
from trilemma.engine.run import read_json
from trilemma.metrics import FeatureExtractor, dinov2, fit_extractor, inception, load_extractor, pixel_pca

DEFAULT_MODELS = ("histogram", "kde", "gmm", "rbm", "vae", "nsf", "r3gan", "diffusion")
FLOOR = "independent"
DEFAULT_BUDGET = "60s"
SNAPSHOTS = 3
"""Weights kept on the way, of the first seed."""


class Entry(Config):
    """One line of the comparison: a model to train for every seed, or runs that are finished already."""

    label: str
    model: str
    settings: dict[str, Any] = Field(default_factory=dict)
    runs: list[str] = Field(default_factory=list)


class Plan(Config):
    """What a comparison is; kept in plan.json, so that it can go on and cannot be mixed with another.

    Attributes:
        fingerprint: of the data.
        features: of the extractor: "default", or the name of a pretrained one with its file.
        samples: on either side.
    """

    fingerprint: str
    entries: list[Entry]
    budget: float
    seeds: int
    samples: int
    features: str = "default"

    @property
    def trained(self) -> bool:
        """Whether the models are trained here."""
        return not any(e.runs for e in self.entries)


def compare(
    data: Any,
    models: Sequence[str] | None = None,
    *,
    budget: str | float = DEFAULT_BUDGET,
    seeds: int = 1,
    out: str | Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    features: str = "default",
    cluster: str | None = None,
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
        features: what distances are taken in: "default" is fitted on the training split, "inception",
            "inception:FILE.safetensors" and "dinov2:FILE.safetensors" are pretrained (see docs/extractors.md).
        cluster: address of a Ray cluster that trains the models ("local" starts one), or None for this machine.
        show: say on stderr what is going on.

    Raises:
        UsageError: unknown models or settings, or `out` holds another comparison.
    """
    data = data if isinstance(data, Dataset) else load_data(data)
    names = _choose(data, models)
    parse_features(features)
    settings = settings or {}
    for name in settings:
        if name not in names:
            raise UsageError(f"settings for {name!r}, which is not compared; compared are: {', '.join(names)}")
    for name in names:
        registry.create(name, data.spec, **settings.get(name, {}))  # a wrong setting shows before any work
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    plan = Plan(
        fingerprint=data.fingerprint,
        entries=[Entry(label=n, model=n, settings=dict(settings.get(n, {}))) for n in names],
        budget=parse_duration(budget),
        seeds=seeds,
        samples=min(len(data.test), MAX_SAMPLES),
        features=features,
    )
    folder = Path(out) if out is not None else Path(f"compare-{data.name}")
    return Comparison(data, folder, plan, show).run(cluster)


def compare_runs(
    paths: Sequence[str | Path],
    data: Any = None,
    *,
    out: str | Path | None = None,
    features: str = "default",
    show: bool = True,
) -> Report:
    """Put finished runs side by side, without training again.

    Arguments:
        paths: run folders, and folders of comparisons (all of their runs). Runs of one model with equal settings
            and different seeds make one row.
        data: the data that all were trained on; by default loaded from where the first run's came from.
        out: folder of the new comparison; by default compare-DATA-runs.

    Raises:
        UsageError: no runs, runs that are not finished, or that were trained on other data.
    """
    parse_features(features)
    runs = [run for path in paths for run in _find_runs(Path(path))]
    if not runs:
        raise UsageError("no runs to compare")
    dataset = runs[0].load_data() if data is None else data if isinstance(data, Dataset) else load_data(data)
    for run in runs:
        if run.status.get("state") != "finished":
            raise UsageError(f"{run.path} is not finished: trilemma resume {run.path}")
        if run.data["fingerprint"] != dataset.fingerprint:
            raise UsageError(f"{run.path} was trained on other data than {dataset.name}: their content hashes differ")
    entries = _group(runs)
    plan = Plan(
        fingerprint=dataset.fingerprint,
        entries=entries,
        budget=max(60.0, *(float(run.status["elapsed"]) for run in runs)),
        seeds=max(len(e.runs) for e in entries),
        samples=min(len(dataset.test), MAX_SAMPLES),
        features=features,
    )
    folder = Path(out) if out is not None else Path(f"compare-{dataset.name}-runs")
    return Comparison(dataset, folder, plan, show).run(None)


def _find_runs(path: Path) -> list[Run]:
    """The run at a path, or those of the comparison there (its floor is made anew)."""
    if (path / "config.yaml").is_file():
        return [Run(path)]
    folder = path.parent if path.name == "report.json" else path
    if not (folder / "report.json").is_file():
        raise UsageError(f"{path} is neither a run folder nor a comparison with a report.json")
    rows = [row for row in Report.load(folder).rows if row.status == "ok" and row.family != REFERENCE]
    return [Run(folder / run) for row in rows for run in row.runs]


def _group(runs: Sequence[Run]) -> list[Entry]:
    """One entry for each model and settings; entries of one model with unlike settings are numbered."""
    entries: dict[str, Entry] = {}
    labels: dict[str, int] = {}
    for run in runs:
        config = run.config
        train = {k: v for k, v in config["train"].items() if k != "seed"}
        key = json.dumps([config["model"], config["settings"], train], sort_keys=True)
        if key not in entries:
            number = labels[config["model"]] = labels.get(config["model"], 0) + 1
            label = config["model"] if number == 1 else f"{config['model']}-{number}"
            entries[key] = Entry(label=label, model=config["model"], settings=config["settings"])
        path = str(run.path.resolve())
        if path not in entries[key].runs:
            entries[key].runs.append(path)
    return list(entries.values())


def _choose(data: Dataset, models: Sequence[str] | None) -> list[str]:
    if models is None:
        return [n for n in DEFAULT_MODELS if data.spec.kind in registry.find(n).model.data_kinds]
    names = list(dict.fromkeys(models))
    if not names:
        raise UsageError(f"no models to compare; there are: {', '.join(sorted(registry.entries()))}")
    for name in names:
        registry.find(name)
    return names


class Comparison:
    """The work of one `compare`."""

    def __init__(self, data: Dataset, folder: Path, plan: Plan, show: bool) -> None:
        self.data, self.folder, self.plan, self.show = data, folder, plan, show

    def run(self, cluster: str | None) -> Report:
        """Train what is not trained yet, measure everything, write the report."""
        self._claim()
        main, second = self._extractor("extractor"), self._extractor("second")
        assembly = Assembly(self.data, self.folder, main, second, self.plan.samples)
        assembly.measure_ceiling()  # first: data that cannot be measured are not trained on
        floor = Entry(label="floor", model=FLOOR)
        jobs = {entry.label: self._jobs(entry) for entry in [*self.plan.entries, floor]}
        every = [job for seeds in jobs.values() for job in seeds]
        if cluster is None:
            run_here(every, self._say)
        else:
            from trilemma.comparison.cluster import run_on_cluster

            run_on_cluster(every, self._saved_data(), cluster, self._say)
        self._say("measuring")
        assembly.measure_floor(jobs.pop("floor"))
        for entry in self.plan.entries:
            self._say(f"measuring {entry.label}")
            assembly.measure(entry.label, entry.model, jobs[entry.label])
        report = assembly.report(self._settings(), self.plan.budget if self.plan.trained else None)
        report.save(self.folder / "report.json")
        report.save(self.folder / "report.html")
        return report

    def _settings(self) -> dict[str, Any]:
        return {
            "budget": f"{self.plan.budget:g} s" if self.plan.trained else "as trained",
            "seeds": list(range(self.plan.seeds)) if self.plan.trained else [],
            "samples": self.plan.samples,
            "models": {e.label: e.settings for e in self.plan.entries if e.settings},
        }

    def _say(self, message: str) -> None:
        if self.show:
            print(message, file=sys.stderr, flush=True)

    def _claim(self) -> None:
        """Make the folder, or find that it holds the same comparison."""
        file, plan = self.folder / "plan.json", json.loads(self.plan.model_dump_json())
        if file.exists():
            before = read_json(file)
            different = sorted(k for k in plan if before.get(k) != plan[k])
            if different:
                raise UsageError(
                    f"{self.folder} holds another comparison (different: {', '.join(different)}); "
                    "give another folder with --out"
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} exists and holds something else; give another folder with --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, to_json(plan))

    def _extractor(self, name: str) -> FeatureExtractor:
        path = self.folder / name
        if (path / MANIFEST).exists():
            return load_extractor(path)
        if name == "second":
            extractor = pixel_pca(self.data.train, self.data.spec)
        else:
            self._say("making the feature extractor")
            extractor = make_extractor(self.plan.features, self.data)
        extractor.save(path)
        return extractor

    def _jobs(self, entry: Entry) -> list[Job]:
        source = self._shareable_source()
        runs: list[str | None] = list(entry.runs) or [None] * self.plan.seeds
        return [
            Job(
                model=entry.model,
                settings=entry.settings,
                data=source,
                budget=self.plan.budget,
                seed=seed,
                samples=self.plan.samples,
                folder=str((self.folder / "runs" / f"{entry.label}-seed{seed}").resolve()),
                extractor=str((self.folder / "extractor").resolve()),
                snapshots=SNAPSHOTS if seed == 0 else 0,
                run=run,
            )
            for seed, run in enumerate(runs)
        ]

    def _shareable_source(self) -> dict[str, Any]:
        """What a worker passes to `load_data`; data in memory are saved first."""
        return dict(self.data.source) if self.data.source else {"source": str(self._saved_data().resolve())}

    def _saved_data(self) -> Path:
        path = self.folder / "data"
        if not (path / MANIFEST).exists():
            save_dataset(self.data, path)
        return path


def make_extractor(features: str, data: Dataset) -> FeatureExtractor:
    """The extractor that a name like "default", "inception" or "dinov2:FILE.safetensors" asks for."""
    name, file = parse_features(features)
    if name == "inception":
        return inception(data.spec, file)
    if name == "dinov2":
        assert file is not None
        return dinov2(data.spec, file)
    return fit_extractor(data.train, data.spec, seed=0)


def parse_features(features: str) -> tuple[str, Path | None]:
    """Name and file of an extractor.

    Raises:
        UsageError: an unknown name, or a file that is not there.
    """
    name, _, file = features.partition(":")
    if (
        name not in ("default", "inception", "dinov2")
        or (name == "default" and file)
        or (name == "dinov2" and not file)
    ):
        raise UsageError(
            f"features {features!r}: write default, inception, inception:FILE.safetensors or dinov2:FILE.safetensors"
        )
    if file and not Path(file).is_file():
        raise UsageError(f"features {features!r}: there is no file {file}")
    return name, Path(file) if file else None
