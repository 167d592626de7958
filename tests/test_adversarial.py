"""The game of a GAN: its losses, its settings, what its latent space promises, and that the default finds all modes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.adversarial.demo import count_modes, eight_gaussians
from trilemma.adversarial.generator import mix_styles
from trilemma.adversarial.losses import LOSSES
from trilemma.adversarial.model import GAN
from trilemma.adversarial.penalties import gradient_penalty, squared_gradient
from trilemma.adversarial.presets import PRESETS
from trilemma.check import example_data
from trilemma.core.errors import CapabilityError, UsageError
from trilemma.core.model import Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.registry import create
from trilemma.core.spec import Batch, Column, ConditionSpec, DataSpec
from trilemma.data import load_data
from trilemma.data.dataset import Dataset, TensorSplit, from_tensors
from trilemma.data.toys import Mixture

F64 = torch.float64
CLASSES = ConditionSpec(kind="class", names=("a", "b"))


def build(spec: DataSpec, x: Tensor, condition: Tensor | None = None, name: str = "r3gan", **settings: Any) -> GAN:
    model = create(name, spec, **settings)
    assert isinstance(model, GAN)
    model.initialize(seed=0)
    model.prepare(TensorSplit(x, condition), Noise(0, "prepare", n=1))
    return model


def step_for(n: int, index: int = 0, progress: float = 0.0) -> Step:
    return Step(noise=Noise(0, "train", index, n=n, block=n), progress=progress, index=index)


def scalar(loss: Any) -> Tensor:
    result: Tensor = loss[0] if isinstance(loss, tuple) else loss
    return result


def perturb(model: GAN) -> None:
    """Weights off their initial values, of which some are zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=make_generator("w"), dtype=p.dtype))


@pytest.mark.parametrize("name", ["gan", "dcgan", "wgan-gp", "biggan", "stylegan2", "r3gan"])
def test_each_loss_moves_its_own_player(name: str) -> None:
    spec = DataSpec(kind="image", shape=(1, 6, 6), levels=4)
    x = torch.randint(4, (8, 1, 6, 6), generator=make_generator("data"))
    model = build(spec, x, name=name, width=4, z_dim=4)
    discriminator, generator = model.objectives()
    assert {id(p) for o in (discriminator, generator) for p in o.parameters} == {id(p) for p in model.parameters()}
    # Where nothing is frozen, the discriminator's loss reaches no parameter of the generator.
    loss = scalar(discriminator.loss(Batch(x), step_for(8)))
    assert all(g is None for g in torch.autograd.grad(loss, generator.parameters, allow_unused=True, retain_graph=True))
    for own in (discriminator, generator):
        gradients = torch.autograd.grad(scalar(own.loss(Batch(x), step_for(8))), own.parameters, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)
    assert discriminator.double_backward == (name in ("wgan-gp", "stylegan2", "r3gan"))


