"""Diffusion against closed forms: Bayes' rule, Gaussian data with the exact denoiser, orders of convergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilemma.core.errors import UsageError
from trilemma.core.model import Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit
from trilemma.diffusion.bound import bound_term, gaussian_log_prob, lattice_log_prob, prior_term, strata
from trilemma.diffusion.ddpm import DDPM
from trilemma.diffusion.prediction import convert
from trilemma.diffusion.sampling import Denoiser, clip_to, sample_ancestral, sample_ddim
from trilemma.diffusion.schedule import Schedule, linear_betas, make_schedule, spaced_times

F64 = torch.float64
SCHEDULES = [("linear", 40), ("linear", 1000), ("cosine", 21), ("cosine", 1000)]


def gaussian_denoiser(schedule: Schedule, mean: float, std: float) -> Denoiser:
    """E[x | z_t] for x ~ N(mean, std^2)."""

    def denoise(z: Tensor, t: int) -> Tensor:
        a, v = schedule.alpha[t], schedule.variance[t]
        return mean + std**2 * a / (a**2 * std**2 + v) * (z - a * mean)

    return denoise


# -- schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "steps"), SCHEDULES)
def test_the_chain_step_by_step_is_the_kernel_in_one_jump(shape: Any, steps: int):
    schedule = make_schedule(shape, steps, 0.02)
    weight, variance = 1.0, 0.0
    for t in range(1, steps + 1):
        beta = schedule.betas[t - 1].item()
        weight, variance = math.sqrt(1 - beta) * weight, (1 - beta) * variance + beta
        assert schedule.alpha[t].item() == pytest.approx(weight, rel=1e-11)
        assert schedule.variance[t].item() == pytest.approx(variance, rel=1e-11)
    torch.testing.assert_close(
        schedule.alpha**2 + schedule.sigma**2, torch.ones(steps + 1, dtype=F64), rtol=0, atol=1e-14
    )
    assert (schedule.snr.diff() < 0)[1:].all()


@pytest.mark.parametrize(("shape", "steps"), SCHEDULES)
def test_the_posterior_is_bayes_rule(shape: Any, steps: int):
    """q(z_{t-1} | z_t, x) from the product of N(z_t; sqrt(1-beta) z, beta) and N(z; alpha_{t-1} x, sigma_{t-1}^2)."""
    s = make_schedule(shape, steps, 0.02)
    beta, v = s.betas[1:], s.variance[1:-1]
    precision = (1 - beta) / beta + 1 / v
    torch.testing.assert_close(s.posterior_variance[2:], 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(s.posterior_z[2:], (1 - beta).sqrt() / beta / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(s.posterior_x[2:], s.alpha[1:-1] / v / precision, rtol=1e-9, atol=0)
    first = [s.posterior_x[1].item(), s.posterior_z[1].item(), s.posterior_variance[1].item()]
    assert first == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)  # the posterior of z_0 given x is x
    weight = s.posterior_x[2:].square() / (2 * s.posterior_variance[2:])
    torch.testing.assert_close(weight, 0.5 * (s.snr[1:-1] - s.snr[2:]), rtol=1e-7, atol=1e-12)


def test_the_schedules_are_those_of_their_papers():
    betas = linear_betas(1000)
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=F64), rtol=1e-14, atol=0)
    log_ends = [math.log(make_schedule("linear", t, 0.02).alpha_bar[-1].item()) for t in (250, 1000, 4000)]
    assert log_ends == pytest.approx([log_ends[1]] * 3, rel=0.03)  # T changes the step, not the end
    with pytest.raises(ValueError, match="more than 20"):
        linear_betas(20)
    cosine = make_schedule("cosine", 300, 0.03)
    assert cosine.sigma[1].item() == pytest.approx(0.03, rel=1e-12)
    assert cosine.alpha[-1].item() == pytest.approx(0.01, rel=1e-10)
    angles = torch.atan2(cosine.sigma, cosine.alpha)[1:]
    torch.testing.assert_close(angles.diff(), angles.diff()[:1].expand(299), rtol=1e-9, atol=0)


def test_a_respaced_chain_passes_through_the_same_noise_levels():
    schedule = make_schedule("cosine", 500, 0.02)
    times = spaced_times(500, 37)
    assert (times[0], times[-1], len(set(times))) == (1, 500, 37)
    short = schedule.respace(times)
    torch.testing.assert_close(short.alpha_bar[1:], schedule.alpha_bar[times], rtol=1e-11, atol=0)
    assert spaced_times(8, 8) == list(range(1, 9))
    assert spaced_times(8, 1) == [8]
    with pytest.raises(ValueError, match="between 1 and 8"):
        spaced_times(8, 9)


def test_betas_outside_the_open_unit_interval_are_refused():
    for bad in ([0.0, 0.1], [0.1, 1.0]):
        with pytest.raises(ValueError, match=r"\(0, 1\)"):
            Schedule(torch.tensor(bad, dtype=F64))


# -- predictions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["eps", "v", "x"])
@pytest.mark.parametrize("target", ["eps", "v", "x"])
def test_predictions_convert_into_the_truth_and_back(source: Any, target: Any):
    g = make_generator("convert")
    x, eps = torch.randn(5, 2, 3, generator=g, dtype=F64), torch.randn(5, 2, 3, generator=g, dtype=F64)
    angle = torch.linspace(0.1, 1.47, 5, dtype=F64)
    alpha, sigma = angle.cos(), angle.sin()
    a, s = alpha[:, None, None], sigma[:, None, None]
    z = a * x + s * eps
    truth = {"x": x, "eps": eps, "v": a * eps - s * x}
    there = convert(truth[source], source, target, z, alpha, sigma)
    torch.testing.assert_close(there, truth[target], rtol=0, atol=1e-12)
    torch.testing.assert_close(convert(there, target, source, z, alpha, sigma), truth[source], rtol=0, atol=1e-12)


# -- samplers ---------------------------------------------------------------------------------------------------


def affine_moments(sampler: Any, steps: int) -> tuple[float, float]:
    """Exact mean and variance of an affine sampler's output: one run per noise variable, all in one batch."""
    calls = 0

    def one_hot() -> Tensor:
        nonlocal calls
        calls += 1
        rows = torch.zeros(steps + 2, 1, dtype=F64)
        rows[calls] = 1.0
        return rows

    out = sampler(one_hot(), one_hot).squeeze(1)  # row 0 saw no noise, row k the k-th draw alone
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


