"""Normalizing flows: invertible maps of the data to noise, with exact likelihoods."""

from trilemma.core.registry import register
from trilemma.flow.nsf import NSF

register("nsf", NSF, family="flow", paper="Durkan et al. 2019, arXiv:1906.04032")
