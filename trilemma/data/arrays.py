"""Arrays and tensors, in memory or in `.npy`, `.npz` and IDX files (the MNIST format of LeCun et al. 1998).

    uint8 (N, H, W), (N, C, H, W), (N, H, W, C), C in 1, 3, 4     pictures with 256 levels
    bool of the same shapes                                       pictures with 2 levels
    real (N, C, H, W) or (N, H, W, C)                             real pictures
    real (N, C, L)                                                signals
    real, uint8 or bool (N, C, D, H, W)                           volumes: real, 256 or 2 levels; channels come first
    real or integer (N,), (N, D)                                  points
What comes with them, labels or another condition, is read by `trilemma.data.conditions`; in an .npz file it is the
array "y", "labels", ... or "condition". Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError, unknown_name
from trilemma.core.spec import DataKind, DataSpec
from trilemma.data.conditions import CHANNELS, check_finite, choose_condition
from trilemma.data.dataset import DataReport, Dataset, build_dataset, hash_examples

X_NAMES = ("x", "images", "data", "X", "arr_0")
CONDITION = "condition"
Y_NAMES = ("y", "labels", "label", "targets", "target", CONDITION, "arr_1")
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Pair(NamedTuple):
    """Examples and, if there are any, their labels or another condition."""

    x: Any
    y: Any = None


class Content(NamedTuple):
    """What a file of arrays holds: the data, the test set it comes with, and what to say."""

    data: Pair
    test: Pair | None = None
    notes: tuple[str, ...] = ()


def load_array(
    data: Pair,
    *,
    condition: str | None = None,
    test: Pair | None = None,
    name: str = "array",
    source: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """A `Dataset` from arrays or tensors; see the table above.

    Arguments:
        data: x, and what comes with it: labels or another condition, see `trilemma.data.conditions`.
        condition: what that is: "class", "attributes", "image", "sequence" or "none"; None to go by its shape.
        test: the test set the data come with.

    Raises:
        DataError: no data, a dtype or shape that is none of the above, NaN or infinity, fewer than 3 examples.
    """
    x, kind, levels = interpret(_to_numpy(data.x, name), name)
    labels = None if data.y is None or condition == "none" else _to_numpy(data.y, f"labels of {name}")
    given: list[str | None] = [None] * len(x)
    if test is not None:
        x, labels = _append_test(x, (kind, levels), labels, test, name)
        given += ["test"] * (len(x) - len(given))
    if labels is not None and len(labels) != len(x):
        noun = "labels" if labels.ndim == 1 else "conditions"
        raise DataError(f"{name}: {len(x)} examples, but {len(labels)} {noun}")
    chosen, condition_notes = choose_condition(labels, condition, kind, name)
    tensor = torch.from_numpy(x)
    return build_dataset(
        tensor,
        DataSpec(kind=kind, shape=x.shape[1:], levels=levels, condition=None if chosen is None else chosen[1]),
        hash_examples(x),
        name=name,
        condition=None if chosen is None else chosen[0],
        given=given,
        source=source,
        report=DataReport(notes=(*notes, *condition_notes, *_content_notes(x, kind, levels, data.x))),
    )


def _append_test(
    x: np.ndarray, meaning: tuple[DataKind, int | None], labels: np.ndarray | None, test: Pair, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    test_x, *test_meaning = interpret(_to_numpy(test.x, f"test of {name}"), f"test of {name}")
    if tuple(test_meaning) != meaning or test_x.shape[1:] != x.shape[1:]:
        raise DataError(
            f"{name}: the test set is {test_x.dtype} of shape {test_x.shape}, the data are {x.dtype} of shape {x.shape}"
        )
    if labels is not None:
        if test.y is None:
            raise DataError(f"{name}: the data have labels, the test set has none; give both, or condition='none'")
        own = _to_numpy(test.y, f"test labels of {name}")
        if own.shape[1:] != labels.shape[1:] or (own.ndim > 1 and own.dtype != labels.dtype):
            raise DataError(
                f"{name}: the conditions of the test set are {own.dtype} of shape {own.shape}, those of the data "
                f"{labels.dtype} of shape {labels.shape}"
            )
        labels = np.concatenate([labels, own])
    return np.concatenate([x, test_x]), labels


def interpret(x: np.ndarray, name: str) -> tuple[np.ndarray, DataKind, int | None]:
    """x in the layout of its kind, the kind, and the number of levels."""
    if x.size == 0:
        raise DataError(f"{name} is empty: its shape is {x.shape}")
    if x.ndim == 0:
        raise DataError(f"{name} is a single number, not a set of examples")
    levels = {"u1": 256, "b1": 2}.get(x.dtype.str[1:]) if x.ndim > 2 else None
    grid: DataKind = "volume" if x.ndim == 5 else "image"
    if levels is not None:
        return np.ascontiguousarray(_to_channels_first(x, name).astype(np.uint8)), grid, levels
    if x.dtype.kind in "ui" and x.ndim > 2:
        raise DataError(
            f"{name} has dtype {x.dtype} and shape {x.shape}: convert 8-bit pictures to uint8, anything else to float"
        )
    if x.dtype.kind not in "uifb":
        raise DataError(f"{name} has dtype {x.dtype}: numbers are needed (a table of mixed columns is a DataFrame)")
    x = np.ascontiguousarray(x.astype(np.float64 if x.dtype.kind in "ui" or x.dtype.itemsize >= 8 else np.float32))
    check_finite(x, name)
    if x.ndim <= 2:
        return x.reshape(len(x), -1), "points", None
    if x.ndim == 3:
        return x, "signal", None
    return np.ascontiguousarray(_to_channels_first(x, name)), grid, None


def _to_channels_first(x: np.ndarray, name: str) -> np.ndarray:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 5:
        return x
    layouts = "pictures are (N, H, W), (N, C, H, W) or (N, H, W, C), volumes (N, C, D, H, W)"
    if x.ndim != 4:
        raise DataError(f"{name} has shape {x.shape}: {layouts}")
    first, last = x.shape[1] in CHANNELS, x.shape[3] in CHANNELS
    if first == last:
        why = "both sides could be the channels" if first else "no side has 1, 3 or 4 channels"
        raise DataError(f"{name} has shape {x.shape}: {why}; {layouts}")
    return x if first else x.transpose(0, 3, 1, 2)


def _to_numpy(value: Any, name: str) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{name} cannot be read as an array: {error}") from error
    return array.astype(array.dtype.newbyteorder("="))


def _content_notes(x: np.ndarray, kind: str, levels: int | None, original: Any) -> list[str]:
    notes = []
    flat = x.reshape(len(x), -1)
    constant = int((flat == flat[0]).all(0).sum())
    if 0 < constant < flat.shape[1]:
        notes.append(f"{constant} of {flat.shape[1]} dimensions never change")
    if kind == "points" and (flat == np.round(flat)).all():
        notes.append("all values are whole numbers: a density gains nats without bound; a DataFrame dequantizes them")
    if kind in ("image", "volume") and levels is None and _is_scaled_bytes(flat):
        notes.append("all values are multiples of 1/255: as uint8 the likelihood would be in bits per dimension")
    return notes


def _is_scaled_bytes(flat: np.ndarray) -> bool:
    scaled = flat * 255.0
    return bool(flat.min() >= 0.0 and flat.max() <= 1.0 and (np.abs(scaled - np.round(scaled)) < 1e-3).all())


def read_array_file(path: Path, label: str | None = None) -> Content:
    """The arrays of a .npy, .npz or IDX file, or of a folder of IDX files.

    Raises:
        DataError: damaged, pickled, or ambiguous.
        UsageError: an .npz file has no array `label`; another file has no labels at all.
    """
    if path.suffix == ".npz":
        return _read_npz(path, label)
    if label is not None:
        raise UsageError(f"label={label!r} has no effect: {path} has no named arrays")
    if path.is_dir():
        return _read_idx_folder(path)
    return Content(Pair(_read_npy(path) if path.suffix == ".npy" else read_idx(path)))


def _read_npy(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    try:
        # Mapped first: a header that promises more than the file holds is an error, not an allocation.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError, OverflowError) as error:
        raise DataError(f"{path} cannot be read: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "pickle" in text.lower() or "object" in text.lower():
        return "it is no plain array of numbers but holds pickled Python objects, which can run code and are refused"
    return text


def _read_npz(path: Path, label: str | None) -> Content:
    (x, y, test_x, test_y), unused = _load_npz(path, lambda names: _pick_arrays(names, label, path))
    notes = (f"arrays not used: {', '.join(unused)}",) if unused else ()
    return Content(Pair(x, y), None if test_x is None else Pair(test_x, test_y), notes)


def _load_npz(
    path: Path, choose: Callable[[list[str]], tuple[str | None, ...]]
) -> tuple[list[np.ndarray | None], list[str]]:
    """The arrays that `choose` picks among the names in a file, and the names of the others."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            pick = choose(names)
            arrays = [None if name is None else file[name] for name in pick]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        if isinstance(error, DataError | UsageError):
            raise
        raise DataError(f"{path} cannot be read: {_explain(error)}") from error
    return arrays, [name for name in names if name not in pick]


