"""`Run`: the folder that training leaves, readable by a person and by `resume`, `sample`, `score` and `evaluate`.

config.yaml        the fully resolved settings          metrics.jsonl    one record per log line, append-only
environment.json   versions and machine                 events.jsonl     rollbacks, retries, interruptions
data.json          content hash, splits, skipped files  samples/         pictures (or tables) at fixed noise
status.json        state and progress, replaced         checkpoints/     what `resume` goes on from
model/             the finished model                   best/            the weights of least validation loss
snapshots/         models on the way, where asked for
card.md            what this model is and how it was made
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError

from trilemma.core.errors import CheckpointError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.spec import DataSpec
from trilemma.core.storage import (
    MANIFEST,
    append_line,
    load_model,
    model_from_header,
    read_lines,
    read_manifest,
    replace_file,
    staged_folder,
    to_json,
    write_bytes,
)
from trilemma.data import load_data
from trilemma.data.dataset import Dataset
from trilemma.engine.checkpoint import folder_of, latest_checkpoint, list_checkpoints, read_checkpoint
from trilemma.engine.config import TrainConfig

C = TypeVar("C", bound=BaseModel)

PACKAGES = ("trilemma", "torch", "numpy", "scikit-learn", "pandas", "safetensors", "pydantic")


class Run:
    """A run folder.

    Arguments:
        path: an existing run folder; `Run.create` makes a new one.

    Raises:
        CheckpointError: there is no run at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise CheckpointError(f"{self.path} is not a run folder: it has no config.yaml")

    @classmethod
    def create(cls, path: Path, model: GenerativeModel, config: TrainConfig, data: Dataset) -> Run:
        """Make the folder and write what is known before training."""
        if path.exists() and any(path.iterdir()):
            raise UsageError(f"{path} exists and is not empty: give another folder, or resume the run that is there")
        resolved = {
            "model": model.name,
            "settings": model.config.model_dump(mode="json"),
            "spec": model.spec.model_dump(mode="json"),
            "train": config.model_dump(mode="json"),
        }
        with staged_folder(path) as stage:
            write_bytes(stage / "environment.json", to_json(describe_environment()).encode())
            write_bytes(stage / "data.json", to_json(describe_source(data)).encode())
            write_bytes(stage / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).encode())
        return cls(path)

    # -- what is in it -----------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def config(self) -> dict[str, Any]:
        """Model name, its settings, the data's spec and the training settings."""
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise CheckpointError(f"{self.path / 'config.yaml'} cannot be read: {error}") from error
        if not isinstance(content, dict) or not {"model", "settings", "spec", "train"} <= content.keys():
            raise CheckpointError(f"{self.path / 'config.yaml'} is not the configuration of a run")
        return content

    @property
    def train_config(self) -> TrainConfig:
        return self._parse(TrainConfig, "train")

    @property
    def spec(self) -> DataSpec:
        return self._parse(DataSpec, "spec")

    def _parse(self, kind: type[C], key: str) -> C:
        try:
            return kind.model_validate(self.config[key])
        except ValidationError as error:
            where = self.path / "config.yaml"
            raise CheckpointError(f"{where}: {key!r} does not fit this version: {error.errors()[0]['msg']}") from error

    def load_data(self) -> Dataset:
        """The data the run was trained on, from where they came from.

        Raises:
            UsageError: they were in memory.
        """
        source = self.data["source"]
        if not source:
            raise UsageError(f"{self.path} was trained on data in memory: pass the data again")
        return load_data(**source)

    @property
    def data(self) -> dict[str, Any]:
        """What data.json says: name, fingerprint, source, split sizes, skipped files."""
        return read_json(self.path / "data.json")

    @property
    def status(self) -> dict[str, Any]:
        """{"state": running | finished | interrupted | failed, "step": ..., "elapsed": ...}; {} before the first."""
        return read_json(self.path / "status.json") if (self.path / "status.json").exists() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """The log by step. Of steps that were run again, after a kill or a rollback, only the last run appears."""
        kept, first = [], dict[Any, float]()
        for record in reversed(read_lines(self.path / "metrics.jsonl")):
            kind, step = record.get("kind"), record.get("step", math.inf)
            if step < first.get(kind, math.inf):
                first[kind] = step
                kept.append(record)
        return sorted(kept, key=lambda record: int(record["step"]))

    def events(self) -> list[dict[str, Any]]:
        """Rollbacks, retries, interruptions and skipped checkpoints, in order."""
        return read_lines(self.path / "events.jsonl")

    # -- the model -----------------------------------------------------------------------------------------------

    def model(self, which: str = "final") -> GenerativeModel:
        """The trained model, on the CPU.

        Arguments:
            which: "final" is the finished model; of an unfinished run, the newest checkpoint's. "last" is the
                newest checkpoint's (averaged) weights, "best" those of least validation loss.

        Raises:
            CheckpointError: there is none yet, or it is damaged.
        """
        if which not in ("final", "last", "best"):
            raise UsageError(f"which model: final, last or best, not {which!r}")
        if which == "best":
            candidates = sorted(self.best.glob("step-*"))
            if not candidates:
                raise CheckpointError(f"{self.path} has no best model: this run measures no validation loss")
            return load_model(candidates[-1])
        if which == "final" and (self.path / "model" / MANIFEST).exists():
            return load_model(self.path / "model")
        checkpoint, complaints = latest_checkpoint(self.checkpoints)
        if checkpoint is None:
            raise CheckpointError(f"{self.path} has no usable checkpoint. {' '.join(complaints)}".strip())
        model = model_from_header(checkpoint.manifest, checkpoint.path)
        checkpoint.restore(model, averaged=True)
        return model

    def resume(self, data: Dataset | None = None, **settings: Any) -> Run:
        """Go on from the newest good checkpoint until the budget is spent; see `trilemma.engine.resume`."""
        from trilemma.engine.fit import resume

        return resume(self, data, **settings)

    # -- writing ---------------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        append_line(self.path / "metrics.jsonl", json.dumps(record))

    def event(self, kind: str, message: str, **details: Any) -> None:
        record = {"time": timestamp(), "event": kind, "message": message, **details}
        append_line(self.path / "events.jsonl", json.dumps(record, ensure_ascii=False))

    def set_status(self, state: str, **details: Any) -> None:
        replace_file(self.path / "status.json", to_json({"state": state, "time": timestamp(), **details}))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status.get('state', 'empty')})"


