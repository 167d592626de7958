"""Figures of one model or over time: training, a sampler's knob, distances to the training data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trilemma.comparison.drawing import (
    INK,
    LABEL_SIZE,
    Plot,
    add_axes,
    canvas,
    finish,
    interval,
    log_axis,
    place_labels,
    shorten,
    style,
    thousands,
    value,
)
from trilemma.comparison.figures import COVERAGE, QUALITY, Looks, competitors, draw_references, limits, reference
from trilemma.comparison.report import CurvePoint, Report, Row
from trilemma.data.render import PALETTE
from trilemma.metrics.catalogue import METRICS


@style
def training(report: Report, looks: Looks) -> Plot | None:
    """The Fréchet distance while training."""
    found = {row.model: [m for m in row.history if value(m.frechet) is not None] for row in competitors(report)}
    lines = {model: moments for model, moments in found.items() if moments}
    if not lines:
        return None
    figure = canvas(3.6)
    axes = add_axes(figure, 46.0, 40.0, 10.0, 10.0)
    values = [m.frechet.value for moments in lines.values() for m in moments]
    known = [n for name in ("ceiling", "floor") if (n := reference(report, name, "frechet")) is not None]
    if min(values + known) > 0.0:
        log_axis(axes.yaxis, values + known, thousands)
    else:
        axes.set_ylim(*limits(values + known))
    last = max(m.seconds for moments in lines.values() for m in moments)
    axes.set_xlim(0.0, (last or 1.0) * 1.3)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("← Fréchet distance")
    words = draw_references(axes, report, "frechet", horizontal=True)
    for model, moments in lines.items():
        x, y = [m.seconds for m in moments], [m.frechet.value for m in moments]
        axes.plot(x, y, color=looks.colour(model), marker=looks.marker(model), markersize=4, linewidth=1.4)
        bands = [interval(m.frechet) or (m.frechet.value, m.frechet.value) for m in moments]
        axes.fill_between(
            x, [b[0] for b in bands], [b[1] for b in bands], color=looks.colour(model), alpha=0.2, linewidth=0
        )
    place_labels(
        axes,
        [(m[-1].seconds, m[-1].frechet.value, shorten(model)) for model, m in lines.items()],
        [(m.seconds, m.frechet.value) for moments in lines.values() for m in moments],
    )
    return finish(
        figure,
        "training",
        "While training",
        "Fréchet distance of the weights of the moment, with 95% intervals; lower is better. Solid line: ceiling (real "
        "data). Dashed: floor. Measured on the first seed, at the sample size of the moment.",
        "Fréchet distance from the first to the last measurement in training: "
        + "; ".join(
            f"{model} {m[0].frechet.value:.3g} at {m[0].seconds:.0f} s to {m[-1].frechet.value:.3g} at "
            f"{m[-1].seconds:.0f} s" for model, m in lines.items()
        ) + f". {words}",
    )  # fmt: skip


def knobs(report: Report) -> list[Plot]:
    """One small figure for each model and each of its sampler's knobs."""
    return [
        knob(row.model, name, [p for p in row.curve if p.knob == name], f"knob{number}{letter}")
        for number, row in enumerate(competitors(report))
        for letter, name in enumerate(dict.fromkeys(point.knob for point in row.curve))
    ]


@style
def knob(model: str, name: str, curve: Sequence[CurvePoint], key: str) -> Plot:
    """Quality and coverage against the setting of a sampler."""
    figure = canvas(2.6)
    axes = add_axes(figure, 42.0, 40.0, 62.0, 10.0)
    curve = sorted(curve, key=lambda point: point.setting)
    settings = [point.setting for point in curve]
    if settings[0] > 0.0 and settings[-1] > 10.0 * settings[0]:
        log_axis(axes.xaxis, settings, thousands)
    else:
        axes.set_xlim(*limits(settings))
        axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(name)
    words, labels = [], []
    for metric, colour, marker in ((QUALITY, PALETTE[0], "o"), (COVERAGE, PALETTE[1], "s")):
        points = [(p.setting, y, p) for p in curve if (y := value(p.metrics.get(metric))) is not None]
        if not points:
            continue
        axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, linewidth=1.4)
        for x, y, point in points:
            axes.plot(x, y, marker, color=colour, markersize=8 if point.default else 4)
            if bounds := interval(point.metrics.get(metric)):
                axes.plot((x, x), bounds, color=colour, linewidth=1.0)
        labels.append((*points[-1][:2], METRICS[metric].title))
        words.append(f"{METRICS[metric].title} " + ", ".join(f"{y:.3g} at {x:g}" for x, y, _ in points))
    if len(labels) == 2:  # beside the ends of the lines, apart where these meet
        height = axes.get_ylim()[1] - axes.get_ylim()[0]
        near = abs(labels[0][1] - labels[1][1]) < 0.12 * height
        up = labels[0][1] >= labels[1][1]
        shifts = (6.0, -6.0) if up else (-6.0, 6.0)
    else:
        near, shifts = False, (0.0, 0.0)
    for (x, y, text), shift in zip(labels, shifts, strict=False):
        axes.annotate(text, (x, y), (8, shift if near else 0), textcoords="offset points", va="center",
                      fontsize=LABEL_SIZE, annotation_clip=False)  # fmt: skip
    return finish(
        figure,
        key,
        f"{model}: {name}",
        f"Quality and coverage of {model} when its sampler's {name} change; the large points are the default.",
        f"{model} by {name}: {'; '.join(words) or 'no numbers'}.",
    )


@style
def distances(row: Row, key: str, looks: Looks) -> Plot | None:
    """How far samples and held-out examples are from the training data."""
    found = row.neighbours
    if found is None or len(found.edges) < 2:
        return None
    figure = canvas(2.6)
    axes = add_axes(figure, 42.0, 40.0, 10.0, 10.0)
    axes.stairs(found.generated, found.edges, fill=True, color=looks.colour(row.model), alpha=0.55, linewidth=0)
    axes.stairs(found.held_out, found.edges, color=INK, linewidth=1.3)
    axes.set_xlabel("distance to the nearest training example")
    axes.set_ylabel("examples")
    axes.locator_params(nbins=5)
    axes.margins(x=0)
    centres = 0.5 * (np.array(found.edges[1:]) + np.array(found.edges[:-1]))
    means = [float(np.average(centres, weights=n)) if sum(n) else math.nan for n in (found.generated, found.held_out)]
    return finish(
        figure,
        key,
        f"{row.model}: distances to the training data",
        "Filled: samples. Line: held-out examples. Samples that are copies lie far to the left of the line.",
        f"Histograms of distances to the nearest training example: {sum(found.generated)} samples of {row.model} with "
        f"a mean of {means[0]:.3g}, {sum(found.held_out)} held-out examples with a mean of {means[1]:.3g}.",
    )
