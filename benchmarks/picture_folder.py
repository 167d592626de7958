"""A folder of pictures to tensors, against Pillow alone on the same cores. Target: at least 90% of its rate."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.common import paired, record
from trilemma.data import load_data

COUNT = 3000
SIDE = 128
REPETITIONS = 11


def make_folder(folder: Path, suffix: str) -> list[Path]:
    """Random crops of two photographs."""
    photos = load_sample_images().images
    random = np.random.default_rng(0)
    files = []
    for i in range(COUNT):
        photo = photos[i % 2]
        top, left = random.integers(photo.shape[0] - SIDE), random.integers(photo.shape[1] - SIDE)
        path = folder / f"{i:05d}{suffix}"
        Image.fromarray(photo[top : top + SIDE, left : left + SIDE]).save(path)
        files.append(path)
    return files


def decode_with_pillow(files: list[Path]) -> None:
    """What Pillow alone needs: decode to RGB arrays on all cores."""

    def decode(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(decode, files, chunksize=16))


def measure(suffix: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        files = make_folder(folder, suffix)
        result = paired(lambda: decode_with_pillow(files), lambda: load_data(folder), REPETITIONS)
    finally:
        shutil.rmtree(folder)
    return {
        "pictures": COUNT,
        "side": SIDE,
        "pillow_per_second": COUNT / result["median_a"],
        "trilemma_per_second": COUNT / result["median_b"],
        "share_of_pillow": result["ratio_a_over_b"],
        "share_quartiles": result["ratio_quartiles"],
    }


def main() -> None:
    record("picture_folder", {suffix: measure(suffix) for suffix in (".jpg", ".png")})


if __name__ == "__main__":
    main()
