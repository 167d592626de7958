"""Continuous flows: linear fields by the matrix exponential, gradients by three routes, the density by its integral."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trilemma.core.errors import CapabilityError, UsageError
from trilemma.core.model import Losses, Step
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, ConditionSpec, DataSpec
from trilemma.diffusion import ode, solvers
from trilemma.diffusion.bound import gaussian_log_prob
from trilemma.diffusion.model import Diffusion
from trilemma.flow.continuous import FFJORD, FFJORDConfig, Motion, Solved, solve
from trilemma.flow.continuous import Path as FlowPath

F64 = torch.float64
SMALL: dict[str, Any] = {"width": 8, "depth": 1}
POINTS = DataSpec(kind="points", shape=(2,))
ROUTES: dict[str, dict[str, Any]] = {
    "rk4": {"gradient": "backprop", "solver_steps": 64},
    "dormand-prince": {"gradient": "backprop", "scheme": "dormand-prince", "solver_steps": 24},
    "checkpoint": {"gradient": "checkpoint", "scheme": "dormand-prince", "solver_steps": 24},
    "adjoint": {"gradient": "adjoint", "tolerance": 1e-10},
}
PURE = {"kinetic": 0.0, "jacobian": 0.0}
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def normal(*shape: int, seed: str = "normal") -> Tensor:
    return torch.randn(shape, generator=make_generator(seed), dtype=F64)


def model_of(spec: DataSpec = POINTS, *, scale: float = 0.3, **settings: Any) -> FFJORD:
    """A model in float64 with random weights: as it is built its velocity is 0."""
    model = FFJORD(spec, **{**SMALL, **settings})
    model.initialize(seed=0)
    model.double()
    g = make_generator("weights")
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g, dtype=F64))
    model.fitted = True
    return model


def step_of(n: int) -> Step:
    return Step(Noise(0, "test", n=n, block=n))


def value_of(losses: Losses) -> Tensor:
    return losses[0] if isinstance(losses, tuple) else losses


def gradients(model: FFJORD, batch: Batch) -> list[Tensor]:
    loss = value_of(model.loss(batch, step_of(len(batch.x))))
    found = torch.autograd.grad(loss, list(model.net.parameters()), allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


# -- linear fields ----------------------------------------------------------------------------------------------


def linear_closed_form(a: Tensor, z: Tensor, probe: Tensor | None) -> Solved:
    """dz/dt = A z: e^A z, tr A, int |A e^(tA) z|^2 dt / D and |A|^2 / D; or v . A v and |v . A|^2 / D."""
    dims = len(a)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    kinetic = torch.zeros(len(z), dtype=F64)
    for node, weight in zip(nodes, weights, strict=True):
        u = z @ torch.linalg.matrix_exp(a * (0.5 + 0.5 * node)).T @ a.T
        kinetic = kinetic + 0.5 * weight * u.square().mean(1)
    end = z @ torch.linalg.matrix_exp(a).T
    if probe is None:
        ones = torch.ones(len(z), dtype=F64)
        return Solved(end, a.trace() * ones, kinetic, a.square().sum() / dims * ones)
    return Solved(end, ((probe @ a) * probe).sum(1), kinetic, (probe @ a).square().mean(1))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("exact", [True, False])
def test_a_linear_field_and_its_gradients_are_the_closed_form(route: str, exact: bool):
    a = (0.6 * normal(3, 3, seed="a")).requires_grad_(True)
    z = normal(4, 3, seed="z").requires_grad_(True)
    probe = None if exact else normal(4, 3, seed="v").sign()
    motion = Motion(lambda x, t: x @ a.T, probe, regularised=True)
    found = solve(motion, z, [a], FFJORDConfig(**ROUTES[route]))
    expected = linear_closed_form(a, z, probe)
    cotangents = [normal(4, 3, seed="c"), *normal(3, 4, seed="d").unbind(0)]
    results = []
    for solved in (found, expected):
        assert solved.kinetic is not None
        assert solved.jacobian is not None
        total = sum((c * part).sum() for c, part in zip(cotangents, solved, strict=True))  # type: ignore[operator]
        results.append([*solved, *torch.autograd.grad(total, (z, a), retain_graph=True)])  # type: ignore[arg-type]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("scheme", "order"), [("rk4", 4), ("dormand-prince", 5)])
def test_the_fixed_steps_converge_with_their_order(scheme: str, order: int):
    """dz/dt = -2 t z^2: z = 1 / (1 / z_0 + t^2), log |dz/dz_0| = -2 log(1 + z_0 t^2)."""
    z = torch.tensor([[0.8]], dtype=F64)
    motion = Motion(lambda x, t: -2.0 * t.unsqueeze(1) * x.square(), None, regularised=False)
    errors = []
    for steps in (16, 32) if order == 5 else (32, 64):
        found = solve(motion, z, [], FFJORDConfig(scheme=scheme, solver_steps=steps))
        errors.append([abs(found.z.item() - 0.8 / 1.8), abs(found.ladj.item() + 2.0 * math.log(1.8))])
    order_of_z, order_of_ladj = (math.log2(large / small) for large, small in zip(*errors, strict=True))
    assert order_of_z == pytest.approx(order, abs=0.2)
    assert order_of_ladj > order - 1.0  # the two parts of its error have unlike signs


def test_integrals_that_are_not_controlled_do_not_change_the_steps():
    def field(y: Tensor, t: Tensor) -> Tensor:
        wild = (40.0 * t).sin().unsqueeze(1)
        return torch.cat([-y[:, :1], wild], 1)[:, : y.shape[1]]

    start = torch.ones(1, 2, dtype=F64)
    alone, few = ode.rk45(field, start[:, :1], 0.0, 1.0, rtol=1e-4, atol=1e-4)
    both, same = ode.rk45(field, start, 0.0, 1.0, rtol=1e-4, atol=1e-4, controlled=1)
    _, many = ode.rk45(field, start, 0.0, 1.0, rtol=1e-4, atol=1e-4)
    assert few == same < many
    assert torch.equal(both[:, :1], alone)


# -- the trace --------------------------------------------------------------------------------------------------


def test_the_mean_over_all_signs_is_the_exact_trace():
    """Of every power of two probes: E v . J v = tr J and E |v . J|^2 = |J|^2, with no randomness left."""
    x = normal(5, 3).requires_grad_(True)
    w = normal(3, 3, seed="w")
    u = (x @ w).tanh() * x.sum(1, keepdim=True)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=F64)
    by_probe = ode.traces(u, x, signs.unsqueeze(1).expand(8, 5, 3))
    for estimates, exact in zip(by_probe, ode.traces(u, x), strict=True):
        torch.testing.assert_close(estimates.mean(1, keepdim=True), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_models_probes_have_the_exact_integrals_as_their_mean(probe: str):
    """4000 copies of one point, each with its own probe: 5 sigma, one false alarm in 1.7 million for each."""
    n = 4000
    x = torch.tensor([[0.4, -0.7]], dtype=F64)
    exact = model_of(trace="exact", kinetic=0.1).solved(x, None, Noise(0, "x", n=1))
    found = model_of(probe=probe, kinetic=0.1).solved(x.expand(n, 2).contiguous(), None, Noise(0, "x", n=n))
    for ours, theirs in ((found.ladj, exact.ladj), (found.jacobian, exact.jacobian)):
        assert ours is not None
        assert theirs is not None
        assert ours.std() > 1e-3
        assert abs(ours.mean() - theirs).item() < 5 * ours.std().item() / math.sqrt(n)
    torch.testing.assert_close(found.z, exact.z.expand(n, 2), rtol=1e-12, atol=1e-12)


# -- gradients of networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_the_adjoint_the_checkpoints_and_the_fine_grid_have_the_same_gradient(trace: str):
    batch = Batch(normal(6, 2))
    settings = {"trace": trace, "kinetic": 0.3, "jacobian": 0.2}
    fine = {"scheme": "dormand-prince", "solver_steps": 48}
    plain = gradients(model_of(**settings, **fine), batch)
    again = gradients(model_of(**settings, **fine, gradient="checkpoint"), batch)
    adjoint = gradients(model_of(**settings, gradient="adjoint", tolerance=1e-9), batch)
    assert max(g.abs().max().item() for g in plain[1:]) > 0.1
    for a, b, c in zip(plain, again, adjoint, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(c, a, rtol=0, atol=1e-6)


def test_the_gradient_of_the_grid_is_that_of_what_the_grid_computes():
    """One coarse step, differentiated by central differences: no error of the solver is in the gradient."""
    model = model_of(solver_steps=1, trace="exact")
    batch, weight = Batch(normal(3, 2)), model.net.net.net.output.weight  # type: ignore[union-attr]
    value_of(model.loss(batch, step_of(3))).backward()  # type: ignore[no-untyped-call]
    values = []
    for move in (1e-5, -2e-5):
        with torch.no_grad():
            weight[0, 3] += move
            values.append(value_of(model.loss(batch, step_of(3))).item())
    assert weight.grad[0, 3].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_validation_computes_the_same_loss_without_gradients(gradient: str, trace: str):
    model, batch = model_of(gradient=gradient, trace=trace, jacobian=0.1), Batch(normal(5, 2))
    training = value_of(model.loss(batch, step_of(5)))
    with model.inference():
        held_out = value_of(model.loss(batch, step_of(5)))
    assert training.requires_grad
    assert not held_out.requires_grad
    torch.testing.assert_close(held_out, training.detach(), rtol=1e-12, atol=0)
    (objective,) = model.objectives()
    assert objective.validate
    assert objective.double_backward


def test_a_flow_too_stiff_for_the_adjoint_is_an_error():
    model = model_of(gradient="adjoint", scale=300.0)
    with pytest.raises(UsageError, match=r"cannot be solved to tolerance=0\.001: give"):
        model.loss(Batch(normal(3, 2)), step_of(3))


# -- the density ------------------------------------------------------------------------------------------------


def test_the_density_of_random_weights_integrates_to_one():
    """By the midpoint rule on [-7, 7]^2, whose error is far below 1e-3 for a density as smooth as this."""
    model, n = model_of(scale=0.15), 140
    axis = (torch.arange(n, dtype=F64) + 0.5) * (14.0 / n) - 7.0
    x = torch.cartesian_prod(axis, axis)
    score = model.log_prob(x, trace="exact", batch_size=len(x))
    assert score.kind == "exact"
    assert score.method.startswith("probability flow, exact trace")
    mass = score.value.exp().sum().item() * (14.0 / n) ** 2
    assert mass == pytest.approx(1.0, abs=1e-3)
    assert (score.value - gaussian_log_prob(x, torch.zeros_like(x), 1.0)).abs().max() > 0.3


@pytest.mark.parametrize("objective", ["likelihood", "flow-matching"])
def test_the_likelihood_is_the_density_of_the_samples(objective: str):
    """log p(x(z)) = log N(z) - log |det dx/dz|, the Jacobian of the whole sampler by central differences."""
    model = model_of(objective=objective, scale=0.1)
    solver, z, h = model.solver(rtol=1e-11, atol=1e-11), normal(4, 2), 1e-4
    times = model.time_grid(solver)
    assert times[-1].item() == 0.0

    def sampled(z: Tensor) -> Tensor:
        return solvers.sample(model.denoiser(), solver, times, z, lambda: z)

    with torch.no_grad():
        x = sampled(z)
        columns = [(sampled(z + h * e) - sampled(z - h * e)) / (2 * h) for e in torch.eye(2, dtype=F64)]
    expected = gaussian_log_prob(z, torch.zeros_like(z), 1.0) - torch.stack(columns, 2).det().abs().log()
    assert (x - z).abs().max() > 0.1
    torch.testing.assert_close(model.log_prob(x, trace="exact", **TIGHT).value, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode(x), z, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=0, atol=1e-4)


def test_training_and_scoring_compute_the_same_likelihood():
    model, x = model_of(**PURE, trace="exact", scheme="dormand-prince", solver_steps=64), normal(5, 2)
    found = model.solved(x, None, Noise(0, "x", n=5))
    log_p = gaussian_log_prob(found.z, torch.zeros_like(x), 1.0) + found.ladj
    torch.testing.assert_close(model.log_prob(x, trace="exact", **TIGHT).value, log_p.detach(), rtol=0, atol=1e-6)
    loss = value_of(model.loss(Batch(x), step_of(5)))
    torch.testing.assert_close(loss, -log_p.mean() / 2, rtol=1e-12, atol=0)


def test_samplers_with_steps_converge_to_the_adaptive_one():
    model = model_of()
    exact = model.sample(6, generator=0, rtol=1e-9, atol=1e-9)
    errors = [(model.sample(6, generator=0, sampler="heun", steps=n) - exact).abs().max().item() for n in (41, 81)]
    assert errors[1] < 1e-2
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.4)


@pytest.mark.parametrize("settings", [{}, {"rtol": 1e-7, "atol": 1e-7}, {"sampler": "heun", "steps": 5}])
def test_evaluations_are_those_of_one_sample(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """rk45 finds its steps on the sample of which they are counted, heun knows them."""
    model, calls = model_of(), []
    network = model.network
    monkeypatch.setattr(model, "network", lambda *args: calls.append(1) or network(*args))
    found = model.evaluations(**settings)
    if "steps" in settings:
        model.sample(1, generator=0, **settings)
        assert len(calls) == found == 9
    else:  # 6 for each step and the first; that at t = 0, where the sample is done, is only counted
        assert len(calls) % 6 == 1
        assert len(calls) + 1 == found


# -- learning ---------------------------------------------------------------------------------------------------


def train(model: FFJORD, draw: Callable[[int], Batch], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.net.parameters(), lr=lr)
    for i in range(steps):
        batch = draw(i)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - i / steps)
        optimizer.zero_grad()
        loss = value_of(model.loss(batch, Step(Noise(0, "train", i, n=len(batch.x), block=len(batch.x)))))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.fitted = True


def fresh(spec: DataSpec, **settings: Any) -> FFJORD:
    model = FFJORD(spec, width=16, depth=1, **settings)
    model.initialize(seed=0)
    return model


def test_a_correlated_gaussian_is_learned_to_its_entropy():
    """E log q - E log p = KL(q || p) over the same 4000 points: below 0.05 nats, and so for the steps of training."""
    factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))

    def draw(i: int, n: int = 128) -> Batch:
        return Batch(torch.randn(n, 2, generator=make_generator("gaussian", i)) @ factor.T)

    model = fresh(POINTS)
    train(model, draw, steps=120, lr=2e-2)
    x = draw(-1, 4000).x
    white = torch.linalg.solve_triangular(factor, x.T, upper=False).T.double()
    true = gaussian_log_prob(white, torch.zeros_like(white), 1.0) - math.log(0.6)
    log_p = model.log_prob(x, trace="exact").value
    assert -0.01 < (true - log_p).mean().item() < 0.05
    with model.inference():
        end = model.solved(x, None, Noise(0, "x", n=4000))
    seen = gaussian_log_prob(end.z, torch.zeros_like(end.z), 1.0) + end.ladj
    assert abs((seen - log_p).mean().item()) < 0.01


def test_classes_are_told_apart():
    """Two classes of one number at -1 and 1, deviation 0.3: the right class explains x far better."""
    spec = DataSpec(kind="points", shape=(1,), condition=ConditionSpec(kind="class", names=("a", "b")))
    label = torch.arange(64) % 2
    centre = 2.0 * label.unsqueeze(1) - 1.0

    def draw(i: int) -> Batch:
        return Batch(centre + 0.3 * torch.randn(64, 1, generator=make_generator("classes", i)), label)

    model = fresh(spec, conditional=True, trace="exact")
    assert model.drop == 0.0
    train(model, draw, steps=60, lr=2e-2)
    x = draw(-1).x
    right, wrong = (model.log_prob(x, c, trace="exact").value.mean().item() for c in (label, 1 - label))
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.09)
    assert abs(right + entropy) < 0.3
    assert wrong < right - 3.0
    drawn = model.sample(200, 1, generator=0)
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.2)


def test_flow_matching_is_the_diffusion_familys_to_the_last_bit():
    settings = {"objective": "flow-matching", "sampler": "heun", **SMALL}
    ours = FFJORD(POINTS, **settings)
    theirs = Diffusion(POINTS, schedule="rectified", prediction="velocity", sampler="heun", **SMALL)
    for model in (ours, theirs):
        model.initialize(seed=3)
    theirs.schedule = FlowPath()
    x = normal(32, 2).float()
    for index in range(2):
        found = [model.loss(Batch(x), Step(Noise(1, "step", index, n=32, block=32))) for model in (ours, theirs)]
        values = [value_of(losses) for losses in found]
        assert torch.equal(*values)
        for a, b in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
            pair = [torch.autograd.grad(v, p, retain_graph=True)[0] for v, p in zip(values, (a, b), strict=True)]
            assert torch.equal(*pair)
    assert torch.equal(ours.error_sum, theirs.error_sum)
    assert [o.name for o in ours.objectives()] == ["denoising"]


# -- data with levels -------------------------------------------------------------------------------------------


def test_levels_are_dequantized_in_training_and_bounded_in_scoring():
    """All levels together have at most the mass 1 (400 draws of each: 5 sigma are below 0.02 here)."""
    spec = DataSpec(kind="points", shape=(1,), levels=3)
    model = model_of(spec, trace="exact", scale=0.1)
    x = torch.arange(3).repeat_interleave(400).unsqueeze(1)
    seen = model._training_data(Batch(x), Noise(0, "x", n=1200))
    assert len(seen.unique()) == 1200
    score = model.log_prob(x, trace="exact", generator=0)
    assert score.kind == "lower_bound"
    assert 0.85 < score.value.reshape(3, 400).mean(1).exp().sum().item() < 1.0
    assert model.log_prob(x, generator=0).kind == "estimate"


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_pictures_with_attention_have_second_derivatives(gradient: str):
    spec = DataSpec(kind="image", shape=(1, 4, 4), levels=4)
    model = FFJORD(
        spec,
        objective="likelihood",
        gradient=gradient,
        jacobian=0.01,
        width=8,
        depth=1,
        **({} if gradient == "adjoint" else {"solver_steps": 1}),
    )
    model.initialize(seed=0)
    loss = value_of(model.loss(Batch(torch.randint(4, (3, 1, 4, 4), generator=make_generator("x"))), step_of(3)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.net.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.net.parameters())
    model.fitted = True
    assert model.sample(2, generator=0, sampler="euler", steps=2).max().item() <= 3


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "schedule"),
        ({"prediction": "v"}, "prediction"),
        ({"loss": "bound"}, "loss"),
        ({"sampler": "ancestral"}, "sampler"),
        ({"drop_condition": 0.1}, "drop_condition"),
        ({"timesteps": 100}, "timesteps"),
        ({"coupling": "optimal-transport"}, "coupling has no effect on objective=likelihood"),
        ({"times": "importance"}, "times has no effect on objective=likelihood"),
        ({"objective": "flow-matching", "kinetic": 0.1}, "kinetic has no effect on objective=flow-matching"),
        ({"gradient": "adjoint", "solver_steps": 3}, "solver_steps has no effect on gradient=adjoint"),
        ({"tolerance": 1e-4}, "tolerance has no effect on gradient=backprop"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        FFJORD(POINTS, **settings)


@pytest.mark.parametrize("objective", ["likelihood", "flow-matching"])
def test_a_flow_has_neither_noise_nor_bounds_nor_guidance(objective: str):
    model, x = model_of(objective=objective, scale=0.1), normal(2, 2)
    for call, message in (
        (lambda: model.sample(1, sampler="ancestral"), "learned a flow, not its SDE"),
        (lambda: model.sample(1, sampler="dpm++"), "give rk45, heun or euler"),
        (lambda: model.sample(1, guidance=2.0), "no setting 'guidance'"),
        (lambda: model.sample(1, steps=3), "no effect on sampler=rk45"),
        (lambda: model.log_prob(x, method="bound"), "give method=ode"),
        (lambda: model.vlb(x), "give method=ode"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    with pytest.raises(CapabilityError, match="no process to be shown"):
        model.pictures([])  # type: ignore[arg-type]
    assert model.log_prob(x).method.startswith("probability flow, trace by 4 probes")
