"""Likelihoods against closed forms: the bound of the reverse chain and the change of variables along the flow."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion_oracles import (
    F64,
    SCHEDULES,
    OracleModel,
    gaussian_flow,
    gaussian_model,
    log_normal,
    total_variance,
    two_modes,
)
from trilemma.core.errors import UsageError
from trilemma.core.spec import DataSpec
from trilemma.diffusion.bound import (
    bound_term,
    chain_term,
    data_term,
    gaussian_log_prob,
    lattice_log_prob,
    prior_term,
    strata,
)
from trilemma.diffusion.denoiser import Denoiser, Estimate
from trilemma.diffusion.exact import GaussianDenoiser
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.ode import flow
from trilemma.diffusion.schedule import VP, Discrete, NoiseSchedule, linear_betas

SMALL: dict[str, Any] = {"width": 8, "depth": 1}
MODELS: dict[str, dict[str, Any]] = {
    "vp": {"schedule": "vp", "prediction": "eps"},
    "sub-vp": {"schedule": "sub-vp", "prediction": "score"},
    "cosine": {"schedule": "cosine", "prediction": "v"},
    "ve": {"schedule": "ve", "prediction": "eps"},
    "edm": {"schedule": "edm", "prediction": "edm"},
    "rectified": {"schedule": "rectified", "prediction": "velocity"},
    "chain": {"schedule": "linear", "timesteps": 1000, "prediction": "x0"},
}
MEAN, STD = 0.7, 0.5
POINTS = torch.tensor([[-0.6, 0.1], [0.7, 0.7], [1.5, -0.4]], dtype=F64)


# -- the bound, term by term ------------------------------------------------------------------------------------


def chain_times(schedule: NoiseSchedule, n: int) -> Tensor:
    """n rising times of a chain through the schedule, with entry 0 unused in front."""
    spacing = "linspace" if schedule.ends_without_signal else "log-snr"
    n = schedule.steps if isinstance(schedule, Discrete) else n
    times = time_grid(schedule, n, "linspace" if isinstance(schedule, Discrete) else spacing).flip(0)  # type: ignore[arg-type]
    return torch.cat([times.new_zeros(1), times])


def exact_bound(denoiser: Denoiser, x: Tensor, n: int = 40) -> Tensor:
    """The bound's exact expectation (N,), D = 1: all terms are quadratic in eps, so eps = -1 and 1 integrate them."""
    schedule = denoiser.schedule
    times = chain_times(schedule, n)
    total = -prior_term(schedule, x)
    for i, eps in itertools.product(range(1, len(times)), (-1.0, 1.0)):
        z = schedule.alpha(times[i]) * x + schedule.sigma(times[i]) * eps
        index = torch.full((len(x),), i)
        total = total - 0.5 * chain_term(denoiser, times, index, z, x, denoiser.estimate(z, times[index]), None)
    return total


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]()


