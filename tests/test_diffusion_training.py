"""Training against closed forms: weightings, times, couplings, bounds; and a small model that learns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from tests.diffusion_oracles import F64, OracleModel, gaussian_model, learned, log_normal, total_variance
from trilemma.core.errors import UsageError
from trilemma.core.model import Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit
from trilemma.diffusion.bound import prior_term
from trilemma.diffusion.denoiser import spread_scale
from trilemma.diffusion.exact import GaussianDenoiser
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.prediction import PREDICTIONS, convert, weights
from trilemma.diffusion.schedule import EDM, VP, Cosine, Discrete, Learned, Rectified, linear_betas
from trilemma.diffusion.training import (
    WEIGHTINGS,
    ImportanceTimes,
    couple,
    draw_uniform,
    log_normal_times,
    uniform_times,
)

SMALL: dict[str, Any] = {"width": 8, "depth": 1}
STD = 0.5


def noise_of(n: int, *key: Any) -> Noise:
    return Noise(0, "train", *key, n=n, block=n)


# -- weightings -------------------------------------------------------------------------------------------------


def test_weightings_are_their_formulas():
    schedule, t = Cosine(), torch.linspace(0.05, 0.95, 10, dtype=F64)
    snr = (math.pi / 2 * t).tan() ** -2
    likelihood = math.pi * snr / (2 * (math.pi / 2 * t).sin() * (math.pi / 2 * t).cos())  # -lambda' SNR / 2
    expected = {
        "snr": snr, "min-snr": snr.clamp(max=5.0), "max-snr": snr.clamp(min=1.0),
        "likelihood": likelihood * (schedule.t_max - schedule.t_min),
    }  # fmt: skip
    assert expected.keys() == WEIGHTINGS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(WEIGHTINGS[name](schedule, t), value, rtol=1e-10, atol=0)


def test_the_likelihood_weighting_is_score_matching_with_g_squared():
    """w |x - xhat|^2 = g^2 / 2 |score - score_hat|^2 (Song et al. 2021), as score = -(z - alpha x) / sigma^2."""
    schedule, t = VP(), torch.linspace(0.05, 0.95, 10, dtype=F64)
    of_score = (schedule.alpha(t) / schedule.sigma(t).square()).square()
    expected = 0.5 * schedule.diffusion(t).square() * of_score * (schedule.t_max - schedule.t_min)
    torch.testing.assert_close(WEIGHTINGS["likelihood"](schedule, t), expected, rtol=1e-9, atol=0)


def test_the_likelihood_weighting_of_a_chain_sums_to_the_snr_it_covers():
    """T times the mean over steps: sum of SNR(t-1) - SNR(t) telescopes; the first step weighs as L_0, SNR(1)."""
    chain = Discrete(linear_betas(50))
    t = torch.arange(1, 51, dtype=F64)
    snr = chain.log_snr(t).exp()
    weight = WEIGHTINGS["likelihood"](chain, t) / 50
    torch.testing.assert_close(weight[1:], 0.5 * (snr[:-1] - snr[1:]), rtol=1e-9, atol=0)
    assert weight[0].item() == pytest.approx(0.5 * snr[0].item())


def pair(n: int, schedule: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = make_generator("pair")
    x, eps = STD * torch.randn(n, 2, generator=g, dtype=F64), torch.randn(n, 2, generator=g, dtype=F64)
    return x, eps, schedule.alpha(t).unsqueeze(1) * x + schedule.sigma(t).unsqueeze(1) * eps


@pytest.mark.parametrize("weighting", ["uniform", *WEIGHTINGS])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weighting_weighs_the_error_of_x_whatever_is_predicted(weighting: Any, prediction: Any):
    """The same w and the same denoiser give the same loss; "uniform" is the plain error of the prediction."""
    model = gaussian_model(
        2, 0.0, STD, schedule="linear", timesteps=60, prediction=prediction, weighting=weighting, **SMALL
    )
    schedule = model.schedule
    t = torch.arange(5, 60, 6, dtype=F64)
    x, eps, z = pair(len(t), schedule, t)
    x_hat = GaussianDenoiser(schedule, 0.0, STD).predict(z, t)
    value, _ = model.network(z, t, None)
    found = model._weighted_error(x, eps, t, value)
    if weighting == "uniform":
        p, q = weights(prediction, schedule, t)
        true = p.unsqueeze(1) * x + q.unsqueeze(1) * eps
        expected = (convert(x_hat, "x0", prediction, z, t, schedule) - true).square().mean(1)
    else:
        expected = WEIGHTINGS[weighting](schedule, t) * (x - x_hat).square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({"schedule": "cosine", "prediction": "eps", "weighting": "uniform"}, "eps"),
        ({"schedule": "cosine", "prediction": "v", "weighting": "snr"}, "eps"),
        ({"schedule": "rectified", "prediction": "velocity", "weighting": "uniform"}, "velocity"),
        ({"schedule": "linear", "timesteps": 60, "prediction": "v", "weighting": "max-snr"}, "max-snr"),
    ],
)
def test_the_loss_of_the_exact_denoiser_is_the_known_variance(settings: dict[str, Any], unit: str):
    """E w(t) Var[x | z_t], 4000 stratified draws, 5 sigma; eps: SNR, velocity of the straight path: 1 / t^2."""
    model = gaussian_model(2, 0.0, STD, **settings, **SMALL)
    schedule, n = model.schedule, 4000
    t = uniform_times((torch.arange(20000, dtype=F64) + 0.5) / 20000, schedule)
    variance = STD**2 * schedule.sigma(t).square() / total_variance(schedule, t, STD)
    weight = 1 / t.square() if unit == "velocity" else WEIGHTINGS["snr" if unit == "eps" else unit](schedule, t)
    losses = []
    with torch.no_grad():
        for i in range(10):
            x = STD * torch.randn(n // 10, 2, generator=make_generator("x", i), dtype=F64)
            loss, _ = model.loss(Batch(x), Step(noise=noise_of(n // 10, i)))  # type: ignore[misc]
            losses.append(loss)
    values = torch.stack(losses)
    assert abs(values.mean().item() - (weight * variance).mean().item()) < 5 * values.std().item() / math.sqrt(10)


# -- times ------------------------------------------------------------------------------------------------------


def test_stratified_draws_come_one_from_each_part():
    u = draw_uniform(noise_of(100, 1), True)
    assert torch.equal((u * 100).floor(), torch.arange(100, dtype=F64))
    plain = draw_uniform(noise_of(5000, 2), False)
    assert stats.kstest(plain.numpy(), "uniform").pvalue > 1e-6


def test_uniform_times_cover_the_schedule_and_every_step_of_a_chain_alike():
    u = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    t = uniform_times(u, EDM())
    assert stats.kstest(t.numpy(), stats.uniform(0.002, 80.0 - 0.002).cdf).statistic < 1e-3
    steps = uniform_times(u, Discrete(linear_betas(50)))
    assert steps.unique(return_counts=True)[1].tolist() == [20] * 50
    assert (steps.min().item(), steps.max().item()) == (1.0, 50.0)


@pytest.mark.parametrize("schedule", [EDM(), VP(), Rectified(), Cosine()])
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 3.0)])
def test_log_normal_times_are_normal_in_the_log_of_the_noise_and_cut_to_the_range(
    schedule: Any, mean: float, std: float
):
    """Kolmogorov-Smirnov distance of 2000 even u from the truncated normal: below 1/2000, no chance involved."""
    u = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    t = log_normal_times(u, schedule, mean, std)
    assert t.min().item() >= schedule.t_min
    assert t.max().item() <= schedule.t_max
    low, high = (-0.5 * schedule.log_snr(torch.stack(schedule.times))).tolist()
    law = stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)
    level = (-0.5 * schedule.log_snr(t)).numpy()
    assert stats.kstest(level, law.cdf).statistic < 1 / 2000


def test_on_the_straight_path_log_normal_times_are_logit_normal():
    u = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    t = log_normal_times(u, Rectified(1e-9, 1.0), 0.3, 0.8)
    assert stats.kstest(t.logit().numpy(), stats.norm(0.3, 0.8).cdf).statistic < 1 / 2000


def filled(bins: int = 8) -> ImportanceTimes:
    times = ImportanceTimes(bins, burn_in=2)
    u = (torch.arange(10 * bins, dtype=F64) + 0.5) / (10 * bins)
    times.record(u, 1.0 + 20.0 * (u * bins).floor().square())
    return times


def test_importance_times_are_uniform_until_every_bin_is_known():
    times = ImportanceTimes(8, burn_in=2)
    u = torch.rand(50, generator=make_generator("u"), dtype=F64)
    for _ in range(2):
        times.record(torch.linspace(0.0, 0.8, 30, dtype=F64), torch.linspace(1, 5, 30, dtype=F64))
        moved, weight = times(u)
        torch.testing.assert_close(moved, u, rtol=0, atol=1e-12)
        assert torch.equal(weight, torch.ones(50, dtype=F64))


def test_importance_times_follow_the_root_mean_square_and_are_unbiased():
    """Even u integrate everything: density, the mean of weight * f, and a variance that falls."""
    times = filled()
    loss = 1.0 + 20.0 * torch.arange(8, dtype=F64).square()
    torch.testing.assert_close(times.density, 0.99 * loss / loss.mean() + 0.01, rtol=1e-12, atol=0)
    u = (torch.arange(80000, dtype=F64) + 0.5) / 80000
    moved, weight = times(u)
    counts = (moved * 8).long().bincount(minlength=8).double() / 80000
    torch.testing.assert_close(counts, times.density / 8, rtol=0, atol=1e-4)
    for f in (lambda v: v**3, lambda v: (7 * v).cos(), lambda v: 1.0 + 20.0 * (v * 8).floor().square()):
        assert (weight * f(moved)).mean().item() == pytest.approx(f(u).mean().item(), rel=2e-3)
    assert (weight * f(moved)).var().item() < 0.05 * f(u).var().item()


def test_importance_times_forget_slowly():
    """Ten new losses of a bin weigh 1 - 0.999^10 against the mean square so far."""
    times = filled()
    before = times.square.clone()
    times.record(torch.full((10,), 0.01, dtype=F64), torch.full((10,), 100.0, dtype=F64))
    assert times.square[0].item() == pytest.approx(0.999**10 * before[0].item() + (1 - 0.999**10) * 1e4, rel=1e-12)
    assert torch.equal(times.square[1:], before[1:])


def test_importance_times_survive_saving_with_the_model():
    model = gaussian_model(2, 0.0, STD, schedule="cosine", times="importance", **SMALL)
    for i in range(6):
        x = STD * torch.randn(256, 2, generator=make_generator("x", i), dtype=F64)
        model.loss(Batch(x), Step(noise=noise_of(256, i)))
    assert model.importance.count.sum().item() == 6 * 256
    other = gaussian_model(2, 0.0, STD, schedule="cosine", times="importance", **SMALL)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.importance.density, model.importance.density)
    assert torch.equal(other.importance.count, model.importance.count)
    drawn = [m.draw_times(noise_of(64, 9))[0] for m in (model, other)]
    assert torch.equal(*drawn)


# -- couplings --------------------------------------------------------------------------------------------------


def test_coupled_noise_is_the_cheapest_permutation():
    g = make_generator("couple")
    for _ in range(5):
        x, eps = (torch.randn(6, 3, generator=g, dtype=F64) for _ in range(2))
        found = couple(x, eps)
        best = min((x - eps[list(p)]).square().sum().item() for p in itertools.permutations(range(6)))
        assert (x - found).square().sum().item() == pytest.approx(best, rel=1e-12)
        assert best <= (x - eps).square().sum().item()
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, eps.tolist()))


def test_coupled_noise_is_standard_normal_over_many_batches():
    """Batches of 16, one row of each, 1500 batches: Kolmogorov-Smirnov at a false-alarm rate of 1e-6."""
    g = make_generator("marginal")
    rows = [
        couple(torch.randn(16, 1, generator=g, dtype=F64), torch.randn(16, 1, generator=g, dtype=F64))[3]
        for _ in range(1500)
    ]
    assert stats.kstest(torch.cat(rows).numpy(), "norm").pvalue > 1e-6


def test_the_models_pairs_are_coupled():
    model = gaussian_model(
        2, 0.0, 1.0, schedule="rectified", prediction="velocity", coupling="optimal-transport", sampler="heun", **SMALL
    )
    x = torch.randn(32, 2, generator=make_generator("x"), dtype=F64)
    z, eps = model.noised(x, torch.full((32,), 0.4, dtype=F64), noise_of(32, 0))
    plain = noise_of(32, 0).normal_like(x)
    torch.testing.assert_close(eps, couple(x, plain), rtol=0, atol=0)
    torch.testing.assert_close(z, 0.6 * x + 0.4 * eps, rtol=0, atol=1e-14)


# -- bounds as objectives ---------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """A prediction a z and a second output b, each with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, z: Tensor, label: Tensor, condition: Any, present: Any) -> tuple[Tensor, Tensor]:
        return self.a * z, self.b.expand_as(z)


