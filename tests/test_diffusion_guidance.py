"""Guidance against closed forms: two classes of Gaussian data, whose exact classifier and denoisers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion_oracles import (
    F64,
    SCHEDULES,
    WITH_SIGNAL,
    OracleModel,
    gaussian_flow,
    gaussian_model,
    inner_times,
    two_modes,
)
from trilemma.core.errors import UsageError
from trilemma.core.noise import make_generator
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from trilemma.diffusion.guidance import ClassifierGuided, Guided
from trilemma.diffusion.ode import flow
from trilemma.diffusion.schedule import NoiseSchedule, like
from trilemma.diffusion.solvers import make_solver, sample


def draws(n: int, dims: int = 2) -> Tensor:
    return 2.0 * torch.randn(n, dims, generator=make_generator("guidance"), dtype=F64)


def one_class(schedule: NoiseSchedule, k: int) -> MixtureDenoiser:
    """The k-th mode of `two_modes` alone."""
    both = two_modes(schedule)
    return MixtureDenoiser(schedule, torch.ones(1, dtype=F64), both.mean[k : k + 1], both.std[k : k + 1])


def class_log_prob(both: MixtureDenoiser, k: int) -> Any:
    return lambda z, t: both._parts(z, t)[0].log_softmax(1)[:, k]


class Refuses(GaussianDenoiser):
    def estimate(self, z: Tensor, t: Tensor) -> Any:
        raise AssertionError("the guide was evaluated")


@pytest.mark.parametrize("name", SCHEDULES)
def test_trap_scale_one_is_no_guidance_bit_for_bit(name: str):
    """And the guide is not evaluated."""
    schedule = SCHEDULES[name]()
    good, z = two_modes(schedule), draws(20)
    guided = Guided(good, Refuses(schedule, 0.0, 1.0), 1.0, rescale=0.7)
    for t in inner_times(schedule, 3):
        assert torch.equal(guided.predict(z, t), good.predict(z, t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_guided_estimate_is_linear_in_the_scale(name: str):
    schedule = SCHEDULES[name]()
    good, guide, z, t = (
        two_modes(schedule),
        GaussianDenoiser(schedule, 0.4, 1.3),
        draws(20),
        inner_times(schedule, 3)[1],
    )
    x, worse = good.predict(z, t), guide.predict(z, t)
    for scale in (0.0, 0.5, 3.0, -1.0):
        found = Guided(good, guide, scale).predict(z, t)
        torch.testing.assert_close(found, worse + scale * (x - worse), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", ["eps", "score", "v", "velocity"])
def test_guiding_any_prediction_is_guiding_all_of_them(target: Any):
    """They are affine in x with the same z."""
    schedule = SCHEDULES["vp"]()
    good, guide, z, t = (
        two_modes(schedule),
        GaussianDenoiser(schedule, 0.4, 1.3),
        draws(20),
        inner_times(schedule, 3)[1],
    )
    a, b = good.predict(z, t, target), guide.predict(z, t, target)
    torch.testing.assert_close(Guided(good, guide, 2.5).predict(z, t, target), b + 2.5 * (a - b), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_guidance_acts_in_its_interval_alone(name: str):
    """Each example by its own noise level sigma / alpha: the result does not depend on the others' times."""
    schedule = SCHEDULES[name]()
    good, guide = two_modes(schedule), GaussianDenoiser(schedule, 0.4, 1.3)
    t = inner_times(schedule, 9)
    z = draws(len(t))
    level = schedule.sigma(t) / schedule.alpha(t)
    low, high = sorted(level.tolist())[2] * 0.999, sorted(level.tolist())[-3] * 1.001
    guided = Guided(good, guide, 3.0, interval=(low, high), rescale=0.5)
    found, plain, all_over = (d.predict(z, t) for d in (guided, good, Guided(good, guide, 3.0, rescale=0.5)))
    inside = (level >= low) & (level <= high)
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(found[inside], all_over[inside], rtol=0, atol=0)
    torch.testing.assert_close(found[~inside], plain[~inside], rtol=0, atol=1e-15)
    alone = torch.cat([guided.predict(z[i : i + 1], t[i]) for i in range(len(t))])
    torch.testing.assert_close(alone, found, rtol=1e-12, atol=1e-12)


