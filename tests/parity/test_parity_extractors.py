"""The pretrained extractors against other people's code with the same random weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_extractors_pretrained import pictures, random_tensors
from trilemma.core.spec import DataSpec
from trilemma.core.storage import write_tensors
from trilemma.metrics import dinov2, inception
from trilemma.metrics.inception import Inception, resize

SPEC = DataSpec(kind="image", shape=(3, 40, 51), levels=256)


def relative(x: Tensor, y: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((x.double() - y.double()).abs().max() / y.double().abs().max())


@pytest.fixture
def fidelity() -> Iterator[Callable[[str], Any]]:
    """Modules of torch-fidelity, without its own `__init__`, which imports torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("torch-fidelity is not installed")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("torch_fidelity")}
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    yield lambda name: importlib.import_module(f"torch_fidelity.{name}")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("side", [8, 299, 300])
def test_resize(fidelity: Callable[[str], Any], side: int) -> None:
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    x = pictures(SPEC)
    assert torch.equal(resize(x, side), theirs(x.float(), size=(side, side), align_corners=False))


def test_inception(fidelity: Callable[[str], Any], tmp_path: Path) -> None:
    tensors = random_tensors(Inception()) | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    write_tensors(tmp_path / "weights.safetensors", tensors)
    torch.save(tensors, tmp_path / "weights.pth")
    theirs = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "weights.pth"
    )
    x = pictures(SPEC, 3)
    assert relative(inception(SPEC, tmp_path / "weights.safetensors")(x), theirs(x)[0]) < 1e-4


@pytest.mark.parametrize(("image", "swiglu"), [(224, False), (224, True), (112, False), (518, False)])
def test_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: int, swiglu: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=image, use_swiglu_ffn=swiglu
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = transformers.Dinov2Model(config).eval()
    theirs.load_state_dict(random_tensors(theirs))
    theirs.save_pretrained(tmp_path)  # under the names of the published files
    # Hugging Face's positions are not those of the original code, which ours follow.
    monkeypatch.setattr(importlib.import_module("trilemma.metrics.dinov2"), "OFFSET", 0.0)
    x = pictures(SPEC, 3)
    resized = F.interpolate(x.float(), size=(224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = ((resized / 255.0).movedim(1, -1) - mean) / std
    with torch.no_grad():
        expected = theirs(inputs.movedim(-1, 1)).pooler_output
    assert relative(dinov2(SPEC, tmp_path / "model.safetensors")(x), expected) < 1e-4