@pytest.mark.parametrize("variance", ["learned", "learned-range"])
def test_the_hybrid_loss_moves_the_prediction_by_the_error_and_the_variance_by_the_bound(variance: str):
    """T L_{t-1} / 1000 adds nothing to the gradient of the prediction, and the error nothing to the variance's."""
    spec = DataSpec(kind="points", shape=(2,))
    settings: dict[str, Any] = {
        "schedule": "cosine",
        "timesteps": 40,
        "prediction": "eps",
        "variance": variance,
        **SMALL,
    }
    gradients: dict[str, Tensor] = {}
    x = torch.randn(40, 2, generator=make_generator("x"), dtype=F64)
    for loss in ("hybrid", "bound", "weighted"):
        given = {**settings, "variance": "small"} if loss == "weighted" else settings
        model = Diffusion(spec, loss=loss, **given)
        model.initialize(seed=0)
        model.net = TwoHeads()  # type: ignore[assignment]
        model.double()
        model.loss(Batch(x), Step(noise=noise_of(40, 0)))[0].backward()  # type: ignore[index]
        gradients[loss + " a"], gradients[loss + " b"] = model.net.a.grad, model.net.b.grad  # type: ignore[assignment]
    torch.testing.assert_close(gradients["hybrid a"], gradients["weighted a"], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients["hybrid b"], 1e-3 * gradients["bound b"], rtol=1e-12, atol=0)
    assert gradients["hybrid b"].abs().item() > 0
    assert gradients["weighted b"] is None


