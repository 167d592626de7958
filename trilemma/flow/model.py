r"""A normalizing flow: x is mapped to z ~ N(0, I) by an invertible f, trained by maximum likelihood.

    log p(x) = log N(f(x); 0, I) + log |det df/dx|
Sampling is f^-1, encoding is f itself. The parts are in `transforms`, `linear`, `elementwise`, `coupling`,
`autoregressive`, `planar`, `residual`, `masked_convolution` and `transformer`; `presets` names the flows of the
literature. The likelihood is exact, a bound or an estimate, as its parts are (`Transform.kind`).

With noise sigma the flow learns the density q of y + sigma eps, and samples are denoised by Tweedie's formula,
y + sigma^2 grad log q(y) (Zhai et al. 2024, arXiv:2412.06329): better pictures, which are then no longer exactly those
whose density is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from trilemma.core.codec import Codec
from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Middle, Noise, draw_seed
from trilemma.core.score import Score
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.flow.architecture import FLAT_DIMS, Builder
from trilemma.flow.settings import FlowConfig
from trilemma.flow.transformer import denoise as tweedie
from trilemma.flow.transforms import Transform, standard_log_prob
from trilemma.nets.conditioning import ConditionEmbedding

INIT_BATCH, INIT_NUMBERS = 10_000, 2**21
"""At most so many examples and numbers initialise what starts from data, unless that is under 256 examples."""


class Flow(GenerativeModel):
    """An invertible map of the data to N(0, I), trained by maximum likelihood; the latent z has the shape of y."""

    Config: ClassVar[type[ModelConfig]] = FlowConfig
    config: FlowConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class", "vector"})
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128, "ema": 0.999}
    setting_help: ClassVar[Mapping[str, str]] = {
        "temperature": "scales z: below 1 samples come from nearer the mode, and are no longer the model's own",
        "denoise": "take the training noise off samples; true unless the model has none",
    }

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Large pictures have many layers by their scales; small sets of small ones overfit."""
        if spec.kind not in ("image", "signal"):
            return {}
        if spec.dims > FLAT_DIMS:
            return {"steps": 4, "optimizer": OptimizerConfig(lr=1e-3)}
        # Strong decay gained 0.015 nats/dim on held-out 8x8 digits.
        return {"optimizer": OptimizerConfig(lr=2e-3, weight_decay=1.0)}

    def make_codec(self) -> Codec:
        """Learned dequantization starts from the integers; else the codec dequantizes and takes the logit."""
        return Codec(self.spec, "integer" if self.config.dequantization == "variational" else "logit")

    def build(self) -> None:
        self.context = ConditionEmbedding(self.condition, self.config.context_dim)
        builder = Builder(self.config, self.context.dim)
        self.transform: Transform = builder.build(self.spec, self.codec.shape, self.name)

    def prepare(self, train: Split, noise: Noise) -> None:
        """Fit the codec, then let a first batch set what is initialised from data."""
        self.codec.fit_split(train)
        size = min(INIT_BATCH, max(256, INIT_NUMBERS // self.codec.dims))
        batch = train.head(size).to(self.device)
        n = len(batch.x)
        own = Noise(*noise.key, "init", n=n, device=self.device, block=n)
        y = self._noised(batch, own)
        with torch.no_grad():
            self.transform.initialize(y, self.context(batch.condition), own)

    def objectives(self) -> Sequence[Objective]:
        return (Objective("nll", self.parameters(), self.loss, optimizer=self.config.optimizer, validate=True),)

    def loss(self, batch: Batch, step: Step) -> Losses:
        """-log p(y) per dimension, of noised data where the model has noise."""
        y = self._noised(batch, step.noise)
        return -self._density(y, batch.condition, step.noise).mean() / self.codec.dims

    def _noised(self, batch: Batch, noise: Noise) -> Tensor:
        """What is learned: the examples in model space, with noise where the model has it."""
        y, _ = self.codec.encode(batch.x, noise, dtype=self.dtype)
        return y + self.config.noise * noise.normal_like(y) if self.config.noise else y

    def _density(self, y: Tensor, condition: Tensor | None, noise: Noise | None) -> Tensor:
        z, ladj = self.transform(y, self.context(condition), noise)
        log_density: Tensor = standard_log_prob(z) + ladj
        return log_density

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        how = f"density of data with noise {self.config.noise:g}" if self.config.noise else ""
        return Score(self._density(y, condition, noise), self.transform.kind, method=how)

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return self.transform.bijective

    # -- sampling --------------------------------------------------------------------------------------------

    def _sample(
        self, noise: Noise, condition: Tensor | None, *, temperature: float = 1.0, denoise: bool | None = None
    ) -> Tensor:
        self._check_temperature(temperature)
        if denoise and not self.config.noise:
            raise UsageError(f"{self.name}: denoise=true, but the model was trained without noise")
        y = self._decode(temperature * self._prior(noise), condition)
        if self.config.noise and denoise is not False:
            return tweedie(lambda v: self._density(v, condition, None), y, self.config.noise)
        return y

    def rsample(
        self,
        n: int,
        condition: Tensor | int | Sequence[int] | None = None,
        *,
        generator: torch.Generator | int | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Samples (n, *spec.shape) in data units through which gradients flow, neither rounded nor denoised.

        Raises:
            UsageError: the data are a table with discrete columns, or one with missing values.
        """
        self._require("sample")
        self._check_temperature(temperature)
        if n < 1:
            raise UsageError(f"rsample needs n >= 1, got {n}")
        if any(column.is_discrete or column.missing for column in self.spec.columns):
            raise UsageError(f"{self.name}: rsample needs real numbers, but the table has discrete or missing values")
        noise = Noise(draw_seed(generator), "sample", n=n, device=self.device)
        y = self._decode(temperature * self._prior(noise), self._conditions(condition, n))
        return self.codec.unrounded(y) if self.spec.kind != "table" else self.codec.decode(y)

    def _check_temperature(self, temperature: float) -> None:
        if not isinstance(temperature, int | float) or not 0.0 <= temperature < math.inf:
            raise UsageError(f"{self.name}: temperature is a number >= 0, got {temperature!r}")

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
        """The inverse of the flow: z (N, *shape) -> y (N, *shape). With noise, samples are more than that: denoised."""
        if self.config.noise:
            return None
        inputs = (torch.zeros(2, *self.codec.shape, dtype=self.dtype, device=self.device), *self.example_condition(2))
        return lambda z, condition=None: self._decode(z, condition), inputs

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(*self.codec.shape, dtype=self.dtype)

    def knob(self) -> tuple[str, tuple[float, ...]]:
        return "temperature", (0.6, 0.7, 0.8, 0.9, 1.0)

    def _encode(self, y: Tensor, condition: Tensor | None) -> Tensor:
        noise = Middle(len(y), y.device) if self.transform.stochastic else None
        return self.transform(y, self.context(condition), noise)[0]  # type: ignore[no-any-return]

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.transform.inverse(z, self.context(condition))[0]


class VariationalFlow(Flow):
    """A flow that learns how to dequantize pictures (Ho et al. 2019, arXiv:1902.00275)."""

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        learned = {"dequantization": "variational"} if spec.kind in ("image", "signal") and spec.levels else {}
        return {**super().sized_for(spec, settings), **learned}
