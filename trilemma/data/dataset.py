"""`Dataset`: a spec and three splits, cut by content so that the same example never sits in two of them.

Each example's bytes are hashed; the hash, read as a number in [0, 1), decides the split. So the split does not
depend on file names, order or a seed, exact duplicates stay together, and adding data moves nothing.
Rows of a table are another matter: two persons may give the same answers, and splits that kept equal rows together
would not be samples of one distribution. There the k-th copy of a row has a hash of its own.
Within a split the examples stand in the order of their hashes, which is a fixed random order.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.spec import Batch, ConditionSpec, DataSpec, Split
from trilemma.data.given import with_scale

SPLITS = ("train", "validation", "test")
FRACTIONS: Mapping[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}


@dataclass(frozen=True)
class Skipped:
    """A file or row that could not be used, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class DataReport:
    """What happened between the source and the data set. Nothing is dropped without a line here.

    Attributes:
        skipped: every file or row that was not used.
        duplicates: examples whose content occurred before (they are kept; in the same split, except rows of tables).
        leaked: examples of a test set given by the user that also occur in its training set.
        notes: what a person should know, one sentence each.
    """

    skipped: tuple[Skipped, ...] = ()
    duplicates: int = 0
    leaked: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSplit:
    """Examples in memory: x (N, *shape) in data units, condition (N, *value_shape) or None."""

    x: Tensor
    condition: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def batch(self, indices: Tensor) -> Batch:
        return Batch(self.x[indices], None if self.condition is None else self.condition[indices])

    def head(self, n: int) -> Batch:
        return Batch(self.x[:n], None if self.condition is None else self.condition[:n])


@dataclass(frozen=True)
class StreamSplit:
    """Examples on disk: rows of a memory-mapped array. Conditions are small and stay in memory.

    Attributes:
        pixels: (M, *shape), the examples of all splits.
        rows: (N,), which of them are this split's, in its order.
        condition: (N, *value_shape) or None.
    """

    pixels: np.ndarray
    rows: np.ndarray
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        x = torch.from_numpy(np.array(self.pixels[self.rows[indices.cpu().numpy()]]))
        return Batch(x, None if self.condition is None else self.condition[indices])

    def head(self, n: int) -> Batch:
        return self.batch(torch.arange(len(self))[:n])


@dataclass(frozen=True)
class Dataset:
    """Real data, ready to train on, validate on and be judged by.

    Attributes:
        spec: what one example is.
        train, validation, test: the splits; each has `len`, `batch(indices)` and `head(n)`.
        name: short, for titles ("digits", "photos").
        fingerprint: hash of the spec and of every example, its condition and its split; equal data have equal
            fingerprints.
        source: how to load the same data again: the arguments of `load_data`, or {} for data in memory.
        report: what was skipped, doubled or worth knowing.
        density: the known distribution of a toy (`data.toys.Toy`), or None.
        captions: for each split the texts that came with its examples, in its order; {} if there are none.
    """

    spec: DataSpec
    train: Split
    validation: Split
    test: Split
    name: str
    fingerprint: str
    source: Mapping[str, Any] = field(default_factory=dict)
    report: DataReport = DataReport()
    density: Any = None
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}


def get_conditions(split: Split) -> Tensor:
    """The condition of every example of a split of data that have one, without reading the examples."""
    condition = getattr(split, "condition", None)
    condition = split.batch(torch.arange(len(split))).condition if condition is None else condition
    assert condition is not None
    return condition


