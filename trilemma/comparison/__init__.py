"""Many models, one data set, equal budgets: a leaderboard and a report."""

from trilemma.comparison.compare import compare
from trilemma.comparison.report import Report, Row

__all__ = ["Report", "Row", "compare"]
