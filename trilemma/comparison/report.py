"""`Report`: the leaderboard as data; every number with its interval, sample sizes, unit, kind and extractor."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trilemma.core.errors import CheckpointError, UsageError
from trilemma.core.storage import replace_file
from trilemma.metrics import Estimate

Status = Literal["ok", "failed", "out_of_budget"]
REFERENCE = "reference"
"""The family of the two rows that are not competitors: the ceiling and the floor."""

SIGNS = {"exact": "", "lower_bound": "≥ ", "upper_bound": "≤ ", "estimate": "≈ "}


class MetricInfo(BaseModel):
    """How a metric is headed and explained."""

    title: str
    short: str = ""
    meaning: str
    better: Literal["lower", "higher", "neither"]
    of_samples: bool = False

    @model_validator(mode="after")
    def _default_short(self) -> MetricInfo:
        self.short = self.short or self.title
        return self


METRICS: dict[str, MetricInfo] = {
    "frechet": MetricInfo(
        title="Fréchet",
        better="lower",
        of_samples=True,
        meaning="Squared Fréchet distance between the means and covariances of features of samples and of held-out "
        "data. It is biased upwards at finite n, equally for all rows, which have the same n.",
    ),
    "precision": MetricInfo(
        title="precision",
        better="higher",
        of_samples=True,
        meaning="Quality: share of samples that lie within the neighbourhoods of held-out data.",
    ),
    "recall": MetricInfo(
        title="recall",
        better="higher",
        of_samples=True,
        meaning="Coverage: share of held-out data that lie within the neighbourhoods of samples.",
    ),
    "density": MetricInfo(
        title="density",
        better="higher",
        of_samples=True,
        meaning="Quality: how many neighbourhoods of held-out data a sample lies in, relative to real data; "
        "can exceed 1 for samples from dense regions only.",
    ),
    "coverage": MetricInfo(
        title="coverage",
        better="higher",
        of_samples=True,
        meaning="Coverage: share of held-out data with a sample in their neighbourhood.",
    ),
    "log_likelihood": MetricInfo(
        title="log-likelihood",
        short="log-lik.",
        better="higher",
        meaning="Mean log-likelihood of held-out data per dimension: nats/dim, higher is better; for 8-bit data "
        "bits/dim, the negative, lower is better. ≥ and ≤ mark bounds, ≈ an estimate, no mark: exact. A bound that is "
        "worse than another model's exact value does not prove a worse density.",
    ),
    "samples_per_second": MetricInfo(
        title="samples/s", better="higher", meaning="At the best batch size tried on this machine; median."
    ),
    "latency": MetricInfo(
        title="one sample", short="one", better="lower", meaning="Seconds to draw a single sample; median."
    ),
    "training_seconds": MetricInfo(title="training", better="neither", meaning="Seconds that fitting took."),
    "parameters": MetricInfo(
        title="parameters", short="size", better="neither", meaning="Learned numbers, buffers included."
    ),
    "peak_memory": MetricInfo(
        title="memory", better="lower", meaning="Peak MiB while training: of the process on a CPU, of the GPU on CUDA."
    ),
}


class Row(BaseModel):
    """One model's line: its status, and its metrics where it has them."""

    model_config = ConfigDict(extra="forbid")

    model: str
    family: str
    status: Status
    reason: str | None = None
    seeds: list[int]
    metrics: dict[str, Estimate]
    runs: list[str] = []
    samples: str | None = None