def test_the_bound_loss_of_a_chain_averages_to_the_bound():
    """x ~ N(0, 1) at the large variance: the bound is -log p(x). A batch of T sees each step once; 5 sigma."""
    steps = 30
    model = gaussian_model(
        1, 0.0, 1.0, schedule="linear", timesteps=steps, prediction="eps", variance="large", loss="bound", **SMALL
    )
    t, _, _ = model.draw_times(noise_of(steps, 0))
    assert torch.equal(t, torch.arange(1, steps + 1, dtype=F64))
    x = torch.full((steps, 1), 0.8, dtype=F64)
    with torch.no_grad():
        values = torch.stack([model.loss(Batch(x), Step(noise=noise_of(steps, i)))[0] for i in range(300)])  # type: ignore[index]
    expected = -log_normal(x[:1], 0.0, 1.0).item()
    assert abs(values.mean().item() - expected) < 5 * values.std().item() / math.sqrt(300)
    assert prior_term(model.schedule, x).shape == (steps,)


def test_the_relative_error_is_measured_while_training():
    """The exact denoiser of N(0, 1) errs by sigma^2 / (alpha^2 + sigma^2) everywhere; 12% is > 5 sigma."""
    model = gaussian_model(4, 0.0, 1.0, schedule="linear", timesteps=40, prediction="v", **SMALL)
    for i in range(60):
        x = torch.randn(400, 4, generator=make_generator("x", i), dtype=F64)
        model.loss(Batch(x), Step(noise=noise_of(400, i), index=i))
    t = torch.arange(1, 41, dtype=F64)
    torch.testing.assert_close(model.error(t), spread_scale(model.schedule, t), rtol=0.12, atol=0)
    before = model.error_sum.clone()
    with model.inference():
        model.loss(Batch(x), Step(noise=noise_of(400, 61), index=61))
    assert torch.equal(model.error_sum, before)  # validation leaves the model as it is


