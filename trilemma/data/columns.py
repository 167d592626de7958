"""What a column of the user's table is: its kind, its missing values, and the grid on which its values lie.

A density on values that repeat can grow without bound: spikes of width w on n points gain log(1/w) nats per
value, and mean nothing. So a column whose values lie on an even grid or are few is discrete: it is dequantized at
its own resolution, and its likelihood is that of a probability (Theis, van den Oord & Bethge 2016,
arXiv:1511.01844). The signs of a grid:

- whole numbers: always;
- decimals k / 10^d: where at least 5% of the values repeat. Ties have probability zero under a density, and
  measurements that are written with many digits do not repeat.

The resolution is the greatest common divisor of the distances where there are enough of them to trust it, so
lengths in steps of 0.005 have 0.005, not 0.001.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trilemma.core.errors import DataError, UsageError, unknown_name
from trilemma.core.spec import Column
from trilemma.core.support import describe_support
from trilemma.data.frames import DATE_FORMATS, column_values, date_format, date_seconds, is_text, number_values

if TYPE_CHECKING:
    import pandas as pd

TYPES = ("numeric", "categorical", "boolean", "date", "drop")
"""What a column can be declared as."""

FEW = 20
"""Up to so many unevenly spaced values are a list; so many different texts are categories in any table."""

MANY = 1000
"""More categories, or more listed values, are no longer a list."""

TIES = 0.05
"""The share of repeated values above which a decimal grid counts as one."""

REPEATS = 5
"""A list of values, or the common divisor of few values, is trusted when each occurs so often on average."""

MOST_STEPS = 2.0**46
"""A longer grid leaves double precision no digits for the place within a step."""

WORDS = (("false", "true"), ("no", "yes"), ("f", "t"), ("n", "y"), ("off", "on"))
"""Pairs of words that mean false and true."""


def check_types(types: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise a `UsageError` where the types name an unknown column or an unknown type."""
    for name, kind in types.items():
        if name not in names:
            raise unknown_name("column", name, names)
        if kind not in TYPES:
            raise unknown_name(f"type of column {name!r}:", kind, TYPES)


def infer_column(series: pd.Series[Any], declared: str | None = None) -> tuple[Column, list[str]]:
    """What a column is, and what a person should know about it.

    Arguments:
        series: the values; its name becomes the column's.
        declared: one of `TYPES` (not "drop"), or None to infer.

    Raises:
        DataError: the column cannot be used; the message names it and says what to do.
    """
    name = str(series.name)
    if series.isna().all():
        raise DataError(f"column {name!r} has no values at all: drop it with types={{{name!r}: 'drop'}}")
    kinds = {type(v).__name__ for v in series if isinstance(v, list | dict | set)} if series.dtype == object else set()
    if kinds:
        found = " and ".join(sorted(kinds))
        raise DataError(
            f"column {name!r} holds Python objects of type {found}: drop it with types={{{name!r}: 'drop'}}"
        )
    kind = declared or _kind(name, series)
    infer = {"numeric": _numeric, "categorical": _categorical, "boolean": _boolean, "date": _date}[kind]
    column, notes = infer(name, series, declared is not None)
    if series.nunique() == 1:
        notes.append(f"column {name!r} is constant ({series.dropna().iloc[0]!s}): it carries no information")
    return column, notes


def describe_column(column: Column) -> str:
    """In words: "numeric on a grid of 0.01, with missing values"."""
    text: str = column.kind
    if column.kind == "categorical" or column.values:
        text += f", {describe_support(column)}"
    elif column.resolution is not None:
        step = {86400.0: "1 day", 3600.0: "1 hour", 60.0: "1 minute", 1.0: "1 second"}.get(column.resolution)
        text += f" on a grid of {step if step and column.kind == 'date' else f'{column.resolution:g}'}"
    elif column.kind != "boolean":
        text += ", continuous"
    return text + (", with missing values" if column.missing else "")


def _kind(name: str, series: pd.Series[Any]) -> str:
    import pandas as pd

    types, dtype = pd.api.types, series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return "categorical"
    if types.is_bool_dtype(dtype):
        return "boolean"
    if types.is_datetime64_any_dtype(dtype):
        return "date"
    if types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype):
        return "numeric"
    if is_text(series):
        if _word_pair(series) is not None:
            return "boolean"
        return "date" if _format(series) is not None else "categorical"
    if pd.api.types.is_object_dtype(dtype):
        return _kind_of_objects(name, series)
    raise DataError(
        f"column {name!r} has dtype {dtype}, which no model here takes: convert it to numbers, text or dates, "
        f"or drop it with types={{{name!r}: 'drop'}}"
    )


