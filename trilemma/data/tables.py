"""Tables: a CSV or Parquet file or a pandas DataFrame as a `Dataset`.

`table_files` reads the file, `columns` infers what each column is, `frames` codes it as float64 and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError, unknown_name
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.data.columns import MANY, check_types, describe_column, infer_column, sort_values
from trilemma.data.dataset import DataReport, Dataset, from_tensors
from trilemma.data.frames import from_frame, is_text, to_frame
from trilemma.data.given import make_condition, read_condition, text_columns
from trilemma.data.table_files import open_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["describe_column", "from_frame", "load_table", "read_rows", "to_frame"]


def load_table(
    source: Path | str | pd.DataFrame,
    *,
    label: str | None = None,
    given: Sequence[str] | None = None,
    types: Mapping[str, str] | None = None,
    name: str = "table",
    test: Path | str | pd.DataFrame | None = None,
    source_info: Mapping[str, Any] | None = None,
) -> Dataset:
    """A table as a data set: column types inferred, rows split by content.

    Grids, values and categories are those of the whole table, test rows included: they say what a value can be.

    Arguments:
        source: a file with one of `table_files.SUFFIXES`, or a DataFrame.
        label: the column that is the class of each row; it leaves the table and becomes the condition.
        given: columns to condition on; they leave the table and become the condition (`trilemma.data.given`).
        types: column name -> "numeric", "categorical", "boolean", "date" or "drop", where inference is overruled.
        test: a test set that comes with the table; by default one is split off.
        source_info: becomes `Dataset.source`.

    Raises:
        DataError: the file or a column cannot be used.
        UsageError: an unknown file type, column or type.
        MissingExtraError: Parquet without pyarrow.
    """
    types = dict(types or {})
    frame, count, notes = _open_both(source, test, types)
    dropped = [column for column, kind in types.items() if kind == "drop"]
    notes += [f"column {column!r} was dropped as asked" for column in dropped]
    condition = codes = None
    if given is not None:
        if label is not None:
            raise UsageError("label= and given= both name what to condition on: give all of it to given=")
        codes, condition, given_notes = make_condition(frame, given, types)
        notes += given_notes
        dropped += given
    elif label is not None:
        if label not in frame.columns:
            raise unknown_name("column", label, frame.columns)
        if label in dropped:
            raise UsageError(f"column {label!r} is the label and cannot be dropped too")
        codes, condition, label_notes = _classes(frame[label])
        notes += label_notes
        dropped.append(label)
    columns, column_notes = _infer_columns(frame.drop(columns=dropped), types)
    spec = DataSpec(kind="table", shape=(len(columns),), columns=columns, condition=condition)
    x = from_frame(spec, frame.drop(columns=dropped))
    notes += column_notes + _row_number_notes(columns, x)
    held_out = None
    if test is not None:
        held_out = (x[count:], None if codes is None else codes[count:])
        notes += _test_notes(columns, x, count)
    return from_tensors(
        x[:count],
        spec,
        name=name,
        condition=None if codes is None else codes[:count],
        test=held_out,
        source=source_info or {},
        report=DataReport(notes=tuple(notes)),
    )


def read_rows(
    spec: DataSpec, source: Path | str | pd.DataFrame, *, label: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """The rows of another table for a model's own spec: x (N, columns), and conditions (N, *value_shape) or None.

    The conditions are those columns that the spec was `given`, or, with `label`, the classes in that column.

    Raises:
        DataError: the table does not fit the spec; the message names the column and the value.
    """
    given = spec.condition.columns if spec.condition is not None else ()
    frame, _ = open_table(source, text_columns((*spec.columns, *given)))
    codes = None
    if given:
        assert spec.condition is not None
        names = [c.name for c in given]
        if label is not None:
            raise UsageError(f"label={label!r} has no effect: the data are conditioned on {', '.join(names)}")
        if any(name in frame.columns for name in names):  # a model of p(x) does not need them
            codes = read_condition(spec.condition, frame)
            frame = frame.drop(columns=names)
    elif label is not None:
        if spec.condition is None or spec.condition.kind != "class":
            raise UsageError(f"label {label!r} was given, but the model's data had no classes")
        if label not in frame.columns:
            raise unknown_name("column", label, frame.columns)
        index = {name: i for i, name in enumerate(spec.condition.names)}
        names = [_class_name(v) for v in frame[label].tolist()]
        unknown = sorted({n for n in names if n not in index})
        if unknown:
            raise DataError(
                f"label {label!r} holds {', '.join(map(repr, unknown[:5]))}, unknown to the model; "
                f"it knows: {', '.join(spec.condition.names[:20])}"
            )
        codes = torch.tensor([index[n] for n in names], dtype=torch.int64)
        frame = frame.drop(columns=label)
    return from_frame(spec, frame), codes


def _open_both(
    source: Path | str | pd.DataFrame, test: Path | str | pd.DataFrame | None, types: Mapping[str, str]
) -> tuple[pd.DataFrame, int, list[str]]:
    """The table with the rows of the test set, if any, below; how many come before; notes."""
    import pandas as pd

    text = {column for column, kind in types.items() if kind in ("categorical", "boolean", "date")}
    frame, notes = open_table(source, text)
    check_types(types, list(frame.columns))
    if test is None:
        return frame, len(frame), notes
    more, test_notes = open_table(test, text)
    absent = [c for c in frame.columns if c not in more.columns]
    extra = [c for c in more.columns if c not in frame.columns]
    if absent or extra:
        what = [f"lacks {', '.join(map(repr, absent))}"] * bool(absent)
        what += [f"has the unknown {', '.join(map(repr, extra))}"] * bool(extra)
        raise DataError(f"the test set {' and '.join(what)}: it needs the columns of the training table")
    for c in frame.columns:
        if is_text(frame[c]) != is_text(more[c]) and frame[c].notna().any() and more[c].notna().any():
            raise DataError(
                f"column {c!r} is {frame[c].dtype} in the table, and {more[c].dtype} in the test set: mend it, "
                f"or read both as text with types={{{c!r}: 'categorical'}}"
            )
    both = pd.concat([frame, more[list(frame.columns)]], ignore_index=True)
    return both, len(frame), notes + [f"test set: {note}" for note in test_notes]


def _infer_columns(frame: pd.DataFrame, types: Mapping[str, str]) -> tuple[tuple[Column, ...], list[str]]:
    if not len(frame.columns):
        raise DataError("the table has no columns to model: keep at least one beside those conditioned on or dropped")
    found = [infer_column(frame[name], types.get(str(name))) for name in frame.columns]
    return tuple(column for column, _ in found), [note for _, notes in found for note in notes]


def _row_number_notes(columns: Sequence[Column], x: Tensor) -> list[str]:
    return [
        f"column {column.name!r} numbers the rows: drop it with types={{{column.name!r}: 'drop'}}"
        for i, column in enumerate(columns)
        if len(x) > 2 and bool((x[:, i].diff() == 1).all())
    ]


def _test_notes(columns: Sequence[Column], x: Tensor, count: int) -> list[str]:
    """Categories that only the test set has: no model can have learned them."""
    notes = []
    for i, column in enumerate(columns):
        if column.kind == "categorical":
            new = set(x[count:, i].tolist()) - set(x[:count, i].tolist())
            only = [str(column.categories[int(code)]) for code in sorted(c for c in new if not math.isnan(c))]
            if only:
                notes.append(f"column {column.name!r}: only the test set has {', '.join(map(repr, only[:10]))}")
    return notes


def _class_name(value: Any) -> str:
    """The name of a class: 3.0 and 3 are the same."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _classes(series: pd.Series[Any]) -> tuple[Tensor, ConditionSpec, list[str]]:
    """Class indices (N,), their names, and notes."""
    import pandas as pd

    name, types = str(series.name), pd.api.types
    if series.isna().any():
        raise DataError(f"label {name!r} is missing in {int(series.isna().sum())} row(s): fill or remove them")
    if series.dtype == object and any(isinstance(v, list | dict | set) for v in series):
        raise DataError(f"label {name!r} holds lists or mappings: classes are text, whole numbers or booleans")
    values = series.unique().tolist()
    if isinstance(series.dtype, pd.CategoricalDtype):
        values = [v for v in series.cat.categories.tolist() if v in set(values)]
    elif types.is_numeric_dtype(series.dtype) or types.is_bool_dtype(series.dtype):
        if not all(math.isfinite(v) for v in values):
            raise DataError(f"label {name!r} holds infinite values, which are no class: remove those rows")
        values = sorted(values)
        if any(v != int(v) for v in values) and 2 * len(values) > len(series):
            raise DataError(
                f"label {name!r} is a real number ({len(values)} values), not a class: use a column of classes"
            )
    elif all(isinstance(v, str) for v in values):
        values = sort_values(values)
    else:
        raise DataError(f"label {name!r} has dtype {series.dtype}: classes are text, whole numbers or booleans")
    if len(values) > MANY:
        raise DataError(f"label {name!r} has {len(values)} classes, more than {MANY}: use a column of classes")
    names = [_class_name(v) for v in values]
    code = {value: i for i, value in enumerate(values)}
    codes = torch.tensor([code[v] for v in series.tolist()], dtype=torch.int64)
    notes = [f"label {name!r} has only one class, {names[0]!r}"] if len(names) == 1 else []
    return codes, ConditionSpec(kind="class", names=tuple(names)), notes
