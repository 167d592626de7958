"""`Report`: the leaderboard as data; every number with its interval, sample sizes, unit, kind and extractor."""

from __future__ import annotations

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
from trilemma.metrics.catalogue import METRICS

Status = Literal["ok", "failed", "out_of_budget"]
REFERENCE = "reference"
"""The family of the two rows that are not competitors: the ceiling and the floor."""

SAMPLES = ("overall", "clipped_density", "clipped_coverage", "frechet", "log_likelihood")
REST = ("kl", "samples_per_second", "latency", "evaluations", "training_seconds", "parameters", "peak_memory")
"""Columns of the two tables in the terminal."""

SIGNS = {"exact": "", "lower_bound": "≥ ", "upper_bound": "≤ ", "estimate": "≈ "}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CurvePoint(_Record):
    """One setting of a sampler's knob.

    Attributes:
        knob: the sampler's setting, "steps" or "temperature".
        setting: its value.
        default: this is the setting of the model's own line in the table.
        metrics: "clipped_density", "clipped_coverage", "frechet", "latency", "evaluations", where there are numbers.
    """

    knob: str
    setting: float
    default: bool = False
    metrics: dict[str, Estimate]


class Moment(_Record):
    """The Fréchet distance of the weights that training had after so many seconds."""

    seconds: float
    step: int
    frechet: Estimate


class Neighbours(_Record):
    """The samples closest to real data, and all distances.

    Attributes:
        train: picture file of the samples nearest to training examples, each above its neighbour, or None.
        test: the same for held-out examples.
        edges: of the bins of both histograms, (B + 1).
        generated: how many samples have a distance to the training data in each bin, (B).
        held_out: the same for held-out examples.
        share: of the samples that are nearest to a training example, in the pool of training and held-out examples.
        expected: the same of unseen data.
        p_value: of the memorization test.
        verdict: in a sentence, with what the test could not have seen.
    """

    train: str | None = None
    test: str | None = None
    edges: list[float]
    generated: list[int]
    held_out: list[int]
    share: float
    expected: float
    p_value: float
    verdict: str


class Row(_Record):
    """One model's line.

    Attributes:
        status: whether it has numbers, and `reason` why not.
        seeds: of its training runs.
        metrics: by the names of `METRICS`.
        skill: (floor - m) / (floor - ceiling) of each metric of samples: 0 like the floor, 1 like real data.
        alarms: what is wrong with it, a sentence each: memorization, collapse, underfitting.
        curve: the sampler's knob, where it has one.
        other: metrics of the last weights where the row itself has the best validated ones, or of the best where it has
            the last ones (`other_weights` says which), and these differ.
        history: of the first seed, while it trained.
        neighbours: of the first seed's samples.
        columns: of a table, how well each column's distribution fits (first seed): 1 - Kolmogorov-Smirnov distance or
            1 - total variation.
        conditional: it models p(x | label), and was given the held-out labels.
        runs: run folders, relative to the report.
        samples: picture file of the first samples of the first seed.
    """

    model: str
    family: str
    status: Status
    reason: str | None = None
    seeds: list[int]
    metrics: dict[str, Estimate]
    skill: dict[str, Estimate] = {}
    alarms: list[str] = []
    curve: list[CurvePoint] = []
    other: dict[str, Estimate] = {}
    other_weights: Literal["best", "last"] | None = None
    history: list[Moment] = []
    neighbours: Neighbours | None = None
    columns: dict[str, Estimate] = {}
    conditional: bool = False
    runs: list[str] = []
    samples: str | None = None


class Pair(_Record):
    """Two models against each other on the same held-out data.

    Attributes:
        metric: its name.
        a, b: the models.
        difference: a's value minus b's; what both share (the held-out data) has cancelled.
        better: the better one, or None where the interval spans zero: they are tied.
    """

    metric: str
    a: str
    b: str
    difference: Estimate
    better: str | None


class Advice(_Record):
    """Which model for which purpose.

    Attributes:
        purpose: "best samples", "fastest", "density and anomaly detection", "latent editing".
        model: the recommended one, or None.
        reasons: why, in sentences.
        doubts: what speaks against it, or could change the answer.
    """

    purpose: str
    model: str | None
    reasons: list[str]
    doubts: list[str]


