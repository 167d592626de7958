"""How the games of `demo` are drawn: films, and posters of their first, middle and last states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from trilemma.adversarial.losses import LossName
from trilemma.data.film import INK, frame_of, gif, png, style
from trilemma.data.render import PALETTE
from trilemma.data.toys import Mixture

if TYPE_CHECKING:
    from trilemma.adversarial.demo import ModesState
    from trilemma.adversarial.line_game import State1d

S = TypeVar("S")

DATA, FAKE, CRITIC = PALETTE[:3]
ARROW = "#f0a878"
CONTOUR = "#8a8a8a"
ARROWS = 24
"""Lines from z to G(z)."""
DOTS = 400
"""Samples drawn of each model."""
LEVELS = 8
"""Steps of the shading."""

TITLES = {
    "gan": "minimax",
    "ns-gan": "non-saturating",
    "wgan": "Wasserstein, clipping",
    "wgan-gp": "Wasserstein, penalty",
    "r3gan": "relativistic, R1 + R2",
}
SHADES = LinearSegmentedColormap.from_list("critic", ["#f6c9a8", "#ffffff", "#a9d0ef"])
"""From what D takes for generated to what it takes for real."""


def three_of(states: Sequence[S]) -> list[S]:
    """The first, the middle and the last."""
    return [states[0], states[len(states) // 2], states[-1]]


# -- one dimension ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View1d:
    """What all pictures of a one-dimensional game share.

    Attributes:
        centres: of the cells (K,).
        cell: their width.
        mean, std: of the data.
    """

    loss: LossName
    centres: Tensor
    cell: float
    mean: float
    std: float

    @property
    def limits(self) -> tuple[float, float]:
        """Of the x-axis: the data, the generator's start and most of z."""
        reach = 4.0 * self.std
        return min(-2.5, self.mean - reach), max(2.5, self.mean + reach)

    @property
    def top(self) -> float:
        """Of the axis of densities: what is higher is cut."""
        return 1.7 / (self.std * math.sqrt(2.0 * math.pi))

    @property
    def critic(self) -> tuple[str, str, tuple[float, float], float]:
        """Names of D and D* as they are shown, limits of their axis, and the value that takes no side."""
        if self.loss == "wasserstein":
            return "D / max |D'|", "best D", (-4.0, 4.0), 0.0
        if self.loss == "hinge":
            return "D", "D* = sign(p − q)", (-1.6, 1.6), 0.0
        if self.loss == "least-squares":
            return "D", "D* = p / (p + q)", (-0.25, 1.25), 0.5
        return "σ(D)", "D* = p / (p + q)", (-0.03, 1.03), 0.5


def draw_densities(axes: Axes, view: View1d, state: State1d) -> Axes:
    """p, q on the left axis; D and D* on the right one, which is returned."""
    x = view.centres.numpy()
    for mass, colour in ((state.p, DATA), (state.q, FAKE)):
        density = (mass / view.cell).clamp(max=2.0 * view.top).numpy()
        axes.fill_between(x, density, color=colour, alpha=0.22, linewidth=0)
        axes.plot(x, density, color=colour, linewidth=2.0)
    axes.set_ylim(0.0, view.top)
    axes.set_xlim(*view.limits)
    right = axes.twinx()
    name, _, limits, middle = view.critic
    right.axhline(middle, color=INK, alpha=0.25, linewidth=0.8)
    right.plot(x, state.best.numpy(), "--", color=INK, linewidth=1.2)
    right.plot(x, state.critic.numpy(), color=CRITIC, linewidth=1.8)
    right.set_ylim(*limits)
    right.spines["right"].set_visible(True)
    right.set_ylabel(f"{name},  best", labelpad=2)
    return right


def handles_1d(view: View1d) -> list[Line2D]:
    """The legend of `draw_densities`."""
    name, best, _, _ = view.critic
    lines = ((DATA, "data, p"), (FAKE, "generator, q"), (CRITIC, f"discriminator, {name}"))
    solid = [Line2D([], [], color=colour, label=label) for colour, label in lines]
    return [*solid, Line2D([], [], color=INK, linestyle="--", label=best)]


