"""Schedules, time grids and predictions against Bayes' rule and the formulas of their papers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion_oracles import (
    CHAINS,
    CONTINUOUS,
    F64,
    SCHEDULES,
    WITH_SIGNAL,
    WITHOUT_SIGNAL,
    all_times,
    inner_times,
)
from trilemma.core.errors import UsageError
from trilemma.core.noise import make_generator
from trilemma.core.spec import DataSpec
from trilemma.diffusion.grid import default_spacing, time_grid
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.prediction import PREDICTIONS, conversion, convert, weights
from trilemma.diffusion.schedule import (
    EDM,
    LABELS,
    VE,
    VP,
    Cosine,
    Discrete,
    NoiseSchedule,
    Rectified,
    SubVP,
    betas_of,
    cosine_betas,
    discretized,
    linear_betas,
    zero_terminal_snr,
)


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]()


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> Discrete:
    made = SCHEDULES[request.param]()
    assert isinstance(made, Discrete)
    return made


def pairs(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Times t > s: neighbours, skips, and jumps from t_max."""
    times = all_times(schedule, 12)
    steps = [(t, s) for s, t in itertools.combinations(times.tolist(), 2)]
    t, s = torch.tensor(steps, dtype=F64).unbind(1)
    return t, s


# -- alpha and sigma --------------------------------------------------------------------------------------------


def test_the_chain_step_by_step_is_the_kernel_in_one_jump(chain: Discrete):
    weight, variance = 1.0, 0.0
    for t in range(1, chain.steps + 1):
        beta = chain.betas[t - 1].item()
        weight, variance = math.sqrt(1 - beta) * weight, (1 - beta) * variance + beta
        time = torch.tensor(float(t), dtype=F64)
        assert chain.alpha(time).item() == pytest.approx(weight, rel=1e-11, abs=1e-300)
        assert chain.sigma(time).item() ** 2 == pytest.approx(variance, rel=1e-11)


def test_jumps_compose(schedule: NoiseSchedule):
    """q(z_t | z_r) from q(z_t | z_s) and q(z_s | z_r): the variance passed on plus the variance added."""
    r, s, t = (v.unsqueeze(0) for v in all_times(schedule, 12)[[1, 5, -1]])
    passed = (schedule.alpha(t) / schedule.alpha(s)).square() * schedule.back(s, r).large
    torch.testing.assert_close(passed + schedule.back(t, s).large, schedule.back(t, r).large, rtol=1e-10, atol=0)


def test_skipped_steps_use_the_ratio_of_alpha_bar(chain: Discrete):
    """The jump over several steps has the product of 1 - beta in place of one 1 - beta."""
    t, s = pairs(chain)
    kept = torch.stack([(1 - chain.betas[int(b) : int(a)]).prod() for a, b in zip(t, s, strict=True)])
    torch.testing.assert_close(chain.back(t, s).large, 1 - kept, rtol=1e-10, atol=0)
    ratio = chain.alpha(t) / chain.alpha(s)
    torch.testing.assert_close(ratio.square(), kept, rtol=1e-10, atol=1e-300)


def test_back_is_bayes_rule(schedule: NoiseSchedule):
    """q(z_s | z_t, x) is the product of N(z_t; ratio z_s, jump) and N(z_s; alpha_s x, sigma_s^2), skips included."""
    t, s = pairs(schedule)
    ratio = schedule.alpha(t) / schedule.alpha(s)
    jump = schedule.sigma(t).square() - ratio.square() * schedule.sigma(s).square()
    precision = ratio.square() / jump + 1 / schedule.sigma(s).square()
    back = schedule.back(t, s)
    close = {"rtol": 1e-8, "atol": 1e-14}
    torch.testing.assert_close(back.large, jump, **close)
    torch.testing.assert_close(back.small, 1 / precision, **close)
    torch.testing.assert_close(back.z_weight, ratio / jump / precision, **close)
    torch.testing.assert_close(back.x_weight, schedule.alpha(s) / schedule.sigma(s).square() / precision, **close)


