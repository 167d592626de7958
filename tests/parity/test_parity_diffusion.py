"""Discrete chains against diffusers: the same network, the same noise, the same trajectory.

Their timestep k is our t = k + 1. Their tables are float32, and 1 - alpha^2 near k = 0 has lost three digits: the steps
are compared to 1e-9 with the tables in float64 in their place, and as they are with the loss stated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.core.noise import make_generator
from trilemma.diffusion.denoiser import Clipped, Denoiser, Estimate, NetworkDenoiser, Variance
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.guidance import Guided
from trilemma.diffusion.prediction import Prediction, convert
from trilemma.diffusion.schedule import (
    EDM,
    Discrete,
    NoiseSchedule,
    Spacing,
    cosine_betas,
    linear_betas,
    zero_terminal_snr,
)
from trilemma.diffusion.solvers import DDIM, Ancestral, DPMpp, History, Normal, Solver

F64 = torch.float64
SHAPE = (5, 3, 4)
NAMES: dict[Prediction, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES: dict[Variance, str] = {"small": "fixed_small", "large": "fixed_large", "learned-range": "learned_range"}
BETAS = {"linear": linear_betas(100), "cosine": cosine_betas(100), "zero": zero_terminal_snr(linear_betas(100))}


def normal(*key: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=make_generator("parity diffusion", *key), dtype=F64)


def network(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A fixed smooth network with two outputs (N, 3, 4), float64."""
    hidden = (z.flatten(1) @ normal("in", shape=(12, 16)) / 4.0 + (t / (1.0 + t)).reshape(-1, 1)).tanh()
    first, second = (hidden @ normal("out", shape=(16, 24)) / 4.0).chunk(2, 1)
    return first.view_as(z), second.tanh().view_as(z)


def noise_source(key: str) -> Normal:
    generator = make_generator("parity diffusion", key)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=F64)


def trajectory(denoiser: Denoiser, solver: Solver, times: Tensor, z: Tensor, draw: Normal) -> Tensor:
    """z at each of the times, then x: (n + 1, N, *)."""
    seen: list[Tensor] = [z]
    past: History = ()
    for t, s in itertools.pairwise(times):
        z, past = solver.step(denoiser, z, t, s, draw, past)
        seen.append(z)
    return torch.stack([*seen, denoiser.predict(z, times[-1])])


def relative(x: Tensor, y: Tensor) -> float:
    """Largest difference, as a share of the largest value: eps of an arbitrary network is far from any data."""
    return float((x - y).abs().max() / y.abs().max())


def their_chain(kind: str, betas: Tensor, steps: int, **settings: Any) -> Any:
    """A scheduler of diffusers with float64 tables of these betas."""
    theirs = getattr(pytest.importorskip("diffusers"), kind)(num_train_timesteps=len(betas), **settings)
    theirs.betas, theirs.alphas = betas, 1.0 - betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    theirs.set_timesteps(steps)
    return theirs


def their_trajectory(
    theirs: Any, z: Tensor, output: Callable[[Tensor, Tensor], Tensor] | None = None, **settings: Any
) -> Tensor:
    """z at each of their timesteps, then the last prediction of x: (n + 1, N, *)."""
    output = output or (lambda z, t: network(z, t)[0])
    seen = []
    for k in theirs.timesteps:
        seen.append(z)
        result = theirs.step(output(z, (k + 1.0).expand(len(z)).double()), k, z, **settings)
        z = result.prev_sample
    return torch.stack([*seen, result.pred_original_sample])


