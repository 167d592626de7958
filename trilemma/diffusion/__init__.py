"""Diffusion models: learn to undo noise. The models of the literature are choices of a few parts."""

from trilemma.core.registry import register
from trilemma.diffusion.presets import PRESETS

for preset in PRESETS:
    register(preset.name, preset.model, family="diffusion", paper=preset.paper, settings=preset.settings)
