"""The relativistic game: values, penalties and dynamics against closed forms; a small end-to-end fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trilemma.adversarial.losses import (
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    squared_gradient,
)
from trilemma.adversarial.r3gan import R3GAN
from trilemma.core.errors import CapabilityError
from trilemma.core.model import Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, Column, ConditionSpec, DataSpec
from trilemma.data.dataset import TensorSplit

F64 = torch.float64


def build(spec: DataSpec, x: Tensor, condition: Tensor | None = None, **settings: object) -> R3GAN:
    model = R3GAN(spec, **settings)
    model.initialize(seed=0)
    model.prepare(TensorSplit(x, condition), Noise(0, "prepare", n=1))
    return model


def step_for(n: int, index: int = 0, progress: float = 0.0) -> Step:
    return Step(noise=Noise(0, "train", index, n=n, block=n), progress=progress, index=index)


def test_losses_are_the_formula_and_mirror_each_other():
    real, fake = torch.tensor([0.3, -2.0, 7.0], dtype=F64), torch.tensor([1.1, 4.0, -3.0], dtype=F64)
    expected = torch.log1p(torch.exp(fake - real)).mean()
    torch.testing.assert_close(relativistic_discriminator_loss(real, fake), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(relativistic_generator_loss(fake, real), expected, rtol=1e-14, atol=0)
    equal = torch.full((4,), 2.5, dtype=F64)
    assert relativistic_generator_loss(equal, equal).item() == pytest.approx(math.log(2), abs=1e-15)
    shifted = relativistic_discriminator_loss(real + 100, fake + 100)
    torch.testing.assert_close(shifted, expected, rtol=1e-13, atol=0)


def test_best_critic_is_the_log_ratio_and_its_loss_the_jensen_shannon_divergence_of_the_pairs():
    g = make_generator("jsd")
    p, q = torch.rand(5, generator=g, dtype=F64).softmax(0), torch.rand(5, generator=g, dtype=F64).mul(3).softmax(0)
    critic = (p.log() - q.log()).requires_grad_()
    real, fake = critic[:, None].expand(5, 5), critic[None, :].expand(5, 5)
    pair, swapped = p[:, None] * q[None, :], q[:, None] * p[None, :]
    loss = sum(pair[i, j] * relativistic_discriminator_loss(real[i, j], fake[i, j]) for i in range(5) for j in range(5))
    middle = (pair + swapped) / 2
    jsd = 0.5 * ((pair * (pair / middle).log()).sum() + (swapped * (swapped / middle).log()).sum())
    torch.testing.assert_close(loss, math.log(2) - jsd, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(loss, critic)
    torch.testing.assert_close(gradient, torch.zeros(5, dtype=F64), rtol=0, atol=1e-15)


def test_squared_gradient_of_linear_and_quadratic_critics():
    g = make_generator("penalty")
    x = torch.randn(6, 2, 3, generator=g, dtype=F64, requires_grad=True)
    a = torch.randn(2, 3, generator=g, dtype=F64, requires_grad=True)
    linear = squared_gradient((x * a).flatten(1).sum(1), x)
    torch.testing.assert_close(linear, a.square().sum().expand(6), rtol=0, atol=1e-13)
    (da,) = torch.autograd.grad(linear.mean(), a)
    torch.testing.assert_close(da, 2 * a, rtol=0, atol=1e-13)

    m = torch.randn(6, 6, generator=g, dtype=F64)
    m = (m + m.T).requires_grad_()
    flat = x.flatten(1)
    quadratic = squared_gradient(0.5 * (flat @ m * flat).sum(1), x)
    torch.testing.assert_close(quadratic, (flat @ m).square().sum(1), rtol=0, atol=1e-12)
    (dm,) = torch.autograd.grad(quadratic.sum(), m)
    # d/dM |sym(M) x|^2, as autograd sees M without its symmetry.
    expected = (flat.T @ (flat @ m) + (flat @ m).T @ flat).detach()
    torch.testing.assert_close(dm, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 2.0])
def test_dynamics_of_the_dirac_gan_have_the_eigenvalues_of_the_theory(gamma: float):
    """D(x) = psi x, G = theta, data at 0 (Mescheder et al. 2018): -gamma +- sqrt(gamma^2 - 1/4)."""

    def velocity(state: Tensor) -> Tensor:
        psi, theta = state[0:1], state[1:2]
        x = torch.stack([torch.zeros_like(theta), theta])  # real, fake
        real, fake = psi * x[0], psi * x[1]
        penalty = squared_gradient((psi * x).sum(1), x)
        loss_d = relativistic_discriminator_loss(real, fake) + 0.5 * gamma * penalty.sum()
        (d_psi,) = torch.autograd.grad(loss_d, psi, create_graph=True)
        (d_theta,) = torch.autograd.grad(relativistic_generator_loss(real, fake), theta, create_graph=True)
        return -torch.cat([d_psi, d_theta])

    state = torch.zeros(2, dtype=F64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(velocity, state)
    torch.testing.assert_close(jacobian, torch.tensor([[-2 * gamma, -0.5], [0.5, 0.0]], dtype=F64), rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvals(jacobian)
    assert eigenvalues.real.max() <= 1e-12
    assert (eigenvalues.real.max() < 0) == (gamma > 0)  # without penalties the game circles for ever


def test_each_loss_moves_its_own_player():
    spec = DataSpec(kind="image", shape=(1, 6, 6), levels=4)
    x = torch.randint(4, (8, 1, 6, 6), generator=make_generator("data"))
    model = build(spec, x, width=4, z_dim=3)
    discriminator, generator = model.objectives()
    assert {id(p) for o in (discriminator, generator) for p in o.parameters} == {id(p) for p in model.parameters()}
    for own, other in ((discriminator, generator), (generator, discriminator)):
        for p in own.parameters:
            p.requires_grad_(True)
        for p in other.parameters:
            p.requires_grad_(False)
        loss = own.loss(Batch(x), step_for(8))
        loss = loss[0] if isinstance(loss, tuple) else loss
        gradients = torch.autograd.grad(loss, own.parameters, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)
    # Even where nothing is frozen, the discriminator's loss reaches no parameter of the generator.
    model.requires_grad_(True)
    loss, _ = discriminator.loss(Batch(x), step_for(8))
    assert all(g is None for g in torch.autograd.grad(loss, generator.parameters, allow_unused=True))
    assert discriminator.double_backward
    assert not generator.double_backward


def test_discriminator_loss_is_the_sum_of_its_terms():
    """One joint pass over real and fake equals separate passes, with gamma annealed to a tenth."""
    spec = DataSpec(kind="points", shape=(2,), condition=ConditionSpec(kind="class", names=("a", "b")))
    x = torch.randn(16, 2, generator=make_generator("x"))
    c = torch.randint(2, (16,), generator=make_generator("c"))
    model = build(spec, x, c, conditional=True, width=8, depth=1, z_dim=3, gamma=0.7).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=make_generator("w"), dtype=F64))
    for progress, gamma in ((0.0, 0.7), (0.5, 0.7 * 0.55), (1.0, 0.07)):
        loss, logs = model.discriminator_loss(Batch(x, c), step_for(16, progress=progress))
        y = model.codec.encode(x, dtype=F64)[0].requires_grad_()
        z = Noise(0, "train", 0, n=16, block=16).normal(3, dtype=F64)
        fake = model.generate(z, c).detach().requires_grad_()
        d_real, d_fake = model.criticize(y, c), model.criticize(fake, c)
        r1, r2 = squared_gradient(d_real, y).mean(), squared_gradient(d_fake, fake).mean()
        expected = relativistic_discriminator_loss(d_real, d_fake) + 0.5 * gamma * (r1 + r2)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(logs["r1"], r1, rtol=1e-12, atol=0)
        torch.testing.assert_close(logs["r2"], r2, rtol=1e-12, atol=0)


def test_table_categories_are_probabilities_that_decode_to_categories():
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


def test_it_has_no_likelihood_and_does_not_pretend():
    assert R3GAN.abilities() == {"sample", "decode", "condition"}
    model = build(DataSpec(kind="points", shape=(2,)), torch.randn(8, 2, generator=make_generator("x")))
    model.fitted = True
    with pytest.raises(CapabilityError, match="has no log_prob"):
        model.log_prob(torch.zeros(1, 2))


def test_it_learns_two_gaussians_by_label():
    """Means within 0.2 and standard deviations within 25% of N(-2, 0.5^2) and N(3, 1) after 400 steps."""
    g = make_generator("gaussians")
    c = torch.randint(2, (4000,), generator=g)
    mean, std = torch.tensor([-2.0, 3.0]), torch.tensor([0.5, 1.0])
    x = (mean[c] + std[c] * torch.randn(4000, generator=g))[:, None]
    spec = DataSpec(kind="points", shape=(1,), condition=ConditionSpec(kind="class", names=("low", "high")))
    model = build(spec, x, c, conditional=True, width=32, depth=1, z_dim=2)
    objectives, steps, n = model.objectives(), 400, 128
    optimizers = [torch.optim.Adam(o.parameters, lr=3e-3, betas=(0.0, 0.95)) for o in objectives]
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    for i in range(steps):
        index = torch.randint(4000, (n,), generator=g)
        for objective, optimizer in zip(objectives, optimizers, strict=True):
            loss = objective.loss(Batch(x[index], c[index]), step_for(n, i, i / steps))
            loss = loss[0] if isinstance(loss, tuple) else loss
            gradients = torch.autograd.grad(loss, objective.parameters, allow_unused=True)
            for p, gradient in zip(objective.parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
        with torch.no_grad():
            for k, v in model.named_parameters():
                average[k].lerp_(v, max(0.02, 1.0 / (i + 1)))
    with torch.no_grad():
        for k, v in model.named_parameters():
            v.copy_(average[k])
    model.fitted = True
    for label in (0, 1):
        sample = model.sample(4000, label, generator=1)
        assert abs(sample.mean().item() - mean[label].item()) < 0.2
        assert sample.std().item() == pytest.approx(std[label].item(), rel=0.25)
