"""The conformance suite: what every `GenerativeModel` promises, tested on yours.

    from trilemma import check_model, create
    check_model(create("my-model", data.spec))

Each check is a plain function that raises `AssertionError` with one sentence. `CHECKS` lists them, so that a test
suite can run them one by one. They train for a few steps only: they test promises, not quality.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.core.codec import check_data
from trilemma.core.errors import CapabilityError, NotFittedError, UsageError
from trilemma.core.model import ABILITIES, GenerativeModel, Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, DataSpec
from trilemma.data.dataset import Dataset, from_tensors
from trilemma.engine import Run, load, resume, train
from trilemma.engine.checkpoint import list_checkpoints, read_checkpoint
from trilemma.engine.fit import ITERATIVE

STEPS = 4
QUICK: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 16,
    "previews": 0,
    "validations": 2,
    "checkpoint_steps": 2,
    "keep": 10,
    "show": False,
}


def example_data(spec: DataSpec, n: int = 96, seed: int = 0) -> Dataset:
    """Random data of a spec: not real, but of the right kind, with every class and category present."""
    g = make_generator("example_data", seed)
    if spec.kind == "table":
        columns = [_example_column(column, n, g) for column in spec.columns]
        x = torch.stack(columns, 1)
    elif spec.levels is not None:
        x = torch.randint(spec.levels, (n, *spec.shape), generator=g)
        x = x.to(torch.uint8 if spec.levels <= 256 else torch.int64)
    else:
        x = torch.randn((n, *spec.shape), generator=g)
    condition: Tensor | None = None
    if spec.condition is not None:
        if spec.condition.kind == "class":
            condition = torch.arange(n) % spec.condition.size
        else:
            condition = torch.randn((n, *spec.condition.value_shape), generator=g)
    return from_tensors(x, spec, name="example", condition=condition)


def _example_column(column: Any, n: int, g: torch.Generator) -> Tensor:
    if column.kind == "categorical":
        x = torch.arange(n).double() % len(column.categories)
    elif column.kind == "boolean":
        x = torch.arange(n).double() % 2
    elif column.values:
        x = torch.tensor(column.values, dtype=torch.float64)[torch.arange(n) % len(column.values)]
    elif column.resolution is not None:
        x = column.offset + column.resolution * torch.randint(20, (n,), generator=g).double()
    else:
        x = torch.randn(n, generator=g, dtype=torch.float64)
    x = x[torch.randperm(n, generator=g)]
    if column.missing:
        x[torch.rand(n, generator=g) < 0.2] = torch.nan
    return x


@dataclass(frozen=True)
class Subject:
    """What a check works on: how to make the model, data for it, and a folder for runs."""

    model: GenerativeModel
    data: Dataset
    folder: Path

    def fresh(self, **settings: Any) -> GenerativeModel:
        """The same model again, unfitted."""
        config = self.model.config.model_dump()
        return type(self.model)(self.model.spec, name=self.model.name, **{**config, **settings})

    def fit(self, name: str, model: GenerativeModel | None = None, **settings: Any) -> tuple[GenerativeModel, Run]:
        """Fit a fresh model for a few steps."""
        model = model or self.fresh()
        quick = {k: v for k, v in QUICK.items() if not (model.is_closed_form() and k in ITERATIVE)}
        return model, train(model, self.data, out=self.folder / name, **{**quick, **settings})

    def condition(self, model: GenerativeModel, n: int) -> Tensor | None:
        """A condition for n samples, where the model needs one."""
        return None if model.condition is None else self.data.train.batch(torch.arange(n) % 8).condition


def check_model(model: GenerativeModel, data: Dataset | None = None) -> None:
    """Run every check of `CHECKS` on an unfitted model.

    Arguments:
        data: of the model's spec; random data by default.

    Raises:
        AssertionError: a promise is broken; the message says which, and how.
    """
    with tempfile.TemporaryDirectory() as folder:
        for check in CHECKS:
            subject = Subject(model, data or example_data(model.spec), Path(folder) / check.__name__)
            check(subject)


def check_constructor_stores(s: Subject) -> None:
    """The constructor learns nothing, refuses unknown settings, and what is not fitted cannot be used."""
    model = s.fresh()
    assert not list(model.parameters()), "the constructor makes parameters; make them in build()"
    assert not model.fitted, "the constructor claims to be fitted"
    for call in (lambda: model.sample(1), lambda: model.save(s.folder)):
        _expect(NotFittedError, call, "an unfitted model was used")
    _expect(UsageError, lambda: s.fresh(no_such_setting=1), "an unknown setting was accepted")


def check_fits_and_samples(s: Subject) -> None:
    """After fit all tensors are finite, samples are valid data, and fit leaves the model in evaluation mode."""
    model, run = s.fit("run")
    assert run.status["state"] == "finished", f"the run ended {run.status}"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert bool(tensor.isfinite().all()), f"{name} is not finite after fit"
    assert not model.training, "fit leaves the model in training mode"
    x = model.sample(9, s.condition(model, 9), generator=0)
    assert x.shape == (9, *s.data.spec.shape), f"sample(9) has shape {tuple(x.shape)}"
    check_data(s.data.spec, x)
    reference = s.data.train.head(1).x
    assert x.dtype == reference.dtype, f"samples are {x.dtype}, data are {reference.dtype}"


def check_gradients(s: Subject) -> None:
    """Each objective's loss is a finite scalar whose gradient is finite and reaches a parameter of its own."""
    model, _ = s.fit("run")
    model.train()
    for objective in model.objectives():
        model.zero_grad()
        n = min(16, len(s.data.train))
        batch = s.data.train.batch(torch.arange(n))
        batch = batch if model.condition is not None else Batch(batch.x)
        losses = objective.loss(batch, Step(Noise(0, "check", n=n, block=n)))
        loss = losses[0] if isinstance(losses, tuple) else losses
        assert loss.ndim == 0, f"the loss {objective.name!r} is not a scalar"
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in objective.parameters if p.grad is not None]
        assert grads, f"the loss {objective.name!r} reaches none of its parameters"
        assert all(bool(g.isfinite().all()) for g in grads), f"the gradient of {objective.name!r} is not finite"


