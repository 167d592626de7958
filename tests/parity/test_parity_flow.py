"""Solvers, paths and likelihoods in continuous time against other people's code.

k-diffusion's levels are our EDM schedule, and its last step to sigma = 0 is our last prediction of x. In torchcfm and
flow_matching noise is at t = 0 and data at t = 1: their time is our 1 - t, and their velocity ours with the other sign.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from tests.diffusion_oracles import OracleModel
from tests.parity.test_parity_diffusion import network, noise_source, normal, relative, trajectory
from trilemma.core.spec import DataSpec
from trilemma.diffusion.bound import gaussian_log_prob
from trilemma.diffusion.denoiser import NetworkDenoiser
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.ode import flow, rk45
from trilemma.diffusion.prediction import convert
from trilemma.diffusion.schedule import EDM, VP, Cosine, NoiseSchedule, Rectified, like
from trilemma.diffusion.solvers import Ancestral, DPMpp, EDMSampler, Euler, Heun, Solver
from trilemma.diffusion.training import couple

F64 = torch.float64
RECTIFIED = Rectified(t_min=0.01)


def velocity_denoiser(schedule: NoiseSchedule = RECTIFIED) -> NetworkDenoiser:
    return NetworkDenoiser(network, schedule, "velocity")


def edm_denoiser(data_std: float = 0.5) -> NetworkDenoiser:
    """The network behind EDM's preconditioning."""

    def scaled(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return network(like((t.square() + data_std**2).rsqrt(), z) * z, t)[0], None

    return NetworkDenoiser(scaled, EDM(), "edm", data_std=data_std)


# -- k-diffusion ------------------------------------------------------------------------------------------------


@pytest.fixture
def k_diffusion(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Modules of k-diffusion without its `__init__`, and with stubs for what those modules import and do not call."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("k-diffusion is not installed")
    pytest.importorskip("torchdiffeq")
    pytest.importorskip("einops")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    for parts in ("torchvision.transforms.functional", "dctorch.functional", "torchsde"):
        names = list(itertools.accumulate(parts.split("."), "{}.{}".format))
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for parent, child in itertools.pairwise(names):
            monkeypatch.setattr(sys.modules[parent], child.rpartition(".")[2], sys.modules[child], raising=False)
    yield lambda name: importlib.import_module(f"k_diffusion.{name}")
    for name in [name for name in sys.modules if name.startswith("k_diffusion.")]:
        del sys.modules[name]


def their_samples(sampler: Callable[..., Tensor], times: Tensor, z: Tensor, **settings: Any) -> Tensor:
    """z at each level, then x: (n + 1, N, *)."""
    denoiser, seen = edm_denoiser(), []
    x = sampler(
        denoiser.predict,
        z,
        torch.cat([times, torch.zeros(1, dtype=F64)]),
        callback=lambda state: seen.append(state["x"]),
        disable=True,
        **settings,
    )
    return torch.stack([*seen, x])


@pytest.mark.parametrize("n", [2, 3, 18])
@pytest.mark.parametrize(
    ("name", "solver", "draws"),
    [
        ("euler", Euler(), False),
        ("heun", Heun(), False),
        ("dpmpp_2m", DPMpp(), False),
        ("dpmpp_2m_sde", DPMpp(stochastic=True), True),
        ("euler_ancestral", Ancestral(), True),
    ],
)
def test_samplers(k_diffusion: Callable[[str], Any], name: str, solver: Solver, draws: bool, n: int) -> None:
    theirs = getattr(k_diffusion("sampling"), f"sample_{name}")
    times, z = time_grid(EDM(), n, "karras"), 80.0 * normal("edm")
    ours = trajectory(edm_denoiser(), solver, times, z, noise_source("k"))
    draw = noise_source("k")
    expected = their_samples(theirs, times, z, **({"noise_sampler": lambda *_: draw()} if draws else {}))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_churn(k_diffusion: Callable[[str], Any]) -> None:
    """Algorithm 2 of EDM. They draw at every level, used or not. (Without an S_tmax theirs goes beyond sigma_max.)"""
    sampling, n = k_diffusion("sampling"), 18
    times, z = time_grid(EDM(), n, "karras"), 80.0 * normal("edm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = their_samples(
            sampling.sample_heun, times, z, s_churn=0.3 * n, s_tmin=0.05, s_tmax=50.0, s_noise=1.003
        )
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(z.shape, generator=generator, dtype=F64) for _ in range(n)]
    solver, seen = EDMSampler(churn=0.3, churn_from=0.05, churn_to=50.0, churn_noise=1.003), [z]
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        seen.append(solver.step(edm_denoiser(), seen[-1], t, s, lambda i=i: noise[i])[0])  # type: ignore[misc]
    ours = torch.stack([*seen, edm_denoiser().predict(seen[-1], times[-1])])
    # Their callback shows z after the noise. What is compared is what is carried on: z where none was added, and x.
    plain = torch.cat([(times < 0.05) | (times > 50.0), torch.ones(1, dtype=torch.bool)])
    assert 0 < int(plain.sum()) < n
    torch.testing.assert_close(ours[plain], expected[plain], rtol=1e-10, atol=1e-10)


def test_grids(k_diffusion: Callable[[str], Any]) -> None:
    """Theirs are float32, and the VP's are roots of e^u - 1 at small u."""
    sampling = k_diffusion("sampling")
    for spacing, name in (("karras", "get_sigmas_karras"), ("log-snr", "get_sigmas_exponential")):
        expected = getattr(sampling, name)(12, 0.002, 80.0)[:-1].double()
        torch.testing.assert_close(time_grid(EDM(), 12, spacing), expected, rtol=1e-5, atol=0)  # type: ignore[arg-type]
    vp = VP(t_min=1e-3)
    ours = (-0.5 * vp.log_snr(time_grid(vp, 12, "linspace"))).exp()
    torch.testing.assert_close(ours, sampling.get_sigmas_vp(12)[:-1].double(), rtol=5e-4, atol=0)


@pytest.mark.parametrize("data_std", [0.5, 1.3])
def test_preconditioning(k_diffusion: Callable[[str], Any], data_std: float) -> None:
    """The denoiser, and its loss: the plain error of F."""
    theirs = k_diffusion("layers").Denoiser(lambda z, t: network(z, t)[0], sigma_data=data_std)
    sigma, eps, x = torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0], dtype=F64), normal("eps"), normal("x")
    z, denoiser = x + like(sigma, x) * eps, edm_denoiser(data_std)
    torch.testing.assert_close(denoiser.predict(z, sigma), theirs(z, sigma), rtol=1e-11, atol=1e-11)
    target = convert(x, "x0", "edm", z, sigma, denoiser.schedule, data_std)
    loss = (denoiser.network(z, sigma)[0] - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, theirs.loss(x, eps, sigma), rtol=1e-9, atol=0)


