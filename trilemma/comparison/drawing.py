"""Figures as inline SVG that needs nothing from outside and takes its ink from the page.

Text stays text. Lines and letters are drawn in a placeholder colour that becomes `currentColor`, so that one picture
is right on white and on dark. Ids that nothing refers to are dropped and the others get a prefix, because all pictures
share the ids of one page. Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from trilemma.data.render import figure_style
from trilemma.metrics import Estimate

INK = "#010203"
"""Stands for the page's text colour."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p")
FONT_SIZE = 10.0
LABEL_SIZE = 9.5
WIDTH = 4.4
"""Inches: a phone shows the letters in about their own size."""

_STYLE: Any = {
    **figure_style(INK, FONT_SIZE, LABEL_SIZE),
    "svg.fonttype": "none",
    "svg.hashsalt": "trilemma",
}
style = rc_context(_STYLE)


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        key: unique in the page.
        title, caption: what it is and how to read it.
        alt: what is to be seen, in words and numbers.
        view_box, body: of the SVG.
    """

    key: str
    title: str
    caption: str
    alt: str
    view_box: str
    body: str


def canvas(height: float, width: float = WIDTH) -> Figure:
    """An empty figure (inches) in which a pixel is a point."""
    return Figure(figsize=(width, height), dpi=72)


def add_axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes with margins in points, so that text next to them has room at every size."""
    width, height = (inches * 72.0 for inches in figure.get_size_inches())
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def finish(figure: Figure, key: str, title: str, caption: str, alt: str) -> Plot:
    """The figure as SVG without header, foreign names or loose ids."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    found = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', stream.getvalue(), re.DOTALL)
    assert found is not None
    body = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", found[2], flags=re.DOTALL)
    body = body.replace("xlink:href", "href").replace(INK, "currentColor")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", body)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{key}-", body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    return Plot(key, title, caption, alt, found[1], body)


def value(estimate: Estimate | None) -> float | None:
    """The number, or None where there is none that could be drawn."""
    return None if estimate is None or not math.isfinite(estimate.value) else estimate.value


def interval(estimate: Estimate | None) -> tuple[float, float] | None:
    """The 95% interval, or the quartiles of a timing; None where neither is finite."""
    bounds = None if estimate is None else estimate.ci or estimate.quartiles
    return bounds if bounds is not None and all(map(math.isfinite, bounds)) else None


def shorten(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def thousands(number: float, _: Any = None) -> str:
    """1500 -> "1.5k"."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def seconds(number: float, _: Any = None) -> str:
    """0.002 -> "2 ms"."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if number >= 0.999 * limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number * 1e9:.3g} ns"


def log_axis(axis: Axis, limits: Sequence[float], form: Callable[[float, Any], str], ticks: int = 4) -> None:
    """A logarithmic axis over the limits with a few ticks in plain words, at 1, 2, 5 where it is short."""
    which = axis.axis_name  # type: ignore[attr-defined]
    axes: Axes = axis.axes
    getattr(axes, f"set_{which}scale")("log")
    low, high = min(limits), max(limits)
    pad = (high / low) ** 0.08 if high > low * 1.5 else 1.5
    getattr(axes, f"set_{which}lim")(low / pad, high * pad)
    axis.set_major_locator(log_locator(low / pad, high * pad, ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(form))


def log_locator(low: float, high: float, ticks: int = 4) -> Locator:
    """A few ticks between two ends: powers of ten, with 2 and 5 times these, or round numbers of a narrow range."""
    if high < 4.0 * low:
        return MaxNLocator(nbins=max(1, ticks - 2), steps=[1, 2, 5, 10])
    return LogLocator(base=10, subs=(1.0, 2.0, 5.0) if math.log10(high / low) < 1.5 else (1.0,), numticks=ticks)


Box = tuple[float, float, float, float]
"""Left, bottom, right, top in points."""

_OFFSETS = (
    *((x, y) for y in (0, 9, -9) for x in (1, -1)), (0, 12), (0, -12),
    *((x, y) for y in (18, -18, 27, -27) for x in (1, -1)),
)  # fmt: skip


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str]], taken: Sequence[tuple[float, float]]) -> None:
    """Write each text beside its point where it covers least of the other texts, of points and of the margin.

    Arguments:
        labels: x and y in data units, and the text.
        taken: other points that texts should not cover.
    """
    frame = axes.get_window_extent()
    boxes: list[Box] = []
    for x, y in [*((x, y) for x, y, _ in labels), *taken]:
        px, py = axes.transData.transform((x, y))
        boxes.append((px - 5, py - 5, px + 5, py + 5))
    for x, y, text in labels:
        px, py = axes.transData.transform((x, y))
        width, best, least = 0.56 * LABEL_SIZE * len(text), (1, 0), math.inf
        for order, (side, dy) in enumerate(_OFFSETS):
            box = _box(px, py, side, dy, width)
            outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1 - 4)
            outside += max(0.0, frame.y0 - box[1]) + max(0.0, box[3] - frame.y1 - 4)
            cost = 5.0 * order + 50.0 * outside + sum(_overlap(box, other) for other in boxes)
            if cost < least:
                best, least = (side, dy), cost
        side, dy = best
        boxes.append(_box(px, py, side, dy, width))
        axes.annotate(
            text, (x, y), (side * 8, dy), textcoords="offset points", va="center", fontsize=LABEL_SIZE,
            ha={1: "left", 0: "center", -1: "right"}[side], annotation_clip=False,
        )  # fmt: skip


def _box(x: float, y: float, side: int, dy: float, width: float) -> Box:
    left = x + side * 8 - (0.0, 0.5, 1.0)[1 - side] * width
    return left, y + dy - 6, left + width, y + dy + 6


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
