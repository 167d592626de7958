"""A pandas table as the float64 tensor of a spec, and back to the user's names, order, values and dtypes.

Numbers stand for themselves, categories for their index, booleans for 0 and 1, dates for seconds since 1970 (UTC),
NaN for a missing value. `to_frame(spec, from_frame(spec, frame))` equals the frame.

`Column.dtype` is pandas' own name with two additions: "category[str, ordered]" names the type of the categories,
and "str[%Y-%m-%d]" is a column of text that holds dates in this format.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError, unknown_name
from trilemma.core.spec import Column, DataSpec
from trilemma.core.support import describe_support, grid_index, grid_value, off_support

if TYPE_CHECKING:
    import pandas as pd

_CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f")
_TIMES = ("", *(f"{t}{clock}{zone}" for clock in _CLOCKS for t in " T" for zone in ("", "Z")))
DATE_FORMATS = tuple(date + time for date in ("%Y-%m-%d", "%Y/%m/%d") for time in _TIMES)
"""How dates are written as text: year first, with or without a time of day, "Z" for UTC."""

MICROSECONDS = 10**6


def is_text(series: pd.Series[Any]) -> bool:
    """Whether every value that is not missing is a string."""
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype):
        return False
    if series.dtype == object:
        return all(isinstance(v, str) for v in series.dropna())
    return pd.api.types.is_string_dtype(series.dtype)


def to_frame(spec: DataSpec, x: Tensor, labels: Tensor | None = None, *, label: str = "label") -> pd.DataFrame:
    """The examples x (N, columns) of a table as the user's own DataFrame.

    Where x comes from a model, a whole number beyond the range of its column's dtype becomes the nearest that
    the dtype holds, as a level beyond the last becomes the last.

    Arguments:
        labels: (N,) class indices, which become a last column of class names.
        label: the name of that column.

    Raises:
        DataError: a value is missing in a column that has none missing.
    """
    import pandas as pd

    assert spec.kind == "table"
    assert x.shape[1:] == spec.shape
    values = x.detach().cpu().double().numpy()
    frame = pd.DataFrame({c.name: to_series(c, values[:, i]) for i, c in enumerate(spec.columns)})
    if labels is not None:
        assert spec.condition is not None
        assert spec.condition.kind == "class"
        frame[label] = [spec.condition.names[i] for i in labels.tolist()]
    return frame


def from_frame(spec: DataSpec, frame: pd.DataFrame) -> Tensor:
    """The rows of a DataFrame, columns in any order, as a float64 tensor (N, columns) of this spec.

    Raises:
        DataError: columns are absent or too many, or a value is not one that the spec knows.
    """
    names = [str(c) for c in frame.columns]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"the table has several columns named {', '.join(map(repr, twice))}; rename them")
    known = [c.name for c in spec.columns]
    absent = [n for n in known if n not in names]
    if absent:
        raise DataError(f"the table lacks column(s) {', '.join(map(repr, absent))}; it has: {', '.join(names)}")
    extra = [n for n in names if n not in known]
    if extra:
        guess = unknown_name("column", extra[0], known)
        raise DataError(f"{guess}; remove what the model does not know: {', '.join(map(repr, extra))}")
    by_name = dict(zip(names, (frame.iloc[:, i] for i in range(len(names))), strict=True))
    return torch.from_numpy(np.stack([column_values(c, by_name[c.name]) for c in spec.columns], axis=1))


def column_values(column: Column, series: pd.Series[Any]) -> np.ndarray:
    """One column as float64 numbers (N,), in the coding of `Column`.

    Raises:
        DataError: a value cannot stand in this column.
    """
    read = {"numeric": number_values, "boolean": _boolean_codes, "categorical": _category_codes, "date": _date_seconds}
    values = read[column.kind](column, series)
    if not column.missing and np.isnan(values).any():
        raise DataError(
            f"column {column.name!r} has {int(np.isnan(values).sum())} missing value(s), but none were missing before; "
            "fill or remove those rows"
        )
    x = torch.from_numpy(np.array(values))
    if column.resolution is not None:
        nearest = grid_value(column, grid_index(column, x))
        x = torch.where(off_support(column, x), x, nearest)  # values in single precision are a little off
    strange = off_support(column, x)
    if bool(strange.any()):
        row = int(strange.nonzero()[0])
        value = series.iloc[row]
        shown = f"{value:.12g}" if isinstance(value, float) else repr(value)
        raise DataError(
            f"column {column.name!r} holds {shown} in row {row + 1}, but its possible values are "
            f"{describe_support(column)}: what is not among them has probability zero; {int(strange.sum())} row(s)"
        )
    return torch.where(x.isnan(), math.nan, x + 0.0).numpy()  # one NaN and one zero, whatever their signs


def number_values(column: Column, series: pd.Series[Any]) -> np.ndarray:
    """The numbers of a column as float64, NaN where missing."""
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    if series.dtype == object or is_text(series):
        numbers = pd.to_numeric(series.astype(object), errors="coerce")
        strange = series[numbers.isna() & series.notna()]
        if len(strange):
            raise DataError(
                f"column {column.name!r} is numeric, but {len(strange)} of its {len(series)} values are not, first "
                f"{strange.iloc[0]!r}: mend them, or read the column with types={{{column.name!r}: 'categorical'}}"
            )
        series = numbers
    if not pd.api.types.is_numeric_dtype(series.dtype):
        raise DataError(f"column {column.name!r} is numeric, but the table holds {series.dtype} there")
    if pd.api.types.is_integer_dtype(series.dtype) and series.notna().any():
        largest = max(abs(int(series.min())), abs(int(series.max())))
        if largest > 2**53:
            raise DataError(
                f"column {column.name!r} holds the whole number {largest}, too large to be exact in double precision "
                f"(2^53): subtract an offset, or drop it with types={{{column.name!r}: 'drop'}}"
            )
    values = series.to_numpy(dtype="float64", na_value=np.nan)
    if np.isinf(values).any():
        row = int(np.isinf(values).argmax())
        raise DataError(
            f"column {column.name!r} holds {int(np.isinf(values).sum())} infinite value(s), first in row {row + 1}: "
            "remove or mend those rows"
        )
    return values


def _boolean_codes(column: Column, series: pd.Series[Any]) -> np.ndarray:
    if column.categories:
        return _category_codes(column, series)
    if is_text(series) and not series.isna().all():
        words = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}
        codes = series.astype(object).map(lambda v: words.get(str(v).lower(), 2.0), na_action="ignore")
        return codes.to_numpy(dtype="float64", na_value=np.nan)
    return series.astype(object).to_numpy(dtype="float64", na_value=np.nan)


def _category_codes(column: Column, series: pd.Series[Any]) -> np.ndarray:
    plain = series.astype(object)
    code = {category: i for i, category in enumerate(column.categories)}
    known = plain.isin(list(code)) | plain.isna()
    if not known.all():  # a file cannot tell the number 3 from the text "3"
        code = {str(category): i for i, category in enumerate(column.categories)}
        plain = plain.map(str, na_action="ignore")
        known = plain.isin(list(code)) | plain.isna()
    if not known.all():
        unknown = sorted({str(v) for v in plain[~known]})
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        listing = ", ".join(str(c) for c in column.categories[:20]) + (", ..." if len(column.categories) > 20 else "")
        raise DataError(
            f"column {column.name!r} holds {shown} in {int((~known).sum())} row(s), unknown to the model; "
            f"it knows: {listing}"
        )
    return plain.map(code).to_numpy(dtype="float64", na_value=np.nan)


def _date_seconds(column: Column, series: pd.Series[Any]) -> np.ndarray:
    return date_seconds(column.name, series, date_format(column.dtype))


def date_format(dtype: str) -> str | None:
    """The strftime format of a column of dates as text, else None."""
    match = re.fullmatch(r"[^\[]*\[(%.*)\]", dtype)
    return match[1] if match else None


def date_seconds(name: str, series: pd.Series[Any], form: str | None) -> np.ndarray:
    """Seconds since 1970 (UTC) as float64, NaN where missing; text is read in this format, or as ISO 8601.

    Raises:
        DataError: not dates, or nanoseconds, which float64 seconds cannot hold.
    """
    import pandas as pd

    if is_text(series):
        dates = pd.to_datetime(series, format=form or "ISO8601", errors="coerce", utc=form is None)
        if form is not None and (dates.isna() & series.notna()).any():
            dates = pd.to_datetime(series, format="ISO8601", errors="coerce", utc=True)
        strange = series[dates.isna() & series.notna()]
        if len(strange):
            raise DataError(
                f"column {name!r} is a date, but {len(strange)} of its values are not, first {strange.iloc[0]!r}; "
                "write dates as 2024-01-31 or 2024-01-31 12:30:00"
            )
        series = dates
    if not pd.api.types.is_datetime64_any_dtype(series.dtype):
        raise DataError(f"column {name!r} is a date, but the table holds {series.dtype} there")
    if isinstance(series.dtype, pd.ArrowDtype):
        series = series.astype("datetime64[ns]" if "[ns" in str(series.dtype) else "datetime64[us]")
    if getattr(series.dt, "tz", None) is not None:
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    present = series.notna().to_numpy()
    micro = series.astype("datetime64[us]")
    if bool((micro != series)[present].any()):
        raise DataError(
            f"column {name!r} has nanoseconds, which seconds in double precision cannot hold: round it to microseconds"
        )
    seconds = micro.to_numpy().astype("int64") / MICROSECONDS
    return np.where(present, seconds, np.nan)


def to_series(column: Column, values: np.ndarray) -> pd.Series[Any]:
    """The codes (N,) of a column, float64, as the user's values in the user's dtype; the inverse of `column_values`."""
    missing = np.isnan(values)
    if missing.any() and not column.missing:
        raise DataError(f"column {column.name!r} has {int(missing.sum())} NaN, but no missing values in its data")
    if column.kind == "date":
        return _dates(column, values, missing)
    if column.categories:
        return _categories(column, values, missing)
    return _numbers(column, values, missing)


def _numbers(column: Column, values: np.ndarray, missing: np.ndarray) -> pd.Series[Any]:
    import pandas as pd

    dtype = column.dtype
    if column.kind == "boolean" and dtype == "object":
        objects = np.array([None if m else bool(v) for v, m in zip(values, missing, strict=True)], dtype=object)
        return pd.Series(objects, dtype=object)
    whole = re.fullmatch(r"(u?int)(8|16|32|64)(\[pyarrow\])?", dtype, re.IGNORECASE)
    if whole:
        limits = np.iinfo(whole[1].lower() + whole[2])
        # The largest double below 2^64 and 2^63 is not their predecessor.
        values = np.clip(values, limits.min, np.nextafter(float(limits.max), 0) if limits.bits == 64 else limits.max)
    if dtype.endswith("[pyarrow]"):
        return pd.Series(pd.array(values, dtype="Float64")).mask(missing).astype(_nullable(dtype)).astype(dtype)  # type: ignore[call-overload,no-any-return]
    series = pd.Series(values)
    if dtype == "boolean" or column.kind == "boolean":
        series = series.mask(missing).astype("boolean") if missing.any() or dtype == "boolean" else series
    return series.astype(dtype)  # type: ignore[call-overload,no-any-return]


def _nullable(dtype: str) -> str:
    """pandas' own nullable dtype beside an Arrow one: int64[pyarrow] -> Int64, double[pyarrow] -> Float64."""
    own = {"double": "Float64", "float": "Float32", "halffloat": "Float32", "bool": "boolean"}
    plain = dtype.removesuffix("[pyarrow]")
    return own.get(plain, plain.replace("u", "U", 1) if plain.startswith("u") else plain.capitalize()).replace(
        "Uint", "UInt"
    )