def test_likelihood_of_k_diffusion(k_diffusion: Callable[[str], Any]) -> None:
    x, denoiser = normal("x"), edm_denoiser()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected, _ = k_diffusion("sampling").log_likelihood(denoiser.predict, x, 0.01, 80.0, atol=1e-9, rtol=1e-9)
        torch.manual_seed(1)
        signs = torch.randint_like(x, 2) * 2 - 1
    moved = flow(denoiser, x, 0.01, 80.0, rtol=1e-10, atol=1e-10, probes=signs.unsqueeze(0))
    ours = gaussian_log_prob(moved.z, torch.zeros_like(x), 80.0**2) + moved.divergence[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=0)


# -- paths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchcfm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torchcfm with a linear programme in the place of the transport library that it calls."""
    if importlib.util.find_spec("torchcfm") is None:
        pytest.skip("torchcfm is not installed")

    def emd(a: np.ndarray, b: np.ndarray, cost: np.ndarray, **_: object) -> np.ndarray:
        rows, columns = np.kron(np.eye(len(a)), np.ones(len(b))), np.kron(np.ones(len(a)), np.eye(len(b)))
        found = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b]))
        plan: np.ndarray = found.x.reshape(cost.shape)
        return plan

    transport = ModuleType("ot")
    transport.__dict__.update(emd=emd, unif=lambda n: np.full(n, 1.0 / n))
    monkeypatch.setitem(sys.modules, "ot", transport)
    yield importlib.import_module("torchcfm")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcfm"]:
        del sys.modules[name]


