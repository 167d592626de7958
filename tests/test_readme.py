"""The README's example runs as written, and its table lists every model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trilemma.core.registry import entries

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path: Path, monkeypatch: Any) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(block.strip().splitlines()) <= 16
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "my-comparison.html").exists()
    assert (tmp_path / "my-comparison" / "report.json").exists()


def test_the_table_lists_every_model() -> None:
    table = README.partition("## Models")[2].partition("\n##")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    rows = {name.strip(" `"): line for line in lines for name in line.split("|")[1].split(",")}
    registered = {n: e for n, e in entries().items() if e.family != "toy"}
    assert rows.keys() == registered.keys()
    for name, entry in registered.items():
        assert entry.family in rows[name]
        for ability in entry.model.abilities():
            assert ability in rows[name], f"{name}: {ability}"