def test_the_rescaled_guidance_has_the_standard_deviation_of_the_good_estimate():
    """Lin et al., eq. 15-16: at phi = 1 exactly, between by the share."""
    schedule = SCHEDULES["cosine"]()
    good, guide = two_modes(schedule), GaussianDenoiser(schedule, -0.2, 1.3)
    z, t = draws(15), inner_times(schedule, 3)[1]
    plain, full = good.predict(z, t), Guided(good, guide, 4.0).predict(z, t)
    for phi in (1.0, 0.7):
        found = Guided(good, guide, 4.0, rescale=phi).predict(z, t)
        rescaled = full * plain.std(1, keepdim=True) / full.std(1, keepdim=True)
        torch.testing.assert_close(found, phi * rescaled + (1 - phi) * full, rtol=1e-12, atol=1e-12)
        if phi == 1.0:
            torch.testing.assert_close(found.std(1), plain.std(1), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_guiding_one_gaussian_by_another_moves_its_mean_as_the_scale_says(name: str):
    """With equal spreads the guided denoiser is exactly that of N(m0 + w (m1 - m0), s^2): so are its samples."""
    schedule = SCHEDULES[name]()
    m0, m1, std, w = -0.5, 1.0, 0.6, 2.5
    guided = Guided(GaussianDenoiser(schedule, m1, std), GaussianDenoiser(schedule, m0, std), w)
    moved = GaussianDenoiser(schedule, m0 + w * (m1 - m0), std)
    z = draws(9, 1)
    times = inner_times(schedule, 4).flip(0)
    for t in times:
        torch.testing.assert_close(guided.predict(z, t), moved.predict(z, t), rtol=0, atol=1e-11)
        variance = torch.as_tensor(guided.reverse_variance(z, t, times[-1] * 0.9, None))
        torch.testing.assert_close(variance, guided.good.reverse_variance(z, t, times[-1] * 0.9, None), rtol=0, atol=0)
    if name.startswith("chain"):
        return
    end = flow(guided, z, float(times[0]), float(times[-1]), rtol=1e-9, atol=1e-9).z
    exact = gaussian_flow(schedule, m0 + w * (m1 - m0), std, z, times[0], times[-1])
    torch.testing.assert_close(end, exact, rtol=0, atol=1e-6)


# -- classifiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SIGNAL)
@pytest.mark.parametrize("k", [0, 1])
def test_guidance_by_the_exact_classifier_is_bayes_rule(name: str, k: int):
    """Scale 1: the denoiser of the mixture becomes that of the class, at every z and t."""
    schedule = SCHEDULES[name]()
    both = two_modes(schedule)
    z = draws(30)
    for t in inner_times(schedule, 5):
        guided = ClassifierGuided(both, class_log_prob(both, k), 1.0)
        torch.testing.assert_close(guided.predict(z, t), one_class(schedule, k).predict(z, t), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_classifier_and_classifier_free_guidance_agree_at_every_scale(name: str):
    """good = the class, guide = the mixture: their difference is what the classifier says. Scale 0 ignores it."""
    schedule = SCHEDULES[name]()
    both, z = two_modes(schedule), draws(30)
    t = inner_times(schedule, len(z)) if not name.startswith("chain") else inner_times(schedule, 3)[1]
    for scale in (0.0, 0.5, 3.0):
        by_classifier = ClassifierGuided(both, class_log_prob(both, 1), scale).predict(z, t)
        free = Guided(one_class(schedule, 1), both, scale).predict(z, t)
        torch.testing.assert_close(by_classifier, free, rtol=0, atol=1e-10)
    assert torch.equal(ClassifierGuided(both, class_log_prob(both, 1), 0.0).predict(z, t), both.predict(z, t))


def test_samples_of_the_mixture_guided_to_a_class_are_of_the_class():
    """2000 samples: mean within 4.9 standard errors (1e-6 each) and a bias of 0.02."""
    schedule = SCHEDULES["vp"]()
    both, n = two_modes(schedule), 2000
    guided = ClassifierGuided(both, class_log_prob(both, 0), 1.0)
    g = make_generator("guided samples")
    times = torch.linspace(1.0, 1e-3, 60, dtype=F64)
    z = torch.randn(n, 2, generator=g, dtype=F64)
    x = sample(guided, make_solver("heun"), times, z, lambda: torch.randn(n, 2, generator=g, dtype=F64))
    assert (x.mean(0) - both.mean[0]).abs().max().item() < 4.9 * 0.4 / math.sqrt(n) + 0.02
    assert (x.std(0) / 0.4 - 1).abs().max().item() < 4.9 / math.sqrt(2 * n) + 0.03


# -- the model --------------------------------------------------------------------------------------------------


class ByClass(OracleModel):
    """Classes -1 and 2 of spread 0.5; without the condition, as where `present` is false, a Gaussian around 0.5."""

    def network(
        self, z: Tensor, t: Tensor, condition: Tensor | None, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        assert condition is not None
        mean = torch.where(condition == 0, -1.0, 2.0).double()
        mean = mean if present is None else torch.where(present, mean, 0.5)
        x = like(mean, z) + GaussianDenoiser(self.schedule, 0.0, 0.5).predict(
            z - like(self.schedule.alpha(t), z) * like(mean, z), t
        )
        self.seen = present
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (z - like(alpha, z) * x) / like(sigma, z), None


@pytest.fixture
def by_class() -> ByClass:
    spec = DataSpec(kind="points", shape=(2,), condition=ConditionSpec(kind="class", names=("low", "high")))
    settings = {"conditional": True, "schedule": "edm", "prediction": "eps", "width": 8, "depth": 1}
    return ByClass(spec, lambda schedule: GaussianDenoiser(schedule, 0.0, 0.5), **settings)


def test_a_guided_model_samples_what_the_scale_says(by_class: ByClass):
    """By the flow from N(0, 80^2), which is off by (m / 80) of the mean and no more."""
    for guidance in (1.0, 2.0, 3.5):
        for label, mean in ((0, -1.0), (1, 2.0)):
            x = by_class.sample(400, label, generator=0, guidance=guidance, sampler="rk45")
            expected = 0.5 + guidance * (mean - 0.5)
            assert (x.mean(0) - expected).abs().max().item() < 5 * 0.5 / 20 + 0.05
    assert by_class.evaluations(sampler="heun", steps=5, guidance=2.0) == 2 * by_class.evaluations(
        sampler="heun", steps=5
    )


def test_guidance_one_of_a_model_asks_the_network_once_and_is_the_model(by_class: ByClass):
    plain = by_class.sample(7, 1, generator=0, sampler="heun", steps=6)
    assert torch.equal(by_class.sample(7, 1, generator=0, sampler="heun", steps=6, guidance=1.0), plain)
    assert by_class.seen is None
    by_class.sample(7, 1, generator=0, sampler="heun", steps=6, guidance=2.0)
    assert by_class.seen is not None
    assert not by_class.seen.any()


def test_settings_without_effect_are_refused(by_class: ByClass):
    for settings in ({"interval": (0.1, 2.0)}, {"rescale": 0.5}):
        with pytest.raises(UsageError, match="no effect at guidance=1"):
            by_class.sample(1, 0, **settings)
    with pytest.raises(UsageError, match="without a condition"):
        gaussian_model(2, 0.0, 1.0, schedule="edm", width=8, depth=1).sample(1, guidance=2.0)


@pytest.mark.parametrize("sampler", ["rk45", "heun", "pc", "edm", "ancestral"])
def test_trap_guided_samples_do_not_depend_on_the_batch_size(by_class: ByClass, sampler: str):
    labels = [0, 1, 1, 0, 1, 0, 0]
    settings: dict[str, Any] = {"sampler": sampler, "guidance": 2.0, "interval": (0.1, 10.0), "rescale": 0.3}
    if sampler != "rk45":
        settings["steps"] = 8
    whole = by_class.sample(7, labels, generator=3, **settings)
    parts = by_class.sample(7, labels, generator=3, batch_size=2, **settings)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_autoguidance_is_guidance_by_another_model():
    """Both Gaussian: good N(1, 0.5^2), guide N(0.4, 0.5^2), scale 3: N(0.4 + 3 * 0.6, 0.5^2)."""
    settings: dict[str, Any] = {"schedule": "edm", "width": 8, "depth": 1, "prediction": "edm"}
    good, guide = gaussian_model(2, 1.0, 0.5, **settings), gaussian_model(2, 0.4, 0.5, **settings)
    x = good.sample(400, generator=1, guidance=3.0, guide=guide, sampler="rk45")
    assert (x.mean(0) - 2.2).abs().max().item() < 5 * 0.5 / 20 + 0.05
    with pytest.raises(UsageError, match="same data and condition"):
        good.sample(1, guidance=3.0, guide=gaussian_model(3, 0.4, 0.5, **settings))