# -- ancestral --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "spacing"), [(100, "leading"), (10, "leading"), (10, "trailing"), (7, "trailing")])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_ancestral_is_ddpms(
    betas: str, prediction: Prediction, variance: Variance, clip: bool, steps: int, spacing: Spacing
) -> None:
    """In steps of any length. After the last their trailing chain adds noise; ours, and Ho et al.'s, does not."""
    theirs = their_chain(
        "DDPMScheduler",
        BETAS[betas],
        steps,
        variance_type=VARIANCES[variance],
        prediction_type=NAMES[prediction],
        clip_sample=clip,
        timestep_spacing=spacing,
    )
    schedule = Discrete(BETAS[betas])
    times = time_grid(schedule, steps, spacing)
    assert times.tolist() == (theirs.timesteps + 1).tolist()
    denoiser: Denoiser = NetworkDenoiser(network, schedule, prediction, variance=variance)
    denoiser = Clipped(denoiser, -1.0, 1.0) if clip else denoiser
    ours = trajectory(denoiser, Ancestral(), times, normal("z"), noise_source("ddpm"))
    learned = variance == "learned-range"
    expected = their_trajectory(
        theirs,
        normal("z"),
        (lambda z, t: torch.cat(network(z, t), 1)) if learned else None,
        generator=make_generator("parity diffusion", "ddpm"),
    )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction", "steps", "loss"), [("v", 1000, 1e-3), ("eps", 50, 2e-5), ("x0", 50, 2e-5), ("v", 50, 2e-5)]
)
@pytest.mark.parametrize(("betas", "name"), [(linear_betas, "linear"), (cosine_betas, "squaredcos_cap_v2")])
def test_float32_tables(
    betas: Callable[[int], Tensor], name: str, prediction: Prediction, steps: int, loss: float
) -> None:
    """Their own schedules of 1000 steps: the betas to float32, the trajectory to what 1 - alpha^2 loses there.

    The loss is up to 3e-4 of the largest value with all steps, and 7e-6 with 50; with tables in float64 it is 1e-12.
    """
    diffusers = pytest.importorskip("diffusers")
    settings = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": NAMES[prediction]}
    schedule = Discrete(betas(1000))
    single = diffusers.DDPMScheduler(beta_schedule=name, **settings)
    torch.testing.assert_close(single.betas.double(), schedule.betas, rtol=1e-6, atol=0)
    single.set_timesteps(steps)
    times = time_grid(schedule, steps, "trailing")
    denoiser = NetworkDenoiser(network, schedule, prediction)
    ours = trajectory(denoiser, Ancestral(), times, normal("z"), noise_source("tables"))
    for theirs, tolerance in (
        (single, loss),
        (their_chain("DDPMScheduler", schedule.betas, steps, **settings), 1e-11),
    ):
        expected = their_trajectory(theirs, normal("z"), generator=make_generator("parity diffusion", "tables"))
        assert relative(ours, expected) < tolerance


@pytest.mark.parametrize(("total", "steps"), [(1000, 50), (1000, 30), (100, 7)])
def test_linspace_times(total: int, steps: int) -> None:
    """Even steps from T to 1, to the nearest integer. (diffusers' steps of DDIM do not end where its next begin.)"""
    times = time_grid(Discrete(linear_betas(total)), steps, "linspace")
    expected = [total - i * (total - 1) / (steps - 1) for i in range(steps)]
    assert all(abs(t - e) <= 0.5 + 1e-9 for t, e in zip(times.tolist(), expected, strict=True))
    theirs = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=total, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    assert (times - 1 - theirs.timesteps).abs().max() <= 1  # ties round to even, and ours are one later


# -- DDIM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "spacing"), [(100, "leading"), (10, "leading"), (20, "trailing")])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_ddim(betas: str, prediction: Prediction, eta: float, clip: bool, steps: int, spacing: Spacing) -> None:
    """With set_alpha_to_one, so that the last step is the prediction of x, and eps of the clipped x."""
    theirs = their_chain(
        "DDIMScheduler",
        BETAS[betas],
        steps,
        prediction_type=NAMES[prediction],
        clip_sample=clip,
        timestep_spacing=spacing,
        set_alpha_to_one=True,
    )
    schedule = Discrete(BETAS[betas])
    denoiser: Denoiser = NetworkDenoiser(network, schedule, prediction)
    denoiser = Clipped(denoiser, -1.0, 1.0) if clip else denoiser
    times = time_grid(schedule, steps, spacing)
    ours = trajectory(denoiser, DDIM(eta=eta), times, normal("z"), noise_source("ddim"))
    generator = make_generator("parity diffusion", "ddim")
    expected = their_trajectory(theirs, normal("z"), eta=eta, use_clipped_model_output=True, generator=generator)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(1000), linear_betas(50)])
