"""Splits by content, given splits, saving."""

import json

import numpy as np
import pytest
import torch

from trilemma.core.errors import CheckpointError, DataError, UsageError
from trilemma.core.spec import DataSpec
from trilemma.data import Dataset, describe_data, load_data, save_dataset
from trilemma.data.dataset import (
    SPLITS,
    assign_splits,
    from_tensors,
    hash_bytes,
    hash_examples,
    reorder_rows,
    split_rows,
)

POINTS = DataSpec(kind="points", shape=(2,))


def make_points(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 2)))


def rows(split) -> set[bytes]:
    return set(hash_examples(split.x.numpy()))


def test_split_depends_on_content_only():
    x = make_points(500)
    data = from_tensors(x, POINTS, name="a")
    shuffled = from_tensors(x[torch.randperm(500, generator=torch.Generator().manual_seed(1))], POINTS, name="b")
    more = from_tensors(torch.cat([x, make_points(100, 1)]), POINTS, name="c")
    for name in SPLITS:
        assert torch.equal(data.splits[name].x, shuffled.splits[name].x)
        assert rows(data.splits[name]) <= rows(more.splits[name])
    assert data.fingerprint == shuffled.fingerprint != more.fingerprint


def test_split_fractions():
    parts = assign_splits([hash_bytes(str(i).encode()) for i in range(20_000)])
    for name, fraction in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        # 5 sigma of a binomial: false-alarm rate 6e-7.
        assert abs(len(parts[name]) - 20_000 * fraction) < 5 * (20_000 * fraction * (1 - fraction)) ** 0.5


def test_duplicates_stay_together_and_are_counted():
    x = make_points(60)
    data = from_tensors(torch.cat([x, x[:25]]), POINTS, name="a")
    assert data.report.duplicates == 25
    sets = [rows(split) for split in data.splits.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 60


@pytest.mark.parametrize("n", [3, 4, 5])
def test_three_examples_give_three_splits(n):
    for seed in range(20):
        data = from_tensors(make_points(n, seed), POINTS, name="a")
        assert all(len(split) for split in data.splits.values())


@pytest.mark.parametrize(
    ("x", "words"), [(make_points(1), "only 1 example"), (make_points(1).repeat(9, 1), "identical")]
)
def test_too_few_examples(x, words):
    with pytest.raises(DataError, match=words):
        from_tensors(x, POINTS, name="a")


def test_given_test_set_and_leakage():
    x, test = make_points(200), make_points(50, 1)
    data = from_tensors(x, POINTS, name="a", test=(torch.cat([test, x[:7]]), None))
    assert len(data.test) == 57
    assert data.report.leaked == 7
    assert data.report.duplicates == 0
    assert "7 of the 57 test examples also occur" in data.report.notes[0]
    assert rows(data.train) | rows(data.validation) == set(hash_examples(x.numpy()))


def test_given_validation_keeps_the_cut_test():
    digests = [hash_bytes(bytes([i])) for i in range(200)]
    given = ["validation" if i < 20 else None for i in range(200)]
    parts, cut = split_rows(digests, given), assign_splits(digests[20:])
    assert set(parts["validation"]) == set(range(20))
    assert set(parts["test"]) == {i + 20 for i in cut["test"]}
    assert sorted(i for part in parts.values() for i in part) == list(range(200))


def test_fingerprint_sees_labels_and_splits():
    x, spec = make_points(50), POINTS
    y = torch.from_numpy(np.random.default_rng(3).normal(size=(50, 1)))
    prints = {
        from_tensors(x, spec, name="a").fingerprint,
        from_tensors(x, spec, name="a", condition=y).fingerprint,
        from_tensors(x, spec, name="a", condition=y.flip(0)).fingerprint,
        from_tensors(x[:40], spec, name="a", test=(x[40:], None)).fingerprint,
    }
    assert len(prints) == 4


def test_hash_of_long_examples_sees_every_byte():
    data = bytearray(5000)
    digests = {hash_bytes(bytes(data))}
    for i in range(5000):
        data[i] = 128
        digests.add(hash_bytes(bytes(data)))
        data[i] = 0
    digests.add(hash_bytes(bytes(5001)))
    assert len(digests) == 5002


def test_reorder_rows_is_indexing():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 100):
        x, order = rng.normal(size=(n, 3)), rng.permutation(n)
        expected = x[order]
        reorder_rows(x, order)
        np.testing.assert_array_equal(x, expected)


