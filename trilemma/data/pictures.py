"""A folder of pictures: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF, recognised by content.

photos/*.jpg                          no classes
photos/<class>/**/*.jpg               classes, where at least two subfolders hold pictures
photos/{train,test,validation}/...    given splits, each laid out as above
metadata.csv or metadata.jsonl        classes, captions, attributes (see `_metadata`)
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.data._decode import Options, PictureFile
from trilemma.data._metadata import FILE_NAMES, Metadata, read_metadata
from trilemma.data._store import AUTO_CACHE_BYTES, Decoded, Progress, Storage, decode_pictures
from trilemma.data.dataset import DataReport, Dataset, Skipped, build_dataset, class_condition

PARTS = {"train": None, "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}


@dataclass(frozen=True)
class Entry:
    """A file that may be a picture: its path, its split if given, and the subfolder that may be its class."""

    path: Path
    part: str | None = None
    folder: str | None = None
    stamp: tuple[int, int] = (0, 0)


@dataclass
class Listing:
    """What a folder holds."""

    entries: list[Entry] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def load_pictures(
    root: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    condition: str | None = None,
    test: Path | None = None,
    memory: int = 2_000_000_000,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    name: str,
    source: Mapping[str, Any],
) -> Dataset:
    """Pictures as uint8 (C, H, W) with 256 levels.

    Arguments:
        size: side of the square each picture is resized and cropped to; by default all must have one size.
        channels: 1 or 3; by default 1 if every picture is grey, else 3.
        label: the metadata column of the classes.
        condition: None for classes where there are any, "class", "attributes" or "none".
        test: another folder, to be tested with.
        memory: bytes of decoded pixels to hold in memory; more are streamed from `cache`.
        workers: decoding threads.
        progress: called with the numbers of pictures done and in all.

    Raises:
        DataError: nothing can be read, sizes differ, metadata are wrong.
        UsageError: the label column, the classes or the attributes asked for do not exist.
    """
    listing = list_folder(root)
    if test is not None:
        if any(entry.part == "test" for entry in listing.entries):
            raise UsageError(f"{root} has a test folder of its own; leave out test={str(test)!r}")
        other = list_folder(test)
        listing.entries += [replace(entry, part="test") for entry in other.entries]
        listing.metadata += other.metadata
        listing.skipped += other.skipped
    if not listing.entries:
        raise DataError(f"{root} holds no pictures{_reasons(listing.skipped)}")
    if label is not None and not listing.metadata:
        raise UsageError(f"label={label!r} has no effect: {root} has no metadata.csv or metadata.jsonl")
    metadata = read_metadata(listing.metadata, label)
    entries, left_out = _with_metadata(listing, metadata, condition)
    if not entries:
        raise DataError(f"{root}: no picture can be used{_reasons(left_out)}")
    files = [PictureFile(str(entry.path), entry.path) for entry in entries]
    decoded = decode_pictures(
        files,
        Options(size, channels),
        _storage(entries, size, channels, memory, cache),
        workers=workers,
        progress=progress,
    )
    entries = [entries[i] for i in decoded.kept]
    chosen, notes = _choose_condition(entries, metadata, condition, root)
    captions = [metadata.caption_of(entry.path) for entry in entries] if metadata.caption else None
    report = DataReport(
        skipped=(*listing.skipped, *left_out, *decoded.skipped),
        notes=(*decoded.notes, *_metadata_notes(entries, metadata, condition), *notes),
    )
    parts = [entry.part for entry in entries]
    return picture_dataset(decoded, chosen, name=name, given=parts, captions=captions, source=source, report=report)


def picture_dataset(
    decoded: Decoded,
    condition: tuple[Tensor, ConditionSpec] | None,
    *,
    name: str,
    given: Sequence[str | None],
    captions: Sequence[str] | None,
    source: Mapping[str, Any],
    report: DataReport,
) -> Dataset:
    """Decoded pictures and what was found beside them, cut into splits."""
    return build_dataset(
        decoded.pixels,
        DataSpec(
            kind="image",
            shape=decoded.pixels.shape[1:],
            levels=256,
            condition=None if condition is None else condition[1],
        ),
        decoded.digests,
        name=name,
        place="reorder" if decoded.in_memory else "stream",
        condition=None if condition is None else condition[0],
        given=given,
        captions=captions,
        source=source,
        report=report,
    )


def list_folder(root: Path) -> Listing:
    """Everything below a folder, each real folder once: a loop of symbolic links ends."""
    listing = Listing()
    files: list[tuple[Path, tuple[int, int]]] = []
    _walk(root, listing, files, {})
    files.sort()
    parts = {path.relative_to(root).parts[0].lower() for path, _ in files if len(path.relative_to(root).parts) > 1}
    has_parts = "train" in parts and any(PARTS.get(part) for part in parts)
    for path, stamp in files:
        inner = path.relative_to(root).parts
        part = None
        if has_parts:
            if inner[0].lower() not in PARTS or len(inner) == 1:
                listing.skipped.append(Skipped(str(path), "beside the train and test folders, so in no split"))
                continue
            part, inner = PARTS[inner[0].lower()], inner[1:]
        listing.entries.append(Entry(path, part, inner[0] if len(inner) > 1 else None, stamp))
    return listing


def _walk(
    folder: Path, listing: Listing, files: list[tuple[Path, tuple[int, int]]], seen: dict[tuple[int, int], Path]
) -> None:
    try:
        status = folder.stat()
        # Links come last, so that a folder is known by its own name.
        children = sorted(os.scandir(folder), key=lambda child: (child.is_symlink(), child.name))
    except OSError as error:
        listing.skipped.append(Skipped(str(folder), error.strerror or str(error)))
        return
    seen[status.st_dev, status.st_ino] = folder
    for child in children:
        path = Path(child.path)
        try:
            status = child.stat()
        except OSError as error:
            listing.skipped.append(Skipped(child.path, f"cannot be followed: {error.strerror}"))
            continue
        if child.name.startswith("."):
            listing.skipped.append(Skipped(child.path, "hidden"))
        elif stat.S_ISDIR(status.st_mode):
            known = seen.get((status.st_dev, status.st_ino))
            if known is None:
                _walk(path, listing, files, seen)
            else:
                listing.skipped.append(Skipped(child.path, f"the same folder as {known}"))
        elif not stat.S_ISREG(status.st_mode):
            listing.skipped.append(Skipped(child.path, "not a regular file"))
        elif status.st_size == 0:
            listing.skipped.append(Skipped(child.path, "empty (0 bytes)"))
        elif child.name in FILE_NAMES:
            listing.metadata.append(path)
        else:
            files.append((path, (status.st_mtime_ns, status.st_size)))


def _with_metadata(listing: Listing, metadata: Metadata, condition: str | None) -> tuple[list[Entry], list[Skipped]]:
    """The files that have what is asked of their metadata, and the rows and files that do not fit together."""
    known = {str(entry.path) for entry in listing.entries} | {file.where for file in listing.skipped}
    absent = [path for path in metadata.rows if str(path) not in known]
    skipped = [Skipped(str(path), "named in the metadata, but not in the folder") for path in absent]
    kept = []
    for entry in listing.entries:
        reason: str | None = None
        if condition == "attributes" and metadata.attributes:
            values = metadata.attributes_of(entry.path)
            reason = values if isinstance(values, str) else None
        elif condition in (None, "class") and metadata.label and metadata.label_of(entry.path) is None:
            reason = f"no value of {metadata.label!r} in its metadata"
        if reason is not None and entry.path not in metadata.rows:
            reason = "no row in the metadata"
        if reason is None:
            kept.append(entry)
        else:
            skipped.append(Skipped(str(entry.path), reason))
    return kept, skipped


def _choose_condition(
    entries: Sequence[Entry], metadata: Metadata, condition: str | None, root: Path
) -> tuple[tuple[Tensor, ConditionSpec] | None, tuple[str, ...]]:
    """The condition of each picture, and what to say about it."""
    if condition == "none":
        return None, ()
    if condition == "attributes":
        if not metadata.attributes:
            raise UsageError(f"condition='attributes': {root} has no metadata with a column of numbers")
        values = torch.tensor([metadata.attributes_of(entry.path) for entry in entries])
        return (values, ConditionSpec(kind="vector", names=metadata.attributes)), ()
    labels = [metadata.label_of(e.path) if metadata.label else e.folder for e in entries]
    names = {name for name in labels if name is not None}
    note = ""
    if len(names) == 1:
        note = f"there is only one class, {next(iter(names))!r}, so the data have no classes"
    elif names and None in labels:
        note = f"{labels.count(None)} picture(s) lie beside the {len(names)} subfolders, so these are no classes"
    if len(names) > 1 and not note:
        return class_condition([name for name in labels if name is not None]), ()
    if condition == "class":
        raise DataError(f"condition='class': {root} has no classes{': ' if note else ''}{note}")
    return None, (note,) if note else ()


def _metadata_notes(entries: Sequence[Entry], metadata: Metadata, condition: str | None) -> list[str]:
    notes = []
    lacking = sum(entry.path not in metadata.rows for entry in entries)
    if metadata.rows and lacking:
        notes.append(f"{lacking} picture(s) have no row in the metadata")
    if metadata.attributes and condition != "attributes":
        notes.append(f"metadata columns for condition='attributes': {', '.join(metadata.attributes)}")
    if metadata.unused:
        notes.append(f"metadata columns not used: {', '.join(metadata.unused)}")
    return notes


def cache_root(cache: Path | None) -> Path:
    """Where decode caches go: `cache`, else the user's cache folder."""
    return cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilemma"


def _storage(
    entries: Sequence[Entry], size: int | None, channels: int | None, memory: int, cache: Path | None
) -> Storage:
    content = [[str(entry.path.absolute()), *entry.stamp] for entry in entries]
    total = sum(entry.stamp[1] for entry in entries)
    return make_storage(content, size, channels, memory, cache, wanted=total >= AUTO_CACHE_BYTES)


def make_storage(
    content: Any, size: int | None, channels: int | None, memory: int, cache: Path | None, wanted: bool
) -> Storage:
    """`Storage` for pictures that `content`, any JSON value, identifies."""
    from PIL import __version__ as pillow

    key = hashlib.blake2b(json.dumps([1, pillow, size, channels, content]).encode(), digest_size=16).hexdigest()
    return Storage(memory, cache_root(cache), key, explicit=cache is not None, wanted=wanted or cache is not None)


def _reasons(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ": it is empty"
    return f": {len(skipped)} file(s) left out, such as {skipped[0].where} ({skipped[0].reason})"
