r"""Restricted Boltzmann machine (Smolensky 1986; Hinton 2002, Neural Computation 14), trained by persistent contrastive
divergence (Tieleman 2008, ICML).

Hidden units h_j = +-1/2 and visible units x with base measure m and features s(x) (see `visible`):
    p(x, h) = m(x) exp(s(x)^T W h + b^T h) / Z,
    p(x)    = exp(-F(x)) / Z,      -F(x) = log m(x) + sum_j log 2 cosh(z_j / 2),      z = b + W^T s(x),
    p(h_j = 1/2 | x) = sigmoid(z_j),     p(x | h): units with fields t = W h.
Hidden units around zero and visible features around the data's mean make the gradient independent of how units are
coded (Montavon & Mueller 2012, "Deep Boltzmann machines and the centering trick"); the family of distributions is
that of the usual 0/1 units. The gradient of the negative log-likelihood is that of
    E_data F(x) - E_model F(x),
whose second mean is taken over chains that survive from step to step and take k Gibbs steps each.

Visible units: "ordinal" or "binomial" for data with levels (a probability on the data's own lattice), "gaussian" for
real data and tables, or for dequantized levels; "auto" takes ordinal up to 64 levels, else gaussian.
Given classes, the biases of visible and hidden units are each class's own.

Samples and log Z come from the same path: p_beta has base measure m_beta and couplings beta (W, b), from the
independent dimensions of the data (beta = 0) to the machine (beta = 1). Up to 16 hidden units log Z is a sum over all
2^H states, exact; above, an estimate by annealed importance sampling, whose error all examples share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.core.codec import Codec
from trilemma.core.errors import DataError, UsageError
from trilemma.core.model import GenerativeModel, Losses, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise, hash_key
from trilemma.core.score import Score
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.energy.ais import LogMean, anneal, linear_betas, log_mean_exp
from trilemma.energy.visible import Gaussian, Levels

MAX_LEVELS = 64
MAX_ENUMERATED = 16
MAX_EXAMPLES = 50_000
CHUNK = 2**22
"""Numbers in the largest intermediate tensor of an enumeration."""


class RBMConfig(ModelConfig):
    hidden: int = Field(128, ge=1, description="number of hidden units")
    visible: Literal["auto", "ordinal", "binomial", "gaussian"] = Field("auto", description="kind of visible units")
    chains: int = Field(128, ge=1, description="persistent Markov chains")
    gibbs_steps: int = Field(5, ge=1, description="Gibbs steps of the chains per training step")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


class RBM(GenerativeModel):
    """A two-layer Boltzmann machine with exact conditionals and an intractable normalizer."""

    Config = RBMConfig
    config: RBMConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class"})
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128, "ema": 0.999, "clip": None}
    chain_x: Tensor
    chain_c: Tensor

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, int]:
        """Few dimensions need few hidden units, whose steps are cheap; 16 have an exact likelihood."""
        return {"hidden": MAX_ENUMERATED, "gibbs_steps": 10} if spec.dims <= 4 else {}

    @property
    def visible_kind(self) -> str:
        """What "auto" means for these data."""
        kind, levels = self.config.visible, self.spec.levels
        if kind == "auto":
            return "ordinal" if levels is not None and levels <= MAX_LEVELS else "gaussian"
        if kind != "gaussian" and levels is None:
            raise UsageError(
                f"{self.name}: visible={kind} needs data with levels, and these are {self.spec.describe()}; "
                "use visible=gaussian"
            )
        return kind

    @property
    def classes(self) -> int:
        return 1 if self.condition is None else self.condition.size

    def make_codec(self) -> Codec:
        return Codec(self.spec, "standard" if self.visible_kind == "gaussian" else "integer")

    def build(self) -> None:
        d, config = self.codec.dims, self.config
        self.visible: Levels | Gaussian
        if self.visible_kind == "gaussian":
            self.visible = Gaussian(d, self.classes)
        else:
            assert self.spec.levels is not None
            self.visible = Levels(d, self.spec.levels, self.classes, learned=self.visible_kind == "ordinal")
        # Where W = 0 the gradient of W vanishes for data that are standardized: start a little way off, where the
        # hidden units' energies |W h|^2 / 2 sigma^2 are about one, whatever D and H.
        self.weight = nn.Parameter(math.sqrt(8.0 / (config.hidden * (d + 2))) * torch.randn(d, config.hidden))
        self.bias = nn.Parameter(torch.zeros(self.classes, config.hidden))
        self.register_buffer("chain_x", torch.zeros(config.chains, d))
        self.register_buffer("chain_c", torch.zeros(config.chains, dtype=torch.int64))
        self._log_z_cache: dict[tuple[str, int, int, int], LogMean] = {}

    def prepare(self, train: Split, noise: Noise) -> None:
        """Fit codec and base measure; start the chains from independent dimensions.

        Raises:
            DataError: the machine is conditional and a class has no example.
        """
        batch = train.head(min(len(train), MAX_EXAMPLES)).to(self.device)
        n = len(batch.x)
        self.codec.fit(batch.x)
        y, _ = self.codec.encode(batch.x, Noise(*noise.key, "encode", n=n, device=self.device), dtype=self.dtype)
        self.visible.fit(y.flatten(1))
        if self.condition is not None:
            assert batch.condition is not None
            counts = torch.bincount(batch.condition, minlength=self.classes)
            if bool((counts == 0).any()):
                missing = self.condition.names[int(counts.argmin())]
                raise DataError(
                    f"{self.name}: class {missing!r} has no training example; "
                    "fit with conditional=false, or add examples of it"
                )
            # Chains are shared out in proportion to the classes, as E_model averages over the data's labels.
            at = (torch.arange(self.config.chains) + 0.5) * n / self.config.chains
            self.chain_c.copy_(batch.condition.sort().values[at.long().to(self.device)])
        chains = Noise(*noise.key, "chains", n=self.config.chains, device=self.device)
        with torch.no_grad():
            self.chain_x.copy_(self._start(self.chain_c, chains))

    # -- the distribution ----------------------------------------------------------------------------------------

    def drive(self, x: Tensor, c: Tensor) -> Tensor:
        """z = b_c + W^T s(x), (n, H)."""
        return self.bias[c] + self.visible.feature(x) @ self.weight

    def log_unnormalized(self, x: Tensor, c: Tensor, beta: float = 1.0) -> Tensor:
        """-F_beta(x | c) of x (n, D), (n,)."""
        z = beta * self.drive(x, c)
        # log 2 cosh(z / 2) = softplus(z) - z / 2
        return self.visible.log_base(x, beta, c) + (nn.functional.softplus(z) - 0.5 * z).sum(1)

    def gibbs(self, x: Tensor, c: Tensor, noise: Noise, beta: float = 1.0) -> Tensor:
        """One step h ~ p(h | x), x ~ p(x | h) of x (n, D)."""
        h = noise.bernoulli(torch.sigmoid(beta * self.drive(x, c))) - 0.5
        return self.visible.draw(beta * (h @ self.weight.T), beta, c, noise)

    def _start(self, c: Tensor, noise: Noise) -> Tensor:
        """Draws (n, D) from beta = 0."""
        return self.visible.draw(self.chain_x.new_zeros(noise.n, self.codec.dims), 0.0, c, noise)

    # -- training --------------------------------------------------------------------------------------------------

    def objectives(self) -> Sequence[Objective]:
        return [Objective("free_energy_gap", self.parameters(), self.loss, optimizer=self.config.optimizer)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        """mean F(data) - mean F(chains): its gradient is that of the negative log-likelihood, its value is not.

        The chains move only in training.
        """
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.chain_x.copy_(self._move_chains(step))
        positive = -self.log_unnormalized(y.flatten(1), self._class_index(batch.condition, len(y))).mean()
        negative = -self.log_unnormalized(self.chain_x, self.chain_c).mean()
        return positive - negative, {"free_energy_data": positive.detach()}

    def _move_chains(self, step: Step) -> Tensor:
        n, device = self.config.chains, self.device
        noise = Noise(*step.noise.key, "chains", n=n, device=device, block=n)
        x = self.chain_x
        for _ in range(self.config.gibbs_steps):
            x = self.gibbs(x, self.chain_c, noise)
        return x

    def _class_index(self, condition: Tensor | None, n: int) -> Tensor:
        if self.condition is None or condition is None:
            return torch.zeros(n, dtype=torch.int64, device=self.device)
        return condition

    # -- abilities ---------------------------------------------------------------------------------------------

    def evaluations(self, *, steps: int = 100, **settings: Any) -> int:
        return steps

    def knob(self) -> tuple[str, tuple[float, ...]]:
        return "steps", (5, 10, 30, 100)

    def _sample(self, noise: Noise, condition: Tensor | None, *, steps: int = 100) -> Tensor:
        """Chains from independent dimensions, annealed over the first half of `steps` Gibbs steps."""
        if steps < 1:
            raise UsageError(f"{self.name}: sample needs steps >= 1, got {steps}")
        c = self._class_index(condition, noise.n)
        x = self._start(c, noise)
        for k in range(1, steps + 1):
            x = self.gibbs(x, c, noise, min(1.0, 2.0 * k / steps))
        return x.reshape(-1, *self.codec.shape)

    def _log_prob(
        self, y: Tensor, condition: Tensor | None, noise: Noise, *, chains: int = 64, steps: int = 500
    ) -> Score:
        """-F(y) - log Z; `chains` and `steps` are those of annealed importance sampling."""
        c = self._class_index(condition, len(y))
        value = self.log_unnormalized(y.flatten(1), c).double()
        stderr = torch.zeros_like(value)
        for label in torch.unique(c).tolist():
            log_z = self.log_partition(label, chains=chains, steps=steps, seed=hash_key(*noise.key))
            value[c == label] -= log_z.value
            stderr[c == label] = log_z.stderr
        if self.config.hidden <= MAX_ENUMERATED:
            return Score(value, "exact")
        return Score(value, "estimate", stderr, shared=float(stderr.max()))

    def log_partition(self, c: int = 0, *, chains: int = 64, steps: int = 500, seed: int = 0) -> LogMean:
        """log Z of class c: exact up to 16 hidden units, else estimated. Remembered for the present parameters."""
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        key = (f"{digest.hexdigest()} {seed}", c, chains, steps)
        if key not in self._log_z_cache:
            with torch.no_grad():
                exact = self.config.hidden <= MAX_ENUMERATED
                self._log_z_cache[key] = self._enumerate(c) if exact else self._estimate(c, chains, steps, seed)
        return self._log_z_cache[key]

    def _enumerate(self, c: int) -> LogMean:
        hidden = self.config.hidden
        size = max(1, CHUNK // (self.codec.dims * (self.spec.levels or 1)))
        parts = []
        for states in torch.split(torch.arange(2**hidden, device=self.device), size):
            h = (states[:, None] >> torch.arange(hidden, device=self.device) & 1).to(self.dtype) - 0.5
            label = torch.full_like(states, c)
            log_x = self.visible.log_normalizer(h @ self.weight.T, 1.0, label)
            parts.append((log_x + h @ self.bias[c]).double())
        value = torch.cat(parts).logsumexp(0)
        return LogMean(value, torch.zeros_like(value))

    def _estimate(self, c: int, chains: int, steps: int, seed: int) -> LogMean:
        noise = Noise(seed, "log_partition", c, n=chains, device=self.device)
        label = torch.full((chains,), c, device=self.device)
        _, log_w = anneal(
            self._start(label, noise),
            lambda x, beta: self.log_unnormalized(x, label, beta),
            lambda x, beta, noise: self.gibbs(x, label, noise, beta),
            linear_betas(steps),
            noise,
        )
        zero = self.chain_x.new_zeros(1, self.codec.dims)
        log_z0 = self.visible.log_normalizer(zero, 0.0, label[:1])[0].double() + self.config.hidden * math.log(2.0)
        ratio = log_mean_exp(log_w)
        return LogMean(log_z0 + ratio.value, ratio.stderr)
