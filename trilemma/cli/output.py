"""Printing for people (rich) and for programs (JSON)."""

from __future__ import annotations

import json
import sys
from typing import Any


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"trilemma: {message}", file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON document on stdout; what is not finite is null, so that every reader can parse it."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def print_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_pairs(pairs: dict[str, Any]) -> None:
    """Key: value lines, aligned."""
    width = max(len(key) for key in pairs)
    for key, value in pairs.items():
        print(f"{key.ljust(width)}  {value}")
