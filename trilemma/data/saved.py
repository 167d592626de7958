"""Data sets saved as folders of tensors, for another process or a resumed run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilemma.core.errors import CheckpointError, UsageError
from trilemma.core.spec import DataSpec
from trilemma.core.storage import MANIFEST, parse_tensors, read_manifest, staged_folder, write_manifest, write_tensors
from trilemma.data.dataset import SPLITS, DataReport, Dataset, Skipped, TensorSplit
from trilemma.data.toys import TOYS

KIND = "dataset"
TENSORS = "data.safetensors"


def save_dataset(dataset: Dataset, folder: str | Path) -> None:
    """Save a data set in memory to a folder that does not exist or is empty; `load_data(folder)` gives it back.

    Raises:
        UsageError: the data set streams from the disk: load it again from its `source` instead.
        CheckpointError: the folder exists or cannot be written.
    """
    folder = Path(folder)
    tensors = {}
    for name, split in dataset.splits.items():
        if not isinstance(split, TensorSplit):
            raise UsageError(
                f"{dataset.name} streams from the disk and is not saved: load it again from its source, "
                f"load_data(**{dict(dataset.source)})"
            )
        tensors[f"{name}.x"] = split.x
        if split.condition is not None:
            tensors[f"{name}.condition"] = split.condition
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"cannot save to {folder}: it exists already; give a new folder")
    with staged_folder(folder) as stage:
        write_tensors(stage / TENSORS, tensors)
        write_manifest(stage, _header(dataset))


def _header(dataset: Dataset) -> dict[str, Any]:
    report = dataset.report
    return {
        "kind": KIND,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "spec": dataset.spec.model_dump(mode="json"),
        "toy": dataset.source.get("source") if dataset.density is not None else None,
        "captions": {split: list(texts) for split, texts in dataset.captions.items()},
        "report": {
            "skipped": [[s.where, s.reason] for s in report.skipped],
            "duplicates": report.duplicates,
            "leaked": report.leaked,
            "notes": list(report.notes),
        },
    }


def is_saved(folder: Path) -> bool:
    """Whether `save_dataset` wrote this folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def load_saved(folder: Path, source: Mapping[str, Any]) -> Dataset:
    """Load what `save_dataset` wrote: the same splits, spec, name, report and fingerprint.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    header, content = read_manifest(folder)
    try:
        tensors = parse_tensors(content[TENSORS], folder / TENSORS)
        report = header["report"]
        toy = TOYS.get(header["toy"])
        return Dataset(
            spec=DataSpec.model_validate(header["spec"]),
            name=header["name"],
            fingerprint=header["fingerprint"],
            source=source,
            report=DataReport(
                tuple(Skipped(where, reason) for where, reason in report["skipped"]),
                report["duplicates"],
                report["leaked"],
                tuple(report["notes"]),
            ),
            density=toy,
            captions={split: tuple(texts) for split, texts in header["captions"].items()},
            **{name: TensorSplit(tensors[f"{name}.x"], tensors.get(f"{name}.condition")) for name in SPLITS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is no complete saved data set: {error}") from error
