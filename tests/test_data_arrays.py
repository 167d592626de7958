"""Arrays, tensors, .npy, .npz and IDX files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from trilemma.core.errors import DataError, UsageError
from trilemma.data import load_data
from trilemma.data.dataset import SPLITS, hash_examples


def random(shape: tuple[int, ...], dtype: str = "float64", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, shape).astype(dtype) if dtype != "float64" else rng.normal(size=shape)


def all_rows(data) -> set[bytes]:
    return {row for split in data.splits.values() for row in hash_examples(split.x.numpy())}


@pytest.mark.parametrize(
    ("x", "kind", "shape", "levels", "layout"),
    [
        (random((9, 5, 6), "uint8"), "image", (1, 5, 6), 256, lambda x: x[:, None]),
        (random((9, 3, 5, 6), "uint8"), "image", (3, 5, 6), 256, lambda x: x),
        (random((9, 5, 6, 3), "uint8"), "image", (3, 5, 6), 256, lambda x: x.transpose(0, 3, 1, 2)),
        (random((9, 5, 6, 1), "uint8"), "image", (1, 5, 6), 256, lambda x: x.transpose(0, 3, 1, 2)),
        (random((9, 5, 6), "uint8") > 127, "image", (1, 5, 6), 2, lambda x: x[:, None].astype(np.uint8)),
        (random((9, 3, 5, 6)), "image", (3, 5, 6), None, lambda x: x),
        (random((9, 5, 6, 4)), "image", (4, 5, 6), None, lambda x: x.transpose(0, 3, 1, 2)),
        (random((9, 2, 16)), "signal", (2, 16), None, lambda x: x),
        (random((9, 2, 3, 4, 5)), "volume", (2, 3, 4, 5), None, lambda x: x),
        (random((9, 1, 4, 4, 4), "uint8"), "volume", (1, 4, 4, 4), 256, lambda x: x),
        (random((9, 1, 4, 4, 4), "uint8") > 127, "volume", (1, 4, 4, 4), 2, lambda x: x.astype(np.uint8)),
        (random((9, 4)), "points", (4,), None, lambda x: x),
        (random((9,)), "points", (1,), None, lambda x: x[:, None]),
        (random((9, 4), "int32"), "points", (4,), None, lambda x: x.astype(np.float64)),
        (random((9, 4)).astype(np.float16), "points", (4,), None, lambda x: x.astype(np.float32)),
        (random((9, 4)).astype(">f8"), "points", (4,), None, lambda x: x.astype("<f8")),
    ],
)
def test_meaning_of_shapes(x, kind, shape, levels, layout):
    data = load_data(x)
    assert (data.spec.kind, data.spec.shape, data.spec.levels) == (kind, shape, levels)
    assert all_rows(data) == set(hash_examples(layout(x)))
    assert data.source == {}
    if x.dtype.isnative:
        assert load_data(torch.from_numpy(x)).fingerprint == data.fingerprint


def test_bfloat16_and_gradients():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16).requires_grad_()
    assert all_rows(load_data(x)) == set(hash_examples(x.detach().float().numpy()))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (random((9, 3, 5, 3), "uint8"), "both sides could be the channels"),
        (random((9, 5, 5, 5), "uint8"), "no side has 1, 3 or 4 channels"),
        (random((9, 5, 5), "int64"), "convert 8-bit pictures to uint8"),
        (random((9, 2, 2, 2, 2, 2)), "volumes"),
        (random((9, 2, 2, 2, 2), "int64"), "convert 8-bit pictures to uint8"),
        (np.array(["a", "b"]), "numbers are needed"),
        (random((9, 2)).astype(complex), "numbers are needed"),
        (np.array([{}, []], dtype=object), "numbers are needed"),
        (np.zeros((0, 3)), "is empty"),
        (np.array(3.0), "single number"),
        (np.zeros((1, 3)), "only 1 example"),
        (np.ones((7, 3)), "7 examples, all identical"),
        (np.array([[0.0, 1.0]] * 4 + [[1.0, 1.0]]), "2 different"),
        ([[1.0, 2.0], [3.0]], "cannot be read as an array"),
    ],
)
def test_unusable_arrays(x, words):
    with pytest.raises(DataError, match=words) as caught:
        load_data(x)
    assert "\n" not in str(caught.value)


def test_nan_and_infinity_are_counted():
    x = random((9, 4))
    x[3, 2], x[5, 0], x[5, 1], x[8, 3] = np.nan, np.inf, np.nan, -np.inf
    with pytest.raises(DataError, match=r"2 NaN and 2 infinite value\(s\), the first at index \(3, 2\)"):
        load_data(x)


def test_labels():
    x, y = random((200, 2)), np.arange(200) % 11
    data = load_data((x, y))
    assert data.spec.condition.names == tuple(str(k) for k in range(11))
    index = {row: i for i, row in enumerate(hash_examples(x))}
    for split in data.splits.values():
        rows = [index[row] for row in hash_examples(split.x.numpy())]
        assert split.condition.tolist() == [i % 11 for i in rows]
    assert load_data((x, y), condition="none").spec.condition is None
    texts = load_data((x, np.array(["b", "a"] * 100)))
    assert texts.spec.condition.names == ("a", "b")
    one = load_data((x, np.zeros(200, int)))
    assert one.spec.condition is None
    assert "only one class, '0'" in one.report.notes[0]
    vector = load_data((x, x[:, :1] * 2), condition="attributes")
    assert vector.spec.condition.kind == "vector"
    torch.testing.assert_close(vector.train.condition, (vector.train.x[:, :1] * 2).float())


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ((random((9, 2)), np.arange(8)), {}, DataError, "9 examples, but 8 labels"),
        ((random((9, 2)), random((9,))), {}, DataError, "class labels are integers or texts"),
        ((random((9, 2)), np.zeros(9, int)), {"condition": "class"}, DataError, "only one class"),
        (random((9, 2)), {"condition": "class"}, UsageError, "has no labels"),
        ((random((9, 2)), np.full(9, np.nan)), {"condition": "attributes"}, DataError, "9 NaN"),
        ((1, 2, 3), {}, UsageError, "a tuple of 3"),
        (random((9, 2)), {"test": random((9, 3))}, DataError, "the test set is"),
        ((random((9, 2)), np.arange(9) % 2), {"test": random((9, 2))}, DataError, "the test set has none"),
    ],
)
def test_wrong_labels_and_tests(source, options, error, words):
    with pytest.raises(error, match=words):
        load_data(source, **options)


def test_given_test_array():
    x, test = random((50, 2)), random((20, 2), seed=1)
    data = load_data((x, np.arange(50) % 2), test=(test, np.arange(20) % 2))
    assert set(hash_examples(data.test.x.numpy())) == set(hash_examples(test))
    assert data.spec.condition.size == 2


def test_notes():
    x = random((20, 3))
    x[:, 1] = 7.0
    assert load_data(x).report.notes == ("1 of 3 dimensions never change",)
    assert "whole numbers" in load_data(random((20, 3), "int64")).report.notes[0]
    assert "multiples of 1/255" in load_data(random((20, 1, 5, 5), "uint8") / 255.0).report.notes[0]
    rare = load_data((random((3, 2)), np.array(["a", "b", "c"])))
    assert "without a single training example" in rare.report.notes[0]


def test_npy(tmp_path):
    x = random((30, 4))
    np.save(tmp_path / "x.npy", x)
    data = load_data(tmp_path / "x.npy")
    assert data.fingerprint == load_data(x).fingerprint
    assert (data.name, data.source) == ("x", {"source": str(tmp_path / "x.npy")})
    np.save(tmp_path / "t.npy", random((9, 4), seed=2))
    given = load_data(tmp_path / "x.npy", test=tmp_path / "t.npy")
    assert len(given.test) == 9
    assert load_data(**given.source).fingerprint == given.fingerprint


def test_npz(tmp_path):
    x, y = random((30, 4)), np.arange(30) % 3
    np.savez(tmp_path / "a.npz", images=x, labels=y, extra=np.zeros(3))
    data = load_data(tmp_path / "a.npz")
    assert data.fingerprint == load_data((x, y)).fingerprint
    assert data.report.notes[0] == "arrays not used: extra"
    np.savez(tmp_path / "b.npz", photos=x, colour=y)
    with pytest.raises(DataError, match="holds the arrays photos, colour: call the examples 'x'"):
        load_data(tmp_path / "b.npz")
    assert load_data(tmp_path / "b.npz", label="colour").fingerprint == data.fingerprint
    with pytest.raises(UsageError, match="did you mean 'colour'"):
        load_data(tmp_path / "b.npz", label="color")
    np.savez(tmp_path / "c.npz", x=x, data=x)
    with pytest.raises(DataError, match="x, data"):
        load_data(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=random((9, 4), seed=1), y_test=np.arange(9) % 3)
    assert len(load_data(tmp_path / "d.npz").test) == 9
    with pytest.raises(UsageError, match="test set of its own"):
        load_data(tmp_path / "d.npz", test=tmp_path / "a.npz")


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_refused(tmp_path):
    import pickle

    trap = np.empty(3, object)
    trap[:] = [Payload(tmp_path / "ran")] * 3
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=trap)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("a.npy", "a.npz", "b.npy", "b.npz"):
        with pytest.raises(DataError, match=r"pickled Python objects|cannot be read"):
            load_data(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.gz", "x.idx", "x.weird"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    path.touch()
    with pytest.raises(DataError, match=r"empty|cut short|no IDX|cannot be read"):
        load_data(path)
    path.write_bytes(b"not what it should be" * 10)
    with pytest.raises(DataError):
        load_data(path)


def test_truncated_and_lying_arrays(tmp_path):
    np.save(tmp_path / "a.npy", random((30, 4)))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    # A header that promises 8 TB.
    (tmp_path / "lie.npy").write_bytes(whole.replace(b"(30, 4), }        ", b"(1000000000000, )}"))
    np.savez(tmp_path / "a.npz", x=random((30, 4)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-100])
    for name in ("cut.npy", "lie.npy", "cut.npz"):
        with pytest.raises(DataError, match="cannot be read"):
            load_data(tmp_path / name)


def write_idx(path: Path, values: np.ndarray, code: int, gzipped: bool = False) -> bytes:
    content = bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    content += values.astype(values.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if gzipped else content)
    return content


@pytest.mark.parametrize("gzipped", [False, True])
def test_idx(tmp_path, gzipped):
    end = ".gz" if gzipped else ""
    x, test = random((40, 6, 5), "uint8"), random((10, 6, 5), "uint8", seed=1)
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder / f"train-images-idx3-ubyte{end}", x, 8, gzipped)
    write_idx(folder / f"train-labels-idx1-ubyte{end}", np.arange(40, dtype=np.uint8) % 10, 8, gzipped)
    write_idx(folder / f"t10k-images-idx3-ubyte{end}", test, 8, gzipped)
    write_idx(folder / f"t10k-labels-idx1-ubyte{end}", np.arange(10, dtype=np.uint8), 8, gzipped)
    data = load_data(folder)
    assert data.spec.shape == (1, 6, 5)
    assert data.spec.is_8bit
    assert data.spec.condition.names == tuple("0123456789")
    assert set(hash_examples(data.test.x.numpy())) == set(hash_examples(test))
    assert data.fingerprint == load_data((x, np.arange(40) % 10), test=(test, np.arange(10))).fingerprint
    single = load_data(folder / f"train-images-idx3-ubyte{end}")
    assert all_rows(single) == set(hash_examples(x))


@pytest.mark.parametrize(("code", "dtype"), [(0x0D, "f4"), (0x0E, "f8"), (0x0C, "i4"), (0x0B, "i2")])
def test_idx_dtypes_are_big_endian(tmp_path, code, dtype):
    x = (random((9, 3)) * 1000).astype(dtype)
    write_idx(tmp_path / "x.idx", x, code)
    assert load_data(tmp_path / "x.idx").fingerprint == load_data(x).fingerprint


def test_damaged_idx(tmp_path):
    content = write_idx(tmp_path / "x", random((9, 4, 4), "uint8"), 8)
    cut_gzip = gzip.compress(content)[:-20]
    for i, bad in enumerate((content[:-1], content + b"x", content[:10], cut_gzip, gzip.compress(b"\0\0\x08\x01"))):
        path = tmp_path / f"{i}.gz"
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"cut short or damaged|cannot be read"):
            load_data(path)


def test_a_gzip_bomb_is_not_expanded(tmp_path):
    header = bytes([0, 0, 8, 2]) + struct.pack(">2i", 4, 4)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(header + bytes(50_000_000)))
    with pytest.raises(DataError, match="16 bytes of values promised, 17 or more found"):
        load_data(tmp_path / "bomb.gz")


def test_tables_go_to_the_table_loader(tmp_path):
    import pandas as pd

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "b": rng.choice(["x", "y"], 60)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = load_data(frame, label="b")
    assert data.spec.condition.names == ("x", "y")
    assert data.source == {}
    file = load_data(tmp_path / "t.csv", types={"b": "categorical"})
    assert file.source == {"source": str(tmp_path / "t.csv"), "types": {"b": "categorical"}}
    assert load_data(**file.source).fingerprint == file.fingerprint
    with pytest.raises(UsageError, match="size= has no effect on a table"):
        load_data(frame, size=3)


def test_saving_an_array_and_a_table(tmp_path):
    import pandas as pd

    from trilemma.data import save_dataset

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": [None, *rng.normal(size=59)], "b": rng.choice(["x", "y"], 60)})
    for name, source in (("array", (random((60, 3)), np.arange(60) % 2)), ("table", frame)):
        data = load_data(source)
        save_dataset(data, tmp_path / name)
        back = load_data(tmp_path / name)
        assert (back.spec, back.fingerprint, back.name) == (data.spec, data.fingerprint, data.name)
        for split in SPLITS:
            torch.testing.assert_close(back.splits[split].x, data.splits[split].x, rtol=0, atol=0, equal_nan=True)
