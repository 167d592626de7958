"""Examples to be scored by a fitted model: read for the model's own spec, in the order of the source, unsplit."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError, unknown_name
from trilemma.core.score import Score
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.core.storage import MANIFEST
from trilemma.core.support import describe_support, off_support

if TYPE_CHECKING:
    import pandas as pd

MANY = 64
"""How many samples are drawn where nobody says."""


@dataclass(frozen=True)
class Examples:
    """Examples of a spec.

    Attributes:
        x: (N, *spec.shape) in data units.
        condition: theirs, or None.
        names: one each (a file, a row), the impossible ones' included.
        impossible: what has probability zero and is not in x: its place among the names -> why.
    """

    x: Tensor
    condition: Tensor | None
    names: list[str]
    impossible: Mapping[int, str] = field(default_factory=dict)


def load_examples(source: str, spec: DataSpec, impossible: bool = False, *, label: str | None = None) -> Examples:
    """Read everything that `source` holds as data of `spec`.

    Arguments:
        source: a table, an array file, a picture or a folder of pictures; of a built-in data set, the held-out
            test split.
        impossible: leave out the rows of a table that are off the support of the model's data, and say why, in
            place of the error.
        label: the column (table) or array (.npz) of the classes or another condition, for conditional models.

    Raises:
        DataError: the source does not hold data of this spec, or something in it cannot be read.
    """
    from trilemma.data.arrays import is_idx
    from trilemma.data.builtin import BUILTINS, load_builtin

    path = Path(source).expanduser()
    if source.startswith("hf://"):
        raise UsageError("scoring hf:// data is not supported: download them, and give the files")
    if not path.exists():
        if source not in BUILTINS:
            raise unknown_name("data", source, sorted(BUILTINS))
        data = load_builtin(source)
        batch = data.test.head(len(data.test))
        return Examples(batch.x, batch.condition, [f"test {i}" for i in range(len(batch.x))])
    if (path / MANIFEST).is_file():
        raise UsageError(f"{path} is a saved data set or model: score the files that the data came from")
    if spec.kind == "table":
        return _rows(path, spec, impossible, label)
    if path.suffix.lower() in (".npy", ".npz") or (path.is_file() and is_idx(path)):
        return _arrays(path, spec, label)
    if label is not None:
        raise UsageError(f"label={label!r} has no effect: {path} is a folder of pictures")
    return _pictures(path, spec)


def _rows(path: Path, spec: DataSpec, impossible: bool, label: str | None) -> Examples:
    from trilemma.data.given import read_condition, text_columns
    from trilemma.data.table_files import open_table
    from trilemma.data.tables import read_rows

    given = spec.condition.columns if spec.condition is not None else ()
    frame, _ = open_table(path, text_columns((*spec.columns, *given)))
    reasons = _impossible_rows(spec, frame) if impossible else {}
    names = [f"row {i}" for i in range(1, len(frame) + 1)]
    if reasons and spec.condition is not None and any(c.name in frame.columns for c in given):
        read_condition(spec.condition, frame)  # while its errors still count the rows of the file
    if len(reasons) == len(frame):
        return Examples(torch.empty(0, *spec.shape, dtype=torch.float64), None, names, reasons)
    x, condition = read_rows(spec, frame.drop(index=list(reasons)), label=label)
    return Examples(x, condition, names, reasons)


def _impossible_rows(spec: DataSpec, frame: pd.DataFrame) -> dict[int, str]:
    """The rows with a value that its column cannot have, by its grid, values or categories, and why."""
    why: dict[int, list[str]] = {}
    for column in spec.columns:
        if column.name not in frame.columns:
            continue  # absent columns are said where the rows are read
        series = frame[column.name]
        grid = column.resolution is not None
        unlike = f"training had {describe_support(column)}" if grid else "never seen in training"
        missing = series.isna().to_numpy() & (not column.missing)
        for i in missing.nonzero()[0].tolist():
            why.setdefault(i, []).append(f"{column.name} is missing, and never was in training")
        for i in _off_support(column, series).nonzero()[0].tolist():
            value = series.iloc[i]
            shown = f"{value:.12g}" if isinstance(value, float) else str(value)
            why.setdefault(i, []).append(f"{column.name} = {shown}: {unlike}")
    return {i: "; ".join(why[i]) for i in sorted(why)}


def _off_support(column: Column, series: pd.Series[Any]) -> np.ndarray:
    """Which values (N,) of a table are neither missing nor possible."""
    from trilemma.data.frames import column_values

    if column.kind in ("numeric", "date"):
        anything = column.model_copy(update={"missing": True, "values": (), "resolution": None})
        return off_support(column, torch.from_numpy(column_values(anything, series))).numpy()
    if column.categories:
        known = series.isin(column.categories) | series.astype(str).isin([str(c) for c in column.categories])
    else:
        known = series.astype(str).str.lower().isin(["true", "false", "1", "0", "1.0", "0.0"])
    return (~known & series.notna()).to_numpy(dtype=bool)


def _arrays(path: Path, spec: DataSpec, label: str | None) -> Examples:
    from trilemma.data.arrays import interpret, read_array_file

    content = read_array_file(path, label)
    if content.test is not None:
        raise UsageError(f"{path} holds a training and a test set: save the one to be scored in a file of its own")
    x, kind, levels = interpret(content.data.x, path.name)
    if kind != spec.kind or levels != spec.levels:
        raise DataError(f"{path} holds {kind} data of shape {x.shape[1:]}, the model was made for {spec.describe()}")
    names = [str(i) for i in range(len(x))]
    return Examples(torch.from_numpy(x), _array_condition(content.data.y, spec, len(x), path.name), names)


def _array_condition(values: Any, spec: DataSpec, n: int, name: str) -> Tensor | None:
    from trilemma.data.conditions import read_values

    if values is None or spec.condition is None:
        return None
    if len(values) != n:
        raise DataError(f"{name}: {n} examples, but {len(values)} conditions")
    if spec.condition.kind == "class":
        return _codes([str(v) for v in values], spec)
    condition, found = read_values(values, spec.condition.kind, spec.kind, name)
    if found.value_shape != spec.condition.value_shape:
        raise DataError(
            f"{name}: the condition is {found.describe()}, the model was made for {spec.condition.describe()}"
        )
    return condition


def load_condition(path: Path, condition: ConditionSpec, n: int | None) -> Tensor:
    """The conditions of n samples from a file, (n, *value_shape), which holds one for each or one for all.

    Arguments:
        path: a .npy or .npz file; or a table with the columns that the condition was made of.
        n: None for as many as the file holds, and `MANY` where it holds one.

    Raises:
        UsageError: no such file, or it holds another number or shape of conditions.
        DataError: the file cannot be read, or holds no numbers.
    """
    from trilemma.data.arrays import read_condition_file
    from trilemma.data.load import TABLE_ENDINGS

    if condition.columns and path.name.lower().endswith(TABLE_ENDINGS):
        from trilemma.data.given import read_condition_table

        rows = read_condition_table(path, condition)
        n = n or (len(rows) if len(rows) > 1 else MANY)
        if len(rows) not in (1, n):
            raise UsageError(f"{path} holds {len(rows)} conditions: give one for all, or one for each of the {n} (-n)")
        return rows.expand(n, *rows.shape[1:])
    values = read_condition_file(path)
    one = condition.value_shape
    n = n or (len(values) if values.ndim == len(one) + 1 and len(values) > 1 else MANY)
    if values.dtype.kind not in "uifb":
        raise DataError(f"{path} has dtype {values.dtype}: numbers are needed")
    if values.shape not in (one, (1, *one), (n, *one)):
        raise UsageError(
            f"{path} holds an array of shape {values.shape}; the condition is {condition.describe()}: "
            f"give one for all, {one}, or one for each of the {n} samples (-n), {(n, *one)}"
        )
    values = values if values.dtype in (np.uint8, np.float32) else values.astype(np.float64)
    return torch.from_numpy(np.broadcast_to(values, (n, *one)).copy())


def _pictures(path: Path, spec: DataSpec) -> Examples:
    from trilemma.data._decode import Options, PictureFile
    from trilemma.data._store import decode_pictures
    from trilemma.data.pictures import Listing, list_folder, make_storage

    if spec.kind != "image" or not spec.is_8bit:
        raise DataError(f"{path} holds pictures, the model was made for {spec.describe()}")
    listing = Listing() if path.is_file() else list_folder(path)
    files = [path] if path.is_file() else [entry.path for entry in listing.entries]
    if not files:
        raise DataError(f"{path} holds no pictures")
    channels, height, width = spec.shape
    storage = make_storage([str(f) for f in files], None, channels, 2**40, None, wanted=False)
    options = Options(size=height if height == width else None, channels=channels)
    decoded = decode_pictures([PictureFile(str(f), f) for f in files], options, storage)
    hidden = [s for s in listing.skipped if Path(s.where).name.startswith(".")]
    bad = (*[s for s in listing.skipped if s not in hidden], *decoded.skipped)
    if bad:
        first = bad[0]
        raise DataError(f"{len(bad)} file(s) cannot be scored, such as {first.where}: {first.reason}")
    kept = [files[i] for i in decoded.kept]
    names = [f.name if path.is_file() else str(f.relative_to(path)) for f in kept]
    folders = [f.parent.name if path.is_file() else f.relative_to(path).parts[0] for f in kept]
    return Examples(torch.from_numpy(decoded.pixels), _codes(folders, spec), names)


def _codes(labels: Sequence[str] | None, spec: DataSpec) -> Tensor | None:
    """Class indices of names; None where the names are not all classes of the spec."""
    if labels is None or spec.condition is None or spec.condition.kind != "class":
        return None
    index = {name: i for i, name in enumerate(spec.condition.names)}
    return torch.tensor([index[n] for n in labels]) if all(n in index for n in labels) else None


def write_scores(
    scores: Score, spec: DataSpec, names: Sequence[str], path: Path, more: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """One line per example: its name, log-likelihood in nats, the same per dimension, and what kind of number it is.

    Arguments:
        more: further columns, name -> value of every example; None is an empty cell.
    """
    more = more or {}
    per_dim = scores.per_dim(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["example", "log_likelihood_nats", per_dim.unit, "kind", "stderr_nats", *more])
        errors = [math.nan] * len(names) if scores.stderr is None else scores.stderr.tolist()
        for i, row in enumerate(zip(names, scores.value.tolist(), per_dim.value.tolist(), errors, strict=True)):
            name, nats, dim, error = row
            error = "" if math.isnan(error) else repr(error)
            writer.writerow([name, repr(nats), repr(dim), scores.kind, error, *[values[i] for values in more.values()]])
