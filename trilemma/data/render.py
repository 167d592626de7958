"""Examples as files people open: picture grids, point clouds, signals and tables."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.spec import DataSpec

PALETTE = ("#0f7fd6", "#d55e00", "#009273", "#c2579d", "#8a6bd8", "#a8741a", "#e0456f", "#4f8f2f", "#2b93ad", "#808080")
"""Colours of figures: apart for the colour-blind, with a contrast of at least 3 on white and on the page's dark."""


def figure_style(ink: str, size: float, ticks: float) -> dict[str, Any]:
    """Matplotlib's settings of all figures: letters and lines in one ink, no frame above and to the right.

    Arguments:
        size, ticks: of letters and of those at ticks, in points.
    """
    return {
        "font.family": "DejaVu Sans",
        "font.size": size,
        "axes.labelsize": size,
        "axes.titlesize": size,
        "xtick.labelsize": ticks,
        "ytick.labelsize": ticks,
        "text.color": ink,
        "text.parse_math": False,  # a name may hold a dollar sign
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
    }


def to_uint8(x: Tensor, spec: DataSpec) -> np.ndarray:
    """Pictures (N, C, H, W), or the middle slices x[:, :, D // 2] of volumes, in data units as uint8 (N, H, W, 3).

    Levels are stretched to 0..255. Real pictures are stretched from their 0.5% to their 99.5% quantile, because
    they have no range of their own; one channel becomes grey, two or more than three show the first (and third).
    """
    x = x[:, :, spec.shape[1] // 2] if spec.kind == "volume" else x
    if spec.levels is not None:
        y = x.float() * (255.0 / (spec.levels - 1))
    else:
        flat = x.float().flatten()
        flat = flat[:: max(1, flat.numel() // 100_000)]
        low, high = torch.quantile(flat, 0.005), torch.quantile(flat, 0.995)
        y = (x.float() - low) / (high - low).clamp(min=1e-12) * 255.0
    y = y.round().clamp(0, 255).to(torch.uint8).cpu()
    y = y[:, [0, 0, 0]] if y.shape[1] < 3 else y[:, :3]
    return y.permute(0, 2, 3, 1).numpy()


def picture_grid(x: Tensor, spec: DataSpec, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """A near-square grid (H, W, 3), one pixel apart on white; small pictures are enlarged by whole factors."""
    pictures = to_uint8(x, spec)
    n, height, width, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = scale or max(1, 32 // max(height, width))
    pictures = pictures.repeat(scale, 1).repeat(scale, 2)
    height, width = height * scale, width * scale
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = picture
    return grid


def png_bytes(array: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def preview_png(x: Tensor, spec: DataSpec, columns: int | None = None) -> bytes:
    """A PNG of examples (N, *spec.shape): a grid of pictures or of the middle slices of volumes, a scatter of points,
    lines of signals."""
    if spec.kind in ("image", "volume"):
        return png_bytes(picture_grid(x, spec, columns))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot()
    values = x.double().cpu().numpy()
    if spec.kind == "signal":
        for signal in values[:16, 0]:
            axes.plot(signal, linewidth=0.8)
    elif spec.shape[0] == 1:
        axes.hist(values[np.isfinite(values[:, 0]), 0], bins=60, density=True)
    else:
        axes.scatter(values[:, 0], values[:, 1], s=3, alpha=0.5, linewidths=0)
        if spec.columns:
            axes.set_xlabel(spec.columns[0].name)
            axes.set_ylabel(spec.columns[1].name)
        else:
            axes.set_aspect("equal")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def check_suffix(path: Path) -> str:
    """The suffix of a file for samples.

    Raises:
        UsageError: none of .png, .npy, .npz and .csv.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".npy", ".npz", ".csv"):
        raise UsageError(f"cannot write samples to {path.name}: the suffix must be .png, .npy, .npz or .csv")
    return suffix


def write_samples(x: Tensor, spec: DataSpec, path: Path, condition: Tensor | None = None) -> None:
    """Write examples in the user's units; the suffix decides the format.

    .png: `preview_png`. .npy: the array. .npz: x, and y (classes) or condition where conditioned. .csv: one row each,
    tables with the user's column names, categories and dtypes; what was conditioned on stands in the last columns.

    Raises:
        UsageError: another suffix.
    """
    suffix = check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = x.cpu().numpy()
    if suffix == ".png":
        path.write_bytes(preview_png(x, spec))
    elif suffix == ".npy":
        with open(path, "wb") as file:  # given a name, NumPy would append its own suffix to ".NPY"
            np.save(file, array, allow_pickle=False)
    elif suffix == ".npz":
        arrays = {"x": array}
        if condition is not None:
            named = spec.condition is None or spec.condition.names
            arrays["y" if named else "condition"] = condition.cpu().numpy()
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    else:
        import pandas as pd

        if spec.kind == "table":
            from trilemma.data.tables import to_frame

            frame = to_frame(spec, x)
        else:
            flat = array.reshape(len(array), -1)
            frame = pd.DataFrame(flat, columns=[f"x{i}" for i in range(flat.shape[1])])
        if condition is not None and spec.condition is not None:
            if spec.condition.columns:
                from trilemma.data.given import condition_frame

                frame = pd.concat([frame, condition_frame(spec.condition, condition)], axis=1)
            elif spec.condition.kind == "class":
                frame["label"] = [spec.condition.names[i] for i in condition.tolist()]
            else:
                flat = condition.flatten(1).cpu().numpy()
                names = spec.condition.names or [f"condition{i}" for i in range(flat.shape[1])]
                frame = pd.concat([frame, pd.DataFrame(flat, columns=list(names))], axis=1)
        frame.to_csv(path, index=False)
