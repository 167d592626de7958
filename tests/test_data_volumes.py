"""Volumes (C, D, H, W): read, shown, compared and modelled."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trilemma.check import (
    Subject,
    check_abilities,
    check_conditions,
    check_fits_and_samples,
    check_seeds,
    example_data,
)
from trilemma.cli import run as cli
from trilemma.core.codec import Codec
from trilemma.core.errors import CapabilityError
from trilemma.core.model import GenerativeModel
from trilemma.core.registry import create, entries
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.data import load_data
from trilemma.data.render import picture_grid, preview_png, write_samples
from trilemma.metrics import fit_extractor, pixel_pca
from trilemma.metrics.encoders import LinearEncoder

CLASSES = ConditionSpec(kind="class", names=("a", "b"))
SPEC = DataSpec(kind="volume", shape=(1, 4, 3, 4), levels=17, condition=CLASSES)
MODELS = sorted(n for n, e in entries().items() if "volume" in e.model.data_kinds and e.family != "toy")


def test_a_volume_goes_through_a_file_and_back(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 2, 3, 4, 5)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    data = load_data(tmp_path / "x.npy")
    assert data.spec.describe() == "volume 2x3x4x5 with 256 levels"
    assert data.spec.is_8bit
    real = load_data(x.astype(np.float32))
    assert real.spec.describe() == "volume 2x3x4x5, real"
    everything = torch.cat([s.head(30).x for s in data.splits.values()])
    write_samples(everything, data.spec, tmp_path / "again.npz")
    assert load_data(tmp_path / "again.npz").fingerprint == data.fingerprint
    masks = load_data(x > 127)
    assert masks.spec.levels == 2
    noted = load_data(x / 255.0).report.notes
    assert any("multiples of 1/255" in note for note in noted)


def test_the_middle_slice_is_shown(tmp_path: Path) -> None:
    """Slice k of every volume has the grey level 40 k: only that of D // 2 may be seen."""
    spec = DataSpec(kind="volume", shape=(1, 5, 32, 32), levels=256)
    x = (40 * torch.arange(5, dtype=torch.uint8)).view(1, 1, 5, 1, 1).expand(4, 1, 5, 32, 32)
    grid = picture_grid(x, spec)
    assert grid.shape == (65, 65, 3)
    assert set(np.unique(grid)) == {80, 255}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(preview_png(x, spec)))), grid)
    write_samples(x, spec, tmp_path / "x.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), grid)


def test_default_features_are_whitened_components() -> None:
    data = example_data(DataSpec(kind="volume", shape=(1, 4, 4, 4)), n=400)
    extractor = fit_extractor(data.train, data.spec, seed=0)
    assert extractor.kind == "whitened-pca"
    covariance = torch.cov(extractor(data.train.head(400).x).T, correction=0)
    torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), atol=1e-8, rtol=0.0)
    assert pixel_pca(data.train, data.spec).dim == 64


def test_large_volumes_are_averaged_down() -> None:
    """24 x 24 x 24 to 12 x 12 x 12: means of blocks of 2 x 2 x 2."""
    spec = DataSpec(kind="volume", shape=(1, 24, 24, 24))
    x = torch.randn(3, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = LinearEncoder(spec, 1).inputs(x, torch.float64)
    blocks = x.reshape(3, 1, 12, 2, 12, 2, 12, 2).mean((3, 5, 7))
    torch.testing.assert_close(got, blocks, atol=1e-12, rtol=0.0)


def test_one_scale_for_the_whole_volume() -> None:
    codec = Codec(DataSpec(kind="volume", shape=(1, 2, 2, 2)), "standard")
    x = 3.0 + 2.0 * torch.randn(50, 1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codec.fit(x)
    y, ladj = codec.encode(x, dtype=torch.float64)
    torch.testing.assert_close(y, (x - x.mean()) / x.std(correction=0), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(ladj, -8.0 * x.std(correction=0).log().expand(50), atol=1e-12, rtol=0.0)


def test_the_base_class_does_not_promise_volumes() -> None:
    assert GenerativeModel.data_kinds == {"image", "signal", "points", "table"}

    class Flat(GenerativeModel):
        pass

    with pytest.raises(CapabilityError, match="models image, points, signal, table, not volume data; models that can"):
        Flat(SPEC, name="flat")


def test_families_that_model_volumes() -> None:
    assert {"gmm", "histogram", "independent", "kde", "nsf", "r3gan", "rbm", "vae"} <= set(MODELS)


@pytest.mark.parametrize("check", [check_fits_and_samples, check_abilities, check_seeds, check_conditions])
@pytest.mark.parametrize("model", MODELS)
def test_models_keep_their_promises(model: str, check: Callable[[Subject], None], tmp_path: Path) -> None:
    check(Subject(create(model, SPEC), example_data(SPEC), tmp_path))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    assert cli(["check", str(tmp_path / "x.npz")]) == 0
    assert "volume 1x4x4x4 with 256 levels" in capsys.readouterr().out
    run = str(tmp_path / "run")
    assert cli(["train", "gmm", str(tmp_path / "x.npz"), "--out", run]) == 0
    assert cli(["sample", run, "-n", "9", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 32 + 2, 3 * 32 + 2)  # slices of 4 x 4, eightfold
    assert cli(["sample", run, "-n", "9", "--out", str(tmp_path / "a.npy")]) == 0
    samples = np.load(tmp_path / "a.npy")
    assert samples.dtype == np.uint8
    assert samples.shape == (9, 1, 4, 4, 4)
    assert cli(["score", run, str(tmp_path / "x.npz")]) == 0
    assert "bits/dim" in capsys.readouterr().out