def gaussian_rho(schedule: Schedule, std: float) -> Tensor:
    """E|x - xhat|^2 / sigma_t^2 of `gaussian_denoiser`."""
    return std**2 / (schedule.alpha_bar * std**2 + schedule.variance)


@pytest.mark.parametrize("std", [0.0, 0.4, 1.0, 2.5])
def test_the_optimal_variance_lies_between_small_and_large_and_makes_gaussian_chains_exact(std: float):
    """Var(z_{t-1} | z_t) of Gaussian data, by conditioning the joint of z_{t-1} and z_t."""
    schedule = make_schedule("cosine", 60, 0.05)
    rho = gaussian_rho(schedule, std)
    s2 = schedule.reverse_variance(rho)[1:]
    total = schedule.alpha_bar * std**2 + schedule.variance  # Var z_t
    covariance = (1 - schedule.betas).sqrt() * total[:-1]
    torch.testing.assert_close(s2, total[:-1] - covariance**2 / total[1:], rtol=1e-9, atol=1e-15)
    if std == 0.0:
        torch.testing.assert_close(s2, schedule.posterior_variance[1:], rtol=0, atol=0)
    if std == 1.0:
        torch.testing.assert_close(s2, schedule.betas, rtol=1e-11, atol=0)


@pytest.mark.parametrize("times", [range(1, 61), spaced_times(60, 13), [60]])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.6), (1.7, 0.0)])
def test_ancestral_sampling_of_gaussian_data_is_exact_in_any_number_of_steps(times: Any, mean: float, std: float):
    """With the optimal variance z_t of the reverse chain has the data's z_t law, but for z_T ~ N(0, 1) in its place.

    That start is off by d in mean and v in variance; every later law is off by these times the slopes passed.
    """
    schedule, times = make_schedule("cosine", 60, 0.05), list(times)
    denoise, rho = gaussian_denoiser(schedule, mean, std), gaussian_rho(schedule, std)
    out = affine_moments(lambda z, normal: sample_ancestral(denoise, schedule, times, z, normal, rho), len(times))
    total = schedule.alpha_bar * std**2 + schedule.variance
    slope = 1.0  # of z_0 = xhat(z_1) in z_T: products of Cov(z_s, z_t) / Var z_t
    for s, t in zip([0, *times], times, strict=False):
        slope *= ((schedule.alpha[t] / schedule.alpha[s]) * total[s] / total[t]).item()
    first = times[0]
    variance = schedule.alpha_bar[first] * std**4 / total[first]  # of E[x | z_1]: the last step adds no noise
    assert out[0] == pytest.approx(mean - slope * schedule.alpha[-1].item() * mean, abs=1e-12)
    assert out[1] == pytest.approx(variance.item() + slope**2 * (1.0 - total[-1].item()), abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_ancestral_sampling_with_a_fixed_variance_converges_with_order_one(share: float):
    """N(2, 0.6^2) with Ho et al.'s two variances: the standard deviation's error halves as T doubles."""
    errors = []
    for steps in (100, 200, 400):
        schedule = make_schedule("cosine", steps, 1e-3)
        denoise, rho = gaussian_denoiser(schedule, 2.0, 0.6), torch.full((steps + 1,), share, dtype=F64)
        mean, variance = affine_moments(
            lambda z, normal, s=schedule, d=denoise, r=rho: sample_ancestral(d, s, range(1, s.steps + 1), z, normal, r),
            steps,
        )
        errors.append(abs(math.sqrt(variance) - 0.6))
        assert mean == pytest.approx(2.0, abs=0.02)  # z_T ~ N(0, 1) forgets alpha_T = 0.01 of the mean
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.25)