def test_zero_terminal_snr(betas: Tensor) -> None:
    theirs = pytest.importorskip("diffusers.schedulers.scheduling_ddim").rescale_zero_terminal_snr(betas)
    torch.testing.assert_close(zero_terminal_snr(betas), theirs, rtol=1e-9, atol=1e-14)
    assert Discrete(theirs).ends_without_signal


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_from_zero_terminal_snr(eta: float, prediction: Prediction) -> None:
    """At eta = 1 the square root of their first step is of a rounding error below zero."""
    theirs = their_chain(
        "DDIMScheduler",
        BETAS["zero"],
        10,
        prediction_type=NAMES[prediction],
        clip_sample=False,
        timestep_spacing="trailing",
    )
    schedule = Discrete(BETAS["zero"])
    times = time_grid(schedule, 10, "trailing")
    denoiser = NetworkDenoiser(network, schedule, prediction)
    ours = trajectory(denoiser, DDIM(eta=eta), times, normal("z"), noise_source("zero"))
    expected = their_trajectory(theirs, normal("z"), eta=eta, generator=make_generator("parity diffusion", "zero"))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_ddim_of_eta_1_is_ancestral_from_zero_terminal_snr() -> None:
    schedule = Discrete(zero_terminal_snr(linear_betas(208)))
    denoiser, times = NetworkDenoiser(network, schedule, "v"), time_grid(schedule, 5, "trailing")
    found = trajectory(denoiser, DDIM(eta=1.0), times, normal("z"), noise_source("one"))
    expected = trajectory(denoiser, Ancestral(), times, normal("z"), noise_source("one"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


# -- DPM-Solver++ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("betas", "name"), [(linear_betas, "linear"), (cosine_betas, "squaredcos_cap_v2")])
def test_dpmpp(
    betas: Callable[[int], Tensor], name: str, prediction: Prediction, stochastic: bool, exact: bool
) -> None:
    """DPM-Solver++(2M), also of the SDE. They step in float32; `exact` gives them sigma / alpha in float64."""
    theirs = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(
        beta_schedule=name,
        prediction_type=NAMES[prediction],
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(20)
    schedule = Discrete(betas(1000))
    times = time_grid(schedule, 20, "trailing")
    assert times.tolist() == (theirs.timesteps + 1).tolist()
    if exact:
        theirs.sigmas = torch.cat([(-0.5 * schedule.log_snr(times)).exp(), torch.zeros(1, dtype=F64)])
    denoiser = NetworkDenoiser(network, schedule, prediction)
    ours = trajectory(denoiser, DPMpp(stochastic=stochastic), times, normal("z"), noise_source("dpm"))
    z, draw, seen = normal("z"), noise_source("dpm"), []
    for k in theirs.timesteps:
        seen.append(z)
        value = network(z, (k + 1.0).expand(len(z)).double())[0]
        z = theirs.step(value, k, z, variance_noise=draw() if stochastic else None).prev_sample
    expected = torch.stack([*seen, z])
    assert relative(ours, expected) < (1e-6 if exact else 1e-4)


# -- EDM, guidance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_std", [0.5, 1.3])
def test_edm_preconditioning(data_std: float) -> None:
    theirs = pytest.importorskip("diffusers").EDMEulerScheduler(sigma_data=data_std)
    for sigma in torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=F64):
        z, value = float(sigma) * normal("edm z"), normal("edm F")
        expected = theirs.precondition_outputs(z, value, sigma)
        ours = convert(value, "edm", "x0", z, sigma, EDM(), data_std)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(convert(expected, "x0", "edm", z, sigma, EDM(), data_std), value, rtol=0, atol=1e-9)


def test_edm_grid() -> None:
    theirs = pytest.importorskip("diffusers").EDMEulerScheduler()
    theirs.set_timesteps(18)
    ours = time_grid(EDM(), 18, "karras")
    torch.testing.assert_close(ours, theirs.sigmas[:-1].double(), rtol=1e-5, atol=0)


class Constant(Denoiser):
    """The same estimate for every z."""

    def __init__(self, schedule: NoiseSchedule, x: Tensor) -> None:
        self.schedule, self.x = schedule, x

    def estimate(self, z: Tensor, t: Tensor) -> Estimate:
        return Estimate(self.x)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_guidance(scale: float, rescale: float) -> None:
    """Their formula on our predictions of x."""
    theirs = pytest.importorskip("diffusers.guiders.guider_utils")
    good, guide = normal("good"), normal("guide")
    ours = Guided(Constant(EDM(), good), Constant(EDM(), guide), scale, rescale=rescale)
    guided = guide + scale * (good - guide)
    expected = theirs.rescale_noise_cfg(guided, good, guidance_rescale=rescale) if rescale else guided
    found = ours.predict(normal("z"), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert math.isclose(float(found[0].std()), float(good[0].std()), rel_tol=1e-12) == (rescale == 1.0)
