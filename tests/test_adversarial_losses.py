"""Losses against their formulas and the divergences that they estimate; penalties against analytic critics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trilemma.adversarial.losses import LOSSES
from trilemma.adversarial.penalties import (
    clip_weights,
    gradient_penalty,
    spectral_normalize,
    squared_gradient,
    squared_gradients,
)
from trilemma.core.noise import make_generator

F64 = torch.float64
REAL = torch.tensor([0.3, -2.0, 7.0], dtype=F64)
FAKE = torch.tensor([1.1, 4.0, -3.0], dtype=F64)


def sigmoid(t: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-t))


FORMULAS = {
    "minimax": (
        -(sigmoid(REAL).log() + (1 - sigmoid(FAKE)).log()).mean(),
        (1 - sigmoid(FAKE)).log().mean(),
    ),
    "non-saturating": (-(sigmoid(REAL).log() + (1 - sigmoid(FAKE)).log()).mean(), -sigmoid(FAKE).log().mean()),
    "wasserstein": ((FAKE - REAL).mean(), -FAKE.mean()),
    "hinge": (torch.tensor((0.7 + 3.0 + 0.0 + 2.1 + 5.0 + 0.0) / 3, dtype=F64), -FAKE.mean()),
    "least-squares": (
        0.5 * ((REAL - 1) ** 2).mean() + 0.5 * (FAKE**2).mean(),
        0.5 * ((FAKE - 1) ** 2).mean(),
    ),
    "relativistic": (-sigmoid(REAL - FAKE).log().mean(), -sigmoid(FAKE - REAL).log().mean()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name: str) -> None:
    loss, (d, g) = LOSSES[name], FORMULAS[name]  # type: ignore[index]
    torch.testing.assert_close(loss.d(REAL, FAKE), d, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.g(FAKE, REAL), g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_descending_moves_each_player_its_way(name: str) -> None:
    """D gains by raising real and lowering fake values, G by raising fake ones: also with Wasserstein's critic."""
    real, fake = torch.tensor([0.2], dtype=F64, requires_grad=True), torch.tensor([0.1], dtype=F64, requires_grad=True)
    loss = LOSSES[name]  # type: ignore[index]
    d_real, d_fake = torch.autograd.grad(loss.d(real, fake), (real, fake))
    assert d_real < 0 < d_fake
    (g_fake,) = torch.autograd.grad(loss.g(fake, real.detach()), fake)
    assert g_fake < 0