class Report(BaseModel):
    """A finished comparison.

    Attributes:
        data: name, kind, content hash and split sizes of the data.
        settings: budget, seeds and sample size.
        extractor: id and description of what distances are taken in.
        environment: versions and machine.
        rows: the ceiling, the models from best to worst Fréchet distance, those without numbers, the floor.
        folder: where the files named in the rows are.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    data: dict[str, Any]
    settings: dict[str, Any]
    extractor: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    real_samples: str | None = None
    folder: str = "."

    @model_validator(mode="after")
    def _like_with_like(self) -> Report:
        """A column holds one extractor, one unit and one sample size."""
        for name in METRICS:
            found = [row.metrics[name] for row in self.rows if name in row.metrics]
            what = {(e.extractor, e.unit, str(e.n) if METRICS[name].of_samples else "") for e in found}
            if len(what) > 1:
                raise ValueError(f"the column {name} mixes extractors, units or sample sizes: {sorted(map(str, what))}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read DIR/report.json, or the folder DIR."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            return cls.model_validate_json(path.read_bytes()).model_copy(update={"folder": str(path.parent)})
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a comparison's report: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write .json, or a self-contained .html that needs no network.

        Raises:
            UsageError: another suffix.
        """
        path = Path(path)
        if path.suffix == ".json":
            replace_file(path, self.model_dump_json(indent=2, exclude={"folder"}) + "\n")
        elif path.suffix == ".html":
            replace_file(path, self.to_html())
        else:
            raise UsageError(f"cannot save a report as {path.name}: the suffix must be .html or .json")

    def to_html(self) -> str:
        """One page with the table, what its numbers mean, and uncurated samples of every model."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("trilemma.comparison", "templates"), autoescape=True, trim_blocks=True
        )
        columns = self.columns()
        return environment.get_template("report.html.j2").render(
            report=self,
            columns=[(name, METRICS[name]) for name in columns],
            cells={row.model: [format_cell(name, row.metrics.get(name)) for name in columns] for row in self.rows},
            titles={row.model: [_tooltip(row.metrics.get(name)) for name in columns] for row in self.rows},
            picture=self._picture,
            arrows={name: self.arrow(name) for name in columns},
        )

    def _picture(self, path: str | None) -> str | None:
        """A file as a data URI."""
        file = None if path is None else Path(self.folder) / path
        if file is None or not file.exists():
            return None
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()

    def arrow(self, name: str) -> str:
        """Which way is better, as measured: log-likelihood is better high, the bits/dim of 8-bit data low."""
        if METRICS[name].better == "neither":
            return ""
        higher = next(row.metrics[name].higher_is_better for row in self.rows if name in row.metrics)
        return " ↑" if higher else " ↓"

    def columns(self) -> list[str]:
        """The metrics that at least one row has."""
        return [name for name in METRICS if any(name in row.metrics for row in self.rows)]

    def table(self) -> RenderableType:
        """For the terminal (rich): quality and coverage, then likelihood and cost, each at most 80 columns wide."""
        columns = self.columns()
        samples = [name for name in columns if METRICS[name].of_samples]
        rest = [name for name in columns if not METRICS[name].of_samples]
        failed = [
            Text(f"{r.model}: {r.status.replace('_', ' ')}: {r.reason}", style="red") for r in self.rows if r.reason
        ]
        note = (
            f"± one standard error. Features: {self.extractor['description']}. ceiling: real training data against "
            "held-out data; floor: independent dimensions. ≥, ≤ bounds, ≈ estimate, no mark: exact."
        )
        return Group(self._table(samples, self.title()), self._table(rest, None), *failed, Text(note, style="dim"))

    def _table(self, columns: list[str], title: str | None) -> Table:
        table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
        table.add_column("model", no_wrap=True)
        for name in columns:
            heading = METRICS[name].short
            if name in ("log_likelihood", "peak_memory"):  # the unit is the same for all rows
                heading = next(row.metrics[name].unit for row in self.rows if name in row.metrics)
            table.add_column(heading + self.arrow(name), justify="right", no_wrap=True)
        for row in self.rows:
            cells = [format_cell(name, row.metrics.get(name), compact=True) for name in columns]
            style = "dim" if row.family == REFERENCE else "" if row.status == "ok" else "red"
            table.add_row(row.model, *cells, style=style)
        return table

    def title(self) -> str:
        n = self.settings["samples"]
        return f"{self.data['name']}: {self.settings['budget']} of training each, {n} samples against {n} held-out"

    def print(self, console: Console | None = None) -> None:
        """Show the leaderboard."""
        (console or Console()).print(self.table())

    def row(self, model: str) -> Row:
        """The row of a model.

        Raises:
            UsageError: there is none.
        """
        for row in self.rows:
            if row.model == model:
                return row
        raise UsageError(f"the report has no row {model!r}; it has: {', '.join(r.model for r in self.rows)}")


def rank(rows: list[Row]) -> list[Row]:
    """The ceiling, models by Fréchet distance, models without numbers, the floor."""

    def key(row: Row) -> tuple[int, float, str]:
        group = {"ceiling": 0, "floor": 3}.get(row.model, 1 if row.status == "ok" else 2)
        distance = row.metrics["frechet"].value if "frechet" in row.metrics else math.inf
        return group, distance, row.model

    return sorted(rows, key=key)


def format_cell(name: str, estimate: Estimate | None, compact: bool = False) -> str:
    """A number as short as its uncertainty allows: "12.3 ± 0.4", "≥ -1.23 ± 0.02 nats/dim", "1.2k"; or "12.3±0.4"."""
    if estimate is None:
        return "–"
    if name in ("samples_per_second", "parameters"):
        return _thousands(estimate.value)
    if name == "latency":
        milliseconds = estimate.value * 1e3
        return f"{milliseconds:.2g} ms" if milliseconds < 100 else f"{estimate.value:.2g} s"
    if name == "training_seconds":
        return f"{estimate.value:.1f} s" if estimate.value < 10 else f"{estimate.value:.0f} s"
    if name == "peak_memory":
        return f"{estimate.value:.0f}" + ("" if compact else " MiB")
    sign = SIGNS[estimate.kind] if name == "log_likelihood" else ""
    unit = f" {estimate.unit}" if name == "log_likelihood" and not compact else ""
    number = _with_error(estimate.value, estimate.se, 1 if compact else 2)
    text = f"{sign}{number}{unit}"
    return text.replace(" ± ", "±").replace("≥ ", "≥").replace("≈ ", "≈") if compact else text


def _with_error(value: float, se: float | None, significant: int) -> str:
    """Value and standard error to so many significant digits of the error."""
    if se is None or not math.isfinite(se) or se <= 0 or not math.isfinite(value):
        return f"{value:.4g}"
    digits = max(0, min(4, significant - 1 - math.floor(math.log10(se))))
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def _thousands(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _tooltip(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not available: the model does not have this ability, or it failed"
    interval = "" if estimate.ci is None else f"; 95% interval {estimate.ci[0]:.4g} to {estimate.ci[1]:.4g}"
    return f"{estimate.value:.6g} {estimate.unit}{interval}; n = {estimate.n}; {estimate.method}"