# -- learned schedules ------------------------------------------------------------------------------------------


def test_a_learned_schedule_is_monotone_with_its_ends_and_starts_nearly_straight():
    bent = learned()
    t = torch.linspace(0, 1, 2000, dtype=F64)
    assert (bent.gamma(t).diff() > 0).all()
    torch.manual_seed(0)
    fresh = Learned(13.3, -5.0)
    ends = fresh.gamma(torch.tensor([0.0, 1.0], dtype=F64))
    torch.testing.assert_close(ends, torch.tensor([-13.3, 5.0], dtype=F64), rtol=0, atol=1e-5)
    assert (fresh.gamma(t) - (-13.3 + 18.3 * t)).abs().max().item() < 0.5


def continuous_bound(model: OracleModel, grid: int) -> Tensor:
    """The expectation of the continuous bound for x ~ N(0, 1), D = 1: two nodes each for x and eps, midpoints in t."""
    t = (torch.arange(grid, dtype=F64) + 0.5) / grid
    total = torch.zeros((), dtype=F64)
    for x, eps in itertools.product((-1.0, 1.0), (-1.0, 1.0)):
        x_n, eps_n = (torch.full((grid, 1), v, dtype=F64) for v in (x, eps))
        z = model.schedule.alpha(t).unsqueeze(1) * x_n + model.schedule.sigma(t).unsqueeze(1) * eps_n
        total = total + 0.25 * model._bound_loss(x_n, z, t, model.network(z, t, None)[0], None).mean()
    return total


