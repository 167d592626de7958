"""Few-step generation against closed forms: flow maps of Gaussians, two steps in one, straight paths; in training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trilemma.check import QUICK, Subject, check_save_and_load, check_seeds, example_data, same_state
from trilemma.core.errors import CapabilityError, CheckpointError, UsageError
from trilemma.core.model import Step
from trilemma.core.noise import Noise
from trilemma.core.registry import create
from trilemma.core.spec import Batch, ConditionSpec, DataSpec
from trilemma.data import load_data
from trilemma.diffusion.consistency import Consistency
from trilemma.diffusion.distillation import Progressive, Reflow, two_steps
from trilemma.diffusion.exact import GaussianDenoiser
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.prediction import convert
from trilemma.diffusion.schedule import EDM, VP, Cosine, NoiseSchedule
from trilemma.diffusion.solvers import DDIM
from trilemma.engine import load, resume, train
from trilemma.engine.checkpoint import list_checkpoints
from trilemma.metrics.wasserstein import sliced_wasserstein

F64 = torch.float64
LINE = DataSpec(kind="points", shape=(1,))
PLANE = DataSpec(kind="points", shape=(2,))
MEAN, STD = 0.3, 0.7
"""Of the Gaussian data of the closed forms, in model space."""

STUDENTS = {"consistency": "edm", "progressive-distillation": "cosine", "rectified-flow": "flow-matching"}
"""Each student with the preset of its teacher; cosine is progressive distillation's own phase of ordinary training."""


def gaussian_model(name: str, **settings: Any) -> Any:
    """An untrained model in float64 whose codec is the identity, for data N(MEAN, STD^2)."""
    model = create(name, LINE, width=8, depth=1, **settings)
    model.initialize(0)
    model.codec.fit(torch.tensor([[-1.0], [1.0]]))
    model.double()
    set_std(model, STD)
    return model


def set_std(model: Any, std: float) -> None:
    model.data_variance.fill_(std**2)
    model._data_std = None


def network_of(model: Diffusion, x_hat: Callable[[Tensor, Tensor, bool], Tensor]) -> Any:
    """A stand-in for `Diffusion.network` that predicts x_hat(z, t, whether it is the teacher's)."""

    def network(
        z: Tensor, t: Tensor, condition: Tensor | None, present: Tensor | None = None, net: nn.Module | None = None
    ) -> tuple[Tensor, None]:
        t = t.clone()  # exact rates are not to be had of an expanded tensor
        x = x_hat(z, t, net is not None)
        return convert(x, "x0", model.config.prediction, z, t, model.schedule, model.data_std), None

    return network


def gauss_hermite(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes x, eps (count^2, 1) and weights (count^2,) of x ~ N(MEAN, STD^2) and eps ~ N(0, 1)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(count))
    first, second = torch.meshgrid(nodes, nodes, indexing="ij")
    weight = torch.outer(weights, weights) / (2 * math.pi)
    return MEAN + STD * first.reshape(-1, 1), second.reshape(-1, 1), weight.flatten()


# -- consistency --------------------------------------------------------------------------------------------------


def flow_end(z: Tensor, t: Tensor) -> Tensor:
    """The consistency function of N(MEAN, STD^2) under z = x + t eps."""
    return MEAN + (z - MEAN) * (STD / (STD**2 + t.square()).sqrt()).unsqueeze(1)


