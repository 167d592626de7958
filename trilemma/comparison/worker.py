"""One model of a comparison in a process of its own: `python -m trilemma.comparison.worker JOB.json`.

A process of its own makes peak memory the model's own, lets the others go on when one crashes, and lets the
comparison stop one that overruns. What it finds is left in the job's folder: `stage.json` while it works,
`samples.safetensors` and `result.json` when it is done. A job whose run was interrupted goes on from it.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma.core.config import Config
from trilemma.core.errors import BudgetError, TrilemmaError
from trilemma.core.model import GenerativeModel
from trilemma.core.registry import create
from trilemma.core.storage import replace_file, staged_folder, to_json, write_manifest, write_tensors
from trilemma.data import Dataset, load_data
from trilemma.engine import Run, resume, train
from trilemma.engine.run import read_json
from trilemma.metrics import Estimate, mean_log_likelihood

MAX_SAMPLES = 2000
"""Samples that are measured, at most."""

SCORED = 1000
"""Held-out examples whose likelihood is taken, at most."""

BATCHES = (64, 512, 2048)
"""Batch sizes tried for the sampling speed."""

SPEED_SECONDS = 3.0
"""Time for the repetitions at the best batch size; no larger one is tried after a trial of half of it."""


class Job(Config):
    """What a worker is to do."""

    model: str
    settings: dict[str, Any]
    data: dict[str, Any]
    budget: float
    seed: int
    samples: int
    folder: str


def main(path: str) -> None:
    """Work off the job described in a JSON file."""
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
    enter(folder, "training")
    run = _train(job, data, folder / "run")
    if run.status["state"] != "finished":  # asked to stop: no result, so the job goes on next time
        raise SystemExit(128 + int(run.status.get("signal") or signal.SIGTERM))
    memory = _remember_memory(folder)
    model = run.model()
    if torch.cuda.is_available():
        model.cuda()
    enter(folder, "sampling")
    test = data.test.head(max(job.samples, SCORED))
    condition = test.condition if model.condition is not None else None
    x = model.sample(job.samples, None if condition is None else condition[: job.samples], generator=job.seed).cpu()
    out = folder / "samples"
    if not out.exists():
        with staged_folder(out) as stage:
            write_tensors(stage / "samples.safetensors", {"x": x})
            write_manifest(stage, {"seed": job.seed})
    metrics = {
        "training_seconds": _plain(run.status["elapsed"], "s", "wall clock"),
        "parameters": _plain(_learned_numbers(model), "numbers", "count", kind="exact"),
        "peak_memory": _plain(memory, "MiB", "largest resident set, or GPU memory, while training"),
    }
    enter(folder, "timing")
    metrics |= _speed(model, condition)
    if "log_prob" in model.abilities():
        enter(folder, "scoring")
        score = model.log_prob(test.x[:SCORED], None if condition is None else condition[:SCORED])
        metrics["log_likelihood"] = mean_log_likelihood(score, data.spec)
    return {"metrics": {name: e.model_dump(mode="json") for name, e in metrics.items()}, "seed": job.seed}


def enter(folder: Path, stage: str) -> None:
    """Say what the worker is doing since when, for the process that watches it."""
    replace_file(folder / "stage.json", to_json({"stage": stage, "since": time.time()}))


def _train(job: Job, data: Dataset, path: Path) -> Run:
    if (path / "config.yaml").exists():
        return resume(path, data, show=False)
    model = create(job.model, data.spec, **job.settings)
    return train(model, data, out=path, show=False, seed=job.seed, previews=0, budget=job.budget)


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


def _speed(model: GenerativeModel, condition: Tensor | None) -> dict[str, Estimate]:
    """Samples per second at the best of `BATCHES`, and seconds for a single sample: medians after a warm-up."""
    _seconds(model, 1, condition)
    latency = _median([_seconds(model, 1, condition) for _ in range(5)])
    best, trial = 1, latency
    for batch in BATCHES:
        seconds = _seconds(model, batch, condition)
        if seconds / batch < trial / best:
            best, trial = batch, seconds
        if seconds > SPEED_SECONDS / 2:
            break
    repetitions = max(3, min(10, int(SPEED_SECONDS / max(trial, 1e-3))))
    times = [_seconds(model, best, condition) for _ in range(repetitions)]
    return {
        "samples_per_second": _plain(best / _median(times), "1/s", f"median of {repetitions}, batch size {best}"),
        "latency": _plain(latency, "s", "median of 5, batch size 1"),
    }


def _seconds(model: GenerativeModel, batch: int, condition: Tensor | None) -> float:
    c = None if condition is None else condition[torch.arange(batch) % len(condition)]
    start = time.perf_counter()
    model.sample(batch, c, generator=0, batch_size=batch).cpu()
    return time.perf_counter() - start


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _plain(value: float, unit: str, method: str, kind: Any = "estimate") -> Estimate:
    better = unit == "1/s"
    return Estimate(
        value=float(value), se=None, ci=None, n=1, unit=unit, kind=kind, higher_is_better=better, method=method
    )


if __name__ == "__main__":
    main(sys.argv[1])