TERMS: dict[str, dict[str, Any]] = {
    "r3gan": {"r1": 0.7, "r2": 0.7},
    "r1 alone": {"r1": 0.3, "r2": 0.0, "final_penalty": 1.0, "loss": "non-saturating"},
    "r2 alone": {"r1": 0.0, "r2": 0.3, "final_penalty": 0.5, "loss": "hinge"},
    "lazy": {"r1": 0.5, "r2": 0.5, "penalty_every": 4},
    "wgan-gp": {"loss": "wasserstein", "r1": 0.0, "r2": 0.0, "gradient_penalty": 10.0},
}


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_discriminators_loss_is_the_sum_of_its_terms(settings: dict[str, Any], progress: float) -> None:
    """One joint pass over real and fake equals separate ones; a pair shares its class; penalties follow the budget."""
    spec = DataSpec(kind="points", shape=(2,), condition=CLASSES)
    x = torch.randn(16, 2, generator=make_generator("x"))
    c = torch.randint(2, (16,), generator=make_generator("c"))
    model = build(spec, x, c, conditional=True, width=8, depth=1, z_dim=3, **settings).double()
    perturb(model)
    config = model.config
    final = config.final_penalty
    weight = (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))) * config.penalty_every
    for index in (0, 1):
        loss, logs = model.discriminator_loss(Batch(x, c), step_for(16, index, progress))  # type: ignore[misc]
        noise = Noise(0, "train", index, n=16, block=16)
        fake = model.generate(noise.normal(3, dtype=F64), c).detach().requires_grad_()
        y = model.codec.encode(x, dtype=F64)[0].requires_grad_()
        d_real, d_fake = model.criticize(y, c), model.criticize(fake, c)
        expected = LOSSES[config.loss].d(d_real, d_fake)
        torch.testing.assert_close(logs["game"], expected, rtol=1e-12, atol=0)
        if index % config.penalty_every == 0:
            expected = expected + weight * 0.5 * config.r1 * squared_gradient(d_real, y).mean()
            expected = expected + weight * 0.5 * config.r2 * squared_gradient(d_fake, fake).mean()
            if config.gradient_penalty:
                u = noise.uniform(dtype=F64)
                penalty = gradient_penalty(lambda v: model.criticize(v, c), y.detach(), fake.detach(), u)
                expected = expected + weight * config.gradient_penalty * penalty
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_consistency_is_the_change_of_d_under_augmentation() -> None:
    spec = DataSpec(kind="points", shape=(2,))
    x = torch.randn(16, 2, generator=make_generator("x"))
    settings = {"loss": "hinge", "r1": 0.0, "r2": 0.0, "final_penalty": 1.0}
    model = build(spec, x, width=8, consistency=3.0, augmentations=("offset",), **settings).double()
    perturb(model)
    loss, logs = model.discriminator_loss(Batch(x), step_for(16))  # type: ignore[misc]
    torch.testing.assert_close(loss, logs["game"] + 3.0 * logs["consistency"], rtol=1e-12, atol=0)
    noise = Noise(0, "train", 0, n=16, block=16)
    fake, real = model.generate(noise.normal(model.g.z_dim, dtype=F64), None), model.encoded(Batch(x), None)
    changes = [
        (model.criticize(model.augmentation(y, 1.0, noise), None) - model.criticize(y, None)) for y in (real, fake)
    ]
    torch.testing.assert_close(logs["consistency"], sum(d.square().mean() for d in changes), rtol=1e-12, atol=0)


def test_the_generators_loss_pairs_each_fake_with_a_real_one_of_its_class() -> None:
    spec = DataSpec(kind="points", shape=(1,), condition=CLASSES)
    x = torch.tensor([[-1.0], [1.0]]).repeat(8, 1)
    c = torch.tensor([0, 1]).repeat(8)
    model = build(spec, x, c, conditional=True, width=8, depth=1, z_dim=3).double()
    perturb(model)
    loss = model.generator_loss(Batch(x, c), step_for(16))
    fake = model.generate(Noise(0, "train", 0, n=16, block=16).normal(3, dtype=F64), c)
    real = model.encoded(Batch(x), None)
    expected = LOSSES["relativistic"].g(model.criticize(fake, c), model.criticize(real, c))
    torch.testing.assert_close(scalar(loss), expected, rtol=1e-12, atol=0)


