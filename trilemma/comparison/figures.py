"""The figures of a comparison's page. Each says in words, numbers included, what it shows (`Plot.alt`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from trilemma.comparison.drawing import (
    INK,
    MARKERS,
    WIDTH,
    Plot,
    add_axes,
    canvas,
    finish,
    interval,
    log_axis,
    log_locator,
    place_labels,
    seconds,
    shorten,
    style,
    thousands,
    value,
)
from trilemma.comparison.report import REFERENCE, Report, Row
from trilemma.data.render import PALETTE
from trilemma.metrics import Estimate

QUALITY, COVERAGE, RATE = "clipped_density", "clipped_coverage", "samples_per_second"
LATENCY_MAP = LinearSegmentedColormap.from_list("latency", colormaps["viridis"](np.linspace(0.15, 0.95, 16)), N=16)


class Looks:
    """One colour and marker per model, the same in all figures, whatever the ranking."""

    def __init__(self, report: Report) -> None:
        self.models = sorted(row.model for row in report.rows if row.family != REFERENCE)

    def colour(self, model: str) -> str:
        return PALETTE[self.models.index(model) % len(PALETTE)]

    def marker(self, model: str) -> str:
        return MARKERS[self.models.index(model) % len(MARKERS)]


def competitors(report: Report) -> list[Row]:
    """The models with numbers, best first."""
    return [row for row in report.rows if row.family != REFERENCE and row.status == "ok"]


def reference(report: Report, name: str, metric: str) -> float | None:
    """The ceiling's or the floor's number."""
    return next((value(row.metrics.get(metric)) for row in report.rows if row.model == name), None)


def draw_references(axes: Axes, report: Report, metric: str, horizontal: bool = False) -> str:
    """Draw the ceiling and the floor as lines; in words."""
    words = []
    draw = axes.axhline if horizontal else axes.axvline
    for name, line in (("ceiling", "-"), ("floor", (0, (3, 2)))):
        number = reference(report, name, metric)
        if number is not None:
            draw(number, color=INK, alpha=0.55, linewidth=1.0, linestyle=line, zorder=1)
            words.append(f"{name} {number:.3g}")
    return ", ".join(words)


def in_words(rows: Iterable[Row], metric: str) -> str:
    """ "kde 0.97 (0.95 to 0.99), ddpm 0.85 (...)"."""
    words = []
    for row in rows:
        number, bounds = value(row.metrics.get(metric)), interval(row.metrics.get(metric))
        if number is not None:
            words.append(f"{row.model} {number:.3g}" + (f" ({bounds[0]:.3g} to {bounds[1]:.3g})" if bounds else ""))
    return ", ".join(words)


def numbers(rows: Iterable[Row], metric: str) -> list[float]:
    """Values and ends of intervals."""
    found: list[float] = []
    for row in rows:
        number = value(row.metrics.get(metric))
        if number is not None:
            found += [number, *(interval(row.metrics.get(metric)) or ())]
    return found


def limits(values: Sequence[float], pad: float = 0.07) -> tuple[float, float]:
    low, high = min(values), max(values)
    width = (high - low) or 0.1
    return low - pad * width, high + pad * width


@style
def dots(report: Report, looks: Looks) -> Plot | None:
    """Three aligned dot plots: quality, coverage, speed."""
    rows = [row for row in competitors(report) if any(value(row.metrics.get(m)) for m in (QUALITY, COVERAGE, RATE))]
    if not rows:
        return None
    figure = canvas((len(rows) * 20.0 + 62.0) / 72.0)
    names = [shorten(row.model, 13) for row in rows]
    left, gap, right = 10.0 + 6.0 * max(map(len, names)), 11.0, 8.0
    panel = (WIDTH * 72.0 - left - right - 2 * gap) / 3.0
    words = []
    for place, (metric, heading) in enumerate(((QUALITY, "quality"), (COVERAGE, "coverage"), (RATE, "samples/s"))):
        start = left + place * (panel + gap)
        axes = add_axes(figure, start, 34.0, WIDTH * 72.0 - start - panel, 24.0)
        axes.set_title(heading)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), names if place == 0 else [""] * len(rows))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        ends = numbers(rows, metric)
        if metric == RATE:
            positive = [number for number in ends if number > 0]
            log_axis(axes.xaxis, positive or [1.0, 10.0], thousands, ticks=3)
            lines = ""
        else:
            lines = draw_references(axes, report, metric)
            known = [reference(report, name, metric) for name in ("ceiling", "floor")]
            axes.set_xlim(*limits([0.0, 1.0, *ends, *(k for k in known if k is not None)], 0.05))
            axes.locator_params(axis="x", nbins=3)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        for y, row in enumerate(rows):
            _dot(axes, row, metric, y, looks)
        words.append(f"{heading}: {in_words(rows, metric) or 'no numbers'}{f'; {lines}' if lines else ''}.")
    return finish(
        figure,
        "dots",
        "Quality, coverage and speed",
        "Points with 95% intervals; more to the right is better. Solid line: ceiling (real data). Dashed: floor "
        "(independent dimensions). Speed on a logarithmic axis, its bars span the middle half of repeated timings.",
        "Dot plots of " + " ".join(words),
    )


def _dot(axes: Axes, row: Row, metric: str, y: int, looks: Looks) -> None:
    number, bounds = value(row.metrics.get(metric)), interval(row.metrics.get(metric))
    if number is None or (metric == RATE and number <= 0):
        return
    if bounds:
        axes.plot(bounds, (y, y), color=looks.colour(row.model), linewidth=1.8, solid_capstyle="butt")
    axes.plot(number, y, looks.marker(row.model), color=looks.colour(row.model), markersize=6)


@style
def quality_coverage(report: Report, looks: Looks) -> Plot | None:
    """Quality against coverage: crosses, colour = latency, knob curves, Pareto front."""
    rows = [row for row in competitors(report) if _place(row.metrics)]
    if not rows:
        return None
    places = {row.model: [_place(row.metrics), *(_place(point.metrics) for point in row.curve)] for row in rows}
    times = [t for row in rows for m in (row.metrics, *(p.metrics for p in row.curve)) if (t := _latency(m))]
    norm = LogNorm(min(times) * 0.9, max(times) * 1.1) if times else None
    figure = canvas(4.6 if norm else 4.0)
    axes = add_axes(figure, 42.0, 92.0 if norm else 40.0, 10.0, 10.0)
    for axis, metric, index in (("x", COVERAGE, 0), ("y", QUALITY, 1)):
        ends = numbers(rows, metric) + [at[index] for points in places.values() for at in points if at]
        end = reference(report, "ceiling", metric)
        getattr(axes, f"set_{axis}lim")(*limits(ends if end is None else [*ends, end]))
    axes.set_xlabel("coverage →")
    axes.set_ylabel("quality →")
    labels = []
    for row in rows:
        _cross(axes, row, norm, looks)
        chance = report.pareto.get(row.model)
        x, y = places[row.model][0] or (0.0, 0.0)
        labels.append((x, y, shorten(row.model) + ("" if chance is None else f" (p={chance:.2g})")))
    front = _front(axes, rows)
    for name, marker in (("ceiling", "*"), ("floor", "x")):
        right, top = reference(report, name, COVERAGE), reference(report, name, QUALITY)
        if right is not None and top is not None and axes.viewLim.contains(right, top):
            axes.plot(right, top, marker, color=INK, markersize=8, zorder=3)
            labels.append((right, top, name))
    place_labels(axes, labels, [*(at for points in places.values() for at in points if at), *_arms(rows)])
    if norm is not None:
        _latency_bar(figure, norm)
    chances = ", ".join(f"{name} {chance:.2g}" for name, chance in report.pareto.items())
    return finish(
        figure,
        "plane",
        "Quality against coverage",
        "Crosses: 95% intervals. Colour: time for one sample. Small points on thin lines: other settings of the "
        "sampler. Dotted: Pareto front; p: probability that no other model is better in both.",
        f"Quality against coverage. Quality: {in_words(rows, QUALITY)}. Coverage: {in_words(rows, COVERAGE)}. "
        f"Seconds for one sample: {in_words(rows, 'latency') or 'not measured'}. On the Pareto front: "
        f"{', '.join(front)}." + (f" Probability of being on the front: {chances}." if chances else ""),
    )


def _place(metrics: Mapping[str, Estimate]) -> tuple[float, float] | None:
    """Coverage and quality."""
    x, y = value(metrics.get(COVERAGE)), value(metrics.get(QUALITY))
    return None if x is None or y is None else (x, y)


def _latency(metrics: Mapping[str, Estimate]) -> float | None:
    """Seconds for one sample, where they can stand on a logarithmic axis."""
    number = value(metrics.get("latency"))
    return number if number is not None and number > 0.0 else None


def _cross(axes: Axes, row: Row, norm: LogNorm | None, looks: Looks) -> None:
    """Both intervals, the point, and the points of the sampler's other settings."""
    line = [at for point in row.curve if (at := _place(point.metrics))]
    if line:
        axes.plot(*zip(*line, strict=True), color=INK, alpha=0.5, linewidth=0.9, zorder=2)
    for metrics, big in [*((point.metrics, False) for point in row.curve), (row.metrics, True)]:
        at, time = _place(metrics), _latency(metrics)
        if at is None:
            continue
        face = LATENCY_MAP(norm(time)) if norm is not None and time is not None else "none"
        axes.plot(
            *at, looks.marker(row.model), markersize=8 if big else 4, markerfacecolor=face, markeredgecolor=INK,
            markeredgewidth=0.8 if big else 0.4, zorder=4 if big else 3,
        )  # fmt: skip
    x, y = _place(row.metrics) or (0.0, 0.0)
    if bounds := interval(row.metrics.get(COVERAGE)):
        axes.plot(bounds, (y, y), color=INK, alpha=0.6, linewidth=1.0, zorder=2)
    if bounds := interval(row.metrics.get(QUALITY)):
        axes.plot((x, x), bounds, color=INK, alpha=0.6, linewidth=1.0, zorder=2)


