"""Whole-process time of `trilemma --help`, which must not import torch. Target: under 0.3 s."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import record, seconds


def main() -> None:
    help_command = [str(Path(sys.executable).with_name("trilemma")), "--help"]
    empty = [sys.executable, "-c", "pass"]

    def run(command: list[str]) -> float:
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))

    run(help_command)
    times = [(run(help_command), run(empty)) for _ in range(21)]
    record(
        "import_time",
        {
            "help_seconds_median": statistics.median(t for t, _ in times),
            "help_seconds_max": max(t for t, _ in times),
            "empty_python_seconds_median": statistics.median(t for _, t in times),
        },
    )


if __name__ == "__main__":
    main()