class Report(BaseModel):
    """A finished comparison.

    Attributes:
        data: name, kind, content hash and split sizes of the data.
        settings: budget, seeds and sample size.
        extractor: id and description of what distances are taken in.
        environment: versions and machine.
        second: the same of the second extractor, principal components of the raw values.
        rows: the ceiling, the models from the best overall to the worst, those without numbers, the floor.
        pairs: differences between all models in the metrics that decide.
        pareto: by model, the probability that no other one is better in both quality and coverage.
        notes: what limits the comparison as a whole, a sentence each: metrics that are blind on these data.
        disagreements: pairs of models that the two extractors rank in opposite order, each significantly.
        advice: which model for which purpose.
        folder: where the files named in the rows are.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[2] = 2
    data: dict[str, Any]
    settings: dict[str, Any]
    extractor: dict[str, Any]
    second: dict[str, Any] = {}
    environment: dict[str, Any]
    rows: list[Row]
    pairs: list[Pair] = []
    pareto: dict[str, float] = {}
    notes: list[str] = []
    disagreements: list[str] = []
    advice: list[Advice] = []
    real_samples: str | None = None
    folder: str = "."

    @model_validator(mode="after")
    def _like_with_like(self) -> Report:
        """A column holds one extractor, one unit, one split and one sample size."""
        for name, info in METRICS.items():
            found = [row.metrics[name] for row in self.rows if name in row.metrics]
            what = {(e.extractor, e.unit, e.split, str(e.n) if info.of_samples else "") for e in found}
            if len(what) > 1:
                listed = "; ".join(sorted(map(str, what)))
                raise ValueError(f"the column {name} mixes extractors, units, splits or sample sizes: {listed}")
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
        """One page that needs no network: tables, figures, samples, and what the numbers mean."""
        from trilemma.comparison.page import render

        return render(self)

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
        """For the terminal (rich): samples, then likelihood and cost, then verdicts; at most 80 columns wide."""
        columns = self.columns()
        parts: list[RenderableType] = [
            self._table([name for name in SAMPLES if name in columns], self.title()),
            self._table([name for name in REST if name in columns], None),
        ]
        for row in self.rows:
            if row.reason:
                parts.append(Text(f"{row.model}: {row.status.replace('_', ' ')}: {row.reason}", style="red"))
            parts += [Text(f"{row.model}: {alarm}", style="yellow") for alarm in row.alarms]
            if "overall" in row.other and "overall" in row.metrics:
                both = [format_cell("overall", found["overall"], compact=True) for found in (row.metrics, row.other)]
                words = ("last", "best validated") if row.other_weights == "best" else ("best validated", "last")
                parts.append(Text(f"{row.model}: overall {both[0]} with the {words[0]} weights; {words[1]}: {both[1]}"))
        verdicts = {row.neighbours.verdict for row in self.rows if row.neighbours is not None}
        parts += [Text(verdict) for verdict in sorted(verdicts) if verdict.startswith(("No sign", "With"))]
        parts += [Text(line, style="yellow") for line in self.notes]
        parts += [Text(f"The two extractors disagree. {line}", style="yellow") for line in self.disagreements]
        for advice in self.advice:
            if advice.model is not None:
                reasons = " ".join([*advice.reasons, *advice.doubts])
                parts.append(Text.assemble((f"{advice.purpose}: {advice.model}. ", "bold"), reasons))
        note = (
            f"± one standard error. Features: {self.extractor['description']}. ceiling: real training data against "
            "held-out data; floor: independent dimensions. ≥, ≤ bounds, ≈ estimate, no mark: exact."
        )
        return Group(*parts, Text(note, style="dim"))

    def _table(self, columns: list[str], title: str | None) -> Table:
        table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
        table.add_column("model", no_wrap=True)
        for name in columns:
            heading = METRICS[name].heading
            if name in ("log_likelihood", "peak_memory"):  # the unit is the same for all rows
                heading = next(row.metrics[name].unit for row in self.rows if name in row.metrics)
            if name == "frechet":
                heading = str(self.extractor.get("frechet", heading)).removesuffix(" distance")
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
    """The ceiling, models from the best overall, models without numbers, the floor."""

    def key(row: Row) -> tuple[int, float, str]:
        group = {"ceiling": 0, "floor": 3}.get(row.model, 1 if row.status == "ok" else 2)
        overall = row.metrics["overall"].value if "overall" in row.metrics else -math.inf
        return group, -overall, row.model

    return sorted(rows, key=key)


def format_cell(name: str, estimate: Estimate | None, compact: bool = False) -> str:
    """A number as short as its uncertainty allows: "12.3 ± 0.4", "≥ -1.23 ± 0.02 nats/dim", "1.2k"; or "12.3±0.4"."""
    if estimate is None:
        return "–"
    if name == "evaluations":
        return f"{estimate.value:.0f}"
    if name in ("samples_per_second", "parameters"):
        return _thousands(estimate.value)
    if name == "latency":
        milliseconds = estimate.value * 1e3
        return f"{milliseconds:.2g} ms" if milliseconds < 100 else f"{estimate.value:.2g} s"
    if name == "training_seconds":
        return f"{estimate.value:.1f} s" if estimate.value < 10 else f"{estimate.value:.0f} s"
    if name == "peak_memory":
        return f"{estimate.value:.0f}" + ("" if compact else " MiB")
    sign = SIGNS[estimate.kind] if name in ("log_likelihood", "kl") else ""
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
