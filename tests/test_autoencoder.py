"""The VAE against models whose likelihood is known: a linear VAE with Gaussian noise is probabilistic PCA."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from trilemma.autoencoder.observation import DiscretizedLogistic, Gaussian
from trilemma.autoencoder.vae import RAW_START, VAE, kl_to_standard_normal
from trilemma.core.model import Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit

F64 = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=F64)


# -- KL ----------------------------------------------------------------------------------------------------------


def test_kl_is_the_closed_form() -> None:
    mu, logvar = normal(7, 4), normal(7, 4, seed=1)
    q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar), kl_divergence(q, p), rtol=1e-12, atol=1e-12)
    assert not kl_to_standard_normal(torch.zeros(1, 3), torch.zeros(1, 3)).any()


def test_kl_is_the_mean_log_ratio() -> None:
    """Five standard errors of 100,000 draws: a false alarm in 2 million."""
    mu, logvar = normal(1, 3), normal(1, 3, seed=1)
    eps = normal(100_000, 3, seed=2)
    z = mu + (0.5 * logvar).exp() * eps
    log_ratio = 0.5 * (z.square() - eps.square() - logvar).sum(1)
    stderr = log_ratio.std().item() / math.sqrt(len(z))
    assert abs(log_ratio.mean().item() - kl_to_standard_normal(mu, logvar).item()) < 5 * stderr


# -- observation models --------------------------------------------------------------------------------------------


def centres(levels: int) -> Tensor:
    return (2 * torch.arange(levels, dtype=F64) + 1) / levels - 1


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("s", [1e-3, 0.02, 0.3, 5.0])
@pytest.mark.parametrize("mu", [-3.0, -0.99, 0.0, 0.437, 1.5])
def test_discretized_logistic_is_a_distribution(levels: int, s: float, mu: float) -> None:
    x = centres(levels).unsqueeze(1)
    log_p = DiscretizedLogistic(levels).log_prob(x, torch.full_like(x, mu), torch.tensor(s, dtype=F64))
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.logsumexp(0), torch.zeros((), dtype=F64), rtol=0, atol=1e-12)
    upper = torch.sigmoid((x.squeeze(1) + 1 / levels - mu) / s)
    lower = torch.sigmoid((x.squeeze(1) - 1 / levels - mu) / s)
    upper[-1], lower[0] = 1.0, 0.0
    torch.testing.assert_close(log_p.exp(), upper - lower, rtol=0, atol=1e-14)


def test_discretized_logistic_far_tails_keep_their_precision() -> None:
    """200 scales away a difference of CDFs is 0 in floating point, the formula is not: the tail is exponential."""
    levels, s = 17, torch.tensor(0.005, dtype=F64)
    x = centres(levels).unsqueeze(1)
    log_p = DiscretizedLogistic(levels).log_prob(x, torch.full_like(x, -1.0), s)
    torch.testing.assert_close(log_p[3:-1].diff(), torch.full((12,), -2 / levels / 0.005, dtype=F64))


def test_discretized_logistic_recognises_edges_in_float32() -> None:
    levels = 256
    x = ((2 * torch.arange(levels).float() + 1) / levels - 1).unsqueeze(1)
    log_p = DiscretizedLogistic(levels).log_prob(x, torch.zeros_like(x) + 0.1, torch.tensor(0.7))
    assert abs(log_p.exp().sum().item() - 1) < 1e-4  # without the open ends it would be 0.6


@pytest.mark.parametrize(("s", "bins"), [(1.0, 0.05), (0.2, 0.05), (0.05, 0.05), (1e-3, 0.5)])
def test_discretized_logistic_mean(s: float, bins: float) -> None:
    """Against the sum over all levels; the error is stated in bins."""
    levels = 17
    model, x = DiscretizedLogistic(levels), centres(17)
    for mu in torch.linspace(-1.5, 1.5, 41, dtype=F64):
        log_p = model.log_prob(x.unsqueeze(1), mu.expand(17, 1), torch.tensor(s, dtype=F64))
        expected = (log_p.exp() * x).sum()
        got = model.mean(mu.expand(1, 1), torch.tensor(s, dtype=F64)).squeeze()
        assert abs((got - expected).item()) <= bins * 2 / levels


def test_samples_follow_their_distribution() -> None:
    """Level frequencies within five standard errors: a false alarm in about 100,000 over the 17 levels."""
    levels, n = 17, 50_000
    model = DiscretizedLogistic(levels)
    mu, s = torch.tensor(-0.6, dtype=F64), torch.tensor(0.25, dtype=F64)
    x = model.sample(mu.expand(n, 1), s, Noise("samples", n=n)).squeeze(1)
    index = (((x + 1) * levels - 1) / 2).round().long()
    torch.testing.assert_close(centres(levels)[index], x, rtol=0, atol=1e-14)
    p = model.log_prob(centres(levels).unsqueeze(1), mu.expand(levels, 1), s).exp()
    frequency = torch.bincount(index, minlength=levels) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    y = Gaussian().sample(mu.expand(n, 1), s, Noise("samples", n=n))
    assert abs(y.mean() - mu) < 5 * s / math.sqrt(n)
    assert abs(y.std() - s) < 5 * s / math.sqrt(2 * n)


def test_gaussian_is_the_density() -> None:
    x, mu, s = normal(5, 2, 3), normal(5, 2, 3, seed=1), normal(2, 3, seed=2).exp()
    expected = Normal(mu, s).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian().log_prob(x, mu, s), expected, rtol=1e-12, atol=1e-12)


# -- the linear VAE ----------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """x W^T + b, in place of a network."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x @ self.weight.T + self.bias


