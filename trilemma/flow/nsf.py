r"""Neural spline flow (Durkan et al. 2019, arXiv:1906.04032), the coupling form.

x is mapped to z ~ N(0, I) by steps of: an LU-parametrised linear map over the channels, activation normalisation,
and a rational-quadratic spline coupling (see `transforms`, `splines`, `coupling`). So the likelihood is exact,
    log p(x) = log N(f(x); 0, I) + log |det df/dx|,
sampling is one pass of the inverse, and encoding is f itself. It is trained by maximum likelihood.

Vectors and small pictures take couplings of flat vectors with residual networks. Larger pictures and signals take
the multi-scale architecture (Dinh et al. 2017, arXiv:1605.08803; Kingma & Dhariwal 2018, arXiv:1807.03039): squeeze,
steps with convolutional networks, then half of the channels are done and the rest goes on at half the resolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, ModelConfig, Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.flow.coupling import Coupling
from trilemma.flow.elementwise import Elementwise
from trilemma.flow.linear import ActNorm, LULinear
from trilemma.flow.splines import RationalQuadraticSpline
from trilemma.flow.transforms import Compose, Part, Reshaped, Squeezed, Transform
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.residual_conv import ResidualConv

FLAT_DIMS = 256
"""Pictures and signals with more dimensions take the multi-scale architecture."""

INIT_BATCH = 256
"""Examples that initialise the activation normalisations."""


class NSFConfig(ModelConfig):
    """Settings of the neural spline flow."""

    multiscale: bool = Field(False, description="convolutional multi-scale architecture, for pictures and signals")
    steps: int = Field(6, ge=1, description="coupling steps, per scale where there are scales")
    scales: int = Field(3, ge=1, description="most scales of the multi-scale architecture")
    bins: int = Field(8, ge=2, le=256, description="bins of a spline")
    bound: float = Field(5.0, gt=0, description="splines are the identity outside [-bound, bound]")
    width: int = Field(64, ge=1, description="hidden units or channels of each network")
    depth: int = Field(1, ge=0, description="residual blocks of each network")
    context_dim: int = Field(32, ge=1, description="size of the embedding of the condition")
    optimizer: OptimizerConfig = Field(OptimizerConfig(lr=2e-3, weight_decay=0.01), description="AdamW settings")


class NSF(GenerativeModel):
    """An invertible map of the data to N(0, I), trained by maximum likelihood; the latent z has the shape of y."""

    Config: ClassVar[type[ModelConfig]] = NSFConfig
    config: NSFConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class", "vector"})
    space = "logit"
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128, "ema": 0.999}

    @classmethod
    def sized_for(cls, spec: DataSpec) -> dict[str, Any]:
        """Flat couplings up to `FLAT_DIMS` dimensions; above, convolutions, with few bins to bound memory."""
        if spec.kind not in ("image", "signal"):
            return {}
        if spec.dims > FLAT_DIMS:
            return {"multiscale": True, "steps": 4, "bins": 4, "optimizer": OptimizerConfig(lr=1e-3)}
        # Small sets of small pictures overfit: strong decay gained 0.015 nats/dim on held-out 8x8 digits.
        return {"optimizer": OptimizerConfig(lr=2e-3, weight_decay=1.0)}

    def build(self) -> None:
        self.context = ConditionEmbedding(self.condition, self.config.context_dim)
        shape, dims = self.codec.shape, self.codec.dims
        self.transform: Transform
        if self.config.multiscale:
            if self.spec.kind not in ("image", "signal"):
                raise UsageError(f"{self.name}: multiscale=true needs pictures or signals, not {self.spec.kind} data")
            picture = shape if len(shape) == 3 else (shape[0], 1, shape[1])
            layers = self._scale(*picture, self.config.scales) if dims > 1 else self._flat(dims)
            self.transform = Reshaped(layers, shape, picture)
        else:
            self.transform = Reshaped(self._flat(dims), shape, (dims,))

    def _flat(self, dims: int) -> Transform:
        spline = self._spline()
        if dims == 1:  # nothing to couple with
            return Compose([ActNorm(1), Elementwise((1,), spline, self.context.dim)])
        steps = (part for index in range(self.config.steps) for part in self._step(dims, index, spline, conv=False))
        return Compose(steps)

    def _spline(self) -> RationalQuadraticSpline:
        return RationalQuadraticSpline(self.config.bins, self.config.bound)

    def _step(self, channels: int, index: int, spline: RationalQuadraticSpline, conv: bool) -> list[Transform]:
        """Linear map, normalisation, coupling. Steps 2k and 2k + 1 swap halves, so every channel is mapped."""
        c = self.config
        even = index % 2 == 0
        permutation = torch.randperm(channels) if even else torch.arange(channels)
        mask = (torch.arange(channels) < channels // 2) == even
        passed = int(mask.sum())
        outputs = (channels - passed) * spline.size
        net: nn.Module
        if conv:
            net = ResidualConv(passed, outputs, width=c.width, depth=c.depth, context_dim=self.context.dim)
        else:
            sizes: dict[str, Any] = {"width": c.width, "depth": c.depth, "context_dim": self.context.dim}
            net = ResidualMLP(passed, outputs, **sizes, zero_init=True)
        return [LULinear(permutation), ActNorm(channels), Coupling(mask, net, spline)]

    def _scale(self, channels: int, height: int, width: int, scales: int) -> Transform:
        """Steps on the squeezed picture (channels, height, width), then smaller scales on half of its channels.

        A side of odd length is squeezed without its last row and once more without its first.
        """
        factors = (2 if height > 1 else 1, 2 if width > 1 else 1)
        squeezed = channels * math.prod(factors), height // factors[0], width // factors[1]
        corners = list(itertools.product(sorted({0, height % factors[0]}), sorted({0, width % factors[1]})))
        spline = self._spline()
        layers: list[Transform] = []
        for corner in corners:
            steps: list[Transform] = []
            for index in range(max(2, self.config.steps // len(corners))):
                steps += self._step(squeezed[0], index, spline, conv=True)
            if corner == corners[-1] and scales > 1 and math.prod(squeezed[1:]) >= 16:
                half = squeezed[0] // 2
                steps.append(Part(self._scale(half, *squeezed[1:], scales - 1), slice(half)))
            window = (slice(i, i + f * n) for i, f, n in zip(corner, factors, squeezed[1:], strict=True))
            layers.append(Part(Squeezed(Compose(steps), factors), slice(None), *window))
        return Compose(layers)

    def prepare(self, train: Split, noise: Noise) -> None:
        """Fit the codec, then let a first batch set the scales of the activation normalisations."""
        self.codec.fit_split(train)
        batch = train.head(INIT_BATCH).to(self.device)
        n = len(batch.x)
        y, _ = self.codec.encode(batch.x, Noise(*noise.key, "init", n=n, device=self.device, block=n), dtype=self.dtype)
        with torch.no_grad():
            self.transform.initialize(y, self.context(batch.condition))

    def objectives(self) -> Sequence[Objective]:
        return (Objective("nll", self.parameters(), self.loss, optimizer=self.config.optimizer, validate=True),)

    def loss(self, batch: Batch, step: Step) -> Losses:
        y, _ = self.codec.encode(batch.x, step.noise, dtype=self.dtype)
        return -self._density(y, batch.condition).mean() / self.codec.dims

    def _density(self, y: Tensor, condition: Tensor | None) -> Tensor:
        z, ladj = self.transform(y, self.context(condition))
        base = -0.5 * (z.square() + math.log(2.0 * math.pi)).flatten(1).sum(1)
        return base + ladj  # type: ignore[no-any-return]

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        return Score(self._density(y, condition), "exact")

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The inverse of the flow: z (N, *shape) -> y (N, *shape)."""
        inputs = (torch.zeros(2, *self.codec.shape, dtype=self.dtype, device=self.device), *self.example_condition(2))
        return lambda z, condition=None: self._decode(z, condition), inputs

    def _sample(self, noise: Noise, condition: Tensor | None, *, temperature: float = 1.0) -> Tensor:
        """`temperature` scales z: below 1 samples come from nearer the mode, and are no longer the model's own."""
        return self._decode(temperature * self._prior(noise), condition)

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(*self.codec.shape, dtype=self.dtype)

    def knob(self) -> tuple[str, tuple[float, ...]]:
        return "temperature", (0.6, 0.7, 0.8, 0.9, 1.0)

    def _encode(self, y: Tensor, condition: Tensor | None) -> Tensor:
        return self.transform(y, self.context(condition))[0]  # type: ignore[no-any-return]

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.transform.inverse(z, self.context(condition))[0]
