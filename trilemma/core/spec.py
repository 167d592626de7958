"""What the data are: the one description from which models size themselves.

A `DataSpec` is plain data (JSON in, JSON out) and travels inside every saved model, so that samples come
back in the user's units without the data set at hand.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

DataKind = Literal["image", "signal", "points", "table"]
ColumnKind = Literal["numeric", "categorical", "boolean", "date"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Column(_Frozen):
    """One column of a table. In tensors a table is float64, (N, columns), missing values are NaN.

    numeric: the number itself. categorical: the index into `categories`. boolean: 0 or 1.
    date: seconds since 1970-01-01 (UTC where the user's column has a time zone).

    Attributes:
        dtype: the user's own dtype, in which samples come back ("int64", "float32", "datetime64[us]", "str").
        categories: what the codes of a categorical column stand for, in code order.
        missing: whether values are missing; a model then models the missingness too.
        resolution: spacing of a numeric or date column whose values lie on an even grid, else None. Such a
            column is discrete: a density without dequantization would gain nats without bound.
        values: the sorted values of a numeric column that takes few, unevenly spaced ones, else ().
        offset: a point of the even grid.
    """

    name: str
    kind: ColumnKind
    dtype: str
    categories: tuple[str | int | float | bool, ...] = ()
    missing: bool = False
    resolution: float | None = None
    offset: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def is_discrete(self) -> bool:
        """Whether the column has probabilities rather than a density."""
        return self.kind in ("categorical", "boolean") or self.resolution is not None or bool(self.values)


class ConditionSpec(_Frozen):
    """What a model can be conditioned on.

    class: an int64 tensor (N,) of indices into `names`. vector: a float tensor (N, len(names)).
    """

    kind: Literal["class", "vector"]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.names)


class DataSpec(_Frozen):
    """What one example x is, in the units of the user's data.

    Attributes:
        kind: "image" (C, H, W), "signal" (C, L), "points" (D,) or "table" (columns,).
        shape: shape of one example, without the batch.
        levels: x is integer in 0 .. levels - 1 (256 for 8-bit pictures), or None for real x.
        columns: the columns of a table, else ().
        condition: what comes with each x, or None.
    """

    kind: DataKind
    shape: tuple[int, ...]
    levels: int | None = None
    columns: tuple[Column, ...] = ()
    condition: ConditionSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        rank = {"image": 3, "signal": 2, "points": 1, "table": 1}[self.kind]
        if len(self.shape) != rank or min(self.shape) < 1:
            raise ValueError(f"{self.kind} data need {rank} positive dimensions, got shape {self.shape}")
        if (self.kind == "table") != bool(self.columns):
            raise ValueError("a table, and only a table, has columns")
        if self.columns and len(self.columns) != self.shape[0]:
            raise ValueError(f"{len(self.columns)} columns, but shape {self.shape}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")
        return self

    @property
    def dims(self) -> int:
        """Number of dimensions of x, over which likelihoods per dimension are taken."""
        return math.prod(self.shape)

    @property
    def is_8bit(self) -> bool:
        return self.levels == 256

    def describe(self) -> str:
        """In words: "image 1x8x8 with 17 levels, 10 classes"."""
        text = f"{self.kind} {'x'.join(map(str, self.shape))}"
        text += "" if self.kind == "table" else f" with {self.levels} levels" if self.levels else ", real"
        if self.condition is not None:
            noun = "classes" if self.condition.kind == "class" else "attributes"
            text += f", {self.condition.size} {noun}"
        return text


class Batch(NamedTuple):
    """Examples x (N, *shape) in data units, and their condition, if any."""

    x: Tensor
    condition: Tensor | None = None

    def to(self, device: object) -> Batch:
        """The batch on another device."""
        c = self.condition
        return Batch(self.x.to(device), None if c is None else c.to(device))  # type: ignore[call-overload]


class Split(Protocol):
    """One part (train, validation, test) of a data set, in memory or streamed."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """The examples at `indices` (int64, (N,)), in that order."""
        ...

    def head(self, n: int) -> Batch:
        """The first n examples, or all if there are fewer (splits are already in random order)."""
        ...
