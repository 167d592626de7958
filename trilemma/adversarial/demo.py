"""Two games to look at: one-dimensional data, where all is known (`line_game`), and eight modes under five losses.

gan-modes. The presets' own losses, penalties, turns and Adam on eight Gaussians, with one architecture, batch and
number of steps for all; weights as they are, not averaged. Rates fall by a cosine, and gradients are clipped to norm 1,
as the engine does by default. A sample is good within 4 standard deviations of a centre; of the data
1 - exp(-8) = 99.97% are. A mode is covered by a tenth of its share of good samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.adversarial import films
from trilemma.adversarial.diagnostics import logit_gradients
from trilemma.adversarial.line_game import CELL, Game1d, Game1dConfig, falling_rate, frame_steps
from trilemma.adversarial.model import GAN
from trilemma.adversarial.modes import Modes, covered
from trilemma.core.config import Config
from trilemma.core.model import Step
from trilemma.core.noise import Noise, hash_key
from trilemma.core.registry import create
from trilemma.core.spec import DataSpec
from trilemma.data.dataset import TensorSplit
from trilemma.data.toys import TOYS, Mixture

MODE_PRESETS = ("gan", "ns-gan", "wgan", "wgan-gp", "r3gan")
GOOD = 4.0
MEASURED = 2000
EXAMPLES = 10_000
ARCHITECTURE = "residual"
"""Of all players: the discriminator sees waves of the coordinates, so that it can tell narrow modes."""
FIELD = 64, 3.3
"""Points a side of the grid on which D is drawn, and the largest coordinate."""


@dataclass(frozen=True)
class Shown:
    """What a demo found: files by name, and the figures of a table."""

    files: Mapping[str, bytes]
    rows: list[dict[str, Any]]
    remark: str


def show_1d(config: Game1dConfig, seed: int) -> Shown:
    """gan-1d."""
    game = Game1d(config, seed)
    states = list(game.play())
    view = films.View1d(config.loss, game.centres, CELL, config.mean, config.std)
    rows = []
    for state in films.three_of(states):
        row = {"step": state.step, "W1": state.w1, "loss of D": state.loss, "least loss": state.least}
        row |= {"accuracy of D": state.accuracy}
        norms = list(state.gradients.values())
        rows.append(row | ({"gradient ratio": norms[0] / norms[1]} if len(norms) > 1 else {"gradient of G": norms[0]}))
    files = {"gan-1d.gif": films.film_1d(view, states), "gan-1d.png": films.poster_1d(view, states)}
    remark = {
        "minimax": "Where D is sure of itself, the minimax loss leaves almost nothing of the other's gradient.",
        "wasserstein": "D is shown divided by its largest slope; at the end p = q, and D is flat.",
        "hinge": "At an equilibrium D takes neither side: it is 0.",
    }.get(config.loss, "At the equilibrium p = q, and D is 1/2 everywhere.")
    return Shown(files, rows, remark)


# -- eight modes --------------------------------------------------------------------------------------------------


class ModesConfig(Config):
    """Settings of gan-modes."""

    steps: int = Field(1500, ge=1, description="steps of each generator")
    frames: int = Field(40, ge=2, description="of the film")
    batch_size: int = Field(64, ge=1)
    std: float = Field(0.1, gt=0, le=0.4, description="of each Gaussian; the centres are 2 from the middle")


@dataclass(frozen=True)
class ModesState:
    """One model at one step: samples (N, 2), and what is counted.

    Attributes:
        field: sigma(D) on the grid (M, M), from 0, generated, to 1, real; where only differences of D mean something,
            relative to its median, and of Wasserstein critics, which have no unit, over its standard deviation.
        modes: covered, of 8.
        good: share in [0, 1] of good samples.
        ratio: norm of the generator's gradient under the saturating loss over that under the non-saturating one, where
            D is a logit, else None.
    """

    step: int
    samples: Tensor
    field: Tensor
    modes: int
    good: float
    ratio: float | None


def eight_gaussians(std: float) -> Mixture:
    """The data of gan-modes."""
    toy = TOYS["eight-gaussians"]
    assert isinstance(toy, Mixture)
    return Mixture(toy.means, torch.full_like(toy.stds, std), toy.weights)


def count_modes(x: Tensor, toy: Mixture) -> tuple[int, float]:
    """Modes that the samples x (N, 2) cover, and the share of good samples."""
    modes = Modes(toy.means, torch.arange(len(toy.means)), len(toy.means))
    distance = torch.cdist(x.double(), toy.means) / toy.stds
    good = distance.amin(1) < GOOD
    share = modes.histogram(x[good].double()) * good.double().mean() if good.any() else torch.zeros(modes.count)
    hit, _ = covered(share, toy.weights / toy.weights.sum(), len(x))
    return int(hit.sum()), float(good.double().mean())


def gradient_ratio(model: GAN, seed: int) -> float | None:
    """What the saturating loss leaves of the non-saturating one's gradient; None where D is no logit."""
    if model.config.loss not in ("minimax", "non-saturating"):
        return None
    z = Noise(seed, "gan-modes", "ratio", n=256).normal(model.g.z_dim, dtype=model.dtype)
    saturating, other = logit_gradients(
        lambda: model.criticize(model.generate(z, None), None), list(model.g.parameters())
    )
    return saturating / other


