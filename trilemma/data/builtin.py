"""The data sets that come along: handwritten digits, colour patches of two photos, toys with known density.

digits: 1,797 pictures, 8 x 8, grey levels 0 .. 16 (Alpaydin & Kaynak 1998, UCI; shipped by scikit-learn).
patches: every 8 x 8 tile of scikit-learn's two sample photos, 8-bit colour. Tiles share no pixel, so the
    splits do not either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.data.dataset import Dataset, from_tensors
from trilemma.data.toys import TOYS

TOY_EXAMPLES = 10_000
PATCH = 8


def _digits(classes: bool) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return from_tensors(
        torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1),
        DataSpec(kind="image", shape=(1, 8, 8), levels=17, condition=_classes(tuple("0123456789"), classes)),
        name="digits",
        condition=torch.from_numpy(digits.target.astype(np.int64)) if classes else None,
        source={"source": "digits"},
    )


def _patches(classes: bool) -> Dataset:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    names = tuple(name.rpartition("/")[2].rpartition(".")[0] for name in photos.filenames)
    tiles = []
    for photo in photos.images:
        rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
        grid = photo[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
        tiles.append(torch.from_numpy(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH).copy()))
    which = torch.repeat_interleave(torch.arange(len(tiles)), torch.tensor([len(t) for t in tiles]))
    return from_tensors(
        torch.cat(tiles),
        DataSpec(kind="image", shape=(3, PATCH, PATCH), levels=256, condition=_classes(names, classes)),
        name="patches",
        condition=which if classes else None,
        source={"source": "patches"},
    )


def _toy(name: str, classes: bool) -> Dataset:
    toy = TOYS[name]
    x, label = toy.sample(TOY_EXAMPLES, Noise("toy", name, n=TOY_EXAMPLES))
    return from_tensors(
        x.float(),
        DataSpec(kind="points", shape=(toy.dim,), condition=_classes(toy.classes, classes)),
        name=name,
        condition=label if classes else None,
        source={"source": name},
        density=toy,
    )


def _classes(names: tuple[str, ...], wanted: bool) -> ConditionSpec | None:
    return ConditionSpec(kind="class", names=names) if names and wanted else None


BUILTINS: dict[str, Callable[[bool], Dataset]] = {
    "digits": _digits,
    "patches": _patches,
    **{name: partial(_toy, name) for name in TOYS},
}


def load_builtin(name: str, condition: str | None = None) -> Dataset:
    """One of `BUILTINS`, with its classes unless `condition` is "none"."""
    if condition == "attributes" or (condition == "class" and name in TOYS and not TOYS[name].classes):
        raise UsageError(f"condition={condition!r}: the data set {name!r} has none; leave it out")
    dataset = BUILTINS[name](condition != "none")
    return dataset if condition is None else replace(dataset, source={**dataset.source, "condition": condition})