def _kind_of_objects(name: str, series: pd.Series[Any]) -> str:
    kinds = {type(v) for v in series.dropna()}
    if kinds <= {bool, np.bool_}:
        return "boolean"
    if all(issubclass(k, int | float | np.integer | np.floating) and k is not bool for k in kinds):
        return "numeric"
    if all(issubclass(k, str | int | float) and k is not bool for k in kinds):
        return "categorical"
    listing = ", ".join(sorted(k.__name__ for k in kinds))
    raise DataError(
        f"column {name!r} holds Python objects of type {listing}: convert it to numbers, text or dates, "
        f"or drop it with types={{{name!r}: 'drop'}}"
    )


# -- numbers ---------------------------------------------------------------------------------------------------


def _numeric(name: str, series: pd.Series[Any], declared: bool) -> tuple[Column, list[str]]:
    import pandas as pd

    notes: list[str] = []
    dtype = str(series.dtype)
    if pd.api.types.is_bool_dtype(series.dtype):
        raise UsageError(f"column {name!r} is boolean and cannot be read as numeric: convert it to integers first")
    bare = Column(name=name, kind="numeric", dtype=dtype, missing=bool(series.isna().any()))
    x = number_values(bare, series)
    if series.dtype == object or is_text(series) or isinstance(series.dtype, pd.CategoricalDtype):
        present = x[~np.isnan(x)]
        whole = bool((present == np.round(present)).all())
        dtype = "float64" if not whole else "Int64" if bare.missing else "int64"
        notes.append(f"column {name!r} holds {series.dtype} and was read as {dtype}")
    support, more = _support(name, x[~np.isnan(x)])
    column = bare.model_copy(update={"dtype": dtype, **support})
    if support.get("resolution") is not None:
        moved = np.nanmax(np.abs(column_values(column, series) - x))
        if moved > 0 and series.dtype == "float64":  # a float32 column gets its own rounding back
            more.append(f"column {name!r}: values up to {moved:.1g} off its grid of {column.resolution:g} were rounded")
    return column, notes + more