def _arms(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Points along the crosses."""
    found = []
    for row in rows:
        x, y = _place(row.metrics) or (0.0, 0.0)
        found += [(float(along), y) for along in np.linspace(*(interval(row.metrics.get(COVERAGE)) or (x, x)), 7)]
        found += [(x, float(along)) for along in np.linspace(*(interval(row.metrics.get(QUALITY)) or (y, y)), 7)]
    return found


def _front(axes: Axes, rows: Sequence[Row]) -> list[str]:
    """Draw the staircase of models that no other one beats in both; their names."""
    front: list[tuple[float, float, str]] = []
    for x, y, name in sorted(((*(_place(r.metrics) or (0.0, 0.0)), r.model) for r in rows), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y, name))
    low = axes.get_xlim()[0], axes.get_ylim()[0]
    right, top = [front[0][0]], [low[1]]
    for x, y, _ in front:
        right += [x, x]
        top += [top[-1], y]
    axes.plot([*right, low[0]], [*top, top[-1]], ":", color=INK, alpha=0.7, linewidth=1.2, zorder=1)
    return [name for *_, name in front]


def _latency_bar(figure: Figure, norm: LogNorm) -> None:
    bar = add_axes(figure, 42.0, 38.0, 10.0, figure.get_figheight() * 72.0 - 48.0)
    figure.colorbar(ScalarMappable(norm, LATENCY_MAP), cax=bar, orientation="horizontal")
    bar.xaxis.set_major_locator(log_locator(float(norm.vmin or 1.0), float(norm.vmax or 1.0)))
    bar.xaxis.set_minor_locator(NullLocator())
    bar.xaxis.set_major_formatter(FuncFormatter(seconds))
    bar.set_xlabel("time for one sample")


@style
def overall_latency(report: Report, looks: Looks) -> Plot | None:
    """Quality and coverage in one number against the time for one sample."""
    points = [
        (time, overall, row)
        for row in competitors(report)
        if (overall := value(row.metrics.get("overall"))) is not None and (time := _latency(row.metrics)) is not None
    ]
    if not points:
        return None
    rows = [row for *_, row in points]
    figure = canvas(3.6)
    axes = add_axes(figure, 42.0, 40.0, 10.0, 10.0)
    log_axis(axes.xaxis, [time for time, *_ in points], seconds)
    known = [n for name in ("ceiling", "floor") if (n := reference(report, name, "overall")) is not None]
    axes.set_ylim(*limits([0.0, 1.0, *numbers(rows, "overall"), *known]))
    lines = draw_references(axes, report, "overall", horizontal=True)
    axes.set_xlabel("← time for one sample")
    axes.set_ylabel("overall →")
    for time, overall, row in points:
        colour, bounds = looks.colour(row.model), interval(row.metrics["overall"])
        axes.plot(time, overall, looks.marker(row.model), color=colour, markersize=8)
        if bounds:
            axes.plot((time, time), bounds, color=colour, linewidth=1.6)
    place_labels(axes, [(time, overall, shorten(row.model)) for time, overall, row in points], [])
    return finish(
        figure,
        "overall",
        "Overall against latency",
        "Overall: harmonic mean of quality and coverage, with 95% intervals. Towards the upper left is better. "
        "Solid line: ceiling (real data). Dashed: floor.",
        f"Overall against the time for one sample. Overall: {in_words(rows, 'overall')}; {lines}. "
        f"Seconds for one sample: {in_words(rows, 'latency')}.",
    )