def look(model: GAN, toy: Mixture, step: int, seed: int) -> ModesState:
    """What there is to see of a model at this step."""
    x = model.sample(MEASURED, generator=hash_key(seed, "look"))
    line = torch.linspace(-FIELD[1], FIELD[1], FIELD[0])
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    known = torch.cat([toy.sample(MEASURED, Noise("gan-modes", "real", n=MEASURED)).x, x])
    with model.inference():
        field, on_known = (criticize_data(model, y) for y in (grid.reshape(-1, 2), known))
    undecided = model.loss.undecided
    centre = on_known.median() if undecided is None else undecided
    scale = on_known.std() if model.config.loss == "wasserstein" else 1.0
    field = ((field - centre) / scale).sigmoid().reshape(FIELD[0], FIELD[0])
    modes, good = count_modes(x, toy)
    return ModesState(step, x, field, modes, good, gradient_ratio(model, seed))


def criticize_data(model: GAN, x: Tensor) -> Tensor:
    """D of x (N, 2) in data units, (N,)."""
    return model.criticize(model.codec.encode(x, None, dtype=model.dtype)[0], None)


def play_modes(preset: str, config: ModesConfig, seed: int) -> Iterator[ModesState]:
    """The preset's game, seen at `frames` steps."""
    toy, size = eight_gaussians(config.std), config.batch_size
    train = TensorSplit(toy.sample(EXAMPLES, Noise("gan-modes", "train", n=EXAMPLES)).x.float())
    model = create(preset, DataSpec(kind="points", shape=(2,)), architecture=ARCHITECTURE)
    assert isinstance(model, GAN)
    model.initialize(seed)
    model.prepare(train, Noise(seed, "prepare", n=1))
    model.fitted = True
    objectives = [(o, o.optimizer.make(o.parameters)) for o in model.objectives()]
    seen = frame_steps(config.steps, config.frames)
    for step in range(config.steps + 1):
        if step in seen:
            yield look(model, toy, step, seed)
        progress = step / config.steps
        for objective, adam in objectives:
            objective.optimizer.set(adam, objective.optimizer.lr * falling_rate(progress), progress)
            for turn in range(objective.turns):
                noise = Noise(seed, "gan-modes", objective.name, step, turn, n=size, block=size)
                batch = train.batch(noise.integers(EXAMPLES))
                found = objective.loss(batch, Step(noise, progress, step))
                loss = found[0] if isinstance(found, tuple) else found
                for parameter, gradient in zip(
                    objective.parameters, torch.autograd.grad(loss, list(objective.parameters)), strict=True
                ):
                    parameter.grad = gradient
                nn.utils.clip_grad_norm_(objective.parameters, 1.0)
                adam.step()
                if objective.after_step is not None:
                    objective.after_step()


def show_modes(config: ModesConfig, seed: int) -> Shown:
    """gan-modes."""
    games = {preset: list(play_modes(preset, config, seed)) for preset in MODE_PRESETS}
    toy = eight_gaussians(config.std)
    rows = []
    for preset, states in games.items():
        last = states[-1]
        row = {"preset": preset, "modes": f"{last.modes}/{len(toy.means)}", "good samples": last.good}
        rows.append(row | {"gradient ratio": last.ratio})
    files = {"gan-modes.gif": films.film_modes(games, toy), "gan-modes.png": films.poster_modes(games, toy)}
    return Shown(files, rows, "Gradient ratio: what the minimax loss leaves of the non-saturating loss's gradient.")


# -- all demos ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """What a demo shows in a line, its settings, and the function that plays it."""

    summary: str
    config: type[Config]
    show: Callable[[Any, int], Shown]


DEMOS: dict[str, Demo] = {
    "gan-1d": Demo(
        "one-dimensional Gaussian data: densities, D beside the best D, W1, gradients", Game1dConfig, show_1d
    ),
    "gan-modes": Demo("eight Gaussians under five losses, side by side: who drops modes", ModesConfig, show_modes),
}
