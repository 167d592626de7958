"""What `trilemma score` says: the mean, the most unusual examples, and how many are too unusual."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trilemma.cli.output import complain, print_table
from trilemma.core.errors import DivergedError, TrilemmaError
from trilemma.core.score import Score
from trilemma.core.spec import DataSpec
from trilemma.engine import Run
from trilemma.metrics.anomaly import SLACK, Anomalies, find_anomalies, reference_scores

if TYPE_CHECKING:
    from trilemma.core.model import GenerativeModel
    from trilemma.data.examples import Examples

SHOWN = 10
"""How many of the most unusual examples are printed, and of those with a reason."""

LONG = 20.0
"""Seconds of work that are announced."""

NAN, NANS = "its log-likelihood is not a number", "their log-likelihoods are not numbers"


@dataclass(frozen=True)
class Ranked:
    """Scores in order.

    Attributes:
        order: indices of the examples, the least likely first; those without a likelihood (NaN) have no place.
        found: p-values of the ranked examples in the order of the source, or None where there was nothing to rank
            them among.
        validation: how many of the held-out examples were validation examples.
    """

    order: list[int]
    found: Anomalies | None = None
    validation: int = 0

    def columns(self, examples: Examples) -> dict[str, list[Any]]:
        """One value per example, in the order of the source: p-values where there are any, the rank from 1, and why
        there is no rank or no probability. None where there is nothing to say."""
        rows, n, f = sorted(self.order), len(examples.names), self.found
        place = {index: i for i, index in enumerate(self.order, start=1)}
        columns: dict[str, list[Any]] = {}
        if f is not None:
            ranked = {"p_value": f.p_value, "typicality": f.typicality, "discovered": f.discovered}
            for name, values in ranked.items():
                of = dict(zip(rows, values.tolist(), strict=True))
                columns[name] = [of.get(i) for i in range(n)]
        columns["rank"] = [place.get(i) for i in range(n)]
        columns["reason"] = [examples.impossible.get(i, None if i in place else NAN) for i in range(n)]
        return columns


def score_examples(model: GenerativeModel, examples: Examples, settings: Mapping[str, Any]) -> tuple[Score, float]:
    """The log-likelihoods (N,) of all examples, minus infinity for the impossible, and the seconds that one takes."""
    n, impossible = len(examples.names), examples.impossible
    value = torch.full((n,), -math.inf, dtype=torch.float64)
    if not len(examples.x):
        return Score(value, "exact"), 0.0
    condition = examples.condition if model.condition is not None else None
    begun = time.perf_counter()
    scores = model.log_prob(examples.x, condition, **settings)
    seconds = (time.perf_counter() - begun) / len(examples.x)
    possible = torch.tensor([i not in impossible for i in range(n)])
    value[possible] = scores.value.double()
    stderr = None
    if scores.stderr is not None:
        stderr = torch.zeros(n, dtype=torch.float64)
        stderr[possible] = scores.stderr.double()
    return replace(scores, value=value, stderr=stderr), seconds


def rank_scores(
    run: Path,
    model: GenerativeModel,
    scores: Score,
    settings: Mapping[str, Any],
    source: str,
    alarm: float,
    held_out: int,
    seconds: float = 0.0,
) -> Ranked:
    """Rank the scores of `source` among those of the run's held-out examples; complain where that is not possible.

    An impossible row has the smallest p-value, but no conformal one: which values a column can have was read off the
    whole table, so that no held-out row has a new one.

    Arguments:
        seconds: what one example takes.
    """

    def tell(n: int) -> None:
        if n * seconds > LONG:
            complain(f"first {n} held-out examples are scored, in about {n * seconds:.0f} s; --held-out N takes fewer")

    number = ~scores.value.isnan()
    order = [i for i in scores.value.argsort(stable=True).tolist() if number[i]]
    if not held_out:
        return Ranked(order)
    if not (run / "config.yaml").is_file():
        complain(f"no p-values: {run} is a model without the data that it was trained on; give its run folder")
        return Ranked(order)
    trained = Run(run)
    enough = math.ceil((1.0 - SLACK) / alarm) if alarm else held_out
    try:
        reference = reference_scores(trained, model, settings, enough, held_out, tell)
    except DivergedError:
        raise
    except TrilemmaError as error:
        complain(f"no p-values, for want of the run's held-out examples: {error}")
        return Ranked(order)
    if _is_own(trained, source):
        complain(
            f"{source} is what {run} was trained on: the model rates its training examples too high, so their p-values "
            "say little"
        )
    return Ranked(order, find_anomalies(reference.nats, scores.value[number], alarm), reference.validation)


def _is_own(run: Run, source: str) -> bool:
    """Whether the examples are the run's own data, training examples among them."""
    path = Path(source).expanduser()
    return path.exists() and run.data["source"].get("source") == str(path.resolve())


