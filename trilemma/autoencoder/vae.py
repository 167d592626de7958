r"""Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114; Rezende et al. 2014, arXiv:1401.4082).

    p(x) = \int p(x | z) N(z; 0, I) dz,        q(z | x) = N(mu(x), diag exp(logvar(x))),
    log p(x) >= ELBO = E_q[log p(x | z)] - KL(q(z | x) || N(0, I)),
    KL = 1/2 sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j).
Training maximises the ELBO with one draw z = mu + exp(logvar / 2) eps (the reparametrisation). With beta != 1 the
KL is weighted (Higgins et al. 2017, "beta-VAE"), and what is maximised is no longer a bound.

Likelihoods are the importance-weighted bound of K draws (Burda et al. 2016, arXiv:1509.00519),
    log p(x) >= E log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x),
which is the ELBO at K = 1, rises with K and tends to log p(x). p(x | z) is discretized logistic for data with
levels, so the bound is one of probabilities and needs no dequantization, and Gaussian for all else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from trilemma.autoencoder.observation import DiscretizedLogistic, Gaussian, Observation
from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.resnet import ResNetDecoder, ResNetEncoder

FLAT_DIMS = 1024
"""Pictures with more dimensions take convolutional networks."""


INITIAL_SCALE = 0.1
"""Where the scale of p(x | z) starts. A large one makes the reconstruction so cheap that the posterior collapses
onto the prior and stays there (Lucas et al. 2019, arXiv:1911.02469)."""

RAW_START = math.log(math.expm1(INITIAL_SCALE))


class VAEConfig(ModelConfig):
    """Settings of the VAE."""

    latent_dim: int = Field(32, ge=1, description="dimensions of z")
    width: int = Field(128, ge=1, description="hidden units; for pictures, channels at full resolution")
    depth: int = Field(2, ge=0, description="residual blocks; for pictures, per resolution")
    beta: float = Field(1.0, ge=0, description="weight of the KL term; the ELBO has 1")
    warmup: float = Field(
        0.1, ge=0, le=1, description="fraction of the training budget over which the weight of the KL rises from 0"
    )
    scale: Literal["dimension", "decoder"] = Field(
        "decoder", description="the scale of p(x | z): one for each dimension, or a function of z"
    )
    min_scale: float = Field(1e-3, gt=0, description="smallest scale of p(x | z), which bounds a density")
    context_dim: int = Field(32, ge=1, description="size of the embedding of the condition")
    net: Literal["mlp", "conv"] = Field("mlp", description="networks on flat vectors, or convolutional ones")
    optimizer: OptimizerConfig = Field(OptimizerConfig(lr=3e-3, weight_decay=0.01), description="AdamW settings")


class VAE(GenerativeModel):
    """Gaussian prior, Gaussian encoder, location-scale decoder."""

    Config: ClassVar[type[ModelConfig]] = VAEConfig
    config: VAEConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class", "vector"})
    space = "center"
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128, "ema": 0.999}

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Flat networks up to `FLAT_DIMS` dimensions, where they learn several times faster on a CPU."""
        if spec.kind == "image" and spec.dims > FLAT_DIMS:
            return {"net": "conv", "width": 32, "depth": 1, "latent_dim": 128, "optimizer": OptimizerConfig(lr=1e-3)}
        return {"latent_dim": min(32, 2 * spec.dims)}

    def build(self) -> None:
        c, shape = self.config, self.codec.shape
        self.context = ConditionEmbedding(self.condition, c.context_dim)
        outputs = 2 if c.scale == "decoder" else 1
        self.encoder: nn.Module
        self.decoder: nn.Module
        sizes: dict[str, Any] = {"width": c.width, "depth": c.depth, "context_dim": self.context.dim}
        if c.net == "conv":
            if self.spec.kind not in ("image", "signal"):
                raise UsageError(
                    f"{self.name}: net=conv needs pictures or signals, not {self.spec.kind} data; use net=mlp"
                )
            self.encoder = ResNetEncoder(shape, 2 * c.latent_dim, **sizes, norm=True)
            self.decoder = ResNetDecoder(c.latent_dim, (outputs * shape[0], *shape[1:]), **sizes, norm=True)
        else:
            self.encoder = ResidualMLP(self.codec.dims, 2 * c.latent_dim, **sizes)
            self.decoder = ResidualMLP(c.latent_dim, outputs * self.codec.dims, **sizes)
        if c.scale == "dimension":
            self.raw_scale = nn.Parameter(torch.zeros(shape))

    @property
    def observation(self) -> Observation:
        """p(x | z)."""
        if self.codec.discrete:
            assert self.spec.levels is not None
            return DiscretizedLogistic(self.spec.levels)
        return Gaussian()

    def posterior(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu and logvar, (N, latent_dim) each, of q(z | y)."""
        x = y if isinstance(self.encoder, ResNetEncoder) else y.flatten(1)
        mu, logvar = self.encoder(x, context).to(y.dtype).chunk(2, 1)
        return mu, logvar

    def likelihood(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu (N, *shape) and s, which broadcasts to it, of p(y | z)."""
        shape = self.codec.shape
        out = self.decoder(z, context).to(z.dtype)
        if self.config.scale == "decoder":
            mu, raw = out.chunk(2, 1)
            raw = raw.reshape(-1, *shape)
        else:
            mu, raw = out, self.raw_scale
        return mu.reshape(-1, *shape), self.config.min_scale + softplus(raw + RAW_START)

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit_split(train)

    def objectives(self) -> Sequence[Objective]:
        return (Objective("elbo", self.parameters(), self.loss, optimizer=self.config.optimizer, validate=True),)

    def loss(self, batch: Batch, step: Step) -> Losses:
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        context = self.context(batch.condition)
        mu, logvar = self.posterior(y, context)
        z = mu + (0.5 * logvar).exp() * step.noise.normal_like(mu)
        reconstruction = -self.observation.log_prob(y, *self.likelihood(z, context)).mean() / self.codec.dims
        kl = kl_to_standard_normal(mu, logvar).mean() / self.codec.dims
        return reconstruction + self._kl_weight(step) * kl, {"reconstruction": reconstruction, "kl": kl}

    def _kl_weight(self, step: Step) -> float:
        """beta, reached linearly over the warm-up (Sonderby et al. 2016, arXiv:1602.02282); validates with beta."""
        c = self.config
        return c.beta * min(1.0, step.progress / c.warmup) if c.warmup else c.beta

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise, *, samples: int = 64) -> Score:
        """`samples` is K; the work grows with it, the memory does not."""
        if samples < 1:
            raise UsageError(f"log_prob of {self.name} needs samples >= 1, got {samples}")
        context = self.context(condition)
        mu, logvar = self.posterior(y, context)
        log_weights = []
        for _ in range(samples):
            eps = noise.normal_like(mu)
            z = mu + (0.5 * logvar).exp() * eps
            # log p(z) - log q(z | y); the two constants cancel
            log_ratio = 0.5 * (eps.square() + logvar - z.square()).sum(1)
            log_weights.append(self.observation.log_prob(y, *self.likelihood(z, context)) + log_ratio)
        return Score(torch.stack(log_weights).logsumexp(0) - math.log(samples), "lower_bound")

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The decoder: z (N, latent_dim) -> the mean of p(y | z)."""
        inputs = (
            torch.zeros(2, self.config.latent_dim, dtype=self.dtype, device=self.device),
            *self.example_condition(2),
        )
        return lambda z, condition=None: self._decode(z, condition), inputs

    def _sample(self, noise: Noise, condition: Tensor | None, *, observation_noise: bool = True) -> Tensor:
        """x ~ p(x | z) is the model's own distribution; without `observation_noise` x is the mean of p(x | z)."""
        mu, s = self.likelihood(self._prior(noise), self.context(condition))
        return self.observation.sample(mu, s, noise) if observation_noise else self.observation.mean(mu, s)

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(self.config.latent_dim, dtype=self.dtype)

    def _encode(self, y: Tensor, condition: Tensor | None) -> Tensor:
        return self.posterior(y, self.context(condition))[0]

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.observation.mean(*self.likelihood(z, self.context(condition)))


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag exp(logvar)) || N(0, I)) for mu, logvar (N, D): (N,) in nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).sum(1)