def test_back_after_the_noising_is_the_noising_of_the_earlier_time(schedule: NoiseSchedule):
    t, s = pairs(schedule)
    back = schedule.back(t, s)
    torch.testing.assert_close(back.x_weight + back.z_weight * schedule.alpha(t), schedule.alpha(s), rtol=1e-11, atol=0)
    variance = back.small + back.z_weight.square() * schedule.sigma(t).square()
    torch.testing.assert_close(variance, schedule.sigma(s).square(), rtol=1e-11, atol=0)


def test_at_the_small_variance_a_term_of_the_bound_weighs_as_the_fall_of_the_snr(schedule: NoiseSchedule):
    t, s = pairs(schedule)
    back = schedule.back(t, s)
    fall = schedule.log_snr(s).exp() - schedule.log_snr(t).exp()
    torch.testing.assert_close(back.x_weight.square() / back.small, fall, rtol=1e-8, atol=0)


def test_the_posterior_of_the_clean_data_given_them_is_a_point(chain: Discrete):
    """Trap: the logarithm of this variance is minus infinity."""
    back = chain.back(torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64))
    assert (back.x_weight.item(), back.z_weight.item(), back.small.item()) == (1.0, 0.0, 0.0)
    assert back.large.item() == pytest.approx(chain.betas[0].item(), rel=1e-12)


def test_the_snr_falls_and_the_flags_are_true(schedule: NoiseSchedule):
    t = all_times(schedule, 500)
    assert (schedule.log_snr(t).diff() < 0).all()
    total = schedule.alpha(t).square() + schedule.sigma(t).square()
    preserved = bool((total - 1.0).abs().max() < 1e-13)
    assert preserved == schedule.variance_preserving
    assert schedule.ends_without_signal == (schedule.alpha(t[-1]).item() == 0.0)


def test_which_schedules_end_without_signal():
    assert [name for name, make in SCHEDULES.items() if make().ends_without_signal] == WITHOUT_SIGNAL


def test_time_is_the_inverse_of_the_log_snr(schedule: NoiseSchedule):
    """To 1e-13 / |t lambda'|, the conditioning of the inverse, relative to t; a chain's alpha near 1 loses digits."""
    t = all_times(schedule, 300)
    if schedule.ends_without_signal:
        t = t[:-1]
    found = schedule.time(schedule.log_snr(t))
    slack = 1e-13 * (1.0 + (1.0 + schedule.log_snr(t).abs()) / schedule.log_snr_rate(t).abs() / t.clamp(min=1e-300))
    slack = slack + (1e-9 if isinstance(schedule, Discrete) else 0.0)
    assert ((found - t).abs() <= slack * t + 1e-16).all()


