"""One model of a comparison in a process of its own: `python -m trilemma.comparison.worker JOB.json`.

A process of its own makes peak memory the model's own, lets the others go on when one crashes, and lets the
comparison stop one that overruns. What it finds is left in the job's folder: `stage.json` while it works,
`samples/NAME/` (the final weights', the last weights', those on the way, those of the sampler's other settings) and
`result.json` when it is done. A job that was interrupted goes on from what is there.
"""

from __future__ import annotations

import inspect
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trilemma.comparison.speed import measure_latency, measure_speed
from trilemma.core.config import Config
from trilemma.core.errors import BudgetError, TrilemmaError
from trilemma.core.model import GenerativeModel
from trilemma.core.registry import create
from trilemma.core.storage import (
    load_model,
    parse_tensors,
    read_manifest,
    replace_file,
    staged_folder,
    to_json,
    write_manifest,
    write_tensors,
)
from trilemma.data import Dataset, load_data
from trilemma.engine import Run, resume, train
from trilemma.engine.checkpoint import folder_of
from trilemma.engine.run import read_json
from trilemma.engine.runtime import choose_device
from trilemma.metrics import load_extractor
from trilemma.metrics.catalogue import describe, plain
from trilemma.metrics.evaluate import kl_by_quadrature
from trilemma.metrics.path_length import perceptual_path_length

MAX_SAMPLES = 2000
"""Samples that are measured, at most."""

SCORED = 1000
"""Held-out examples whose likelihood is taken, at most."""

PATHS = 256
"""Paths between codes whose length is taken."""

FINAL, OTHER = "final", "other"


class Job(Config):
    """What a worker is to do.

    Attributes:
        data: what `load_data` takes.
        origin: what the run's data.json names as its source, where that is not `data` (which was sent along).
        run: a finished run to measure, or None to train one.
        extractor: folder of the feature extractor.
        snapshots: weights kept while training, for the curve over wall-clock time.
    """

    model: str
    settings: dict[str, Any]
    data: dict[str, Any]
    budget: float
    seed: int
    samples: int
    folder: str
    extractor: str
    snapshots: int = 0
    origin: dict[str, Any] | None = None
    run: str | None = None


def main(path: str, watched: bool = False) -> None:
    """Work off the job described in a JSON file.

    Arguments:
        watched: end when standard input does: when the comparison that holds its other end is killed, nobody else
            may find this process still training in the folder.
    """
    if watched:
        threading.Thread(target=_end_with_input, daemon=True).start()
    job = Job.model_validate_json(Path(path).read_bytes())
    folder = Path(job.folder)
    try:
        result = {"status": "ok", "reason": None, **work(job, folder)}
    except BudgetError as error:
        result = {"status": "out_of_budget", "reason": str(error), "metrics": {}}
    except Exception as error:  # whatever it is, the others go on, and the row says what it was
        reason = str(error) if isinstance(error, TrilemmaError) else f"{type(error).__name__}: {error}"
        result = {"status": "failed", "reason": " ".join(reason.split())[:500], "metrics": {}}
    replace_file(folder / "result.json", to_json(result))


def work(job: Job, folder: Path) -> dict[str, Any]:
    """Train, sample, score and time one model."""
    data = load_data(**job.data)
    if job.origin is not None:
        data = replace(data, source=job.origin)
    enter(folder, "training")
    run = _run(job, data, folder)
    if run.status["state"] != "finished":  # asked to stop: no result, so the job goes on next time
        raise SystemExit(128 + int(run.status.get("signal") or signal.SIGTERM))
    memory = _remember_memory(folder) if job.run is None else None
    device = choose_device("auto")
    model = run.model().to(device)
    test = data.test.head(max(job.samples, SCORED))
    condition = test.condition if model.condition is not None else None
    drawing = _Drawing(job, folder, condition)
    enter(folder, "sampling")
    drawing.draw(FINAL, model)
    history = _draw_history(run, drawing, device)
    other = _draw_other(run, model, drawing)
    curve = _draw_curve(model, drawing)
    metrics = {
        "training_seconds": plain("training_seconds", run.status["elapsed"], "wall clock"),
        "parameters": plain("parameters", _learned_numbers(model), "count", kind="exact"),
    }
    if memory is not None:
        method = "largest resident set, or GPU memory, while training"
        metrics["peak_memory"] = plain("peak_memory", memory, method)
    enter(folder, "timing")
    metrics |= measure_speed(model, condition)
    enter(folder, "scoring")
    if "log_prob" in model.abilities():
        score = model.log_prob(test.x[:SCORED], None if condition is None else condition[:SCORED])
        about = {"kind": score.kind, "shared": score.shared}
        drawing.keep("scores", {"nats": score.value}, about)
        if data.density is not None and model.condition is None:
            number, kind = kl_by_quadrature(data.density, model)
            metrics["kl"] = describe("kl", number, kind=kind)
    if model.has_prior() and data.spec.kind != "table" and model.condition is None:
        extractor = load_extractor(Path(job.extractor))
        ends = [model.sample_codes(PATHS, generator=seed) for seed in (2 * job.seed, 2 * job.seed + 1)]
        length = perceptual_path_length(lambda z: model.decode(z, rounded=False), ends[0], ends[1], extractor.smooth)
        metrics["path_length"] = describe("path_length", length, extractor=extractor.id)
    return {
        "metrics": {name: e.model_dump(mode="json") for name, e in metrics.items()},
        "seed": run.train_config.seed,
        "conditional": model.condition is not None,
        "history": history,
        "other": other,
        "curve": curve,
        "advice": [event["message"] for event in run.events() if event["event"] == "advice"],
        "best_step": run.status.get("best_step"),
        "step": run.status["step"],
    }


