"""Diffusion models: learn to undo noise."""

from trilemma.core.registry import register
from trilemma.diffusion.ddpm import DDPM

register("ddpm", DDPM, family="diffusion", paper="Ho et al. 2020, arXiv:2006.11239")