def linear_vae(x: Tensor, q: int, **settings: object) -> VAE:
    """The VAE at the maximum-likelihood PPCA of x (N, D), with the exact posterior as its encoder.

    W = U (Lambda - s^2 I)^(1/2), s^2 the mean of the discarded eigenvalues (Tipping & Bishop 1999); the posterior is
    N(M^-1 W^T (x - m), s^2 M^-1) with M = W^T W + s^2 I, which is diagonal for this W (Lucas et al. 2019).
    """
    d = x.shape[1]
    mean = x.mean(0)
    eigenvalues, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    noise = eigenvalues[: d - q].mean()
    w = vectors[:, d - q :] * (eigenvalues[d - q :] - noise).sqrt()
    m = (w.T @ w).diagonal() + noise
    spec = DataSpec(kind="points", shape=(d,))
    model = VAE(spec, latent_dim=q, scale="dimension", width=4, depth=0, **settings)
    model.initialize(0)
    model.double()
    weight = torch.cat([w.T / m[:, None], torch.zeros(q, d, dtype=F64)])
    model.encoder = Affine(weight, torch.cat([-(w.T @ mean) / m, (noise / m).log()]))
    model.decoder = Affine(w, mean)
    raw = torch.expm1(noise.sqrt() - model.config.min_scale).log()  # inverse of the softplus
    model.raw_scale.data = (raw - RAW_START).expand(d).clone()
    model.fitted = True
    return model


@pytest.fixture
def data() -> Tensor:
    return normal(400, 3, seed=1) @ normal(3, 6, seed=2) + 0.5 * normal(400, 6, seed=3) + normal(6, seed=4)


def scale(model: VAE) -> Tensor:
    """s of p(x | z), (D,)."""
    return model.likelihood(torch.zeros(1, model.config.latent_dim, dtype=F64), None)[1].detach()


def exact_log_likelihood(model: VAE, x: Tensor) -> Tensor:
    """log N(x; b, W W^T + s^2 I) of the decoder's own weights, whatever the encoder."""
    decoder = model.decoder
    assert isinstance(decoder, Affine)
    covariance = decoder.weight @ decoder.weight.T + scale(model).square().diag()
    return MultivariateNormal(decoder.bias, covariance).log_prob(x).detach()


@pytest.mark.parametrize("samples", [1, 5])
def test_with_the_exact_posterior_the_bound_is_the_likelihood(data: Tensor, samples: int) -> None:
    model = linear_vae(data, 3)
    score = model.log_prob(data, samples=samples)
    assert score.kind == "lower_bound"
    torch.testing.assert_close(score.value, exact_log_likelihood(model, data), rtol=0, atol=1e-8)


