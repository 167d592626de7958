"""`Dataset`: a spec and three splits, cut by content so that the same example never sits in two of them.

Each example's bytes are hashed; the hash, read as a number in [0, 1), decides the split. So the split does not
depend on file names, order or a seed, exact duplicates stay together, and adding data moves nothing.
Within a split the examples stand in the order of their hashes, which is a fixed random order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.spec import Batch, DataSpec, Split

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
        duplicates: examples whose content occurred before (they are kept, in the same split).
        leaked: examples of a test set given by the user that also occur in its training set.
        notes: what a person should know, one sentence each.
    """

    skipped: tuple[Skipped, ...] = ()
    duplicates: int = 0
    leaked: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSplit:
    """Examples in memory: x (N, *shape) in data units, condition (N,) or (N, size) or None."""

    x: Tensor
    condition: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def batch(self, indices: Tensor) -> Batch:
        return Batch(self.x[indices], None if self.condition is None else self.condition[indices])

    def head(self, n: int) -> Batch:
        return Batch(self.x[:n], None if self.condition is None else self.condition[:n])


@dataclass(frozen=True)
class Dataset:
    """Real data, ready to train on, validate on and be judged by.

    Attributes:
        spec: what one example is.
        train, validation, test: the splits; each has `len`, `batch(indices)` and `head(n)`.
        name: short, for titles ("digits", "photos").
        fingerprint: hash of the spec and of every example with its split; equal data have equal fingerprints.
        source: how to load the same data again: the arguments of `load_data`, or {} for data in memory.
        report: what was skipped, doubled or worth knowing.
        log_density: the known log-density of a toy, as a function (N, *shape) -> (N,), or None.
    """

    spec: DataSpec
    train: Split
    validation: Split
    test: Split
    name: str
    fingerprint: str
    source: Mapping[str, Any] = field(default_factory=dict)
    report: DataReport = DataReport()
    log_density: Any = None

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}


def hash_examples(x: np.ndarray) -> list[bytes]:
    """The BLAKE2b digest (16 bytes) of each row of x (N, *)."""
    flat = np.ascontiguousarray(x).reshape(len(x), -1)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in flat]


def assign_splits(digests: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Indices of the examples of each split, in hash order.

    A set so small that the hashes leave a split empty gets its extreme examples moved, so that three or more
    different examples always give three splits.

    Raises:
        DataError: there are fewer than three different examples.
    """
    unique = sorted(set(digests))
    if len(unique) < 3:
        raise DataError(
            f"{len(unique)} different example(s): at least 3 are needed, one each to train, validate and test with"
        )
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


def make_fingerprint(spec: DataSpec, digests: Mapping[str, Sequence[bytes]]) -> str:
    """Hash of the spec and the examples of each split, whatever their order."""
    h = hashlib.blake2b(spec.model_dump_json().encode(), digest_size=16)
    for name in SPLITS:
        h.update(name.encode())
        for digest in sorted(digests[name]):
            h.update(digest)
    return h.hexdigest()


def from_tensors(
    x: Tensor,
    spec: DataSpec,
    *,
    name: str,
    condition: Tensor | None = None,
    test: tuple[Tensor, Tensor | None] | None = None,
    source: Mapping[str, Any] | None = None,
    report: DataReport | None = None,
    log_density: Any = None,
) -> Dataset:
    """Cut tensors in data units into a `Dataset`.

    Arguments:
        x: (N, *spec.shape).
        condition: (N,) class indices or (N, size) vectors.
        test: a test set (x, condition) that the data come with; the rest is then cut into train and validation.
            Examples of it that also occur in x are counted as leaked.
        report: what is known of the loading so far; duplicates and leaks are added.
    """
    report = report or DataReport()
    digests = hash_examples(x.numpy())
    parts = assign_splits(digests)
    if test is not None:  # the test part of the cut goes back to training
        parts = {"train": np.concatenate([parts["train"], parts["test"]]), "validation": parts["validation"]}
    splits = {
        key: TensorSplit(x[index], None if condition is None else condition[index])
        for key, index in ((k, torch.from_numpy(v)) for k, v in parts.items())
    }
    split_digests = {key: [digests[i] for i in index] for key, index in parts.items()}
    if test is not None:
        splits["test"] = TensorSplit(*test)
        split_digests["test"] = hash_examples(test[0].numpy())
    seen = set(digests)
    leaked = sum(d in seen for d in split_digests["test"]) if test is not None else 0
    notes = report.notes
    if leaked:
        notes += (f"{leaked} of the {len(splits['test'])} test examples also occur in the training data",)
    return Dataset(
        spec=spec,
        name=name,
        fingerprint=make_fingerprint(spec, split_digests),
        source=source or {},
        report=DataReport(report.skipped, report.duplicates + len(digests) - len(seen), leaked, notes),
        log_density=log_density,
        **splits,
    )
