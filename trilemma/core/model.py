"""`GenerativeModel`: the one noun. Everything that can be fitted is one.

To add a model, subclass it in one short file:

    class MyModel(GenerativeModel):
        class Config(ModelConfig):
            hidden: int = 64
        space = "standard"                        # what the codec maps the user's data to

        def build(self):                          # create the networks; shapes come from self.codec
            self.net = ...
        def objectives(self):                     # what is minimised, over which parameters
            return [Objective("loss", self.parameters(), self.loss)]
        def loss(self, batch, step):              # a scalar
            y, _ = self.codec.encode(batch.x, step.noise)
            ...
        def _sample(self, noise, condition):      # noise.n draws in model space
            ...

    register("my-model", MyModel, family="diffusion", paper="...")

The constructor stores, `fit` learns. What a model can do is read off the hooks that it defines (`_sample`,
`_log_prob`, `_encode`, `_decode`), so a declaration cannot disagree with the code; the public methods take and
return data in the user's units and hold everything that is the same for all models: batching, randomness,
the codec, likelihood bookkeeping, errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trilemma.core import registry
from trilemma.core.anneal import cosine
from trilemma.core.codec import Codec, Space, check_data
from trilemma.core.config import Config, merge, validate
from trilemma.core.errors import CapabilityError, NotFittedError, UsageError
from trilemma.core.noise import Noise, draw_seed, hash_key
from trilemma.core.score import Score, cat_scores, combine_kinds
from trilemma.core.spec import Batch, ConditionSpec, DataKind, DataSpec, Split, to_real

if TYPE_CHECKING:
    from trilemma.engine import Run

Ability = Literal["sample", "log_prob", "encode", "decode", "condition"]
ABILITIES: tuple[Ability, ...] = ("sample", "log_prob", "encode", "decode", "condition")


class ModelConfig(Config):
    """Settings that every model has; a model adds its own."""

    conditional: bool = Field(False, description="model p(x | condition) instead of p(x)")


class OptimizerConfig(Config):
    """Settings of one optimiser: Adam, AdamW where weights decay, or gradient descent with momentum."""

    method: Literal["adam", "sgd"] = Field("adam", description="sgd: gradient descent with momentum betas[0]")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    final_beta2: float | None = Field(
        None, ge=0, lt=1, description="betas[1] at the end of the budget; a cosine between"
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.method == "sgd" and self.final_beta2 is not None:
            raise ValueError("final_beta2 has no effect with method=sgd")
        return self

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these parameters, at its peak rate and first betas."""
        parameters = list(parameters)
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}
        if self.method == "sgd":
            return torch.optim.SGD(parameters, momentum=self.betas[0], **common)
        adam = torch.optim.AdamW if self.weight_decay else torch.optim.Adam
        return adam(parameters, betas=self.betas, eps=self.eps, **common)

    def set(self, optimizer: torch.optim.Optimizer, lr: float, progress: float) -> None:
        """Give an optimiser of `make` this learning rate, and the betas of this moment."""
        for group in optimizer.param_groups:
            group["lr"] = lr
            if "betas" in group:
                group["betas"] = self.betas_at(progress)

    def betas_at(self, progress: float) -> tuple[float, float]:
        """The betas when the fraction `progress` of the budget is spent."""
        first, second = self.betas
        if self.final_beta2 is None:
            return self.betas
        return first, cosine(second, self.final_beta2, progress)


@dataclass(frozen=True)
class Step:
    """What a loss may need to know of the step it is in.

    Attributes:
        noise: the random draws of this step, for exactly the batch given.
        progress: fraction of the training budget that is spent, in [0, 1].
        index: number of finished optimisation steps.
    """

    noise: Noise
    progress: float = 0.0
    index: int = 0


