"""`hf://` with data sets built here: no network."""

import builtins
import io

import numpy as np
import pytest
from PIL import Image

from trilemma.core.errors import DataError, MissingExtraError, UsageError
from trilemma.data import load_data
from trilemma.data.dataset import SPLITS, StreamSplit, hash_examples

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)


def encode(array: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_split(start: int, n: int):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["dog", "cat"]),
            "caption": datasets.Value("string"),
            "age": datasets.Value("float64"),
        }
    )
    rows = range(start, start + n)
    columns = {
        "image": [encode(pixels(i)) for i in rows],
        "label": [i % 2 for i in rows],
        "caption": [f"picture {i}" for i in rows],
        "age": [i / 2 for i in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def pictures(tmp_path):
    splits = {"train": make_split(0, 24), "test": make_split(100, 8)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_pictures_classes_captions_and_splits(pictures):
    data = load_data(f"hf://{pictures}")
    assert data.spec.shape == (3, 6, 6)
    assert data.spec.condition.names == ("cat", "dog")
    assert [len(data.test), len(data.train) + len(data.validation)] == [8, 24]
    for name in SPLITS:
        split = data.splits[name]
        for x, c, text in zip(split.x, split.condition, data.captions[name], strict=True):
            i = int(text.removeprefix("picture "))
            assert (x.numpy() == pixels(i).transpose(2, 0, 1)).all()
            assert ("cat", "dog")[c] == ("dog", "cat")[i % 2]
    assert load_data(**data.source).fingerprint == data.fingerprint
    assert load_data(f"hf://{pictures}", size=3, channels=1).spec.shape == (1, 3, 3)
    assert load_data(f"hf://{pictures}", condition="none").spec.condition is None
    assert load_data(f"hf://{pictures}", label="caption").spec.condition.size == 32


def test_streaming(pictures, tmp_path):
    stream = load_data(f"hf://{pictures}", memory=100, cache=tmp_path / "cache")
    assert isinstance(stream.train, StreamSplit)
    assert stream.fingerprint == load_data(f"hf://{pictures}").fingerprint


def test_rows_that_cannot_be_used(tmp_path):
    data = make_split(0, 10)
    columns = data.cast_column("image", datasets.Image(decode=False)).to_dict()
    columns["image"][2] = {"bytes": b"broken", "path": None}
    columns["image"][3] = None
    columns["label"][4] = -1
    features = data.features.copy()
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "d")
    found = {s.where: s.reason for s in load_data(f"hf://{tmp_path / 'd'}").report.skipped}
    assert set(found) == {"train[2]", "train[3]", "train[4]"}
    assert found["train[4]"] == "no label"
    assert "no picture" in found["train[3]"]


def test_imagefolder(tmp_path):
    for i in range(12):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(path)
    data = load_data(f"hf://{tmp_path / 'photos'}")
    assert data.spec.condition.names == ("a", "b")
    rows = {row for split in data.splits.values() for row in hash_examples(split.x.numpy())}
    assert rows == set(hash_examples(np.stack([pixels(i).transpose(2, 0, 1) for i in range(12)])))


def test_table(tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 20)):
        columns = {"a": rng.normal(size=n), "kind": rng.choice(["x", "y"], n)}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    data = load_data(f"hf://{folder}", label="kind")
    assert data.spec.kind == "table"
    assert [c.name for c in data.spec.columns] == ["a"]
    assert data.spec.condition.names == ("x", "y")
    assert [len(data.test), len(data.train) + len(data.validation)] == [20, 60]
    with pytest.raises(UsageError, match="size= has no effect on a table"):
        load_data(f"hf://{folder}", size=8)


def test_wrong_requests(pictures, monkeypatch):
    with pytest.raises(UsageError, match="types= has no effect on pictures"):
        load_data(f"hf://{pictures}", types={"age": "numeric"})
    with pytest.raises(UsageError, match="did you mean 'label'"):
        load_data(f"hf://{pictures}", label="labl")
    with pytest.raises(DataError, match="label='age' holds"):
        load_data(f"hf://{pictures}", label="age")
    with pytest.raises(UsageError, match="owner and the name"):
        load_data("hf://")
    real = builtins.__import__

    def without(name, *args):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'trilemma\[hub\]'"):
        load_data("hf://owner/name")
