"""How states z_t are drawn: pictures and signals as film strips, points and tables as scatters, films as GIF.

States are shown divided by their standard deviation and times that of the data,
    z_t std(x) / sqrt(alpha^2 std(x)^2 + sigma^2),
so that one range of grey, or of an axis, fits every time of every schedule, also where the noise explodes. What lies
outside the range of grey is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from trilemma.core.codec import Codec, TableCodec
from trilemma.data.film import Array, frame_of, gif
from trilemma.data.render import PALETTE
from trilemma.diffusion.schedule import Discrete, NoiseSchedule

CELL = 0.62
"""Inches of one state in a film strip."""


def time_label(schedule: NoiseSchedule, t: Tensor | None) -> tuple[str, str]:
    """t and log SNR in words; None is the clean data."""
    if t is None:
        return "data", "∞"
    log_snr = float(schedule.log_snr(t))
    text = f"{float(t):.0f}" if isinstance(schedule, Discrete) else f"{float(t):.2g}"
    if not math.isfinite(log_snr):
        return text, "−∞"
    rounded = round(log_snr, 1) + 0.0  # no minus zero
    return text, f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


class View:
    """What of a state is drawn, and in which range.

    Arguments:
        codec: of the model.
        schedule: of the process.
        std: of the data in model space.
        y: examples in model space (N, *codec.shape), which decide ranges, and which columns of a table are shown.
    """

    def __init__(self, codec: Codec, schedule: NoiseSchedule, std: float, y: Tensor) -> None:
        self.codec, self.spec, self.schedule, self.std = codec, codec.spec, schedule, std
        self.kind = self.spec.kind
        self.pair, self.names = _columns(codec, y)
        if self.kind in ("image", "volume"):
            self.range = (0.0, self.spec.levels - 1.0) if self.spec.levels else _quantiles(self._data(y), 0.005, 0.0)
        elif self.kind == "signal":
            self.range = _quantiles(self._data(y), 0.002, 0.15)
        else:
            self.limits = wide_limits(self.plane(y))

    def scale(self, t: Tensor) -> float:
        """What a state at t is multiplied by."""
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return self.std / math.hypot(alpha * self.std, sigma)

    def _data(self, y: Tensor) -> Tensor:
        return self.codec.unrounded(y.to(next(self.codec.buffers(), y).device)).double().cpu()

    def pixels(self, y: Tensor) -> Array:
        """Pictures, or middle slices of volumes, in model space -> (N, H, W, 3) uint8."""
        x = self._data(y)
        x = x[:, :, x.shape[2] // 2] if self.kind == "volume" else x
        x = (x - self.range[0]) / (self.range[1] - self.range[0])
        x = (255.0 * x).round().clamp(0, 255).to(torch.uint8)
        x = x[:, [0, 0, 0]] if x.shape[1] < 3 else x[:, :3]
        return np.asarray(x.permute(0, 2, 3, 1).numpy())

    def curves(self, y: Tensor) -> Array:
        """Signals in model space -> (N, C, L), 0 .. 1 over the range of the data."""
        return np.asarray(((self._data(y) - self.range[0]) / (self.range[1] - self.range[0])).numpy())

    def plane(self, y: Tensor) -> Array:
        """Points and rows in model space -> (N, 1 or 2): of points in data units, of tables the two columns shown."""
        x = y.double().cpu() if self.kind == "table" else self._data(y)
        return np.asarray(x[:, self.pair].numpy())


def _quantiles(x: Tensor, share: float, margin: float) -> tuple[float, float]:
    flat = x.flatten()
    ends = torch.quantile(flat[:: max(1, flat.numel() // 100_000)], torch.tensor([share, 1.0 - share]).to(flat))
    low, high = (float(end) for end in ends)
    pad = margin * (high - low) or (0.0 if high > low else 1.0)
    return low - pad, high + pad


def _columns(codec: Codec, y: Tensor) -> tuple[list[int], tuple[str, ...]]:
    """Which dimensions of model space a scatter shows: two; of a table's columns the two most correlated."""
    if codec.spec.kind != "table":
        shown = list(range(min(2, y.shape[1])))
        return shown, tuple(f"x{i + 1}" for i in shown)
    (table,) = codec.transforms
    assert isinstance(table, TableCodec)
    starts = np.cumsum([0, *table.widths[:-1]])  # the first of a column's dimensions holds its value
    names = [column.name for column in codec.spec.columns]
    if len(names) == 1:
        return [0], (names[0],)
    x = y.double().cpu().numpy()[:, starts]
    centred = x - x.mean(0)
    norm = np.sqrt((centred**2).sum(0))
    norm[norm == 0.0] = 1.0
    matrix = np.triu(np.abs((centred / norm).T @ (centred / norm)), 1)
    i, j = np.unravel_index(int(matrix.argmax()), matrix.shape) if matrix.any() else (0, 1)
    return [int(starts[i]), int(starts[j])], (names[i], names[j])


