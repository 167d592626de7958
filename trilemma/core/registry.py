"""Short names of the literature -> models. Users add theirs through the entry point group "trilemma.models".

An entry point names a module that calls `register`:

    [project.entry-points."trilemma.models"]
    my-model = "my_package.my_module"

Names are resolved here only: nothing in a saved file can name code.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from trilemma.core.config import merge
from trilemma.core.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from trilemma.core.model import GenerativeModel
    from trilemma.core.spec import DataSpec

FAMILIES = ("classical", "energy", "autoencoder", "flow", "adversarial", "diffusion")
"""The packages of Trilemma that register models when they are imported."""

ENTRY_POINT_GROUP = "trilemma.models"


@dataclass(frozen=True)
class Entry:
    """A registered model: a class and the settings that make it the model of its paper."""

    name: str
    model: type[GenerativeModel]
    family: str
    paper: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For `trilemma models --json`."""
        return {
            "name": self.name,
            "family": self.family,
            "paper": self.paper,
            "abilities": sorted(self.model.abilities()),
            "data_kinds": sorted(self.model.data_kinds),
        }


_entries: dict[str, Entry] = {}
_loaded = False


def register(
    name: str,
    model: type[GenerativeModel],
    *,
    family: str,
    paper: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Give a model a name.

    Arguments:
        family: one of `FAMILIES`, or a new one.
        paper: authors, year and arXiv id or venue.
        settings: of its `Config`, on top of the class's defaults: a preset.

    Raises:
        UsageError: the name is taken by another class.
    """
    known = _entries.get(name)
    if known is not None and known.model is not model:
        raise UsageError(f"the model name {name!r} is taken by {known.model.__module__}.{known.model.__qualname__}")
    _entries[name] = Entry(name, model, family, paper, dict(settings or {}))


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True  # first: the modules below may themselves ask the registry
    for family in FAMILIES:
        importlib.import_module(f"trilemma.{family}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:  # somebody else's package must not take every command down
            warnings.warn(f"the plug-in {point.name!r} of {ENTRY_POINT_GROUP} fails: {error}", stacklevel=2)


def entries() -> dict[str, Entry]:
    """Every registered model, by name."""
    _load()
    return dict(_entries)


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UsageError: there is none; the message lists what exists and guesses what was meant.
    """
    _load()
    if name not in _entries:
        raise unknown_name("model", name, sorted(_entries))
    return _entries[name]


def create(name: str, spec: DataSpec, **settings: Any) -> GenerativeModel:
    """An unfitted model that sizes itself from the data's `spec`; keywords override its settings."""
    entry = find(name)
    return entry.model(spec, name=name, **merge(entry.settings, settings))


def names_with(
    *, ability: str | None = None, data_kind: str | None = None, condition_kind: str | None = None
) -> list[str]:
    """Names of the models that can do all that is asked."""
    return sorted(
        e.name
        for e in entries().values()
        if (ability is None or ability in e.model.abilities())
        and (data_kind is None or data_kind in e.model.data_kinds)
        and (condition_kind is None or condition_kind in e.model.condition_kinds)
    )
