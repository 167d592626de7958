r"""What goes wrong in an adversarial game, measured and in words: modes, gradients, overfitting, best responses.

Samples and data are compared in model space, flattened (`modes`). Of a conditional model the energy distance is that of
the joint (x, e(c)): a class is a unit vector, an attribute vector standardized, scaled such that conditions are as far
apart as examples on average. Samples take their conditions from the examples; pairs made of one and the same condition
are left out, because they are not independent.

Gradients (Goodfellow et al. 2014, arXiv:1406.2661): where D is t on all samples, the minimax loss gives the generator
sigma(t) / sigma(-t) = exp(t) times the gradient of the non-saturating one, almost none where D is sure of itself.

Overfitting (Karras et al. 2020, arXiv:2006.06676): r_v = (E D(train) - E D(validation)) / (E D(train) - E D(samples)).

Best responses (as in the duality gap, Grnarova et al. 2019, arXiv:1811.05512): what a player gains, in units of its
loss, by 50 steps against the frozen other. At a Nash equilibrium neither gains anything.

D is measured in evaluation mode, without augmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from trilemma.adversarial.losses import LOSSES
from trilemma.adversarial.modes import (
    CELLS,
    covered,
    energy_distance,
    find_modes,
    labelled,
    mean_distance,
    neighbour_scores,
)
from trilemma.core.model import Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, ConditionSpec, Split

if TYPE_CHECKING:
    from trilemma.adversarial.model import GAN

SAMPLES = 1024
"""At most so many samples and examples are measured."""
BATCH = 64
"""At most so many examples are in a step of the probe, and in the batch on which gradients are taken."""
PROBE_STEPS = 50
"""At most so many, and at most a tenth of those of training."""
LEAST_STEPS = 100
"""Training that was shorter is not probed."""


# -- what is measured of a model -----------------------------------------------------------------------------


def held_out_distance(model: GAN, validation: Split, noise: Noise) -> float:
    """Energy distance of samples from up to 1024 validation examples, at most four samples each; fewer large ones.

    Of unconditional models in the unit of model space, of conditional ones with the distance of conditions.
    """
    n = affordable(model, 4)
    y, c, _ = examples(model, validation.head(n))
    n = min(n, 4 * len(y))
    if c is None:
        return energy_distance(flat(sample(model, n, None, noise)), flat(y))
    assert model.condition is not None
    owner = torch.arange(n) % len(y)
    x, y, e = flat(sample(model, n, c[owner.to(c.device)], noise)), flat(y), _coordinates(c, model.condition)
    apart = mean_distance(e)
    e = e * (mean_distance(y) / apart if apart else 1.0)
    return energy_distance(torch.cat([x, e[owner]], 1), torch.cat([y, e], 1), owner)


def measure(model: GAN, train: Split, validation: Split, noise: Noise, *, step: int, final: bool) -> dict[str, float]:
    """Numbers that say how the game stands, of up to 1024 samples (fewer where they are large).

    samples, validation_examples: how many were measured; as many training examples as samples.
    accuracy_real_train, accuracy_real_validation, accuracy_fake: share in [0, 1] of examples on the right side of D;
        where only differences of D mean something, of pairs of an example and a sample, and the third is the first.
    overfitting: r_v, at most about 1; 0 is none. It means nothing where D(train) and D(samples) are equal on average.
    gradient_saturating, gradient_non_saturating: norms >= 0 of the generator's gradient under either loss, where D is
        a logit; else `gradient`, under its own loss.
    histogram/k, histogram_data/k: shares in [0, 1] of samples and of data in mode k.
    modes, modes_covered: how many modes there are to tell, and how many of them samples cover.
    precision, recall in [0, 1], spread: mean distance of samples over that of data, 1 is right.
    With `final` also
    recall_data, precision_data: those of training examples against others, what is the best to be had.
    and, unless training took less than 100 steps,
    best_response_d, best_response_g: gains of the players in units of their loss on validation examples, and their
        standard errors `best_response_d_error`, `best_response_g_error` (without that of the probe's training).
    """
    n = min(affordable(model, 1), len(train) // 2)
    both = train.head(2 * n)
    with model.inference():
        (y, c, _), (others, _, classes) = (examples(model, part) for part in _halves(both, n))
        fake = sample(model, n, c, noise)
        held, held_c, _ = examples(model, validation.head(n))
        against = fake[: len(held)] if c is None else sample(model, len(held), held_c, noise, "held out")
        values = [criticize(model, *pair) for pair in ((y, c), (fake, c), (held, held_c), (against, held_c))]
    found = {"samples": float(n), "validation_examples": float(len(held)), **game_scores(model, *values)}
    found |= _gradients(model, y, c, noise)
    points, others = flat(y), flat(others)
    found |= _shares(model, flat(fake), points, others, classes) | neighbour_scores(flat(fake), points)
    if final:
        best = neighbour_scores(others, points)
        found |= {f"{name}_data": best[name] for name in ("precision", "recall")}
        if step >= LEAST_STEPS:
            found |= best_responses(model, train, validation.head(n), noise, min(PROBE_STEPS, step // 10))
    return found


def _shares(model: GAN, x: Tensor, y: Tensor, others: Tensor, classes: Tensor | None) -> dict[str, float]:
    """Shares of the modes that other training examples (N, D) define, of samples and of data (N, D)."""
    condition = model.spec.condition
    count = max(2, min(CELLS, len(y) // 32)) if condition is None or classes is None else condition.size
    modes = find_modes(others, classes, count)
    share, of_data = modes.histogram(x), modes.histogram(y)
    hit, telling = covered(share, of_data, len(x))
    found = {"modes": float(telling.sum()), "modes_covered": float(hit.sum())}
    found |= {f"histogram/{k}": v for k, v in enumerate(share.tolist())}
    return found | {f"histogram_data/{k}": v for k, v in enumerate(of_data.tolist())}


def game_scores(model: GAN, train: Tensor, fake: Tensor, held: Tensor, against: Tensor) -> dict[str, float]:
    """Accuracies and overfitting from D's values on training examples and samples (N,), validation and samples (M,)."""
    on_train, on_fake = model.loss.margins(train, fake)
    on_held, _ = model.loss.margins(held, against)
    margins = {"accuracy_real_train": on_train, "accuracy_real_validation": on_held, "accuracy_fake": on_fake}
    scores = {name: (m > 0).double().mean().item() for name, m in margins.items()}
    lead = train.mean() - fake.mean()
    if lead != 0.0:
        scores["overfitting"] = ((train.mean() - held.mean()) / lead).item()
    return scores


def gradient_norms(
    values: Callable[[], Tensor], parameters: Sequence[Tensor], losses: Sequence[Callable[[Tensor], Tensor]]
) -> list[float]:
    """|grad loss(values())| with respect to all parameters, for each loss of the same values (N,).

    They are computed anew for each loss: what is compiled frees its graph in the first backward pass.
    """
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss(values()), parameters, allow_unused=True)
        norms.append(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item())
    return norms