@pytest.mark.parametrize("t", [0.2, 1.0, 5.0])
def test_the_exact_consistency_function_minimises_the_loss_as_r_goes_to_t(t: float, monkeypatch: pytest.MonkeyPatch):
    """E D^2 -> (t - r)^2 s^4 / v_t^2, v = s^2 + t^2, and dL/dtheta = 2 E D (z_t - m) / (t - r) falls with t - r."""
    model = gaussian_model("consistency")
    slope = torch.zeros((), dtype=F64, requires_grad=True)
    jump = lambda z, t, _: flow_end(z, t) + slope * (z - MEAN)  # noqa: E731
    monkeypatch.setattr(model, "network", network_of(model, jump))
    x, eps, weight = gauss_hermite(4)
    v, gradients = STD**2 + t**2, []
    for h in (1e-2, 1e-3, 1e-4):
        r = t * (1 - h)
        times = [torch.full((16,), value, dtype=F64) for value in (t, r)]
        d = model.difference(x, eps, *times, None, None)
        square = (weight @ d.square()).squeeze() / (t - r) ** 2
        assert square.item() == pytest.approx(STD**4 / v**2, rel=3 * h)
        (weight @ d.square() / (t - r)).backward()
        assert slope.grad is not None
        # E[D (z_t - m)] with f = m + a (z - m) and E[(z_r - m)(z_t - m)] = s^2 + r t
        closed = 2 * (STD * v**0.5 - STD * (STD**2 + r * t) / (STD**2 + r**2) ** 0.5) / (t - r)
        assert slope.grad.item() == pytest.approx(closed, rel=1e-4)  # both lose digits to a difference
        gradients.append(abs(slope.grad.item()))
        slope.grad = None
    assert gradients[0] / gradients[1] == pytest.approx(10, rel=0.05)
    assert gradients[1] / gradients[2] == pytest.approx(10, rel=0.05)


def test_at_the_boundary_the_consistency_function_is_the_identity():
    model = gaussian_model("consistency")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=F64))
    x = torch.linspace(-2, 2, 9, dtype=F64).unsqueeze(1)
    errors = []
    for t in (1e-3, 1e-5):
        x_hat = model.denoiser(clip=False).predict(x, torch.tensor(t, dtype=F64))
        errors.append((x_hat - x).abs().max().item())
    assert errors[0] < 0.02
    assert errors[1] < 2e-2 * errors[0]
    # with r = 0 the target is x itself, whatever the network is
    eps, t, zero = torch.ones_like(x), torch.full((9,), 0.5, dtype=F64), torch.zeros(9, dtype=F64)
    found = model.difference(x, eps, t, zero, None, None)
    torch.testing.assert_close(found, model.denoiser().predict(x + 0.5 * eps, t) - x, rtol=0, atol=1e-12)


