"""Settings that are wrong or without effect are refused before the training; what is counted is what is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trilemma as tl
from tests.diffusion_oracles import F64, gaussian_model
from trilemma.check import QUICK
from trilemma.core.errors import UsageError
from trilemma.core.noise import make_generator
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.diffusion.denoiser import Clipped, Denoiser, Estimate
from trilemma.diffusion.exact import MixtureDenoiser
from trilemma.diffusion.guidance import ClassifierGuided, Guided
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.ode import flow
from trilemma.diffusion.schedule import VE, VP, NoiseSchedule

CLASSES = ConditionSpec(kind="class", names=("a", "b"))
POINTS = DataSpec(kind="points", shape=(2,), condition=CLASSES)
IMAGE = DataSpec(kind="image", shape=(1, 8, 8), levels=17, condition=CLASSES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "learned"}, "needs loss=bound"),
        ({"coupling": "optimal-transport"}, "trains the flow only, not sampler=ancestral"),
        ({"coupling": "optimal-transport", "sampler": "heun", "conditional": True}, r"for loss=weighted and p\(x\)"),
        ({"variance": "learned", "loss": "hybrid"}, "of a discrete chain"),
        ({"schedule": "linear", "timesteps": 100, "sampling_steps": 200}, "more than the chain's timesteps=100"),
        ({"schedule": "rectified", "prediction": "velocity", "sampler": "sde"}, "needs a signal at the last time"),
        ({"schedule": "rectified", "prediction": "velocity", "sampling_grid": "karras"}, "give trailing"),
        ({"schedule": "rectified", "prediction": "eps"}, "says nothing of x at t=1"),
        ({"schedule": "linear", "timesteps": 100, "zero_terminal_snr": True, "prediction": "eps"}, "zero terminal SNR"),
        ({"schedule": "rectified", "prediction": "v", "classifier": True, "conditional": True}, "needs a signal"),
        ({"sampler": "rk45", "sampling_grid": "karras"}, "chooses its own times"),
        ({"steps": 1000}, "give --steps"),
        ({"guidance": 2.0}, "a setting of `trilemma sample`"),
        ({"method": "ode"}, "a setting of `trilemma score`"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_the_model_is_made(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        tl.create("diffusion", POINTS, **settings)


@pytest.mark.parametrize("settings", [{"attention_below": 4}, {"backbone": "unet"}, {"flips": True}])
def test_a_network_refuses_what_its_data_have_no_use_for(settings: dict[str, Any]):
    with pytest.raises(UsageError, match=r"no effect|does not fit|is for pictures"):
        tl.create("diffusion", POINTS, **settings).initialize(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "karas"}, "setting 'grid'"),
        ({"steps": "ten"}, "setting 'steps'"),
        ({"steps": 2.5}, "setting 'steps'"),
        ({"clip": False}, "clip has no effect"),
        ({"eta": 0.5}, "eta has no effect on sampler=heun: it is a setting of ddim"),
        ({"sampler": "edm", "churn_from": 5.0, "churn_to": 1.0}, "no noise is ever added"),
        ({"rescale": 0.5}, "rescale has no effect at guidance=1"),
        ({"guidance": 2.0, "rescale": 7.0}, "setting 'rescale'"),
        ({"guidance": 2.0, "interval": [5, 1]}, "0 <= low < high"),
        ({"guidance": 2.0, "interval": "0.2,5"}, "setting 'interval'"),
        ({"guidance": 2.0}, "train it with conditional=true"),
    ],
)
def test_wrong_sampler_settings_are_one_line(settings: dict[str, Any], message: str):
    model = gaussian_model(2, 0.0, 1.0, sampler="heun")
    with pytest.raises(UsageError, match=message) as caught:
        model.sample(2, **settings)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    data = tl.load_data("two-moons")
    model = tl.create("edm", data.spec, conditional=True, width=8, depth=1)
    model.fit(data, out=tmp_path_factory.mktemp("conditional") / "run", **QUICK)
    assert isinstance(model, Diffusion)
    return model


@pytest.mark.parametrize("sampler", ["heun", "dpm++", "pc", "edm", "rk45"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"guidance": 2.0, "interval": (0.1, 3.0)}])
def test_evaluations_are_counted_with_guidance_and_interval(
    conditional: Diffusion, sampler: str, settings: dict[str, Any]
):
    if sampler == "rk45" and settings:
        pytest.skip("its steps depend on what it is guided by")
    settings = {"sampler": sampler, **settings, **({} if sampler == "rk45" else {"steps": 6})}
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1

    handle = conditional.net.register_forward_hook(count)
    conditional.sample(3, 0, generator=0, **settings)
    handle.remove()
    if sampler == "rk45":  # every sample has its own steps; the count is of one
        assert seen >= conditional.evaluations(**settings) / 2
    else:
        assert seen == conditional.evaluations(**settings)


def test_a_guide_is_a_model_of_the_same_data(conditional: Diffusion, tmp_path: Path):
    other = tl.load_data("eight-gaussians")
    stranger = tl.create("edm", other.spec, width=8, depth=1)
    run = stranger.fit(other, out=tmp_path / "run", **QUICK)
    with pytest.raises(UsageError, match="same data and condition"):
        conditional.sample(2, 0, guidance=2.0, guide=stranger)
    with pytest.raises(UsageError, match="same data and condition"):
        conditional.sample(2, 0, guidance=2.0, guide=str(run.path))  # a run's folder is read as one
    itself = conditional.sample(5, 0, generator=1, guidance=2.0, guide=conditional)
    torch.testing.assert_close(itself, conditional.sample(5, 0, generator=1), rtol=1e-5, atol=1e-5)


# -- what follows from the settings --------------------------------------------------------------------------------


class Constant(Denoiser):
    def __init__(self, schedule: NoiseSchedule, x: float) -> None:
        self.schedule, self.x = schedule, x

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        return Estimate(torch.full_like(z, self.x))


def test_the_guided_estimate_is_what_is_clipped():
    schedule, z = VP(), torch.zeros(2, 3, dtype=F64)
    guided = Guided(Constant(schedule, 1.0), Constant(schedule, -1.0), 3.0)
    t = torch.tensor(0.5, dtype=F64)
    assert guided.estimate(z, t).x.unique().tolist() == [5.0]
    clipped = Clipped(guided, -1.0, 1.0)
    assert clipped.estimate(z, t).x.unique().tolist() == [1.0]
    eps = clipped.predict(z, t, "eps")  # the pair still makes z
    torch.testing.assert_close(schedule.alpha(t) * 1.0 + schedule.sigma(t) * eps, z, rtol=0, atol=1e-14)


def test_a_grid_that_begins_below_t_max_starts_with_its_own_noise():
    model = gaussian_model(1, 3.0, 1.0, schedule="ve", prediction="eps", sampler="heun")
    times = model.time_grid(model.solver(), 10, "leading")
    assert isinstance(model.schedule, VE)
    assert model.start_std(times) == pytest.approx(float(model.schedule.sigma(times[0])), rel=1e-12)
    x = model.sample(4000, generator=0, steps=60, grid="leading")
    assert x.std().item() == pytest.approx(1.0, abs=0.06)  # 5 sigma: 0.056


def test_the_flow_guided_by_an_exact_classifier_has_the_divergence_of_the_class():
    """The classifier's own derivative is part of it: tr du/dz of p(x | c) against the guided mixture's."""
    schedule = VP()
    mean, half = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    both = MixtureDenoiser(schedule, half, mean, half)
    one = MixtureDenoiser(schedule, half[:1] * 2, mean[:1], half[:1])

    def log_class(z: Tensor, t: Tensor) -> Tensor:
        return both._parts(z, t)[0].log_softmax(1)[:, 0]

    z = torch.randn(5, 1, generator=make_generator("classifier"), dtype=F64)
    ends = {"rtol": 1e-8, "atol": 1e-8, "exact": True}
    guided = flow(ClassifierGuided(both, log_class, 1.0), z, 0.01, 1.0, **ends)  # type: ignore[arg-type]
    plain = flow(one, z, 0.01, 1.0, **ends)  # type: ignore[arg-type]
    torch.testing.assert_close(guided.z, plain.z, rtol=0, atol=1e-6)
    torch.testing.assert_close(guided.divergence, plain.divergence, rtol=0, atol=1e-6)


def test_coupled_noise_leaves_the_flow_only():
    model = gaussian_model(2, 0.0, 1.0, coupling="optimal-transport", sampler="heun")
    with pytest.raises(UsageError, match="learned a flow, not its SDE"):
        model.sample(2, sampler="ancestral")
    with pytest.raises(UsageError, match="give method=ode"):
        model.log_prob(torch.zeros(2, 2, dtype=F64), method="bound")
    assert model.log_prob(torch.zeros(2, 2, dtype=F64)).method.startswith("probability flow")


def test_the_average_of_weights_comes_with_the_models_own_buffers(tmp_path: Path):
    """The moving average is of the parameters; what the model measured while it trained is as it was at the end."""
    data = tl.load_data("two-moons")
    model = tl.create("diffusion", data.spec, width=8, depth=1)
    run = model.fit(data, steps=12, batch_size=32, ema=0.9, previews=0, show=False, out=tmp_path / "run", validations=0)
    assert isinstance(model, Diffusion)
    assert model.error_count.sum().item() > 0
    again = tl.load(run.path)
    assert isinstance(again, Diffusion)
    assert torch.equal(again.error_count, model.error_count)
    assert torch.equal(again.data_variance, model.data_variance)
