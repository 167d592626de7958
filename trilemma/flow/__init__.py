"""Normalizing flows: invertible maps of the data to noise, with exact likelihoods."""

from trilemma.core.registry import register
from trilemma.flow.presets import PRESETS

for preset in PRESETS:
    register(preset.name, preset.model, family="flow", paper=preset.paper, settings=preset.settings)