def _categories(column: Column, values: np.ndarray, missing: np.ndarray) -> pd.Series[Any]:
    import pandas as pd

    codes = np.where(missing, -1, values).astype(np.int64)
    match = re.fullmatch(r"category\[(.+?)(, ordered)?\]", column.dtype)
    if match:
        index = pd.Index(list(column.categories), dtype=_text_dtype(match[1]))
        return pd.Series(pd.Categorical.from_codes(codes, categories=index, ordered=match[2] is not None))
    objects = np.array([*column.categories, None], dtype=object)[codes]
    dtype = _text_dtype(column.dtype)
    if missing.any() and re.fullmatch(r"float\d+", dtype):
        objects = np.where(missing, np.nan, objects)
    return pd.Series(objects, dtype=object).astype(dtype)  # type: ignore[call-overload,no-any-return]


def _text_dtype(dtype: str) -> str:
    """ "str" is a dtype since pandas 3; before that text is "object"."""
    import pandas as pd

    return "object" if dtype == "str" and int(pd.__version__.split(".")[0]) < 3 else dtype


def _dates(column: Column, values: np.ndarray, missing: np.ndarray) -> pd.Series[Any]:
    import pandas as pd

    # Nanoseconds since 1970 hold the years 1678 to 2262; text and Python's dates 1 to 9999.
    low, high = (-9.2e9, 9.2e9) if re.search(r"\[ns\b", column.dtype) else (-62135596800.0, 253402300799.0)
    seconds = np.clip(np.where(missing, 0.0, values), low, high)
    stamps = np.round(seconds * MICROSECONDS).astype("int64").astype("datetime64[us]")
    stamps[missing] = np.datetime64("NaT")
    series = pd.Series(stamps)
    form = date_format(column.dtype)
    if form is not None:
        text = series.dt.strftime(form).astype(object).where(~missing, None)
        return text.astype(_text_dtype(column.dtype.split("[")[0]))  # type: ignore[call-overload,no-any-return]
    match = re.fullmatch(r"datetime64\[(\w+), (.+)\]", column.dtype)
    if match:
        return series.astype(f"datetime64[{match[1]}]").dt.tz_localize("UTC").dt.tz_convert(match[2])  # type: ignore[call-overload,no-any-return]
    return series.astype(column.dtype)  # type: ignore[call-overload,no-any-return]
