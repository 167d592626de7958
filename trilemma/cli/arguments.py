"""What commands make of their arguments: data, settings, conditions; and how they report a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from trilemma.core.model import GenerativeModel
    from trilemma.data import Dataset
    from trilemma.engine import Run


def is_finished(path: str) -> bool:
    """Whether there is a run or a comparison at a path, rather than data."""
    p = Path(path)
    return (p / "config.yaml").is_file() or (p / "report.json").is_file() or p.name == "report.json"


def load_source(source: str, settings: Any) -> Dataset:
    from trilemma.data import load_data

    return load_data(source, **data_settings(settings, load_data))


def data_settings(settings: Any, function: Any) -> dict[str, Any]:
    """Settings that `function` has; names of columns and types are text, whatever they look like."""
    import inspect

    from trilemma.core.errors import UsageError, unknown_name

    if not isinstance(settings, dict):
        raise UsageError("data settings are written data.KEY=VALUE, for example data.size=32")
    known = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for key in settings:
        if key not in known:
            raise unknown_name("data setting", key, known)
    result: dict[str, Any] = dict(settings)
    if result.get("label") is not None:
        result["label"] = str(result["label"])
    if result.get("given") is not None:
        names = result["given"]
        result["given"] = [str(name) for name in names] if isinstance(names, list) else str(names)
    if isinstance(result.get("types"), dict):
        result["types"] = {str(k): v for k, v in result["types"].items()}
    return result


def report_run(run: Run, as_json: bool) -> None:
    from trilemma.cli.output import complain, print_json
    from trilemma.cli.show import describe_run

    status = run.status
    if as_json:
        print_json(describe_run(run))
    elif status["state"] == "finished":
        print(f"{status['state']}: {status['step']} steps in {status['elapsed']:.1f} s: {run.path}")
    if status["state"] == "interrupted":
        complain(f"saved at step {status['step']}; go on with: trilemma resume {run.path}")
        raise typer.Exit(128 + int(status["signal"]))


def label_condition(model: GenerativeModel, label: str | None, n: int) -> Any:
    """The class called `label` n times; without a label a conditional model takes its classes in turn."""
    import torch

    from trilemma.core.errors import UsageError, unknown_name

    spec = model.condition
    if label is None:
        if spec is None:
            return None
        if spec.kind != "class":
            raise UsageError(f"{conditioned_on(model)}: give --condition {condition_files(model)}")
        return torch.arange(n) % spec.size
    if spec is None:
        why = "train it with conditional=true" if model.condition_kinds else "this family cannot be conditioned"
        raise UsageError(f"--label {label}: {model.name} was trained without labels; {why}")
    if spec.kind != "class":
        raise UsageError(f"--label {label}: {conditioned_on(model)}; give --condition {condition_files(model)}")
    if label not in spec.names:
        raise unknown_name("label", label, spec.names)
    return torch.full((n,), spec.names.index(label))


def conditioned_on(model: GenerativeModel) -> str:
    spec = model.condition
    assert spec is not None
    what = f"the vector {', '.join(spec.names)}" if spec.kind == "vector" else spec.describe()
    return f"{model.name} is conditioned on {what}"


def condition_files(model: GenerativeModel) -> str:
    """In which files the conditions of a model can stand."""
    spec = model.condition
    assert spec is not None
    return "FILE.csv with these columns" if spec.columns else "FILE.npy (or .npz)"


def file_condition(model: GenerativeModel, path: Path, label: str | None, n: int | None) -> Any:
    """The conditions in a file, (n, *value_shape); n is None for as many as it holds."""
    from trilemma.core.errors import UsageError
    from trilemma.data.examples import load_condition

    spec = model.condition
    if label is not None:
        raise UsageError("--label and --condition: give the one that the model is conditioned on")
    if spec is None:
        why = "train it with conditional=true" if model.condition_kinds else "this family cannot be conditioned"
        raise UsageError(f"--condition {path}: {model.name} was trained without a condition; {why}")
    if spec.kind == "class" and not spec.columns:
        raise UsageError(f"--condition {path}: {conditioned_on(model)}; give --label, one of its classes")
    return load_condition(path, spec, n)
