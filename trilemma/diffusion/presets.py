"""The models of the literature as choices of parts: schedule, prediction, objective, variance, solver.

`diffusion` is the defaults of the settings: on small data and budgets it is the best of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trilemma.diffusion.consistency import Consistency
from trilemma.diffusion.distillation import Progressive, Reflow
from trilemma.diffusion.model import Diffusion


@dataclass(frozen=True)
class Preset:
    """A name, its paper, and the settings that make `model` that paper's."""

    name: str
    paper: str
    settings: Mapping[str, Any]
    model: type[Diffusion] = Diffusion


_SCORE_SDE = "Song et al. 2021, arXiv:2011.13456"
_VP = {"schedule": "vp", "prediction": "eps", "variance": "optimal", "sampler": "dpm++", "sampling_steps": 30}
_VE = {
    "schedule": "ve", "prediction": "eps", "variance": "optimal", "time_embedding": "fourier", "scale_input": True,
    "sampler": "pc", "sampling_steps": 100,
}  # fmt: skip
_FLOW = {
    "schedule": "rectified",
    "prediction": "velocity",
    "variance": "optimal",
    "sampler": "heun",
    "sampling_steps": 16,
}

PRESETS = (
    Preset("diffusion", "Salimans & Ho 2022, arXiv:2202.00512; Bao et al. 2022, arXiv:2201.06503", {}),
    Preset(
        "ddpm",
        "Ho et al. 2020, arXiv:2006.11239",
        {
            "schedule": "linear",
            "timesteps": 1000,
            "prediction": "eps",
            "variance": "large",
            "sampler": "ancestral",
            "sampling_steps": 100,
        },
    ),
    Preset(
        "iddpm",
        "Nichol & Dhariwal 2021, arXiv:2102.09672",
        {
            "schedule": "cosine",
            "timesteps": 1000,
            "prediction": "eps",
            "variance": "learned-range",
            "loss": "hybrid",
            "sampler": "ancestral",
            "sampling_steps": 100,
            "sampling_grid": "leading",
        },
    ),
    Preset("ddpm++", _SCORE_SDE, _VP),
    Preset("vp-sde", _SCORE_SDE, _VP),
    Preset("subvp-sde", _SCORE_SDE, {**_VP, "schedule": "sub-vp"}),
    Preset("ncsn++", _SCORE_SDE, _VE),
    Preset("ve-sde", _SCORE_SDE, _VE),
    Preset(
        "edm",
        "Karras et al. 2022, arXiv:2206.00364",
        {
            "schedule": "edm",
            "prediction": "edm",
            "scale_input": True,
            "times": "log-normal",
            "variance": "optimal",
            "sampler": "heun",
            "sampling_steps": 18,
        },
    ),
    Preset(
        "vdm",
        "Kingma et al. 2021, arXiv:2107.00630",
        {
            "schedule": "learned",
            "prediction": "eps",
            "loss": "bound",
            "variance": "small",
            "sampler": "ancestral",
            "sampling_steps": 100,
        },
    ),
    Preset("flow-matching", "Lipman et al. 2023, arXiv:2210.02747", _FLOW),
    Preset("rectified-flow", "Liu et al. 2023, arXiv:2209.03003", _FLOW, Reflow),
    Preset(
        "progressive-distillation",
        "Salimans & Ho 2022, arXiv:2202.00512",
        {"weighting": "max-snr", "variance": "small", "sampler": "ddim", "sampling_steps": 1},
        Progressive,
    ),
    Preset(
        "consistency",
        "Song et al. 2023, arXiv:2303.01469; Geng et al. 2024, arXiv:2406.14548",
        {
            "schedule": "edm",
            "prediction": "edm",
            "scale_input": True,
            "times": "log-normal",
            "variance": "small",
            "sampler": "renoise",
            "sampling_steps": 2,
        },
        Consistency,
    ),
)
