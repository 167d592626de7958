"""Reverse steps and samplers on data whose denoiser is known: exact laws, orders of convergence, traps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.diffusion_oracles import (
    CHAINS,
    F64,
    SCHEDULES,
    WITH_SIGNAL,
    WITHOUT_SIGNAL,
    affine_moments,
    gaussian_flow,
    inner_times,
    total_variance,
    two_modes,
)
from trilemma.core.errors import UsageError
from trilemma.core.noise import make_generator
from trilemma.diffusion.denoiser import Clipped, Denoiser, Estimate, NetworkDenoiser
from trilemma.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from trilemma.diffusion.grid import default_spacing, time_grid
from trilemma.diffusion.ode import flow
from trilemma.diffusion.prediction import PREDICTIONS
from trilemma.diffusion.schedule import VP, Cosine, Discrete, NoiseSchedule, Rectified, linear_betas
from trilemma.diffusion.solvers import (
    SOLVERS,
    Evaluation,
    Exponential,
    Normal,
    Solver,
    _exponential_weights,
    langevin,
    make_solver,
    sample,
)

MEAN, STD = 1.2, 0.5


def no_noise() -> Tensor:
    pytest.fail("noise was drawn")


def normal_of(*key: Any, shape: tuple[int, ...]) -> Normal:
    generator = make_generator(*key)
    return lambda: torch.randn(shape, generator=generator, dtype=F64)


def grid_for(schedule: NoiseSchedule, solver: Solver, n: int) -> Tensor:
    return time_grid(schedule, n, default_spacing(solver.grid, schedule))


def start(schedule: NoiseSchedule, t: Tensor, normal: Tensor) -> Tensor:
    """z_t of N(MEAN, STD^2) from a standard normal draw."""
    return schedule.alpha(t) * MEAN + total_variance(schedule, t, STD).sqrt() * normal


def run(denoiser: Denoiser, solver: Solver, times: Tensor, z: Tensor, normal: Normal) -> Tensor:
    """z at the last of the times: `sample` without its last prediction."""
    past: Any = ()
    for t, s in itertools.pairwise(times):
        z, past = solver.step(denoiser, z, t, s, normal, past)
    return z


def final_law(schedule: NoiseSchedule, t: Tensor) -> tuple[float, float]:
    """Mean and variance of E[x | z_t]."""
    return MEAN, (schedule.alpha(t).square() * STD**4 / total_variance(schedule, t, STD)).item()


# -- the reverse step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("std", [1e-9, 0.4, 1.0, 2.5])
def test_the_reverse_variance_of_gaussian_data_is_that_of_the_joint_law(name: str, std: float):
    """Var(z_s | z_t) by conditioning; of a point the small one, of N(0, 1) with alpha^2 + sigma^2 = 1 the large."""
    schedule = SCHEDULES[name]()
    times = inner_times(schedule, 6)
    denoiser = GaussianDenoiser(schedule, 0.3, std)
    for s, t in itertools.combinations(times, 2):
        z = torch.zeros(1, 1, dtype=F64)
        found = torch.as_tensor(denoiser.reverse_variance(z, t, s, None)).item()
        total_s, total_t = total_variance(schedule, s, std), total_variance(schedule, t, std)
        covariance = schedule.alpha(t) / schedule.alpha(s) * total_s
        assert found == pytest.approx((total_s - covariance.square() / total_t).item(), rel=1e-9)
        back = schedule.back(t, s)
        if std < 1e-6:
            assert found == pytest.approx(back.small.item(), rel=1e-9)
        if std == 1.0 and schedule.variance_preserving:
            assert found == pytest.approx(back.large.item(), rel=1e-9)


def network_denoiser(schedule: NoiseSchedule, x: Tensor, spread: Tensor | None = None, **settings: Any) -> Any:
    """A network that predicts this x0, whatever it sees."""
    return NetworkDenoiser(lambda z, t: (x, spread), schedule, "x0", **settings)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_the_optimal_variance_with_the_true_error_is_exact(name: str):
    schedule = SCHEDULES[name]()
    true = GaussianDenoiser(schedule, MEAN, STD)

    def error(t: Tensor) -> Tensor:
        return STD**2 * schedule.sigma(t).square() / total_variance(schedule, t, STD)

    z = torch.zeros(3, 1, dtype=F64)
    denoiser = network_denoiser(schedule, z, variance="optimal", error=error)
    s, t = inner_times(schedule, 4)[[0, 2]]
    for earlier in (s, None):
        expected = torch.as_tensor(true.reverse_variance(z, t, earlier, None)).expand(3, 1)
        found = torch.as_tensor(denoiser.reverse_variance(z, t, earlier, None), dtype=F64).expand(3, 1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_the_learned_variance_is_the_optimal_one_with_the_networks_error(name: str):
    """Per example: spread = log of the error in units of sigma^2 / (alpha^2 + sigma^2)."""
    schedule = SCHEDULES[name]()
    s, t = inner_times(schedule, 4)[[0, 2]]
    unit = schedule.sigma(t).square() / (schedule.alpha(t).square() + schedule.sigma(t).square())
    z = torch.zeros(2, 1, dtype=F64)
    for error in (0.01, 0.7):
        spread = (error / unit).log().expand(2, 1)
        learned = network_denoiser(schedule, z, variance="learned").reverse_variance(z, t, s, spread)
        optimal = network_denoiser(schedule, z, variance="optimal", error=lambda t, e=error: torch.full_like(t, e))
        torch.testing.assert_close(
            learned, torch.full((2, 1), float(optimal.reverse_variance(z, t, s, None)), dtype=F64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("name", CHAINS)
def test_trap_the_ends_of_the_learned_range_are_the_small_and_the_large_variance(name: str):
    chain = SCHEDULES[name]()
    z = torch.zeros(1, 1, dtype=F64)
    denoiser = network_denoiser(chain, z, variance="learned-range")
    for t, s in ((2.0, 1.0), (9.0, 8.0), (30.0, 11.0), (float(chain.t_max), 1.0)):
        t_s = (torch.tensor(t, dtype=F64), torch.tensor(s, dtype=F64))
        back = chain.back(*t_s)
        for spread, expected in ((-1.0, back.small), (1.0, back.large), (0.0, (back.small * back.large).sqrt())):
            found = denoiser.reverse_variance(z, *t_s, torch.full_like(z, spread))
            assert found.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", CHAINS)
def test_trap_the_log_variance_at_the_clean_step_is_finite(name: str):
    """The posterior's is zero there; the second step's stands in (Nichol & Dhariwal's)."""
    chain = SCHEDULES[name]()
    z, one, two = torch.zeros(1, 1, dtype=F64), torch.tensor(1.0, dtype=F64), torch.tensor(2.0, dtype=F64)
    denoiser = network_denoiser(chain, z, variance="learned-range")
    low, high = (denoiser.reverse_variance(z, one, None, torch.full_like(z, v)).item() for v in (-1.0, 1.0))
    assert low == pytest.approx(chain.back(two, one).small.item(), rel=1e-10)
    assert high == pytest.approx(chain.sigma(one).item() ** 2, rel=1e-10)
    assert 0.0 < low < high


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_trap_a_clipped_x_derives_its_noise_anew(name: str):
    """z = alpha x + sigma eps holds after the clip, and DDIM goes along that pair."""
    schedule = SCHEDULES[name]()
    s, t = inner_times(schedule, 4)[[0, 2]]
    g = make_generator("clip")
    z, far = (3.0 * torch.randn(50, 2, generator=g, dtype=F64) for _ in range(2))
    denoiser = Clipped(network_denoiser(schedule, far), -1.0, 1.0)
    x, eps = denoiser.predict(z, t), denoiser.predict(z, t, "eps")
    torch.testing.assert_close(x, far.clamp(-1.0, 1.0), rtol=0, atol=0)
    torch.testing.assert_close(schedule.alpha(t) * x + schedule.sigma(t) * eps, z, rtol=0, atol=1e-12)
    moved = make_solver("ddim").step(denoiser, z, t, s, no_noise)[0]
    torch.testing.assert_close(moved, schedule.alpha(s) * x + schedule.sigma(s) * eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_of_any_prediction_gives_the_same_reverse_step(name: str, prediction: Any):
    schedule = SCHEDULES[name]()
    if prediction == "mean" and not isinstance(schedule, Discrete):
        return
    exact = two_modes(schedule)
    s, t = inner_times(schedule, 4)[[0, 2]]
    z = torch.randn(20, 2, generator=make_generator("step"), dtype=F64)
    network = NetworkDenoiser(lambda z, t: (exact.predict(z, t, prediction), None), schedule, prediction)
    mean, var = network.posterior(z, t, s)
    expected = exact.posterior(z, t, s)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-10, atol=1e-11)
    assert var == expected.var


# -- laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 13])
def test_ancestral_sampling_of_gaussian_data_is_exact_in_any_number_of_steps(name: str, n: int):
    """With the exact variance z_t of the reverse chain has the data's z_t law, but for the prior's in z_T's place.

    That start is off by d in mean and v in variance; every later law is off by these times the slopes passed.
    """
    schedule = SCHEDULES[name]()
    times, denoiser = time_grid(schedule, n), GaussianDenoiser(schedule, MEAN, STD)
    mean, variance = affine_moments(
        lambda z, normal: sample(denoiser, make_solver("ancestral"), times, schedule.prior_std * z, normal), n
    )
    gain = (schedule.alpha(times[-1]) * STD**2 / total_variance(schedule, times[-1], STD)).item()
    slope = gain  # of E[x | z_last] in z_T: products of Cov(z_s, z_t) / Var z_t
    for t, s in itertools.pairwise(times):
        ratio = schedule.alpha(t) / schedule.alpha(s)
        slope *= (ratio * total_variance(schedule, s, STD) / total_variance(schedule, t, STD)).item()
    first, (_, right) = times[0], final_law(schedule, times[-1])
    assert mean == pytest.approx(MEAN - slope * schedule.alpha(first).item() * MEAN, abs=1e-10)
    off = schedule.prior_std**2 - total_variance(schedule, first, STD).item()
    assert variance == pytest.approx(right + slope**2 * off, abs=1e-10)


SLACK = {
    "ddim": 0.035, "sde": 0.03, "euler": 0.22, "heun": 0.007, "edm": 0.008, "dpm++": 0.003, "exponential": 0.003,
    "pc": 0.004, "ancestral": 1e-8,
}  # fmt: skip
"""Bias of mean and standard deviation, relative to STD, of 100 steps; chains may have six times as much."""


def solver_of(name: str) -> Solver:
    return make_solver(name, churn_noise=1.0) if name == "edm" else make_solver(name)


def moments(schedule: NoiseSchedule, solver: Solver, n: int) -> tuple[float, float]:
    """Mean and variance of samples of N(MEAN, STD^2) from the right start; a random draw stands for z_T."""
    denoiser = GaussianDenoiser(schedule, MEAN, STD)
    if isinstance(schedule, Discrete):
        n = min(n, schedule.steps)
    times = grid_for(schedule, solver, n)
    return affine_moments(
        lambda z, normal: sample(denoiser, solver, times, start(schedule, times[0], z), normal), 2 * n
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", list(SLACK))
def test_every_sampler_gives_gaussian_data_their_mean_and_variance(name: str, sampler: str):
    schedule, solver = SCHEDULES[name](), solver_of(sampler)
    if name in WITHOUT_SIGNAL and sampler == "sde":
        with pytest.raises(UsageError, match="no signal is left"):
            moments(schedule, solver, 10)
        return
    times = grid_for(schedule, solver, min(100, int(schedule.t_max)) if name in CHAINS else 100)
    _, variance = final_law(schedule, times[-1])
    found_mean, found_variance = moments(schedule, solver, 100)
    slack = SLACK[sampler] * (6.0 if name in CHAINS else 1.0)
    assert abs(found_mean - MEAN) < slack * STD
    assert abs(math.sqrt(found_variance) - math.sqrt(variance)) < slack * STD


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_annealed_langevin_follows_its_recursion_and_more_corrections_lower_the_bias(name: str):
    """V <- (1 - d / V_t)^2 V + 2 d at each level, times (alpha_s / alpha_t)^2 between them."""
    schedule = SCHEDULES[name]()
    denoiser, times = GaussianDenoiser(schedule, MEAN, STD), inner_times(schedule, 8).flip(0)
    errors = []
    for corrections in (5, 50):
        solver = make_solver("langevin", corrections=corrections)
        found = affine_moments(
            lambda z, normal, p=solver: run(denoiser, p, times, start(schedule, times[0], z), normal), 400
        )
        variance = total_variance(schedule, times[0], STD)
        for t, s in itertools.pairwise(times):
            d, total = 2.0 * (0.2 * schedule.sigma(t)).square(), total_variance(schedule, t, STD)
            for _ in range(corrections):
                variance = (1 - d / total).square() * variance + 2 * d
            variance = (schedule.alpha(s) / schedule.alpha(t)).square() * variance
        assert found[0] == pytest.approx(schedule.alpha(times[-1]).item() * MEAN, rel=1e-10)
        assert found[1] == pytest.approx(variance.item(), rel=1e-10)
        errors.append(found[1] / total_variance(schedule, times[-1], STD).item() - 1)
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", WITHOUT_SIGNAL)
def test_langevin_dynamics_without_signal_are_refused(name: str):
    schedule = SCHEDULES[name]()
    with pytest.raises(UsageError, match="signal at every level"):
        moments(schedule, make_solver("langevin"), 5)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_the_stochastic_dpm_solver_keeps_the_moments_and_its_noise_is_that_of_the_sde(name: str):
    schedule, solver = SCHEDULES[name](), make_solver("dpm++", stochastic=True)
    mean, variance = moments(schedule, solver, 100)
    slack = 0.06 if name in CHAINS else 0.02
    assert abs(mean - MEAN) < slack * STD
    assert abs(math.sqrt(variance) - STD) < slack * STD
    s, t = inner_times(schedule, 4)[[0, 2]]
    denoiser = GaussianDenoiser(schedule, MEAN, 0.0)  # a point: z_s given z_t is the posterior, exactly
    z = torch.tensor([[0.7]], dtype=F64)
    still = solver.step(denoiser, z, t, s, lambda: torch.zeros(1, 1, dtype=F64))[0]
    moved = solver.step(denoiser, z, t, s, lambda: torch.ones(1, 1, dtype=F64))[0]
    expected = Denoiser.posterior(denoiser, z, t, s)
    torch.testing.assert_close(still, expected.mean, rtol=1e-9, atol=1e-12)
    assert (moved - still).item() ** 2 == pytest.approx(schedule.back(t, s).small.item(), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_renoised_laws_are_those_of_the_recursion(name: str):
    """V_s = (alpha_s g)^2 V_t + sigma_s^2, with g the slope of E[x | z_t]; right only for a point."""
    schedule = SCHEDULES[name]()
    for std in (0.0, STD):
        denoiser, times = GaussianDenoiser(schedule, MEAN, std), inner_times(schedule, 5).flip(0)
        variance = total_variance(schedule, times[0], std)
        for t, s in itertools.pairwise(times):
            gain = schedule.alpha(t) * std**2 / total_variance(schedule, t, std)
            variance = (schedule.alpha(s) * gain).square() * variance + schedule.sigma(s).square()

        def go(z: Tensor, normal: Normal, d: Denoiser = denoiser, times: Tensor = times, std: float = std) -> Tensor:
            z = schedule.alpha(times[0]) * MEAN + total_variance(schedule, times[0], std).sqrt() * z
            return run(d, make_solver("renoise"), times, z, normal)

        found = affine_moments(go, 5)
        assert found[0] == pytest.approx(schedule.alpha(times[-1]).item() * MEAN, rel=1e-10)
        assert found[1] == pytest.approx(variance.item(), rel=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_langevin_keeps_a_law_that_is_off_by_the_order_of_its_step(name: str):
    """z <- (1 - d/V) z + sqrt(2d) n around the mean: stationary at V / (1 - d / 2V), V the level's variance."""
    schedule = SCHEDULES[name]()
    t = inner_times(schedule, 4)[1]
    denoiser, total = GaussianDenoiser(schedule, MEAN, STD), total_variance(schedule, t, STD).item()
    centre = schedule.alpha(t).item() * MEAN
    for snr in (0.1, 0.3):
        d = 2 * (snr * schedule.sigma(t).item()) ** 2
        stationary = total / (1 - d / (2 * total))

        def go(z: Tensor, normal: Normal, v: float = stationary, snr: float = snr) -> Tensor:
            z = centre + math.sqrt(v) * z
            for _ in range(5):
                z = langevin(denoiser, z, t, normal, snr)
            return z

        assert affine_moments(go, 6) == pytest.approx((centre, stationary), rel=1e-10)
        assert stationary / total - 1 < d / total


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_the_correctors_bias_is_of_the_order_of_its_step(name: str):
    """Halving the signal-to-noise ratio, and doubling the corrections, quarters the error of the variance."""
    schedule = SCHEDULES[name]()
    times, denoiser = inner_times(schedule, 8).flip(0), GaussianDenoiser(schedule, MEAN, STD)
    errors = []
    for snr, corrections in ((0.14, 2), (0.07, 8)):
        solver = make_solver("pc", snr=snr, corrections=corrections)
        mean, variance = affine_moments(
            lambda z, normal, p=solver: run(denoiser, p, times, start(schedule, times[0], z), normal), 80
        )
        assert mean == pytest.approx(schedule.alpha(times[-1]).item() * MEAN, rel=1e-10)
        errors.append(variance / total_variance(schedule, times[-1], STD).item() - 1)
    assert 0 < errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.15)


MIXTURE_CASES = [
    (name, sampler)
    for name in ("vp", "edm", "rectified-open", "chain-linear")
    for sampler in SOLVERS
    if sampler not in ("renoise", "langevin") and (name, sampler) != ("ve", "euler")  # which needs many more steps
]


@pytest.mark.parametrize(("name", "sampler"), MIXTURE_CASES)
def test_samples_of_a_mixture_have_its_weights_means_and_spreads(name: str, sampler: str):
    """4000 samples: each of 5 numbers within 4.9 standard errors (1e-6 each; 3e-4 over all cases) and the bias."""
    schedule = SCHEDULES[name]()
    denoiser, solver, n = two_modes(schedule), make_solver(sampler), 4000
    steps = 60 if name in CHAINS else 100
    times = torch.stack(schedule.times).flip(0) if sampler == "rk45" else grid_for(schedule, solver, steps)
    if sampler == "sde" and name == "rectified-open":
        times = time_grid(schedule, steps, "log-snr")
    g = make_generator("mixture", name, sampler)
    x = denoiser.sample(n, g)
    normal = normal_of("mixture noise", name, sampler, shape=(n, 2))
    z = schedule.alpha(times[0]) * x + schedule.sigma(times[0]) * normal()
    found = sample(denoiser, solver, times, z, normal)
    left = found[:, 0] < -0.3  # both modes are more than 3 standard deviations away
    bias = 0.06 if sampler in ("ddim", "euler", "sde", "pc", "edm") or name in CHAINS else 0.03
    share = 0.3 + 0.7 * 0.5 * math.erfc(1.5 / 0.5 / math.sqrt(2)) - 0.3 * 0.5 * math.erfc(1.2 / 0.4 / math.sqrt(2))
    assert abs(left.double().mean().item() - share) < 4.9 * math.sqrt(0.21 / n) + 0.5 * bias * 0.3
    for mode, part in ((0, found[left]), (1, found[~left])):
        std, m = denoiser.std[mode].item(), len(part)
        second = part[:, 1]  # across the line of the cut it is a Gaussian, but for the few of the other mode
        assert abs(second.mean().item() - denoiser.mean[mode, 1].item()) < (4.9 / math.sqrt(m) + bias) * std + 0.004
        assert abs(second.std().item() / std - 1) < 4.9 / math.sqrt(2 * m) + bias + 0.02


# -- equalities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_one_is_ancestral_sampling_with_the_small_variance(name: str):
    schedule = SCHEDULES[name]()
    denoiser, times = two_modes(schedule), time_grid(schedule, 12)
    z = schedule.prior_std * torch.randn(6, 2, generator=make_generator("eta"), dtype=F64)
    results = [
        sample(denoiser, solver, times, z, normal_of("eta noise", shape=(6, 2)))
        for solver in (make_solver("ddim", eta=1.0), make_solver("ancestral"))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_too_large_an_eta_is_refused():
    chain = SCHEDULES["chain-linear"]()
    with pytest.raises(UsageError, match="more noise than there is"):
        sample(two_modes(chain), make_solver("ddim", eta=3.0), time_grid(chain, 30), torch.zeros(1, 2, dtype=F64),
               normal_of("eta", shape=(1, 2)))  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_the_first_order_exponential_solver(name: str):
    schedule = SCHEDULES[name]()
    denoiser, times = two_modes(schedule), time_grid(schedule, 12)
    z = schedule.prior_std * torch.randn(6, 2, generator=make_generator("eta"), dtype=F64)
    results = [sample(denoiser, s, times, z, no_noise) for s in (make_solver("ddim"), Exponential(order=1))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_on_the_straight_path_euler_is_ddim():
    """dz/dt = eps - x is constant where x and eps are, so one Euler step lands on (1 - s) x + s eps."""
    schedule = Rectified()
    denoiser, times = two_modes(schedule), time_grid(schedule, 9, "trailing")
    z = torch.randn(6, 2, generator=make_generator("line"), dtype=F64)
    results = [sample(denoiser, make_solver(s), times, z, no_noise) for s in ("euler", "ddim")]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_churn_the_edm_sampler_is_heun(name: str):
    """Bit for bit where churn is out of its range; for a tiny churn g up to its noise, sqrt(2 g) sigma."""
    schedule = SCHEDULES[name]()
    denoiser, times = two_modes(schedule), time_grid(schedule, 12)
    z = schedule.prior_std * torch.randn(6, 2, generator=make_generator("churn"), dtype=F64)
    heun = sample(denoiser, make_solver("heun"), times, z, no_noise)
    outside = make_solver("edm", churn_from=1e9, churn_to=1e10)
    assert torch.equal(sample(denoiser, outside, times, z, no_noise), heun)
    errors = []
    for churn in (1e-10, 1e-12):
        edm = sample(denoiser, make_solver("edm", churn=churn), times, z, normal_of("churn noise", shape=(6, 2)))
        errors.append((edm - heun).abs().max().item())
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_trap_the_last_step_adds_no_noise(name: str, sampler: str):
    """A sample is the prediction of x at the last time; of a grid of one time, the prediction at that time."""
    schedule, solver = SCHEDULES[name](), make_solver(sampler)
    denoiser = two_modes(schedule)
    z = schedule.prior_std * torch.randn(4, 2, generator=make_generator("last"), dtype=F64)
    last = schedule.times[1]
    torch.testing.assert_close(
        sample(denoiser, solver, last.unsqueeze(0), z, no_noise), denoiser.predict(z, last), rtol=0, atol=0
    )
    times = inner_times(schedule, 3).flip(0)
    moved = run(denoiser, solver, times, z, normal_of("last noise", shape=(4, 2)))
    out = sample(denoiser, solver, times, z, normal_of("last noise", shape=(4, 2)))
    torch.testing.assert_close(out, denoiser.predict(moved, times[-1]), rtol=0, atol=0)


class Counted(Denoiser):
    """Counts what is asked of a denoiser."""

    def __init__(self, inner: Denoiser) -> None:
        self.schedule, self.inner, self.calls = inner.schedule, inner, 0

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        self.calls += 1
        return self.inner.estimate(z, t)


@pytest.mark.parametrize("sampler", [s for s in SOLVERS if s != "rk45"])
@pytest.mark.parametrize("n", [1, 7])
def test_solvers_say_how_often_they_evaluate_the_denoiser(sampler: str, n: int):
    solver, schedule = make_solver(sampler), VP()
    denoiser = Counted(two_modes(schedule))
    sample(denoiser, solver, time_grid(schedule, n), torch.zeros(2, 2, dtype=F64), normal_of("count", shape=(2, 2)))
    assert denoiser.calls == solver.evaluations(n)


def test_unknown_solvers_and_settings_are_named():
    with pytest.raises(UsageError, match="heun"):
        make_solver("huen")
    with pytest.raises(UsageError, match="eta"):
        make_solver("heun", eta=0.5)


# -- order of convergence ---------------------------------------------------------------------------------------


def slope_of(errors: list[float]) -> float:
    """Least-squares order of convergence for grids that double."""
    return float(-np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def errors_of(
    denoiser: Denoiser, solver: Solver, spacing: Any, exact: Callable[[Tensor, Tensor], Tensor], z: Tensor,
    counts: tuple[int, ...],
) -> list[float]:  # fmt: skip
    """Errors of z at the last time, for grids of these numbers of steps."""
    found = []
    for n in counts:
        times = time_grid(denoiser.schedule, n + 1, spacing)
        out = run(denoiser, solver, times, z, no_noise)
        found.append((out - exact(times[0], times[-1])).abs().max().item())
    return found


ORDERS = [
    ("ddim", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpm++", {}, 2),
    ("exponential", {"order": 1}, 1), ("exponential", {"order": 2}, 2),
]  # fmt: skip
SMOOTH = ["vp", "cosine", "edm", "rectified-open", "ve", "sub-vp"]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("sampler", "settings", "order"), ORDERS)
def test_deterministic_solvers_converge_with_their_order_to_the_flow(
    name: str, sampler: str, settings: dict[str, Any], order: int
):
    schedule = SCHEDULES[name]()
    denoiser = GaussianDenoiser(schedule, MEAN, STD)
    t0 = schedule.times[1]
    z = start(schedule, t0, torch.linspace(-2, 2, 5, dtype=F64).unsqueeze(1))
    spacing = "karras" if name == "edm" else "log-snr"
    errors = errors_of(
        denoiser, make_solver(sampler, **settings), spacing,
        lambda t, s: gaussian_flow(schedule, MEAN, STD, z, t, s), z,
        (100, 200, 400) if sampler in ("euler", "heun") else (40, 80, 160),
    )  # fmt: skip
    assert slope_of(errors) == pytest.approx(order, abs=0.15)
    assert errors[-1] < (0.06 if order == 1 else 2e-3)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (3, False), (4, False), (1, True), (2, True)])
def test_the_exponential_solver_with_a_known_past_has_its_order(name: str, order: int, corrector: bool):
    """Its first steps, with no past, are of lower order; here the exact values stand in for them.

    The corrector adds one to the order, at the same number of evaluations.
    """
    schedule = SCHEDULES[name]()
    denoiser, solver = GaussianDenoiser(schedule, MEAN, STD), Exponential(order=order, corrector=corrector)
    first = schedule.time(torch.tensor(-5.0, dtype=F64))  # ends amid the change: no term cancels
    z = start(schedule, first, torch.linspace(-2, 2, 5, dtype=F64).unsqueeze(1))
    errors = []
    for n in (40, 80, 160):
        times = schedule.time(torch.linspace(-5.0, 1.5, n + 1, dtype=F64))
        path = [gaussian_flow(schedule, MEAN, STD, z, first, t) for t in times]
        known = [
            Evaluation(0.5 * float(schedule.log_snr(t)), float(schedule.sigma(t)), p, denoiser.predict(p, t))
            for t, p in zip(times, path, strict=True)
        ]
        past = tuple(known[order - 2 :: -1]) if order > 1 else ()
        state = path[order - 1]
        for t, s in itertools.pairwise(times[order - 1 :]):
            state, past = solver.step(denoiser, state, t, s, no_noise, past)
        errors.append((state - path[-1]).abs().max().item())
    assert slope_of(errors) == pytest.approx(order + corrector, abs=0.35)


@pytest.mark.parametrize("h", [1e-3, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exponential_weights_integrate_polynomials(order: int, h: float):
    """int_a^{a+h} e^(x - a - h) (x - a)^j dx, by parts."""
    nodes = [0.3 - h * d for d in (0.0, 1.0, 1.7, 3.1)[:order]]
    weights = _exponential_weights(nodes, 0.3 + h)
    moment = -math.expm1(-h)
    for j in range(order):
        if j:  # I_j = h^j - j I_{j-1} loses its digits at small h: there by its series
            series = sum(
                (-1) ** k * h ** (j + 1 + k) * math.factorial(j) / math.factorial(j + 1 + k) for k in range(30)
            )
            moment = series if h <= 1 else h**j - j * moment
        found = sum(w * (node - 0.3) ** j for w, node in zip(weights, nodes, strict=True))
        assert found == pytest.approx(moment, rel=1e-8)


@pytest.mark.parametrize("name", ["edm", "rectified-open"])
@pytest.mark.parametrize(("sampler", "settings", "order"), ORDERS)
def test_the_orders_hold_for_a_mixture(name: str, sampler: str, settings: dict[str, Any], order: int):
    """The reference is the adaptive solver at 1e-11."""
    schedule = SCHEDULES[name]()
    denoiser, t0 = two_modes(schedule), schedule.times[1]
    g = make_generator("mixture flow")
    z = schedule.alpha(t0) * denoiser.sample(3, g) + schedule.sigma(t0) * torch.randn(3, 2, generator=g, dtype=F64)
    end = flow(denoiser, z, schedule.t_max, schedule.t_min, rtol=1e-11, atol=1e-11).z
    spacing = "karras" if name == "edm" else "log-snr"
    errors = errors_of(denoiser, make_solver(sampler, **settings), spacing, lambda t, s: end, z, (50, 100, 200))
    assert slope_of(errors) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", [*SMOOTH, "rectified"])
def test_the_adaptive_solver_errs_as_its_tolerance(name: str):
    schedule = SCHEDULES[name]()
    denoiser, (s, t) = GaussianDenoiser(schedule, MEAN, STD), schedule.times
    z = start(schedule, t, torch.linspace(-2, 2, 5, dtype=F64).unsqueeze(1))
    exact = gaussian_flow(schedule, MEAN, STD, z, t, s)
    errors = []
    for tolerance in (1e-4, 1e-7, 1e-10):
        out = make_solver("rk45", rtol=tolerance, atol=tolerance).step(denoiser, z, t, s, no_noise)[0]
        errors.append((out - exact).abs().max().item())
        assert errors[-1] < 100 * tolerance
    assert errors[2] < 1e-2 * errors[1] < 1e-4 * errors[0]


@pytest.mark.parametrize("name", ["vp", "edm", "rectified"])
def test_the_flow_there_and_back_is_the_identity(name: str):
    schedule = SCHEDULES[name]()
    denoiser = two_modes(schedule)
    z = schedule.alpha(schedule.times[0]) * denoiser.sample(4, make_generator("there"))
    there = flow(denoiser, z, schedule.t_min, schedule.t_max, rtol=1e-9, atol=1e-9).z
    back = flow(denoiser, there, schedule.t_max, schedule.t_min, rtol=1e-9, atol=1e-9).z
    torch.testing.assert_close(back, z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "cosine", "ve", "edm", "rectified-open", "sub-vp"])
@pytest.mark.parametrize("sampler", ["sde", "ancestral-small", "ancestral-large"])
def test_stochastic_samplers_converge_weakly_with_order_one(name: str, sampler: str):
    """The error of the variance halves as the steps double."""
    schedule = SCHEDULES[name]()
    exact = GaussianDenoiser(schedule, MEAN, STD)
    variance: Any = sampler.removeprefix("ancestral-")
    denoiser: Denoiser = exact
    if sampler != "sde":
        denoiser = NetworkDenoiser(lambda z, t: (exact.estimate(z, t).x, None), schedule, "x0", variance=variance)
    solver = make_solver(sampler.split("-")[0])
    errors = []
    for n in (50, 100, 200):
        times = schedule.time(torch.linspace(-5.0, 1.5, n + 1, dtype=F64))  # ends amid the change: no term cancels

        def go(z: Tensor, normal: Normal, times: Tensor = times) -> Tensor:
            return run(denoiser, solver, times, start(schedule, times[0], z), normal)

        errors.append(abs(affine_moments(go, n + 1)[1] - total_variance(schedule, times[-1], STD).item()))
    assert slope_of(errors) == pytest.approx(1.0, abs=0.2)


# -- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SOLVERS)
def test_trap_a_sample_does_not_depend_on_its_batch(sampler: str):
    """The adaptive solver's steps and the Langevin step sizes too."""
    schedule, solver = Cosine(), make_solver(sampler)
    denoiser, times = two_modes(schedule), time_grid(schedule, 6)
    g = make_generator("batch")
    z, noise = torch.randn(9, 2, generator=g, dtype=F64), torch.randn(100, 9, 2, generator=g, dtype=F64)
    z[4] *= 20.0  # a stiff neighbour

    def go(rows: slice) -> Tensor:
        draws = iter(noise[:, rows])
        return sample(denoiser, solver, times, z[rows], lambda: next(draws))

    parts = torch.cat([go(slice(i, i + 3)) for i in (0, 3, 6)])
    torch.testing.assert_close(parts, go(slice(0, 9)), rtol=1e-10, atol=1e-10)


def test_a_mixture_is_noised_and_scored_as_its_formulas_say():
    """The oracle itself: E[x | z] by quadrature, and the score as the gradient of its log density."""
    schedule = Discrete(linear_betas(60))
    weight, std = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([0.4, 0.8], dtype=F64)
    oracle = MixtureDenoiser(schedule, weight, torch.tensor([[-1.0], [1.5]], dtype=F64), std)
    x = torch.linspace(-9, 9, 20001, dtype=F64).unsqueeze(1)
    for t in (3.0, 20.0, 60.0):
        time = torch.tensor(t, dtype=F64)
        z = torch.tensor([[-0.8], [0.1], [2.0]], dtype=F64, requires_grad=True)
        a, s = schedule.alpha(time), schedule.sigma(time)
        joint = (oracle.log_prob(x) - 0.5 * ((z - a * x.T) / s).square()).exp()  # (3, grid)
        expected = (joint @ x) / joint.sum(1, keepdim=True)
        torch.testing.assert_close(oracle.estimate(z, time).x, expected, rtol=1e-6, atol=1e-9)
        density = joint.sum(1) * 18 / 20000 / (s * math.sqrt(2 * math.pi))
        torch.testing.assert_close(oracle.log_density(z, time), density.log(), rtol=1e-6, atol=1e-9)
        (score,) = torch.autograd.grad(oracle.log_density(z, time).sum(), z)
        torch.testing.assert_close(oracle.predict(z, time, "score"), score, rtol=1e-9, atol=1e-11)
