r"""The one-dimensional game of Goodfellow et al. 2014 (arXiv:1406.2661, figure 1), where all is known.

Data p = N(mean, std^2); q is the density of G(z), z in R; D sees one x at a time. Densities are masses in cells of the
x-axis. Those of p are exact. Those of q are the pushforward of z by G, taken as linear between 4001 nodes of z, so that
all branches count where G is not monotone. With these,
    D* = p / (p + q), or log p/q as a logit,       minimax:        min d = log 4 - 2 JSD(p, q)
    D* = log p/q up to a constant,                 relativistic:   min d = log 2 - JSD(p x q, q x p)
    D* = p / (p + q),                              least squares:  min d = 1/2 int p q / (p + q)
    D* = sign(p - q),                              hinge:          min d = 2 int min(p, q)
    D*' = sign(F_q - F_p),  F the distributions,   Wasserstein:    min d = -W1(p, q)
    W1 = int_0^1 |F_q^-1(u) - F_p^-1(u)| du,       by sorting G(z) against the quantiles of p.

D gets a start, and G descends without momentum or Adam, which would hide how small a gradient is: where D is sure of
itself, the minimax loss leaves almost none. A gradient longer than 1 is cut to 1, as the engine does. A Wasserstein
critic has its weights clipped, and is shown divided by its largest slope, so that its loss is at least -W1. (The
gradient penalty bars a slope's way through 0, the only way there is on a line.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.adversarial.diagnostics import gradient_norms
from trilemma.adversarial.losses import LOSSES, LossName
from trilemma.adversarial.penalties import clip_weights
from trilemma.core.anneal import cosine
from trilemma.core.config import Config
from trilemma.core.noise import Noise, hash_key, make_generator
from trilemma.nets.mlp import ResidualMLP

F64 = torch.float64
QUANTILES, NODES = 2048, 4001
REACH, CELL = 12.0, 0.02
"""Cells of this width cover the mean of the data plus and minus this much; the outermost are open."""
CLIP = 0.1


class Game1dConfig(Config):
    """Settings of gan-1d."""

    loss: LossName = Field("non-saturating", description=", ".join(LOSSES))
    steps: int = Field(1000, ge=1, description="steps of the generator")
    frames: int = Field(60, ge=2, description="of the film")
    turns_d: int = Field(3, ge=1, description="steps of the discriminator for each of the generator")
    head_start: int = Field(1000, ge=0, description="steps of the discriminator alone, before the first")
    batch_size: int = Field(256, ge=1)
    lr_d: float = Field(2e-3, gt=0, description="the discriminator's learning rate, of Adam")
    lr_g: float = Field(0.04, gt=0, description="the generator's learning rate, of gradient descent")
    latent: Literal["normal", "uniform"] = Field("normal", description="distribution of z, N(0, 1) or U(-1, 1)")
    mean: float = Field(3.0, ge=-6, le=6, description="of the data")
    std: float = Field(0.75, ge=0.1, le=2, description="of the data")


def frame_steps(steps: int, frames: int) -> list[int]:
    """At most so many different steps, evenly from 0 to the last."""
    return sorted({round(i * steps / (frames - 1)) for i in range(frames)})


def falling_rate(progress: float) -> float:
    """Factor on learning rates: a rise over the first 2%, then a cosine to 1%, as the engine has it."""
    if progress < 0.02:
        return max(progress / 0.02, 1e-3)
    return cosine(1.0, 0.01, (progress - 0.02) / 0.98)


# -- what is known ------------------------------------------------------------------------------------------------


def cell_edges(mean: float) -> Tensor:
    """The inner edges of the cells (K - 1,); the first and the last cell are open."""
    count = round(2 * REACH / CELL)
    return mean + CELL * (torch.arange(count + 1, dtype=F64) - count / 2)


def quantiles(n: int = QUANTILES) -> Tensor:
    """The levels (i + 1/2) / n, (n,)."""
    return (torch.arange(n, dtype=F64) + 0.5) / n


def normal_masses(mean: float, std: float, edges: Tensor) -> Tensor:
    """N(mean, std^2) in the cells between the edges (K - 1,), (K,)."""
    below = torch.special.ndtr((edges - mean) / std)
    return _masses(below)


def latent_nodes(latent: Literal["normal", "uniform"]) -> tuple[Tensor, Tensor]:
    """Even nodes of z (N,), and the probabilities of the pieces between them (N - 1,)."""
    if latent == "uniform":
        return torch.linspace(-1.0, 1.0, NODES, dtype=F64), torch.full((NODES - 1,), 1.0 / (NODES - 1), dtype=F64)
    z = torch.linspace(-8.0, 8.0, NODES, dtype=F64)
    return z, torch.special.ndtr(z).diff()


def pushed_masses(x: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """The distribution of G(z) in the cells, (K,), from x = G at nodes (N,); even within each piece between nodes."""
    low, high = torch.minimum(x[1:], x[:-1]), torch.maximum(x[1:], x[:-1])
    part = ((edges[:, None] - low) / (high - low).clamp(min=1e-12)).clamp(0.0, 1.0)
    return _masses(part @ weights)


def _masses(below: Tensor) -> Tensor:
    return torch.diff(below, prepend=below.new_zeros(1), append=below.new_ones(1))


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """JSD in nats of masses p and q of one shape: the entropy of their mean less the mean of their entropies."""
    middle, of_p, of_q = (torch.special.entr(mass).sum() for mass in (0.5 * (p + q), p, q))
    jsd: Tensor = middle - 0.5 * (of_p + of_q)
    return jsd


def wasserstein(x: Tensor, quantile: Tensor) -> Tensor:
    """W1 of G(z) at equally likely z (N,) and a distribution with these quantiles (N,), rising."""
    return (x.sort().values - quantile).abs().mean()


def least_loss(loss: LossName, p: Tensor, q: Tensor, w1: Tensor) -> Tensor:
    """The smallest loss that any D can have, of masses (K,)."""
    if loss in ("minimax", "non-saturating"):
        return math.log(4.0) - 2.0 * jensen_shannon(p, q)
    if loss == "relativistic":
        pairs = torch.outer(p, q)
        return math.log(2.0) - jensen_shannon(pairs, pairs.T)
    if loss == "least-squares":
        both = p + q
        return 0.5 * (p * q / both.clamp(min=torch.finfo(F64).tiny)).sum()
    return 2.0 * torch.minimum(p, q).sum() if loss == "hinge" else -w1


def best_critic(loss: LossName, p: Tensor, q: Tensor) -> Tensor:
    """D* as it is shown (K,): a probability, a sign or a potential; NaN where there is neither p nor q."""
    if loss == "hinge":
        best = (p - q).sign()
    elif loss == "wasserstein":
        best = CELL * torch.cumsum((torch.cumsum(q, 0) - torch.cumsum(p, 0)).sign(), 0)
        best = best - 0.5 * ((p + q) * best).sum()
    else:
        best = p / (p + q)
    return torch.where(p + q > 1e-12, best, torch.nan)


def slope(critic: Tensor) -> Tensor:
    """The largest |D'| of D at the cells (K,)."""
    return critic.diff().abs().max() / CELL


