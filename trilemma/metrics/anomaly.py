r"""How unusual examples are, by their log-likelihood against that of held-out examples.

Let s_1, .., s_n be the log-likelihoods of held-out examples and s that of a new one. If all n + 1 are exchangeable,
the rank of s among them is uniform, and so
    p = (1 + #{i: s_i <= s}) / (1 + n)        satisfies    P(p <= a) <= a
whatever the model: a conformal p-value (Laxhammar & Falkman 2010, doi:10.1145/1833280.1833281; Bates, Candes, Lei,
Romano & Sesia 2023, arXiv:2104.08279). Training examples would not do: a model rates what it has seen too high.
The p-values of many new examples share the s_i, and are positively dependent such that the procedure of Benjamini &
Hochberg (1995) still controls the false discovery rate (Bates et al., theorem 2).

A high likelihood can be unusual as well: a constant picture may be likelier than all real ones (Nalisnick et al. 2019,
arXiv:1810.09136). What is typical has a log-likelihood close to minus the entropy (Nalisnick et al. 2019,
arXiv:1906.02994). Hence the two-sided p-value of the distance d_i = |s_i - m| to the median m of all n + 1,
    p = (1 + #{i: d_i >= d}) / (1 + n).
The median includes s: only then are the distances exchangeable, and p valid, as the scores are.

Equal numbers count as equal: levels and p-values are fractions, and k level / N is compared with a relative slack of
1e-12, far more than rounding and far less than a step of 1 / (1 + n).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilemma.core.errors import CheckpointError, DivergedError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.noise import draw_seed, hash_key
from trilemma.core.spec import Batch, Split
from trilemma.core.storage import replace_file, to_json
from trilemma.data.dataset import Dataset
from trilemma.engine import Run
from trilemma.engine.run import read_json

FILE = "reference_scores.json"

SLACK = 1e-12
"""Relative error that rounding is allowed."""


def conformal_p_values(held_out: Tensor, scores: Tensor) -> Tensor:
    """(1 + #{held_out <= s}) / (1 + n) for each s of `scores` (N,), float64; small where s is unusually low."""
    ordered = _ordered(held_out, scores)
    below = torch.searchsorted(ordered, scores.double(), right=True)
    return (1.0 + below.double()) / (1.0 + len(ordered))


def typicality_p_values(held_out: Tensor, scores: Tensor) -> Tensor:
    """(1 + #{d_i >= d}) / (1 + n) for the distances to the median of all; small where s is unusually low or high."""
    ordered, s = _ordered(held_out, scores), scores.double()
    n = len(ordered)
    k = n // 2  # the place of the (lower) median among n + 1
    below = ordered[k - 1] if k else ordered.new_tensor(-torch.inf)
    median = s.clamp(below, ordered[k])
    # Of the interval around the median, the end where s is must be s to the last digit, so that ties count.
    low = torch.where(s <= median, s, 2.0 * median - s)
    high = torch.where(s >= median, s, 2.0 * median - s)
    beyond = torch.searchsorted(ordered, low, right=True) + n - torch.searchsorted(ordered, high)
    return (1.0 + torch.where(low < high, beyond, n).double()) / (1.0 + n)


def benjamini_hochberg(p: Tensor, level: float) -> Tensor:
    """Which of the p-values (N,) are discoveries (bool) at this false discovery rate: all up to the largest
    p_(k) <= k level / N."""
    ordered = p.sort().values
    passed = ordered * len(p) <= level * torch.arange(1, len(p) + 1, dtype=torch.float64) * (1.0 + SLACK)
    return p <= (ordered[passed][-1] if bool(passed.any()) else -1.0)


@dataclass(frozen=True)
class Anomalies:
    """What the scores of N new examples say beside those of n held-out ones.

    Attributes:
        p_value, typicality: (N,), see the module.
        discovered: (N,) bool, what remains of low p-values after Benjamini & Hochberg.
        level: of the alarm, and the false discovery rate.
        held_out: n.
    """

    p_value: Tensor
    typicality: Tensor
    discovered: Tensor
    level: float
    held_out: int

    @property
    def smallest(self) -> float:
        """The smallest p-value that n held-out examples allow."""
        return 1.0 / (1.0 + self.held_out)

    @property
    def needed(self) -> int:
        """How many examples must have the smallest p-value for Benjamini & Hochberg to make a discovery of them."""
        n = len(self.p_value)
        return math.ceil(n * self.smallest / self.level * (1.0 - SLACK)) if self.level else n + 1

    @property
    def alarms(self) -> int:
        """How many p-values are at most the level."""
        return int((self.p_value <= self.level).sum())

    @property
    def expected(self) -> float:
        """How many alarms there are on average if the new examples are like the held-out ones."""
        possible = torch.arange(1, self.held_out + 2, dtype=torch.float64) / (1.0 + self.held_out)
        return len(self.p_value) * int((possible <= self.level).sum()) * self.smallest


def find_anomalies(held_out: Tensor, scores: Tensor, level: float) -> Anomalies:
    """Rank log-likelihoods (N,) among those of held-out examples (n,), from the same model and settings.

    Raises:
        DivergedError: a log-likelihood is NaN.
        UsageError: there is no held-out example.
    """
    p = conformal_p_values(held_out, scores)
    return Anomalies(p, typicality_p_values(held_out, scores), benjamini_hochberg(p, level), level, len(held_out))


def _ordered(held_out: Tensor, scores: Tensor) -> Tensor:
    if not len(held_out):
        raise UsageError("there are no held-out examples to rank among: give at least one")
    for values, what in ((held_out, "held-out"), (scores, "new")):
        bad = int(values.isnan().sum())
        if bad:
            raise DivergedError(f"the log-likelihood of {bad} {what} example(s) is NaN, so they have no rank")
    return held_out.double().sort().values


@dataclass(frozen=True)
class _First:
    """The first n examples of a split, which stays where it is."""

    split: Split
    n: int

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: Tensor) -> Batch:
        return self.split.batch(indices)

    def head(self, n: int) -> Batch:
        return self.split.head(min(n, self.n))