def read_condition_file(path: Path) -> np.ndarray:
    """Conditions to sample with: a .npy file; or of an .npz file the array "condition" (or "y", ...), or the only one.

    Raises:
        UsageError: another kind of file, or none.
        DataError: damaged, pickled, or it is not clear which array is meant.
    """
    if path.suffix.lower() not in (".npy", ".npz"):
        raise UsageError(f"{path}: conditions are read from .npy and .npz files")
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if path.suffix.lower() == ".npy":
        return _to_numpy(_read_npy(path), str(path))

    def choose(names: list[str]) -> tuple[str | None, ...]:
        named = [CONDITION] if CONDITION in names else [n for n in Y_NAMES if n in names]
        if len(named) != 1 and len(names) != 1:
            raise DataError(f"{path} holds the arrays {', '.join(names) or '(none)'}: call the conditions 'condition'")
        return ((named or names)[0],)

    (array,), _ = _load_npz(path, choose)
    return _to_numpy(array, str(path))


def _pick_arrays(names: Sequence[str], label: str | None, path: Path) -> tuple[str | None, ...]:
    """Names of x, y and of the test set's x and y; None for what is not there."""
    if label is not None and label not in names:
        raise unknown_name("array", label, names)
    if "x_train" in names and "x_test" in names:
        y = label or _label_array(("y_train", f"{CONDITION}_train"), names, path)
        y_test = None if y is None else y.replace("train", "test")
        return "x_train", y, "x_test", y_test if y_test != y and y_test in names else None
    y = label or _label_array(Y_NAMES, names, path)
    rest = [n for n in names if n != y]
    known = [n for n in X_NAMES if n in rest]
    if len(known) != 1 and len(rest) != 1:
        raise DataError(
            f"{path} holds the arrays {', '.join(names) or '(none)'}: call the examples 'x' (and their labels 'y'), "
            "so that it is clear which they are"
        )
    return (known or rest)[0], y, None, None