def test_the_loss_is_minimal_there_and_equals_the_negative_likelihood(data: Tensor) -> None:
    """The optimum of PPCA is stationary for the ELBO (Lucas et al. 2019): no gradient on the decoder's mean path."""
    model = linear_vae(data, 3)
    draws = 400
    x = data.repeat(draws, 1)
    loss, parts = model.loss(Batch(x), Step(noise=Noise("loss", n=len(x), block=len(x)), progress=1.0))
    expected = -exact_log_likelihood(model, data).mean() / 6
    # The reconstruction term is Monte Carlo: 160,000 draws leave a standard error below 1e-3.
    assert abs(loss.item() - expected.item()) < 5e-3
    assert parts["kl"].item() + parts["reconstruction"].item() == pytest.approx(loss.item(), abs=1e-12)
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.abs().max() < 0.02  # a shifted encoder gives about 1
    model.zero_grad()
    with torch.no_grad():
        model.encoder.bias[:3] += 0.5  # type: ignore[index, operator]
    worse, _ = model.loss(Batch(x), Step(noise=Noise("loss", n=len(x), block=len(x)), progress=1.0))
    assert worse.item() > loss.item() + 0.05


def test_wrong_posteriors_only_lower_the_bound_and_more_samples_raise_it(data: Tensor) -> None:
    """Means over 400 examples and 4 repeats; their spread is far below the gaps that are asserted."""
    model = linear_vae(data, 3)
    exact = exact_log_likelihood(model, data).mean().item()
    with torch.no_grad():
        model.encoder.weight[:3] *= 0.9  # type: ignore[index, operator]
        model.encoder.bias[:3] += 0.3  # type: ignore[index, operator]
        model.encoder.bias[3:] += 0.8  # type: ignore[index, operator]
    bounds = [model.log_prob(data, samples=k, repeats=4).value.mean().item() for k in (1, 8, 64, 512)]
    assert bounds[0] < exact - 0.3
    assert all(b > a + 0.01 for a, b in itertools.pairwise(bounds))
    assert exact - 0.05 < bounds[-1] < exact + 0.01


def test_one_sample_is_the_elbo(data: Tensor) -> None:
    """K = 1 averages to reconstruction minus KL, here with a wrong posterior; five standard errors."""
    model = linear_vae(data, 2)
    with torch.no_grad():
        model.encoder.bias += 0.4  # type: ignore[operator]
    x = data[:1].expand(20_000, -1)
    value = model.log_prob(x, samples=1).value
    mu, logvar = model.posterior(data[:1], None)
    s2 = scale(model).square()
    decoder = model.decoder
    assert isinstance(decoder, Affine)
    residual = (data[0] - decoder(mu)).square().sum() + ((decoder.weight.square()) @ logvar.exp()[0]).sum()
    elbo = -0.5 * (residual / s2[0] + 6 * (2 * math.pi * s2[0]).log()) - kl_to_standard_normal(mu, logvar)[0]
    assert abs(value.mean().item() - elbo.item()) < 5 * value.std().item() / math.sqrt(len(x))


def test_beta_weighs_the_loss_but_not_the_likelihood(data: Tensor) -> None:
    plain, weighted = linear_vae(data, 3), linear_vae(data, 3, beta=4.0, warmup=0.2)
    for progress, weight in ((1.0, 4.0), (0.2, 4.0), (0.05, 1.0), (0.0, 0.0)):
        _, parts = plain.loss(Batch(data), Step(Noise("loss", n=400, block=400)))
        loss, _ = weighted.loss(Batch(data), Step(Noise("loss", n=400, block=400), progress))
        torch.testing.assert_close(loss, parts["reconstruction"] + weight * parts["kl"], rtol=0, atol=1e-12)
    assert torch.equal(plain.log_prob(data).value, weighted.log_prob(data).value)


def test_encode_is_the_posterior_mean_and_decode_the_mean_of_x(data: Tensor) -> None:
    model = linear_vae(data, 3)
    z = model.encode(data)
    decoder = model.decoder
    assert isinstance(decoder, Affine)
    w, b = decoder.weight.detach(), decoder.bias.detach()
    s2 = scale(model)[0].square().item()
    expected = torch.linalg.solve(w.T @ w + s2 * torch.eye(3, dtype=F64), w.T @ (data - b).T).T
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.decode(z), z @ w.T + b, rtol=0, atol=1e-12)