def test_ddim_converges_to_the_flow_with_order_one():
    """For Gaussian data the probability flow is z -> alpha m + sqrt(alpha^2 s^2 + sigma^2) u, u constant."""
    mean, std = 1.5, 0.4
    z = torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    errors = []
    for steps in (100, 200, 400):
        schedule = make_schedule("cosine", steps, 0.01)
        denoise = gaussian_denoiser(schedule, mean, std)
        spread = (schedule.alpha_bar * std**2 + schedule.variance).sqrt()
        u = (z - schedule.alpha[-1] * mean) / spread[-1]
        exact = denoise(schedule.alpha[1] * mean + spread[1] * u, 1)
        out = sample_ddim(denoise, schedule, range(1, steps + 1), z, lambda: pytest.fail("eta = 0 draws no noise"))
        errors.append((out - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2.0, abs=0.1)
    assert errors[2] < 0.01


def test_ddim_with_eta_one_is_ancestral_sampling():
    schedule = make_schedule("linear", 100, 0.02)
    denoise = gaussian_denoiser(schedule, -1.0, 0.7)
    g = make_generator("ddim")
    times, z = spaced_times(100, 20), torch.randn(6, 2, generator=g, dtype=F64)
    draws = [torch.randn(6, 2, generator=g, dtype=F64) for _ in range(19)]
    a, b = iter(draws), iter(draws)
    ancestral = sample_ancestral(denoise, schedule, times, z, lambda: next(a), torch.zeros(101, dtype=F64))
    ddim = sample_ddim(denoise, schedule, times, z, lambda: next(b), eta=1.0)
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-11)


def test_clip_to_keeps_the_prediction_in_range():
    clipped = clip_to(lambda z, t: z * t, -1.0, 1.0)
    torch.testing.assert_close(clipped(torch.tensor([-0.7, 0.2]), 2), torch.tensor([-1.0, 0.4]))


# -- the bound --------------------------------------------------------------------------------------------------


