"""Paired timing and records."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trilemma.engine.run import describe_environment, timestamp

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(a: Callable[[], Any], b: Callable[[], Any], repetitions: int) -> dict[str, Any]:
    """Time a and b in turn (a b b a ...), so that a drift in speed hits both; the ratio is taken pair by pair."""
    a()
    b()
    times: list[tuple[float, float]] = []
    for i in range(repetitions):
        if i % 2:
            second = seconds(b)
            first = seconds(a)
        else:
            first = seconds(a)
            second = seconds(b)
        times.append((first, second))
    ratios = [x / y for x, y in times]
    return {
        "repetitions": repetitions,
        "median_a": statistics.median(x for x, _ in times),
        "median_b": statistics.median(y for _, y in times),
        "ratio_a_over_b": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def record(name: str, results: Any) -> None:
    """Write results/NAME.json with machine and versions, and print it."""
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, "time": timestamp(), "environment": describe_environment(), "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: results}, indent=2))
