"""The page of a comparison: one HTML file without scripts or requests, for phones and screens, light and dark.

What is said in figures stands in tables or in words too. Everything that comes from a report is escaped; pictures are
read from the report's own folder only.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from trilemma.comparison import curves, figures
from trilemma.comparison.drawing import Plot, interval, value
from trilemma.comparison.report import REFERENCE, Pair, Report, Row, format_cell
from trilemma.metrics import Estimate
from trilemma.metrics.catalogue import METRICS

LEADING = (
    "overall",
    "clipped_density", "clipped_coverage", "frechet", "log_likelihood", "kl", "samples_per_second", "latency",
    "evaluations", "training_seconds",
)  # fmt: skip
"""The columns of the first table."""

HEADED = ("log_likelihood", "kl", "peak_memory")
"""Columns whose unit stands at their head."""

AXES = {
    "both": "Quality and coverage together",
    "quality": "Quality of single samples",
    "coverage": "Coverage of the data",
    "likelihood": "Likelihood",
    "copying": "Copying of training data",
    "labels": "Classes",
    "latent": "Latent space",
    "speed": "Speed",
    "cost": "Cost",
}

PLAIN = ("samples_per_second", "latency", "training_seconds", "parameters", "peak_memory")
"""Metrics that `format_cell` writes without an error, in units of its own."""


@dataclass(frozen=True)
class Cell:
    """A number of a table: text, interval below it, and where it lies between floor (0) and ceiling (1)."""

    text: str
    bounds: str = ""
    skill: str = ""
    share: int = 0


@dataclass(frozen=True)
class Column:
    """A metric as a column of one table."""

    name: str
    title: str
    arrow: str
    unit: str


@dataclass(frozen=True)
class Standing:
    """Whom a model beats, whom it cannot be told from, and who beats it, in one metric."""

    model: str
    beats: list[str]
    tied: list[str]
    loses: list[str]


def render(report: Report) -> str:
    """The whole page; equal reports give equal pages."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trilemma.comparison", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": cell,
        "single": single,
        "bounds": lambda estimate, name: format_bounds(name, estimate),
        "change": change,
        "sentences": sentences,
    }
    looks = figures.Looks(report)
    columns = report.columns()
    return environment.get_template("report.html.j2").render(
        report=report,
        reference=REFERENCE,
        metrics=METRICS,
        leading=[_column(report, name) for name in LEADING if name in columns],
        groups=_groups(report, columns),
        plots=overview(report, looks),
        histograms={
            row.model: curves.distances(row, f"distances{number}", looks) for number, row in enumerate(report.rows)
        },
        standings={name: _standings(pairs) for name, pairs in _by_metric(report.pairs).items()},
        methods={name: _method(report, name) for name in columns},
        picture=lambda path: picture(Path(report.folder), path),
    )


def overview(report: Report, looks: figures.Looks) -> list[Plot]:
    """The figures over all models, those for which there are numbers."""
    plots = [
        figures.dots(report, looks),
        figures.quality_coverage(report, looks),
        figures.overall_latency(report, looks),
        curves.training(report, looks),
        *curves.knobs(report),
    ]
    return [plot for plot in plots if plot is not None]


def picture(folder: Path, path: str | None) -> str | None:
    """A picture of the report as a data URI; None where it is missing or lies outside of the report's folder."""
    file = None if path is None else (folder / path).resolve()
    if file is None or not file.is_relative_to(folder.resolve()) or file.suffix != ".png" or not file.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def cell(row: Row, name: str) -> Cell:
    """What stands in a table for a metric of a row."""
    estimate, skill = row.metrics.get(name), value(row.skill.get(name))
    if estimate is None:
        return Cell("–")
    return replace(
        single(estimate, name),
        skill="" if skill is None else f"{skill:.2f}".replace("-", "−"),
        share=0 if skill is None else round(100 * min(1.0, max(0.0, skill))),
    )


def single(estimate: Estimate, name: str) -> Cell:
    """A number and its interval; the unit stands at the head of the column."""
    text = format_cell(name, estimate)
    text = text.removesuffix(f" {estimate.unit}") if name in HEADED else text
    return Cell(text.replace("-", "−"), format_bounds(name, estimate))


def format_bounds(name: str, estimate: Estimate) -> str:
    """The interval, or the quartiles of a timing, to the digits of its width: "0.93 to 0.97"; "" without."""
    bounds = interval(estimate)
    if bounds is None:
        return ""
    if name in PLAIN:
        texts = [format_cell(name, estimate.model_copy(update={"value": end})) for end in bounds]
        unit = texts[1].partition(" ")[2]
        low = texts[0].removesuffix(f" {unit}")
        return f"{low} to {texts[1]}" if low != texts[1].partition(" ")[0] else ""
    width = (bounds[1] - bounds[0]) / 4.0
    error = estimate.se if estimate.se is not None and estimate.se > 0.0 else width
    digits = max(0, min(4, 1 - math.floor(math.log10(error)))) if error > 0.0 else 4
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}".replace("-", "−")


def change(estimate: Estimate) -> str:
    """A difference with its sign."""
    text = format_cell("", estimate)
    return ("+" if estimate.value > 0.0 else "") + text.replace("-", "−")


def sentences(parts: Iterable[str]) -> str:
    """One paragraph of parts that may lack their full stop."""
    return " ".join(part if part.rstrip().endswith((".", "!", "?")) else f"{part}." for part in parts)


def _column(report: Report, name: str) -> Column:
    unit = next(row.metrics[name].unit for row in report.rows if name in row.metrics)
    shown = unit if name in HEADED else ""
    title = str(report.extractor.get("frechet", "Fréchet distance")) if name == "frechet" else METRICS[name].title
    return Column(name, title, report.arrow(name).strip(), shown)


def _groups(report: Report, columns: Sequence[str]) -> list[tuple[str, list[Column]]]:
    """The columns by the question that they answer."""
    found = []
    for axis, title in AXES.items():
        group = [_column(report, name) for name in columns if METRICS[name].axis == axis]
        if group:
            found.append((title, group))
    return found


def _by_metric(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.metric, []).append(pair)
    return found


def _standings(pairs: Sequence[Pair]) -> list[Standing]:
    """By model, those that beat most others first."""
    found: dict[str, Standing] = {}
    for pair in pairs:
        for model, other in ((pair.a, pair.b), (pair.b, pair.a)):
            standing = found.setdefault(model, Standing(model, [], [], []))
            where = standing.tied if pair.better is None else standing.beats if pair.better == model else standing.loses
            where.append(other)
    return sorted(found.values(), key=lambda s: (len(s.loses) - len(s.beats), s.model))


def _method(report: Report, name: str) -> str:
    """How a metric was computed, from how many examples: the same for all rows."""
    estimate = next(row.metrics[name] for row in report.rows[::-1] if name in row.metrics)
    n = estimate.n if isinstance(estimate.n, int) else ", ".join(f"{n} {what}" for what, n in estimate.n.items())
    return f"{estimate.method}; n = {n}"