def _gradients(model: GAN, y: Tensor, c: Tensor | None, noise: Noise) -> dict[str, float]:
    n = _batch_size(model, len(y))
    y, c = y[:n], None if c is None else c[:n]
    with model.inference(), torch.enable_grad():

        def values() -> Tensor:
            return model.criticize(model._sample(Noise(*noise.key, "gradient", n=n, device=noise.device), c), c)

        with torch.no_grad():
            real = model.criticize(y, c)
        parameters = list(model.g.parameters())
        if model.config.loss not in ("minimax", "non-saturating"):
            return {"gradient": gradient_norms(values, parameters, [lambda d: model.loss.g(d, real)])[0]}
        norms = logit_gradients(values, parameters)
    return dict(zip(("gradient_saturating", "gradient_non_saturating"), norms, strict=True))


def logit_gradients(values: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[float]:
    """Norms of the generator's gradient under the saturating and the non-saturating loss of D's logits (N,)."""
    saturating, other = LOSSES["minimax"].g, LOSSES["non-saturating"].g
    return gradient_norms(values, parameters, [lambda d: saturating(d, d), lambda d: other(d, d)])


# -- best responses ------------------------------------------------------------------------------------------


def best_responses(model: GAN, train: Split, held: Batch, noise: Noise, steps: int = PROBE_STEPS) -> dict[str, float]:
    """Each player's gain against the frozen other, on held-out examples and fresh samples, with standard errors."""
    found = {}
    before = _losses(model, held, noise)
    for key, player in (("d", "discriminator"), ("g", "generator")):
        gain = before[key] - _losses(respond(model, player, train, noise, steps), held, noise)[key]  # type: ignore[arg-type]
        found[f"best_response_{key}"] = gain.mean().item()
        found[f"best_response_{key}_error"] = (gain.std() / len(gain) ** 0.5).item()
    return found


def respond(
    model: GAN, player: Literal["discriminator", "generator"], train: Split, noise: Noise, steps: int = PROBE_STEPS
) -> GAN:
    """A copy of the model of which one player alone has trained on, with its penalties as they are at the end."""
    copied = copy.deepcopy(model).train()
    if model.config.augment == "adaptive":
        copied.controller.every = 2**62  # its strength stays
    objective = next(o for o in copied.objectives() if o.name == player)
    copied.requires_grad_(False)
    for parameter in objective.parameters:
        parameter.requires_grad_(True)
    o, size = objective.optimizer, _batch_size(model, len(train))
    optimizer = o.make(objective.parameters)
    for i in range(steps):
        draws = Noise(*noise.key, "probe", player, i, n=size, device=noise.device, block=size)
        batch = train.batch(draws.integers(len(train)).cpu()).to(noise.device)
        with torch.enable_grad():
            loss = objective.loss(batch if model.condition is not None else Batch(batch.x), Step(draws, 1.0, i))
            optimizer.zero_grad()
            (loss[0] if isinstance(loss, tuple) else loss).backward()  # type: ignore[no-untyped-call]
        o.set(optimizer, o.lr * (1.0 - i / steps), 1.0)  # so that the last steps do not jump about
        optimizer.step()
        if objective.after_step is not None:
            objective.after_step()
    return copied


def _losses(model: GAN, held: Batch, noise: Noise) -> dict[str, Tensor]:
    """The game's losses of both players, without penalties, of each held-out example and a sample (N,)."""
    with model.inference():
        y, c, _ = examples(model, held)
        fake = criticize(model, sample(model, len(y), c, noise, "response"), c).unsqueeze(1)
        real = criticize(model, y, c).unsqueeze(1)
        return {"d": torch.vmap(model.loss.d)(real, fake), "g": torch.vmap(model.loss.g)(fake, real)}


# -- examples and samples ------------------------------------------------------------------------------------


def affordable(model: GAN, millions: int) -> int:
    """Examples of so many million numbers in all, 128 to 1024."""
    return max(128, min(SAMPLES, millions * 2**20 // model.codec.dims))


def _batch_size(model: GAN, examples: int) -> int:
    """Examples of a step, fewer where they are large: there the probe would take longer than what it probes."""
    return min(examples, max(16, min(BATCH, 2**16 // model.codec.dims)))


def examples(model: GAN, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Examples y (N, *shape), the condition that the model takes, and the classes (N,) where they are the modes."""
    batch = batch.to(model.device)
    labels = None if batch.condition is None or not labelled(model.spec.condition) else batch.condition.cpu()
    return model.encoded(batch, None), batch.condition if model.condition is not None else None, labels


def sample(model: GAN, n: int, condition: Tensor | None, noise: Noise, *key: str) -> Tensor:
    """n samples (n, *shape) of the stream that `noise` and the key name."""
    parts = []
    for start in range(0, n, size := model.default_batch_size):
        stop = min(n, start + size)
        draws = Noise(*noise.key, "samples", *key, n=stop - start, start=start, device=noise.device)
        parts.append(model._sample(draws, None if condition is None else condition[start:stop]))
    return torch.cat(parts)


def criticize(model: GAN, y: Tensor, condition: Tensor | None) -> Tensor:
    """D (N,), some examples at a time."""
    size = model.default_batch_size
    parts = torch.split(y, size)
    conditions = [None] * len(parts) if condition is None else torch.split(condition, size)
    return torch.cat([model.criticize(part, c) for part, c in zip(parts, conditions, strict=True)])


def flat(y: Tensor) -> Tensor:
    """(N, *shape) -> (N, D) in float64, where distances are taken."""
    return y.flatten(1).cpu().double()


def _halves(batch: Batch, n: int) -> tuple[Batch, Batch]:
    c = batch.condition
    return (
        Batch(batch.x[:n], None if c is None else c[:n]),
        Batch(batch.x[n:], None if c is None else c[n:]),
    )


def _coordinates(condition: Tensor, spec: ConditionSpec) -> Tensor:
    """Conditions as points (N, size)."""
    if spec.kind == "class":
        return one_hot(condition.cpu(), spec.size).double()
    c = condition.double().cpu()
    return (c - torch.tensor(spec.mean)) / torch.tensor(spec.std) if spec.mean else c
