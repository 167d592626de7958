"""The possible values of a table's column: its even grid, its list of values, its categories.

A column with `resolution` r and `offset` o takes the values o + r k for whole k.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from trilemma.core.spec import Column


def _grid_ratio(column: Column) -> tuple[float, float, float]:
    """Integers (step, start, q): the grid point of index k is (start + step k) / q.

    Resolution and offset are read as the decimals that they print as, so that 7 steps of 0.01 are the
    double nearest to 0.07, as in the user's file, and not 7 * 0.01 = 0.07000000000000001.
    """
    step, start = Fraction(repr(column.resolution)), Fraction(repr(column.offset))
    q = math.lcm(step.denominator, start.denominator)
    return float(step * q), float(start * q), float(q)


def grid_index(column: Column, x: Tensor) -> Tensor:
    """The index (a whole float64) of the grid point nearest to x (float64), for a column with a resolution."""
    step, start, q = _grid_ratio(column)
    return ((x * q - start) / step).round()


def grid_value(column: Column, index: Tensor) -> Tensor:
    """The grid point (float64) of a whole index, correctly rounded; the inverse of `grid_index`."""
    step, start, q = _grid_ratio(column)
    return (index * step + start) / q


def off_support(column: Column, x: Tensor) -> Tensor:
    """Which of x (N,), float64, are neither missing nor among the possible values of a column."""
    if column.kind == "categorical":
        possible = (x == x.round()) & (x >= 0) & (x < len(column.categories))
    elif column.kind == "boolean":
        possible = (x == 0) | (x == 1)
    elif column.values:
        grid = torch.tensor(column.values, dtype=torch.float64, device=x.device)
        possible = grid[torch.searchsorted(grid, x.contiguous()).clamp(max=len(grid) - 1)] == x
    elif column.resolution is not None:
        # Rounding in the last place, of single precision for numbers, does not make a different value.
        last_place = 2.0**-50 if column.kind == "date" else 2.0**-23
        slack = (last_place * x.abs()).clamp(1e-9 * column.resolution, 0.01 * column.resolution)
        possible = (grid_value(column, grid_index(column, x)) - x).abs() <= slack
    else:
        return torch.zeros_like(x, dtype=torch.bool)
    return ~(possible | x.isnan())


def describe_support(column: Column) -> str:
    """The possible values of a column in words: "a grid of 0.01", "5 values", "16 categories"."""
    if column.kind == "boolean":
        return "0 and 1"
    if column.kind == "categorical":
        return f"{len(column.categories)} categories"
    if column.values:
        return "1 value" if len(column.values) == 1 else f"{len(column.values)} values"
    return "real numbers" if column.resolution is None else f"a grid of {column.resolution:g}"
