"""Every recipe is a model that can be made, with training settings that exist, and names what it should reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from trilemma.cli import run as cli
from trilemma.core.config import validate
from trilemma.core.errors import UsageError
from trilemma.core.registry import create
from trilemma.core.spec import DataSpec
from trilemma.diffusion.model import Diffusion
from trilemma.engine import Run, TrainConfig
from trilemma.engine.recipe import read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
CIFAR = DataSpec(kind="image", shape=(3, 32, 32), levels=256)
PUBLISHED = {"cifar10-ddpm": 3.17, "cifar10-vp-sde": 2.41, "cifar10-subvp-sde": 2.41, "cifar10-edm": 1.97}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_a_model_with_settings_that_exist(path: Path):
    recipe = read_recipe(path)
    model = create(recipe.model, CIFAR, **recipe.settings)
    validate(TrainConfig, {**model.train_defaults, **recipe.train}, "train")
    model._check_settings("_sample", recipe.sample)
    assert recipe.targets
    assert recipe.targets[0].value == PUBLISHED[path.stem]


def test_the_recipes_networks_have_the_sizes_of_their_papers():
    """In millions of parameters; the papers have 35.7 (DDPM: it has more blocks on the way up) and 55.7 (EDM)."""
    sizes = {}
    for name in ("cifar10-ddpm", "cifar10-edm"):
        recipe = read_recipe(Path(__file__).parents[1] / "recipes" / f"{name}.yaml")
        model = create(recipe.model, CIFAR, **recipe.settings)
        assert isinstance(model, Diffusion)
        model.initialize(0)
        sizes[name] = sum(p.numel() for p in model.net.parameters()) / 1e6
    assert sizes["cifar10-ddpm"] == pytest.approx(28.8, rel=0.01)
    assert sizes["cifar10-edm"] == pytest.approx(55.7, rel=0.2)


def test_a_recipe_trains_from_the_command_line_and_settings_go_on_top(tmp_path: Path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: edm\ndata: a toy\nsettings: {width: 16, depth: 1}\n"
        "train: {images: 640, batch_size: 64}\ntargets: [{metric: FID, value: 1, source: nowhere}]\n"
    )
    arguments = ["train", str(path), "two-moons", "width=8", "train.previews=0"]
    assert cli([*arguments, "--out", str(tmp_path / "a")]) == 0
    run = Run(tmp_path / "a")
    assert run.status["step"] == 10
    assert (run.config["settings"]["width"], run.config["settings"]["depth"]) == (8, 1)
    assert cli([*arguments, "--steps", "3", "--out", str(tmp_path / "b")]) == 0
    assert Run(tmp_path / "b").status["step"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "empty or a list"),
        ("model: [", "not YAML"),
        ("model: edm\ndata: x\nsteps: 3", "unknown setting 'steps'"),
    ],
)
def test_what_is_no_recipe_is_refused(content: str, message: str, tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_recipe(path)
    with pytest.raises(UsageError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yaml")
