"""What a data set is, as JSON: for `trilemma check` and for the folder of a run."""

from __future__ import annotations

from typing import Any

import torch

from trilemma.data.dataset import Dataset, get_conditions


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Name, kind, shape, counts, classes, columns, what was skipped or is worth knowing: all JSON-able."""
    spec, report, condition = dataset.spec, dataset.report, dataset.spec.condition
    description: dict[str, Any] = {
        "name": dataset.name,
        "kind": spec.kind,
        "shape": list(spec.shape),
        "levels": spec.levels,
        "summary": spec.describe(),
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "condition": None if condition is None else condition.model_dump(mode="json"),
        "captions": bool(dataset.captions),
        "known_density": dataset.density is not None,
        "duplicates": report.duplicates,
        "leaked": report.leaked,
        "skipped": len(report.skipped),
        "notes": list(report.notes),
        "fingerprint": dataset.fingerprint,
        "source": dict(dataset.source),
    }
    if condition is not None and condition.kind == "class":
        counts = {
            name: torch.bincount(get_conditions(split), minlength=condition.size).tolist()
            for name, split in dataset.splits.items()
        }
        description["classes"] = {
            split: dict(zip(condition.names, values, strict=True)) for split, values in counts.items()
        }
    if spec.kind == "table":
        description["columns"] = [
            {
                "name": column.name,
                "kind": column.kind,
                "dtype": column.dtype,
                "categories": len(column.categories),
                "missing": column.missing,
                "resolution": column.resolution,
                "values": len(column.values),
                "discrete": column.is_discrete,
            }
            for column in spec.columns
        ]
    return description