def _support(name: str, x: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """The grid or the list of values of numbers without gaps, as fields of `Column`, and notes."""
    values, counts = np.unique(x, return_counts=True)
    n, distinct = len(x), len(values)
    ties = 1.0 - distinct / n
    if distinct == 1:
        return {"values": (float(values[0]),)}, []
    grid = _decimal_grid(values)
    if grid is not None and (grid[1] == 0 or ties >= TIES):
        whole, digits = grid
        if int(whole[-1]) - int(whole[0]) > MOST_STEPS and digits == 0:
            raise DataError(
                f"column {name!r} has whole numbers from {whole[0]} to {whole[-1]}, too far apart for double "
                f"precision: use a coarser unit, or drop it with types={{{name!r}: 'drop'}}"
            )
        divisor = int(np.gcd.reduce(np.diff(whole)))
        if distinct < 10 and n < REPEATS * distinct:
            divisor = 1
        cells = (int(whole[-1]) - int(whole[0])) // divisor + 1
        if distinct <= FEW and n >= REPEATS * distinct and distinct < 0.5 * cells:
            return {"values": tuple(values.tolist())}, []
        scale = 10**digits
        return {"resolution": divisor / scale, "offset": int(whole[0]) / scale}, _precision_note(
            name, x.std() * scale / divisor
        )
    if (n >= 2 * REPEATS * distinct and distinct <= MANY) or (n >= REPEATS * distinct and distinct <= FEW):
        return {"values": tuple(values.tolist())}, []
    if ties >= TIES:
        top = int(counts.argmax())
        return {}, [
            f"column {name!r}: {ties:.0%} of its values repeat ({values[top]:g} occurs {counts[top]} times), but lie "
            "on no even grid: a density can gain nats there without bound, so round it before comparing likelihoods"
        ]
    return {}, []


def _decimal_grid(values: np.ndarray) -> tuple[np.ndarray, int] | None:
    """(k, d) with values = k / 10^d up to rounding, for the smallest such d; None if there is none.

    The rounding is that of double precision or, since many files hold it, of single. A chance hit needs every value
    within 1% of a step of the grid, since coarser rounding is refused.
    """
    largest = float(np.abs(values).max())
    if largest < 2.0**53 and bool((values == np.round(values)).all()):
        return values.astype(np.int64), 0
    for slack in (largest * 2.0**-50, largest * 2.0**-24):
        for digits in range(23):
            scale = 10.0**digits
            if largest * scale >= 2.0**53 or slack * scale > 0.01:
                break
            if (values[-1] - values[0]) * scale > MOST_STEPS:
                break
            if np.abs(np.round(values[:50] * scale) / scale - values[:50]).max() > slack:
                continue
            k = np.round(values * scale)
            if np.abs(k / scale - values).max() <= slack:
                return np.unique(k.astype(np.int64)), digits
    return None


def _precision_note(name: str, deviation: float) -> list[str]:
    """Models work in single precision, which tells about 2^22 cells apart within a standard deviation."""
    if deviation < 2.0**20:
        return []
    return [
        f"column {name!r} spreads over {deviation:.2g} steps of its grid (standard deviation), too many for single "
        "precision to tell apart: samples will not reach every step; round it to a coarser unit to change that"
    ]


# -- categories, booleans, dates ---------------------------------------------------------------------------------


def _categorical(name: str, series: pd.Series[Any], declared: bool) -> tuple[Column, list[str]]:
    import pandas as pd

    dtype = str(series.dtype)
    if isinstance(series.dtype, pd.CategoricalDtype):
        found = series.cat.categories.tolist()
        dtype = f"category[{series.cat.categories.dtype}{', ordered' if series.cat.ordered else ''}]"
    else:
        found = sort_values([_plain(v) for v in series.dropna().unique()])
    if not all(isinstance(c, str | int | float) for c in found):
        raise DataError(
            f"column {name!r} has categories of type {type(found[0]).__name__}: make them text, "
            f"or drop it with types={{{name!r}: 'drop'}}"
        )
    present = int(series.notna().sum())
    if not declared and (len(found) > MANY or (len(found) > FEW and 2 * len(found) > present)):
        raise DataError(
            f"column {name!r} has {len(found)} different texts in {present} rows, like a name, an identifier or free "
            f"text: drop it with types={{{name!r}: 'drop'}}, or keep it with types={{{name!r}: 'categorical'}}"
        )
    notes = []
    if "?" in found:
        notes.append(f"column {name!r} holds '?', kept as a category: make it None if it means missing")
    missing = bool(series.isna().any())
    return Column(name=name, kind="categorical", dtype=dtype, categories=tuple(found), missing=missing), notes


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def sort_values(values: list[Any]) -> list[Any]:
    """Numbers before texts; texts that are all whole numbers in the order of these."""
    texts = [v for v in values if isinstance(v, str)]
    if len(texts) == len(values) and all(t.isascii() and t.lstrip("+-").isdigit() for t in texts):
        return sorted(texts, key=lambda t: (int(t), t))
    return sorted(values, key=lambda v: (isinstance(v, str), v))


def _word_pair(series: pd.Series[Any], declared: bool = False) -> tuple[str, str] | None:
    """The user's words for (false, true), where the column holds just one such pair.

    Where the column is declared to be boolean, "0" and "1" are words too, and one word of a pair is enough.
    """
    words = [str(w) for w in series.dropna().unique()]
    by_meaning = {w.lower(): w for w in words}
    if len(by_meaning) < len(words) or (len(words) < 2 and not declared):
        return None
    for no, yes in (*WORDS, ("0", "1")) if declared else WORDS:
        if by_meaning.keys() <= {no, yes}:
            return by_meaning.get(no, no), by_meaning.get(yes, yes)
    return None


def _boolean(name: str, series: pd.Series[Any], declared: bool) -> tuple[Column, list[str]]:
    missing = bool(series.isna().any())
    words = _word_pair(series, declared) if is_text(series) else None
    column = Column(name=name, kind="boolean", dtype=str(series.dtype), categories=words or (), missing=missing)
    if declared and words is None:
        values = set(series.dropna().unique().tolist())
        if not values <= {0, 1}:
            raise DataError(
                f"column {name!r} cannot be boolean: it holds {', '.join(sorted(map(repr, values))[:5])}; "
                "a boolean column holds true and false, yes and no, or 1 and 0"
            )
    return column, []


def _format(series: pd.Series[Any]) -> str | None:
    """The date format in which all texts are written, so that they can be written again letter for letter."""
    import pandas as pd

    texts = series.dropna()
    texts = pd.Series(texts.unique(), dtype=texts.dtype)
    if not re.match(r"\d{4}[-/]", str(texts.iloc[0])):
        return None
    for form in DATE_FORMATS:
        for sample in (texts.iloc[:20], texts):
            dates = pd.to_datetime(sample, format=form, errors="coerce")
            if dates.isna().any() or not bool((dates.dt.strftime(form) == sample.astype(object)).all()):
                break
        else:
            return form
    return None


def _date(name: str, series: pd.Series[Any], declared: bool) -> tuple[Column, list[str]]:
    dtype = str(series.dtype)
    if is_text(series):
        form = _format(series)
        dtype = "datetime64[us, UTC]" if form is None else f"{dtype}[{form}]"
    seconds = date_seconds(name, series, date_format(dtype))
    present = seconds[~np.isnan(seconds)]
    column = Column(name=name, kind="date", dtype=dtype, missing=bool(series.isna().any()))
    offset = float(present.min())
    if present.min() == present.max():
        return column.model_copy(update={"values": (offset,)}), []
    for unit in (86400.0, 3600.0, 60.0, 1.0):
        start = math.floor(offset / unit) * unit
        if bool(((present - start) % unit == 0).all()):
            return column.model_copy(update={"resolution": unit, "offset": start}), _precision_note(
                name, float(present.std()) / unit
            )
    notes = []
    ties = 1.0 - len(np.unique(present)) / len(present)
    if ties >= TIES:
        notes.append(f"column {name!r}: {ties:.0%} of its times repeat, in fractions of a second; round it to seconds")
    return column, notes
