"""Adversarial models: a generator against a critic."""

from trilemma.adversarial.r3gan import R3GAN
from trilemma.core.registry import register

register("r3gan", R3GAN, family="adversarial", paper="Huang et al. 2024, arXiv:2501.05441")
