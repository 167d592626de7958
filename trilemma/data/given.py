"""Columns of a table to condition on: p(the other columns | these).

The columns that `given=` names leave x. A single categorical column becomes a class condition, as a label does. All
others become a vector in the user's units, in the order given:

    column         numbers of the vector, and their names
    numeric        the number itself, "column"
    date           seconds since 1970-01-01 (UTC), "column"
    boolean        0 or 1, "column"
    categorical    zeros and a one, "column=category" for each category

Numbers and dates come with their mean and standard deviation over the training examples, by which networks
standardise them (`ConditionSpec.mean`). A condition has no density, so its columns have no grid: every number is
possible. A missing value is an error, since a condition has to be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError, unknown_name
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.data.columns import infer_column
from trilemma.data.frames import column_values, to_series
from trilemma.data.table_files import open_table

if TYPE_CHECKING:
    import pandas as pd

SCALED = ("numeric", "date")
"""Kinds of columns that networks see standardised."""


def make_condition(
    frame: pd.DataFrame, given: Sequence[str], types: Mapping[str, str]
) -> tuple[Tensor, ConditionSpec, list[str]]:
    """The condition of every row (N,) or (N, size), what it is, and notes.

    Arguments:
        given: names of columns.
        types: see `load_table`.

    Raises:
        UsageError: an unknown, dropped or repeated column, or none at all.
        DataError: a value is missing, or a column cannot be used.
    """
    if not given:
        raise UsageError("given= names no column: give at least one to condition on, or leave it out")
    columns, notes = [], []
    for name in given:
        if name not in frame.columns:
            raise unknown_name("column", name, frame.columns)
        if given.count(name) > 1:
            raise UsageError(f"given= names column {name!r} {given.count(name)} times: once is enough")
        if types.get(name) == "drop":
            raise UsageError(f"column {name!r} is conditioned on and cannot be dropped too")
        _check_missing(name, frame[name])
        column, found = infer_column(frame[name], types.get(name))
        notes += found if column.kind == "categorical" else []
        dtype = "float64" if column.kind == "numeric" else column.dtype
        columns.append(column.model_copy(update={"dtype": dtype, "resolution": None, "offset": 0.0, "values": ()}))
    if [c.kind for c in columns] == ["categorical"]:
        classes = tuple(str(c) for c in columns[0].categories)
        condition = ConditionSpec(kind="class", names=classes, columns=tuple(columns))
    else:
        condition = ConditionSpec(kind="vector", names=_entry_names(columns), columns=tuple(columns))
    return read_condition(condition, frame), condition, notes


def read_condition(condition: ConditionSpec, frame: pd.DataFrame) -> Tensor:
    """The conditions (N, *value_shape) in the rows of a table: class indices, or float64 in the user's units.

    Raises:
        DataError: a column is absent, or holds a value that is missing or unknown to the model.
    """
    absent = [c.name for c in condition.columns if c.name not in frame.columns]
    if absent:
        raise DataError(
            f"the table lacks {', '.join(map(repr, absent))}: the model is conditioned on "
            f"{', '.join(c.name for c in condition.columns)}"
        )
    codes = []
    for column in condition.columns:
        _check_missing(column.name, frame[column.name])
        codes.append(torch.from_numpy(column_values(column, frame[column.name])))
    if condition.kind == "class":
        return codes[0].long()
    parts = [
        torch.nn.functional.one_hot(code.long(), len(c.categories)).double() if _is_onehot(c) else code.unsqueeze(1)
        for c, code in zip(condition.columns, codes, strict=True)
    ]
    return torch.cat(parts, 1)


def read_condition_table(path: Path, condition: ConditionSpec) -> Tensor:
    """The conditions in the rows of a table file; its other columns are not read."""
    frame, _ = open_table(path, text_columns(condition.columns))
    return read_condition(condition, frame)


def condition_frame(condition: ConditionSpec, values: Tensor) -> pd.DataFrame:
    """Conditions (N, *value_shape) as the user's own columns: the inverse of `read_condition`."""
    import pandas as pd

    columns = condition.columns
    if condition.kind == "class":
        codes = [values]
    else:
        parts = torch.split(values, [len(c.categories) if _is_onehot(c) else 1 for c in columns], 1)
        codes = [p.argmax(1) if _is_onehot(c) else p.squeeze(1) for c, p in zip(columns, parts, strict=True)]
    numbers: list[np.ndarray] = [code.cpu().double().numpy() for code in codes]
    return pd.DataFrame({c.name: to_series(c, v) for c, v in zip(columns, numbers, strict=True)})


def with_scale(spec: DataSpec, train: Tensor | None) -> DataSpec:
    """The spec with the mean and standard deviation of the conditions of the training examples, (N, size)."""
    condition = spec.condition
    if train is None or condition is None or condition.kind != "vector" or not condition.columns:
        return spec
    scaled = torch.tensor([c.kind in SCALED for c in condition.columns for _ in _entry_names([c])])
    mean = torch.where(scaled, train.mean(0), 0.0)
    std = (train - mean).square().mean(0).sqrt()
    std = torch.where(scaled & (std > 1e-12 * (1.0 + mean.abs())), std, 1.0)
    scale = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
    return spec.model_copy(update={"condition": condition.model_copy(update=scale)})


def check_use(spec: DataSpec, used: ConditionSpec | None) -> None:
    """Raise a `UsageError` if columns are given that a model does not condition on.

    Arguments:
        used: what the model conditions on.
    """
    columns = spec.condition.columns if spec.condition is not None else ()
    if columns and used is None:
        plural = len(columns) > 1
        raise UsageError(
            f"the column{'s' * plural} {', '.join(c.name for c in columns)} {'are' if plural else 'is'} given but the "
            f"model does not condition on {'them' if plural else 'it'}: add conditional=true"
        )


def text_columns(columns: Sequence[Column]) -> set[str]:
    """Names of the columns that a text file must not read as numbers."""
    return {c.name for c in columns if c.categories or c.kind == "date"}


def _is_onehot(column: Column) -> bool:
    return column.kind == "categorical"


def _entry_names(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(
        name for c in columns for name in ([f"{c.name}={k}" for k in c.categories] if _is_onehot(c) else [c.name])
    )


def _check_missing(name: str, series: pd.Series[Any]) -> None:
    missing = int(series.isna().sum())
    if missing:
        raise DataError(
            f"column {name!r} is conditioned on, but missing in {missing} row(s), first in row "
            f"{int(series.isna().to_numpy().argmax()) + 1}: fill or remove them"
        )