def check_seeds(s: Subject) -> None:
    """The same seed gives the same weights and samples; another seed gives others; batching changes nothing."""
    a, _ = s.fit("a", seed=1)
    b, _ = s.fit("b", seed=1)
    assert same_state(a, b), "two fits with the same seed differ"
    c = s.condition(a, 40)
    one, again = a.sample(40, c, generator=3), b.sample(40, c, generator=3)
    assert _identical(one, again), "the same seed gives different samples"
    other = a.sample(40, c, generator=4)
    assert not _close(one, other), "different seeds give the same samples"
    parts = a.sample(40, c, generator=3, batch_size=7)
    assert _close(one, parts), "samples depend on the batch size they are drawn in"
    prefix = a.sample(5, None if c is None else c[:5], generator=3)
    assert _close(one[:5], prefix), "sample(5) is not the beginning of sample(40)"
    if a.objectives():
        d, _ = s.fit("d", seed=2)
        assert not same_state(a, d), "fits with different seeds are equal: is the seed used?"


def check_no_global_randomness(s: Subject) -> None:
    """Fitting, sampling and scoring leave the global random states of torch, NumPy and Python alone."""

    def states() -> tuple[bytes, bytes, str]:
        state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
        return torch.get_rng_state().numpy().tobytes(), str(state).encode(), str(random.getstate())

    before = states()
    model, _ = s.fit("run")
    c = s.condition(model, 8)
    model.sample(8, c, generator=0)
    if "log_prob" in model.abilities():
        batch = s.data.test.head(8)
        model.log_prob(batch.x, batch.condition if model.condition is not None else None)
    assert states() == before, "a global random state was used; draw from Noise instead"


def check_save_and_load(s: Subject) -> None:
    """What is saved and loaded samples and scores the same, and holds nothing but safetensors and JSON."""
    model, run = s.fit("run")
    model.save(s.folder / "saved")
    suffixes = {p.suffix for p in (s.folder / "saved").iterdir()}
    assert suffixes <= {".safetensors", ".json"}, f"saved files are {suffixes}"
    c = s.condition(model, 8)
    x = model.sample(8, c, generator=0)
    for again in (load(s.folder / "saved"), load(run.path)):
        assert same_state(model, again), "the loaded state differs"
        assert _identical(x, again.sample(8, c, generator=0)), "the loaded model samples differently"
    if "log_prob" in model.abilities():
        batch = s.data.test.head(8)
        c = batch.condition if model.condition is not None else None
        ours, theirs = model.log_prob(batch.x, c), load(s.folder / "saved").log_prob(batch.x, c)
        assert torch.equal(ours.value, theirs.value), "the loaded model scores differently"


def check_resumes(s: Subject) -> None:
    """A run that is cut off at a checkpoint and resumed ends bit for bit where it would have ended."""
    _, whole = s.fit("whole")
    checkpoints = list_checkpoints(whole.checkpoints)
    if not checkpoints:
        return  # a closed-form model has no steps to resume
    cut = s.folder / "cut"
    shutil.copytree(whole.path, cut)
    shutil.rmtree(cut / "model", ignore_errors=True)
    for path in [*list_checkpoints(cut / "checkpoints"), *list_checkpoints(cut / "best")]:
        if path.name > "step-00000002":
            shutil.rmtree(path)
    (cut / "status.json").unlink()
    resume(cut, s.data, show=False)
    ours, theirs = (read_checkpoint(p / "checkpoints" / checkpoints[-1].name) for p in (whole.path, cut))
    for part in ("model", "optimizer", "ema"):
        a, b = getattr(ours, part) or {}, getattr(theirs, part) or {}
        assert a.keys() == b.keys(), f"the resumed run's {part} has other tensors"
        different = [name for name in a if not _identical(a[name], b[name])]
        assert not different, f"the resumed run's {part} differs in {different[:3]}"
    assert same_state(load(whole.path), load(cut)), "the resumed run's final model differs"


