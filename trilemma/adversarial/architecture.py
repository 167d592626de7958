"""The networks of an adversarial model from its settings and the shape of its data."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from trilemma.adversarial.biggan import BigGANGenerator, BigGANTrunk
from trilemma.adversarial.dcgan import DCGANDecoder, DCGANTrunk
from trilemma.adversarial.discriminator import Discriminator, NetworkTrunk
from trilemma.adversarial.generator import DirectGenerator, Generator
from trilemma.adversarial.penalties import spectral_normalize
from trilemma.adversarial.settings import STYLE, GANConfig
from trilemma.adversarial.stylegan2 import StyleGAN2Generator, StyleGAN2Trunk
from trilemma.adversarial.stylegan3 import StyleGAN3Generator
from trilemma.core.spec import ConditionSpec
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.embedding import FourierMLP
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.resnet import ResNetDecoder, ResNetEncoder


def build_generator(c: GANConfig, shape: tuple[int, ...], condition: ConditionSpec | None) -> Generator:
    """The generator of data of this shape in model space."""
    style: dict[str, Any] = {
        "w_dim": c.w_dim or c.z_dim,
        "width": c.width,
        "mapping_depth": c.mapping_depth or 2,
    }
    generator: Generator
    if c.architecture == "stylegan2":
        generator = StyleGAN2Generator(shape, c.z_dim, condition, **style, output=c.output or "skip")
    elif c.architecture == "stylegan3":
        generator = StyleGAN3Generator(shape, c.z_dim, condition, **style, rotation=bool(c.rotation))
    elif c.architecture == "biggan" and len(shape) > 1:
        generator = BigGANGenerator(shape, c.z_dim, condition, c.condition_dim, width=c.width)
    else:
        embed = ConditionEmbedding(condition, c.condition_dim)
        generator = DirectGenerator(_direct_network(c, shape, embed.dim), embed, c.z_dim, shape)
    if c.spectral_norm == "both":
        spectral_normalize(generator)
    return generator


def _direct_network(c: GANConfig, shape: tuple[int, ...], context_dim: int) -> nn.Module:
    """z, context -> y, perhaps flat."""
    depth = 1 if c.depth is None else c.depth
    if c.architecture == "mlp" or len(shape) == 1:
        return ResidualMLP(c.z_dim, math.prod(shape), width=c.width, depth=depth, context_dim=context_dim)
    if c.architecture == "dcgan":
        return DCGANDecoder(c.z_dim, shape, width=c.width, context_dim=context_dim)
    return ResNetDecoder(c.z_dim, shape, width=c.width, depth=depth, context_dim=context_dim)


def build_discriminator(c: GANConfig, shape: tuple[int, ...], condition: ConditionSpec | None) -> Discriminator:
    """The discriminator of data of this shape in model space."""
    discriminator = Discriminator(_trunk(c, shape), condition, normalized=c.spectral_norm != "none")
    if c.spectral_norm != "none":
        spectral_normalize(discriminator)
    return discriminator


def _trunk(c: GANConfig, shape: tuple[int, ...]) -> nn.Module:
    depth = 1 if c.depth is None else c.depth
    if c.architecture == "mlp":
        return NetworkTrunk(ResidualMLP(math.prod(shape), None, width=c.width, depth=depth), flat=True)
    if len(shape) == 1:
        # Waves of each coordinate show narrow modes.
        return NetworkTrunk(FourierMLP(shape[0], None, width=c.width, depth=depth), flat=True)
    if c.architecture == "dcgan":
        return DCGANTrunk(shape, width=c.width, batch_norm=c.batch_norm is not False)
    if c.architecture == "biggan":
        return BigGANTrunk(shape, width=c.width)
    if c.architecture in STYLE:
        return StyleGAN2Trunk(shape, width=c.width, minibatch_std=c.minibatch_std is not False)
    return NetworkTrunk(ResNetEncoder(shape, None, width=c.width, depth=depth))
