"""Typed settings and ``key=value`` overrides, with errors that name the exact path.

Settings are pydantic models with ``extra="forbid"``. On the command line and in Python an override is a
dotted path and a value: ``train.batch_size=64``, ``hidden=256``, ``channels=[32,64]``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trilemma.core.errors import UsageError

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Base of every settings class: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """["hidden=256", "train.lr=1e-3"] -> {"hidden": 256, "train": {"lr": 0.001}}.

    Values are read as YAML scalars or lists (numbers, true/false, null, [1, 2], text), nothing is executed.

    Raises:
        UsageError: a pair without "=", or a key given twice.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        if not sep or not key:
            raise UsageError(f"setting {pair!r} is not of the form key=value, for example hidden=256")
        node = result
        *parents, leaf = key.strip().split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"setting {key!r}: {part!r} was already given a value")
        if leaf in node:
            raise UsageError(f"setting {key!r} is given twice")
        node[leaf] = _parse_value(key, text)
    return result


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"setting {key!r}: cannot read the value {text!r}") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            return value
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `over` on top; nested settings are merged, not replaced."""
    result = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in base.items()}
    for key, value in over.items():
        value = value.model_dump() if isinstance(value, BaseModel) else value
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result


def validate(config_class: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build a settings object, or raise a one-line `UsageError` naming the path, the value and what exists.

    Settings inside settings change only what they name: optimizer={"lr": 0.1} keeps the default's other values.

    Arguments:
        where: whose settings these are, for the message ("model vae", "train").
    """
    nested = {k: f.default for k, f in config_class.model_fields.items() if isinstance(f.default, BaseModel)}
    given = merge({k: v for k, v in nested.items() if k in values}, values)
    try:
        return config_class.model_validate(given)
    except ValidationError as error:
        raise UsageError(_explain(config_class, error, where)) from error


def _explain(config_class: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(config_class, first["loc"][:-1]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        guess = f"; did you mean {close[0]!r}?" if close else "."
        return f"{where}: unknown setting {path!r}{guess} There are: {', '.join(known) or 'none'}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
    return f"{where}: setting {path!r}: {message[0].lower()}{message[1:]}{given}" if path else f"{where}: {message}"


def _fields_at(config_class: type[BaseModel], path: Iterable[Any]) -> Iterable[str]:
    current: Any = config_class
    for part in path:
        field = current.model_fields.get(part)
        current = None if field is None else field.annotation
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return ()
    return current.model_fields.keys()  # type: ignore[no-any-return]