# -- film strips ------------------------------------------------------------------------------------------------


def strip(
    view: View, cells: Sequence[Tensor], columns: Sequence[tuple[str, str]], rows: Sequence[str], group: int
) -> Figure:
    """Rows of pictures or signals: time goes to the right.

    Arguments:
        cells: one (T, *codec.shape) in model space for each row, as shown.
        columns: T labels, t and log SNR.
        rows: labels.
        group: rows that belong together; after each group is a gap.
    """
    total, gap = len(columns), 0.12
    tops = [i + gap * (i // group) for i in range(len(rows))]
    height = tops[-1] + 1.0
    tall = CELL if view.kind == "signal" else CELL * view.spec.shape[-2] / view.spec.shape[-1]
    left = max(0.62, 0.2 + 0.07 * max(map(len, rows)))
    size = (left + CELL * total + 0.12, tall * height + 0.62)
    figure = Figure(figsize=size)
    axes = figure.add_axes((left / size[0], 0.1 / size[1], CELL * total / size[0], tall * height / size[1]))
    axes.set_xlim(0, total)
    axes.set_ylim(height, 0)
    draw = _draw_curves if view.kind == "signal" else _draw_pixels
    for top, row in zip(tops, cells, strict=True):
        draw(axes, view, row, top)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks([i + 0.5 for i in range(total)], [f"{t}\n{snr}" for t, snr in columns])
    axes.set_yticks([top + 0.5 for top in tops], list(rows))
    axes.tick_params(length=0)
    corner = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate("t\nlog SNR", (0, 1), (-4, 4.5), fontsize=8, linespacing=1.2, **corner)  # type: ignore[arg-type]
    return figure


def _draw_pixels(axes: Axes, view: View, row: Tensor, top: float) -> None:
    for i, picture in enumerate(view.pixels(row)):
        axes.imshow(
            picture, extent=(i + 0.02, i + 0.98, top + 0.98, top + 0.02), interpolation="nearest", aspect="auto"
        )


def _draw_curves(axes: Axes, view: View, row: Tensor, top: float) -> None:
    values = view.curves(row)
    place = np.linspace(0.06, 0.94, values.shape[2])
    for channel in range(values.shape[1]):
        height = top + 0.97 - 0.94 * values[:, channel].clip(0.0, 1.0)
        lines = [np.stack([i + place, y], 1) for i, y in enumerate(height)]
        axes.add_collection(LineCollection(lines, colors=PALETTE[channel % len(PALETTE)], linewidths=0.8))


# -- scatters ---------------------------------------------------------------------------------------------------


def wide_limits(points: Array) -> list[tuple[float, float]]:
    """Limits of axes that hold the data (N, D) and a Gaussian of the same mean and variance."""
    found = []
    for x in points.T:
        reach = max(3.2 * x.std(), *np.abs(np.quantile(x, (0.005, 0.995)) - x.mean())) or 1.0
        found.append((float(x.mean() - reach), float(x.mean() + reach)))
    return found


def scatters(
    view: View,
    panels: Sequence[tuple[str, Array]],
    colours: Sequence[str] | str,
    columns: int,
    row_names: Sequence[str] = ("",),
) -> Figure:
    """Panels of points (N, 2), or histograms of (N, 1), with the same axes everywhere; points beyond them are cut."""
    limits = view.limits
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.55 * columns + 0.5, 1.72 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.set_visible(False)
            continue
        title, points = panels[i]
        draw_points(axes, points, limits, colours)
        axes.set_title(title, pad=3)
        if i % columns == 0 and row_names[i // columns % len(row_names)]:
            axes.annotate(
                row_names[i // columns % len(row_names)],
                (0.04, 0.97),
                xycoords="axes fraction",
                va="top",
                weight="bold",
            )
    figure.supxlabel(view.names[0], fontsize=9)
    figure.supylabel(view.names[1] if len(view.names) > 1 else "density", fontsize=9)
    return figure


def draw_points(axes: Axes, points: Array, limits: Sequence[tuple[float, float]], colours: Sequence[str] | str) -> None:
    axes.set_xlim(*limits[0])
    if points.shape[1] == 1:
        axes.hist(points[:, 0], bins=40, range=limits[0], density=True, color=PALETTE[0])
    else:
        axes.scatter(points[:, 0], points[:, 1], s=2.5, c=colours, alpha=0.7, linewidths=0)
        axes.set_ylim(*limits[1])
    axes.locator_params(nbins=3)


# -- films ------------------------------------------------------------------------------------------------------


def film(view: View, states: Sequence[tuple[str, Tensor, Tensor]], colours: Sequence[str] | str) -> bytes:
    """A GIF of states and of what the denoiser makes of them, side by side.

    Arguments:
        states: title, z as shown (N, *codec.shape) and the estimate of x (N, *codec.shape), time by time.
    """
    if view.kind in ("image", "volume"):
        return gif([_mosaic(view, z, x) for _, z, x in states])
    draw: Callable[[Axes, Tensor], None]
    if view.kind == "signal":

        def draw(axes: Axes, y: Tensor) -> None:
            for i, values in enumerate(view.curves(y[:8])):
                axes.plot(values[0], color=PALETTE[i % len(PALETTE)], linewidth=0.9)
            axes.set_ylim(0.0, 1.0)
            axes.set_yticks([])

    else:

        def draw(axes: Axes, y: Tensor) -> None:
            draw_points(axes, view.plane(y), view.limits, colours)

    frames = []
    for words, z, x in states:
        figure = Figure(figsize=(4.6, 2.5), dpi=100, layout="constrained")
        for axes, y, name in zip(
            figure.subplots(1, 2, sharey=True), (z, x), (f"z   {words}", "estimate of x"), strict=True
        ):
            draw(axes, y)
            axes.set_title(name, loc="left")
        frames.append(frame_of(figure))
    return gif(frames)


def _mosaic(view: View, z: Tensor, x: Tensor) -> Array:
    """Two near-square grids of pictures on white, of about 48 pixels each."""
    halves = []
    for y in (z, x):
        pictures = view.pixels(y)
        factor = max(1, 48 // max(pictures.shape[1:3]))
        pictures = pictures.repeat(factor, 1).repeat(factor, 2)
        n, height, width, _ = pictures.shape
        across = math.ceil(math.sqrt(n))
        half = np.full((math.ceil(n / across) * (height + 2), across * (width + 2), 3), 255, dtype=np.uint8)
        for i, picture in enumerate(pictures):
            top, left = (i // across) * (height + 2), (i % across) * (width + 2)
            half[top : top + height, left : left + width] = picture
        halves.append(half)
    gap = np.full((halves[0].shape[0], 12, 3), 255, dtype=np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], 1)
