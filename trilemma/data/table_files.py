"""Table files as pandas DataFrames: CSV read cell by cell, and Parquet.

Blanks around a cell are stripped, a cell of `MISSING` is a missing value, and a column becomes numbers only if
every cell is one and none has a leading zero ("01234" is a code, not a number). Lines of different lengths, a
quotation mark that does not close and bytes that are not text are errors that name the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trilemma.core.errors import DataError, MissingExtraError, UsageError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
MISSING = frozenset({"", "?", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None"})
"""Cells of a text file that mean "missing"."""

DELIMITERS = ",;\t|"
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf(inity)?)", re.IGNORECASE | re.ASCII)
WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
PADDED = re.compile(r"[+-]?0\d+", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)
MOSTLY = 0.9
"""A column of text with this share of numbers is a column of numbers with mistakes in it."""


def open_table(source: Path | str | pd.DataFrame, text: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
    """A file or a DataFrame as a DataFrame with text names and a plain index, and notes; see `read_frame`."""
    import pandas as pd

    if not isinstance(source, pd.DataFrame):
        return read_frame(source, text=text)
    notes = []
    frame = source
    if isinstance(frame.columns, pd.MultiIndex):
        raise DataError("the table has columns of several levels: flatten their names first")
    names = [str(c) for c in frame.columns]
    if any(not isinstance(c, str) for c in frame.columns):
        notes.append("column names that are not text were read as text")
    if not isinstance(frame.index, pd.RangeIndex):
        notes.append("the index of the table is not a column; use reset_index() to make it one")
    _check_names(names)
    if not names or not len(frame):
        raise DataError(f"the table is empty: {len(frame)} rows, {len(names)} columns")
    return frame.set_axis(names, axis=1).reset_index(drop=True), notes


def read_frame(path: Path | str, *, text: Collection[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """A table file as a DataFrame, and what a person should know about the reading.

    Arguments:
        text: columns of a text file that stay text even where they look like numbers.

    Raises:
        DataError: no such file, or not a table; UsageError: an unknown suffix.
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"cannot tell what kind of table {path.name} is: the suffix must be {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if suffix == ".parquet":
        return _read_parquet(path)
    rows, blanks = _read_cells(path, _read_text(path), "\t" if suffix.startswith(".tsv") else None)
    names, body, notes = _take_header(path, rows)
    return _to_columns(path, names, body, text, blanks + notes)


def _read_parquet(path: Path) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise MissingExtraError("reading Parquet needs pyarrow: pip install 'trilemma[parquet]'") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these types
        raise DataError(f"{path.name} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    return open_table(frame, ())


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} is not a complete gzip file: {error}") from error
    if b"\0" in data:
        hint = "save it as UTF-8 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "it is not a text table"
        raise DataError(f"{path.name} holds zero bytes: {hint}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path.name} is not UTF-8 text (line {line}, byte 0x{data[error.start]:02x}): "
            "save it as UTF-8, for example with iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path.name} is empty")
    if text.lstrip()[0] in "<{":
        raise DataError(f"{path.name} is not a table with delimiters: it begins like HTML, XML or JSON")
    return text