@dataclass(frozen=True)
class Reference:
    """Held-out log-likelihoods.

    Attributes:
        nats: (n,) float64, those of the test split first.
        validation: how many of them are validation examples.
    """

    nats: Tensor
    validation: int


def reference_scores(
    run: Run,
    model: GenerativeModel,
    settings: Mapping[str, Any],
    enough: int,
    limit: int = 5000,
    tell: Callable[[int], None] | None = None,
) -> Reference:
    """The log-likelihoods in nats of the run's held-out examples under its model.

    Those of the test split; and where it has not `enough`, the validation split's too, which may have chosen the
    checkpoint. Both stand in a random order, so the first `limit` of them are a random choice. They are kept in
    RUN/reference_scores.json. The noise of bounds and estimates is independent of that of the new examples.

    Arguments:
        settings: of `GenerativeModel.log_prob`, the same as for the new examples.
        enough: ceil(1 / level) lets the smallest p-value reach the level.
        tell: called with n before so many examples are scored, where none are kept.

    Raises:
        UsageError: the run's data were in memory, are gone, have changed since, or nothing of them was held out.
        DataError: they cannot be loaded.
    """
    same = {
        "weights": hash_weights(model),
        "data": run.data["fingerprint"],
        "settings": json.dumps(dict(settings), sort_keys=True, default=str),
    }
    path = run.path / FILE
    entries = _read_entries(path)
    data: Dataset | None = None
    found: dict[str, list[float]] = {"test": [], "validation": []}
    for name in found:
        left = limit - len(found["test"])
        if not left or len(found["test"]) >= enough:
            break
        key = same | {"split": name, "limit": left}
        nats = next((e["nats"] for e in entries if e["key"] == key), None)
        if nats is None:
            data = _load_same(run) if data is None else data
            nats = _score_first(model, data.splits[name], left, name, settings, tell)
            entries = [e for e in entries if all(e["key"].get(k) == same[k] for k in ("weights", "data"))]
            entries.append({"key": key, "nats": nats})
            replace_file(path, to_json({"entries": entries}))
        found[name] = nats
    values = torch.tensor(found["test"] + found["validation"], dtype=torch.float64)
    if not len(values):
        raise UsageError(f"the data of {run.path} have neither test nor validation examples")
    return Reference(values, len(found["validation"]))


def _load_same(run: Run) -> Dataset:
    data = run.load_data()
    if data.fingerprint != run.data["fingerprint"]:
        raise UsageError(f"the data of {run.path} have changed since it was trained")
    return data


def _score_first(
    model: GenerativeModel,
    split: Split,
    limit: int,
    name: str,
    settings: Mapping[str, Any],
    tell: Callable[[int], None] | None,
) -> list[float]:
    """The log-likelihoods of the first examples of a split, at most `limit`."""
    n = min(limit, len(split))
    if not n:
        return []
    if tell is not None:
        tell(n)
    seed = hash_key(draw_seed(settings.get("generator", 0)), "held-out", name)
    values: list[float] = model.log_prob(_First(split, n), **{**settings, "generator": seed}).value.tolist()
    return values


def _read_entries(path: Any) -> list[dict[str, Any]]:
    try:
        entries = read_json(path)["entries"] if path.exists() else []
        return [{"key": dict(e["key"]), "nats": [float(v) for v in e["nats"]]} for e in entries]
    except (CheckpointError, KeyError, TypeError, ValueError):
        return []  # what cannot be read is computed again


def hash_weights(model: GenerativeModel) -> str:
    """A hash of every parameter and buffer."""
    h = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
