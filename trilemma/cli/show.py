"""Descriptions of runs, models and data for people."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from trilemma.cli.output import print_pairs, print_table
from trilemma.core.registry import Entry
from trilemma.core.spec import DataSpec
from trilemma.engine import Run

SETTINGS_OF: dict[str, Literal["_sample", "_log_prob", "_pictures"]] = {
    "sample": "_sample",
    "score": "_log_prob",
    "show": "_pictures",
}
"""What takes settings of its own, and by which hook of a model."""

SIZES = {
    "points": DataSpec(kind="points", shape=(2,)),
    "8x8": DataSpec(kind="image", shape=(1, 8, 8), levels=256),
    "3x64x64": DataSpec(kind="image", shape=(3, 64, 64), levels=256),
}
"""Data for which `info MODEL` says the settings that depend on them."""


def describe_run(run: Run) -> dict[str, Any]:
    """What `info RUN` says."""
    config, data, status = run.config, run.data, run.status
    described: dict[str, Any] = {
        "run": str(run.path),
        "model": config["model"],
        "data": data["name"],
        "state": status.get("state", "not begun"),
        "step": status.get("step"),
        "seconds": status.get("elapsed"),
        "seed": config["train"]["seed"],
        "parameters": status.get("parameters"),
    }
    if status.get("best_loss") is not None:
        described |= {"best_step": status["best_step"], "best_validation_loss": status["best_loss"]}
    if status.get("reason"):
        described["reason"] = status["reason"]
    events = [event["message"] for event in run.events()]
    return described | ({"events": events} if events else {})


def describe_model(entry: Entry) -> dict[str, Any]:
    """What `info MODEL` says: the paper, what it can do, and every setting with its default and meaning."""
    described = entry.as_dict()
    for key, value in described.items():
        described[key] = ", ".join(value) if isinstance(value, list) else value
    by_data = _sized(entry)
    for name, field in entry.model.Config.model_fields.items():
        default = entry.settings.get(name, field.get_default(call_default_factory=True))
        text = ", ".join(f"{kind}: {value}" for kind, value in by_data.get(name, {}).items()) or f"{_plain(default)}"
        described[f"{name}="] = text + (f"  ({field.description})" if field.description else "")
    for title, hook in SETTINGS_OF.items():
        for name, default in entry.model.settings_of(hook).items():
            meaning = entry.model.setting_help.get(name)
            described[f"{title} {name}="] = f"{default}" + (f"  ({meaning})" if meaning else "")
    return described


def _sized(entry: Entry) -> dict[str, dict[str, Any]]:
    """Settings that follow from the data: name -> a few kinds of data -> value."""
    found: dict[str, dict[str, Any]] = {}
    for label, spec in SIZES.items():
        if spec.kind in entry.model.data_kinds:
            for name, value in entry.model.sized_for(spec, entry.settings).items():
                if name not in entry.settings:
                    found.setdefault(name, {})[label] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """An optimiser as its settings."""
    return value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value


def show_data(description: dict[str, Any]) -> None:
    """Print what `describe_data` found."""
    columns = description.pop("columns", None)
    skipped = description.pop("skipped_files", None)
    notes = description.pop("notes", [])
    classes = description.pop("classes", None)
    if description["condition"] is not None:  # without the columns that it was made of
        description["condition"] = {
            k: v for k, v in description["condition"].items() if k in ("kind", "names", "shape")
        }
    print_pairs({k: _text(v) for k, v in description.items()})
    if classes:
        parts = list(next(iter(classes.values())))
        print_table(["class", *parts], [[name, *[str(counts[p]) for p in parts]] for name, counts in classes.items()])
    if columns:
        rows = [[c["name"], c["kind"], c["dtype"], _support(c), "some" if c["missing"] else "none"] for c in columns]
        print_table(["column", "kind", "dtype", "takes", "missing"], rows)
    for note in notes:
        print(f"note: {note}")
    for bad in skipped or []:
        print(f"not used: {bad['where']}: {bad['reason']}")


def _support(column: dict[str, Any]) -> str:
    """What a column takes, in words; a discrete one is dequantized at this resolution."""
    if column["categories"]:
        return f"{column['categories']} categories"
    if column["values"]:
        return f"{column['values']} values"
    if column["resolution"]:
        return f"a grid of {column['resolution']:g}"
    return "true or false" if column["kind"] == "boolean" else "real numbers"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) if value else "none"
    return "" if value is None else str(value)