def load(path: str | Path) -> GenerativeModel:
    """Load a model from what `save` wrote, from a run folder, or from a checkpoint. No code in it is run.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        return Run(path).model()
    if (path / MANIFEST).is_file():
        manifest, _ = read_manifest(path)
        if "state" not in manifest:
            return load_model(path)
        model = model_from_header(manifest, path)
        read_checkpoint(path).restore(model, averaged=True)
        return model
    what = "does not exist" if not path.exists() else "is neither a saved model nor a run folder"
    raise CheckpointError(f"cannot load {path}: it {what}")


def new_run_folder(model: str, data: str) -> Path:
    """A folder under runs/ that does not exist: runs/vae-digits, runs/vae-digits-2, ..."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in data).strip("-.") or "data"
    base = Path("runs") / f"{model}-{safe}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def remove_newer(root: Path, step: int) -> None:
    """Remove the step folders beyond a step."""
    for path in list_checkpoints(root):
        if path.name > folder_of(root, step).name:
            shutil.rmtree(path, ignore_errors=True)


def describe_source(data: Dataset) -> dict[str, Any]:
    """For data.json."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "source": dict(data.source),
        "splits": {name: len(split) for name, split in data.splits.items()},
        "duplicates": data.report.duplicates,
        "leaked": data.report.leaked,
        "notes": list(data.report.notes),
        "skipped": [asdict(s) for s in data.report.skipped],
    }


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and benchmark results."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold an object")
    return content


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