def enter(folder: Path, stage: str) -> None:
    """Say what the worker is doing since when, for the process that watches it."""
    replace_file(folder / "stage.json", to_json({"stage": stage, "since": time.time()}))


def read_samples(folder: Path, name: str = FINAL) -> Tensor:
    """The samples (N, *shape) that a job left under a name."""
    return _read(folder / "samples" / name)["x"]


def read_scores(folder: Path) -> tuple[Tensor, dict[str, Any]] | None:
    """Log-likelihoods (N,) of held-out examples in nats and what they are, or None where the model has none."""
    path = folder / "samples" / "scores"
    if not path.exists():
        return None
    manifest, _ = read_manifest(path)
    return _read(path)["nats"], {"kind": manifest["kind"], "shared": float(manifest["shared"])}


def _read(path: Path) -> dict[str, Tensor]:
    _, content = read_manifest(path)
    return parse_tensors(content["samples.safetensors"], path)


class _Drawing:
    """Draws samples for the same held-out conditions with the same seed, and keeps them."""

    def __init__(self, job: Job, folder: Path, condition: Tensor | None) -> None:
        self.job, self.folder = job, folder
        self.condition = None if condition is None else condition[: job.samples]

    def draw(self, name: str, model: GenerativeModel, **settings: Any) -> None:
        if not (self.folder / "samples" / name).exists():
            x = model.sample(self.job.samples, self.condition, generator=self.job.seed, **settings).cpu()
            self.keep(name, {"x": x}, {"seed": self.job.seed})

    def keep(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        path = self.folder / "samples" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with staged_folder(path) as stage:
                write_tensors(stage / "samples.safetensors", tensors)
                write_manifest(stage, about)


def _draw_history(run: Run, drawing: _Drawing, device: torch.device) -> list[dict[str, Any]]:
    """Samples of the weights on the way: [{"step", "seconds", "samples"}]."""
    found = []
    for record in run.metrics():
        path = folder_of(run.snapshots, record["step"])
        if record.get("kind") != "snapshot" or not path.exists():
            continue
        name = f"step-{record['step']}"
        drawing.draw(name, load_model(path).to(device))
        found.append({"step": record["step"], "seconds": record["seconds"], "samples": name})
    return found


def _draw_other(run: Run, model: GenerativeModel, drawing: _Drawing) -> Literal["best", "last"] | None:
    """Samples of the last weights where the model holds the best validated ones, and the other way round."""
    best = run.status.get("best_step")
    if best is None or best >= run.status["step"]:
        return None
    other: Literal["best", "last"] = "best" if model.overrides("held_out_loss") else "last"
    drawing.draw(OTHER, run.model(other).to(model.device))
    return other


def _draw_curve(model: GenerativeModel, drawing: _Drawing) -> dict[str, Any] | None:
    """Samples at each setting of the sampler's knob, with the time for a single one."""
    knob = model.knob()
    if knob is None:
        return None
    name, values = knob
    default = inspect.signature(model._sample).parameters[name].default
    points = []
    for value in sorted({*values, default}):
        samples = FINAL if value == default else f"{name}-{value:g}"
        drawing.draw(samples, model, **{name: value})
        latency = measure_latency(model, drawing.condition, **{name: value})
        metrics = {key: e.model_dump(mode="json") for key, e in latency.items()}
        points.append({"setting": value, "default": value == default, "samples": samples, "metrics": metrics})
    return {"knob": name, "points": points}


def _run(job: Job, data: Dataset, folder: Path) -> Run:
    if job.run is not None:
        return Run(job.run)
    path = folder / "run"
    if (path / "config.yaml").exists():
        return resume(path, data, show=False)
    model = create(job.model, data.spec, **job.settings)
    more = {} if model.is_closed_form() else {"snapshots": job.snapshots}
    return train(model, data, out=path, show=False, seed=job.seed, previews=0, budget=job.budget, **more)


def _learned_numbers(model: GenerativeModel) -> float:
    return float(sum(t.numel() for t in model.state_dict().values()))


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage also counts the process that this one was forked from
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _remember_memory(folder: Path) -> float:
    """Peak memory of training; a job that goes on after training must not report that of loading the data."""
    file = folder / "memory.json"
    if not file.exists():
        replace_file(file, to_json({"mebibytes": _peak_memory()}))
    return float(read_json(file)["mebibytes"])


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], watched="--watched" in sys.argv[2:])