def test_the_pairs_are_those_of_easy_consistency_tuning():
    model = gaussian_model("consistency")
    set_std(model, 0.5)  # the paper's scale
    t = torch.tensor([0.01, 1.0, 10.0, 80.0], dtype=F64)
    for stage in (1, 3, 8):
        n = 1 + 8 / (1 + t.exp())
        plain = t * (1 - n / 2**stage)
        expected = torch.where(plain < 0.002, 0.0, plain)
        torch.testing.assert_close(model.earlier(t, stage), expected, rtol=1e-12, atol=0)
    assert model.earlier(t, 1).tolist()[:2] == [0.0, 0.0]  # 1 - n / 2 < 0: ordinary training
    set_std(model, 1.0)  # twice the scale: all times double
    ours, theirs = model.earlier(2 * t, 5), 2 * t * (1 - (1 + 8 / (1 + t.exp())) / 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    log_t = model.pair_times(Noise(0, n=4000)).log()  # stratified: the quantiles' error is far below 1/sqrt(4000)
    normal = NormalDist(-1.1 + math.log(2), 2.0)
    low, high = normal.cdf(math.log(0.002)), normal.cdf(math.log(80.0))  # cut to the schedule's range
    for place in (0.1, 0.5, 0.9):
        assert log_t.quantile(place).item() == pytest.approx(normal.inv_cdf(low + place * (high - low)), abs=0.01)


def test_consistency_trains_an_ordinary_denoiser_in_the_first_half_and_tunes_in_the_second(tmp_path: Path):
    model = gaussian_model("consistency")
    assert [model.learned(p) for p in (0.0, 0.49, 0.5, 0.75)] == [None, None, 0.0, 0.5]
    batch, denoiser = Batch(torch.randn(64, 1, generator=torch.Generator().manual_seed(0))), gaussian_model("edm")
    losses = [m.loss(batch, Step(Noise(0, n=64, block=64)))[0].item() for m in (model, denoiser)]
    assert losses[0] == losses[1]
    assert model.time_grid(model.solver(), 1).tolist() == [80.0]
    two, four = model.time_grid(model.solver(), 2), model.time_grid(model.solver(), 4)
    torch.testing.assert_close(four[::2], two)


# -- progressive distillation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Cosine(), VP(), EDM()], ids=["cosine", "vp", "edm"])
def test_one_step_of_the_student_lands_where_two_of_the_teacher_do(schedule: NoiseSchedule):
    teacher = GaussianDenoiser(schedule, MEAN, STD)
    low, high = schedule.times
    times = torch.stack([high, 0.4 * high, 0.1 * high + low])
    z = schedule.prior_std * torch.linspace(-2, 2, 7, dtype=F64).unsqueeze(1)
    normal = lambda: z  # noqa: E731
    there, _ = DDIM().step(teacher, z, times[0], times[1], normal)
    there, _ = DDIM().step(teacher, there, times[1], times[2], normal)
    t, middle, end = (value.expand(7) for value in times)
    x = two_steps(teacher, z, t, middle, schedule.alpha(end), schedule.sigma(end))
    eps = convert(x, "x0", "eps", z, times[0], schedule)
    one = schedule.alpha(times[2]) * x + schedule.sigma(times[2]) * eps
    torch.testing.assert_close(one, there, rtol=1e-10, atol=1e-10)
    # at the end of the grid the last of the two predictions is the target
    middle_z, _ = DDIM().step(teacher, z, times[0], times[1], normal)
    last = two_steps(teacher, z, t, middle, torch.ones(7, dtype=F64), torch.zeros(7, dtype=F64))
    torch.testing.assert_close(last, teacher.predict(middle_z, times[1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", ["cosine", "edm"])
def test_the_loss_of_a_student_that_makes_two_steps_in_one_is_zero_at_every_stage(
    schedule: str, monkeypatch: pytest.MonkeyPatch
):
    model: Progressive = gaussian_model("progressive-distillation", schedule=schedule, from_steps=8, sampling_steps=2)
    exact = GaussianDenoiser(model.schedule, MEAN, STD)

    def x_hat(z: Tensor, t: Tensor, teacher: bool) -> Tensor:
        if teacher:
            return exact.predict(z, t)
        n = 4 if float(progress) < 0.75 else 2
        # The grid of 2 n steps by its definition: even places, the last of which is the prediction
        grid = [model.open_grid(2 * n)[k].item() for k in range(2 * n)]
        assert set(t.tolist()) <= set(grid[::2])
        result = torch.empty_like(z)
        for i, (time, row) in enumerate(zip(t.tolist(), z, strict=True)):
            k = grid.index(time)
            middle = torch.tensor(grid[k + 1], dtype=F64)
            there, _ = DDIM().step(exact, row.unsqueeze(0), t[i], middle, lambda: z)
            if k + 2 == 2 * n:
                result[i] = exact.predict(there, middle)
                continue
            end = torch.tensor(grid[k + 2], dtype=F64)
            there, _ = DDIM().step(exact, there, middle, end, lambda: z)
            # solve z'' = alpha'' x + sigma'' (z - alpha x) / sigma for x
            a, s = (f(end) for f in (model.schedule.alpha, model.schedule.sigma))
            ratio = s / model.schedule.sigma(t[i])
            result[i] = (there - ratio * row) / (a - ratio * model.schedule.alpha(t[i]))
        return result

    monkeypatch.setattr(model, "network", network_of(model, x_hat))
    batch = Batch(torch.zeros(32, 1))
    for progress in (0.5, 0.74, 0.75, 1.0):
        loss, logs = model.loss(batch, Step(Noise(1, n=32, block=32), progress))
        assert loss.item() < 1e-18
        assert logs["steps"].item() == (4 if progress < 0.75 else 2)  # type: ignore[index]
    assert model.stage.item() == 1


def test_the_student_becomes_the_teacher_at_each_halving():
    model: Progressive = gaussian_model("progressive-distillation", from_steps=8, sampling_steps=2)
    batch = Batch(torch.linspace(-1, 1, 8).unsqueeze(1))

    def matches() -> bool:
        own = dict(model.net.named_parameters())
        return all(torch.equal(b, own[name]) for name, b in model.teacher.named_buffers() if name in own)

    for progress, new in ((0.5, True), (0.6, False), (0.75, True), (0.9, False)):
        with torch.no_grad():
            for p in model.net.parameters():
                p.add_(0.1)
        loss, _ = model.loss(batch, Step(Noise(0, n=8, block=8), progress))
        loss.backward()
        assert matches() == new
    assert not list(model.teacher.parameters())  # neither trained nor averaged


# -- reflow -------------------------------------------------------------------------------------------------------


def test_a_gaussian_teachers_pairs_are_straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """x = m + s eps on the pairs, so u(z, t) is known and one Euler step is as good as any number of them."""
    teacher = create("flow-matching", LINE, width=8, depth=1)
    saved(teacher, tmp_path / "teacher")
    model: Reflow = gaussian_model("rectified-flow", teacher=str(tmp_path / "teacher"), teacher_steps=64)
    exact = GaussianDenoiser(model.schedule, MEAN, STD)

    def x_hat(z: Tensor, t: Tensor, teacher: bool) -> Tensor:
        if teacher:
            return exact.predict(z, t)
        eps = (z - ((1 - t) * MEAN).unsqueeze(1)) / ((1 - t) * STD + t).unsqueeze(1)
        return MEAN + STD * eps

    monkeypatch.setattr(model, "network", network_of(model, x_hat))
    losses = []
    for steps in (16, 64):
        monkeypatch.setattr(model, "config", model.config.model_copy(update={"teacher_steps": steps}))
        losses.append(model.loss(Batch(torch.zeros(64, 1)), Step(Noise(0, n=64, block=64)))[0].item())
    assert losses[1] < 1e-6
    assert losses[0] / losses[1] > 4**3.5  # the teacher's flow converges at order 2, its square at order 4
    model.fitted = True
    samples = [model.sample(50, generator=0, sampler="euler", steps=n) for n in (1, 10)]
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-10)
    monkeypatch.setattr(model, "network", network_of(model, lambda z, t, _: exact.predict(z, t)))
    curved = [model.sample(50, generator=0, sampler="euler", steps=n) for n in (1, 10)]
    assert (curved[0] - curved[1]).abs().max() > 0.1


# -- training -----------------------------------------------------------------------------------------------------


def saved(model: Any, path: Path) -> None:
    """Save a model that was fitted for no steps."""
    model.initialize(0)
    model.codec.fit(torch.tensor([[-1.0], [1.0]]))
    model.fitted = True
    model.save(path)


def teacher_of(student: str, spec: DataSpec, **settings: Any) -> Any:
    own = {"cosine": "flow-matching"}.get(STUDENTS[student], STUDENTS[student])
    if STUDENTS[student] == "cosine":
        settings = {**settings, "schedule": "cosine", "prediction": "v", "sampler": "ddim"}
    return create(own, spec, **settings)


@pytest.mark.parametrize("student", STUDENTS)
def test_a_tuned_model_draws_better_samples_in_few_steps_than_its_teacher(student: str, tmp_path: Path):
    """Fixed seeds. The margin, a factor of 2, is well above what other seeds change (2.7 was the least of six)."""
    data = load_data("eight-gaussians")
    quick: dict[str, Any] = {"batch_size": 128, "previews": 0, "validations": 0, "threads": 1, "show": False}
    teacher = teacher_of(student, data.spec, width=64, depth=2)
    train(teacher, data, out=tmp_path / "teacher", steps=500, ema=0.99, **quick)
    model = create(student, data.spec, teacher=str(tmp_path / "teacher"))
    assert (model.config.width, model.config.depth) == (64, 2)  # type: ignore[attr-defined]
    train(model, data, out=tmp_path / "student", steps=250, ema=0.99, **quick)
    real = data.test.head(1000).x.double()
    for n in (1,) if student == "progressive-distillation" else (1, 2):
        drawn = [m.sample(1000, generator=0, steps=n) for m in (teacher, model)]
        theirs, ours = (sliced_wasserstein(x.double(), real).value for x in drawn)
        assert ours < 0.5 * theirs, f"{n} steps: {ours:.3f} against the teacher's {theirs:.3f}"


@pytest.mark.parametrize("student", STUDENTS)
def test_students_with_a_teacher_keep_the_promises(student: str, tmp_path: Path):
    data = example_data(PLANE)
    train(teacher_of(student, PLANE, width=8, depth=1), data, out=tmp_path / "teacher", **QUICK)
    model = create(student, PLANE, teacher=str(tmp_path / "teacher"))
    for check in (check_seeds, check_save_and_load):
        check(Subject(model, data, tmp_path / check.__name__))


@pytest.mark.parametrize("student", STUDENTS)
def test_a_student_needs_no_teacher_to_be_loaded_sampled_and_resumed_bit_for_bit(student: str, tmp_path: Path):
    data = example_data(PLANE)
    teacher = teacher_of(student, PLANE, width=8, depth=1)
    train(teacher, data, out=tmp_path / "teacher", **QUICK)
    settings = {"from_steps": 4} if student == "progressive-distillation" else {}
    model = create(student, PLANE, teacher=str(tmp_path / "teacher"), **settings)
    run = train(model, data, out=tmp_path / "whole", **QUICK)
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(run.path, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    (tmp_path / "cut" / "status.json").unlink()
    for path in list_checkpoints(tmp_path / "cut" / "checkpoints"):
        if path.name > "step-00000002":
            shutil.rmtree(path)
    resume(tmp_path / "cut", data, show=False)
    whole, cut = load(run.path), load(tmp_path / "cut")
    assert same_state(whole, cut)
    assert torch.equal(whole.sample(4, generator=0), cut.sample(4, generator=0))


def test_a_student_starts_from_its_teachers_weights_and_codec(tmp_path: Path):
    teacher = create("edm", PLANE, width=8, depth=1)
    train(teacher, example_data(PLANE), out=tmp_path / "teacher", **QUICK)
    model: Consistency = create("consistency", PLANE, teacher=str(tmp_path / "teacher"))  # type: ignore[assignment]
    model.initialize(5)
    model.prepare(example_data(PLANE, seed=9).train, Noise(0, n=1))  # other data: the codec is the teacher's
    theirs = load(tmp_path / "teacher").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


# -- errors -------------------------------------------------------------------------------------------------------


def test_wrong_teachers_are_refused_in_one_line(tmp_path: Path):
    saved(create("edm", LINE, width=8, depth=1), tmp_path / "edm")
    saved(create("consistency", LINE, width=8, depth=1), tmp_path / "student")
    saved(create("nsf", LINE), tmp_path / "flow")
    saved(create("iddpm", LINE, width=8, depth=1), tmp_path / "learned")

    def make(name: str, teacher: str, spec: DataSpec = LINE, **settings: Any) -> Any:
        return create(name, spec, teacher=str(tmp_path / teacher), **settings)

    with pytest.raises(CheckpointError, match="does not exist"):
        make("consistency", "nowhere")
    with pytest.raises(UsageError, match=r"made for .*2.*, the data|the data are"):
        make("consistency", "edm", PLANE)
    with pytest.raises(UsageError, match=r"has width=8, this consistency has width=16: .* or width=8"):
        make("consistency", "edm", width=16)
    with pytest.raises(UsageError, match="has schedule=edm, this rectified-flow has schedule=rectified"):
        make("rectified-flow", "edm")
    with pytest.raises(UsageError, match="is a consistency: give a diffusion model that denoises"):
        make("consistency", "student")
    with pytest.raises(UsageError, match="is a nsf: give a diffusion model"):
        make("consistency", "flow")
    with pytest.raises(UsageError, match="learns its variance"):
        make("progressive-distillation", "learned")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("consistency", {"schedule": "ve"}, "schedule=edm and prediction=edm"),
        ("consistency", {"coupling": "optimal-transport"}, "trains the flow only, not sampler=renoise"),
        ("progressive-distillation", {"from_steps": 12}, "not sampling_steps=1 times a power of 2"),
        ("progressive-distillation", {"from_steps": 4, "sampling_steps": 4}, "not sampling_steps=4 times a power of 2"),
        ("progressive-distillation", {"schedule": "rectified", "prediction": "velocity"}, "continuous schedule"),
        ("progressive-distillation", {"timesteps": 100}, "continuous schedule"),
        ("progressive-distillation", {"sampling_grid": "leading"}, "sampling_grid=leading does not halve"),
        ("consistency", {"conditional": True, "classifier": True}, "without a noisy classifier"),
        ("rectified-flow", {"teacher_steps": 4}, "no effect without a teacher"),
    ],
)
def test_settings_without_sense_are_refused(name: str, settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        create(name, LINE, **settings)


def test_few_step_models_refuse_other_samplers_steps_and_likelihoods(tmp_path: Path):
    consistency = fitted("consistency")
    with pytest.raises(UsageError, match="sampler=heun: consistency has learned the steps of sampler=renoise only"):
        consistency.sample(2, sampler="heun")
    for wrong in ({"steps": 0}, {"grid": "trailing"}):
        with pytest.raises(UsageError, match=r"at least 1 step on a grid of|setting 'steps'"):
            consistency.sample(2, **wrong)
    progressive = fitted("progressive-distillation", sampling_steps=2)
    with pytest.raises(UsageError, match="distilled to sampling_steps=2"):
        progressive.sample(2, steps=4)
    assert progressive.evaluations() == 2
    for model in (consistency, progressive):
        with pytest.raises(CapabilityError, match="has no log_prob"):
            model.log_prob(torch.zeros(2, 1))
    saved(create("flow-matching", LINE, width=8, depth=1), tmp_path / "teacher")
    reflow = fitted("rectified-flow", teacher=str(tmp_path / "teacher"))
    with pytest.raises(UsageError, match="method=ode"):
        reflow.log_prob(torch.zeros(2, 1), method="bound")
    assert reflow.log_prob(torch.zeros(2, 1)).method.startswith("probability flow")
    assert fitted("rectified-flow").log_prob(torch.zeros(2, 1)).kind == "lower_bound"


def fitted(name: str, **settings: Any) -> Any:
    model = create(name, LINE, width=8, depth=1, **settings)
    model.initialize(0)
    model.codec.fit(torch.tensor([[-1.0], [1.0]]))
    model.fitted = True
    return model


CLASSES = ConditionSpec(kind="class", names=("a", "b"))


@pytest.mark.parametrize("student", STUDENTS)
def test_a_conditional_teacher_makes_a_conditional_student(student: str, tmp_path: Path):
    spec = DataSpec(kind="points", shape=(2,), condition=CLASSES)
    data = example_data(spec)
    train(teacher_of(student, spec, width=8, depth=1, conditional=True), data, out=tmp_path / "teacher", **QUICK)
    model = create(student, spec, teacher=str(tmp_path / "teacher"))
    assert model.config.conditional
    train(model, data, out=tmp_path / "student", **QUICK)
    assert model.sample(3, 1, generator=0).shape == (3, 2)
