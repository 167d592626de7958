"""Many pictures to one array of uint8, in memory or, beyond a memory budget, in a decode cache on the disk.

Pillow releases the interpreter's lock while it decodes, so a pool of threads uses every core. A cache is a
folder named after the hash of what was decoded and how: `pixels.bin` (N, C, H, W), `digests.bin` (N, 16) and
`index.json`. It can be deleted at any time.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from trilemma.core.errors import CheckpointError, DataError
from trilemma.core.storage import staged_folder, write_bytes
from trilemma.data._decode import MAX_PIXELS, NOTES, Bad, Options, Picture, PictureFile, decode, oriented_size
from trilemma.data.dataset import Skipped

AUTO_CACHE_BYTES = 256_000_000
"""Compressed size from which a folder is cached even if its decoded pixels fit the memory budget."""

Progress = Callable[[int, int], None]
"""Called with the pictures done and the pictures in all."""


@dataclass(frozen=True)
class Decoded:
    """What became of a list of pictures.

    Attributes:
        pixels: uint8 (N, C, H, W), in memory or mapped from the cache.
        digests: the hash of each row.
        kept: for each row the index of its file.
        skipped: the other files.
        notes: what was done to the pictures, in sentences.
    """

    pixels: np.ndarray
    digests: list[bytes]
    kept: list[int]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @property
    def in_memory(self) -> bool:
        return not isinstance(self.pixels, np.memmap)


@dataclass(frozen=True)
class Storage:
    """Where decoded pictures go.

    Attributes:
        memory: bytes of pixels that may be held in memory.
        cache: folder for decode caches.
        key: hash of the files and options that names this one's.
        explicit: the user asked for the cache, so failing to write it is an error.
        wanted: whether to cache pixels that would fit in memory.
    """

    memory: int
    cache: Path
    key: str
    explicit: bool
    wanted: bool


class Sink(Protocol):
    """Takes decoded rows one after the other."""

    @property
    def channels(self) -> int: ...

    def append(self, planes: bytes) -> None: ...

    def widen(self) -> None:
        """Repeat grey rows to three channels: a coloured picture has come."""


class MemorySink:
    """Rows of one array in memory."""

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        self.rows = np.empty((capacity, *shape), np.uint8)
        self.count = 0

    @property
    def channels(self) -> int:
        return int(self.rows.shape[1])

    def append(self, planes: bytes) -> None:
        self.rows[self.count].reshape(-1)[:] = np.frombuffer(planes, np.uint8)
        self.count += 1

    def widen(self) -> None:
        wide = np.empty((self.rows.shape[0], 3, *self.rows.shape[2:]), np.uint8)
        wide[: self.count] = self.rows[: self.count]
        self.rows = wide


class FileSink:
    """Rows of a file. Written, not mapped: a full disk is then an error and not a crash."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape, self.count = path, shape, 0
        self.file: BinaryIO = open(path, "wb", 2**20)  # noqa: SIM115  (closed by `close`)

    @property
    def channels(self) -> int:
        return self.shape[0]

    def append(self, planes: bytes) -> None:
        self.file.write(planes)
        self.count += 1

    def widen(self) -> None:
        self.close()
        narrow = self.path.rename(self.path.with_name("narrow.bin"))
        self.file = open(self.path, "wb", 2**20)  # noqa: SIM115
        with open(narrow, "rb") as file:
            for _ in range(self.count):
                self.file.write(3 * file.read(self.shape[1] * self.shape[2]))
        narrow.unlink()
        self.shape = (3, *self.shape[1:])

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def decode_pictures(
    files: Sequence[PictureFile],
    options: Options,
    storage: Storage,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Decoded:
    """Decode all files, or read the cache of an earlier time.

    Arguments:
        workers: threads; by default one per core this process may use.

    Raises:
        DataError: no file could be decoded; or their sizes differ and `options.size` is not given.
    """
    folder = storage.cache / "pictures" / storage.key
    if folder.is_dir():
        return _read_cache(folder, storage.memory)
    workers = workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0] * (os.cpu_count() or 1)
    )
    with warnings.catch_warnings():
        # Pillow warns of large pictures from 89 million pixels on; ours is the limit that counts.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        job = _Job(files, options, workers, progress)
        fits = len(files) * job.row_bytes <= storage.memory
        note: tuple[str, ...] = ()
        if storage.wanted or not fits:
            try:
                _write_cache(job, folder)
                return _read_cache(folder, storage.memory)
            except (CheckpointError, OSError) as error:
                if folder.is_dir():  # another process was faster
                    return _read_cache(folder, storage.memory)
                if storage.explicit or not fits:
                    raise CheckpointError(
                        f"no decode cache in {storage.cache}: {error}; give another cache="
                    ) from error
                note = (f"no decode cache: {error}",)
        sink = MemorySink(len(files), (job.first.shape[0], *job.size))
        digests, kept, skipped, notes = job.run(sink)
        return Decoded(sink.rows[: sink.count], digests, kept, skipped, notes + note)