def test_large_logits_neither_overflow_nor_lose_their_gradient() -> None:
    far = torch.tensor([800.0, -800.0], dtype=F64)
    for loss in LOSSES.values():
        assert loss.d(far, -far).isfinite()
        assert loss.g(-far, far).isfinite()
    rejected = torch.tensor([-800.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(LOSSES["non-saturating"].g(rejected, rejected.detach()), rejected)
    assert gradient.item() == pytest.approx(-1.0)
    (gradient,) = torch.autograd.grad(LOSSES["minimax"].g(rejected, rejected.detach()), rejected)
    assert gradient.item() == 0.0  # the vanishing gradient itself


def test_saturating_over_non_saturating_gradient_is_the_odds_of_the_fake() -> None:
    t = torch.linspace(-6, 6, 13, dtype=F64, requires_grad=True)
    g = [torch.autograd.grad(LOSSES[n].g(t, t.detach()), t)[0] for n in ("minimax", "non-saturating")]  # type: ignore[index]
    torch.testing.assert_close(g[0] / g[1], t.detach().exp(), rtol=1e-10, atol=0)


P = torch.rand(7, generator=make_generator("p"), dtype=F64).mul(3).softmax(0)
Q = torch.rand(7, generator=make_generator("q"), dtype=F64).mul(3).softmax(0)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())


def expected(name: str, critic: Tensor) -> Tensor:
    """The expectation of d over independent x ~ p and G(z) ~ q, on a space of seven points."""
    loss = LOSSES[name].d  # type: ignore[index]
    pairs = [[loss(critic[i : i + 1], critic[j : j + 1]) for j in range(7)] for i in range(7)]
    return (torch.stack([torch.stack(row) for row in pairs]) * P[:, None] * Q[None, :]).sum()


CASES = {
    "minimax": ((P / Q).log(), math.log(4) - 2 * jsd(P, Q)),
    "non-saturating": ((P / Q).log(), math.log(4) - 2 * jsd(P, Q)),
    "hinge": ((P - Q).sign(), 2 - (P - Q).abs().sum()),
    "least-squares": (P / (P + Q), 0.5 * (P * Q / (P + Q)).sum()),
    "relativistic": (
        (P / Q).log(),
        math.log(2) - jsd((P[:, None] * Q).flatten(), (Q[:, None] * P).flatten()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_best_discriminator_and_the_divergence_it_measures(name: str) -> None:
    critic, value = CASES[name]
    critic = critic.clone().requires_grad_()
    at_best = expected(name, critic)
    torch.testing.assert_close(at_best, value, rtol=0, atol=1e-13)
    if name != "hinge":  # whose best D sits in a corner
        (gradient,) = torch.autograd.grad(at_best, critic)
        torch.testing.assert_close(gradient, torch.zeros(7, dtype=F64), rtol=0, atol=1e-14)
    g = make_generator("perturbed", name)
    for scale in (1e-3, 0.1, 1.0):
        other = critic.detach() + scale * torch.randn(7, generator=g, dtype=F64)
        assert expected(name, other) >= at_best - 1e-13


def test_at_the_optimum_the_minimax_value_is_minus_log_4_plus_twice_the_jsd_of_gaussians() -> None:
    """p = N(0, 1), q = N(m, s^2) by quadrature; p = q gives -log 4."""
    x = torch.linspace(-30, 30, 60_001, dtype=F64)
    for m, s in ((0.0, 1.0), (1.0, 1.0), (-2.0, 0.5), (8.0, 1.0)):
        log_p = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
        log_q = -0.5 * ((x - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
        d = log_p - log_q
        value = torch.trapezoid(
            log_p.exp() * nn.functional.logsigmoid(d) + log_q.exp() * nn.functional.logsigmoid(-d), x
        )
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        divergence = 0.5 * torch.trapezoid(log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m), x)
        assert value.item() == pytest.approx(-math.log(4) + 2 * divergence.item(), abs=1e-10)
        assert 0.0 <= divergence.item() <= math.log(2) + 1e-12


def test_the_wasserstein_loss_of_the_best_slope_is_w1_by_sorting() -> None:
    """Equal numbers of points on a line: W1 is the mean distance of sorted pairs; a 1-Lipschitz D attains it."""
    g = make_generator("w1")
    x, y = torch.randn(200, generator=g, dtype=F64) * 0.7 - 1, torch.randn(200, generator=g, dtype=F64) + 2
    w1 = (x.sort().values - y.sort().values).abs().mean()
    # Kantorovich's potential on a line: its slope is the sign of F_q - F_p between neighbouring points.
    points, order = torch.cat([x, y]).sort()
    mass = torch.cat([torch.full((200,), -1 / 200, dtype=F64), torch.full((200,), 1 / 200, dtype=F64)])[order]
    slope = mass.cumsum(0)[:-1].sign()
    potential = torch.cat([torch.zeros(1, dtype=F64), (slope * points.diff()).cumsum(0)])
    value = torch.empty(400, dtype=F64)
    value[order] = potential
    loss = LOSSES["wasserstein"].d
    best = loss(value[:200], value[200:])
    assert best.item() == pytest.approx(-w1.item(), abs=1e-12)
    for seed in range(20):  # no other 1-Lipschitz function does better
        s = torch.rand(399, generator=make_generator("slopes", seed), dtype=F64) * 2 - 1
        other = torch.empty(400, dtype=F64)
        other[order] = torch.cat([torch.zeros(1, dtype=F64), (s * points.diff()).cumsum(0)])
        assert loss(other[:200], other[200:]) >= best


def test_margins_are_positive_on_the_right_side() -> None:
    for name, loss in LOSSES.items():
        real, fake = torch.tensor([2.0, 0.1], dtype=F64), torch.tensor([-1.0, 0.2], dtype=F64)
        on_real, on_fake = loss.margins(real, fake)
        expected_sides = {
            "least-squares": ([True, False], [True, True]),
            "wasserstein": ([True, False],) * 2,
            "relativistic": ([True, False],) * 2,
        }.get(name, ([True, True], [True, False]))
        assert ((on_real > 0).tolist(), (on_fake > 0).tolist()) == expected_sides


def test_squared_gradient_of_linear_and_quadratic_critics() -> None:
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
    torch.testing.assert_close(dm, (flat.T @ (flat @ m) + (flat @ m).T @ flat).detach(), rtol=0, atol=1e-11)


def test_squared_gradients_of_two_inputs_in_one_pass() -> None:
    g = make_generator("two")
    x, y = (torch.randn(4, 3, generator=g, dtype=F64, requires_grad=True) for _ in range(2))
    both = torch.cat([x, y])
    found = squared_gradients((both**3).sum(), [x, y])
    for square, own in zip(found, (x, y), strict=True):
        torch.testing.assert_close(square, (3 * own**2).square().sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 4, 4), (1, 2, 2, 3)])
def test_gradient_penalty_on_the_line_for_any_shape(shape: tuple[int, ...]) -> None:
    """|grad| of x -> |x|^2 / 2 is |x| at the point between: the penalty is E (|u x + (1 - u) y| - 1)^2."""
    g = make_generator("gp")
    real, fake = (torch.randn(5, *shape, generator=g, dtype=F64) for _ in range(2))
    u = torch.rand(5, generator=g, dtype=F64)
    found = gradient_penalty(lambda x: 0.5 * x.square().flatten(1).sum(1), real, fake, u)
    w = u.view(-1, *[1] * len(shape))
    between = (w * real + (1 - w) * fake).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, ((between - 1) ** 2).mean(), rtol=1e-10, atol=0)
    slope = torch.tensor(2.5, dtype=F64, requires_grad=True)
    direction = torch.ones(shape, dtype=F64) / math.sqrt(math.prod(shape))
    penalty = gradient_penalty(lambda x: slope * (x * direction).flatten(1).sum(1), real, fake, u)
    torch.testing.assert_close(penalty, (slope - 1) ** 2, rtol=1e-10, atol=0)
    (derivative,) = torch.autograd.grad(penalty, slope)
    torch.testing.assert_close(derivative, 2 * (slope - 1), rtol=1e-10, atol=0)


def test_gradient_penalty_of_a_flat_critic_has_a_finite_derivative() -> None:
    slope = torch.zeros((), dtype=F64, requires_grad=True)
    x = torch.randn(4, 2, generator=make_generator("flat"), dtype=F64)
    penalty = gradient_penalty(lambda v: slope * v.sum(1), x, -x, torch.full((4,), 0.5, dtype=F64))
    assert penalty.item() == pytest.approx(1.0, abs=1e-5)
    assert torch.autograd.grad(penalty, slope)[0].isfinite()


def test_clipping_leaves_small_weights_and_bounds_large_ones() -> None:
    weights = [nn.Parameter(torch.tensor([-3.0, 0.004, 0.5])), nn.Parameter(torch.tensor([[0.01, -0.02]]))]
    clip_weights(iter(weights), 0.01)
    assert weights[0].tolist() == pytest.approx([-0.01, 0.004, 0.01])
    assert weights[1].flatten().tolist() == pytest.approx([0.01, -0.01])


def test_spectral_normalisation_makes_every_layer_of_norm_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(7, 4), nn.Embedding(3, 6)).double()
    nn.init.zeros_(network[1].weight)  # a layer that starts at zero gets a direction
    spectral_normalize(network)
    with torch.no_grad():
        for layer in network:
            layer.parametrizations.weight.original.mul_(torch.rand_like(layer.weight) + 2.0)  # type: ignore[union-attr, operator, index]
    network.train()
    for _ in range(300):
        for layer in network:
            _ = layer.weight
    network.eval()
    for layer in network:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)  # type: ignore[operator, arg-type]
        assert norm.item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 2.0])
