"""Every recipe is a model that can be made, with training settings that exist, and names what it should reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from trilemma.cli import run as cli
from trilemma.core.config import validate
from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.registry import create
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.engine import Run, TrainConfig
from trilemma.engine.recipe import Recipe, read_recipe
from trilemma.flow.autoregressive import Autoregressive
from trilemma.flow.linear import ActNorm
from trilemma.flow.marginal import Marginal
from trilemma.flow.model import Flow
from trilemma.flow.splines import RationalQuadraticSpline

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
CIFAR = DataSpec(kind="image", shape=(3, 32, 32), levels=256)
MNIST = DataSpec(kind="image", shape=(1, 28, 28), levels=256)
DIMS = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}
CLASSES = ConditionSpec(kind="class", names=tuple("abcdefghij"))
SPECS = {"cifar10": CIFAR, "mnist": MNIST, **{k: DataSpec(kind="points", shape=(d,)) for k, d in DIMS.items()}}
PUBLISHED = {
    "cifar10-ddpm": 3.17,
    "cifar10-vp-sde": 2.41,
    "cifar10-subvp-sde": 2.41,
    "cifar10-edm": 1.97,
    "cifar10-realnvp": 3.49,
    "cifar10-glow": 3.35,
    "cifar10-i-resnet": 3.45,
    "cifar10-mintnet": 3.32,
    "cifar10-residual-flow": 3.28,
    "cifar10-ffjord": 3.40,
    "cifar10-flowpp": 3.08,
    "cifar10-stylegan2-ada": 2.92,
    "cifar10-stylegan2-ada-conditional": 2.42,
    "cifar10-r3gan": 1.96,
    "mnist-glow": 1.05,
    "mnist-residual-flow": 0.97,
    "mnist-ffjord": 1.05,
    "power-nsf": 0.66,
    "gas-nsf": 13.09,
    "hepmass-nsf": -14.01,
    "miniboone-nsf": -9.22,
    "bsds300-nsf": 157.31,
}


def make(recipe: Recipe, name: str) -> GenerativeModel:
    """The recipe's model for the data that the file `name` is called after."""
    condition = CLASSES if recipe.settings.get("conditional") else None
    spec = SPECS[name.split("-")[0]].model_copy(update={"condition": condition})
    return create(recipe.model, spec, **recipe.settings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_a_model_with_settings_that_exist(path: Path):
    recipe = read_recipe(path)
    model = make(recipe, path.stem)
    validate(TrainConfig, {**model.train_defaults, **recipe.train}, "train")
    model._check_settings("_sample", recipe.sample)
    assert recipe.targets
    assert recipe.targets[0].value == PUBLISHED[path.stem]


@pytest.mark.parametrize(
    ("name", "millions", "published", "share"),
    [
        ("cifar10-ddpm", 28.8, 35.7, 0.2),  # the paper's has more blocks on the way up
        ("cifar10-edm", 49.3, 55.7, 0.2),
        ("cifar10-glow", 44.9, 44.0, 0.03),  # Durkan et al. 2019, table 3
        ("cifar10-flowpp", 31.8, 31.4, 0.03),
    ],
)
def test_the_recipes_networks_have_the_sizes_of_their_papers(
    name: str, millions: float, published: float, share: float
):
    model = make(read_recipe(FOLDER / f"{name}.yaml"), name)
    model.initialize(0)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    assert size == pytest.approx(millions, rel=0.01)
    assert size == pytest.approx(published, rel=share)


@pytest.mark.parametrize("name", [f"{table}-nsf" for table in DIMS])
def test_the_recipes_of_tables_are_ten_exact_spline_flows(name: str):
    """Each of linear map and autoregressive splines on [-3, 3], without anything fitted to margins before."""
    model = make(read_recipe(FOLDER / f"{name}.yaml"), name)
    assert isinstance(model, Flow)
    model.initialize(0)
    layers = [m for m in model.modules() if isinstance(m, Autoregressive)]
    assert len(layers) == 10
    for layer in layers:
        assert isinstance(layer.elementwise, RationalQuadraticSpline)
        assert layer.elementwise.size == 3 * 8 - 1
        assert layer.elementwise.bound == 3.0
    assert not any(isinstance(m, Marginal | ActNorm) for m in model.modules())
    assert model.transform.kind == "exact"


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
