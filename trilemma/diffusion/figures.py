"""Figures of a schedule: its curves; chains against the kernel; the reverse that is and is not Gaussian."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from trilemma.core.noise import make_generator
from trilemma.data.film import INK, style
from trilemma.data.render import PALETTE
from trilemma.diffusion.drawing import time_label
from trilemma.diffusion.exact import MixtureDenoiser
from trilemma.diffusion.process import even_times, forward_chain, posteriors
from trilemma.diffusion.schedule import NoiseSchedule

CHAIN_STEPS = 100
CHAINS, PATHS = 20_000, 200
"""Chains simulated, and those of them drawn."""

START = 1.5
"""x of the chains."""

SHORT, LONG = 0.2, 4.0
"""Steps in log SNR of the figure of posteriors."""


def simulated_kernel(schedule: NoiseSchedule, seed: int) -> tuple[Tensor, Tensor]:
    """Times (T,) and chains (T, CHAINS) from x = START."""
    generator = make_generator(seed, "kernel")
    times, x = even_times(schedule, CHAIN_STEPS + 1), torch.full((CHAINS,), START, dtype=torch.float64)
    return times, forward_chain(
        schedule, x, times, lambda: torch.randn(CHAINS, generator=generator, dtype=torch.float64)
    )


@style
def kernel_figure(schedule: NoiseSchedule, seed: int) -> Figure:
    """Paths of q(z_t | z_s), step by step, with mean and 1, 2 sigma of q(z_t | x); where they end, and the prior."""
    times, chains = simulated_kernel(schedule, seed)
    t, mean, sigma = times.numpy(), (schedule.alpha(times) * START).numpy(), schedule.sigma(times).numpy()
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes, end = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1.0))
    axes.plot(t, chains[:, :PATHS].numpy(), color=PALETTE[0], alpha=0.12, linewidth=0.6)
    for width, line in ((1, "--"), (2, ":")):
        for side in (-width, width):
            label = f"±{width} sigma" if side > 0 else None
            axes.plot(t, mean + side * sigma, line, color=INK, linewidth=1.1, label=label)
    axes.plot(t, mean, color=PALETTE[1], linewidth=1.6, label=f"alpha x,  x = {START:g}")
    axes.plot([], [], color=PALETTE[0], alpha=0.6, linewidth=1.0, label=f"{PATHS} chains of {len(t) - 1} transitions")
    axes.set_title("q(z_t | x): lines.  Chains of q(z_t | z_s): paths", loc="left")
    axes.set_xlabel("t")
    axes.set_ylabel("z_t")
    axes.margins(x=0.0)
    axes.legend(loc="upper left", ncols=2, columnspacing=1.2)
    final, prior = chains[-1].numpy(), schedule.prior_std
    reach = max(3.2 * float(sigma[-1]) + abs(float(mean[-1])), 3.2 * prior, float((mean + 2 * sigma).max()))
    axes.set_ylim(-reach, 1.45 * reach)
    place = np.linspace(-reach, reach, 400)
    end.hist(
        final,
        bins=60,
        range=(-reach, reach),
        density=True,
        orientation="horizontal",
        histtype="stepfilled",
        color=PALETTE[0],
        alpha=0.5,
    )
    end.plot(
        _normal(place, float(mean[-1]), float(sigma[-1])), place, color=PALETTE[1], linewidth=1.6, label="q(z | x)"
    )
    end.plot(_normal(place, 0.0, prior), place, "--", color=INK, linewidth=1.1, label="prior")
    end.set_title("last time", loc="left")
    end.set_xlabel("density")
    end.legend(loc="upper right")
    end.locator_params(axis="x", nbins=3)
    return figure


def _normal(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


def two_modes(schedule: NoiseSchedule) -> MixtureDenoiser:
    """Two narrow modes at -1 and 1."""
    half = torch.full((2,), 0.5, dtype=torch.float64)
    return MixtureDenoiser(schedule, half, torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.4 * half)


def posterior_times(schedule: NoiseSchedule) -> list[tuple[Tensor, list[Tensor]]]:
    """A few t, each with an s for a short and for a long step."""
    high, low = (float(v) for v in schedule.log_snr(torch.stack(schedule.times)).detach())
    found = []
    for wanted in (2.5, 0.0, -3.0):
        here = min(max(wanted, low + 0.1), high - 1.0)
        log_snr = torch.tensor([here, here + SHORT, min(here + LONG, high)], dtype=torch.float64)
        t, short, long = schedule.time(log_snr).detach().clamp(schedule.t_min, schedule.t_max)
        found.append((t, [short, long]))
    return found


@style
def posterior_figure(schedule: NoiseSchedule) -> Figure:
    """q(z_t | z_s), q(z_s | z_t) and q(z_s | z_t, x) for data of two modes, for short and long steps at a few t."""
    mixture, times = two_modes(schedule), posterior_times(schedule)
    figure = Figure(figsize=(9.0, 4.9), layout="constrained")
    grid = figure.subplots(2, len(times), squeeze=False)
    for column, (t, ends) in enumerate(times):
        z = 0.1 * math.hypot(float(schedule.alpha(t)), float(schedule.sigma(t)))
        for axes, s, name in zip(grid[:, column], ends, ("short", "long"), strict=True):
            distance = _draw_posteriors(axes, mixture, t, s, z)
            (at, snr), (to, snr_to) = time_label(schedule, t), time_label(schedule, s)
            axes.set_title(
                f"{name} step, t = {at} → s = {to}\nlog SNR {snr} → {snr_to},  KL {distance:.2g}", loc="left"
            )
            if column == 0:
                axes.set_ylabel("density")
    for axes in grid[-1]:
        axes.set_xlabel("z_t, or z_s")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="none"))
    labels.append("KL: q(z_s | z_t) to a Gaussian, nats")
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _draw_posteriors(axes: Axes, mixture: MixtureDenoiser, t: Tensor, s: Tensor, z: float) -> float:
    """Draw, and return how far q(z_s | z_t) is from a Gaussian."""
    found = posteriors(mixture, t, s, z, 1.0)
    value = found.value.numpy()
    curves = (
        (found.forward, "q(z_t | z_s)", ":", INK), (found.known, "q(z_s | z_t, x = 1)", "--", PALETTE[0]),
        (found.reverse, "q(z_s | z_t)", "-", PALETTE[1]),
    )  # fmt: skip
    for density, label, line, colour in curves:
        axes.plot(value, density.numpy(), line, color=colour, label=label, linewidth=1.5)
    axes.axvline(z, color=INK, alpha=0.35, linewidth=0.9, label="the z_t that was seen")
    highest = [float(density.max()) for density, *_ in curves]
    seen = torch.stack([density > 1e-3 * density.max() for density, *_ in curves]).any(0).numpy()
    axes.set_xlim(value[seen].min(), value[seen].max())
    axes.set_ylim(0.0, 1.15 * min(max(highest), 2.5 * max(highest[0], highest[2])))
    axes.locator_params(nbins=4)
    return found.distance


@style
def schedule_figure(schedule: NoiseSchedule, t: Tensor, training: tuple[Tensor, Tensor] | None) -> Figure:
    """alpha and sigma, log SNR, and where in log SNR the training spends itself.

    Arguments:
        t: rising times (T,).
        training: log SNR of training times (N,), and their weights (N,).
    """
    panels = 2 if training is None else 3
    figure = Figure(figsize=(3.0 * panels, 2.7), layout="constrained")
    levels, snr, *rest = figure.subplots(1, panels)
    levels.plot(t, schedule.alpha(t), color=PALETTE[0], label="alpha")
    levels.plot(t, schedule.sigma(t), color=PALETTE[1], label="sigma")
    levels.set_title("signal and noise", loc="left")
    if schedule.prior_std > 3.0:
        levels.set_yscale("log")
    levels.legend()
    log_snr = schedule.log_snr(t)
    snr.plot(t, torch.where(log_snr.isfinite(), log_snr, math.nan), color=PALETTE[2])
    snr.axhline(0.0, color=INK, alpha=0.3, linewidth=0.8)
    snr.set_title("log SNR", loc="left")
    for axes in (levels, snr):
        axes.set_xlabel("t")
        if schedule.grid == "karras":
            axes.set_xscale("log")
    if training is not None:
        _draw_training(rest[0], *training)
    return figure


def _draw_training(axes: Axes, log_snr: Tensor, weight: Tensor) -> None:
    """Densities in log SNR of the training times, and of these times their weights; the outermost 0.1% is cut."""
    ends = np.quantile(log_snr[log_snr.isfinite()], (0.0005, 0.9995))
    drawn: tuple[tuple[Tensor, str, dict[str, Any]], ...] = (
        (torch.ones_like(weight), "times", {"color": PALETTE[3], "linewidth": 4.0, "alpha": 0.4}),
        (weight, "times × weight of the error of v", {"color": PALETTE[4], "linewidth": 1.4}),
    )
    for values, label, look in drawn:
        height, edges = np.histogram(log_snr, bins=50, range=tuple(ends), weights=values, density=True)
        axes.stairs(height, edges, baseline=None, label=label, **look)
    axes.set_title("training", loc="left")
    axes.set_xlabel("log SNR")
    axes.set_ylabel("density")
    axes.set_ylim(0.0, 1.4 * axes.dataLim.ymax)
    axes.legend(loc="upper right")