def draw_mapping(axes: Axes, view: View1d, state: State1d) -> None:
    """Lines from equally likely z, below, to G(z)."""
    first = len(state.z) // (2 * ARROWS)
    for z, x in zip(state.z[first :: 2 * first].tolist(), state.x[first :: 2 * first].tolist(), strict=True):
        axes.plot([z, x], [0.0, 1.0], color=ARROW, linewidth=1.0)
    axes.set_xlim(*view.limits)
    axes.set_ylim(0.0, 1.0)
    axes.set_yticks([0.0, 1.0], ["z", "x"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.spines["top"].set_visible(True)


def draw_curves(axes: Sequence[Axes], view: View1d, states: Sequence[State1d], seen: int) -> None:
    """W1, D's loss, its accuracy, and the gradients, over all states; drawn up to the one numbered `seen`."""
    steps = [s.step for s in states]
    gradients = {name: [s.gradients[name] for s in states] for name in states[0].gradients}
    curves: tuple[tuple[str, list[tuple[list[float], str, str, str]]], ...] = (
        ("W1(p, q)", [([s.w1 for s in states], FAKE, "-", "")]),
        ("loss of D", [
            ([s.loss for s in states], CRITIC, "-", "of D"), ([s.least for s in states], INK, "--", "of the best D"),
        ]),
        ("accuracy of D", [([s.accuracy for s in states], CRITIC, "-", "")]),
        ("gradient that reaches G", [
            (values, *((FAKE, "-") if name == view.loss else (INK, ":")), name) for name, values in gradients.items()
        ]),
    )  # fmt: skip
    for ax, (title, lines) in zip(axes, curves, strict=True):
        for values, colour, dash, label in lines:
            ax.plot(steps[: seen + 1], values[: seen + 1], dash, color=colour, linewidth=1.3, label=label)
        everything = [v for values, *_ in lines for v in values]
        _limit(ax, everything, logarithmic=title.startswith(("W1", "grad")))
        ax.set_title(title, loc="left")
        ax.set_xlim(0, steps[-1])
        ax.locator_params(axis="x", nbins=4)
        if len(lines) > 1:
            ax.legend(loc="best", handlelength=1.4, labelspacing=0.2, borderaxespad=0.1)
    axes[2].set_ylim(0.0, 1.02)
    axes[2].axhline(0.5, color=INK, alpha=0.25, linewidth=0.8)


def _limit(axes: Axes, values: Sequence[float], *, logarithmic: bool) -> None:
    """Limits that hold from the first frame to the last."""
    low, high = min(values), max(values)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(max(low, 1e-12) / 1.5, 1.5 * high)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        pad = 0.06 * (high - low) + 1e-9
        axes.set_ylim(low - pad, high + pad)
        axes.locator_params(axis="y", nbins=4)


@style
def film_1d(view: View1d, states: Sequence[State1d]) -> bytes:
    """GIF: densities, D and the mapping on the left, curves on the right."""
    frames = []
    for i, state in enumerate(states):
        figure = Figure(figsize=(9.6, 5.4))
        grid = figure.add_gridspec(4, 2, width_ratios=(2.3, 1.0), left=0.055, right=0.985, bottom=0.065, top=0.87,
                                   wspace=0.26, hspace=0.62)  # fmt: skip
        left = grid[:, 0].subgridspec(2, 1, height_ratios=(2.0, 1.0), hspace=0.12)
        top, below = figure.add_subplot(left[0]), figure.add_subplot(left[1])
        draw_densities(top, view, state)
        top.set_ylabel("density")
        draw_mapping(below, view, state)
        draw_curves([figure.add_subplot(grid[row, 1]) for row in range(4)], view, states, i)
        figure.legend(handles=handles_1d(view), loc="upper left", bbox_to_anchor=(0.045, 0.945), ncols=4,
                      columnspacing=1.4)  # fmt: skip
        figure.text(0.055, 0.96, f"{view.loss},  step {state.step}", fontsize=11)
        frames.append(frame_of(figure))
    return gif(frames)


@style
def poster_1d(view: View1d, states: Sequence[State1d]) -> bytes:
    """PNG: the first, the middle and the last state, and the curves."""
    figure = Figure(figsize=(11.0, 6.6))
    grid = figure.add_gridspec(3, 12, height_ratios=(2.0, 1.0, 1.2), left=0.05, right=0.955, bottom=0.065, top=0.88,
                               wspace=1.1, hspace=0.42)  # fmt: skip
    for column, state in enumerate(three_of(states)):
        cells = slice(4 * column, 4 * column + 4)
        top, below = figure.add_subplot(grid[0, cells]), figure.add_subplot(grid[1, cells])
        right = draw_densities(top, view, state)
        top.tick_params(labelleft=column == 0)
        right.tick_params(labelright=column == 2)
        right.yaxis.label.set_visible(column == 2)
        top.set_title(f"step {state.step},  W1 = {state.w1:.2g}", loc="left")
        draw_mapping(below, view, state)
        if column == 0:
            top.set_ylabel("density")
    curves = [figure.add_subplot(grid[2, 3 * i : 3 * i + 3]) for i in range(4)]
    draw_curves(curves, view, states, len(states) - 1)
    for ax in curves:
        ax.set_xlabel("step")
    figure.legend(handles=handles_1d(view), loc="upper left", bbox_to_anchor=(0.16, 0.99), ncols=4)
    figure.text(0.05, 0.96, view.loss, fontsize=11)
    return png(figure)


# -- eight modes --------------------------------------------------------------------------------------------------


def draw_modes(axes: Axes, toy: Mixture, state: ModesState, limit: float) -> None:
    """D as shading, contours of the data, samples; underneath what is counted."""
    field = (state.field * LEVELS).round() / LEVELS
    axes.imshow(field.numpy(), cmap=SHADES, vmin=0.0, vmax=1.0, origin="lower", extent=(-limit, limit, -limit, limit),
                interpolation="nearest")  # fmt: skip
    angle = np.linspace(0.0, 2.0 * math.pi, 60)
    for mean, std in zip(toy.means.tolist(), toy.stds.tolist(), strict=True):
        for radius in (1.0, 2.0, 3.0):
            axes.plot(mean[0] + radius * std * np.cos(angle), mean[1] + radius * std * np.sin(angle), color=CONTOUR,
                      linewidth=0.7)  # fmt: skip
    x = state.samples[:DOTS]
    axes.plot(x[:, 0], x[:, 1], ".", color=INK, markersize=2.4, markeredgewidth=0)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"modes {state.modes}/{len(toy.means)},  good {state.good:.0%}", fontsize=9.5)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_alpha(0.3)


def _panels(figure: Figure, row: Sequence[Axes], states: Sequence[ModesState], toy: Mixture, limit: float) -> None:
    for axes, state in zip(row, states, strict=True):
        draw_modes(axes, toy, state, limit)


def _handles() -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=CONTOUR, linewidth=0.8, label="data: 1, 2, 3 standard deviations"),
        Line2D([], [], color=INK, marker=".", linestyle="none", label="samples"),
        Patch(color=SHADES(0.0), label="D: generated"),
        Patch(color=SHADES(1.0), label="D: real"),
    ]


