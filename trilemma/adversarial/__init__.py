"""Adversarial models: a generator against a discriminator."""

from trilemma.adversarial.model import GAN
from trilemma.adversarial.presets import PRESETS
from trilemma.core.registry import register

for preset in PRESETS:
    register(preset.name, GAN, family="adversarial", paper=preset.paper, settings=preset.settings)