TIMES = torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999], dtype=F64)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("ConditionalFlowMatcher", Rectified()),
        ("TargetConditionalFlowMatcher", Rectified()),
        ("VariancePreservingConditionalFlowMatcher", Cosine()),
    ],
)
def test_paths_of_torchcfm(torchcfm: Any, name: str, schedule: NoiseSchedule) -> None:
    theirs = getattr(torchcfm, name)(sigma=0.0)
    x, eps = normal("x"), normal("eps")
    z = theirs.sample_xt(eps, x, 1.0 - TIMES, eps)
    target = theirs.compute_conditional_flow(eps, x, 1.0 - TIMES, z)
    ours = like(schedule.alpha(TIMES), x) * x + like(schedule.sigma(TIMES), x) * eps
    torch.testing.assert_close(ours, z, rtol=1e-12, atol=1e-12)
    velocity = convert(x, "x0", "velocity", z, TIMES, schedule)
    torch.testing.assert_close(velocity, -target, rtol=1e-10, atol=1e-10)


def test_minibatch_optimal_transport(torchcfm: Any) -> None:
    """The same pairs as the plan of the exact matcher, which draws them with replacement."""
    x, eps = normal("ot x", shape=(24, 3, 4)), normal("ot eps", shape=(24, 3, 4))
    sampler = torchcfm.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0).ot_sampler
    plan = 24 * sampler.get_map(eps, x)
    paired = couple(x, eps)
    cost = torch.cdist(eps.flatten(1), x.flatten(1)).square().numpy()
    assert float((x - paired).square().sum()) == pytest.approx((plan * cost).sum(), rel=1e-9)
    torch.testing.assert_close(paired, eps[torch.from_numpy(plan.argmax(0))], rtol=0, atol=0)
    assert not torch.equal(paired, eps)


@pytest.mark.parametrize(
    ("name", "schedule"), [("CondOTScheduler", Rectified()), ("CosineScheduler", Cosine()), ("VPScheduler", VP())]
)
def test_paths_of_flow_matching(name: str, schedule: NoiseSchedule) -> None:
    """Path, target, and what a velocity says of x and eps."""
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    path = pytest.importorskip("flow_matching.path").AffineProbPath(getattr(schedulers, name)())
    x, eps = normal("x"), normal("eps")
    sample = path.sample(x_0=eps, x_1=x, t=1.0 - TIMES)
    z = like(schedule.alpha(TIMES), x) * x + like(schedule.sigma(TIMES), x) * eps
    torch.testing.assert_close(z, sample.x_t, rtol=1e-9, atol=1e-9)
    velocity = convert(x, "x0", "velocity", z, TIMES, schedule)
    torch.testing.assert_close(velocity, -sample.dx_t, rtol=1e-8, atol=1e-8)
    value, t = normal("F"), like(1.0 - TIMES, x)
    for target, method in (("x0", path.velocity_to_target), ("eps", path.velocity_to_epsilon)):
        ours = convert(-value, "velocity", target, z, TIMES, schedule)  # type: ignore[arg-type]
        assert relative(ours, method(value, z, t)) < 1e-8


# -- flows ------------------------------------------------------------------------------------------------------


def their_velocity(x: Tensor, t: Tensor) -> Tensor:
    """The toy's velocity in their time, which runs from 0 at t_max to 1 at t_min."""
    first, last = RECTIFIED.t_min, RECTIFIED.t_max
    return (first - last) * network(x, (last + t * (first - last)).expand(len(x)))[0]


