"""The registry, settings, errors and the public methods that all models share."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_models import POINTS, Gaussian, gaussian_points
from trilemma.check import QUICK
from trilemma.core import registry
from trilemma.core.config import parse_overrides
from trilemma.core.errors import CapabilityError, NotFittedError, UsageError
from trilemma.core.registry import create, entries, find, register
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.core.storage import staged_folder
from trilemma.engine import train

DIGITS = DataSpec(kind="image", shape=(1, 8, 8), levels=17)


def test_every_entry_is_described() -> None:
    for entry in entries().values():
        described = entry.as_dict()
        assert described.keys() == {"name", "family", "paper", "abilities", "data_kinds"}
        assert "sample" in described["abilities"]
        assert described["paper"]


def test_unknown_models_are_guessed_and_listed() -> None:
    with pytest.raises(
        UsageError, match=r"unknown model 'ddmp'; did you mean 'ddpm'\? There are: biggan, consistency, "
    ):
        find("ddmp")


def test_a_name_can_be_taken_once() -> None:
    register("toy-gaussian", Gaussian, family="toy", paper="none")  # again, the same class
    with pytest.raises(UsageError, match="taken by"):
        register("vae", Gaussian, family="toy", paper="none")


def test_models_come_in_through_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "tests.toy_models", registry.ENTRY_POINT_GROUP)
    asked = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [point]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_loaded", False)
    assert "toy-gan" in entries()
    assert asked == ["trilemma.models"]


def test_overrides_are_parsed_and_checked() -> None:
    assert parse_overrides(["hidden=256", "train.lr=1e-3", "widths=[32, 64]", "name=x=y", "on=true", "none=null"]) == {
        "hidden": 256,
        "train": {"lr": 0.001},
        "widths": [32, 64],
        "name": "x=y",
        "on": True,
        "none": None,
    }
    for bad in (["hidden"], ["=3"], ["a=1", "a=2"], ["a=1", "a.b=2"], ["a=[1"]):
        with pytest.raises(UsageError, match="setting"):
            parse_overrides(bad)


def test_setting_errors_name_the_path_and_what_exists() -> None:
    with pytest.raises(UsageError, match=r"model vae: unknown setting 'latent_dims'; did you mean 'latent_dim'\?"):
        create("vae", DIGITS, latent_dims=3)
    with pytest.raises(UsageError, match="model vae: setting 'latent_dim': input should be a valid integer"):
        create("vae", DIGITS, latent_dim="many")
    with pytest.raises(UsageError, match=r"greater than or equal to 1 \(given: -1\)"):
        create("vae", DIGITS, latent_dim=-1)


def test_nested_settings_are_merged() -> None:
    """One changed setting of an optimiser leaves the model's other choices for it alone."""
    default = create("nsf", DIGITS).config.optimizer
    changed = create("nsf", DIGITS, optimizer={"lr": 0.5}).config.optimizer
    assert changed.lr == 0.5
    assert changed.weight_decay == default.weight_decay == 1.0
    assert create("nsf", POINTS, optimizer={"lr": 0.5}).config.optimizer.weight_decay == 0.01


def test_capability_errors_name_who_can(tmp_path: Path) -> None:
    data = gaussian_points()
    model = create("r3gan", data.spec)
    with pytest.raises(CapabilityError, match=r"r3gan has no log_prob; models that do: .*ddpm.*nsf"):
        model.log_prob(data.test)
    with pytest.raises(NotFittedError, match="not fitted"):
        create("vae", data.spec).sample(1)


def test_conditions_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no labels or attributes"):
        create("vae", DIGITS, conditional=True)
    vector = POINTS.model_copy(update={"condition": ConditionSpec(kind="vector", names=("a", "b"))})
    with pytest.raises(CapabilityError, match="kde cannot be conditioned on a vector; models that can: "):
        create("kde", vector, conditional=True)


def test_sampling_is_a_function_of_the_generator(tmp_path: Path) -> None:
    data = gaussian_points()
    model = Gaussian(data.spec, name="toy-gaussian")
    train(model, data, out=tmp_path / "run", **QUICK)
    g = torch.Generator().manual_seed(5)
    first, second = model.sample(4, generator=g), model.sample(4, generator=g)
    assert not torch.equal(first, second)
    assert torch.equal(first, model.sample(4, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(model.sample(4), model.sample(4))
    with pytest.raises(UsageError, match="n >= 1"):
        model.sample(0)


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(stage: Path) -> Any:
        (stage / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as stage:
        fail(stage)
    assert list(tmp_path.iterdir()) == []
    with staged_folder(tmp_path / "out") as stage:
        (stage / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
