"""`hf://owner/name`, `hf://owner/name/config` or `hf://path/to/folder`, through the `datasets` library.

A column of pictures makes pictures: a ClassLabel beside it (or the column that `label=` names) is the class, a
text column `text` or `caption` the caption. Without pictures the columns are a table. Splits called test and
validation are kept (a table's validation rows join its training rows and are cut by content).
No code of a data set is run: `datasets` itself no longer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trilemma.core.errors import DataError, MissingExtraError, UsageError, unknown_name
from trilemma.data._decode import Options, PictureFile
from trilemma.data._metadata import CAPTIONS
from trilemma.data._store import AUTO_CACHE_BYTES, decode_pictures
from trilemma.data.dataset import DataReport, Dataset, Skipped, class_condition
from trilemma.data.pictures import PARTS, make_storage, picture_dataset

PREFIX = "hf://"


def load_hub(
    address: str,
    *,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    types: Mapping[str, str] | None = None,
    condition: str | None = None,
    memory: int = 2_000_000_000,
    cache: Path | None = None,
    given_options: frozenset[str] = frozenset(),
    source: Mapping[str, Any],
) -> Dataset:
    """A data set of the Hugging Face hub, or of a local folder in one of its formats; the options as in `load_data`.

    Arguments:
        given_options: names of the options that the user set, to refuse those without effect here.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: it cannot be loaded. UsageError: an option or column does not apply.
    """
    splits = _load_splits(address)
    name = address.removeprefix(PREFIX).rstrip("/").rpartition("/")[2]
    features = next(iter(splits.values())).features
    pictures = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
    if len(pictures) > 1:
        raise DataError(f"{address} has {len(pictures)} columns of pictures ({', '.join(pictures)}): one is needed")
    unused = given_options & ({"types"} if pictures else {"size", "channels", "condition", "memory", "cache"})
    if unused:
        what = "pictures" if pictures else "a table"
        raise UsageError(f"{sorted(unused)[0]}= has no effect on {what}, which {address} holds; leave it out")
    if not pictures:
        return _load_table(splits, label, types, name, source)
    labels, notes = _labels(splits, label, condition)
    rows, skipped = _rows(splits, pictures[0], labels)
    if not rows:
        raise DataError(f"{address}: no row has both a picture and a label")
    content = [address, labels, [[split, data._fingerprint] for split, data in splits.items()]]
    total = sum(data.data.nbytes for data in splits.values())
    storage = make_storage(content, size, channels, memory, cache, wanted=total >= AUTO_CACHE_BYTES)
    decoded = decode_pictures([row.file for row in rows], Options(size, channels), storage)
    rows = [rows[i] for i in decoded.kept]
    return picture_dataset(
        decoded,
        class_condition([row.label or "" for row in rows]) if labels else None,
        name=name,
        given=[row.part for row in rows],
        captions=[row.caption for row in rows] if any(key in features for key in CAPTIONS) else None,
        source=source,
        report=DataReport(skipped=(*skipped, *decoded.skipped), notes=(*decoded.notes, *notes)),
    )


class _Row(NamedTuple):
    file: PictureFile
    part: str | None
    label: str | None
    caption: str


def _load_splits(address: str) -> dict[str, Any]:
    """The `datasets.Dataset` of each split."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"{address} needs the datasets library: pip install 'trilemma[hub]'") from error
    target = address.removeprefix(PREFIX)
    local = Path(target).expanduser()
    if not target:
        raise UsageError("hf:// needs the owner and the name of a data set: hf://owner/name")
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        elif local.exists() or target.count("/") < 2:
            loaded = datasets.load_dataset(str(local) if local.exists() else target)
        else:
            owner, name, config = target.split("/", 2)
            loaded = datasets.load_dataset(f"{owner}/{name}", config)
    except Exception as error:  # the library, its file formats and the network raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{address} cannot be loaded: {reason}") from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _labels(
    splits: Mapping[str, Any], label: str | None, condition: str | None
) -> tuple[dict[str, list[str | None]] | None, list[str]]:
    """The class of each row of each split, or None, and what to say about it."""
    features = next(iter(splits.values())).features
    if label is not None and label not in features:
        raise unknown_name("column", label, features)
    classes = [key for key, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    column = label or (classes[0] if classes else None)
    if condition == "attributes":
        raise UsageError("condition='attributes' has no effect on pictures of the hub; use label= or leave it out")
    if column is None or condition == "none":
        if condition == "class":
            raise UsageError(f"condition='class': name their column with label=, one of {', '.join(features)}")
        return None, []
    names = getattr(features[column], "names", None)
    if names is None and getattr(features[column], "dtype", "") not in ("string", "bool", *_INTEGERS):
        raise DataError(f"label={column!r} holds {features[column]}: classes are texts, whole numbers or booleans")
    labels = {split: [_class_name(value, names) for value in data[column]] for split, data in splits.items()}
    found = {value for values in labels.values() for value in values if value is not None}
    notes = [f"other columns of classes, not used: {', '.join(classes[1:])}"] if label is None and classes[1:] else []
    if len(found) > 1:
        return labels, notes
    if condition == "class":
        raise DataError(f"condition='class': column {column!r} has {len(found)} class(es)")
    return None, [*notes, f"column {column!r} has only one class, so the data have no classes"]


_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def _class_name(value: Any, names: Sequence[str] | None) -> str | None:
    if value is None or (names is not None and value < 0):  # the hub writes -1 where a label is withheld
        return None
    return str(value) if names is None else names[value]


def _rows(
    splits: Mapping[str, Any], column: str, labels: Mapping[str, list[str | None]] | None
) -> tuple[list[_Row], list[Skipped]]:
    from datasets import Image

    rows, skipped = [], []
    for split, data in splits.items():
        part = PARTS.get(split)
        caption = next((key for key in CAPTIONS if key in data.features), None)
        captions = data[caption] if caption else [""] * len(data)
        encoded = data.select_columns([column]).cast_column(column, Image(decode=False))
        for i in range(len(data)):
            where = f"{split}[{i}]"
            if labels is not None and labels[split][i] is None:
                skipped.append(Skipped(where, "no label"))
                continue
            file = PictureFile(where, partial(_read, encoded, column, i))
            rows.append(_Row(file, part, None if labels is None else labels[split][i], str(captions[i] or "")))
    return rows, skipped


def _read(encoded: Any, column: str, index: int) -> bytes:
    picture = encoded[index][column]
    if picture is None:
        raise ValueError("there is no picture in this row")
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def _load_table(
    splits: Mapping[str, Any], label: str | None, types: Mapping[str, str] | None, name: str, source: Mapping[str, Any]
) -> Dataset:
    import pandas as pd

    from trilemma.data.tables import load_table

    frames = {split: _to_frame(data) for split, data in splits.items()}
    tests = [frame for split, frame in frames.items() if PARTS.get(split) == "test"]
    rest = [frame for split, frame in frames.items() if PARTS.get(split) != "test"]
    if not rest:
        tests, rest = [], tests
    return load_table(
        pd.concat(rest, ignore_index=True),
        label=label,
        types=None if types is None else dict(types),
        name=name,
        test=tests[0] if tests else None,
        source_info=source,
    )


def _to_frame(data: Any) -> Any:
    """A DataFrame in which classes have their names."""
    frame = data.to_pandas()
    for key, feature in data.features.items():
        if type(feature).__name__ == "ClassLabel":
            frame[key] = [_class_name(value, feature.names) for value in data[key]]
    return frame
