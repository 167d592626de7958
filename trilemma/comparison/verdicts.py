"""What the numbers of a comparison say: who is better, who is on the front, what is wrong, what to use.

Every verdict comes from numbers with errors and says how sure it is. Two models are compared by the interval of
their difference, in which the held-out data that they share have cancelled; where it spans zero they are tied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy.special import stdtrit

from trilemma.comparison.report import Advice, Pair, format_cell
from trilemma.metrics import Estimate
from trilemma.metrics.catalogue import METRICS
from trilemma.metrics.evaluate import SECOND
from trilemma.metrics.memorization import NeighbourTest
from trilemma.metrics.uncertain import Uncertain, difference, simulate, skill

Numbers = Mapping[str, Mapping[str, Uncertain]]
"""By model, by metric."""

DECISIVE = ("overall", "clipped_density", "clipped_coverage", "frechet", "log_likelihood")
"""Metrics in which all models are compared pair by pair."""

DISTANCES = ("frechet", "kernel_distance", "rbf_mmd", "sliced_wasserstein")
"""Distances between distributions: only copies of the training data can be closer than real data are."""

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


def telling(floor: Mapping[str, Uncertain], ceiling: Mapping[str, Uncertain]) -> dict[str, bool]:
    """For every metric of quality and coverage, whether independent dimensions are significantly worse than real data.

    Where they are not (a Fréchet distance sees no more than means and covariances) the metric is blind here: the scale
    from floor to ceiling has no length.
    """
    found = {}
    for name, info in METRICS.items():
        if (
            info.axis in ("quality", "coverage", "both")
            and info.better != "neither"
            and name in floor
            and name in ceiling
        ):
            interval = difference(ceiling[name], floor[name]).interval()
            low, high = interval or (0.0, 0.0)
            found[name] = low > 0.0 if info.better == "higher" else high < 0.0
    return found


def compare_pairs(numbers: Numbers, kinds: Mapping[str, Estimate]) -> list[Pair]:
    """Every two models in every decisive metric.

    Arguments:
        kinds: the log-likelihoods of the models as estimates: bounds decide only in the direction that they prove.
    """
    pairs = []
    for metric in DECISIVE:
        models = [name for name, found in numbers.items() if metric in found]
        for position, a in enumerate(models):
            for b in models[position + 1 :]:
                d = difference(numbers[a][metric], numbers[b][metric])
                better = _better(metric, a, b, d, kinds)
                unit = kinds[a].unit if metric == "log_likelihood" else METRICS[metric].unit
                pairs.append(Pair(metric=metric, a=a, b=b, difference=d.estimate(unit=unit), better=better))
    return pairs


def _better(metric: str, a: str, b: str, d: Uncertain, kinds: Mapping[str, Estimate]) -> str | None:
    interval = d.interval()
    if interval is None or interval[0] <= 0.0 <= interval[1]:
        return None
    higher = METRICS[metric].better == "higher"
    if metric == "log_likelihood":
        higher = kinds[a].higher_is_better
    winner, loser = (a, b) if (interval[0] > 0.0) == higher else (b, a)
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
    models = [m for m, found in numbers.items() if {"clipped_density", "clipped_coverage"} <= found.keys()]
    if not models:
        return {}
    axes = [
        simulate([numbers[m][name] for m in models], DRAWS, "pareto")
        for name in ("clipped_density", "clipped_coverage")
    ]
    quality, coverage = axes
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
        for position, a in enumerate(able):
            for b in able[position + 1 :]:
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
    if worst.p_value < level / len(copying):
        which = "" if worst.closest == 1.0 else f"the {worst.closest:.0%} of its samples that are closest to real data"
        found.append(
            f"Memorization: {worst.share_of_closest:.0%} of {which or 'its samples'} are nearest to training examples, "
            f"where 50% is expected (p = {worst.p_value:.2g})."
        )
    closer = [m for m in DISTANCES if m in skill_of and _significantly_above_one(skill_of[m], level / len(DISTANCES))]
    if closer:
        titles = ", ".join(METRICS[m].title for m in closer)
        found.append(f"Memorization suspected: closer to held-out data than unseen real data are ({titles}).")
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


def _below(u: Uncertain, limit: float) -> bool:
    interval = u.interval() or (u.value, u.value)
    return interval[1] < limit


def _above(u: Uncertain, limit: float) -> bool:
    interval = u.interval() or (u.value, u.value)
    return interval[0] > limit


def _significantly_above_one(u: Uncertain, level: float) -> bool:
    if not u.sources or not math.isfinite(u.value) or not u.se > 0.0:
        return False
    return u.value - float(stdtrit(u.df, 1.0 - level)) * u.se > 1.0


def advise(
    numbers: Numbers,
    metrics: Mapping[str, Mapping[str, Estimate]],
    abilities: Mapping[str, frozenset[str]],
    pairs: Sequence[Pair],
    warnings: Mapping[str, Sequence[str]],
    seeds: int,
) -> list[Advice]:
    """Which model for which purpose, with reasons and doubts.

    Arguments:
        metrics: by model, all estimates, costs too.
        warnings: by model, its alarms.
    """
    ranked = sorted((m for m in numbers if "overall" in numbers[m]), key=lambda m: -numbers[m]["overall"].value)
    copies = {m for m in ranked if any(w.startswith("Memorization") for w in warnings.get(m, ()))}
    fair = [m for m in ranked if m not in copies]
    general = [] if seeds > 1 else ["One training run each: another seed could change the order (--seeds 3 tells)."]
    general += [f"{m} is left out: it seems to copy training data." for m in sorted(copies)]
    return [
        _best_samples(fair, numbers, pairs, warnings, general),
        _fastest(fair, numbers, metrics, general),
        _density(metrics, abilities, pairs),
        _latent(fair, numbers, metrics, abilities, pairs),
    ]


def _best_samples(
    fair: Sequence[str],
    numbers: Numbers,
    pairs: Sequence[Pair],
    warnings: Mapping[str, Sequence[str]],
    general: Sequence[str],
) -> Advice:
    purpose = "best samples"
    if not fair:
        return Advice(purpose=purpose, model=None, reasons=["No model has samples that can be measured."], doubts=[])
    best = fair[0]
    n = numbers[best]
    reasons = [
        f"The best of quality and coverage together ({n['clipped_density'].value:.2f} and "
        f"{n['clipped_coverage'].value:.2f}, where real data have 1; Fréchet distance {n['frechet'].value:.3g})."
    ]
    ties = tied_with(best, "overall", pairs)
    doubts = [f"Tied with {_names(ties)}: the difference is within its error."] if ties else []
    for metric, complaint in CONTRADICTIONS.items():
        rival = min(fair, key=lambda m, metric=metric: numbers[m][metric].value)  # type: ignore[misc]
        if _better(metric, rival, best, difference(numbers[rival][metric], numbers[best][metric]), {}) == rival:
            values = f"{numbers[best][metric].value:.3g} against {numbers[rival][metric].value:.3g}"
            doubts.append(complaint.format(rival=rival, values=values))
    finer = max(fair, key=lambda m: numbers[m]["clipped_density"].value)
    if finer != best and finer not in tied_with(best, "clipped_density", pairs):
        doubts.append(f"Single samples of {finer} look better (quality {numbers[finer]['clipped_density'].value:.2f}).")
    return Advice(purpose=purpose, model=best, reasons=reasons, doubts=[*doubts, *warnings.get(best, ()), *general])


def _fastest(
    fair: Sequence[str], numbers: Numbers, metrics: Mapping[str, Mapping[str, Estimate]], general: Sequence[str]
) -> Advice:
    """The fastest of those that are overall at least half as good as the best."""
    purpose = "fastest"

    def worth(m: str) -> float:
        return numbers[m]["overall"].value

    best = max((worth(m) for m in fair), default=0.0)
    able = [m for m in fair if "samples_per_second" in metrics[m] and worth(m) >= 0.5 * best and worth(m) > 0.0]
    if not able:
        return Advice(purpose=purpose, model=None, reasons=["No model with usable samples was timed."], doubts=[])
    fastest = max(able, key=lambda m: metrics[m]["samples_per_second"].value)
    rate, latency = (format_cell(key, metrics[fastest][key]) for key in ("samples_per_second", "latency"))
    reasons = [
        f"{rate} samples per second and {latency} for one, at an overall quality of {worth(fastest):.2f}, at least "
        f"half of the best model's ({best:.2f})."
    ]
    return Advice(purpose=purpose, model=fastest, reasons=reasons, doubts=["Speed is that of this machine."])


def _density(
    metrics: Mapping[str, Mapping[str, Estimate]], abilities: Mapping[str, frozenset[str]], pairs: Sequence[Pair]
) -> Advice:
    purpose = "density and anomaly detection"
    able = [m for m in metrics if "log_likelihood" in metrics[m] and math.isfinite(metrics[m]["log_likelihood"].value)]
    if not able:
        return Advice(purpose=purpose, model=None, reasons=["No model here has a likelihood."], doubts=[])
    higher = metrics[able[0]]["log_likelihood"].higher_is_better
    best = (max if higher else min)(able, key=lambda m: metrics[m]["log_likelihood"].value)
    e = metrics[best]["log_likelihood"]
    words = {
        "exact": "exact",
        "lower_bound": "a lower bound",
        "upper_bound": "an upper bound",
        "estimate": "an estimate",
    }
    reasons = [f"The best likelihood of held-out data: {e.value:.4g} {e.unit}, {words[e.kind]}."]
    doubts = []
    ties = tied_with(best, "log_likelihood", pairs)
    if ties:
        doubts.append(
            f"Not proved better than {_names(ties)}: the difference is within its error, or bounds leave it open."
        )
    if e.kind in ("lower_bound", "upper_bound"):
        doubts.append("Its number is a bound; the likelihood of a single example can be off by an unknown amount.")
    if e.kind == "estimate":
        doubts.append("Its number is an estimate with its own error.")
    return Advice(purpose=purpose, model=best, reasons=reasons, doubts=doubts)


def _latent(
    fair: Sequence[str],
    numbers: Numbers,
    metrics: Mapping[str, Mapping[str, Estimate]],
    abilities: Mapping[str, frozenset[str]],
    pairs: Sequence[Pair],
) -> Advice:
    purpose = "latent editing"
    able = [m for m in fair if {"encode", "decode"} <= abilities[m]]
    if not able:
        why = "No model here both encodes examples and decodes codes."
        return Advice(purpose=purpose, model=None, reasons=[why], doubts=[])
    best = able[0]
    reasons = [f"It encodes and decodes, and its samples are the best of the {len(able)} that do."]
    if "path_length" in metrics[best]:
        reasons.append(f"Features move by {metrics[best]['path_length'].value:.3g} (squared) per unit of latent path.")
    ties = [m for m in tied_with(best, "overall", pairs) if m in able]
    doubts = [f"Tied with {_names(ties)}."] if ties else []
    if len(able) > 1:
        doubts.append("A flow's code is as large as the data and exact; an autoencoder's is small and loses detail.")
    return Advice(purpose=purpose, model=best, reasons=reasons, doubts=doubts)


def _names(models: Sequence[str]) -> str:
    return models[0] if len(models) == 1 else f"{', '.join(models[:-1])} and {models[-1]}"
