"""The smallest models with one and with two objectives, whose right answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.core.model import GenerativeModel, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise
from trilemma.core.registry import register
from trilemma.core.score import Score
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.data.dataset import Dataset, from_tensors

POINTS = DataSpec(kind="points", shape=(2,))


def gaussian_points(n: int = 400, seed: int = 0) -> Dataset:
    """A correlated Gaussian with mean (1, -2)."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    x = z @ torch.tensor([[1.0, 0.5], [0.0, 2.0]]) + torch.tensor([1.0, -2.0])
    return from_tensors(x, POINTS, name="gaussian")


class Gaussian(GenerativeModel):
    """A diagonal Gaussian by maximum likelihood: one objective."""

    class Config(ModelConfig):
        lr: float = Field(0.05, gt=0)

    def build(self) -> None:
        self.mu = nn.Parameter(0.1 * torch.randn(self.codec.shape))
        self.log_std = nn.Parameter(torch.full(self.codec.shape, 0.5))

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit(train.head(len(train)).x)

    def objectives(self) -> Sequence[Objective]:
        return [
            Objective("nll", self.parameters(), self.loss, optimizer=OptimizerConfig(lr=self.config.lr), validate=True)
        ]

    def loss(self, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        y = y + 0.01 * step.noise.normal_like(y)
        return -self._density(y).mean(), {"mu": self.mu.mean()}

    def _density(self, y: Tensor) -> Tensor:
        z = (y - self.mu) / self.log_std.exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        return self.mu + self.log_std.exp() * noise.normal(*self.codec.shape, dtype=self.dtype)

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        return Score(self._density(y), "exact")


class TinyGAN(GenerativeModel):
    """A linear generator against a quadratic critic: two objectives, the first with two turns."""

    class Config(ModelConfig):
        penalty: float = 0.1

    def build(self) -> None:
        d = self.codec.dims
        self.generator = nn.Linear(2, d)
        self.critic = nn.Sequential(nn.Linear(d, 8), nn.Softplus(), nn.Linear(8, 1))

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit(train.head(len(train)).x)

    def objectives(self) -> Sequence[Objective]:
        return [
            Objective("critic", self.critic.parameters(), self.critic_loss, turns=2, double_backward=True),
            Objective("generator", self.generator.parameters(), self.generator_loss),
        ]

    def _pair(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        return y.flatten(1), self.generator(step.noise.normal(2, dtype=self.dtype))

    def critic_loss(self, batch: Batch, step: Step) -> Tensor:
        real, fake = self._pair(batch, step)
        real = real.requires_grad_()
        out = self.critic(real)
        (gradient,) = torch.autograd.grad(out.sum(), real, create_graph=True)
        penalty = gradient.square().sum(1).mean()
        return nn.functional.softplus(self.critic(fake) - out).mean() + self.config.penalty * penalty

    def generator_loss(self, batch: Batch, step: Step) -> Tensor:
        real, fake = self._pair(batch, step)
        return nn.functional.softplus(self.critic(real) - self.critic(fake)).mean()

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        return self.generator(noise.normal(2, dtype=self.dtype)).reshape(noise.n, *self.codec.shape)


class Regression(GenerativeModel):
    """p(y | c) = N(W c + b, s^2) by maximum likelihood, for every kind of data and of condition."""

    condition_kinds = frozenset({"class", "vector", "image", "sequence"})
    data_kinds = GenerativeModel.data_kinds | {"volume"}

    def build(self) -> None:
        spec = self.condition
        if spec is not None:
            inputs = spec.size if spec.kind == "class" else math.prod(spec.value_shape)
            self.weight = nn.Parameter(0.1 * torch.randn(inputs, self.codec.dims))
        self.bias = nn.Parameter(torch.zeros(self.codec.dims))
        self.log_std = nn.Parameter(torch.zeros(()))

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit_split(train)

    def objectives(self) -> Sequence[Objective]:
        return [Objective("nll", self.parameters(), self.loss, optimizer=OptimizerConfig(lr=0.05), validate=True)]

    def mean(self, condition: Tensor | None) -> Tensor:
        if self.condition is None or condition is None:
            return self.bias
        one_hot = self.condition.kind == "class"
        c = nn.functional.one_hot(condition, self.condition.size) if one_hot else condition
        return c.flatten(1).to(self.dtype) @ self.weight + self.bias

    def loss(self, batch: Batch, step: Step) -> Tensor:
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        return -self._log_prob(y, batch.condition, step.noise).value.mean()

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        z = noise.normal(self.codec.dims, dtype=self.dtype)
        return (self.mean(condition) + self.log_std.exp() * z).reshape(-1, *self.codec.shape)

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        z = (y.flatten(1) - self.mean(condition)) / self.log_std.exp()
        return Score((-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(1), "exact")


register("toy-gaussian", Gaussian, family="toy", paper="none")
register("toy-gan", TinyGAN, family="toy", paper="none")
register("toy-regression", Regression, family="toy", paper="none")
