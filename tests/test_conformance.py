"""`check_model` on every registered model, on every kind of data; and that it catches models that break a promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_models import Gaussian
from trilemma.check import (
    CHECKS,
    Subject,
    check_abilities,
    check_conditions,
    check_fits_and_samples,
    check_model,
    check_seeds,
    example_data,
)
from trilemma.core.codec import Codec
from trilemma.core.model import GenerativeModel
from trilemma.core.registry import create, entries
from trilemma.core.spec import Column, ConditionSpec, DataSpec
from trilemma.flow.model import Flow

CLASSES = ConditionSpec(kind="class", names=("a", "b", "c"))
IMAGE = DataSpec(kind="image", shape=(1, 8, 8), levels=17, condition=CLASSES)
OTHERS = {
    "colour": DataSpec(kind="image", shape=(3, 6, 5), levels=256),
    "real-image": DataSpec(kind="image", shape=(1, 4, 4)),
    "points": DataSpec(kind="points", shape=(2,), condition=CLASSES),
    "one-dimension": DataSpec(kind="points", shape=(1,)),
    "signal": DataSpec(kind="signal", shape=(2, 12)),
    "volume": DataSpec(kind="volume", shape=(1, 4, 4, 4), levels=2),
    "table": DataSpec(
        kind="table",
        shape=(5,),
        columns=(
            Column(name="real", kind="numeric", dtype="float64", missing=True),
            Column(name="count", kind="numeric", dtype="int64", resolution=1.0),
            Column(name="colour", kind="categorical", dtype="str", categories=("red", "green", "blue"), missing=True),
            Column(name="yes", kind="boolean", dtype="bool"),
            Column(name="price", kind="numeric", dtype="float64", values=(1.0, 2.5, 10.0)),
        ),
    ),
}
ALIASES = {"ddpm++", "ncsn++"}
"""Second names of settings that are checked under the first."""

SIBLINGS = {"nice", "realnvp", "glow", "iaf", "naf", "i-resnet", "planar"}
"""Flows whose kind of layer is tried on all kinds of data under another name."""
SIBLINGS |= {"ns-gan", "lsgan", "hinge-gan", "sngan", "stylegan2", "wgan", "wgan-gp"}
"""GANs whose networks are tried on all kinds of data under another name."""

MODELS = sorted(n for n, e in entries().items() if e.family != "toy" and n not in ALIASES)


def made(model: str, spec: DataSpec) -> GenerativeModel:
    """The model in a size that is quick: diffusion models take few steps, flows have few."""
    entry = entries()[model]
    small: dict[str, Any] = {}
    if entry.settings.get("sampling_steps", 0) > 6:
        small = {"sampling_steps": 6, "width": 8, "optimizer": {"lr": 0.03}}
    if issubclass(entry.model, Flow) and model != "linear-flow":
        small = {"steps": 2, "optimizer": {"lr": 0.03}} | ({} if model == "planar" else {"width": 8})
    if entry.family == "adversarial":
        rate = {"lr": 0.1 if entry.settings.get("architecture") == "dcgan" else 0.01}  # its weights start small
        small = {"width": 8, "z_dim": 8, "generator": rate, "discriminator": rate}
    if model == "tabak-turner":
        small = {"steps": 20}
    return create(model, spec, **small)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("model", MODELS)
def test_every_model_keeps_every_promise(model: str, check: Callable[[Subject], None], tmp_path: Path) -> None:
    check(Subject(made(model, IMAGE), example_data(IMAGE), tmp_path))


@pytest.mark.parametrize("check", [check_fits_and_samples, check_abilities, check_seeds, check_conditions])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("model", [m for m in MODELS if m not in SIBLINGS])
def test_every_kind_of_data(model: str, kind: str, check: Callable[[Subject], None], tmp_path: Path) -> None:
    spec = OTHERS[kind]
    if spec.kind not in entries()[model].model.data_kinds:
        pytest.skip(f"{model} does not model {spec.kind} data, and says so")
    check(Subject(made(model, spec), example_data(spec), tmp_path))


class GlobalNoise(Gaussian):
    def loss(self, batch: Any, step: Any) -> Any:
        loss, logs = super().loss(batch, step)
        return loss + 0.0 * torch.randn(()), logs


class Forgetful(Gaussian):
    """Keeps something that sampling needs outside the module."""

    def build(self) -> None:
        super().build()
        self.hidden = [torch.zeros(2)]

    def loss(self, batch: Any, step: Any) -> Any:
        self.hidden[0] = self.hidden[0] + 1.0
        return super().loss(batch, step)

    def _sample(self, noise: Any, condition: Any) -> Any:
        return super()._sample(noise, condition) + self.hidden[0]


class Batchy(Gaussian):
    """Samples depend on the other samples of their batch."""

    def _sample(self, noise: Any, condition: Any) -> Any:
        y = super()._sample(noise, condition)
        return y - y.mean(0)


class Eager(Gaussian):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.codec = Codec(self.spec, self.space)
        self.build()


class Shapeless(Gaussian):
    def _sample(self, noise: Any, condition: Any) -> Any:
        return super()._sample(noise, condition)[:, :1]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (GlobalNoise, "global random state"),
        (Forgetful, "differ"),
        (Batchy, "batch size"),
        (Eager, "constructor makes parameters"),
        (Shapeless, "_sample returned the shape"),
    ],
)
def test_broken_promises_are_caught(broken: type[Gaussian], message: str) -> None:
    spec = DataSpec(kind="points", shape=(2,))
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_model(broken(spec, name="toy-gaussian"))


def test_a_sound_model_of_ones_own_passes() -> None:
    check_model(Gaussian(DataSpec(kind="points", shape=(2,)), name="toy-gaussian"))