def hash_bytes(data: bytes) -> bytes:
    """A digest (16 bytes) of one example: BLAKE2b of its bytes, or, where these are many, of its segments' CRC-32s.

    A cryptographic hash of every pixel costs half as much as decoding a JPEG. The eight CRCs (256 bits) tell
    apart whatever is not forged, and a forged collision would only put two examples into the same split.
    """
    if len(data) > 4096:
        view, step = memoryview(data), -(-len(data) // 8)
        crcs = [zlib.crc32(view[i : i + step]) for i in range(0, len(data), step)]
        data = repr((len(data), crcs)).encode()
    return hashlib.blake2b(data, digest_size=16).digest()


def hash_examples(x: np.ndarray) -> list[bytes]:
    """The digest (16 bytes, `hash_bytes`) of each row of x (N, *)."""
    flat = np.ascontiguousarray(x).reshape(len(x), -1)
    return [hash_bytes(row.tobytes()) for row in flat]


def number_repeats(digests: Sequence[bytes]) -> list[bytes]:
    """The first copy keeps its digest, the k-th has one of its own; as they are where fewer than three differ."""
    seen: dict[bytes, int] = {}
    numbered = []
    for d in digests:
        k = seen[d] = seen.get(d, -1) + 1
        numbered.append(hash_bytes(d + k.to_bytes(8, "little")) if k else d)
    return numbered if len(seen) >= 3 else list(digests)


def assign_splits(digests: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Indices of the examples of each split, in hash order.

    A set so small that the hashes leave a split empty gets its extreme examples moved, so that three or more
    different examples always give three splits.

    Raises:
        DataError: there are fewer than three different examples.
    """
    unique = sorted(set(digests))
    if len(unique) < 3:
        what = "is only 1 example" if len(digests) == 1 else f"are {len(digests)} examples"
        what += ", all identical" if len(unique) == 1 < len(digests) else f", {len(unique)} different"
        raise DataError(f"there {what}: at least 3 different ones are needed, to train, validate and test with")
    numbers = np.array([int.from_bytes(d[:8], "little") / 2.0**64 for d in unique])
    first_test = 1.0 - FRACTIONS["test"]
    first_validation = first_test - FRACTIONS["validation"]
    part = np.where(numbers >= first_test, 2, np.where(numbers >= first_validation, 1, 0))
    by_number = np.argsort(numbers)
    for index, position in ((2, -1), (1, -2), (0, 0)):
        if not (part == index).any():
            part[by_number[position]] = index
    split_of = dict(zip(unique, part.tolist(), strict=True))
    order = sorted(range(len(digests)), key=lambda i: (digests[i], i))
    return {
        name: np.array([i for i in order if split_of[digests[i]] == index], dtype=np.int64)
        for index, name in enumerate(SPLITS)
    }


def split_rows(digests: Sequence[bytes], given: Sequence[str | None] | None = None) -> dict[str, np.ndarray]:
    """Rows of each split in hash order, where the data may come with some splits of their own.

    Arguments:
        given: for each row "validation" or "test" where the data say so, else None. The other rows are cut by
            content, and what the cut would put into a given split is trained on.
    """
    if given is None or not any(given):
        return assign_splits(digests)
    own = {part for part in given if part}
    free = [i for i, part in enumerate(given) if not part]
    if not free:
        raise DataError("the data hold a test set only: there is nothing to train on")
    cut = {
        name: np.array(free, dtype=np.int64)[rows] for name, rows in assign_splits([digests[i] for i in free]).items()
    }
    cut["train"] = np.concatenate([cut["train"], *(cut.pop(name) for name in sorted(own))])
    for name in own:
        cut[name] = np.array([i for i, part in enumerate(given) if part == name], dtype=np.int64)
    return {
        name: np.array(sorted(cut[name].tolist(), key=lambda i: (digests[i], i)), dtype=np.int64) for name in SPLITS
    }


def make_fingerprint(spec: DataSpec, digests: Mapping[str, Sequence[bytes]]) -> str:
    """Hash of the spec and the examples of each split, whatever their order."""
    h = hashlib.blake2b(spec.model_dump_json().encode(), digest_size=16)
    for name in SPLITS:
        h.update(name.encode())
        for digest in sorted(digests[name]):
            h.update(digest)
    return h.hexdigest()


def build_dataset(
    x: Tensor | np.ndarray,
    spec: DataSpec,
    digests: Sequence[bytes],
    *,
    name: str,
    place: Literal["copy", "reorder", "stream"] = "copy",
    condition: Tensor | None = None,
    given: Sequence[str | None] | None = None,
    captions: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    report: DataReport | None = None,
    density: Any = None,
) -> Dataset:
    """Cut the rows of x (N, *spec.shape) into a `Dataset`.

    Arguments:
        digests: the hash of each row.
        place: "copy" leaves x as it is; "reorder" puts the rows of an array in the order of the splits, so that it
            is not in memory twice; "stream" leaves x, a memory-mapped array, on the disk.
        given: see `split_rows`. Test examples that also occur in the other splits are counted as leaked.
        report: what is known of the loading so far; duplicates and leaks are added.
    """
    report = report or DataReport()
    independent = spec.kind == "table" and not any(given or ())
    rows = split_rows(number_repeats(digests) if independent else digests, given)
    conditions = {key: None if condition is None else condition[torch.from_numpy(i)] for key, i in rows.items()}
    spec = with_scale(spec, conditions["train"])
    splits: dict[str, Split] = {}
    if place == "stream":
        assert isinstance(x, np.ndarray)
        splits = {key: StreamSplit(x, index, conditions[key]) for key, index in rows.items()}
    elif place == "reorder":
        assert isinstance(x, np.ndarray)
        reorder_rows(x, np.concatenate([rows[key] for key in SPLITS]))
        parts = torch.split(torch.from_numpy(x), [len(rows[key]) for key in SPLITS])
        splits = {key: TensorSplit(part, conditions[key]) for key, part in zip(SPLITS, parts, strict=True)}
    else:
        x = torch.as_tensor(x)
        splits = {key: TensorSplit(x[torch.from_numpy(i)], conditions[key]) for key, i in rows.items()}
    full = digests if condition is None else _with_condition(digests, condition)
    test = {digests[i] for i in rows["test"]}
    others = {digests[i] for key in ("train", "validation") for i in rows[key]}
    leaked = 0 if independent else sum(digests[i] in others for i in rows["test"])
    between = set() if independent else {digests[i] for i in rows["train"]} & {digests[i] for i in rows["validation"]}
    notes = report.notes + _class_notes(spec.condition, splits["train"])
    if leaked:
        notes += (f"{leaked} of the {len(splits['test'])} test examples also occur in the training data",)
    if between:
        notes += (f"{len(between)} example(s) occur in both the training and the validation data",)
    doubled = len(digests) - (len(set(digests)) if independent else len(test) + len(others))
    return Dataset(
        spec=spec,
        name=name,
        fingerprint=make_fingerprint(spec, {key: [full[i] for i in index] for key, index in rows.items()}),
        source=source or {},
        report=DataReport(report.skipped, report.duplicates + doubled, leaked, notes),
        density=density,
        captions={} if captions is None else {k: tuple(captions[i] for i in index) for k, index in rows.items()},
        **splits,
    )


def reorder_rows(x: np.ndarray, order: np.ndarray) -> None:
    """x = x[order] in place, along the cycles of the permutation, with one row of extra memory."""
    source = order.tolist()
    for start in range(len(source)):
        if source[start] < 0 or source[start] == start:
            continue
        first, row = x[start].copy(), start
        while source[row] != start:
            following = source[row]
            x[row], source[row] = x[following], -1
            row = following
        x[row], source[row] = first, -1


def _with_condition(digests: Sequence[bytes], condition: Tensor) -> list[bytes]:
    values = np.ascontiguousarray(condition.numpy())
    return [hash_bytes(d + row.tobytes()) for d, row in zip(digests, values, strict=True)]


def _class_notes(condition: ConditionSpec | None, train: Split) -> tuple[str, ...]:
    if condition is None or condition.kind != "class":
        return ()
    seen = set(get_conditions(train).tolist())
    absent = [name for i, name in enumerate(condition.names) if i not in seen]
    return (f"without a single training example: class(es) {', '.join(absent)}",) if absent else ()


def from_tensors(
    x: Tensor,
    spec: DataSpec,
    *,
    name: str,
    condition: Tensor | None = None,
    test: tuple[Tensor, Tensor | None] | None = None,
    source: Mapping[str, Any] | None = None,
    report: DataReport | None = None,
    density: Any = None,
) -> Dataset:
    """Cut tensors in data units into a `Dataset`.

    Arguments:
        x: (N, *spec.shape).
        condition: (N, *value_shape): class indices, vectors, images or sequences.
        test: a test set (x, condition) that the data come with; the rest is then cut into train and validation.
            Examples of it that also occur in x are counted as leaked.
        report: what is known of the loading so far; duplicates and leaks are added.
    """
    given = None
    if test is not None:
        given = [None] * len(x) + ["test"] * len(test[0])
        x = torch.cat([x, test[0]])
        condition = None if condition is None or test[1] is None else torch.cat([condition, test[1]])
    content = x
    if condition is not None and spec.condition is not None and spec.condition.columns:
        content = torch.cat([x, condition.reshape(len(x), -1).to(x.dtype)], 1)  # a row is all of its columns
    return build_dataset(
        x,
        spec,
        hash_examples(content.numpy()),
        name=name,
        condition=condition,
        given=given,
        source=source,
        report=report,
        density=density,
    )


def class_condition(labels: Sequence[str]) -> tuple[Tensor, ConditionSpec]:
    """Class indices (N,) and their names in sorted order, numbers by their value."""
    names = set(labels)
    numeric = all(n.lstrip("-").isascii() and n.lstrip("-").isdigit() for n in names)
    ordered = sorted(names, key=lambda n: (int(n), n)) if numeric else sorted(names)
    index = {n: i for i, n in enumerate(ordered)}
    return torch.tensor([index[n] for n in labels]), ConditionSpec(kind="class", names=tuple(ordered))
