"""Labels, captions and attributes of pictures, as the Hugging Face imagefolder convention writes them.

A `metadata.csv` or `metadata.jsonl` has a column `file_name`, a path relative to its own folder. `text` or
`caption` is the caption; `label` (or the column that `label=` names) the class; every other column of numbers or
of true and false is an attribute.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trilemma.core.errors import DataError, unknown_name

FILE_NAMES = ("metadata.csv", "metadata.jsonl")
CAPTIONS = ("text", "caption")
WORDS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Metadata:
    """What metadata files say of pictures.

    Attributes:
        rows: from a picture's absolute path to its row.
        label, caption: the columns that hold them, if any.
        attributes: names of the columns of numbers.
        unused: names of the other columns.
    """

    rows: dict[Path, dict[str, Any]] = field(default_factory=dict)
    label: str | None = None
    caption: str | None = None
    attributes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def label_of(self, path: Path) -> str | None:
        value = self.rows.get(path, {}).get(self.label or "")
        return None if value is None or value == "" else str(value)

    def caption_of(self, path: Path) -> str:
        value = self.rows.get(path, {}).get(self.caption or "")
        return "" if value is None else str(value)

    def attributes_of(self, path: Path) -> list[float] | str:
        """The values, or why there are none."""
        values = []
        for name in self.attributes:
            value = to_number(self.rows.get(path, {}).get(name))
            if value is None:
                return f"no value of the attribute {name!r} in its metadata"
            values.append(value)
        return values


def read_metadata(files: Sequence[Path], label: str | None) -> Metadata:
    """Read all metadata files of a folder.

    Raises:
        DataError: a file cannot be read, has no `file_name`, names a picture twice or lacks columns of another.
        UsageError: there is no column `label`.
    """
    rows: dict[Path, dict[str, Any]] = {}
    columns: list[str] = []
    for file in files:
        if file.with_name(FILE_NAMES[0]) in files and file.name == FILE_NAMES[1]:
            raise DataError(f"{file.parent} holds both metadata.csv and metadata.jsonl; keep one")
        for number, row in enumerate(_read(file), 1):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise DataError(f"{file}: row {number} has no file_name, the path of its picture")
            path = file.parent / name
            if path in rows:
                raise DataError(f"{file}: row {number} names {name!r} a second time")
            rows[path] = row
            columns += [c for c in row if c not in columns]
    if label is not None and label not in columns:
        raise unknown_name("metadata column", label, columns)
    label = label or ("label" if "label" in columns else None)
    caption = next((c for c in CAPTIONS if c in columns and c != label), None)
    rest = [c for c in columns if c not in (label, caption)]
    attributes = tuple(c for c in rest if _is_numeric([row.get(c) for row in rows.values()]))
    return Metadata(rows, label, caption, attributes, tuple(c for c in rest if c not in attributes))


def to_number(value: Any) -> float | None:
    """A finite number from a number, a truth value or its text; None from anything else."""
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_numeric(values: Sequence[Any]) -> bool:
    given = [v for v in values if v is not None and v != ""]
    return bool(given) and all(to_number(v) is not None for v in given)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                reader = csv.DictReader(lines, strict=True)
                names = reader.fieldnames or []
                if len(set(names)) < len(names):
                    raise DataError(f"{file}: two columns have the same name")
                rows: list[dict[str, Any]] = [{k: v for k, v in row.items() if k is not None} for row in reader]
            else:
                rows = [json.loads(line) for line in lines if line.strip()]
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: every line must be a JSON object with a file_name")
    return rows