def check_abilities(s: Subject) -> None:
    """What is declared works; what is not raises a `CapabilityError`."""
    model, _ = s.fit("run")
    batch = s.data.test.head(8)
    x, c = batch.x, batch.condition if model.condition is not None else None
    can = model.abilities()
    assert can <= set(ABILITIES), f"unknown abilities: {can - set(ABILITIES)}"
    if "log_prob" in can:
        score = model.log_prob(x, c)
        assert score.value.shape == (len(x),), "log_prob gives one number per example"
        assert score.value.dtype == torch.float64, "scores are float64"
        assert bool(score.value.isfinite().all()), "log_prob of data is not finite"
        assert score.unit == "nats", "log_prob is in nats"
        parts = model.log_prob(x, c, batch_size=3)
        gap = (score.value - parts.value).abs().max().item()
        assert gap < 1e-3 * (1 + score.value.abs().max().item()), f"log_prob depends on the batch size, by {gap}"
    else:
        _expect(CapabilityError, lambda: model.log_prob(x, c), "log_prob is not declared but does not refuse")
    if "encode" in can:
        z = model.encode(x, c)
        assert z.shape[0] == len(x), "encode gives one code per example"
        if "decode" in can:
            assert model.decode(z, c).shape == x.shape, "decode(encode(x)) has another shape than x"
    else:
        _expect(CapabilityError, lambda: model.encode(x, c), "encode is not declared but does not refuse")
    _expect(UsageError, lambda: model.sample(2, c, no_such=1), "an unknown sampler setting was accepted")


def check_sampler(s: Subject) -> None:
    """The sampler's knob is a setting of it, its evaluations are counted, and codes from the prior decode to data."""
    model, _ = s.fit("run")
    c = s.condition(model, 4)
    assert model.evaluations() >= (0 if model.is_closed_form() else 1), "evaluations() is not a count"
    knob = model.knob()
    if knob is not None:
        name, values = knob
        assert len(values) > 1, f"the knob {name!r} has no two values"
        ends: list[dict[str, Any]] = [{name: value} for value in (values[0], values[-1])]
        x = [model.sample(4, c, generator=0, **setting) for setting in ends]
        assert not _identical(*x), f"the knob {name!r} changes nothing"
        assert model.evaluations(**ends[0]) <= model.evaluations(**ends[1]), "evaluations fall along the knob"
    if model.has_prior():
        z = model.sample_codes(4, generator=0)
        assert _identical(z, model.sample_codes(4, generator=0)), "the same seed gives other codes"
        check_data(s.data.spec, model.decode(z, c))
    else:
        _expect(CapabilityError, lambda: model.sample_codes(4), "sample_codes without a prior does not refuse")


def check_conditions(s: Subject) -> None:
    """A model that declares a condition uses it; one that does not refuses it."""
    spec = s.data.spec
    if spec.condition is None:
        _expect(UsageError, lambda: s.fresh(conditional=True), "conditional=true was accepted without labels")
        return
    if spec.condition.kind not in s.model.condition_kinds:
        _expect(CapabilityError, lambda: s.fresh(conditional=True), "conditional=true was accepted")
        return
    model, _ = s.fit("conditional", s.fresh(conditional=True))
    c = s.data.train.head(12).condition
    x = model.sample(12, c, generator=0)
    assert x.shape == (12, *spec.shape), "conditional samples have the wrong shape"
    _expect(UsageError, lambda: model.sample(2), "a conditional model sampled without a condition")
    if spec.condition.kind == "class":
        _expect(UsageError, lambda: model.sample(1, spec.condition.size), "a class out of range was accepted")  # type: ignore[union-attr]
    assert c is not None
    assert model.sample(3, c[0], generator=0).shape[0] == 3, "one condition for all samples does not work"
    _expect(UsageError, lambda: model.sample(2, c[:3]), "three conditions for two samples were accepted")
    if "log_prob" in model.abilities():
        batch = s.data.test.head(8)
        assert bool(model.log_prob(batch.x, batch.condition).value.isfinite().all()), "conditional log_prob not finite"
    again = s.fresh(conditional=False)
    s.fit("unconditional", again)
    _expect(UsageError, lambda: again.sample(2, c[:2]), "an unconditional model took a condition")


def check_moves(s: Subject) -> None:
    """All tensors belong to the module: it works after a move to another precision (and GPU, if there is one)."""
    model, _ = s.fit("run")
    if next(model.parameters(), None) is None:
        return
    c = s.condition(model, 4)
    model.double()
    assert model.sample(4, c, generator=0).shape[0] == 4
    if torch.cuda.is_available():
        model.float().cuda()
        assert model.sample(4, c, generator=0).device.type == "cuda"


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_constructor_stores,
    check_fits_and_samples,
    check_gradients,
    check_seeds,
    check_no_global_randomness,
    check_save_and_load,
    check_resumes,
    check_abilities,
    check_sampler,
    check_conditions,
    check_moves,
)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules have bitwise the same tensors."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(_identical(first[k], second[k]) for k in first)


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of differently shaped matrix products, which may move a few discrete values."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    differs = ~torch.isclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
    return bool(differs.double().mean() < 0.02)


def _expect(error: type[Exception], call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{message} (expected {error.__name__})")