def _parse(path: Path, lines: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(
        io.StringIO(lines, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True
    )
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: {error}; is a quotation mark missing?") from error


def _read_cells(path: Path, text: str, delimiter: str | None) -> tuple[list[list[str]], list[str]]:
    """The rows of a text table, all of one length and without blanks around cells, and notes."""
    delimiter = delimiter or _sniff(text)
    rows = _parse(path, text, delimiter)
    width = len(rows[0][1])
    for line, row in rows:
        if len(row) != width:
            raise DataError(
                f"{path.name}, line {line}: {len(row)} field(s), but the first line has {width} "
                f"(delimiter {delimiter!r}): mend the line, or write the file with another delimiter"
            )
    lines = [row[0].split() for _, row in rows[:50]] if width == 1 else []
    if lines and len(lines[-1]) > 1 and all(NUMBER.fullmatch(cell) for cells in lines[1:] for cell in cells):
        raise DataError(
            f"{path.name} has one column, whose lines hold several numbers with blanks between: "
            f"write it with one of the delimiters {' '.join(map(repr, DELIMITERS))}"
        )
    stripped = [[cell.strip() for cell in row] for _, row in rows]
    blanks = f"{delimiter} " in text or any(row != cells for (_, row), cells in zip(rows, stripped, strict=True))
    return stripped, ["blanks around cells were stripped"] if blanks else []


def _sniff(text: str) -> str:
    """The delimiter that cuts the first lines into equally many fields; the one with most numbers if several do."""
    lines = "\n".join([line for line in text.splitlines() if line.strip()][:200])
    best, best_score = ",", (0.0, 0.0, 0)
    for delimiter in DELIMITERS:
        try:  # an odd quotation mark at the cut is no error here
            reader = csv.reader(io.StringIO(lines, newline=""), delimiter=delimiter, skipinitialspace=True)
            rows = [row for row in reader if row]
        except csv.Error:
            continue  # the whole file meets the same error, with its line
        width = len(rows[0])
        if width < 2:
            width = max({len(r) for r in rows}, key=lambda w: sum(len(r) == w for r in rows))
        if width < 2:
            continue
        same = sum(len(r) == width for r in rows) / len(rows)
        cells = [c.strip() for r in rows for c in r]
        numbers = sum(bool(NUMBER.fullmatch(c) or DECIMAL_COMMA.fullmatch(c)) for c in cells) / len(cells)
        if (same, numbers, width) > best_score:
            best, best_score = delimiter, (same, numbers, width)
    return best


def _take_header(path: Path, rows: list[list[str]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Column names, the other rows, and notes."""
    notes: list[str] = []
    first, body = rows[0], rows[1:]
    if not _is_header(first, body):
        names = [f"column_{i}" for i in range(len(first))]
        notes.append(f"the first line looks like data, so the columns are named column_0 to {names[-1]}")
        return names, rows, notes
    if not body:
        raise DataError(f"{path.name} has a header and no rows")
    if any(NUMBER.fullmatch(cell) for cell in first):
        notes.append("the first line was read as a header, since its numbers count up")
    names = [cell or f"column_{i}" for i, cell in enumerate(first)]
    if names != first:
        notes.append(
            f"columns without a name are called {', '.join(n for n, f in zip(names, first, strict=True) if not f)}"
        )
    _check_names(names)
    return names, body, notes


def _is_header(first: list[str], body: list[list[str]]) -> bool:
    """Names, and not data: no numbers (unless they count up, as 0, 1, 2 or 2019, 2020, 2021), not all met below."""
    numbers = [cell for cell in first if NUMBER.fullmatch(cell)]
    if numbers:
        counting = len(numbers) >= 3 and all(WHOLE.fullmatch(n) for n in numbers)
        return counting and all(int(b) - int(a) == 1 for a, b in pairwise(numbers))
    if any(cell in MISSING and cell for cell in first):
        return False
    return not body or any(all(row[j] != cell for row in body) for j, cell in enumerate(first))


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"the table has several columns named {', '.join(map(repr, twice))}: rename them")


def _to_columns(
    path: Path, names: list[str], body: list[list[str]], text: Collection[str], notes: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    columns: dict[str, Any] = {}
    for name, cells in zip(names, zip(*body, strict=True), strict=True):
        distinct = set(cells)
        for token in sorted(distinct & MISSING - {""}):
            notes.append(f"column {name!r}: {cells.count(token)} cell(s) {token!r} read as missing")
        values = distinct - MISSING
        if name not in text and values and all(NUMBER.fullmatch(v) for v in values):
            columns[name] = _numbers(cells, values)
            continue
        if name not in text:
            _check_mistakes(path, name, cells, values)
        columns[name] = pd.Series([None if c in MISSING else c for c in cells], dtype=object)
    frame = pd.DataFrame(columns)
    as_text = "str" if int(pd.__version__.split(".")[0]) >= 3 else "object"
    return frame.astype({n: as_text for n in names if frame[n].dtype == object}), notes


LONG_WHOLE = re.compile(r"[+-]?\d{16,}")
"""Whole numbers, such as long ids, that float64 may not hold."""


def _numbers(cells: Sequence[str], values: set[str]) -> Any:
    """Whole numbers, real numbers, or text where a leading zero or too many digits would be lost."""
    import pandas as pd

    if any(PADDED.fullmatch(v) for v in values):
        return pd.Series([None if c in MISSING else c for c in cells], dtype=object)
    if any(LONG_WHOLE.fullmatch(v) and int(float(v)) != int(v) for v in values):
        return pd.Series([None if c in MISSING else c for c in cells], dtype=object)
    if all(WHOLE.fullmatch(v) for v in values):
        whole = [None if c in MISSING else int(c) for c in cells]
        return pd.Series(whole, dtype="Int64" if None in whole else "int64")
    return pd.Series([float("nan") if c in MISSING else float(c) for c in cells], dtype="float64")


def _check_mistakes(path: Path, name: str, cells: Sequence[str], values: set[str]) -> None:
    """Raise where a column of text is really one of numbers."""
    numbers = {v for v in values if NUMBER.fullmatch(v)}
    commas = {v for v in values - numbers if DECIMAL_COMMA.fullmatch(v)}
    if commas and numbers | commas == values:
        raise DataError(
            f"{path.name}, column {name!r} has decimal commas, such as {min(commas)!r}: write points, or pass the "
            "DataFrame of pandas.read_csv(..., decimal=',')"
        )
    present = [c for c in cells if c not in MISSING]
    wrong = [c for c in present if c not in numbers]
    if len(numbers) > 20 and len(wrong) <= (1.0 - MOSTLY) * len(present):
        row = cells.index(wrong[0]) + 1
        raise DataError(
            f"{path.name}, column {name!r} is numeric, but {len(wrong)} of its {len(present)} values are not, first "
            f"{wrong[0]!r} in row {row}: mend them, or read the column with types={{{name!r}: 'categorical'}}"
        )
