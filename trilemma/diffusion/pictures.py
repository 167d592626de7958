"""Pictures of the diffusion process of a trained model: what `trilemma show` writes.

    forward.png    chains of examples from clean to noise           kernel.png     a hundred steps are one Gaussian
    reverse.png    chains of samples, and the estimates of x        posterior.png  when the way back is Gaussian
    reverse.gif    the same as a film; not of tables                schedule.png   alpha, sigma, SNR, training times
and of points in the plane
    score.png      the field that samples follow                    sde.png        random and smooth paths
The last two are not drawn for models that were distilled to few steps, whose networks give no score.

The samples of the reverse chain are those of `sample` with the same seed, sampler and conditions; rk45, which has no
steps to show, is stopped at 20 times.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, Split
from trilemma.data.film import INK, png, style
from trilemma.data.render import PALETTE
from trilemma.diffusion.drawing import View, film, scatters, strip, time_label
from trilemma.diffusion.figures import kernel_figure, posterior_figure, schedule_figure
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.prediction import conversion
from trilemma.diffusion.process import forward_chain, path_times, reverse_chain, shown_times
from trilemma.diffusion.schedule import NoiseSchedule
from trilemma.diffusion.solvers import DDIM, RK45, Ancestral, Solver
from trilemma.diffusion.training import WEIGHTINGS

if TYPE_CHECKING:
    from trilemma.diffusion.model import Diffusion

COLUMNS, FRAMES = 10, 60
"""Times of a film strip, and of a film at most."""

POINTS = 600
"""Points or rows of a scatter."""

RANGE_SAMPLE = 2048
"""Examples that decide the ranges of axes, and among which those shown are looked for."""

LEVELS = (3.0, 0.0, -2.0, -4.0)
"""log SNR at which the score is drawn."""

FLOWS, CHAINS_EACH = 5, 2
"""Starts of the paths of sde.png, and chains from each start."""

DRAWS = 2**17
"""Training times drawn for their density."""


class Album:
    """The pictures of one model.

    Arguments:
        model: trained; its networks stay where they are, what is drawn is computed on the CPU.
        data: whose first examples are shown, classes in turn.
        seed: of all draws.
        n: examples and samples in a strip of pictures or signals.
        sampler, steps, guidance: of the reverse chain; the model's own by default.
    """

    def __init__(
        self, model: Diffusion, data: Split, seed: int, n: int, sampler: str | None, steps: int | None, guidance: float
    ) -> None:
        self.model, self.seed = model, seed
        self.schedule = _on_cpu(model.schedule)
        head = data.head(RANGE_SAMPLE)
        y = model.codec.encode(head.x.to(model.device), dtype=model.dtype)[0].cpu()
        self.view = View(model.codec, self.schedule, model.data_std, y)
        self.scattered = model.spec.kind in ("points", "table")
        condition = head.condition if model.condition is not None else None
        chosen = in_turn(condition, POINTS if self.scattered else n, len(y))
        self.examples = Batch(y[chosen], None if condition is None else condition[chosen])
        self.solver = model.solver(sampler)
        self.times = self._sampler_times(self.solver, steps)
        self.given = model._conditions(self.examples.condition, len(chosen))
        self.denoiser = model.denoiser(self.given, guidance=guidance)

    def _sampler_times(self, solver: Solver, steps: int | None) -> Tensor:
        times = self.model.time_grid(solver, steps)
        if not isinstance(solver, RK45):
            return times
        return time_grid(self.schedule, 20, "karras" if self.schedule.grid == "karras" else "linspace")

    def draw(self) -> dict[str, bytes]:
        """File name -> content."""
        found = {"forward.png": png(self.forward()), "kernel.png": png(kernel_figure(self.schedule, self.seed))}
        found["posterior.png"] = png(posterior_figure(self.schedule))
        chain = self.reverse_states()
        found["reverse.png"] = png(self.reverse(chain))
        if self.view.kind != "table":
            found["reverse.gif"] = self.film(chain)
        if self.view.kind == "points" and self.model.codec.shape == (2,) and self.has_score():
            found |= {"score.png": png(self.score()), "sde.png": png(self.paths())}
        return found | {"schedule.png": png(schedule_figure(self.schedule, path_times(self.schedule), self.training()))}

    def names(self) -> list[str]:
        """Of the examples: their classes, or numbers."""
        spec, condition = self.model.condition, self.examples.condition
        if spec is None or spec.kind != "class" or condition is None:
            return [str(i + 1) for i in range(len(self.examples.x))]
        return [name if len(name) <= 12 else name[:11] + "…" for name in (spec.names[int(c)] for c in condition)]

    def colours(self) -> list[str] | str:
        """Of points, by class."""
        spec, condition = self.model.condition, self.examples.condition
        if spec is None or spec.kind != "class" or condition is None:
            return PALETTE[0]
        return [PALETTE[int(c) % len(PALETTE)] for c in condition]

    def shown(self, z: Tensor, t: Tensor) -> Tensor:
        """A state as it is drawn, on the CPU."""
        return z.cpu() * self.view.scale(t)

    # -- chains ------------------------------------------------------------------------------------------------

    @style
    def forward(self) -> Figure:
        """One chain of each example, by the transitions."""
        x, times = self.examples.x, shown_times(self.schedule, COLUMNS - 1)
        noise = Noise(self.seed, "forward", n=len(x))
        chain = forward_chain(self.schedule, x, times, lambda: noise.normal_like(x))
        states = torch.stack([x, *(self.shown(z, t) for z, t in zip(chain, times, strict=True))])
        labels = [time_label(self.schedule, t) for t in (None, *times)]
        if self.scattered:
            panels = [(title(label), self.view.plane(z)) for label, z in zip(labels, states, strict=True)]
            return scatters(self.view, panels, self.colours(), COLUMNS // 2)
        return strip(self.view, list(states.unbind(1)), labels, self.names(), 1)

    @torch.no_grad()
    def reverse_states(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """t, z_t and the estimate of x, at FRAMES times of the sampler or fewer."""
        model = self.model
        noise = Noise(self.seed, "sample", n=len(self.examples.x), device=model.device)

        def normal() -> Tensor:
            return noise.normal(*model.codec.shape, dtype=model.dtype)

        start = model.start_std(self.times) * normal()
        chain = reverse_chain(self.denoiser, self.solver, self.times, start, normal)
        return [
            (self.times[i], chain[i], self.denoiser.predict(chain[i], self.times[i]))
            for i in spread(len(chain), FRAMES)
        ]

    @style
    def reverse(self, chain: list[tuple[Tensor, Tensor, Tensor]]) -> Figure:
        """Rows of z_t, and below each what the denoiser makes of it."""
        chosen = [chain[i] for i in spread(len(chain), COLUMNS)]
        labels = [time_label(self.schedule, t) for t, _, _ in chosen]
        z, x = ([self.shown(z, t) for t, z, _ in chosen], [x.cpu() for _, _, x in chosen])
        if not self.scattered:
            rows = [row for pair in zip(torch.stack(z, 1), torch.stack(x, 1), strict=True) for row in pair]
            names = [text for name in self.names() for text in (f"{name}   z", "x̂")]
            return strip(self.view, rows, labels, names, 2)
        across = min(len(chosen), COLUMNS // 2)
        panels = []
        for start in range(0, len(chosen), across):
            part = slice(start, start + across)
            for states in (z[part], x[part]):
                panels += [(title(k), self.view.plane(y)) for k, y in zip(labels[part], states, strict=True)]
        return scatters(self.view, panels, self.colours(), across, ("z", "x̂"))

    @style
    def film(self, chain: list[tuple[Tensor, Tensor, Tensor]]) -> bytes:
        """The reverse chain as a GIF."""
        states = [
            ("t = {}  log SNR {}".format(*time_label(self.schedule, t)), self.shown(z, t), x.cpu()) for t, z, x in chain
        ]
        return film(self.view, states, self.colours())

    # -- points in the plane -----------------------------------------------------------------------------------

    def _fields(self) -> list[tuple[str, Tensor | None]]:
        """Class and condition (1, ..) of the scores drawn: those of the first classes, or of the first example."""
        spec = self.model.condition
        if spec is None or spec.kind != "class" or self.given is None:
            return [("", None if self.given is None else self.given[:1])]
        classes = range(min(len(spec.names), 3))
        return [(f"class {spec.names[k]}", torch.tensor([k], device=self.given.device)) for k in classes]

    @style
    @torch.no_grad()
    def score(self) -> Figure:
        """sigma times the score, over noised examples, at a few noise levels."""
        model, fields = self.model, self._fields()
        high, low = (float(v) for v in self.schedule.log_snr(torch.stack(self.schedule.times)))
        levels = torch.tensor([min(max(level, low), high) for level in LEVELS], dtype=torch.float64)
        figure = Figure(figsize=(2.4 * len(levels) + 0.4, 2.45 * len(fields) + 0.4), layout="constrained")
        grid = figure.subplots(len(fields), len(levels), squeeze=False)
        noise = Noise(self.seed, "score", n=len(self.examples.x))
        for column, t in enumerate(self.schedule.time(levels).clamp(self.schedule.t_min, self.schedule.t_max)):
            alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
            z = alpha * self.examples.x + sigma * noise.normal_like(self.examples.x)
            side = torch.linspace(-1.0, 1.0, 17) * 2.6 * model.data_std / self.view.scale(t)
            place = torch.cartesian_prod(side, side).to(model.device, model.dtype)
            for axes, (name, condition) in zip(grid[:, column], fields, strict=True):
                c = None if condition is None else condition.expand(len(place), *condition.shape[1:])
                arrows = sigma * model.denoiser(c).predict(place, t, "score").cpu().numpy()
                shown = z if condition is None or not name else z[self.examples.condition == condition.cpu()]
                axes.scatter(*shown.numpy().T, s=2.5, c=PALETTE[0], alpha=0.4, linewidths=0)
                x, y = place.cpu().numpy().T
                longest = (float(np.hypot(*arrows.T).max()) or 1.0) / (2.0 * float(side[1] - side[0]))
                axes.quiver(
                    x, y, *arrows.T, color=INK, angles="xy", pivot="mid", scale_units="xy", scale=longest, width=0.004
                )
                axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
                axes.locator_params(nbins=3)
                axes.set_title(title(time_label(self.schedule, t)))
                if column == 0:
                    axes.set_ylabel(f"{name}\nz, second" if name else "z, second")
        for axes in grid[-1]:
            axes.set_xlabel("z, first")
        return figure

    @style
    @torch.no_grad()
    def paths(self) -> Figure:
        """Chains of the SDE and paths of the flow from the same starts, to the noise and back from it."""
        times, model = path_times(self.schedule), self.model
        count = FLOWS * CHAINS_EACH
        given = None if self.given is None else self.given[:FLOWS].repeat_interleave(CHAINS_EACH, 0)
        denoiser = model.denoiser(given)
        noise = Noise(self.seed, "paths", n=count, device=model.device)

        def normal() -> Tensor:
            return noise.normal(*model.codec.shape, dtype=model.dtype)

        x = self.examples.x[:FLOWS].to(model.device).repeat_interleave(CHAINS_EACH, 0)
        out = forward_chain(self.schedule, x, times, normal)
        start = self.schedule.prior_std * normal()[::CHAINS_EACH].repeat_interleave(CHAINS_EACH, 0)
        first = float(self.schedule.alpha(times[0])) * x
        back = times.flip(0)
        drawn = (
            ("data to noise", times, out, reverse_chain(denoiser, DDIM(), times, first, normal)),
            ("noise to data", back, reverse_chain(denoiser, Ancestral(), back, start, normal),
             reverse_chain(denoiser, DDIM(), back, start, normal)),
        )  # fmt: skip
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        for axes, (name, t, chains, flow) in zip(figure.subplots(1, 2, sharey=True), drawn, strict=True):
            self._draw_paths(axes, t, chains, flow)
            axes.set_title(name, loc="left")
            axes.set_xlim(float(t[0]), float(t[-1]))
        figure.axes[0].set_ylabel("z, first coordinate, scaled")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure

    def _draw_paths(self, axes: Axes, times: Tensor, chains: Tensor, flow: Tensor) -> None:
        scale = np.array([[self.view.scale(t)] for t in times])
        for i in range(FLOWS):
            own = slice(i * CHAINS_EACH, (i + 1) * CHAINS_EACH)
            colour, first = PALETTE[i % len(PALETTE)], i == 0
            lines = axes.plot(times, scale * chains[:, own, 0].cpu().numpy(), color=colour, linewidth=0.6, alpha=0.55)
            smooth = axes.plot(times, scale * flow[:, own, 0].cpu().numpy()[:, :1], color=colour, linewidth=1.9)
            if first:
                lines[0].set_label("SDE")
                smooth[0].set_label("probability flow (ODE)")
        axes.set_xlabel("t")
        if self.schedule.grid == "karras":
            axes.set_xscale("log")

    @torch.no_grad()
    def training(self) -> tuple[Tensor, Tensor] | None:
        """log SNR of training times, and the weight of the error of v at each; None for distilled models.

        |v - vhat|^2 = (1 + SNR) |x - xhat|^2 in the variance-preserving units of Salimans & Ho (2022,
        arXiv:2202.00512): it is of order 1 at every noise level, so its weight says where the training spends itself.
        """
        if not self.has_score():
            return None
        model = self.model
        t, _, correction = model.draw_times(Noise(self.seed, "times", n=DRAWS, block=DRAWS, device=model.device))
        t, log_snr = t.cpu(), self.schedule.log_snr(t.cpu())
        weighting = "likelihood" if model.config.loss == "bound" else model.config.weighting
        if weighting == "uniform":
            to_x = conversion(model.config.prediction, "x0", t, self.schedule, model.data_std)[1]
            weight = to_x.square().reciprocal()
        else:
            weight = WEIGHTINGS[weighting](self.schedule, t)
        return log_snr, correction.cpu() * weight * torch.sigmoid(-log_snr)

    def has_score(self) -> bool:
        """Whether the network was trained to denoise data with independent noise; distilled ones were not."""
        return "log_prob" in self.model.abilities() and not self.model.flow_only


def spread(n: int, most: int) -> list[int]:
    """At most `most` of 0 .. n - 1, evenly, with both ends."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


def in_turn(condition: Tensor | None, n: int, total: int) -> list[int]:
    """Indices of n of `total` examples, or all; with classes (total,) these take turns."""
    if condition is None or condition.ndim > 1:
        return list(range(min(n, total)))
    seen: dict[int, int] = {}
    ranked = []
    for i, label in enumerate(condition.tolist()):
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], label, i))
    return [i for *_, i in sorted(ranked)[:n]]


def title(label: tuple[str, str]) -> str:
    """A time in words, on two lines."""
    return "data" if label[0] == "data" else f"t = {label[0]}\nlog SNR {label[1]}"


def _on_cpu(schedule: NoiseSchedule) -> NoiseSchedule:
    return copy.deepcopy(schedule).cpu().requires_grad_(False) if isinstance(schedule, nn.Module) else schedule