@pytest.mark.parametrize(("name", "slope"), [("relativistic", 0.5), ("non-saturating", 0.5), ("wasserstein", 1.0)])
def test_dynamics_of_the_dirac_gan_have_the_eigenvalues_of_the_theory(name: str, slope: float, gamma: float) -> None:
    """D(x) = psi x, G = theta, data at 0 (Mescheder et al. 2018): -gamma +- sqrt(gamma^2 - f'(0)^2)."""

    def velocity(state: Tensor) -> Tensor:
        psi, theta = state[0:1], state[1:2]
        x = torch.stack([torch.zeros_like(theta), theta])  # real, fake
        real, fake = psi * x[0], psi * x[1]
        penalty = squared_gradient((psi * x).sum(1), x)
        loss = LOSSES[name]  # type: ignore[index]
        loss_d = loss.d(real, fake) + 0.5 * gamma * penalty.sum()
        (d_psi,) = torch.autograd.grad(loss_d, psi, create_graph=True)
        (d_theta,) = torch.autograd.grad(loss.g(fake, real), theta, create_graph=True)
        return -torch.cat([d_psi, d_theta])

    state = torch.zeros(2, dtype=F64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(velocity, state)
    theory = torch.tensor([[-2 * gamma, -slope], [slope, 0.0]], dtype=F64)
    torch.testing.assert_close(jacobian, theory, rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvals(jacobian)
    assert eigenvalues.real.max() <= 1e-12
    assert (eigenvalues.real.max() < 0) == (gamma > 0)  # without penalties the game circles for ever
