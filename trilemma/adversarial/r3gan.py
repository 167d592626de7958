r"""R3GAN: a generator and a critic in the regularised relativistic game (Huang et al. 2024, arXiv:2501.05441).

    z ~ N(0, I),  x = G(z, c),
    L_D = E softplus(D(G(z)) - D(x)) + (gamma / 2) (R1 + R2),    L_G = E softplus(D(x) - D(G(z)))
(`trilemma.adversarial.losses`). With both penalties the game converges, so no trick beyond it is needed: no
normalisation, no spectral constraint, no mini-batch statistics. Both networks are plain residual networks whose
blocks start as the identity. A condition c enters every block of both, and each real example is paired with a fake
one of the same condition. gamma falls by a cosine to a tenth of its first value over the training budget, as the
critic needs less smoothing the closer the two distributions are.

A GAN has samples, and no likelihood: `log_prob` does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.adversarial.losses import (
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    squared_gradient,
)
from trilemma.core.codec import ColumnCodec, TableCodec
from trilemma.core.model import GenerativeModel, Losses, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.embedding import FourierMLP
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.resnet import ResNetDecoder, ResNetEncoder

FINAL_GAMMA = 0.1
"""Last gamma over first gamma."""

FAST = {"lr": 5e-3, "betas": (0.0, 0.9)}
"""Optimiser settings of small networks, which bear larger steps."""


class R3GANConfig(ModelConfig):
    """Settings of R3GAN."""

    z_dim: int = Field(64, ge=1, description="dimensions of the latent z")
    width: int = Field(64, ge=1, description="channels at full resolution, or hidden units for points and tables")
    depth: int = Field(1, ge=1, description="residual blocks per resolution, or in all for points and tables")
    gamma: float = Field(1.0, ge=0, description="weight of the gradient penalties R1 and R2 at the start")
    condition_dim: int = Field(32, ge=1, description="length of the condition's embedding")
    generator: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.0, 0.95), eps=1e-8, weight_decay=0.0)
    discriminator: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.0, 0.95), eps=1e-8, weight_decay=0.0)


class R3GAN(GenerativeModel):
    """The relativistic GAN with R1 and R2 penalties."""

    Config = R3GANConfig
    config: R3GANConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class", "vector"})
    space = "onehot"
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 64, "ema": 0.999}

    @classmethod
    def sized_for(cls, spec: DataSpec) -> dict[str, Any]:
        if spec.kind in ("points", "table"):
            small = {"z_dim": max(2, min(64, spec.dims)), "depth": 3, "gamma": 0.2}
            return {**small, "generator": FAST, "discriminator": FAST}
        if spec.dims <= 256:
            return {"z_dim": 16, "width": 16, "gamma": 1.0, "generator": FAST, "discriminator": FAST}
        return {"width": 32 if spec.dims <= 1024 else 64}

    def build(self) -> None:
        c, shape = self.config, self.codec.shape
        self.embed_g = ConditionEmbedding(self.condition, c.condition_dim)
        self.embed_d = ConditionEmbedding(self.condition, c.condition_dim)
        w, d, e = c.width, c.depth, self.embed_g.dim
        self.g: nn.Module
        self.d: nn.Module
        if len(shape) == 1:
            self.g = ResidualMLP(c.z_dim, shape[0], width=w, depth=d, context_dim=e)
            self.d = FourierMLP(shape[0], 1, width=w, depth=d, context_dim=e)
        else:
            self.g = ResNetDecoder(c.z_dim, shape, width=w, depth=d, context_dim=e)
            self.d = ResNetEncoder(shape, 1, width=w, depth=d, context_dim=e)

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit_split(train)

    def objectives(self) -> Sequence[Objective]:
        d = [*self.d.parameters(), *self.embed_d.parameters()]
        g = [*self.g.parameters(), *self.embed_g.parameters()]
        return [
            Objective(
                "discriminator", d, self.discriminator_loss, optimizer=self.config.discriminator, double_backward=True
            ),
            Objective("generator", g, self.generator_loss, optimizer=self.config.generator),
        ]

    def generate(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """z (N, z_dim) -> y (N, *codec.shape); the dimensions of a category are probabilities."""
        y: Tensor = self.g(z, self.embed_g(condition))
        transform = next(iter(self.codec.transforms), None)
        if not isinstance(transform, TableCodec):
            return y
        columns: list[ColumnCodec] = list(transform.columns)  # type: ignore[arg-type]
        parts = torch.split(y, transform.widths, 1)
        return torch.cat([p.softmax(1) if c.onehot else p for c, p in zip(columns, parts, strict=True)], 1)

    def criticize(self, y: Tensor, condition: Tensor | None) -> Tensor:
        """The critic D: y (N, *codec.shape) -> (N,); the larger, the more real."""
        value: Tensor = self.d(y, self.embed_d(condition))
        return value.squeeze(1)

    def gamma(self, progress: float) -> float:
        """Weight of the penalties when the fraction `progress` of the budget is spent."""
        fraction = FINAL_GAMMA + (1.0 - FINAL_GAMMA) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.config.gamma * fraction

    def discriminator_loss(self, batch: Batch, step: Step) -> Losses:
        """L_D; logs the game's value and both penalties."""
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        with torch.no_grad():
            fake = self.generate(step.noise.normal(self.config.z_dim, dtype=self.dtype), batch.condition)
        # One pass over real and fake together: no example influences another, so it equals two passes.
        both = torch.cat([y, fake]).requires_grad_()
        condition = None if batch.condition is None else torch.cat([batch.condition, batch.condition])
        values = self.criticize(both, condition)
        real, fake = values.chunk(2)
        r1, r2 = (part.mean() for part in squared_gradient(values, both).chunk(2))
        game = relativistic_discriminator_loss(real, fake)
        return game + 0.5 * self.gamma(step.progress) * (r1 + r2), {"game": game, "r1": r1, "r2": r2}

    def generator_loss(self, batch: Batch, step: Step) -> Losses:
        """L_G."""
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        fake = self.generate(step.noise.normal(self.config.z_dim, dtype=self.dtype), batch.condition)
        with torch.no_grad():
            d_real = self.criticize(y, batch.condition)
        return relativistic_generator_loss(d_real, self.criticize(fake, batch.condition))

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The generator: z (N, z_dim) -> y (N, *shape)."""
        inputs = (torch.zeros(2, self.config.z_dim, dtype=self.dtype, device=self.device), *self.example_condition(2))
        return lambda z, condition=None: self.generate(z, condition), inputs

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        return self._decode(self._prior(noise), condition)

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(self.config.z_dim, dtype=self.dtype)

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.generate(z, condition)