def test_samples_have_the_mean_and_covariance_of_the_model(data: Tensor) -> None:
    """Each entry within six standard errors: a false alarm in ten million over the 27 entries."""
    model, n = linear_vae(data, 3), 40_000
    x = model.sample(n, generator=0)
    decoder = model.decoder
    assert isinstance(decoder, Affine)
    w, b = decoder.weight.detach(), decoder.bias.detach()
    covariance = w @ w.T + scale(model).square().diag()
    variance = covariance.diagonal()
    assert ((x.mean(0) - b).abs() < 6 * (variance / n).sqrt()).all()
    spread = ((variance[:, None] * variance[None, :] + covariance.square()) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() < 6 * spread).all()
    mean_only = model.sample(n, generator=0, observation_noise=False)
    assert ((mean_only.T.cov() - w @ w.T).abs() < 6 * spread).all()


# -- the whole model -----------------------------------------------------------------------------------------------

KINDS = {
    "picture": DataSpec(kind="image", shape=(1, 4, 4), levels=3),
    "signal": DataSpec(kind="signal", shape=(2, 5)),
    "points": DataSpec(kind="points", shape=(2,)),
}


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_likelihood_of_a_picture_sums_to_one(net: str) -> None:
    """Over all 3^4 pictures of 2x2 pixels; the estimate of each probability is unbiased, so the sum is near 1."""
    spec = DataSpec(kind="image", shape=(1, 2, 2), levels=3)
    model = VAE(spec, net=net, latent_dim=2, width=8, depth=1)
    model.initialize(3)
    model.fitted = True
    x = torch.cartesian_prod(*[torch.arange(3)] * 4).view(81, 1, 2, 2)
    total = model.log_prob(x, samples=500).value.exp().sum().item()
    assert abs(total - 1.0) < 0.05


@pytest.mark.parametrize("scale", ["decoder", "dimension"])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_is_bounded_below(kind: str, scale: str) -> None:
    model = VAE(KINDS[kind], scale=scale, min_scale=0.25, latent_dim=3, width=8, depth=1)
    model.initialize(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100.0).sub_(20.0)
    mu, s = model.likelihood(torch.randn(50, 3, generator=rng(1)), None)
    assert mu.shape == (50, *model.codec.shape)
    assert s.min() == 0.25


@pytest.mark.parametrize("kind", ["class", "vector"])
def test_learns_what_its_condition_means(kind: str) -> None:
    """Two groups at x = -3 and x = 3: after a short training samples fall on their own side."""
    condition = ConditionSpec(kind=kind, names=("a", "b"))
    spec = DataSpec(kind="points", shape=(2,), condition=condition)
    label = torch.randint(2, (2000,), generator=rng(0))
    x = torch.randn(2000, 2, generator=rng(1)) + (6.0 * label - 3.0).unsqueeze(1) * torch.tensor([1.0, 0.0])
    c = label if kind == "class" else nn.functional.one_hot(label, 2).float()
    model = VAE(spec, conditional=True, latent_dim=2, width=32, depth=1)
    model.initialize(0)
    model.prepare(TensorSplit(x, c), Noise("prepare", n=1))
    (objective,) = model.objectives()
    optimizer = torch.optim.Adam(objective.parameters, lr=5e-3)
    for i in range(100):
        index = torch.randint(2000, (128,), generator=rng(i))
        loss, _ = model.loss(Batch(x[index], c[index]), Step(Noise("train", i, n=128, block=128), i / 100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.fitted = True
    one = torch.tensor([1]) if kind == "class" else torch.tensor([[0.0, 1.0]])
    right = model.sample(200, one.expand(200, *one.shape[1:]), generator=0)[:, 0]
    left = model.sample(200, (1 - one).expand(200, *one.shape[1:]), generator=0)[:, 0]
    assert (right > 0).float().mean() > 0.95
    assert (left < 0).float().mean() > 0.95