Losses = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""A scalar to minimise (a mean over the batch), alone or with further scalars for the log."""


@dataclass(frozen=True)
class Objective:
    """Who is optimised on which loss.

    Attributes:
        name: of the loss, for the log ("elbo", "discriminator").
        parameters: what this objective moves; all other parameters get no gradient in its turn.
        loss: (batch in data units, step) -> `Losses`.
        turns: optimisation steps of this objective per training step (a critic may take five).
        optimizer: its settings.
        after_step: called after each of its optimiser steps (weight clipping, codebooks).
        double_backward: the loss differentiates through a gradient, which compiled networks cannot.
        validate: the loss means the same on held-out data, so it can pick the best weights and stop early.
    """

    name: str
    parameters: Iterable[nn.Parameter]
    loss: Callable[[Batch, Step], Losses]
    turns: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    after_step: Callable[[], None] | None = None
    double_backward: bool = False
    validate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        assert self.turns >= 1, f"objective {self.name!r} takes no turns"
        assert self.parameters, f"objective {self.name!r} has no parameters"


class GenerativeModel(nn.Module):
    """A probability distribution over the user's data, learned from examples.

    Arguments:
        spec: what the data are.
        name: the registered name under which it was made.
        settings: of `Config`; unknown ones raise a `UsageError` that lists what exists.
    """

    Config: ClassVar[type[ModelConfig]] = ModelConfig
    data_kinds: ClassVar[frozenset[DataKind]] = frozenset({"image", "signal", "points", "table"})
    condition_kinds: ClassVar[frozenset[str]] = frozenset()
    space: ClassVar[Space] = "standard"
    bijective: bool = False
    """Whether `_decode` is the inverse of `_encode`, so that `round_trip` says how exact it is."""
    training: bool
    setting_help: ClassVar[Mapping[str, str]] = {}
    """What the settings of `sample` and `log_prob` mean, in a line each."""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of the engine in which this model differs from the engine's own defaults, such as the batch size."""

    def __init__(self, spec: DataSpec, *, name: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.name = name or type(self).__name__
        self.spec = spec
        self._check_whose(settings)
        self.config = validate(self.Config, merge(self.sized_for(spec, settings), settings), f"model {self.name}")
        self.fitted = False
        if spec.kind not in self.data_kinds:
            raise CapabilityError(
                f"{self.name} models {_listing(self.data_kinds)}, not {spec.kind} data; "
                f"models that can: {_listing(registry.names_with(data_kind=spec.kind))}"
            )
        if self.config.conditional:
            self._check_can_condition()

    # -- what a subclass defines ---------------------------------------------------------------------------

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that should differ from the defaults for data of this spec, and for the settings that are given."""
        return {}

    def build(self) -> None:
        """Create networks and buffers. `self.codec` exists (unfitted); runs under a seeded generator."""

    def prepare(self, train: Split, noise: Noise) -> None:
        """Learn what needs no gradient steps. Closed-form models learn everything here."""

    def objectives(self) -> Sequence[Objective]:
        """What the engine minimises, in turn order; () for a closed-form model."""
        return ()

    def held_out_loss(self, validation: Split, noise: Noise) -> float:
        """What picks the best weights where no objective means anything on held-out data; called with averaged ones."""
        raise NotImplementedError

    def diagnose(self, train: Split, validation: Split, noise: Noise, *, step: int, final: bool) -> Mapping[str, float]:
        """Measurements for the log of how training goes; called a few times with the weights as they are.

        Arguments:
            step: training steps taken.
            final: training has ended, so that it may take longer, but in proportion to the steps.
        """
        raise NotImplementedError

    def advise(self, history: Sequence[Mapping[str, float]]) -> Sequence[str]:
        """What is wrong and what to do about it, a sentence each, from all that `diagnose` found, in order."""
        return ()

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
        """The function of networks that sampling calls, and example inputs with the batch first, for `export`.

        A conditional model's function takes the condition last. None if the model has no such network.
        """
        return None

    def make_codec(self) -> Codec:
        """The map from data to model space."""
        return Codec(self.spec, self.space)

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        """Draw y (noise.n, *codec.shape) in model space. Keyword arguments are sampler settings."""
        raise NotImplementedError

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        """log p(y | condition) in nats for y (N, *codec.shape) in model space."""
        raise NotImplementedError

    def _encode(self, y: Tensor, condition: Tensor | None) -> Tensor:
        """The latent code of y, (N, *)."""
        raise NotImplementedError

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """The y (N, *codec.shape) of a latent code."""
        raise NotImplementedError

    def _prior(self, noise: Noise) -> Tensor:
        """Draw codes (noise.n, *) from the latent distribution of which `_decode` makes samples."""
        raise NotImplementedError

    def _pictures(self, data: Split, seed: int) -> dict[str, bytes]:
        """File name -> content of pictures of how samples come about. Keyword arguments are settings."""
        raise NotImplementedError

    def evaluations(self, **settings: Any) -> int:
        """How often sampling evaluates the network, one after the other, under these sampler settings."""
        return 0 if self.is_closed_form() else 1

    def knob(self) -> tuple[str, tuple[float, ...]] | None:
        """The sampler setting that trades quality, coverage and speed, and values of it worth a curve."""
        return None

    # -- abilities -------------------------------------------------------------------------------------------

    @classmethod
    def abilities(cls) -> frozenset[Ability]:
        """What this model can do, read off the hooks it defines."""
        found = {ability for ability in ABILITIES[:-1] if cls.overrides(f"_{ability}")}
        if cls.condition_kinds:
            found.add("condition")
        return frozenset(found)

    @classmethod
    def has_prior(cls) -> bool:
        """Whether samples are decoded from codes of a latent distribution that can be drawn from."""
        return cls.overrides("_prior")

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether the model defines this hook."""
        return getattr(cls, hook) is not getattr(GenerativeModel, hook)

    @classmethod
    def is_closed_form(cls) -> bool:
        """Whether the model learns everything in `prepare`, without gradient steps."""
        return not cls.overrides("objectives")

    def _require(self, ability: Ability) -> None:
        if ability not in self.abilities():
            able = _listing(registry.names_with(ability=ability, data_kind=self.spec.kind))
            raise CapabilityError(f"{self.name} has no {ability}; models that do: {able}")
        if not self.fitted:
            raise NotFittedError(f"this {self.name} is not fitted yet: call fit(data), or load a saved model")

    def _check_whose(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that belong to the training or to a call, before a similar name is guessed."""
        for key in settings.keys() - self.Config.model_fields.keys():
            if key in ("steps", "budget"):
                raise UsageError(f"model {self.name}: {key} is of the training: give --{key}, or fit(data, {key}=...)")
            for verb, hook in (("sample", "_sample"), ("score", "_log_prob")):
                if key in self.settings_of(hook):  # type: ignore[arg-type]
                    raise UsageError(f"model {self.name}: {key} is a setting of `trilemma {verb}`, not of the model")

    def _check_can_condition(self) -> None:
        condition = self.spec.condition
        if condition is None:
            raise UsageError(
                f"{self.name}: conditional=true, but the data have no labels or attributes, nor another condition"
            )
        if condition.kind not in self.condition_kinds:
            able = _listing(registry.names_with(condition_kind=condition.kind))
            article = "an" if condition.kind == "image" else "a"
            raise CapabilityError(
                f"{self.name} cannot be conditioned on {article} {condition.kind}; models that can: {able}"
            )

    @property
    def condition(self) -> ConditionSpec | None:
        """What this model is conditioned on: None for p(x), even where the data have labels."""
        return self.spec.condition if self.config.conditional else None

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the codec's buffers go with them."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of model space: that of the parameters."""
        parameter = next(self.parameters(), None)
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    # -- life ------------------------------------------------------------------------------------------------

    def initialize(self, seed: int) -> None:
        """Forget everything and build anew; the weights are a function of the seed alone."""
        self._modules.clear()
        self._parameters.clear()
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        self.fitted = False
        # PyTorch initialises modules from its global generator: seed it for the moment, then put it back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash_key(seed, "init"))
            self.codec = self.make_codec()
            self.build()

    def fit(self, data: Any, **settings: Any) -> Run:
        """Train on a data set (or on anything that `load_data` takes) and return the run.

        Arguments:
            settings: of `trilemma.engine.train`: steps=, budget="10min", seed=, out=, batch_size=, ...
        """
        from trilemma.engine import train  # the one import that points upwards: `fit` is a convenience

        return train(self, data, **settings)

    def save(self, path: str | Path) -> None:
        """Write manifest.json and model.safetensors into the new or empty folder `path`."""
        from trilemma.core.storage import save_model

        if not self.fitted:
            raise NotFittedError(f"this {self.name} is not fitted yet: there is nothing to save")
        save_model(self, Path(path))

    # -- abilities, in the user's units ------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        condition: Tensor | int | Sequence[int] | None = None,
        *,
        generator: torch.Generator | int | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw n examples (n, *spec.shape) in the units of the user's data.

        Arguments:
            condition: one condition for all, or one each: class indices, or vectors (n, size).
            generator: a seed or a `torch.Generator`; None draws fresh entropy. The same seed gives the same
                samples, whatever the batch size.
            batch_size: how many are drawn at once.
            settings: the sampler's own, for example steps=50.
        """
        self._require("sample")
        self._check_settings("_sample", settings)
        if n < 1:
            raise UsageError(f"sample needs n >= 1, got {n}")
        c = self._conditions(condition, n)
        seed = draw_seed(generator)
        size = batch_size or self.default_batch_size
        parts = []
        with self.inference():
            for start in range(0, n, size):
                stop = min(start + size, n)
                noise = Noise(seed, "sample", n=stop - start, start=start, device=self.device)
                y = self._sample(noise, None if c is None else c[start:stop], **settings)
                expected = (stop - start, *self.codec.shape)
                assert tuple(y.shape) == expected, f"_sample returned the shape {tuple(y.shape)}, expected {expected}"
                parts.append(self.codec.decode(y))
        return torch.cat(parts)

    def log_prob(
        self,
        x: Tensor | Split,
        condition: Tensor | None = None,
        *,
        generator: torch.Generator | int | None = 0,
        batch_size: int | None = None,
        repeats: int = 1,
        **settings: Any,
    ) -> Score:
        """The log-likelihood of each example, in nats and in data units, with its kind.

        Arguments:
            x: examples (N, *spec.shape), or a split (which brings its own conditions).
            generator: seed of the noise of bounds and estimates.
            repeats: draws of that noise per example; with more than one, `stderr` is their standard error.
            settings: the model's own.
        """
        self._require("log_prob")
        self._check_settings("_log_prob", settings)
        n = len(x)
        seed = draw_seed(generator)
        size = batch_size or self.default_batch_size
        given = None if condition is None else self._conditions(condition, n)
        scores = []
        with self.inference():
            for start in range(0, n, size):
                if isinstance(x, Tensor):
                    part, own = x[start : start + size], None
                else:  # a split that is streamed is read batch by batch
                    part, own = x.batch(torch.arange(start, min(start + size, n)))
                check_data(self.spec, part)
                part = part.to(self.device)
                own = own if self.condition is not None else None
                part_c = self._conditions(own, len(part)) if given is None else given[start : start + size]
                draws = [
                    self._score_once(
                        part,
                        part_c,
                        Noise(seed, "log_prob", r, n=len(part), start=start, device=self.device),
                        settings,
                    )
                    for r in range(repeats)
                ]
                scores.append(_mean_of_draws(draws))
        return cat_scores(scores)

    def _score_once(self, x: Tensor, c: Tensor | None, noise: Noise, settings: Mapping[str, Any]) -> Score:
        assert self.codec.has_density, f"{self.name} scores in the space {self.codec.space!r}, which has no density"
        y, ladj = self.codec.encode(x, noise, dtype=self.dtype)
        score = self._log_prob(y, c, noise, **settings)
        assert score.value.shape == ladj.shape, "_log_prob gives one number per example"
        assert score.unit == "nats", "_log_prob is in nats"
        return replace(
            score,
            value=(score.value.double() + ladj).cpu(),
            kind=combine_kinds(score.kind, self.codec.kind),
            stderr=None if score.stderr is None else score.stderr.double().cpu(),
        )

    def encode(self, x: Tensor, condition: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """Latent codes of examples x (N, *spec.shape); discrete data enter at the middle of their cells."""
        self._require("encode")
        check_data(self.spec, x)
        return self._map(
            lambda part, c: self._encode(self.codec.encode(part, dtype=self.dtype)[0], c),
            x,
            condition,
            batch_size,
        )

    def decode(
        self, z: Tensor, condition: Tensor | None = None, *, rounded: bool = True, batch_size: int | None = None
    ) -> Tensor:
        """Examples (N, *spec.shape) in data units from latent codes z (N, *).

        Arguments:
            rounded: levels are integers; without, they are real numbers that change smoothly with z.
        """
        self._require("decode")
        to_data = self.codec.decode if rounded else self.codec.unrounded
        return self._map(lambda part, c: to_data(self._decode(part, c)), z, condition, batch_size)

    def round_trip(self, x: Tensor, condition: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """Largest |decode(encode(y)) - y| of each example x (N, *spec.shape) in model space, (N,).

        Inverses in closed form leave rounding errors, numerical ones their tolerance.

        Raises:
            CapabilityError: the model is not a bijection.
        """
        if not self.bijective:
            raise CapabilityError(f"{self.name} is not a bijection, so it has no inverse to be exact")
        self._require("decode")
        check_data(self.spec, x)

        def error(part: Tensor, c: Tensor | None) -> Tensor:
            y = self.codec.encode(part, dtype=self.dtype)[0]
            return (self._decode(self._encode(y, c), c) - y).abs().flatten(1).amax(1)

        return self._map(error, x, condition, batch_size)

    def sample_codes(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw n latent codes (n, *); `decode` makes samples of them."""
        if not self.has_prior():
            raise CapabilityError(f"{self.name} does not sample from a latent prior")
        self._require("decode")
        with self.inference():
            return self._prior(Noise(draw_seed(generator), "codes", n=n, device=self.device))

    def example_condition(self, n: int) -> tuple[Tensor, ...]:
        """(a condition of n examples,) to trace networks with, or () for p(x)."""
        if self.condition is None:
            return ()
        dtype = torch.int64 if self.condition.kind == "class" else self.dtype
        return (torch.zeros(n, *self.condition.value_shape, dtype=dtype, device=self.device),)

    def pictures(
        self, data: Split, *, generator: torch.Generator | int | None = 0, **settings: Any
    ) -> dict[str, bytes]:
        """File name -> content (PNG, GIF) of pictures of the process by which samples come about.

        Arguments:
            data: whose first examples are shown.
            generator: seed of the draws; the same gives the same bytes.
            settings: the model's own.
        """
        self.check_pictures(settings)
        with self.inference():
            return self._pictures(data, draw_seed(generator), **settings)

    def check_pictures(self, settings: Mapping[str, Any]) -> None:
        """Refuse a model without a process to be shown, one that is not fitted, and unknown settings."""
        if not self.overrides("_pictures"):
            able = (e for e in registry.entries().values() if e.model.overrides("_pictures"))
            raise CapabilityError(
                f"{self.name} has no process to be shown; models that do: {_listing(e.name for e in able)}"
            )
        if not self.fitted:
            raise NotFittedError(f"this {self.name} is not fitted yet: call fit(data), or load a saved model")
        self._check_settings("_pictures", settings)

    # -- helpers -----------------------------------------------------------------------------------------------

    @property
    def default_batch_size(self) -> int:
        """Examples at once outside training: about a million numbers of data, at least 16."""
        return max(16, min(4096, 2**20 // max(1, self.spec.dims)))

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, evaluation mode; both as they were afterwards."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def _map(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        condition: Tensor | None,
        batch_size: int | None,
    ) -> Tensor:
        c = self._conditions(condition, x.shape[0])
        size = batch_size or self.default_batch_size
        with self.inference():
            parts = [
                function(x[i : i + size].to(self.device), None if c is None else c[i : i + size])
                for i in range(0, x.shape[0], size)
            ]
        return torch.cat(parts)

    def _conditions(self, condition: Tensor | int | Sequence[int] | None, n: int) -> Tensor | None:
        """Check a user's condition and give it its (n, ...) form on the model's device."""
        spec = self.condition
        if spec is None:
            if condition is not None:
                why = (
                    "was fitted without one; train it with conditional=true"
                    if self.condition_kinds
                    else "cannot be conditioned"
                )
                raise UsageError(f"a condition was given, but this {self.name} {why}")
            return None
        if condition is None:
            what = f"{spec.kind} of {_listing(spec.names[:12], sort=False)}" if spec.names else spec.describe()
            raise UsageError(f"this {self.name} is conditional: give {'an' if spec.kind == 'image' else 'a'} {what}")
        c = torch.as_tensor(condition, device=self.device)
        c = c.expand(n, *c.shape) if c.ndim == len(spec.value_shape) else c
        expected = (n, *spec.value_shape)
        if tuple(c.shape) != expected:
            raise UsageError(f"the condition has shape {tuple(c.shape)}, expected {expected}")
        if spec.kind != "class":
            if c.is_complex() or not bool(c.isfinite().all()):
                raise UsageError(f"the {spec.kind} to be conditioned on holds NaN, infinite or complex values")
            if spec.mean:
                return c.double()  # in the user's units, until `ConditionEmbedding` has taken the mean away
            return (to_real(c) if spec.kind == "image" else c).to(self.dtype)
        if c.is_floating_point() or bool(((c < 0) | (c >= spec.size)).any()):
            raise UsageError(f"class indices are integers 0..{spec.size - 1}")
        return c.long()

    @classmethod
    def settings_of(cls, hook: Literal["_sample", "_log_prob", "_pictures"]) -> dict[str, Any]:
        """Settings that a hook takes, with their defaults."""
        parameters = inspect.signature(getattr(cls, hook)).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def _check_settings(self, hook: Literal["_sample", "_log_prob", "_pictures"], settings: Mapping[str, Any]) -> None:
        known = self.settings_of(hook)
        for key in settings:
            if key not in known:
                what = f"{hook.strip('_')} of {self.name}"
                raise UsageError(f"{what} has no setting {key!r}; it has: {', '.join(known) or 'none'}")


def _mean_of_draws(draws: list[Score]) -> Score:
    if len(draws) == 1:
        return draws[0]
    values = torch.stack([d.value for d in draws])
    shared, evaluations = max(d.shared for d in draws), sum(d.evaluations for d in draws)
    # What the draws share, such as the error of log Z, does not show in their spread.
    stderr = (values.var(0, correction=1) / len(draws) + shared**2).sqrt()
    return replace(draws[0], value=values.mean(0), stderr=stderr, shared=shared, evaluations=evaluations)


def _listing(names: Iterable[str], sort: bool = True) -> str:
    return ", ".join(sorted(names) if sort else names) or "none"