def test_the_continuous_bound_depends_on_the_ends_of_gamma_alone():
    """For x ~ N(0, 1) it is log(2 pi e) / 2 + log(1 + 1 / SNR_max) / 2: the entropy of z_0 / alpha_0."""
    values, slopes = [], []
    for seed in (0, 1):
        model = gaussian_model(
            1, 0.0, 1.0, schedule="learned", prediction="eps", loss="bound", variance="small", **SMALL
        )
        schedule = model.schedule
        assert isinstance(schedule, Learned)
        schedule.requires_grad_(True)
        with torch.no_grad():
            for p, scale in ((schedule.weight, 2.0), (schedule.rate, 2.0), (schedule.bias, 2.0)):
                p.copy_(scale * torch.randn(p.shape, generator=make_generator("interior", seed), dtype=F64))
        value = continuous_bound(model, 1500)
        interior = torch.autograd.grad(value, [schedule.weight, schedule.rate, schedule.bias], retain_graph=True)
        slopes.append(max(g.abs().max().item() for g in interior))
        assert torch.autograd.grad(value, schedule.gamma_0)[0].abs().item() > 1e-7
        values.append(value.item())
    snr = schedule.log_snr(torch.zeros((), dtype=F64)).exp().item()
    expected = 0.5 * math.log(2 * math.pi * math.e) + 0.5 * math.log1p(1 / snr)
    assert values == pytest.approx([expected] * 2, abs=1e-4)
    assert max(slopes) < 1e-4


# -- learning ---------------------------------------------------------------------------------------------------


def test_it_learns_two_gaussians_by_label():
    """Means within 0.25, standard deviations within 15%, the bound within 0.25 nats of minus the entropy."""
    g = make_generator("gaussians")
    c = torch.randint(2, (4000,), generator=g)
    mean, std = torch.tensor([-2.0, 3.0]), torch.tensor([0.5, 1.0])
    x = (mean[c] + std[c] * torch.randn(4000, generator=g))[:, None]
    spec = DataSpec(kind="points", shape=(1,), condition=ConditionSpec(kind="class", names=("low", "high")))
    model = Diffusion(spec, conditional=True, width=32, depth=1, drop_condition=0.0)
    model.initialize(seed=0)
    model.prepare(TensorSplit(x, c), Noise(0, "prepare", n=1))
    (objective,) = model.objectives()
    steps, n = 400, 256
    optimizer = torch.optim.Adam(objective.parameters, lr=5e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - i / steps)
        index = torch.randint(4000, (n,), generator=g)
        loss, _ = objective.loss(Batch(x[index], c[index]), Step(noise=noise_of(n, i), progress=i / steps, index=i))  # type: ignore[misc]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.fitted = True
    for label in (0, 1):
        for settings in ({"steps": 50, "sampler": "ancestral"}, {"steps": 30}):
            sample = model.sample(2000, label, generator=1, **settings)  # type: ignore[arg-type]
            assert abs(sample.mean().item() - mean[label].item()) < 0.25
            assert sample.std().item() == pytest.approx(std[label].item(), rel=0.15)
        rows = x[c == label][:500]
        score = model.log_prob(rows, torch.full((500,), label), terms=16).mean()
        entropy = 0.5 * math.log(2 * math.pi * math.e * std[label].item() ** 2)
        assert -entropy - 0.25 < score.value.item() < -entropy + 0.15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "edm", "timesteps": 100}, "variance-preserving chain"),
        ({"schedule": "vp", "prediction": "mean"}, "discrete chain"),
        ({"variance": "learned", "timesteps": 50}, "loss=hybrid or bound"),
        ({"loss": "hybrid"}, "trains a learned variance"),
        ({"loss": "bound", "variance": "small", "weighting": "snr"}, "no effect"),
        ({"loss": "bound"}, "while it trains"),
        ({"times_mean": 1.0}, "no effect"),
    ],
)
def test_choices_that_do_not_fit_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Diffusion(DataSpec(kind="points", shape=(2,)), **settings)
