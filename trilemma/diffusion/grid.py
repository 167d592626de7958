r"""Time grids: the n times t_1 > ... > t_n at which a sampler evaluates the denoiser.

    linspace    even in t, from t_max to t_min
    trailing    even in t, from t_max; a step on from the last would end at t_min (of a chain: 0) (Lin et al. 2024)
    leading     even in t, ending at t_min; it never sees t_max                              (Ho et al.'s chains, DDIM)
    karras      sigma / alpha to the power 1 / rho even, rho = 7         (Karras et al. 2022, arXiv:2206.00364, eq. 5)
    log-snr     log SNR even                                             (Lu et al. 2022, arXiv:2206.00927)

On a discrete chain the first three are rounded to its steps. The last two need a signal at t_max.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from trilemma.diffusion.schedule import Discrete, NoiseSchedule, Spacing


def time_grid(schedule: NoiseSchedule, n: int, spacing: Spacing = "linspace", rho: float = 7.0) -> Tensor:
    """(n,) float64, falling.

    Raises:
        ValueError: n < 1, more times than the chain has, or a grid in log SNR for a schedule that ends without signal.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"unknown grid {spacing!r}; there are: {', '.join(get_args(Spacing))}")
    if n < 1:
        raise ValueError(f"a sampler takes at least 1 step, got {n}")
    low, high = schedule.times
    if isinstance(schedule, Discrete) and n > schedule.steps:
        raise ValueError(
            f"the chain has {schedule.steps} steps, so between 1 and {schedule.steps} are possible, got {n}"
        )
    place = torch.linspace(0.0, 1.0, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    if spacing in ("karras", "log-snr"):
        if schedule.ends_without_signal:
            raise ValueError(f"the grid {spacing!r} needs a signal at the last time, where this schedule has none")
        ends = schedule.log_snr(torch.stack([high, low]))
        if spacing == "log-snr":
            log_snr = ends[0] + place * (ends[1] - ends[0])
        else:
            noise = (-0.5 * ends / rho).exp()  # (sigma / alpha)^(1 / rho)
            log_snr = -2.0 * rho * (noise[0] + place * (noise[1] - noise[0])).log()
        t = schedule.time(log_snr)
        t[0] = high  # not a rounding error beyond it
        if n > 1:
            t[-1] = low
        return t
    if spacing == "linspace":
        t = torch.lerp(high, low, place)  # exact at both ends
        return t.round() if isinstance(schedule, Discrete) else t
    base = 0.0 if isinstance(schedule, Discrete) else schedule.t_min  # where the step after the last would end
    left = torch.arange(n, 0, -1, dtype=torch.float64) - (0.0 if spacing == "trailing" else 1.0)
    t = base + (schedule.t_max - base) * (left / n)
    if isinstance(schedule, Discrete):
        return t.round() + (0.0 if spacing == "trailing" else 1.0)
    return t


def default_spacing(wanted: Spacing | None, schedule: NoiseSchedule) -> Spacing:
    """The spacing that a solver wants, where the schedule has it, else the schedule's own."""
    if wanted is None or (wanted in ("karras", "log-snr") and schedule.ends_without_signal):
        return schedule.grid
    return "karras" if schedule.grid == "karras" else wanted