def _label_array(known: Sequence[str], names: Sequence[str], path: Path) -> str | None:
    found = [n for n in known if n in names]
    both = [n for n in found if n.startswith(CONDITION)]
    if both and len(found) > 1:
        raise DataError(f"{path} holds both {found[0]!r} and {both[0]!r}: say which with label={found[0]} or {both[0]}")
    return found[0] if found else None


def is_idx(path: Path) -> bool:
    """Whether a file, gzipped or not, begins like an IDX file."""
    try:
        with _open_idx(path) as file:
            magic = file.read(4)
    except (OSError, EOFError, zlib.error):
        return path.suffix == ".gz"
    return len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in IDX_DTYPES and 1 <= magic[3] <= 4


def _open_idx(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if gzipped else open(path, "rb")  # type: ignore[return-value]


def read_idx(path: Path) -> np.ndarray:
    """An IDX file: bytes 0, 0, dtype, rank, then big-endian int32 sizes, then the values."""
    try:
        with _open_idx(path) as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_DTYPES:
                raise DataError(f"{path} is no IDX file: it begins with {magic!r}")
            shape = np.frombuffer(file.read(4 * magic[3]), ">i4").tolist()
            dtype = np.dtype(IDX_DTYPES[magic[2]])
            size = math.prod(shape) * dtype.itemsize
            if len(shape) != magic[3] or min(shape, default=-1) < 0:
                raise DataError(f"{path} is cut short or damaged: its header gives the shape {shape}")
            values = file.read(size + 1)  # never more than the header promises, whatever the archive expands to
    except (OSError, EOFError, ValueError, zlib.error, OverflowError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(values) != size:
        raise DataError(f"{path} is cut short or damaged: {size} bytes of values promised, {len(values)} or more found")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def find_idx(folder: Path) -> dict[str, Path]:
    """The files of a folder in MNIST's naming, as "train-images", "train-labels", "test-images", "test-labels"."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = re.search(r"(train|t10k|test)-(images|labels)", path.name)
        if match and path.is_file() and is_idx(path):
            found[f"{match[1].replace('t10k', 'test')}-{match[2]}"] = path
    return found if "train-images" in found else {}


def _read_idx_folder(folder: Path) -> Content:
    arrays = {name: read_idx(path) for name, path in find_idx(folder).items()}
    data = Pair(arrays["train-images"], arrays.get("train-labels"))
    if "test-images" not in arrays:
        return Content(data)
    return Content(data, Pair(arrays["test-images"], arrays.get("test-labels")))