class _Job:
    """Decoding of one list of files. The first good picture tells the size, and whether there may be grey only."""

    def __init__(self, files: Sequence[PictureFile], options: Options, workers: int, progress: Progress | None) -> None:
        self.files, self.options, self.workers, self.progress = files, options, workers, progress
        reasons: Counter[str] = Counter()
        for file in files:
            picture = decode(file, options)
            if isinstance(picture, Picture):
                self.first = picture
                break
            reasons[picture.reason] += 1
        else:
            raise DataError(f"none of {len(files)} file(s) could be read as a picture: {_most_common(reasons)}")
        self.size = self.first.shape[1:]
        # Grey ones may turn out to be coloured later, so memory is reckoned with three channels.
        self.row_bytes = (options.channels or 3) * self.size[0] * self.size[1]

    def run(self, sink: Sink) -> tuple[list[bytes], list[int], tuple[Skipped, ...], tuple[str, ...]]:
        digests: list[bytes] = []
        kept: list[int] = []
        skipped: list[Skipped] = []
        notes: Counter[str] = Counter()
        for index, picture in enumerate(self._pictures()):
            if isinstance(picture, Bad) and picture.other_size is None:
                skipped.append(Skipped(self.files[index].name, picture.reason))
            elif isinstance(picture, Bad) or picture.shape[1:] != self.size:
                raise self._mixed_sizes()
            else:
                if picture.shape[0] > sink.channels:
                    sink.widen()
                sink.append(picture.planes if picture.shape[0] == sink.channels else 3 * picture.planes)
                digests.append(picture.digest)
                kept.append(index)
                notes.update(picture.notes)
            if self.progress is not None:
                self.progress(index + 1, len(self.files))
        return digests, kept, tuple(skipped), tuple(f"{n} picture(s) {NOTES[key]}" for key, n in sorted(notes.items()))

    def _pictures(self) -> Iterator[Picture | Bad]:
        """Results in order, with only a few chunks under way at a time."""
        chunk = max(1, min(16, 4_000_000 // self.row_bytes))
        starts = iter(range(0, len(self.files), chunk))
        with ThreadPoolExecutor(self.workers) as pool:
            pending: deque[Future[list[Picture | Bad]]] = deque()
            try:
                while True:
                    for start in itertools.islice(starts, 2 * self.workers - len(pending)):
                        pending.append(pool.submit(self._decode_chunk, self.files[start : start + chunk]))
                    if not pending:
                        return
                    yield from pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _decode_chunk(self, files: Sequence[PictureFile]) -> list[Picture | Bad]:
        return [decode(file, self.options, self.size) for file in files]

    def _mixed_sizes(self) -> DataError:
        sizes: Counter[str] = Counter()
        shortest = None
        for file in self.files:
            try:
                with file.open() as image:
                    height, width = oriented_size(image)
            except Exception:  # whatever is wrong with it is not what this error is about
                continue
            if height * width <= MAX_PIXELS:
                sizes[f"{width}x{height}"] += 1
                shortest = min(height, width, shortest or height)
        return DataError(
            f"the pictures have {len(sizes)} different sizes (width x height): {_most_common(sizes)}; "
            f"give size=, to which each is resized and cropped (the shortest side is {shortest})"
        )


def _most_common(counts: Counter[str]) -> str:
    listing = ", ".join(f"{what} ({n})" for what, n in counts.most_common(4))
    return listing + (", ..." if len(counts) > 4 else "")


def _write_cache(job: _Job, folder: Path) -> None:
    with staged_folder(folder) as stage:
        sink = FileSink(stage / "pixels.bin", (job.first.shape[0], *job.size))
        try:
            digests, kept, skipped, notes = job.run(sink)
        finally:
            sink.close()
        write_bytes(stage / "digests.bin", b"".join(digests))
        index = {
            "shape": [sink.count, *sink.shape],
            "kept": kept,
            "skipped": [[s.where, s.reason] for s in skipped],
            "notes": notes,
        }
        write_bytes(stage / "index.json", json.dumps(index).encode())


def _read_cache(folder: Path, memory: int) -> Decoded:
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        shape = tuple(int(n) for n in index["shape"])
        pixels: np.ndarray = np.memmap(folder / "pixels.bin", np.uint8, mode="r", shape=shape)
        digests = (folder / "digests.bin").read_bytes()
        kept = [int(i) for i in index["kept"]]
        skipped = tuple(Skipped(str(where), str(reason)) for where, reason in index["skipped"])
        notes = tuple(str(note) for note in index["notes"])
        if len(digests) != 16 * shape[0] or len(kept) != shape[0]:
            raise ValueError("its files disagree")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the decode cache {folder} is damaged ({error}); delete it and load again") from error
    if pixels.nbytes <= memory:
        pixels = np.array(pixels)
    return Decoded(pixels, [digests[i : i + 16] for i in range(0, len(digests), 16)], kept, skipped, notes)
