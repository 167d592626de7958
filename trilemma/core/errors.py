"""Errors a person can act on: one line that says what, where, why and what to do.

`UsageError` is a wrong request (exit code 2 on the command line); every other `TrilemmaError` is a
request that was right and failed (exit code 1). Broken invariants are plain assertions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrilemmaError(Exception):
    """Base class of every error that Trilemma raises on purpose."""


class UsageError(TrilemmaError, ValueError):
    """The request itself is wrong: an unknown name, a bad setting, arguments that contradict each other."""


class CapabilityError(TrilemmaError, NotImplementedError):
    """The model cannot do this, by its mathematics; the message names the models that can."""


class NotFittedError(TrilemmaError, RuntimeError):
    """The model has not been fitted, so it has nothing to sample or to score with."""


class DataError(TrilemmaError, ValueError):
    """The data cannot be used as they are."""


class MissingExtraError(TrilemmaError, ImportError):
    """An optional dependency is not installed; the message gives the extra that brings it."""


class CheckpointError(TrilemmaError, RuntimeError):
    """A saved model or run is missing, damaged or belongs to something else."""


class BudgetError(TrilemmaError, RuntimeError):
    """The budget is too small to do anything with."""


class DivergedError(TrilemmaError, ArithmeticError):
    """Training produced a non-finite loss or gradient twice."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageError:
    """A `UsageError` for an unknown name: the closest known ones first, then all that exist."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    listing = ", ".join(known) if known else "none"
    return UsageError(f"unknown {what} {name!r}{guess} There are: {listing}")
