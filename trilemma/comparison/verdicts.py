"""What the numbers of a comparison say: who is better, who is on the front, what is wrong, what to use.

Every verdict comes from numbers with errors and says how sure it is. Two models are compared by the interval of
their difference, in which the held-out data that they share have cancelled; where it spans zero they are tied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy.special import stdtrit

from trilemma.comparison.report import Advice, Pair, format_cell
from trilemma.metrics import Estimate
from trilemma.metrics.catalogue import METRICS
from trilemma.metrics.evaluate import SECOND
from trilemma.metrics.memorization import PERMUTATIONS, NeighbourTest
from trilemma.metrics.uncertain import Uncertain, difference, simulate, skill

Numbers = Mapping[str, Mapping[str, Uncertain]]
"""By model, by metric."""

DECISIVE = ("overall", "clipped_density", "clipped_coverage", "frechet", "log_likelihood")
"""Metrics in which all models are compared pair by pair."""

DISTANCES = ("kernel_distance", "rbf_mmd")
"""Unbiased distances between distributions: no honest model is closer to held-out data, on average, than real data."""

CONTRADICTIONS = {
    "auc_nonlinear": "A classifier tells its samples from real data more surely than those of {rival} ({values}).",
    "frechet": "The means and covariances of {rival}'s samples are nearer to real data (Fréchet distance {values}).",
}
"""What to say where another model is significantly better than the best one in a metric that is lower for better."""

FALSE_ALARMS = 0.05
"""Chance of any memorization alarm in a comparison of models that do not copy."""

DRAWS = 4000
LOW, COLLAPSED = 1.0 / 3.0, 0.2


def skills(
    numbers: Mapping[str, Uncertain], floor: Mapping[str, Uncertain], ceiling: Mapping[str, Uncertain]
) -> dict[str, Uncertain]:
    """(floor - m) / (floor - ceiling) of every metric of quality and coverage that tells floor from ceiling."""
    useful = telling(floor, ceiling)
    return {name: skill(u, floor[name], ceiling[name]) for name, u in numbers.items() if useful.get(name)}


def telling(floor: Mapping[str, Uncertain], ceiling: Mapping[str, Uncertain]) -> dict[str, bool | None]:
    """For every metric of quality and coverage, whether independent dimensions are significantly worse than real data.

    Where they are not, the scale from floor to ceiling has no length: the metric is blind to what is wrong with
    independent dimensions (a Fréchet distance sees means and covariances only), or nothing is wrong with them. None
    where there is no error to judge by.
    """
    found: dict[str, bool | None] = {}
    for name, info in METRICS.items():
        if (
            info.axis in ("quality", "coverage", "both")
            and info.better != "neither"
            and name in floor
            and name in ceiling
        ):
            d = difference(ceiling[name], floor[name])
            low, high = _interval(d)
            found[name] = None if not d.sources else low > 0.0 if info.better == "higher" else high < 0.0
    return found


def _interval(u: Uncertain) -> tuple[float, float]:
    """The interval; the value itself where nothing varies, and everything where no error is known."""
    return u.interval() or ((u.value, u.value) if u.sources else (-math.inf, math.inf))


def compare_pairs(numbers: Numbers, kinds: Mapping[str, Estimate]) -> list[Pair]:
    """Every two models in every decisive metric.

    Arguments:
        kinds: the log-likelihoods of the models as estimates: bounds decide only in the direction that they prove.
    """
    pairs = []
    for metric in DECISIVE:
        models = [name for name, found in numbers.items() if metric in found]
        for a, b in combinations(models, 2):
            d = difference(numbers[a][metric], numbers[b][metric])
            better = _better(metric, a, b, d, kinds)
            unit = kinds[a].unit if metric == "log_likelihood" else METRICS[metric].unit
            pairs.append(Pair(metric=metric, a=a, b=b, difference=d.estimate(unit=unit), better=better))
    return pairs


def _better(metric: str, a: str, b: str, d: Uncertain, kinds: Mapping[str, Estimate]) -> str | None:
    """The better of two models whose difference is d, or None."""
    low, high = _interval(d)
    if math.isinf(d.value):  # one of them gives some held-out example density zero
        low = high = d.value
    if math.isnan(d.value) or low <= 0.0 <= high:
        return None
    higher = METRICS[metric].better == "higher"
    if metric == "log_likelihood":
        higher = kinds[a].higher_is_better
    winner, loser = (a, b) if (low > 0.0) == higher else (b, a)
    if metric == "log_likelihood":
        # The winner's true value may be worse than an upper bound on it says, the loser's better than a lower bound.
        flattering, modest = ("upper_bound", "lower_bound") if higher else ("lower_bound", "upper_bound")
        if kinds[winner].kind == flattering or kinds[loser].kind == modest:
            return None
    return winner


def tied_with(model: str, metric: str, pairs: Sequence[Pair]) -> list[str]:
    """The models that cannot be told from one in a metric."""
    return [
        p.b if p.a == model else p.a for p in pairs if p.metric == metric and model in (p.a, p.b) and p.better is None
    ]


def pareto(numbers: Numbers) -> dict[str, float]:
    """By model, the probability that no other is better in both quality and coverage."""
    axes_of = ("clipped_density", "clipped_coverage")
    models = [m for m, found in numbers.items() if all(name in found and found[name].sources for name in axes_of)]
    if not models:
        return {}
    quality, coverage = (simulate([numbers[m][name] for m in models], DRAWS, "pareto") for name in axes_of)
    worse = (quality[:, :, None] < quality[:, None]) & (coverage[:, :, None] < coverage[:, None])
    on_front = ~worse.any(2)
    return dict(zip(models, on_front.double().mean(0).tolist(), strict=True))


def disagreements(numbers: Numbers) -> list[str]:
    """Pairs that the two extractors rank in opposite order, each significantly."""
    found = []
    models = list(numbers)
    for metric in SECOND:
        second = f"{metric}_pca"
        able = [m for m in models if metric in numbers[m] and second in numbers[m]]
        for a, b in combinations(able, 2):
            winners = [
                _better(name, a, b, difference(numbers[a][name], numbers[b][name]), {}) for name in (metric, second)
            ]
            if None not in winners and winners[0] != winners[1]:
                found.append(
                    f"{METRICS[metric].title}: {winners[0]} beats {winners[1]}, but in principal components of "
                    f"the raw values {winners[1]} beats {winners[0]}: look at the samples of both."
                )
    return found


def alarms(
    numbers: Mapping[str, Uncertain], skill_of: Mapping[str, Uncertain], copying: Sequence[NeighbourTest], models: int
) -> list[str]:
    """What is wrong with a model, a sentence each.

    Arguments:
        copying: the tests on nearest neighbours of its seeds.
        models: how many are compared; the chance of a false memorization alarm is shared among them.
    """
    found = []
    level = FALSE_ALARMS / (2.0 * models)  # half for the test on neighbours, half for the distances
    worst = min(copying, key=lambda t: t.p_value)
    if worst.p_value < memorization_level(models, len(copying)):
        which = "" if worst.closest == 1.0 else f"the {worst.closest:.0%} of its samples that are closest to real data"
        found.append(
            f"Memorization: {worst.share_of_closest:.0%} of {which or 'its samples'} are nearest to training examples, "
            f"where {worst.expected:.0%} are expected (p = {worst.p_value:.2g})."
        )
    closer = [m for m in DISTANCES if m in skill_of and _significantly_above_one(skill_of[m], level / len(DISTANCES))]
    if closer:
        titles = ", ".join(METRICS[m].title for m in closer)
        found.append(
            f"Suspiciously close: nearer to held-out data than unseen real data are ({titles}). It may have seen them."
        )
    quality, coverage = numbers["clipped_density"], numbers["clipped_coverage"]
    classes = numbers.get("modes")
    if _below(numbers["spread"], COLLAPSED) or (_below(coverage, LOW) and _above(quality, 2.0 * LOW)):
        hit = "" if classes is None else f", {classes.value:.0f} classes hit"
        found.append(
            f"Collapsed: its samples are much alike (spread {numbers['spread'].value:.2f} of real data's, coverage "
            f"{coverage.value:.2f}{hit})."
        )
    elif _below(quality, LOW):
        found.append(f"Underfitted: few of its samples look like real data (quality {quality.value:.2f}).")
    return found


def memorization_level(models: int, seeds: int) -> float:
    """The p-value below which one test on nearest neighbours raises the alarm; but see how many permutations allow."""
    return max(FALSE_ALARMS / (2.0 * models * seeds), 2.0 / (PERMUTATIONS + 1))


def _below(u: Uncertain, limit: float) -> bool:
    """Whether a number with a known error is surely below a limit."""
    return bool(u.sources) and (u.interval() or (u.value, u.value))[1] < limit


def _above(u: Uncertain, limit: float) -> bool:
    return bool(u.sources) and (u.interval() or (u.value, u.value))[0] > limit


def _significantly_above_one(u: Uncertain, level: float) -> bool:
    if not u.sources or not math.isfinite(u.value) or not u.se > 0.0:
        return False
    return u.value - float(stdtrit(u.df, 1.0 - level)) * u.se > 1.0


@dataclass(frozen=True)
class Evidence:
    """What the recommendations are made from.

    Attributes:
        numbers: by model, with errors.
        metrics: by model, all estimates, costs too.
        abilities: by model.
        pairs: from `compare_pairs`.
        alarms: by model.
        floor: the numbers of independent dimensions.
        conditional: models of p(x | label), whose likelihoods are others than those of p(x).
        single: models that were trained only once.
    """

    numbers: Numbers
    metrics: Mapping[str, Mapping[str, Estimate]]
    abilities: Mapping[str, frozenset[str]]
    pairs: Sequence[Pair]
    alarms: Mapping[str, Sequence[str]]
    floor: Mapping[str, Uncertain]
    conditional: frozenset[str]
    single: frozenset[str]

    def value(self, model: str, metric: str) -> float:
        return self.numbers[model][metric].value

    def beats_floor(self, model: str) -> bool:
        """Whether it is significantly better than independent dimensions, overall."""
        if "overall" not in self.floor:
            return True
        return _interval(difference(self.numbers[model]["overall"], self.floor["overall"]))[0] > 0.0


def advise(e: Evidence) -> list[Advice]:
    """Which model for which purpose, with reasons and doubts."""
    ranked = sorted((m for m in e.numbers if "overall" in e.numbers[m]), key=lambda m: -e.value(m, "overall"))
    copies = [m for m in ranked if any(w.startswith("Memorization") for w in e.alarms.get(m, ()))]
    fair = [m for m in ranked if m not in copies]
    left_out = [f"{_names(copies)}: left out, because of copied training data."] if copies else []
    return [
        _best_samples(e, fair, left_out),
        _fastest(e, fair, left_out),
        _density(e, copies, left_out),
        _latent(e, fair, left_out),
    ]


def _general(e: Evidence, model: str) -> list[str]:
    """Doubts about any recommendation of a model."""
    doubts = list(e.alarms.get(model, ()))
    if not e.numbers[model]["overall"].sources:
        doubts.append("There are too few held-out examples for intervals: the order may be chance.")
    elif not e.beats_floor(model):
        doubts.append("It is not significantly better than independent dimensions (the floor).")
    if model in e.single:
        doubts.append("One training run: another seed could change the order (--seeds 3 tells).")
    return doubts


def _best_samples(e: Evidence, fair: Sequence[str], left_out: Sequence[str]) -> Advice:
    purpose = "best samples"
    if not fair:
        reason = "No model has samples that can be measured and are its own."
        return Advice(purpose=purpose, model=None, reasons=[reason], doubts=list(left_out))
    best = fair[0]
    reasons = [
        f"The best of quality and coverage together ({e.value(best, 'clipped_density'):.2f} and "
        f"{e.value(best, 'clipped_coverage'):.2f}, where real data have 1; Fréchet distance "
        f"{e.value(best, 'frechet'):.3g})."
    ]
    ties = [m for m in tied_with(best, "overall", e.pairs) if m in fair]
    doubts = [f"Tied with {_names(ties)}: the difference is within its error."] if ties else []
    for metric, complaint in CONTRADICTIONS.items():
        able = [m for m in fair if metric in e.numbers[m]]
        rival = min(able, key=lambda m, metric=metric: e.value(m, metric), default=best)  # type: ignore[misc]
        d = difference(e.numbers[rival][metric], e.numbers[best][metric]) if able else None
        if d is not None and _better(metric, rival, best, d, {}) == rival:
            values = f"{e.value(best, metric):.3g} against {e.value(rival, metric):.3g}"
            doubts.append(complaint.format(rival=rival, values=values))
    finer = max(fair, key=lambda m: e.value(m, "clipped_density"))
    if finer != best and finer not in tied_with(best, "clipped_density", e.pairs):
        doubts.append(f"Single samples of {finer} look better (quality {e.value(finer, 'clipped_density'):.2f}).")
    return Advice(purpose=purpose, model=best, reasons=reasons, doubts=[*doubts, *_general(e, best), *left_out])


def _fastest(e: Evidence, fair: Sequence[str], left_out: Sequence[str]) -> Advice:
    """The fastest of those that are overall at least half as good as the best."""
    purpose = "fastest"
    best = max((e.value(m, "overall") for m in fair), default=0.0)
    able = [
        m for m in fair if "samples_per_second" in e.metrics[m] and e.value(m, "overall") >= 0.5 * best and best > 0.0
    ]
    if not able:
        reason = "No model with usable samples was timed."
        return Advice(purpose=purpose, model=None, reasons=[reason], doubts=list(left_out))
    fastest = max(able, key=lambda m: e.metrics[m]["samples_per_second"].value)
    rate, latency = (format_cell(key, e.metrics[fastest][key]) for key in ("samples_per_second", "latency"))
    reasons = [
        f"{rate} samples per second and {latency} for one, at an overall quality of {e.value(fastest, 'overall'):.2f}, "
        f"at least half of the best model's ({best:.2f})."
    ]
    doubts = ["Speed is that of the machine that it was measured on.", *_general(e, fastest), *left_out]
    return Advice(purpose=purpose, model=fastest, reasons=reasons, doubts=doubts)


def _density(e: Evidence, copies: Sequence[str], left_out: Sequence[str]) -> Advice:
    purpose = "density and anomaly detection"
    able = [
        m
        for m, found in e.metrics.items()
        if "log_likelihood" in found and math.isfinite(found["log_likelihood"].value) and m not in copies
    ]
    able = [m for m in able if m not in e.conditional] or able
    if not able:
        reason = "No model here has a likelihood that is finite on all held-out examples."
        return Advice(purpose=purpose, model=None, reasons=[reason], doubts=list(left_out))
    higher = e.metrics[able[0]]["log_likelihood"].higher_is_better
    best = (max if higher else min)(able, key=lambda m: e.metrics[m]["log_likelihood"].value)
    found = e.metrics[best]["log_likelihood"]
    words = {
        "exact": "exact",
        "lower_bound": "a lower bound",
        "upper_bound": "an upper bound",
        "estimate": "an estimate",
    }
    reasons = [f"The best likelihood of held-out data: {found.value:.4g} {found.unit}, {words[found.kind]}."]
    doubts = []
    ties = [m for m in tied_with(best, "log_likelihood", e.pairs) if m in able]
    if ties:
        unproved = "the difference is within its error, or bounds leave it open"
        doubts.append(f"Not proved better than {_names(ties)}: {unproved}.")
    floor = e.floor.get("log_likelihood")
    if floor is not None and (found.value <= floor.value) == higher:
        doubts.append("Independent dimensions (the floor) have a likelihood as good.")
    if found.kind in ("lower_bound", "upper_bound"):
        doubts.append("Its number is a bound; the likelihood of a single example can be off by an unknown amount.")
    if found.kind == "estimate":
        doubts.append("Its number is an estimate with its own error.")
    if e.conditional & e.metrics.keys():
        others = _names(sorted(e.conditional & e.metrics.keys()))
        doubts.append(f"The likelihood of {others} is that of data given their label, which is another number.")
    return Advice(purpose=purpose, model=best, reasons=reasons, doubts=[*doubts, *left_out])


def _latent(e: Evidence, fair: Sequence[str], left_out: Sequence[str]) -> Advice:
    purpose = "latent editing"
    able = [m for m in fair if {"encode", "decode"} <= e.abilities[m]]
    if not able:
        reason = "No model here both encodes examples and decodes codes."
        return Advice(purpose=purpose, model=None, reasons=[reason], doubts=list(left_out))
    best = able[0]
    only = "the only one here that does" if len(able) == 1 else f"its samples are the best of the {len(able)} that do"
    reasons = [f"It encodes and decodes: {only}."]
    if "path_length" in e.metrics[best]:
        reasons.append(
            f"Features move by {e.metrics[best]['path_length'].value:.3g} (squared) per unit of latent path."
        )
    ties = [m for m in tied_with(best, "overall", e.pairs) if m in able]
    doubts = [f"Tied with {_names(ties)}."] if ties else []
    if len(able) > 1:
        doubts.append("A flow's code is as large as the data and exact; an autoencoder's is small and loses detail.")
    return Advice(purpose=purpose, model=best, reasons=reasons, doubts=[*doubts, *_general(e, best), *left_out])


def _names(models: Sequence[str]) -> str:
    return models[0] if len(models) == 1 else f"{', '.join(models[:-1])} and {models[-1]}"
