"""`load_data`: from whatever holds the data to a `Dataset`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trilemma.core.errors import DataError, UsageError, unknown_name
from trilemma.data.conditions import CONDITIONS
from trilemma.data.dataset import Dataset

DEFAULT_MEMORY = "2GB"
TABLE_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

EFFECTIVE = {
    "a data set": (),
    "a saved data set": (),
    "a built-in data set": ("condition",),
    "an array": ("condition", "test"),
    "a file of arrays": ("label", "condition", "test"),
    "a table": ("label", "given", "types", "test"),
    "a folder of pictures": ("size", "channels", "label", "condition", "test", "memory", "cache"),
    "a data set of the hub": ("size", "channels", "label", "types", "condition", "memory", "cache"),
}
"""Which settings have an effect on which kind of source."""


def load_data(
    source: Any,
    *,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    given: str | Sequence[str] | None = None,
    types: Mapping[str, str] | None = None,
    condition: str | None = None,
    test: Any = None,
    memory: str | int = DEFAULT_MEMORY,
    cache: str | Path | None = None,
) -> Dataset:
    """Load data and cut them by content into train, validation and test.

    Arguments:
        source: a built-in name ("digits"; a folder of that name is "./digits"), the path of a folder of pictures, of a
            table (.csv, .tsv, .parquet), of arrays (.npy, .npz, IDX) or of what `save_dataset` wrote,
            "hf://owner/name", an array or tensor x or a pair (x, labels) or (x, condition), a DataFrame, or a
            `Dataset`.
        size: pictures: side of the square each is resized and cropped to.
        channels: pictures: 1 or 3.
        label: the column (table, picture metadata, hub) or array (.npz) of the classes or of another condition.
        given: tables: the columns to condition on, such as ["age", "city"] (`trilemma.data.given`).
        types: tables: column name -> "numeric", "categorical", "boolean", "date" or "drop".
        condition: None for classes where there are any; "class" insists on them, "attributes" takes a vector of
            numbers, "none" leaves both out. Arrays also come with "image" or "sequence" conditions, which need to
            be told apart only for signals (`trilemma.data.conditions`).
        test: a test set of the same kind of source; by default the data's own, or a fifth of them.
        memory: pictures: how many bytes of pixels may be held in memory ("2GB"); more are streamed from the disk.
        cache: pictures: folder of the decode cache; by default the user's cache folder, and only if worth it.

    Raises:
        UsageError: an unknown name, or a setting that is wrong or without effect for this kind of source.
        DataError: the data cannot be used.
    """
    if types is not None and not isinstance(types, Mapping):
        raise UsageError(f"types is a mapping from columns to types, such as types.zip=categorical, not {types!r}")
    options = {
        "size": size,
        "channels": channels,
        "label": label,
        "given": [given] if isinstance(given, str) else None if given is None else list(given),
        "types": None if types is None else dict(types),
        "condition": condition,
        "test": test,
        "memory": None if memory == DEFAULT_MEMORY else memory,
        "cache": cache,
    }
    settings = {key: value for key, value in options.items() if value is not None}
    _check_options(settings)
    if isinstance(source, Dataset):
        _refuse(settings, "a data set")
        return source
    if isinstance(source, str | Path):
        # A Path is never a built-in name: Path("./digits") prints as "digits".
        relative = isinstance(source, Path) and not source.is_absolute()
        return _load_named(f"./{source}" if relative else str(source), settings)
    if "pandas" in sys.modules and isinstance(source, sys.modules["pandas"].DataFrame):
        from trilemma.data.tables import load_table

        _refuse(settings, "a table")
        if not isinstance(settings.get("test", ""), str | Path | sys.modules["pandas"].DataFrame):
            raise UsageError("test= of a table is another table: a path or a DataFrame")
        return load_table(source, **settings, name="table", source_info={})
    if isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        from trilemma.data.arrays import load_array

        _refuse(settings, "an array")
        pair = _to_pair(source)
        held_out = settings.pop("test", None)
        return load_array(pair, test=None if held_out is None else _to_pair(held_out), **settings)
    raise UsageError(
        f"cannot load data from a {type(source).__name__}: give a built-in name, a path, an array, a DataFrame or hf://..."
    )


def _load_named(name: str, given: dict[str, Any]) -> Dataset:
    from trilemma.data.builtin import BUILTINS, load_builtin

    if name in BUILTINS:
        _refuse(given, "a built-in data set")
        return load_builtin(name, **given)
    if name.startswith("hf://"):
        from trilemma.data.hub import load_hub

        _refuse(given, "a data set of the hub")
        target = Path(name.removeprefix("hf://")).expanduser()
        address = f"hf://{target.resolve()}" if name != "hf://" and target.exists() else name
        return load_hub(
            address, **_picture_options(given), given_options=frozenset(given), source=_describe_source(address, given)
        )
    path = Path(name).expanduser()
    if not path.exists():
        if "/" in name or path.suffix:
            raise UsageError(f"{name} does not exist; a built-in data set is one of {', '.join(BUILTINS)}")
        raise unknown_name("data set", name, BUILTINS)
    path = path.resolve()
    source = _describe_source(str(path), given)
    return _load_folder(path, given, source) if path.is_dir() else _load_file(path, given, source)


def _load_folder(path: Path, given: dict[str, Any], source: dict[str, Any]) -> Dataset:
    from trilemma.data.arrays import find_idx
    from trilemma.data.saved import is_saved, load_saved

    if is_saved(path):
        _refuse(given, "a saved data set")
        return load_saved(path, source)
    if find_idx(path):
        return _load_array_file(path, given, source)
    from trilemma.data.pictures import load_pictures

    _refuse(given, "a folder of pictures")
    options = _picture_options(given)
    if "test" in options:
        options["test"] = _to_path(options["test"])
        if not options["test"].is_dir():
            raise UsageError(f"test={given['test']!r} is no folder, as {path} is")
    return load_pictures(path, **options, name=path.name, source=source)


def _load_file(path: Path, given: dict[str, Any], source: dict[str, Any]) -> Dataset:
    from trilemma.data.arrays import is_idx

    name = path.name.lower()
    if name.endswith(TABLE_ENDINGS):
        from trilemma.data.tables import load_table

        _refuse(given, "a table")
        held_out = given.get("test")
        if isinstance(held_out, str):
            given = {**given, "test": _to_path(held_out)}
        return load_table(path, **given, name=path.name.split(".")[0], source_info=source)
    if name.endswith(PICTURE_ENDINGS):
        raise DataError(f"{path} is one picture: give the folder that holds all of them")
    if name.endswith(ARCHIVE_ENDINGS):
        raise DataError(f"{path} is an archive: unpack it and give the folder")
    if path.suffix.lower() in (".npy", ".npz") or is_idx(path):
        return _load_array_file(path, given, source)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    raise DataError(
        f"{path} is no kind of file that can be loaded: tables are {', '.join(TABLE_ENDINGS)}, arrays .npy, .npz and "
        "IDX (.gz), pictures a folder of them"
    )


def _load_array_file(path: Path, given: dict[str, Any], source: dict[str, Any]) -> Dataset:
    from trilemma.data.arrays import load_array, read_array_file

    _refuse(given, "a file of arrays")
    content = read_array_file(path, given.get("label"))
    held_out = content.test
    if "test" in given:
        if held_out is not None:
            raise UsageError(f"{path} has a test set of its own; leave out test=")
        held_out = read_array_file(_to_path(given["test"]), given.get("label")).data
    return load_array(
        content.data,
        test=held_out,
        condition=given.get("condition"),
        name=path.name.split(".")[0],
        source=source,
        notes=content.notes,
    )


def _check_options(given: Mapping[str, Any]) -> None:
    size, channels, condition = given.get("size"), given.get("channels"), given.get("condition")
    if size is not None and (not isinstance(size, int) or not 1 <= size <= 8192):
        raise UsageError(f"size={size!r}: it must be a whole number from 1 to 8192, the side of the pictures in pixels")
    if channels is not None and channels not in (1, 3):
        raise UsageError(f"channels={channels!r}: it must be 1 (grey) or 3 (colour)")
    if condition is not None and condition not in CONDITIONS:
        raise unknown_name("condition", str(condition), CONDITIONS)
    parse_memory(given.get("memory", DEFAULT_MEMORY))


def _refuse(given: Mapping[str, Any], kind: str) -> None:
    """Refuse settings without effect on this kind of source."""
    for key in given:
        if key not in EFFECTIVE[kind]:
            able = ", ".join(EFFECTIVE[kind]) or "none"
            raise UsageError(f"{key}= has no effect on {kind}; leave it out (settings that have one: {able})")
    if given.get("condition") in ("image", "sequence") and kind not in ("an array", "a file of arrays"):
        raise UsageError(f"condition={given['condition']!r}: {kind} has none; give the pair (x, condition) of arrays")


def parse_memory(memory: str | int) -> int:
    """Bytes from "2GB", "500 MB" or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(memory).strip().upper())
    if match is None:
        raise UsageError(f"memory={memory!r}: give bytes, or a size such as '500MB' or '2GB'")
    unit = match[2] if match[2] in UNITS else match[2] + "B"
    return int(float(match[1]) * UNITS[unit])


def _picture_options(given: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(given)
    if "memory" in options:
        options["memory"] = parse_memory(options["memory"])
    if "cache" in options:
        options["cache"] = _to_path(options["cache"])
    return options


def _describe_source(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that load the same data again, or {} if one of them is in memory."""
    plain = dict(given)
    for key in ("test", "cache"):
        if key in plain:
            if not isinstance(plain[key], str | Path):
                return {}
            plain[key] = str(_to_path(plain[key]).resolve())
    return {"source": source, **plain}


def _to_path(value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise UsageError(f"test={type(value).__name__}: data from a path need a test set from a path")
    return Path(value).expanduser()


def _to_pair(value: Any) -> Any:
    from trilemma.data.arrays import Pair

    if isinstance(value, tuple):
        if len(value) != 2:
            raise UsageError(f"a tuple of {len(value)}: data with labels or a condition are a pair (x, labels)")
        return Pair(*value)
    return Pair(value)