def same(a: Dataset, b: Dataset) -> bool:
    """Whether two data sets are identical but for their source."""
    for name in SPLITS:
        one, two = (d.splits[name].head(10**9) for d in (a, b))
        if not torch.equal(one.x, two.x) or one.x.dtype != two.x.dtype:
            return False
        if (one.condition is None) != (two.condition is None):
            return False
        if one.condition is not None and not torch.equal(one.condition, two.condition):
            return False
    return (a.spec, a.name, a.fingerprint, a.report, dict(a.captions)) == (
        b.spec, b.name, b.fingerprint, b.report, dict(b.captions)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["digits", "two-moons"])
def test_save_and_load(name, tmp_path):
    data = load_data(name)
    save_dataset(data, tmp_path / "saved")
    back = load_data(tmp_path / "saved")
    assert same(data, back)
    assert back.source == {"source": str(tmp_path / "saved")}
    assert (back.density is None) == (data.density is None)
    with pytest.raises(UsageError, match="size= has no effect on a saved data set"):
        load_data(tmp_path / "saved", size=8)
    with pytest.raises(CheckpointError, match="exists already"):
        save_dataset(data, tmp_path / "saved")


def test_damaged_saved_data_are_refused(tmp_path):
    save_dataset(load_data("digits"), tmp_path / "saved")
    file = tmp_path / "saved" / "data.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_data(tmp_path / "saved")


def test_builtin_pictures():
    digits = load_data("digits")
    assert digits.spec.shape == (1, 8, 8)
    assert digits.spec.levels == 17
    assert digits.spec.condition.names == tuple("0123456789")
    x = torch.cat([split.x for split in digits.splits.values()])
    assert (len(x), x.dtype, int(x.min()), int(x.max())) == (1797, torch.uint8, 0, 16)
    patches = load_data("patches")
    assert patches.spec.shape == (3, 8, 8)
    assert patches.spec.condition.names == ("china", "flower")
    assert sum(map(len, patches.splits.values())) == 2 * 53 * 80


def test_patches_are_tiles_of_the_photos():
    from sklearn.datasets import load_sample_images

    photo = load_sample_images().images[0]
    data = load_data("patches")
    tiles = {bytes(t.numpy().tobytes()) for s in data.splits.values() for t in s.x}
    for row, column in ((0, 0), (8, 16), (416, 632)):
        assert photo[row : row + 8, column : column + 8].transpose(2, 0, 1).tobytes() in tiles


def test_condition_none_drops_classes():
    data = load_data("digits", condition="none")
    assert data.spec.condition is None
    assert data.train.condition is None
    assert data.source == {"source": "digits", "condition": "none"}
    assert load_data(**data.source).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("no/such/folder", {}, "does not exist"),
        ("digits", {"size": 8}, "size= has no effect on a built-in data set"),
        ("digits", {"condition": "attributes"}, "has none"),
        ("digits", {"condition": "klass"}, "did you mean 'class'"),
        (np.zeros((5, 2)), {"label": "y"}, "label= has no effect on an array"),
        (np.zeros((5, 2)), {"memory": "1GB"}, "memory= has no effect on an array"),
        (np.zeros((5, 2)), {"memory": "much"}, "memory='much'"),
        ("digits", {"size": -1}, "size=-1"),
        ("digits", {"channels": 2}, "channels=2"),
        (object(), {}, "cannot load data from a object"),
    ],
)
def test_wrong_requests(source, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        load_data(source, **options)
    assert "\n" not in str(caught.value)


def test_a_dataset_is_returned_as_it_is():
    data = load_data("digits")
    assert load_data(data) is data
    with pytest.raises(UsageError, match="no effect on a data set"):
        load_data(data, size=4)


def test_description_is_json():
    data = load_data("digits")
    text = json.loads(json.dumps(describe_data(data)))
    assert text["counts"] == {name: len(split) for name, split in data.splits.items()}
    assert sum(text["classes"][name]["3"] for name in SPLITS) == 183
    assert text["fingerprint"] == data.fingerprint


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, trilemma.data; print([m for m in ('pandas', 'sklearn', 'PIL', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