class Exact(GaussianDenoiser):
    """The exact denoiser for times (N,) too, each example's own: what `chain_term` asks for."""

    shift = 0.0
    stretch = 1.0

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        return Estimate(self.stretch * super().estimate(z, t).x + self.shift)

    def reverse_variance(self, z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor:
        total = self.schedule.alpha(t).square() * self.std.square() + self.schedule.sigma(t).square()
        uncertain = self.std.square() * self.schedule.sigma(t).square() / total
        if s is None:
            return uncertain.expand(len(z)).unsqueeze(1)
        back = self.schedule.back(t, s)
        return (back.small + back.x_weight.square() * uncertain).expand(len(z)).unsqueeze(1)


def kl_to_prior(schedule: NoiseSchedule, mean: float, std: float) -> float:
    """KL(q(z_T) || N(0, prior_std^2)) of N(mean, std^2)."""
    last, prior = schedule.times[1], schedule.prior_std**2
    variance, centre = total_variance(schedule, last, std).item() / prior, schedule.alpha(last).item() * mean
    return 0.5 * (centre**2 / prior + variance - 1 - math.log(variance))


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_the_mean_bound_of_gaussian_data_misses_the_entropy_by_the_prior_alone(schedule: NoiseSchedule, std: float):
    """With the exact reverse variance E[log p - bound] = KL(z_T || prior): nothing is lost along the chain."""
    nodes = torch.tensor([[-1.0], [1.0]], dtype=F64) * std + MEAN  # E over x is exact for quadratics
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    found = exact_bound(Exact(schedule, MEAN, std), nodes).mean().item()
    assert found == pytest.approx(-entropy - kl_to_prior(schedule, MEAN, std), abs=1e-8)


@pytest.mark.parametrize("name", ["vp", "cosine", "learned", "chain-linear", "chain-zero", "chain-cosine"])
def test_the_bound_is_tight_where_the_reverse_chain_is_the_forward_one(name: str):
    """x ~ N(0, 1) and alpha^2 + sigma^2 = 1: the bound equals log p(x) at every x."""
    x = torch.linspace(-3, 3, 7, dtype=F64).unsqueeze(1)
    bound = exact_bound(Exact(SCHEDULES[name](), 0.0, 1.0), x)
    torch.testing.assert_close(bound, log_normal(x, 0.0, 1.0).squeeze(1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "edm", "rectified", "chain-linear"])
@pytest.mark.parametrize(("shift", "stretch"), [(0.1, 1.0), (-0.02, 1.0), (0.0, 0.9), (0.05, 1.1)])
def test_the_exact_denoiser_beats_every_other_by_the_squared_difference(name: str, shift: float, stretch: float):
    """E(bound) falls by sum a^2 E|difference|^2 / 2v, and by E|difference|^2 / 2v in the last term."""
    schedule = SCHEDULES[name]()
    exact, worse = Exact(schedule, MEAN, STD), Exact(schedule, MEAN, STD)
    worse.shift, worse.stretch = shift, stretch
    nodes = torch.tensor([[-1.0], [1.0]], dtype=F64) * STD + MEAN
    times = chain_times(schedule, 40)
    loss = 0.0
    for i in range(1, len(times)):
        t, z = times[i], torch.zeros(1, 1, dtype=F64)
        spread = schedule.alpha(t).square() * STD**4 / total_variance(schedule, t, STD)  # Var E[x | z]
        off = ((stretch - 1) * MEAN + shift) ** 2 + (stretch - 1) ** 2 * spread.item()
        s = times[i - 1] if i > 1 else None
        weight = 1.0 if s is None else schedule.back(t, s).x_weight.item() ** 2
        loss += 0.5 * weight * off / exact.reverse_variance(z, t, s, None).item()
    fallen = exact_bound(exact, nodes).mean() - exact_bound(worse, nodes).mean()
    assert loss > 0
    assert fallen.item() == pytest.approx(loss, rel=1e-7)


@pytest.mark.parametrize("std", [0.3, 2.0])
def test_the_small_and_the_large_variance_have_a_lower_bound_than_the_exact_one(std: float):
    chain = Discrete(linear_betas(100))
    exact = Exact(chain, MEAN, std)
    nodes = torch.tensor([[-1.0], [1.0]], dtype=F64) * std + MEAN

    def fixed(name: str) -> Denoiser:
        denoiser = Exact(chain, MEAN, std)

        def variance(z: Tensor, t: Tensor, s: Tensor | None, spread: Tensor | None) -> Tensor:
            value = chain.sigma(t).square() if s is None else getattr(chain.back(t, s), name)
            return torch.as_tensor(value).expand(len(z)).unsqueeze(1)

        denoiser.reverse_variance = variance  # type: ignore[method-assign]
        return denoiser

    best = exact_bound(exact, nodes).mean().item()
    for name in ("small", "large"):
        assert exact_bound(fixed(name), nodes).mean().item() < best - 1e-3


def test_at_the_small_variance_an_error_costs_the_fall_of_the_snr(schedule: NoiseSchedule):
    """(SNR(s) - SNR(t)) d^2 / 2 per dimension, for neighbours and skipped steps."""
    times, d = chain_times(schedule, 12)[1:], 0.01
    x = torch.zeros(1, 4, dtype=F64)
    denoiser = two_modes(schedule)  # its reverse variance is the small one
    for s, t in ((times[0], times[1]), (times[2], times[9]), (times[0], times[-1])):
        term = bound_term(denoiser, x, t.unsqueeze(0), s.unsqueeze(0), x, Estimate(x + d))
        fall = schedule.log_snr(s).exp() - schedule.log_snr(t).exp()
        assert term.item() == pytest.approx(4 * 0.5 * fall.item() * d**2, rel=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("variance", [1e-6, 0.1, 3.0])
def test_lattice_probabilities_sum_to_one(levels: int, variance: float):
    x = (2 * torch.arange(levels, dtype=F64).unsqueeze(1) + 1) / levels - 1
    for mean in (-1.3, -0.021, 0.5, 1.0):
        total = lattice_log_prob(x, torch.full_like(x, mean), variance, levels).exp().sum().item()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_trap_the_tails_of_the_lattice_keep_their_digits():
    """log(Phi(-30) - Phi(-40)) is about log Phi(-30) = -454.32, far below the smallest double; on both sides."""
    x = torch.tensor([[0.0], [0.0]], dtype=F64)
    mean = torch.tensor([[35.0], [-35.0]], dtype=F64) / 15
    expected = torch.special.log_ndtr(torch.tensor(-30.0, dtype=F64)).expand(2)
    torch.testing.assert_close(lattice_log_prob(x, mean, (1 / 15) ** 2, 3), expected, rtol=1e-12, atol=0)
    narrow = lattice_log_prob(torch.tensor([[1 - 1 / 256]], dtype=F64), torch.tensor([[-1.0]], dtype=F64), 1e-6, 256)
    assert narrow.isfinite().all()
    assert narrow.item() == pytest.approx(torch.special.log_ndtr(torch.tensor(-1992.1875, dtype=F64)).item(), rel=1e-9)


@pytest.mark.parametrize(("total", "count"), [(1000, 16), (21, 10), (21, 2), (50, 40)])
def test_strata_cover_every_step_once(total: int, count: int):
    ranges = strata(total, count)
    assert [t for first, size in ranges for t in range(first, first + size)] == list(range(1, total + 1))
    assert ranges[0] == (1, 1)
    assert len(ranges) <= count


# -- the bound of a model ---------------------------------------------------------------------------------------


def test_the_stratified_bound_is_unbiased_and_knows_its_error():
    """5 sigma: one false alarm in 1.7 million for each mean, and 12% on the reported variance.

    x ~ N(0, 1) at a large variance: the chain is exact, so the bound's expectation is log p(x).
    """
    model = gaussian_model(2, 0.0, 1.0, schedule="linear", timesteps=100, prediction="eps", variance="large", **SMALL)
    n = 2000
    x = torch.tensor([[0.3, -1.2]], dtype=F64).expand(n, 2)
    log_p = -0.5 * (0.3**2 + 1.2**2) - math.log(2 * math.pi)
    score = model.log_prob(x, terms=8, generator=1)
    assert score.kind == "lower_bound"
    assert score.method == "bound of 100 steps"
    assert score.evaluations == 8
    assert score.stderr is not None
    assert abs(score.value.mean().item() - log_p) < 5 * score.value.std().item() / math.sqrt(n)
    assert score.stderr.square().mean().item() == pytest.approx(score.value.var().item(), rel=0.12)
    full = model.log_prob(x[:300], terms="all", generator=2)
    assert full.stderr is None
    assert full.evaluations == 100
    assert abs(full.value.mean().item() - log_p) < 5 * full.value.std().item() / math.sqrt(300)
    assert full.value.std() < score.value.std()
    with pytest.raises(UsageError, match="terms"):
        model.log_prob(x[:1], terms=3)


@pytest.mark.parametrize("name", ["vp", "cosine", "edm", "ve", "rectified", "sub-vp"])
def test_continuous_models_are_bounded_by_a_long_chain_even_in_log_snr(name: str):
    """x ~ N(0.7, 0.5^2): the mean of the bound is below -entropy - KL, by less than 0.1 for 1000 steps (5 sigma)."""
    model = gaussian_model(1, MEAN, STD, **MODELS[name], variance="small", **SMALL)
    n = 800
    x = MEAN + STD * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    score = model.log_prob(x, terms=16, generator=0)
    top = -0.5 * math.log(2 * math.pi * math.e * STD**2) - kl_to_prior(model.schedule, MEAN, STD)
    error = 5 * score.value.std().item() / math.sqrt(n)
    assert score.method == "bound of 1000 steps"
    assert top - 0.1 - error < score.value.mean().item() < top + error


# -- the flow ---------------------------------------------------------------------------------------------------


def flow_log_prob(model: Diffusion, y: Tensor, mean: float, std: float) -> Tensor:
    """log p(y) of a model whose flow is that of N(mean, std^2), from its latent N(0, prior_std^2), in closed form."""
    schedule = model.schedule
    first, last = schedule.times
    start = schedule.alpha(first) * y
    end = gaussian_flow(schedule, mean, std, start, first, last)
    stretch = (total_variance(schedule, last, std) / total_variance(schedule, first, std)).sqrt() * schedule.alpha(
        first
    )
    return (log_normal(end, 0.0, schedule.prior_std**2) + stretch.log()).sum(1)


@pytest.mark.parametrize("name", MODELS)
def test_the_flows_likelihood_of_gaussian_data_is_the_closed_form(name: str):
    """Jacobians of isotropic data are multiples of I, on which random signs have no variance: v . v = D."""
    model = gaussian_model(2, MEAN, STD, **MODELS[name], **SMALL)
    expected, slack = flow_log_prob(model, POINTS, MEAN, STD), 3e-4 if name == "chain" else 1e-4  # a piecewise cubic
    exact = model.log_prob(POINTS, method="ode", trace="exact", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact.value, expected, rtol=0, atol=slack)
    assert (exact.kind, exact.stderr) == ("exact", None)
    assert exact.method == "probability flow, exact trace, rtol 1e-06, atol 1e-06"
    assert exact.evaluations > 6
    assert exact.evaluations % 6 == 1  # 6 new stages a step
    estimate = model.log_prob(POINTS, method="ode", probes=2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(estimate.value, expected, rtol=0, atol=slack)
    assert estimate.kind == "estimate"
    assert "trace by 2 probes" in estimate.method
    assert estimate.stderr is not None
    assert estimate.stderr.max().item() < 1e-10


@pytest.mark.parametrize("name", ["vp", "edm", "rectified", "chain"])
def test_the_flows_likelihood_of_a_mixture_is_its_density_at_the_least_noise(name: str):
    """log q(z_min) + D log alpha, but for the latent N(0, prior) in the place of q(z_T) at the end of the flow."""
    model = OracleModel(DataSpec(kind="points", shape=(2,)), two_modes, **MODELS[name], **SMALL)
    schedule = model.schedule
    oracle, (first, last) = two_modes(schedule), schedule.times
    z = schedule.alpha(first) * POINTS
    end = flow(oracle, z, float(first), float(last), rtol=1e-8, atol=1e-8).z
    swap = log_normal(end, 0.0, schedule.prior_std**2).sum(1) - oracle.log_density(end, last)
    expected = oracle.log_density(z, first) + 2 * math.log(schedule.alpha(first).item()) + swap
    found = model.log_prob(POINTS, method="ode", trace="exact", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=3e-4 if name == "chain" else 1e-4)
    if name == "rectified":  # it ends in its latent law exactly
        assert swap.abs().max().item() < 1e-6


def test_the_trace_estimate_is_unbiased_and_knows_its_error():
    """500 times the same point with its own signs: 5 sigma on the mean, 30% (> 4 sigma) on the variance."""
    model = OracleModel(DataSpec(kind="points", shape=(2,)), two_modes, **MODELS["rectified"], **SMALL)
    n, point = 500, torch.tensor([[0.1, 0.3]], dtype=F64)
    exact = model.log_prob(point, method="ode", trace="exact").value.item()
    score = model.log_prob(point.expand(n, 2), method="ode", generator=5)
    assert score.stderr is not None
    spread = score.value.std().item()
    assert spread > 0.01
    assert abs(score.value.mean().item() - exact) < 5 * spread / math.sqrt(n) + 1e-4
    assert score.stderr.square().mean().item() == pytest.approx(spread**2, rel=0.3)
    covered = ((score.value - exact).abs() < 3.18 * score.stderr).double().mean().item()  # Student's t, 3 degrees: 95%
    assert covered > 0.85
    single = model.log_prob(point, method="ode", probes=1)
    assert single.stderr is None
    assert "1 probe," in single.method


def test_the_flows_likelihood_does_not_depend_on_the_batch_size():
    model = gaussian_model(2, MEAN, STD, **MODELS["cosine"], **SMALL)
    x = torch.cat([POINTS, 30.0 * POINTS])
    whole, parts = (model.log_prob(x, method="ode", batch_size=b).value for b in (6, 2))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_settings_of_the_other_method_are_refused():
    model = gaussian_model(2, MEAN, STD, **MODELS["vp"], **SMALL)
    for settings, message in (
        ({"trace": "exact"}, "no effect on method=bound"),
        ({"method": "ode", "terms": 8}, "no effect on method=ode"),
        ({"method": "ode", "trace": "exact", "probes": 3}, "no effect on trace=exact"),
        ({"method": "elbo"}, "setting 'method'"),
        ({"trace": "exat"}, "setting 'trace'"),
    ):
        with pytest.raises(UsageError, match=message):
            model.log_prob(POINTS, **settings)


# -- lattices ---------------------------------------------------------------------------------------------------


def test_dequantized_probabilities_are_below_the_lattices_and_sum_to_less_than_one():
    """P(k) = int over the cell of p; the mean of log p(y + u) + log |cell| is below log P(k) by Jensen's inequality.

    The expectation over u is known by quadrature: 5 sigma for 400 draws of each level.
    """
    spec = DataSpec(kind="points", shape=(1,), levels=4)
    model = OracleModel(spec, lambda s: GaussianDenoiser(s, 0.2, 0.35), **MODELS["cosine"], **SMALL)
    n, cell = 400, 0.5
    centre = (2 * torch.arange(4, dtype=F64).unsqueeze(1) + 1) / 4 - 1
    score = model.log_prob(torch.arange(4).repeat_interleave(n).unsqueeze(1), method="ode", trace="exact", generator=0)
    assert score.kind == "lower_bound"
    assert score.method.endswith("dequantized uniformly")
    found = score.value.reshape(4, n)
    u = (torch.arange(2000, dtype=F64) + 0.5) / 2000 - 0.5
    density = flow_log_prob(model, (centre + cell * u).reshape(-1, 1), 0.2, 0.35).reshape(4, -1)
    expected, mass = density.mean(1) + math.log(cell), (density.exp().mean(1) * cell).log()
    error = found.std(1) / math.sqrt(n)
    assert ((found.mean(1) - expected).abs() < 5 * error + 1e-4).all()
    assert (expected < mass).all()
    assert found.mean(1).exp().sum().item() < 1.0
    assert mass.exp().sum().item() <= 1.0


def test_the_bound_on_a_lattice_is_of_probabilities():
    """All levels together have at most the mass 1; the bound of an exact chain is close to the cells' masses."""
    spec = DataSpec(kind="points", shape=(1,), levels=4)
    model = OracleModel(
        spec, lambda s: GaussianDenoiser(s, 0.2, 0.35), schedule="cosine", prediction="v", variance="small", **SMALL
    )
    score = model.log_prob(torch.arange(4).repeat_interleave(200).unsqueeze(1), terms=32, generator=0)
    assert score.kind == "lower_bound"
    assert score.value.reshape(4, 200).mean(1).exp().sum().item() < 1.0
    x = torch.tensor([[0.25]], dtype=F64)
    t = model.schedule.times[0]
    term = data_term(model._plain(None), x, t.unsqueeze(0), x, Estimate(x), 4)
    sigma = model.schedule.sigma(t).item()
    assert term.item() == pytest.approx(-math.log(math.erf(0.25 / sigma / math.sqrt(2))), rel=1e-9)


def test_pictures_have_probabilities_and_samples_within_their_levels():
    model = Diffusion(
        DataSpec(kind="image", shape=(1, 4, 4), levels=3), schedule="cosine", timesteps=50, width=8, depth=1
    )
    model.initialize(seed=0)
    model.fitted = True
    x = torch.stack([torch.full((1, 4, 4), k) for k in range(3)])
    score = model.log_prob(x, terms=8, generator=0)
    assert score.kind == "lower_bound"
    assert bool((score.value < 0).all())
    drawn = model.sample(7, generator=0, steps=5)
    assert drawn.dtype == torch.uint8
    assert drawn.max().item() <= 2
    assert torch.equal(drawn, model.sample(7, generator=0, steps=5, batch_size=2))


def test_a_gaussian_log_density_is_summed_over_the_dimensions():
    x = torch.tensor([[0.3, -1.0], [2.0, 0.1]], dtype=F64)
    torch.testing.assert_close(
        gaussian_log_prob(x, 0.5 * x, 2.0), log_normal(x, 0.5 * x, 2.0).sum(1), rtol=1e-14, atol=0
    )
    assert VP().prior_std == 1.0
