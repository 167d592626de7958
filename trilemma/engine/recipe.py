"""Recipes: a model with all its settings, in a file, and the numbers that its paper reached with them.

    trilemma train recipes/cifar10-edm.yaml DATA

runs one. Settings given on the command line go on top of the recipe's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from trilemma.core.config import Config, validate
from trilemma.core.errors import UsageError


class Target(Config):
    """A published number."""

    metric: str = Field(description="with its unit, such as FID or bits/dim")
    value: float
    source: str = Field(description="authors, year, where in the paper")


class Recipe(Config):
    """What a recipe file holds."""

    model: str = Field(description="a registered name")
    data: str = Field(description="the data it was made for, in words")
    settings: dict[str, Any] = Field(default_factory=dict, description="of the model")
    train: dict[str, Any] = Field(default_factory=dict, description="of the training")
    sample: dict[str, Any] = Field(default_factory=dict, description="sampler settings with which targets are measured")
    targets: tuple[Target, ...] = ()
    notes: str = ""


def is_recipe(name: str) -> bool:
    """Whether a name on the command line is that of a recipe file."""
    return name.endswith((".yaml", ".yml"))


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        UsageError: there is no such file, it is no YAML, or it holds something else.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"the recipe {path} is empty or a list: it holds model, settings, train, targets")
    return validate(Recipe, content, f"recipe {path}")