def test_projection_is_an_inner_product_with_the_features() -> None:
    spec = DataSpec(kind="points", shape=(3,), condition=CLASSES)
    x, c = torch.randn(10, 3, generator=make_generator("x")), torch.arange(10) % 2
    d = build(spec, x, c, conditional=True, width=8).double().d
    features = d.features(x.double())
    assert d.embed.embed is not None
    rows = d.embed.embed.weight[c]  # type: ignore[index]
    expected = (features * (d.output.weight + rows / math.sqrt(features.shape[1]))).sum(1) + d.output.bias
    torch.testing.assert_close(d(x.double(), c), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preset", [p.name for p in PRESETS])
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_one_latent_interface(preset: str, shape: tuple[int, ...]) -> None:
    """Each generator maps z to ws and ws to y; truncation draws ws to their mean within a class, mixing swaps w."""
    spec = DataSpec(kind="points" if len(shape) == 1 else "image", shape=shape, condition=CLASSES)
    x, c = torch.randn(32, *shape, generator=make_generator("x")), torch.arange(32) % 2
    model = build(spec, x, c, name=preset, conditional=True).double().eval()
    g, n = model.g, 6
    z, labels = torch.randn(n, g.z_dim, generator=make_generator("z"), dtype=F64), torch.arange(n) % 2
    ws = g.mapping(z, labels)
    assert ws.shape == (n, g.num_ws, g.w_dim)
    torch.testing.assert_close(g(z, labels), g.synthesis(ws), rtol=0, atol=0)
    assert g.synthesis(ws).shape == (n, *shape)
    # psi = 0: one point per class; psi = 1/2: half way to it.
    nothing, half = g.truncate(ws, labels, 0.0), g.truncate(ws, labels, 0.5)
    torch.testing.assert_close(nothing[::2], nothing[:1].expand(3, -1, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(half, 0.5 * (ws + nothing), rtol=1e-10, atol=1e-12)
    first = torch.full((n,), 1)
    others = g.mapping(-z, labels)
    mixed = mix_styles(ws, others, first)
    assert torch.equal(mixed[:, :1], ws[:, :1])
    assert torch.equal(mixed[:, 1:], others[:, 1:])


def test_the_mean_of_a_direct_latent_is_exact() -> None:
    """[0, e(c)] is the mean of [z, e(c)]: truncation scales z and keeps the class. 5 standard errors: 6e-7."""
    spec = DataSpec(kind="points", shape=(2,), condition=CLASSES)
    x, c = torch.randn(32, 2, generator=make_generator("x")), torch.arange(32) % 2
    g = build(spec, x, c, conditional=True).g
    z = torch.randn(20_000, g.z_dim, generator=make_generator("z"))
    labels = torch.ones(20_000, dtype=torch.int64)
    mean = g.mapping(z, labels).mean(0)
    assert (mean - g.centre(labels[:1])[0]).abs().max() < 5 / math.sqrt(20_000)


def test_truncation_is_a_setting_of_sample_and_shrinks_the_spread() -> None:
    spec = DataSpec(kind="points", shape=(2,))
    model = build(spec, torch.randn(64, 2, generator=make_generator("x")))
    perturb(model)
    model.fitted = True
    spread = [model.sample(200, generator=0, truncation=psi).std(0).max().item() for psi in (0.0, 0.5, 1.0)]
    assert spread[0] < 1e-6 < spread[1] < spread[2]


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"style_mixing": 0.5}, "style_mixing has no effect with architecture=residual"),
    ({"architecture": "dcgan"}, "batch_norm=false"),
    ({"batch_norm": False}, "batch_norm has no effect"),
    ({"loss": "hinge", "penalty_every": 4}, "penalty_every has no effect"),
    ({"augment_strength": 0.2}, "augment_strength has no effect"),
    ({"augmentations": ("flip",)}, "augmentations have no effect"),
    ({"spectral_norm": "both"}, "spectral_norm"),
    ({"architecture": "stylegan2", "depth": 3}, "depth has no effect"),
    ({"architecture": "stylegan2", "path_every": 2}, "path_every has no effect"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create("r3gan", DataSpec(kind="image", shape=(1, 8, 8), levels=16), **settings)


def test_augmentations_that_the_data_do_not_have_are_named() -> None:
    spec = DataSpec(kind="image", shape=(1, 8, 8), levels=16)
    x = torch.randint(16, (32, 1, 8, 8), generator=make_generator("x"))
    with pytest.raises(UsageError, match="augmentation 'hue' does not exist"):
        build(spec, x, augment="fixed", augmentations=("hue",))


def test_table_categories_are_probabilities_that_decode_to_categories() -> None:
    columns = (
        Column(name="size", kind="numeric", dtype="float64"),
        Column(name="colour", kind="categorical", dtype="str", categories=("red", "green", "blue")),
    )
    g = make_generator("table")
    x = torch.stack([torch.randn(50, generator=g).double(), torch.randint(3, (50,), generator=g).double()], 1)
    model = build(DataSpec(kind="table", shape=(2,), columns=columns), x)
    y = model.generate(torch.randn(20, model.config.z_dim, generator=g), None)
    assert y.shape == (20, 4)
    torch.testing.assert_close(y[:, 1:].sum(1), torch.ones(20))
    assert (y[:, 1:] > 0).all()
    model.fitted = True
    sample = model.sample(30, generator=0)
    assert set(sample[:, 1].unique().tolist()) <= {0.0, 1.0, 2.0}


def test_it_has_no_likelihood_and_does_not_pretend() -> None:
    assert GAN.abilities() == {"sample", "decode", "condition"}
    model = build(DataSpec(kind="points", shape=(2,)), torch.randn(8, 2, generator=make_generator("x")))
    model.fitted = True
    with pytest.raises(CapabilityError, match="has no log_prob"):
        model.log_prob(torch.zeros(1, 2))


def test_it_learns_two_gaussians_by_label(tmp_path: Path) -> None:
    """Means within 0.2 and standard deviations within 25% of N(-2, 0.5^2) and N(3, 1) after 400 steps."""
    g = make_generator("gaussians")
    c = torch.randint(2, (4000,), generator=g)
    mean, std = torch.tensor([-2.0, 3.0]), torch.tensor([0.5, 1.0])
    x = (mean[c] + std[c] * torch.randn(4000, generator=g))[:, None]
    data = load_data((x.numpy(), c.numpy()))
    model = create("r3gan", data.spec, conditional=True)
    model.fit(data, steps=400, out=tmp_path / "run", show=False, previews=0)
    for label in (0, 1):
        sample = model.sample(4000, label, generator=1)
        assert abs(sample.mean().item() - mean[label].item()) < 0.2
        assert sample.std().item() == pytest.approx(std[label].item(), rel=0.25)


@pytest.mark.parametrize("name", ["wgan-gp", "biggan", "stylegan2-ada", "stylegan3", "r3gan"])
def test_half_precision_reaches_no_loss(name: str, tmp_path: Path) -> None:
    """Under bfloat16 autocast, the default on CUDA, D's values and real and generated examples are single."""
    data = example_data(DataSpec(kind="image", shape=(1, 8, 8), levels=17))
    model = create(name, data.spec, width=8, z_dim=8)
    assert isinstance(model, GAN)
    run = model.fit(data, steps=2, precision="bf16", batch_size=16, out=tmp_path / "run", show=False, previews=0)
    assert run.status["state"] == "finished"
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fake, _ = model._fake(None, Noise(0, "half", n=4, block=4))
        assert fake.dtype == model.criticize(fake, None).dtype == torch.float32


def test_a_compiled_game_is_measured(tmp_path: Path) -> None:
    """What is compiled frees its graph after one backward pass, and the diagnostics need two gradients."""
    data = example_data(DataSpec(kind="points", shape=(2,)))
    model = create("gan", data.spec, width=8, depth=0)
    run = model.fit(data, steps=2, compile=True, validations=1, out=tmp_path / "run", show=False, previews=0)
    assert [r for r in run.metrics() if r["kind"] == "diagnosis"]


def eight_modes() -> tuple[Mixture, Dataset]:
    """Eight Gaussians of standard deviation 0.1 on a circle of radius 2: far apart, as in the literature's pictures."""
    toy = eight_gaussians(0.1)
    x = toy.sample(10_000, Noise("eight", n=10_000)).x.float()
    return toy, from_tensors(x, DataSpec(kind="points", shape=(2,)), name="eight")


def fit_eight(name: str, seed: int, folder: Path) -> tuple[int, float, list[str]]:
    """Modes covered, share of good samples, and what the diagnostics said, after 2000 steps."""
    toy, data = eight_modes()
    model = create(name, data.spec)
    run = model.fit(data, steps=2000, seed=seed, out=folder, show=False, previews=0, validations=1)
    modes, good = count_modes(model.sample(4000, generator=1), toy)
    return modes, good, [event["message"] for event in run.events() if event["event"] == "advice"]


@pytest.mark.parametrize("seed", range(5))
def test_the_default_covers_all_eight_modes(seed: int, tmp_path: Path) -> None:
    """8 of 8 modes, and at least 95% of the samples within 4 standard deviations of a centre, with every seed."""
    modes, good, advice = fit_eight("r3gan", seed, tmp_path / "run")
    assert modes == 8
    assert good >= 0.95
    assert not [text for text in advice if text.startswith(("Mode collapse", "Off the data"))]


@pytest.mark.parametrize("seed", range(3))
def test_minimax_fails_there_and_the_diagnostics_say_how(seed: int, tmp_path: Path) -> None:
    """Modes are lost, or a fifth and more of the samples lies between them: measured 77%, 55% and 52% good."""
    modes, good, advice = fit_eight("gan", seed, tmp_path / "run")
    assert modes < 8 or good < 0.85
    assert [text for text in advice if text.startswith(("Mode collapse", "Off the data", "Vanishing gradient"))]