def exact_bound(schedule: Schedule, rho: Tensor, x: Tensor, denoise: Denoiser) -> Tensor:
    """The bound's exact expectation, D = 1: all terms are quadratic in eps, so eps = -1 and 1 integrate them."""
    total, s2 = -prior_term(schedule, x), schedule.reverse_variance(rho)
    for t in range(1, schedule.steps + 1):
        for eps in (-1.0, 1.0):
            z = schedule.alpha[t] * x + schedule.sigma[t] * eps
            index = torch.full((x.shape[0],), t)
            total = total - 0.5 * bound_term(schedule, s2, index, x, denoise(z, t), None)
    return total


@pytest.mark.parametrize(("shape", "steps"), [("linear", 40), ("cosine", 25)])
def test_the_bound_is_tight_where_the_reverse_chain_is_exact(shape: Any, steps: int):
    """x ~ N(0, 1): the model *is* the forward chain reversed, so the bound equals log p(x) at every x."""
    schedule = make_schedule(shape, steps, 0.05)
    x = torch.linspace(-3, 3, 7, dtype=F64)[:, None]
    bound = exact_bound(schedule, torch.ones(steps + 1, dtype=F64), x, gaussian_denoiser(schedule, 0.0, 1.0))
    log_p = gaussian_log_prob(x, torch.zeros_like(x), 1.0)
    torch.testing.assert_close(bound, log_p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("std", [0.3, 0.6, 2.0])
def test_the_mean_bound_of_gaussian_data_misses_the_entropy_by_the_prior_mismatch(std: float):
    """With the optimal variance E[log p - bound] = KL(z_T || N(0, 1)) exactly; with the others it is larger."""
    mean = 0.5
    nodes = torch.tensor([-1.0, 1.0], dtype=F64)[:, None] * std + mean  # E over x is exact for quadratics
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    gaps: dict[str, list[float]] = {"optimal": [], "small": [], "large": []}
    for steps in (100, 200):
        schedule = make_schedule("linear", steps, 0.02)
        denoise, rho = gaussian_denoiser(schedule, mean, std), gaussian_rho(schedule, std)
        small = torch.zeros(steps + 1, dtype=F64)
        small[1] = 1.0
        for name, choice in (("optimal", rho), ("small", small), ("large", torch.ones_like(rho))):
            gaps[name].append(-entropy - exact_bound(schedule, choice, nodes, denoise).mean().item())
        a2, var = schedule.alpha_bar[-1].item(), (schedule.alpha_bar * std**2 + schedule.variance)[-1].item()
        assert gaps["optimal"][-1] == pytest.approx(0.5 * (a2 * mean**2 + var - 1 - math.log(var)), abs=1e-9)
    for name in ("small", "large"):
        assert min(gaps[name]) > 1e-3
        assert min(gaps[name]) > max(gaps["optimal"])


def test_a_worse_denoiser_has_a_lower_bound_by_the_snr_formula():
    """At variance btilde an error d in xhat costs (SNR_{t-1} - SNR_t) d^2 / 2 per dimension."""
    schedule = make_schedule("cosine", 30, 0.05)
    x, d = torch.zeros(1, 4, dtype=F64), 0.01
    s2 = schedule.reverse_variance(torch.zeros(31, dtype=F64))
    s2[1] = 1.0
    for t in (2, 11, 30):
        term = bound_term(schedule, s2, torch.tensor([t]), x, x + d, None)
        expected = 4 * 0.5 * (schedule.snr[t - 1] - schedule.snr[t]) * d**2
        assert term.item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("std", [0.001, 0.1, 3.0])
def test_lattice_probabilities_sum_to_one(levels: int, std: float):
    k = torch.arange(levels, dtype=F64)[:, None]
    x = (2 * k + 1) / levels - 1
    for mean in (-1.3, -0.021, 0.5, 1.0):
        total = lattice_log_prob(x, torch.full_like(x, mean), std, levels).exp().sum().item()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_lattice_probabilities_keep_their_digits_in_the_tails():
    """log(Phi(-30) - Phi(-40)) is about log Phi(-30) = -454.32, far below the smallest double."""
    x = torch.tensor([[0.0], [0.0]], dtype=F64)
    mean = torch.tensor([[35.0], [-35.0]], dtype=F64) / 5 / 3
    value = lattice_log_prob(x, mean, 1 / 15, 3)
    expected = torch.special.log_ndtr(torch.tensor(-30.0, dtype=F64))
    torch.testing.assert_close(value, expected.expand(2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("total", "count"), [(1000, 16), (21, 10), (21, 2), (50, 40)])
def test_strata_cover_every_step_once(total: int, count: int):
    ranges = strata(total, count)
    assert [t for first, size in ranges for t in range(first, first + size)] == list(range(1, total + 1))
    assert ranges[0] == (1, 1)
    assert len(ranges) <= count


# -- the model --------------------------------------------------------------------------------------------------


class ExactNet(nn.Module):
    """eps = sigma_t z: what the best network predicts for x ~ N(0, I)."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.sigma = nn.Parameter(schedule.sigma.clone())
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        self.seen.append(t)
        return self.sigma[t][:, None] * z


@pytest.fixture
def exact_model() -> DDPM:
    model = DDPM(DataSpec(kind="points", shape=(2,)), timesteps=100, variance="large", prediction="eps")
    model.initialize(seed=0)
    model.net = ExactNet(model.schedule)  # type: ignore[assignment]
    model.fitted = True
    return model


def test_log_prob_estimates_the_exact_bound_and_its_own_error(exact_model: DDPM):
    """5 sigma: one false alarm in 1.7 million for each mean, and 10% on the reported variance."""
    n = 3000
    x = torch.tensor([[0.3, -1.2]], dtype=F64).expand(n, 2)
    log_p = -0.5 * (0.3**2 + 1.2**2) - math.log(2 * math.pi)
    score = exact_model.log_prob(x, terms=8, generator=1)
    assert score.kind == "lower_bound"
    assert score.stderr is not None
    assert abs(score.value.mean().item() - log_p) < 5 * score.value.std().item() / math.sqrt(n)
    assert score.stderr.square().mean().item() == pytest.approx(score.value.var().item(), rel=0.1)
    full = exact_model.log_prob(x[:500], terms="all", generator=2)
    assert full.stderr is None
    assert abs(full.value.mean().item() - log_p) < 5 * full.value.std().item() / math.sqrt(500)
    assert full.value.std() < score.value.std()
    with pytest.raises(UsageError, match="terms is"):
        exact_model.log_prob(x[:1], terms=3)


def test_samples_of_the_exact_network_are_standard_normal(exact_model: DDPM):
    """Mean within 5 / sqrt(n), variance within 5 sqrt(2 / n) of alpha_1^2 = 1 - 1e-4, for both dimensions."""
    n = 4000
    x = exact_model.sample(n, generator=3, steps=20)
    assert x.mean(0).abs().max().item() < 5 / math.sqrt(n)
    assert (x.var(0) - 1.0).abs().max().item() < 5 * math.sqrt(2 / n)
    with pytest.raises(UsageError, match="steps is 1"):
        exact_model.sample(1, steps=101)
    with pytest.raises(UsageError, match="ancestral or ddim"):
        exact_model.sample(1, sampler="euler")


def test_a_batch_as_large_as_the_chain_sees_every_step_once_and_the_loss_has_its_minimum(exact_model: DDPM):
    """With x ~ N(0, 1) the best loss is the mean of alpha_t^2, here over 100 * 400 draws (5 sigma)."""
    net = exact_model.net
    losses = []
    for i in range(400):
        x = torch.randn(100, 2, generator=make_generator("x", i), dtype=F64)
        losses.append(exact_model.loss(Batch(x), Step(noise=Noise(0, "train", i, n=100, block=100))).detach())
    assert torch.equal(net.seen[0], torch.arange(1, 101))
    values = torch.stack(losses)
    expected = exact_model.schedule.alpha_bar[1:].mean()
    assert abs(values.mean() - expected).item() < 5 * values.std().item() / math.sqrt(400)


@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
def test_the_relative_error_is_measured_while_training(prediction: str):
    """A network that predicts nothing of x ~ N(0, 1) but its mean: |x - xhat|^2 = x^2, so rho_t = 1 / sigma_t^2."""
    model = DDPM(DataSpec(kind="points", shape=(4,)), timesteps=40, prediction=prediction, sigma_min=0.3)
    model.initialize(seed=0)

    class Blind(nn.Module):
        def forward(self, z: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            return convert(torch.zeros_like(z), "x", prediction, z, model.alpha[t], model.sigma[t])  # type: ignore[arg-type]

    model.net = Blind()  # type: ignore[assignment]
    for i in range(300):
        x = torch.randn(400, 4, generator=make_generator("x", i))
        model.loss(Batch(x), Step(noise=Noise(0, "train", i, n=400, block=400), index=i))
    before = model.rho.clone()
    inverse = model.schedule.variance[1:].reciprocal()
    ranges = strata(40, 32)
    expected = torch.cat([inverse[a - 1 : a - 1 + n].mean().expand(n) for a, n in ranges])
    torch.testing.assert_close(model.rho[1:], expected, rtol=0.08, atol=0)  # > 5 sigma: 2000 numbers for each t
    with model.inference():
        model.loss(Batch(x), Step(noise=Noise(0, "validation", n=400, block=400), index=300))
    assert torch.equal(model.rho, before)  # validation leaves the model as it is


def test_it_learns_two_gaussians_by_label():
    """Means within 0.2, standard deviations within 15%, the bound within 0.2 nats of minus the entropy."""
    g = make_generator("gaussians")
    c = torch.randint(2, (4000,), generator=g)
    mean, std = torch.tensor([-2.0, 3.0]), torch.tensor([0.5, 1.0])
    x = (mean[c] + std[c] * torch.randn(4000, generator=g))[:, None]
    spec = DataSpec(kind="points", shape=(1,), condition=ConditionSpec(kind="class", names=("low", "high")))
    model = DDPM(spec, conditional=True, width=32, depth=1, timesteps=100)
    model.initialize(seed=0)
    model.prepare(TensorSplit(x, c), Noise(0, "prepare", n=1))
    (objective,) = model.objectives()
    steps, n = 400, 256
    optimizer = torch.optim.Adam(objective.parameters, lr=5e-3)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - i / steps)
        index = torch.randint(4000, (n,), generator=g)
        step = Step(noise=Noise(0, "train", i, n=n, block=n), progress=i / steps, index=i)
        loss = objective.loss(Batch(x[index], c[index]), step)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.fitted = True
    for label in (0, 1):
        for settings in ({"steps": 50}, {"steps": 100, "sampler": "ddim"}):
            sample = model.sample(2000, label, generator=1, **settings)
            assert abs(sample.mean().item() - mean[label].item()) < 0.2
            assert sample.std().item() == pytest.approx(std[label].item(), rel=0.15)
        rows = x[c == label][:1000]
        score = model.log_prob(rows, torch.full((1000,), label), terms=16).mean()
        entropy = 0.5 * math.log(2 * math.pi * math.e * std[label].item() ** 2)
        assert -entropy - 0.2 < score.value.item() < -entropy + 0.1


def test_pictures_on_a_lattice_have_probabilities_and_samples_within_their_levels():
    spec = DataSpec(kind="image", shape=(1, 4, 4), levels=3)
    model = DDPM(spec, timesteps=50, width=8)
    model.initialize(seed=0)
    model.fitted = True
    assert model.levels == 3
    x = torch.stack([torch.full((1, 4, 4), k) for k in range(3)])
    score = model.log_prob(x, terms=32, generator=0)
    assert score.kind == "lower_bound"
    assert bool((score.value < 0).all())  # a probability, not a density
    sample = model.sample(7, generator=0, steps=5)
    assert sample.dtype == torch.uint8
    assert sample.max().item() <= 2
    assert torch.equal(sample, model.sample(7, generator=0, steps=5, batch_size=2))