def _mean(scores: Score, spec: DataSpec) -> tuple[Score | None, str]:
    """The mean over the examples with a finite log-likelihood, if any, and words for the others."""
    finite = scores.value.isfinite()
    rest = [repr(v) for v in scores.value[~finite].tolist()]
    counts = [f"{rest.count(v)} {'is' if rest.count(v) == 1 else 'are'} {v}" for v in sorted(set(rest))]
    if not bool(finite.any()):
        return None, "; ".join(counts)
    stderr = None if scores.stderr is None else scores.stderr[finite]
    return replace(scores, value=scores.value[finite], stderr=stderr).per_dim(spec).mean(), "; ".join(counts)


def _number(value: float) -> float | str:
    """For JSON, which has no word for what is not finite: "inf", "-inf" or "nan", as Python's float reads them."""
    return value if math.isfinite(value) else repr(value)


def describe_scores(scores: Score, spec: DataSpec, ranked: Ranked, examples: Examples) -> dict[str, Any]:
    """For JSON: the mean, how it was computed, one value per example, and the anomalies."""
    mean, _ = _mean(scores, spec)
    unit = scores.per_dim(spec)
    result: dict[str, Any] = {
        "n": len(scores.value),
        "finite": int(scores.value.isfinite().sum()),
        "mean": _number(unit.value.mean().item()),  # what it is: nothing is dropped
        "mean_of_finite": None if mean is None else mean.value.item(),
        "se_of_finite": None if mean is None or mean.stderr is None else mean.stderr.item(),
        "unit": unit.unit,
        "kind": unit.kind,
        "method": scores.method,
        "evaluations": scores.evaluations,
        "nats": [_number(v) for v in scores.value.tolist()],
    }
    found = ranked.found
    if found is not None:
        result["anomalies"] = {
            "held_out": found.held_out,
            "validation": ranked.validation,
            "smallest_p_value": found.smallest,
            "level": found.level,
            "alarms": found.alarms,
            "expected_alarms": found.expected,
            "discoveries": int(found.discovered.sum()),
        }
    return result | ranked.columns(examples)


def show_scores(scores: Score, spec: DataSpec, ranked: Ranked, examples: Examples) -> None:
    """For people: the mean, the most unusual examples, and what is to be thought of them."""
    columns, names = ranked.columns(examples), examples.names
    mean, others = _mean(scores, spec)
    over = f" over the {int(scores.value.isfinite().sum())} finite ones" if others else ""
    said = [f"mean log-likelihood{over} {mean}"] * (mean is not None) + [others] * bool(others)
    print(f"{len(names)} examples: {'; '.join(said)}")
    if scores.method:
        print(f"by: {scores.method}, {scores.evaluations} evaluations of the network for each")
    header = ["least likely", f"log-likelihood, nats ({scores.kind.replace('_', ' ')})"]
    header += [] if ranked.found is None else ["p-value", "typicality"]
    rows = []
    for i in ranked.order[:SHOWN]:
        row = [names[i], f"{scores.value[i].item():.5g}"]
        if ranked.found is not None:
            mark = "*" if columns["discovered"][i] else ""
            row += [f"{columns['p_value'][i]:.2g}{mark}", f"{columns['typicality'][i]:.2g}"]
        rows.append(row)
    if rows:
        print_table(header, rows)
    _show_reasons(names, ranked, examples.impossible)
    if ranked.found is not None:
        _show_anomalies(ranked.found, ranked.validation)


def _show_reasons(names: list[str], ranked: Ranked, impossible: Mapping[int, str]) -> None:
    """Which examples have probability zero, and which have no rank."""
    zero = [f"{names[i]} ({why})" for i, why in impossible.items()]
    if zero:
        print(f"{_count(zero, 'has', 'have')} probability zero: {_first(zero)}")
    ranks = set(ranked.order)
    lost = [name for i, name in enumerate(names) if i not in ranks]
    if lost:
        print(f"{_count(lost, 'cannot', 'cannot')} be scored: {NAN if len(lost) == 1 else NANS}: {_first(lost)}")


def _count(items: list[str], one: str, many: str) -> str:
    return f"1 example {one}" if len(items) == 1 else f"{len(items)} examples {many}"


def _first(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


def _show_anomalies(found: Anomalies, validation: int) -> None:
    level, m, n, most = found.level, found.held_out, len(found.p_value), int(found.discovered.sum())
    which = f"{m} test examples"
    if validation:
        which = f"{m} held-out examples, {validation} of them validation ones, which may have chosen the checkpoint"
    print(
        f"p-values: among {which}; not the training ones, which the model rates too high; "
        f"none is below {found.smallest:.2g}"
    )
    print(
        f"p-value <= {level:g}: {found.alarms} of {n}; {found.expected:.3g} expected if all are like the held-out ones"
    )
    few = ""
    if found.needed > n:
        few = f"; {m} held-out examples are too few for any"
    elif found.needed > max(1, most):
        few = f"; among {m} held-out examples, it takes {found.needed} with the smallest p-value"
    print(f"after Benjamini-Hochberg at {level:g} (*): {most}{few}")
    atypical = int((found.typicality <= level).sum())
    print(f"typicality <= {level:g}: {atypical}, too unlikely or too likely")