@pytest.mark.parametrize(("method", "solver"), [("euler", Euler()), ("heun2", Heun())])
def test_solvers_of_flow_matching(method: str, solver: Solver) -> None:
    theirs = pytest.importorskip("flow_matching.solver").ODESolver(their_velocity)
    places = torch.linspace(0.0, 1.0, 9, dtype=F64)
    times = time_grid(RECTIFIED, 9, "linspace")
    ours = trajectory(velocity_denoiser(), solver, times, normal("z"), noise_source("none"))[:-1]
    expected = theirs.sample(normal("z"), step_size=None, method=method, time_grid=places, return_intermediates=True)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("method", "step"), [("dopri5", None), ("midpoint", 1e-3)])
def test_adaptive_flow(method: str, step: float | None) -> None:
    """Dormand-Prince at small tolerances, and the midpoint rule with 1000 steps, whose own error is 1e-7."""
    theirs = pytest.importorskip("flow_matching.solver").ODESolver(their_velocity)
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    expected = theirs.sample(normal("z"), step_size=step, method=method, time_grid=ends, atol=1e-11, rtol=1e-11)
    ours = flow(velocity_denoiser(), normal("z"), 1.0, RECTIFIED.t_min, rtol=1e-11, atol=1e-11).z
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 if step is None else 1e-6)


def log_standard_normal(x: Tensor) -> Tensor:
    return gaussian_log_prob(x, torch.zeros_like(x), 1.0)


@pytest.fixture
def float64() -> Iterator[None]:
    """flow_matching's signs are of the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("exact", [True, False])
def test_likelihood_of_flow_matching(exact: bool) -> None:
    """Exact divergences, and Hutchinson's with the same signs."""
    theirs = pytest.importorskip("flow_matching.solver").ODESolver(their_velocity)
    x = normal("x", shape=(5, 12))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        ends = torch.tensor([1.0, 0.0], dtype=F64)
        code, expected = theirs.compute_likelihood(
            x, log_standard_normal, None, "dopri5", 1e-10, 1e-10, ends, exact_divergence=exact
        )
        torch.manual_seed(2)
        signs = (torch.randn_like(x) < 0) * 2.0 - 1.0
    probes = None if exact else signs.unsqueeze(0)
    moved = flow(velocity_denoiser(), x, 0.01, 1.0, rtol=1e-10, atol=1e-10, probes=probes, exact=exact)
    torch.testing.assert_close(moved.z, code, rtol=0, atol=1e-8)
    ours = log_standard_normal(moved.z) + moved.divergence[:, 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


def test_likelihood_of_a_model() -> None:
    """The public one, at the model's own t_min = 0.001: that of alpha x, with the volume of the factor alpha."""
    theirs = pytest.importorskip("flow_matching.solver")
    x, first = normal("x", shape=(5, 12)), 1e-3
    spec = DataSpec(kind="points", shape=(12,))
    model = OracleModel(spec, velocity_denoiser, schedule="rectified", prediction="velocity")

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (first - 1.0) * network(x, (1.0 + t * (first - 1.0)).expand(len(x)))[0]

    ends = torch.tensor([1.0, 0.0], dtype=F64)
    _, expected = theirs.ODESolver(velocity).compute_likelihood(
        (1.0 - first) * x, log_standard_normal, None, "dopri5", 1e-9, 1e-9, ends, exact_divergence=True
    )
    score = model.log_prob(x, method="ode", trace="exact", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score.value, expected + 12 * math.log(1.0 - first), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0.0, 4.0), (4.0, 0.0)])
def test_rk45_is_torchdiffeqs(start: float, end: float) -> None:
    """Prey and predators, forwards and backwards in time."""
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def field(y: Tensor, t: Tensor | float) -> Tensor:
        prey, hunters = y.unbind(-1)
        return torch.stack([1.5 * prey - prey * hunters, prey * hunters - (1.0 + 0.1 * t) * hunters], -1)

    y = torch.tensor([[1.0, 1.0], [0.5, 2.0], [3.0, 0.2]], dtype=F64)
    ours, _ = rk45(field, y, start, end, rtol=1e-11, atol=1e-11)
    ends = torch.tensor([start, end], dtype=F64)
    expected = torchdiffeq.odeint(lambda t, y: field(y, t), y, ends, rtol=1e-12, atol=1e-12, method="dopri5")[-1]
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)
