"""What the data are: the one description from which models size themselves.

A `DataSpec` is plain data (JSON in, JSON out) and travels inside every saved model, so that samples come
back in the user's units without the data set at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

DataKind = Literal["image", "signal", "volume", "points", "table"]
ConditionKind = Literal["class", "vector", "image", "sequence"]
RANKS: Mapping[DataKind, int] = {"image": 3, "signal": 2, "volume": 4, "points": 1, "table": 1}
"""Axes of one example, channels included."""
SPATIAL: frozenset[DataKind] = frozenset({"image", "signal", "volume"})
"""Kinds whose examples are channels on a grid, (C, *space)."""
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
    """What a model can be conditioned on; a condition is a tensor (N, *value_shape).

    class: int64 indices (N,) into `names`. vector: real numbers (N, len(names)).
    image: real numbers (N, *shape), shape = (C', *space): a picture, signal or volume that comes with x, of as many
        axes as x; its resolution and channels may differ. For super-resolution, colourisation, inpainting.
    sequence: real numbers (N, *shape), shape = (L, d): L vectors to attend to, such as embeddings of words.

    Values are taken as they are, in the user's units; 8-bit pictures become real numbers in [-1, 1] (`to_real`).
    Networks see a vector with `mean` and `std` as (c - mean) / std.

    Attributes:
        names: of the classes, or of the numbers of a vector; else ().
        shape: of one image or sequence; else ().
        columns: of the table, where the condition was made of these (`trilemma.data.given`); else ().
        mean, std: of each number of a vector over the training examples, 0 and 1 where it stays as it is; or ().
    """

    kind: ConditionKind
    names: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    columns: tuple[Column, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ConditionSpec:
        named = self.kind in ("class", "vector")
        if named != bool(self.names) or named == bool(self.shape):
            raise ValueError(f"a {self.kind} condition has {'names and no shape' if named else 'a shape and no names'}")
        if self.kind == "sequence" and len(self.shape) != 2:
            raise ValueError(f"a sequence has the shape (length, dim), got {self.shape}")
        if min(self.shape, default=1) < 1:
            raise ValueError(f"the sides of a condition are positive, got shape {self.shape}")
        if (self.mean or self.std) and (self.kind != "vector" or not len(self.mean) == len(self.std) == self.size):
            raise ValueError("a mean and a std belong to each number of a vector")
        return self

    @model_serializer(mode="wrap")
    def _without_the_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields that are empty: a new one must not move the hash of data that lack it."""
        return {key: value for key, value in handler(self).items() if value}

    @property
    def size(self) -> int:
        """Number of classes, or of the numbers of a vector."""
        return len(self.names)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of one condition: () of a class, (size,) of a vector, else `shape`."""
        return {"class": (), "vector": (self.size,)}.get(self.kind, self.shape)

    def describe(self) -> str:
        """In words: "10 classes", "2 attributes", "image 1x4x4", "sequence 16x8"."""
        nouns = {"class": "classes", "vector": "attributes"}
        if self.kind in nouns:
            return f"{self.size} {nouns[self.kind]}"
        return f"{self.kind} {'x'.join(map(str, self.shape))}"


def to_real(condition: Tensor) -> Tensor:
    """An image condition as real numbers: 8-bit levels 0 .. 255 become k / 127.5 - 1; others are as they are."""
    return condition.float() / 127.5 - 1.0 if condition.dtype == torch.uint8 else condition


class DataSpec(_Frozen):
    """What one example x is, in the units of the user's data.

    Attributes:
        kind: "image" (C, H, W), "signal" (C, L), "volume" (C, D, H, W), "points" (D,) or "table" (columns,).
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
        rank = RANKS[self.kind]
        if len(self.shape) != rank or min(self.shape) < 1:
            raise ValueError(f"{self.kind} data need {rank} positive dimensions, got shape {self.shape}")
        if (self.kind == "table") != bool(self.columns):
            raise ValueError("a table, and only a table, has columns")
        if self.columns and len(self.columns) != self.shape[0]:
            raise ValueError(f"{len(self.columns)} columns, but shape {self.shape}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")
        image = self.condition if self.condition is not None and self.condition.kind == "image" else None
        if image is not None and (self.kind not in SPATIAL or len(image.shape) != rank):
            raise ValueError(f"{image.describe()} cannot be the condition of {self.kind} data")
        return self

    @property
    def dims(self) -> int:
        """Number of dimensions of x, over which likelihoods per dimension are taken."""
        return math.prod(self.shape)

    @property
    def is_8bit(self) -> bool:
        return self.levels == 256

    def describe(self) -> str:
        """In words: "image 1x8x8 with 17 levels, 10 classes", "signal 1x64, real, conditioned on sequence 16x8"."""
        text = f"{self.kind} {'x'.join(map(str, self.shape))}"
        text += "" if self.kind == "table" else f" with {self.levels} levels" if self.levels else ", real"
        if self.condition is not None:
            text += ", conditioned on " if self.condition.shape else ", "
            text += self.condition.describe()
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