@style
def film_modes(games: Mapping[str, Sequence[ModesState]], toy: Mixture) -> bytes:
    """GIF: one panel per preset."""
    frames = []
    for states in zip(*games.values(), strict=True):
        figure = Figure(figsize=(12.0, 3.2))
        row = figure.subplots(1, len(games), gridspec_kw=_margins(0.03, 0.81))
        _panels(figure, row, states, toy, 3.3)
        _finish(figure, row, games, f"step {states[0].step}")
        frames.append(frame_of(figure))
    return gif(frames)


def _margins(bottom: float, top: float) -> dict[str, float]:
    return {"left": 0.01, "right": 0.99, "bottom": bottom, "top": top, "wspace": 0.05}


def _finish(figure: Figure, row: Sequence[Axes], games: Mapping[str, Sequence[ModesState]], text: str) -> None:
    for axes, preset in zip(row, games, strict=True):
        axes.set_title(f"{preset}: {TITLES[preset]}", loc="left")
    figure.legend(handles=_handles(), loc="upper right", ncols=4, bbox_to_anchor=(0.995, 1.0))
    figure.text(0.01, 0.945, text, fontsize=11)


@style
def poster_modes(games: Mapping[str, Sequence[ModesState]], toy: Mixture) -> bytes:
    """PNG: the first, the middle and the last state of each preset."""
    figure = Figure(figsize=(12.0, 8.4))
    rows = figure.subplots(3, len(games), gridspec_kw={**_margins(0.03, 0.92), "left": 0.03, "hspace": 0.16})
    for row, states in zip(rows, zip(*(three_of(s) for s in games.values()), strict=True), strict=True):
        _panels(figure, row, states, toy, 3.3)
        row[0].set_ylabel(f"step {states[0].step}")
    _finish(figure, rows[0], games, "")
    return png(figure)
