"""Few-step quality of our solvers and of diffusers' schedulers on one trained network, and what the loop costs.

Targets: at 10 and 20 evaluations our best Fréchet distance on digits is no worse than diffusers' best on the same
network (same initial noise, same features); the sampling loop takes at most 2% longer than the network's forwards.

The network is the `ddpm` preset (linear chain, T = 1000, predicts eps), which both sides can drive.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import paired, record
from trilemma.core.codec import Codec
from trilemma.core.noise import make_generator
from trilemma.core.registry import create
from trilemma.data import load_data
from trilemma.diffusion import solvers
from trilemma.diffusion.grid import time_grid
from trilemma.diffusion.model import Diffusion
from trilemma.metrics.extractor import fit_extractor
from trilemma.metrics.frechet import frechet_distance

TRAIN_STEPS = 2500
SAMPLES = 1000
EVALUATIONS = (10, 20)

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "dpm++": ("dpm++", {}),
    "dpm++ sde": ("dpm++", {"stochastic": True}),
    "exponential 3": ("exponential", {"order": 3}),
    "exponential 2, corrected": ("exponential", {"order": 2, "corrector": True}),
    "exponential 3, corrected": ("exponential", {"order": 3, "corrector": True}),
}
SPACINGS = ("trailing", "leading", "karras")


def trained(folder: Path) -> tuple[Diffusion, Any]:
    """The network, trained on digits."""
    data = load_data("digits")
    model = create("ddpm", data.spec)
    model.fit(data, steps=TRAIN_STEPS, seed=0, out=folder / "run", previews=0)
    assert isinstance(model, Diffusion)
    return model, data


def our_samples(model: Diffusion, name: str, spacing: Any, clip: bool, evaluations: int, z: Tensor) -> Tensor | None:
    """y in model space, or None where the solver cannot take that many evaluations."""
    solver = solvers.make_solver(OURS[name][0], **OURS[name][1])
    steps = next((n for n in range(1, evaluations + 1) if solver.evaluations(n) >= evaluations - 1), None)
    if steps is None or solver.evaluations(steps) > evaluations:
        return None
    times = time_grid(model.schedule, steps, spacing)
    generator = make_generator("sampler")
    return solvers.sample(
        model.denoiser(clip=clip), solver, times, z, lambda: torch.randn(z.shape, generator=generator)
    )


def their_schedulers() -> dict[str, Callable[[], Any]]:
    """diffusers' schedulers for few steps, in the settings that its documentation recommends."""
    import diffusers as d

    chain = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    clip = {"clip_sample": True, "clip_sample_range": 1.0}
    found: dict[str, Callable[[], Any]] = {}
    for spacing in ("leading", "trailing"):
        space = {"timestep_spacing": spacing}
        found[f"DDPM {spacing}"] = lambda s=space: d.DDPMScheduler(**chain, **clip, **s)
        found[f"DDIM {spacing}"] = lambda s=space: d.DDIMScheduler(**chain, **clip, set_alpha_to_one=True, **s)
        for order in (2, 3):
            found[f"DPM-Solver++ {order}M {spacing}"] = lambda s=space, o=order: d.DPMSolverMultistepScheduler(
                **chain, solver_order=o, algorithm_type="dpmsolver++", lower_order_final=True, **s
            )
            found[f"UniPC {order} {spacing}"] = lambda s=space, o=order: d.UniPCMultistepScheduler(
                **chain, solver_order=o, **s
            )
            found[f"DEIS {order} {spacing}"] = lambda s=space, o=order: d.DEISMultistepScheduler(
                **chain, solver_order=o, **s
            )
        found[f"Euler {spacing}"] = lambda s=space: d.EulerDiscreteScheduler(**chain, **s)
        found[f"Euler ancestral {spacing}"] = lambda s=space: d.EulerAncestralDiscreteScheduler(**chain, **s)
    for order in (2, 3):
        found[f"DPM-Solver++ {order}M Karras"] = lambda o=order: d.DPMSolverMultistepScheduler(
            **chain, solver_order=o, use_karras_sigmas=True
        )
        found[f"DPM-Solver++ {order}M log-snr"] = lambda o=order: d.DPMSolverMultistepScheduler(
            **chain, solver_order=o, use_lu_lambdas=True
        )
    found["DPM-Solver++ 2M SDE Karras"] = lambda: d.DPMSolverMultistepScheduler(
        **chain, solver_order=2, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
    )
    return found


def their_samples(model: Diffusion, make: Callable[[], Any], evaluations: int, z: Tensor) -> Tensor:
    """y in model space by a scheduler of diffusers; its time t is our t + 1."""
    scheduler = make()
    scheduler.set_timesteps(evaluations)
    x, generator = z * scheduler.init_noise_sigma, make_generator("sampler")
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        times = (torch.as_tensor(t, dtype=torch.float64) + 1.0).expand(len(z))
        eps, _ = model.network(scaled, times, None)
        try:
            x = scheduler.step(eps, t, x, generator=generator).prev_sample
        except TypeError:  # deterministic schedulers take no generator
            x = scheduler.step(eps, t, x).prev_sample
    return x


def frechet(codec: Codec, extractor: Any, reference: Tensor, y: Tensor) -> float:
    """Fréchet distance of samples y to all digits; infinite where a scheduler diverged."""
    if not y.isfinite().all():
        return float("inf")
    return float(frechet_distance(extractor(codec.decode(y)).double(), reference))


@torch.no_grad()
def main() -> None:
    """Measure, print and record."""
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        model, data = trained(Path(folder))
        extractor = fit_extractor(data.train, data.spec, seed=0)
    model.eval()
    everything = torch.cat([split.head(10_000).x for split in (data.train, data.validation, data.test)])
    reference = extractor(everything).double()
    z = torch.randn(SAMPLES, *model.codec.shape, generator=make_generator("start"))
    results: dict[str, Any] = {"train_steps": TRAIN_STEPS, "samples": SAMPLES}
    for n in EVALUATIONS:
        ours: dict[str, float] = {}
        for name in OURS:
            for spacing, clip in itertools.product(SPACINGS, (True, False)):
                y = our_samples(model, name, spacing, clip, n, z)
                if y is not None:
                    key = f"{name}, {spacing}{'' if clip else ', not clipped'}"
                    ours[key] = frechet(model.codec, extractor, reference, y)
        theirs = {
            name: frechet(model.codec, extractor, reference, their_samples(model, make, n, z))
            for name, make in their_schedulers().items()
        }
        best = {"ours": min(ours.items(), key=lambda i: i[1]), "diffusers": min(theirs.items(), key=lambda i: i[1])}
        results[f"{n} evaluations"] = {"best": best, "ours": ours, "diffusers": theirs}
        print(n, best, file=sys.stderr)
    results["overhead"] = overhead(model, z[:64])
    record("diffusion_samplers", results)


def overhead(model: Diffusion, z: Tensor) -> dict[str, Any]:
    """Time of the sampling loop over that of the same number of bare forwards, batch 64, 20 times."""
    found = {}
    label = torch.full((len(z),), 500.0)
    for name in ("ddim", "ancestral", "dpm++", "heun"):
        solver = solvers.make_solver(name)
        times = time_grid(model.schedule, 20, "linspace")

        def loop(solver: Any = solver, times: Tensor = times) -> None:
            solvers.sample(model.denoiser(), solver, times, z, lambda: torch.randn(z.shape))

        def bare(count: int = solver.evaluations(20)) -> None:
            for _ in range(count):
                model.net(z, label)

        found[name] = paired(loop, bare, repetitions=30)
    return found


if __name__ == "__main__":
    main()