def test_time_finds_the_last_step_of_a_chain_without_signal():
    chain = SCHEDULES["chain-zero"]()
    last = chain.times[1]
    assert chain.time(chain.log_snr(last)).item() == last.item()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_rates_are_the_derivatives(name: str):
    """Against central differences of fourth order."""
    schedule = SCHEDULES[name]()
    t = inner_times(schedule, 9)
    h = 1e-3 * t

    def slope(f: Any) -> Tensor:
        return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)

    da, ds = schedule.rates(t)
    torch.testing.assert_close(da, slope(schedule.alpha), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(ds, slope(schedule.sigma), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(schedule.log_snr_rate(t), slope(schedule.log_snr), rtol=1e-7, atol=0)


def test_rates_of_a_chain_are_those_of_its_interpolation(chain: Discrete):
    t = torch.arange(2, chain.steps + 1, dtype=F64) - 0.4
    da, ds = chain.rates(t)
    for rate, f in ((da, chain.alpha), (ds, chain.sigma)):
        torch.testing.assert_close(rate, (f(t + 1e-6) - f(t - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-9)
    steps = torch.arange(1, chain.steps, dtype=F64)  # the slope has no jumps there
    torch.testing.assert_close(chain.rates(steps - 1e-9)[0], chain.rates(steps + 1e-9)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_g_is_what_keeps_the_variance(name: str):
    """d sigma^2 / dt = 2 f sigma^2 + g^2, at every t where there is signal."""
    schedule = SCHEDULES[name]()
    t = inner_times(schedule, 20, -6.0, 6.0)
    grown = 2 * schedule.sigma(t) * schedule.rates(t)[1]
    torch.testing.assert_close(
        2 * schedule.drift(t) * schedule.sigma(t).square() + schedule.diffusion(t).square(),
        grown,
        rtol=1e-9,
        atol=1e-12,
    )


def test_drift_and_diffusion_are_those_of_the_papers():
    """Song et al. 2021, table of SDEs; Karras et al. 2022; the others by hand."""
    t = torch.linspace(0.05, 0.9, 18, dtype=F64)
    beta = 0.1 + 19.9 * t
    lost = -torch.expm1(-2 * (0.1 * t + 0.5 * 19.9 * t.square()))
    ratio = math.log(50.0 / 0.01)
    cases: list[tuple[NoiseSchedule, Tensor, Tensor]] = [
        (VP(), -0.5 * beta, beta.sqrt()),
        (SubVP(), -0.5 * beta, (beta * lost).sqrt()),
        (VE(), 0 * t, 0.01 * (t * ratio).exp() * math.sqrt(2 * ratio)),
        (EDM(), 0 * t, (2 * t).sqrt()),
        (Cosine(), -0.5 * math.pi * (0.5 * math.pi * t).tan(), (math.pi * (0.5 * math.pi * t).tan()).sqrt()),
        (Rectified(), -1 / (1 - t), (2 * t / (1 - t)).sqrt()),
    ]
    for schedule, drift, diffusion in cases:
        torch.testing.assert_close(schedule.drift(t), drift, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(schedule.diffusion(t), diffusion, rtol=1e-10, atol=0)


def test_labels_rise_from_the_data_to_1000(schedule: NoiseSchedule):
    label = schedule.label(all_times(schedule, 50))
    assert (label.diff() > 0).all()
    assert label.min().item() >= -1e-9
    assert label[-1].item() == pytest.approx(LABELS)


# -- betas ------------------------------------------------------------------------------------------------------


def test_the_linear_betas_are_those_of_ho_et_al_and_the_end_does_not_depend_on_the_number_of_steps():
    torch.testing.assert_close(linear_betas(1000), torch.linspace(1e-4, 0.02, 1000, dtype=F64), rtol=1e-14, atol=0)
    ends = [2 * math.log(float(Discrete(linear_betas(n)).alpha(torch.tensor(float(n))))) for n in (250, 1000, 4000)]
    assert ends == pytest.approx([ends[1]] * 3, rel=0.03)
    with pytest.raises(ValueError, match="more than 20"):
        linear_betas(20)


@pytest.mark.parametrize("steps", [21, 300, 1000])
def test_the_cosine_betas_are_those_of_nichol_and_dhariwal(steps: int):
    s = 0.008
    f = [math.cos((t / steps + s) / (1 + s) * math.pi / 2) ** 2 for t in range(steps + 1)]
    betas = torch.tensor([min(1 - f[t] / f[t - 1], 0.999) for t in range(1, steps + 1)], dtype=F64)
    torch.testing.assert_close(cosine_betas(steps), betas, rtol=1e-9, atol=0)
    assert cosine_betas(steps)[-1].item() == 0.999


@pytest.mark.parametrize("betas", [linear_betas(60), linear_betas(1000), cosine_betas(50)])
def test_zero_terminal_snr_keeps_the_first_alpha_and_ends_at_zero(betas: Tensor):
    """And in between alpha is an affine map of the old one (Lin et al. 2024, algorithm 1)."""
    t = torch.arange(1, len(betas) + 1, dtype=F64)
    before, after = Discrete(betas).alpha(t), Discrete(zero_terminal_snr(betas)).alpha(t)
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-14)
    assert after[-1].item() == 0.0
    torch.testing.assert_close(after, (before - before[-1]) * after[0] / (before[0] - before[-1]), rtol=1e-10, atol=0)


def test_betas_and_alphas_are_inverse_to_one_another():
    betas = linear_betas(200)
    torch.testing.assert_close(
        betas_of(Discrete(betas).alpha(torch.arange(1, 201, dtype=F64))), betas, rtol=1e-11, atol=0
    )


def test_a_discretized_schedule_passes_through_its_noise_levels():
    schedule, chain = VP(), discretized(VP(), 70)
    t = torch.linspace(schedule.t_min, schedule.t_max, 70, dtype=F64)
    steps = torch.arange(1, 71, dtype=F64)
    torch.testing.assert_close(chain.log_snr(steps), schedule.log_snr(t), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [[0.0, 0.1], [0.1, 1.1], [1.0, 0.1]])
def test_betas_outside_the_unit_interval_are_refused(bad: list[float]):
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        Discrete(torch.tensor(bad, dtype=F64))


# -- grids ------------------------------------------------------------------------------------------------------

SPACINGS: list[Any] = ["linspace", "trailing", "leading", "karras", "log-snr"]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_grids_fall_within_the_schedule(schedule: NoiseSchedule, spacing: Any, n: int):
    if schedule.ends_without_signal and spacing in ("karras", "log-snr"):
        with pytest.raises(ValueError, match="needs a signal"):
            time_grid(schedule, n, spacing)
        return
    t = time_grid(schedule, n, spacing)
    assert t.shape == (n,)
    assert (t.diff() < 0).all()
    assert t.max().item() <= schedule.t_max
    assert t.min().item() >= schedule.t_min
    if spacing != "leading":
        assert t[0].item() == schedule.t_max
    if n > 1 and spacing != "trailing":
        assert t[-1].item() == schedule.t_min
    if isinstance(schedule, Discrete) and spacing in ("linspace", "trailing", "leading"):
        assert torch.equal(t, t.round())


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_grids_are_even_in_what_they_say(name: str):
    schedule = SCHEDULES[name]()
    log_snr = schedule.log_snr(time_grid(schedule, 20, "log-snr"))
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(19), rtol=1e-6, atol=0)
    noise = (-0.5 * schedule.log_snr(time_grid(schedule, 20, "karras"))).exp() ** (1 / 7)
    torch.testing.assert_close(noise.diff(), noise.diff().mean().expand(19), rtol=1e-6, atol=0)


def test_karras_levels_are_those_of_the_paper():
    """Eq. 5: (smax^(1/7) + i / (n - 1) (smin^(1/7) - smax^(1/7)))^7."""
    i = torch.arange(18, dtype=F64) / 17
    expected = (80.0 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    torch.testing.assert_close(time_grid(EDM(), 18, "karras"), expected, rtol=1e-12, atol=0)


def test_a_chain_has_its_steps_and_no_more():
    chain = Discrete(linear_betas(60))
    for spacing in ("linspace", "trailing", "leading"):
        assert torch.equal(time_grid(chain, 60, spacing), torch.arange(60, 0, -1, dtype=F64))  # type: ignore[arg-type]
    assert time_grid(chain, 6, "trailing").tolist() == [60, 50, 40, 30, 20, 10]
    assert time_grid(chain, 6, "leading").tolist() == [51, 41, 31, 21, 11, 1]
    for n in (0, 61):
        with pytest.raises(ValueError, match=r"at least 1|between 1 and 60"):
            time_grid(chain, n)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_trailing_grid_of_many_times_stays_above_the_least_noise(name: str):
    schedule = SCHEDULES[name]()
    assert time_grid(schedule, 5000, "trailing").min().item() >= schedule.t_min


def test_a_solver_gets_its_spacing_where_the_schedule_has_it():
    assert default_spacing("log-snr", VP()) == "log-snr"
    assert default_spacing(None, VP()) == "linspace"
    assert default_spacing("log-snr", Rectified()) == "trailing"
    assert default_spacing("log-snr", EDM()) == "karras"


# -- predictions ------------------------------------------------------------------------------------------------


def truth(schedule: NoiseSchedule, t: Tensor, x: Tensor, eps: Tensor, d: float) -> dict[str, Tensor]:
    """Every target from its paper's own words; x, eps (N, 3), t (N,)."""
    a, s = schedule.alpha(t).unsqueeze(1), schedule.sigma(t).unsqueeze(1)
    z = a * x + s * eps
    da, ds = (v.unsqueeze(1) for v in schedule.rates(t))
    total = (a * d).square() + s.square()
    found = {
        "x0": x,
        "eps": eps,
        "v": a * eps - s * x,
        "score": -(z - a * x) / s.square(),
        "velocity": da * x + ds * eps,
        "edm": (x - a * d**2 / total * z) / (s * d / total.sqrt()),  # c_skip, c_out
    }
    if isinstance(schedule, Discrete):
        back = schedule.back(t, t - 1)
        found["mean"] = back.x_weight.unsqueeze(1) * x + back.z_weight.unsqueeze(1) * z
    return found


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_predictions_convert_into_the_truth_and_back(schedule: NoiseSchedule, source: Any, target: Any):
    """Where SNR is within e^-4 .. e^4, to 1e-12 of the values' size."""
    if "mean" in (source, target) and not isinstance(schedule, Discrete):
        return
    t, g = inner_times(schedule, 6), make_generator("convert")
    x, eps = (torch.randn(len(t), 3, generator=g, dtype=F64) for _ in range(2))
    z = schedule.alpha(t).unsqueeze(1) * x + schedule.sigma(t).unsqueeze(1) * eps
    true = truth(schedule, t, x, eps, 0.6)
    there = convert(true[source], source, target, z, t, schedule, 0.6)
    size = true[target].abs().max() + (conversion(source, target, t, schedule, 0.6)[0].abs() * z.abs().amax(1)).max()
    torch.testing.assert_close(there, true[target], rtol=0, atol=1e-12 * size.item())
    back = convert(there, target, source, z, t, schedule, 0.6)
    size = true[source].abs().max() + (conversion(target, source, t, schedule, 0.6)[0].abs() * z.abs().amax(1)).max()
    torch.testing.assert_close(back, true[source], rtol=0, atol=1e-12 * size.item())


@pytest.mark.parametrize("source", ["x0", "v", "velocity", "edm"])
def test_at_the_ends_x_is_found_to_the_conditioning(schedule: NoiseSchedule, source: Any):
    """At t_min and at t_max, even without signal: an error of 1e-13 in z and in the prediction, carried over."""
    t = torch.stack(schedule.times)
    g = make_generator("ends")
    x, eps = (torch.randn(2, 3, generator=g, dtype=F64) for _ in range(2))
    z = schedule.alpha(t).unsqueeze(1) * x + schedule.sigma(t).unsqueeze(1) * eps
    value = truth(schedule, t, x, eps, 0.6)[source]
    of_z, of_value = (c.abs().unsqueeze(1) for c in conversion(source, "x0", t, schedule, 0.6))
    slack = 1e-13 * (1.0 + of_z * z.abs() + of_value * value.abs())
    assert ((convert(value, source, "x0", z, t, schedule, 0.6) - x).abs() <= slack).all()


def test_the_mean_of_a_continuous_schedule_is_refused():
    with pytest.raises(ValueError, match="discrete schedule"):
        weights("mean", VP(), torch.tensor(0.5, dtype=F64))


def test_the_mean_of_a_chains_first_step_is_x(chain: Discrete):
    p, q = weights("mean", chain, torch.tensor(1.0, dtype=F64))
    assert (p.item(), q.item()) == (1.0, 0.0)


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_zero_terminal_snr_with_a_prediction_of_the_noise_is_refused(prediction: str):
    """Trap: at alpha = 0 the noise is z itself and says nothing of x."""
    spec = DataSpec(kind="points", shape=(2,))
    with pytest.raises(UsageError, match="zero terminal SNR"):
        Diffusion(spec, schedule="linear", timesteps=60, zero_terminal_snr=True, prediction=prediction)
    with pytest.raises(UsageError, match="no signal is left"):
        Diffusion(spec, schedule="rectified", prediction=prediction)
    chain = SCHEDULES["chain-zero"]()
    assert not torch.isfinite(torch.stack(conversion(prediction, "x0", chain.times[1], chain))).any()  # type: ignore[arg-type]
