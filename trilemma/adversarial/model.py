r"""A generative adversarial network: a generator G and a discriminator D that take turns.

    z ~ N(0, I),  y = G(z, c);    D descends L_D = d(D(y_real, c), D(G(z, c), c)) + penalties,
                                  G descends L_G = g(D(G(z, c), c), D(y_real, c)) + path length
(`losses`, `penalties`, `generator`, `discriminator`; `presets` names the models of the literature). At a Nash
equilibrium neither player gains by moving alone. The default, R3GAN (Huang et al. 2024, arXiv:2501.05441), is the
relativistic loss with R1 and R2: with both penalties the game converges locally, and no normalisation, spectral
constraint or mini-batch statistic is needed. Penalties and augmentation follow the training budget.

D sees augmented examples where `augment` says so, real and generated ones alike; gradients for penalties are taken at
its input, behind the augmentation. A GAN has samples, and no likelihood: `log_prob` does not exist. As its losses say
nothing about held-out data, its best weights are those of least energy distance between samples and the validation
split (`diagnostics`), where what goes wrong in the game is measured, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from trilemma.adversarial import advice, diagnostics
from trilemma.adversarial.architecture import build_discriminator, build_generator
from trilemma.adversarial.augment import Augmentation, Controller, choose, ramp
from trilemma.adversarial.generator import mix_styles
from trilemma.adversarial.losses import LOSSES
from trilemma.adversarial.penalties import clip_weights, gradient_penalty, squared_gradients
from trilemma.adversarial.settings import GANConfig, sizes
from trilemma.adversarial.stylegan2 import PathLength
from trilemma.core.anneal import cosine
from trilemma.core.codec import ColumnCodec, TableCodec
from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, DataSpec, Split

CHOOSING = 1024
"""Training examples from which the augmentations are chosen."""


class GAN(GenerativeModel):
    """A generator against a discriminator."""

    Config = GANConfig
    config: GANConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class", "vector"})
    space = "onehot"
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 64,
        "ema_half_life": 50_000,
        "ema_ramp": 0.1,
        "validations": 8,
    }
    setting_help: ClassVar[Mapping[str, str]] = {
        "truncation": "below 1 draws the latent towards its mean: better samples, less coverage"
    }

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return sizes(spec, settings)

    def build(self) -> None:
        c, shape = self.config, self.codec.shape
        self.loss = LOSSES[c.loss]
        self.g = build_generator(c, shape, self.condition)
        self.d = build_discriminator(c, shape, self.condition)
        if c.path_length:
            self.path = PathLength()
        if c.augment != "none" or c.consistency:
            self.augmentation = Augmentation(shape, c.augmentations or ())
        if c.augment == "adaptive":
            self.controller = Controller(max_p=c.augment_strength or 0.8, speed=c.augment_speed or 0.2)

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit_split(train)
        if (self.config.augment != "none" or self.config.consistency) and self.config.augmentations is None:
            batch = train.head(CHOOSING).to(self.device)
            names = choose(self.spec, self.encoded(batch, None), None if self.condition is None else batch.condition)
            self.augmentation = Augmentation(self.codec.shape, names).to(self.device)

    def objectives(self) -> Sequence[Objective]:
        c = self.config
        return [
            Objective(
                "discriminator",
                self.d.parameters(),
                self.discriminator_loss,
                turns=c.turns_d,
                optimizer=c.discriminator,
                after_step=self._after_discriminator,
                double_backward=c.penalized,
            ),
            Objective(
                "generator",
                self.g.parameters(),
                self.generator_loss,
                turns=c.turns_g,
                optimizer=c.generator,
                double_backward=bool(c.path_length),
            ),
        ]

    # -- the two players -------------------------------------------------------------------------------------

    def generate(
        self, z: Tensor, condition: Tensor | None, *, truncation: float = 1.0, noise: Noise | None = None
    ) -> Tensor:
        """z (N, z_dim) -> y (N, *codec.shape); the dimensions of a category are probabilities."""
        return self._probabilities(self.g(z, condition, truncation=truncation, noise=noise))

    def _probabilities(self, y: Tensor) -> Tensor:
        transform = next(iter(self.codec.transforms), None)
        if not isinstance(transform, TableCodec):
            return y
        columns: list[ColumnCodec] = list(transform.columns)  # type: ignore[arg-type]
        parts = torch.split(y, transform.widths, 1)
        return torch.cat([p.softmax(1) if c.onehot else p for c, p in zip(columns, parts, strict=True)], 1)

    def criticize(self, y: Tensor, condition: Tensor | None) -> Tensor:
        """D: y (N, *codec.shape) -> (N,); the larger, the more real."""
        value: Tensor = self.d(y, condition)
        return value

    def encoded(self, batch: Batch, noise: Noise | None) -> Tensor:
        """The examples in model space."""
        return self.codec.encode(batch.x, noise, dtype=self.dtype)[0]

    def _fake(self, condition: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
        """Generated y of a training step, and the ws they are made of."""
        ws = self.g.mapping(noise.normal(self.g.z_dim, dtype=self.dtype), condition)
        if self.config.style_mixing:
            others = self.g.mapping(noise.normal(self.g.z_dim, dtype=self.dtype), condition)
            first = 1 + noise.integers(max(1, self.g.num_ws - 1))
            kept = noise.uniform() >= self.config.style_mixing
            ws = mix_styles(ws, others, torch.where(kept, self.g.num_ws, first))
        # In the precision of real examples, also where networks compute in half of it.
        return self._probabilities(self.g.synthesis(ws, noise)).to(self.dtype), ws

    def _augmented(self, y: Tensor, step: Step) -> Tensor:
        """What D sees of y."""
        if self.config.augment == "none":
            return y
        if self.config.augment == "fixed":
            return self.augmentation(y, ramp(step.progress, self.config.augment_strength or 0.3), step.noise)  # type: ignore[no-any-return]
        return self.augmentation(y, self.controller.p, step.noise)  # type: ignore[no-any-return]

    def penalty_weight(self, progress: float) -> float:
        """Factor on all penalties when the fraction `progress` of the budget is spent."""
        return cosine(1.0, self.config.final_penalty, progress)

    def discriminator_loss(self, batch: Batch, step: Step) -> Losses:
        """L_D; logs the game's value, each penalty, and the shares of examples on the right side of D."""
        c, condition = self.config, batch.condition
        with torch.no_grad():
            fake, _ = self._fake(condition, step.noise)
            real, fake = (self._augmented(y, step) for y in (self.encoded(batch, step.noise), fake))
        penalize = step.index % c.penalty_every == 0
        real.requires_grad_(penalize and c.r1 > 0)
        fake.requires_grad_(penalize and c.r2 > 0)
        d_real, d_fake = self._criticize_both(real, fake, condition)
        logs = {"game": self.loss.d(d_real, d_fake)}
        penalties = self._penalties(real, fake, d_real, d_fake, condition, step) if penalize else {}
        weight = self.penalty_weight(step.progress) * c.penalty_every
        total = logs["game"] + weight * sum((factor * value for factor, value in penalties.values()), 0.0)
        margins = self.loss.margins(d_real.detach(), d_fake.detach())
        if c.augment == "adaptive":
            self.controller.observe(margins[0])
            self._progress = step.progress
            logs["augment_p"] = self.controller.p.clone()
        logs |= {name: value for name, (_, value) in penalties.items()}
        logs |= {f"accuracy_{k}": (m > 0).float().mean() for k, m in zip(("real", "fake"), margins, strict=True)}
        return total, logs

    def _criticize_both(self, real: Tensor, fake: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """D of both, in one pass where no example influences another."""
        if self.d.mixes or real.requires_grad != fake.requires_grad:
            return self.criticize(real, condition), self.criticize(fake, condition)
        twice = None if condition is None else torch.cat([condition, condition])
        d_real, d_fake = self.criticize(torch.cat([real, fake]), twice).chunk(2)
        return d_real, d_fake

    def _penalties(
        self, real: Tensor, fake: Tensor, d_real: Tensor, d_fake: Tensor, condition: Tensor | None, step: Step
    ) -> dict[str, tuple[float, Tensor]]:
        """Name -> weight and value of each penalty that is on."""
        c, found = self.config, dict[str, tuple[float, Tensor]]()
        own = [(name, gamma, y) for name, gamma, y in (("r1", c.r1, real), ("r2", c.r2, fake)) if gamma]
        if own:
            squares = squared_gradients(d_real.sum() + d_fake.sum(), [y for _, _, y in own])
            found |= {name: (0.5 * gamma, s.mean()) for (name, gamma, _), s in zip(own, squares, strict=True)}
        if c.gradient_penalty:
            u = step.noise.uniform(dtype=self.dtype)
            value = gradient_penalty(lambda y: self.criticize(y, condition), real.detach(), fake.detach(), u)
            found["gradient_penalty"] = (c.gradient_penalty, value)
        if c.consistency:
            pairs = ((real, d_real), (fake, d_fake))
            again = [(self.criticize(self.augmentation(y.detach(), 1.0, step.noise), condition), d) for y, d in pairs]
            found["consistency"] = (c.consistency, torch.stack([(a - b).square().mean() for a, b in again]).sum())
        return found

    def generator_loss(self, batch: Batch, step: Step) -> Losses:
        """L_G."""
        c, condition = self.config, batch.condition
        fake, ws = self._fake(condition, step.noise)
        self.g.track(ws, condition)
        d_fake = self.criticize(self._augmented(fake, step), condition)
        d_real = d_fake  # of which the losses of no pairs see nothing
        if self.loss.pairs:
            with torch.no_grad():
                d_real = self.criticize(self._augmented(self.encoded(batch, step.noise), step), condition)
        loss = self.loss.g(d_fake, d_real)
        every = c.path_every or 4
        if not c.path_length or step.index % every:
            return loss
        penalty = self.path(ws, fake, step.noise)
        return loss + c.path_length * every * penalty, {"game": loss, "path_length": penalty}

    def _after_discriminator(self) -> None:
        if self.config.clip is not None:
            clip_weights(self.d.parameters(), self.config.clip)
        if self.config.augment == "adaptive":
            self.controller.adjust(self._progress)

    # -- how it goes -----------------------------------------------------------------------------------------

    def held_out_loss(self, validation: Split, noise: Noise) -> float:
        """Energy distance between samples and held-out examples in model space."""
        return diagnostics.held_out_distance(self, validation, noise)

    def diagnose(self, train: Split, validation: Split, noise: Noise, *, step: int, final: bool) -> Mapping[str, float]:
        return diagnostics.measure(self, train, validation, noise, step=step, final=final)

    def advise(self, history: Sequence[Mapping[str, float]]) -> Sequence[str]:
        return advice.advise(self, history)

    # -- sampling --------------------------------------------------------------------------------------------

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The generator: z (N, z_dim) -> y (N, *shape)."""
        z = Noise(0, "export", n=2, device=self.device).normal(self.g.z_dim, dtype=self.dtype)
        inputs = (z, *self.example_condition(2))
        return lambda z, condition=None: self.generate(z, condition), inputs

    def _sample(self, noise: Noise, condition: Tensor | None, *, truncation: float = 1.0) -> Tensor:
        if not 0.0 <= truncation <= 1.0:
            raise UsageError(
                f"{self.name}: truncation={truncation:g}, but it is a factor from 0 (the mean) to 1 (none)"
            )
        return self.generate(self._prior(noise), condition, truncation=truncation, noise=noise)

    def knob(self) -> tuple[str, tuple[float, ...]]:
        return "truncation", (0.5, 0.7, 0.85, 1.0)

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(self.g.z_dim, dtype=self.dtype)

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.generate(z, condition)
