"""What `trilemma score` says: the mean, the most unusual examples, and how many are too unusual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trilemma.cli.output import complain, print_table
from trilemma.core.errors import DivergedError, TrilemmaError
from trilemma.core.score import Score
from trilemma.core.spec import DataSpec
from trilemma.engine import Run
from trilemma.metrics.anomaly import Anomalies, find_anomalies, reference_scores

if TYPE_CHECKING:
    from trilemma.core.model import GenerativeModel

SHOWN = 10
"""How many of the most unusual examples are printed."""

LONG = 20.0
"""Seconds of work that are announced."""


@dataclass(frozen=True)
class Ranked:
    """Scores in order.

    Attributes:
        order: indices of the examples, the least likely first.
        found: their p-values, or None where there was nothing to rank them among.
    """

    order: list[int]
    found: Anomalies | None

    def columns(self) -> dict[str, list[Any]]:
        """One value per example, in the order of the source: p-values where there are any, and the rank from 1."""
        rank = [0] * len(self.order)
        for place, index in enumerate(self.order, start=1):
            rank[index] = place
        if self.found is None:
            return {"rank": rank}
        f = self.found
        return {
            "p_value": f.p_value.tolist(),
            "typicality": f.typicality.tolist(),
            "rank": rank,
            "discovered": f.discovered.tolist(),
        }


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

    Arguments:
        seconds: what one example takes.
    """

    def tell(n: int) -> None:
        if n * seconds > LONG:
            complain(f"first {n} held-out examples are scored, in about {n * seconds:.0f} s; --held-out N takes fewer")

    order = scores.value.argsort(stable=True).tolist()
    if not held_out:
        return Ranked(order, None)
    if not (run / "config.yaml").is_file():
        complain(f"no p-values: {run} is a model without the data that it was trained on; give its run folder")
        return Ranked(order, None)
    trained = Run(run)
    try:
        reference = reference_scores(trained, model, settings, held_out, tell)
    except DivergedError:
        raise
    except TrilemmaError as error:
        complain(f"no p-values, for want of the run's held-out examples: {error}")
        return Ranked(order, None)
    if _is_own(trained, source):
        complain(
            f"{source} is what {run} was trained on: the model rates its training examples too high, so their p-values "
            "say little"
        )
    return Ranked(order, find_anomalies(reference, scores.value, alarm))


def _is_own(run: Run, source: str) -> bool:
    """Whether the examples are the run's own data, training examples among them."""
    path = Path(source).expanduser()
    return path.exists() and run.data["source"].get("source") == str(path.resolve())


def describe_scores(scores: Score, spec: DataSpec, ranked: Ranked) -> dict[str, Any]:
    """For JSON: the mean, how it was computed, one value per example, and the anomalies."""
    mean = scores.per_dim(spec).mean()
    se = None if mean.stderr is None else mean.stderr.item()
    result: dict[str, Any] = {
        "n": len(scores.value),
        "mean": mean.value.item(),
        "se": se,
        "unit": mean.unit,
        "kind": mean.kind,
    }
    result |= {"method": scores.method, "evaluations": scores.evaluations, "nats": scores.value.tolist()}
    found = ranked.found
    if found is not None:
        result["anomalies"] = {
            "held_out": found.held_out,
            "smallest_p_value": found.smallest,
            "level": found.level,
            "alarms": found.alarms,
            "expected_alarms": found.expected,
            "discoveries": int(found.discovered.sum()),
        }
    return result | ranked.columns()


def show_scores(scores: Score, spec: DataSpec, ranked: Ranked, names: list[str]) -> None:
    """For people: the mean, the most unusual examples, and what is to be thought of them."""
    n, found = len(names), ranked.found
    print(f"{n} examples: mean log-likelihood {scores.per_dim(spec).mean()}")
    if scores.method:
        print(f"by: {scores.method}, {scores.evaluations} evaluations of the network for each")
    columns = ["least likely", f"log-likelihood, nats ({scores.kind.replace('_', ' ')})"]
    columns += [] if found is None else ["p-value", "typicality"]
    rows = []
    for i in ranked.order[:SHOWN]:
        row = [names[i], f"{scores.value[i].item():.5g}"]
        if found is not None:
            mark = "*" if bool(found.discovered[i]) else ""
            row += [f"{found.p_value[i].item():.2g}{mark}", f"{found.typicality[i].item():.2g}"]
        rows.append(row)
    print_table(columns, rows)
    if found is None:
        return
    _show_anomalies(found, n)


def _show_anomalies(found: Anomalies, n: int) -> None:
    level, m, most = found.level, found.held_out, int(found.discovered.sum())
    print(
        f"p-values: among {m} held-out examples, not the training ones, which the model rates too high; "
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
