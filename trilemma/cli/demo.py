"""`demo`: small games played and drawn on the spot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer


def demo(
    name: Annotated[Optional[str], typer.Argument(help="Which one; without it they are listed.")] = None,  # noqa: UP045
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the demo, such as steps=500 or loss=minimax."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides every random draw.")] = 0,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder; demo-NAME by default.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Play a small known game; draw it as a film and a picture."""
    from trilemma.adversarial.demo import DEMOS
    from trilemma.cli.output import print_json, print_table
    from trilemma.core.config import parse_overrides, validate
    from trilemma.core.errors import unknown_name
    from trilemma.core.storage import write_bytes

    if name is None and as_json:
        print_json({key: d.config.model_json_schema()["properties"] for key, d in DEMOS.items()})
        return
    if name is None:
        for key, d in DEMOS.items():
            print(f"{key}: {d.summary}")
            for field, about in d.config.model_fields.items():
                print(f"    {field}={about.default}" + (f"  ({about.description})" if about.description else ""))
        return
    if name not in DEMOS:
        raise unknown_name("demo", name, DEMOS)
    chosen = DEMOS[name]
    config = validate(chosen.config, parse_overrides(settings or []), f"demo {name}")
    print(f"playing {name}, which takes a minute or so", file=sys.stderr)
    shown = chosen.show(config, seed)
    folder = out or Path(f"demo-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in shown.files.items():
        write_bytes(folder / file, content)
    paths = [str(folder / file) for file in shown.files]
    if as_json:
        print_json({"demo": name, "seed": seed, "settings": config.model_dump(), "files": paths, "figures": shown.rows})
        return
    print_table(list(shown.rows[0]), [[_cell(value) for value in row.values()] for row in shown.rows])
    print(shown.remark)
    print("\n".join(paths))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
