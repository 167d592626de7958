"""What the diagnostics of an adversarial game mean, in words: what is wrong, how one knows, and what to do.

Most figures are of the weights as they are, not of their average: they are the players of the game. Towards the end of
a budget, where rates are small, both make the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilemma.adversarial.diagnostics import PROBE_STEPS
from trilemma.adversarial.modes import chance_turnover, covered, labelled, turnover

if TYPE_CHECKING:
    from trilemma.adversarial.model import GAN

VANISHING = 1 / 3
"""Least ratio of the gradients: D then gives samples odds of one to three; at an equilibrium it is 1."""
AMONG = 0.6
"""Least precision over that of as many training examples."""
FEW = 60
"""Of fewer samples spread and recall say nothing: a faultless generator would be blamed in 1 to 30% of cases."""
ALIKE = 0.5
"""Least mean distance of samples over that of the data; samples of half the width of the data have no more."""
REACH = 0.1
"""Least recall over that of as many training examples."""
OVERFIT = 0.15
"""Largest difference of the accuracies on training and held-out examples; without overfitting there is none."""
ERRORS = 4.0
"""Standard errors that a difference needs besides: chance alone does that once in 30,000 times."""
UNFINISHED = 0.25
"""Largest gain of D's best response over the loss of a D that takes no side. Players that circle closely about an
equilibrium can gain a tenth, as the probe starts anew at the full learning rate."""
MOVING = 0.2
"""Largest turnover between measurements; twice what is expected by chance where that is more."""


def advise(model: GAN, history: Sequence[Mapping[str, float]]) -> list[str]:
    """What is wrong with the game, a sentence each with its figures, its meaning and a remedy; nothing if all is well.

    Arguments:
        history: what `measure` found, in order, the last one with `final`.
    """
    if not history:
        return []
    last, found = history[-1], []
    found += _vanishing(model, history)
    found += _off_the_data(model, last) or _collapse(model, last)
    overfitting = _overfitting(model, last)
    found += overfitting or _best_response(model, last)
    return found + _oscillation(model, history)


def _vanishing(model: GAN, history: Sequence[Mapping[str, float]]) -> list[str]:
    if model.config.loss != "minimax":
        return []
    norms = [(r["gradient_saturating"], r["gradient_non_saturating"]) for r in _late(history)]
    ratio = median(saturating / other if other else 1.0 for saturating, other in norms)
    if not ratio < VANISHING:
        return []
    return [
        f"Vanishing gradient: the generator's gradient is {ratio:.2g} of what the non-saturating loss would give. The "
        "discriminator rejects the samples, and there the minimax loss is flat, so that the generator hardly learns. "
        "Use ns-gan or r3gan."
    ]


def _off_the_data(model: GAN, last: Mapping[str, float]) -> list[str]:
    if last["precision"] >= AMONG * last["precision_data"]:
        return []
    return [
        f"Off the data: {last['precision']:.0%} of the samples lie among the training examples, where "
        f"{last['precision_data']:.0%} of other examples do. The rest is between the modes, or has not come near the "
        f"data. Train longer. {_remedy(model)}"
    ]


def _collapse(model: GAN, last: Mapping[str, float]) -> list[str]:
    share, of_data = (_histogram(last, name) for name in ("histogram", "histogram_data"))
    hit, telling = covered(share, of_data, round(last["samples"]))
    condition, missing = model.spec.condition, (telling & ~hit).nonzero().flatten().tolist()
    if missing:
        named = condition is not None and labelled(condition)
        names = [condition.names[k] for k in missing[:8]] if named and condition is not None else []
        which = f" (without the classes {', '.join(names)})" if names else ""
        modes = "modes of the data" if named else "regions of the data, found by k-means"
        what = f"samples fall into {int(hit.sum())} of {int(telling.sum())} {modes}{which}"
    elif last["samples"] < FEW:
        return []
    elif last["spread"] < ALIKE:
        what = f"samples are much alike, at {last['spread']:.2f} of the mean distance between examples"
    elif last["recall"] < REACH * last["recall_data"]:
        what = (
            f"samples look real, but reach only {last['recall']:.0%} of the data, where as many training examples "
            f"reach {last['recall_data']:.0%}: they are much alike within their modes"
        )
    else:
        return []
    return [f"Mode collapse: {what}. The generator repeats what the discriminator lets pass. {_remedy(model)}"]


def _overfitting(model: GAN, last: Mapping[str, float]) -> list[str]:
    train, held = last["accuracy_real_train"], last["accuracy_real_validation"]
    counts = last["samples"], last["validation_examples"]
    # Binomial variances with two examples added, one on either side, so that shares of 0 and 1 have an error, too.
    shrunk = [(a * n + 1.0) / (n + 2.0) for a, n in zip((train, held), counts, strict=True)]
    error = sum(a * (1.0 - a) / (n + 2.0) for a, n in zip(shrunk, counts, strict=True)) ** 0.5
    if not train - held > max(OVERFIT, ERRORS * error):
        return []
    more = "" if model.config.augment == "adaptive" else " or augment=adaptive"
    return [
        f"Overfitting: the discriminator is right about {train:.0%} of the training examples, but {held:.0%} of "
        "held-out ones. It knows its examples by heart, and what it tells the generator is no longer about the data. "
        f"Give more data{more}, or train for a shorter time."
    ]


def _best_response(model: GAN, last: Mapping[str, float]) -> list[str]:
    if "best_response_d" not in last:
        return []
    gain, error = last["best_response_d"], last["best_response_d_error"]
    undecided = torch.full((1,), model.loss.undecided or 0.0)
    scale = model.loss.d(undecided, undecided).item()  # 0 for Wasserstein critics, whose scale is arbitrary
    if not (scale and gain > max(UNFINISHED * scale, ERRORS * error)):
        return []
    return [
        f"Not at an equilibrium: in at most {PROBE_STEPS} steps against the frozen generator the discriminator could "
        f"lower its loss by {gain:.2g}, where taking no side costs {scale:.2g}. It could still find faults in samples "
        "that the generator was never told of. Train longer, or give the discriminator more steps (turns_d)."
    ]


def _oscillation(model: GAN, history: Sequence[Mapping[str, float]]) -> list[str]:
    late = _late(history)
    if len(late) < 4:
        return []
    histograms = [_histogram(r, "histogram") for r in late]
    moves = [turnover(a, b) for a, b in pairwise(histograms)]
    chance = chance_turnover(torch.stack(histograms).mean(0), round(min(r["samples"] for r in late)))
    # A generator on its way to somewhere moves as well, but not back and forth.
    there_and_back = sum(moves) > 1.5 * turnover(histograms[0], histograms[-1])
    limit = max(MOVING, 2.0 * chance)
    if not (median(moves) > limit and moves[-1] > limit and there_and_back):
        return []
    return [
        f"Oscillation: between measurements {median(moves):.0%} of the samples move from one mode to another and back, "
        f"where {chance:.0%} are chance. The players circle about an equilibrium instead of approaching it. "
        f"{_remedy(model)}"
    ]


def _remedy(model: GAN) -> str:
    c = model.config
    if c.loss == "relativistic" and c.r1 and c.r2:
        return "Raise r1 and r2, or lower the learning rates."
    penalties = "" if model.d.mixes and c.architecture == "dcgan" else ", add r1 and r2"
    return f"Use r3gan{penalties}, or lower the learning rates."


def _late(history: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The second half, from the middle on."""
    return history[(len(history) - 1) // 2 :]


def _histogram(record: Mapping[str, float], name: str) -> Tensor:
    count = sum(key.startswith(f"{name}/") for key in record)
    return torch.tensor([record[f"{name}/{k}"] for k in range(count)], dtype=torch.float64)