def shown_critic(loss: LossName, critic: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """D at the cells (K,) in the units of `best_critic`.

    What the loss leaves open is chosen as D* has it: over (p + q) / 2 the mean of sigma(D) is 1/2, of a potential 0.
    """
    both = 0.5 * (p + q)
    if loss == "wasserstein":
        critic = critic / slope(critic)
        return critic - (both * critic).sum()
    if loss == "relativistic":
        low, high = critic.min() - 50.0, critic.max() + 50.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = (both * (critic - middle).sigmoid()).sum() > 0.5
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (critic - low).sigmoid()
    return critic.sigmoid() if loss in ("minimax", "non-saturating") else critic


# -- the game -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State1d:
    """The game at one step; p, q, critic, best are of cells (K,), z and x quantiles of z and where G puts them (N,).

    Attributes:
        loss, least: of D, as it is on 2048 quantiles of data and of z, and at best.
        accuracy: share in [0, 1] of examples, of both kinds, or of pairs, on the right side of D.
        gradients: norm of the generator's gradient under its loss, and for minimax and non-saturating under both.
    """

    step: int
    p: Tensor
    q: Tensor
    critic: Tensor
    best: Tensor
    z: Tensor
    x: Tensor
    w1: float
    loss: float
    least: float
    accuracy: float
    gradients: dict[LossName, float]


class Game1d:
    """The players and what is known of them; everything random is a function of the seed."""

    def __init__(self, config: Game1dConfig, seed: int) -> None:
        self.config, self.seed, c = config, seed, config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash_key(seed, "gan-1d", "init"))
            self.g, self.d = (ResidualMLP(1, 1, width=32, depth=1).to(F64) for _ in range(2))
        self.loss = LOSSES[c.loss]
        self.optimizer_g = torch.optim.SGD(self.g.parameters(), lr=c.lr_g)
        self.optimizer_d = torch.optim.Adam(self.d.parameters(), lr=c.lr_d, betas=(0.5, 0.9))
        self.edges = cell_edges(c.mean)
        self.centres = torch.cat([self.edges[:1] - CELL / 2, self.edges + CELL / 2])
        self.p = normal_masses(c.mean, c.std, self.edges)
        u = quantiles()
        self.z = torch.special.ndtri(u) if c.latent == "normal" else 2.0 * u - 1.0
        self.x = c.mean + c.std * torch.special.ndtri(u)
        self.nodes, self.weights = latent_nodes(c.latent)
        self.partner = torch.randperm(QUANTILES, generator=make_generator("gan-1d", "pairs"))

    def draws(self, *key: int) -> tuple[Tensor, Tensor]:
        """A batch of data and one of z (N, 1)."""
        c = self.config
        noise = Noise(self.seed, "gan-1d", *key, n=c.batch_size, block=c.batch_size)
        x = c.mean + c.std * noise.normal(1, dtype=F64)
        return x, noise.normal(1, dtype=F64) if c.latent == "normal" else 2.0 * noise.uniform(1, dtype=F64) - 1.0

    def move_d(self, x: Tensor, z: Tensor) -> None:
        """One step of the discriminator."""
        with torch.no_grad():
            fake = self.g(z)
        d_real, d_fake = self.d(torch.cat([x, fake])).squeeze(1).chunk(2)
        self.optimizer_d.zero_grad()
        self.loss.d(d_real, d_fake).backward()  # type: ignore[no-untyped-call]
        self.optimizer_d.step()
        if self.config.loss == "wasserstein":
            clip_weights(self.d.parameters(), CLIP)

    def move_g(self, x: Tensor, z: Tensor) -> None:
        """One step of the generator."""
        self.optimizer_g.zero_grad()
        self.loss.g(self.d(self.g(z)).squeeze(1), self.d(x).squeeze(1)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.g.parameters(), 1.0)
        self.optimizer_g.step()

    def play(self) -> Iterator[State1d]:
        """The whole game, seen at `frames` steps."""
        c = self.config
        for i in range(c.head_start):
            self.move_d(*self.draws(0, i))
        seen = frame_steps(c.steps, c.frames)
        for step in range(c.steps + 1):
            if step in seen:
                yield self.state(step)
            rate = falling_rate(step / c.steps)
            self.optimizer_d.param_groups[0]["lr"] = c.lr_d * rate
            self.optimizer_g.param_groups[0]["lr"] = c.lr_g * rate
            for turn in range(c.turns_d):
                self.move_d(*self.draws(1, step, turn))
            self.move_g(*self.draws(2, step))

    def state(self, step: int) -> State1d:
        """What there is to see at this step; nothing in it is drawn at random."""
        c, p = self.config, self.p
        names: tuple[LossName, ...] = ("minimax", "non-saturating")
        names = names if c.loss in names else (c.loss,)
        with torch.no_grad():
            real = self.d(self.x[self.partner, None]).squeeze(1)
            fake = self.g(self.z[:, None])
            values, critic, x = self.d(fake).squeeze(1), self.d(self.centres[:, None]).squeeze(1), fake.squeeze(1)
        reach = [lambda d, name=name: LOSSES[name].g(d, real) for name in names]
        norms = gradient_norms(lambda: self.d(self.g(self.z[:, None])).squeeze(1), list(self.g.parameters()), reach)
        with torch.no_grad():
            q = pushed_masses(self.g(self.nodes[:, None]).squeeze(1), self.weights, self.edges)
            w1 = wasserstein(x, self.x)
            scale = slope(critic) if c.loss == "wasserstein" else 1.0
            right = torch.cat(self.loss.margins(real, values)) > 0
            return State1d(
                step, p, q, shown_critic(c.loss, critic, p, q), best_critic(c.loss, p, q), self.z, x.detach(),
                w1=float(w1),
                loss=float(self.loss.d(real, values) / scale),
                least=float(least_loss(c.loss, p, q, w1)),
                accuracy=float(right.double().mean()),
                gradients=dict(zip(names, norms, strict=True)),
            )  # fmt: skip
