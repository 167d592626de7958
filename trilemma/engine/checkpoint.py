"""Checkpoints: everything that a run needs to go on bit for bit, in a folder that is complete or not there.

`checkpoints/step-00001000/`: model.safetensors (weights and buffers), ema.safetensors (averaged weights),
optimizer.safetensors ("objective/parameter/state"), one model.rank-R.safetensors per further process (its buffers),
and manifest.json (how to make the model, the trainer's counters, the SHA-256 of each file). No random state
is needed: every draw is a function of the seed and the step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma.core.errors import CheckpointError
from trilemma.core.model import GenerativeModel
from trilemma.core.storage import (
    MANIFEST,
    load_state,
    model_header,
    parse_tensors,
    read_manifest,
    staged_folder,
    write_manifest,
    write_tensors,
)


@dataclass
class TrainState:
    """The trainer's counters.

    Attributes:
        step: finished training steps.
        elapsed: seconds of training, over all sessions.
        lr_scale: factor on the learning rate; halved by a rollback.
        rollbacks: how often a non-finite loss or gradient sent the run back.
        accumulation: shards of the batch per process; doubled when memory runs out.
        threads: CPU threads, because they decide the order of summation.
        best_loss, best_step: smallest validation loss and where it was.
        waited: validations since then.
    """

    step: int = 0
    elapsed: float = 0.0
    lr_scale: float = 1.0
    rollbacks: int = 0
    accumulation: int = 1
    threads: int = 1
    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder, read and verified."""

    path: Path
    state: TrainState
    manifest: Mapping[str, Any]
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Tensor]

    def restore(self, model: GenerativeModel, averaged: bool = False) -> None:
        """Put the weights (or their moving average, where there is one) and the buffers into a model."""
        load_state(model, self.model, str(self.path))
        if averaged and self.ema is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.ema[name])
        model.fitted = True


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save_checkpoint(
    root: Path,
    model: GenerativeModel,
    state: TrainState,
    ema: Mapping[str, Tensor] | None,
    optimizers: Mapping[str, torch.optim.Optimizer],
    other_buffers: Sequence[Mapping[str, Tensor]] = (),
) -> Path:
    """Write the checkpoint of `state.step`; if a complete one is there already, it is kept as it is."""
    path = folder_of(root, state.step)
    if path.exists() and is_complete(path):
        return path
    shutil.rmtree(path, ignore_errors=True)
    with staged_folder(path) as stage:
        write_tensors(stage / "model.safetensors", model.state_dict())
        if ema is not None:
            write_tensors(stage / "ema.safetensors", ema)
        if optimizers:
            write_tensors(stage / "optimizer.safetensors", flatten_optimizers(optimizers))
        for rank, buffers in enumerate(other_buffers, start=1):
            write_tensors(stage / f"model.rank-{rank}.safetensors", buffers)
        write_manifest(stage, {**model_header(model), "state": asdict(state)})
    return path


def is_complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def read_checkpoint(path: Path, rank: int = 0) -> Checkpoint:
    """Read and verify; `rank` picks the buffers of that process.

    Raises:
        CheckpointError: missing or damaged.
    """
    manifest, content = read_manifest(path)
    tensors = {name: parse_tensors(data, path / name) for name, data in content.items()}
    try:
        state = TrainState(**manifest["state"])
        model = tensors["model.safetensors"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this version: {error}") from error
    model = {**model, **tensors.get(f"model.rank-{rank}.safetensors", {})}
    return Checkpoint(
        path, state, manifest, model, tensors.get("ema.safetensors"), tensors.get("optimizer.safetensors", {})
    )


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    return sorted(p for p in root.glob("step-*") if p.is_dir()) if root.is_dir() else []


def latest_checkpoint(root: Path, rank: int = 0) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that reads well, and a line on each newer one that does not."""
    complaints: list[str] = []
    for path in reversed(list_checkpoints(root)):
        try:
            return read_checkpoint(path, rank), complaints
        except CheckpointError as error:
            complaints.append(f"skipped the checkpoint {path.name}: {error}")
    return None, complaints


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for path in list_checkpoints(root)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def prune_best(best: Path, checkpoints: Path, current: int) -> None:
    """Remove best weights that neither the current state nor any checkpoint on the disk refers to."""
    needed = {current}
    for path in list_checkpoints(checkpoints):
        with contextlib.suppress(OSError, ValueError, KeyError):
            needed.add(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["state"]["best_step"])
    names = {folder_of(best, step).name for step in needed}
    for path in list_checkpoints(best):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
    for path in best.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def flatten_optimizers(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimiser states as flat names: "elbo/12/exp_avg"."""
    return {
        f"{name}/{index}/{key}": torch.as_tensor(value)
        for name, optimizer in optimizers.items()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore_optimizers(optimizers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizers`; learning rates are set by the trainer, not stored."""
    states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in optimizers}
    for flat, tensor in tensors.items():
        name, index, key = flat.rsplit("/", 2)
        if name not in states:
            raise CheckpointError(f"the checkpoint has an optimiser {name!r} that this model does not have")
        states[name].setdefault(int(index), {})[key] = tensor
    for name, optimizer in optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states[name], "param_groups": groups})
        for parameter, entry in optimizer.state.items():
            for key, value in entry.items():
                if value.shape == parameter.shape:  # in the parameter's memory layout, for fused optimisers
                    entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
