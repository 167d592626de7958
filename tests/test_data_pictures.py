"""Folders of pictures: layouts, formats, everything that can be wrong with a file, streaming and the cache."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trilemma.core.errors import CheckpointError, DataError, UsageError
from trilemma.data import describe_data, load_data, save_dataset
from trilemma.data._decode import MAX_PIXELS, Bad, Options, PictureFile, decode
from trilemma.data._store import MemorySink
from trilemma.data.dataset import SPLITS, StreamSplit, hash_examples
from trilemma.data.pictures import load_pictures


def pixels(seed: int, shape: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def fill(folder: Path, n: int = 6, start: int = 0, shape: tuple[int, ...] = (8, 8, 3)) -> Path:
    for i in range(start, start + n):
        write(folder / f"{i:03}.png", pixels(i, shape))
    return folder


def decode_one(path: Path, size: int | None = None, channels: int | None = None) -> np.ndarray:
    """Decoded pixels (H, W, C)."""
    picture = decode(PictureFile("x", path), Options(size, channels))
    assert not isinstance(picture, Bad), picture.reason
    return np.frombuffer(picture.planes, np.uint8).reshape(picture.shape).transpose(1, 2, 0)


def all_rows(data) -> set[bytes]:
    return {row for split in data.splits.values() for row in hash_examples(split.head(10**6).x.numpy())}


def hash_of(*arrays: np.ndarray) -> set[bytes]:
    return set(hash_examples(np.stack([a.transpose(2, 0, 1) for a in arrays])))


def reasons(data) -> dict[str, str]:
    return {Path(s.where).name: s.reason for s in data.report.skipped}


def test_pixels_are_those_of_the_files(tmp_path):
    fill(tmp_path, 9)
    data = load_data(tmp_path)
    assert (data.spec.kind, data.spec.shape, data.spec.levels) == ("image", (3, 8, 8), 256)
    assert all_rows(data) == hash_of(*(pixels(i) for i in range(9)))
    assert data.source == {"source": str(tmp_path)}
    assert load_data(**data.source).fingerprint == data.fingerprint


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("bmp", {}), ("tiff", {}), ("webp", {"lossless": True})])
def test_lossless_formats_give_the_same_pixels(tmp_path, suffix, options):
    assert (decode_one(write(tmp_path / f"a.{suffix}", pixels(0), **options)) == pixels(0)).all()


def test_jpeg_is_what_pillow_decodes(tmp_path):
    path = write(tmp_path / "a.jpg", pixels(0, (16, 24, 3)))
    np.testing.assert_array_equal(decode_one(path), np.asarray(Image.open(path)))


def test_a_picture_under_two_formats_is_one_example(tmp_path):
    fill(tmp_path, 30)
    for i in range(30):
        write(tmp_path / f"copy{i}.bmp", pixels(i))
    data = load_data(tmp_path)
    assert data.report.duplicates == 30
    assert sum(len(set(hash_examples(s.x.numpy()))) for s in data.splits.values()) == 30


def test_grey_and_its_coloured_copy_are_one_example(tmp_path):
    for i in range(20):
        grey = pixels(i, (8, 8))
        write(tmp_path / f"a{i}.png", grey)
        write(tmp_path / f"b{i}.png", np.repeat(grey[..., None], 3, 2))
    data = load_data(tmp_path)
    assert data.spec.shape == (3, 8, 8)
    assert data.report.duplicates == 20
    assert all_rows(data) == hash_of(*(np.repeat(pixels(i, (8, 8))[..., None], 3, 2) for i in range(20)))


def test_channels(tmp_path):
    fill(tmp_path / "grey", 5, shape=(8, 8))
    assert load_data(tmp_path / "grey").spec.shape == (1, 8, 8)
    assert load_data(tmp_path / "grey", channels=3).spec.shape == (3, 8, 8)
    fill(tmp_path / "colour", 5)
    grey = load_data(tmp_path / "colour", channels=1)
    expected = np.asarray(Image.fromarray(pixels(0)).convert("L"))
    assert hash_examples(expected[None])[0] in all_rows(grey)


def test_resize_and_centre_crop(tmp_path):
    array = np.zeros((32, 64, 3), np.uint8)
    array[:, 4:60] = 200  # the central square and the reach of the filter
    np.testing.assert_array_equal(decode_one(write(tmp_path / "a.png", array), size=8), np.full((8, 8, 3), 200))
    # Each half of a horizontal step keeps its mean: the filter is antialiased and symmetric.
    step = np.full((64, 64), 60, np.uint8)
    step[:, 32:] = 180
    small = decode_one(write(tmp_path / "b.png", step), size=4)[..., 0].astype(float)
    np.testing.assert_allclose(small + small[:, ::-1], 240, atol=1.0)
    # A pattern above the new Nyquist frequency averages out.
    stripes = np.tile(np.array([[0, 255]], np.uint8), (64, 32))
    np.testing.assert_allclose(decode_one(write(tmp_path / "c.png", stripes), size=8), 127.5, atol=2.0)


def test_large_jpeg_is_reduced_while_decoding(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], (512, 1, 3))
    path = write(tmp_path / "a.jpg", ramp, quality=95)
    expected = Image.open(path).resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(decode_one(path, size=32).astype(float), np.asarray(expected), atol=2.0)


def test_mixed_sizes_need_size(tmp_path):
    fill(tmp_path, 4)
    write(tmp_path / "wide.png", pixels(9, (8, 20, 3)))
    with pytest.raises(DataError, match=r"2 different sizes .*8x8 \(4\), 20x8 \(1\); give size=") as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)
    assert load_data(tmp_path, size=8).spec.shape == (3, 8, 8)


def test_enlarging_is_noted(tmp_path):
    fill(tmp_path, 4)
    assert any("4 picture(s) were smaller than size" in note for note in load_data(tmp_path, size=16).report.notes)


def test_16_bit_grey(tmp_path):
    values = np.array([[0, 257, 65535], [128, 129, 40000]], np.uint16)
    small = decode_one(write(tmp_path / "a.png", values))
    np.testing.assert_array_equal(small[..., 0], np.round(values / 257.0))
    for i in range(4):
        write(tmp_path / f"{i}.png", (np.arange(6, dtype=np.uint16).reshape(2, 3) + i) * 999)
    notes = load_data(tmp_path).report.notes
    assert "5 picture(s) had 16 bits per channel and were scaled down to 8" in notes


def test_palette(tmp_path):
    image = Image.fromarray(pixels(0)).quantize(16)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_one(tmp_path / "a.png"), np.asarray(image.convert("RGB")))
    grey = Image.fromarray(pixels(1, (8, 8))).convert("P")
    grey.save(tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").mode == "P"
    np.testing.assert_array_equal(decode_one(tmp_path / "b.png")[..., 0], pixels(1, (8, 8)))


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    image.save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(decode_one(tmp_path / "a.jpg"), np.tile([0, 255, 255], (8, 8, 1)), atol=3)


def test_alpha_is_laid_on_white(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., 0], array[:2, :, 3] = 100, 255
    array[2, :, 3] = 51  # a fifth
    picture = decode_one(write(tmp_path / "a.png", array))
    np.testing.assert_array_equal(picture[0, 0], [100, 0, 0])
    np.testing.assert_array_equal(picture[2, 0], [224, 204, 204])
    np.testing.assert_array_equal(picture[3, 0], [255, 255, 255])
    for i in range(3):
        write(tmp_path / f"{i}.png", pixels(i, (4, 4, 3)))
    opaque = np.dstack([pixels(7, (4, 4, 3)), np.full((4, 4), 255, np.uint8)])
    write(tmp_path / "opaque.png", opaque)
    assert "1 picture(s) had transparent parts, which were laid on white" in load_data(tmp_path).report.notes
    grey = np.dstack([pixels(0, (4, 4)), np.full((4, 4), 255, np.uint8)])
    Image.fromarray(grey, "LA").save(tmp_path / "grey.png")
    np.testing.assert_array_equal(decode_one(tmp_path / "grey.png")[..., 0], pixels(0, (4, 4)))


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    array = pixels(0, (4, 6, 3))
    stored = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, 1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = write(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    np.testing.assert_array_equal(decode_one(path), array)
    fill(tmp_path, 3, shape=(4, 6, 3))
    assert load_data(tmp_path).spec.shape == (3, 4, 6)


def test_animated_files_give_their_first_frame(tmp_path):
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert (decode_one(tmp_path / "a.png") == pixels(0)).all()
    grey = [Image.fromarray(pixels(i, (8, 8))) for i in range(3)]
    grey[0].save(tmp_path / "b.gif", save_all=True, append_images=grey[1:])
    assert (decode_one(tmp_path / "b.gif")[..., 0] == pixels(0, (8, 8))).all()
    fill(tmp_path, 3, start=5)
    assert any(note.startswith("2 picture(s) hold several frames") for note in load_data(tmp_path).report.notes)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("side", [10_001, 13_000, 60_000])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, side, monkeypatch, recwarn):
    fill(tmp_path, 4)
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    assert side**2 > MAX_PIXELS
    loaded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: (loaded.append(self.size), load(self))[1])
    data = load_data(tmp_path, size=8)
    assert "pixels" in reasons(data)["bomb.png"]
    assert "not decoded" in reasons(data)["bomb.png"]
    assert (side, side) not in loaded
    assert not [w for w in recwarn if "Decompression" in str(w.category)]


def test_bad_files_are_skipped_with_their_reasons(tmp_path):
    fill(tmp_path, 5)
    whole = write(tmp_path / "whole.jpg", pixels(0)).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "fake.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 20)
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    (tmp_path / ".hidden.png").write_bytes((tmp_path / "000.png").read_bytes())
    os.mkfifo(tmp_path / "pipe")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "real.tiff")
    data = load_data(tmp_path)
    found = reasons(data)
    assert set(found) == {
        "cut.jpg", "cut.png", "empty.png", "notes.txt", "fake.png", "page.eps", ".hidden.png", "pipe", "real.tiff"
    }  # fmt: skip
    assert "truncated" in found["cut.jpg"].lower()
    assert found["empty.png"] == "empty (0 bytes)"
    assert found["notes.txt"] == found["page.eps"] == "not a picture in a known format"
    assert found["pipe"] == "not a regular file"
    assert "floating-point" in found["real.tiff"]
    assert describe_data(data)["skipped"] == 9
    assert sum(map(len, data.splits.values())) == 5


def test_a_bad_first_file_does_not_set_the_size(tmp_path):
    fill(tmp_path, 4)
    big = write(tmp_path / "big.png", pixels(0, (40, 40, 3))).read_bytes()
    (tmp_path / "big.png").unlink()
    (tmp_path / "000-cut.png").write_bytes(big[:300])
    data = load_data(tmp_path)
    assert data.spec.shape == (3, 8, 8)
    assert "000-cut.png" in reasons(data)


def test_nothing_left(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures: it is empty"):
        load_data(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no")
    with pytest.raises(DataError, match=r"none of 1 file.*not a picture"):
        load_data(tmp_path / "bad")
    with pytest.raises(DataError, match="only 1 example"):
        load_data(fill(tmp_path / "one", 1))
    write(tmp_path / "same" / "a.png", pixels(0))
    write(tmp_path / "same" / "b.png", pixels(0))
    with pytest.raises(DataError, match="all identical"):
        load_data(tmp_path / "same")


def test_symlink_loops_end(tmp_path):
    fill(tmp_path / "zebra", 4)
    (tmp_path / "zebra" / "up").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "zebra")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load_data(tmp_path)
    assert sum(map(len, data.splits.values())) == 4
    found = reasons(data)
    assert set(found) == {"up", "alias", "self.png", "gone.png"}
    assert "the same folder as" in found["up"]
    assert "cannot be followed" in found["self.png"]


def test_a_linked_folder_is_read(tmp_path):
    fill(tmp_path / "elsewhere", 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert sum(map(len, load_data(tmp_path / "data").splits.values())) == 4


def test_subfolders_are_classes(tmp_path):
    for k, name in enumerate(("10", "9", "cat")):
        fill(tmp_path / "words" / name / "deeper", 6, start=10 * k)
    data = load_data(tmp_path / "words")
    assert data.spec.condition.names == ("10", "9", "cat")
    for split in data.splits.values():
        for x, c in zip(split.x, split.condition, strict=True):
            owner = next(
                k for k in range(3) for i in range(6) if (pixels(10 * k + i).transpose(2, 0, 1) == x.numpy()).all()
            )
            assert owner == c
    (tmp_path / "words" / "cat").rename(tmp_path / "words" / "2")
    assert load_data(tmp_path / "words").spec.condition.names == ("2", "9", "10")
    assert load_data(tmp_path / "words", condition="none").spec.condition is None


def test_one_class_is_noted_and_dropped(tmp_path):
    fill(tmp_path / "cats", 6)
    data = load_data(tmp_path)
    assert data.spec.condition is None
    assert data.report.notes == ("there is only one class, 'cats', so the data have no classes",)
    with pytest.raises(DataError, match="only one class"):
        load_data(tmp_path, condition="class")


def test_pictures_beside_class_folders(tmp_path):
    fill(tmp_path / "a", 3)
    fill(tmp_path / "b", 3, start=10)
    fill(tmp_path, 2, start=20)
    data = load_data(tmp_path)
    assert data.spec.condition is None
    assert "2 picture(s) lie beside the 2 subfolders" in data.report.notes[0]


def test_given_splits(tmp_path):
    for k, name in enumerate(("a", "b")):
        fill(tmp_path / "train" / name, 20, start=100 * k)
        fill(tmp_path / "test" / name, 5, start=100 * k + 30)
        fill(tmp_path / "valid" / name, 4, start=100 * k + 40)
    write(tmp_path / "test" / "b" / "leak.png", pixels(3))
    write(tmp_path / "stray.png", pixels(999))
    data = load_data(tmp_path)
    assert [len(split) for split in data.splits.values()] == [40, 8, 11]
    assert data.spec.condition.names == ("a", "b")
    assert data.report.leaked == 1
    assert "in no split" in reasons(data)["stray.png"]
    assert describe_data(data)["classes"]["test"] == {"a": 5, "b": 6}


def test_test_folder_as_argument(tmp_path):
    fill(tmp_path / "one", 20)
    fill(tmp_path / "two", 5, start=50)
    data = load_data(tmp_path / "one", test=tmp_path / "two")
    assert set(hash_examples(data.test.x.numpy())) == hash_of(*(pixels(i) for i in range(50, 55)))
    assert len(data.train) + len(data.validation) == 20
    assert load_data(**json.loads(json.dumps(data.source))).fingerprint == data.fingerprint


def write_metadata(folder: Path) -> None:
    fill(folder, 12)
    lines = ["file_name,text,label,age,smiling,note"]
    lines += [f"{i:03}.png,picture {i},{'ab'[i % 2]},{i * 0.5},{'true' if i > 5 else 'False'},n{i}" for i in range(10)]
    lines += ["gone.png,nothing,a,1,true,n", "010.png,picture 10,,,true,n"]
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")


def test_metadata_classes_and_captions(tmp_path):
    write_metadata(tmp_path)
    data = load_data(tmp_path)
    assert data.spec.condition.names == ("a", "b")
    assert reasons(data) == {
        "gone.png": "named in the metadata, but not in the folder",
        "010.png": "no value of 'label' in its metadata",
        "011.png": "no row in the metadata",
    }
    for name in SPLITS:
        split, captions = data.splits[name], data.captions[name]
        assert len(captions) == len(split)
        for x, c, text in zip(split.x, split.condition, captions, strict=True):
            i = int(text.removeprefix("picture "))
            assert (x.numpy() == pixels(i).transpose(2, 0, 1)).all()
            assert c == i % 2
    assert "metadata columns for condition='attributes': age, smiling" in data.report.notes
    assert "metadata columns not used: note" in data.report.notes
    assert load_data(tmp_path, label="smiling").spec.condition.names == ("False", "true")
    with pytest.raises(UsageError, match="did you mean 'smiling'"):
        load_data(tmp_path, label="smilin")
    save_dataset(data, tmp_path / "saved")
    assert load_data(tmp_path / "saved").captions == data.captions


def test_metadata_attributes(tmp_path):
    write_metadata(tmp_path)
    data = load_data(tmp_path, condition="attributes")
    assert data.spec.condition.kind == "vector"
    assert data.spec.condition.names == ("age", "smiling")
    for split, captions in zip(data.splits.values(), data.captions.values(), strict=True):
        index = torch.tensor([int(text.removeprefix("picture ")) for text in captions])
        torch.testing.assert_close(split.condition, torch.stack([index * 0.5, (index > 5).float()], 1))
    assert reasons(data)["010.png"] == "no value of the attribute 'age' in its metadata"
    assert data.report.notes[0] == "metadata columns not used: note"


def test_metadata_jsonl_with_captions_only(tmp_path):
    fill(tmp_path, 8)
    rows = [json.dumps({"file_name": f"./{i:03}.png", "caption": f"é {i}"}) for i in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = load_data(tmp_path)
    texts = sorted(text for captions in data.captions.values() for text in captions)
    assert texts == ["", "", *(f"é {i}" for i in range(6))]
    assert "2 picture(s) have no row in the metadata" in data.report.notes


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "name,text\na,b\n", "row 1 has no file_name"),
        ("metadata.csv", "file_name,a,a\n000.png,1,2\n", "two columns have the same name"),
        ("metadata.csv", "file_name\n000.png\n000.png\n", "a second time"),
        ("metadata.jsonl", "{broken\n", "cannot be read"),
        ("metadata.jsonl", "[1, 2]\n", "JSON object"),
    ],
)
def test_bad_metadata(tmp_path, name, text, words):
    fill(tmp_path, 4)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        load_data(tmp_path)


def test_options_without_effect(tmp_path):
    fill(tmp_path, 4)
    with pytest.raises(UsageError, match="label='x' has no effect"):
        load_data(tmp_path, label="x")
    with pytest.raises(UsageError, match="no metadata with a column of numbers"):
        load_data(tmp_path, condition="attributes")
    with pytest.raises(UsageError, match="types= has no effect on a folder of pictures"):
        load_data(tmp_path, types={"a": "date"})
    with pytest.raises(DataError, match="one picture"):
        load_data(tmp_path / "000.png")


@pytest.mark.parametrize("grey_first", [False, True])
def test_streaming_gives_the_same_data(tmp_path, grey_first):
    fill(tmp_path / "d" / "x", 40)
    fill(tmp_path / "d" / "y", 40, start=100)
    if grey_first:
        fill(tmp_path / "d" / "a", 20, start=200, shape=(8, 8))
    memory = load_data(tmp_path / "d")
    stream = load_data(tmp_path / "d", memory=1000, cache=tmp_path / "cache")
    assert stream.fingerprint == memory.fingerprint
    assert stream.spec == memory.spec
    for name in SPLITS:
        a, b = memory.splits[name], stream.splits[name]
        assert isinstance(b, StreamSplit)
        assert len(a) == len(b)
        index = torch.arange(len(a)).flip(0).repeat(2)
        for one, two in ((a.batch(index), b.batch(index)), (a.head(3), b.head(3)), (a.head(999), b.head(999))):
            assert torch.equal(one.x, two.x)
            assert torch.equal(one.condition, two.condition)
    with pytest.raises(UsageError, match="streams from the disk"):
        save_dataset(stream, tmp_path / "saved")
    assert load_data(**json.loads(json.dumps(stream.source))).fingerprint == stream.fingerprint


def test_cache_is_used_and_follows_the_files(tmp_path, monkeypatch):
    folder, cache = fill(tmp_path / "d", 30), tmp_path / "cache"
    (folder / "bad.png").write_text("bad")
    first = load_data(folder, cache=cache)
    calls = []
    monkeypatch.setattr("trilemma.data._store.decode", lambda *a: calls.append(a) or decode(*a))
    again = load_data(folder, cache=cache)
    assert not calls
    assert again.fingerprint == first.fingerprint
    assert again.report == first.report
    assert len(list((cache / "pictures").iterdir())) == 1
    write(folder / "000.png", pixels(777))
    os.utime(folder / "000.png", (1, 1))
    changed = load_data(folder, cache=cache)
    assert calls
    assert all_rows(changed) == hash_of(pixels(777), *(pixels(i) for i in range(1, 30)))
    load_data(folder, cache=cache, channels=1)
    assert len(list((cache / "pictures").iterdir())) == 3


def test_damaged_cache_is_an_error(tmp_path):
    folder, cache = fill(tmp_path / "d", 5), tmp_path / "cache"
    load_data(folder, cache=cache)
    file = next((cache / "pictures").iterdir()) / "pixels.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="delete it and load again"):
        load_data(folder, cache=cache)


def test_cache_that_cannot_be_written(tmp_path):
    folder, blocked = fill(tmp_path / "d", 5), tmp_path / "file"
    blocked.touch()
    with pytest.raises(CheckpointError, match="no decode cache in"):
        load_data(folder, cache=blocked)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_and_progress(tmp_path, workers):
    fill(tmp_path, 50)
    seen = []
    data = load_pictures(tmp_path, workers=workers, progress=lambda *c: seen.append(c), name="d", source={})
    assert seen == [(i + 1, 50) for i in range(50)]
    assert data.fingerprint == load_data(tmp_path).fingerprint


def test_memory_sink_widens():
    sink = MemorySink(3, (1, 1, 2))
    sink.append(b"\x01\x02")
    sink.widen()
    sink.append(bytes(range(6)))
    np.testing.assert_array_equal(sink.rows[:2].reshape(2, -1), [[1, 2, 1, 2, 1, 2], [0, 1, 2, 3, 4, 5]])
