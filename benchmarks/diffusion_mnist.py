"""Our default diffusion model and diffusers' UNet2DModel on MNIST, for the same processor time.

The peer: UNet2DModel (channels 32, 64, 128, attention in the middle), DDPMScheduler, AdamW 3e-4, batch 64, for 20
minutes of 2 cores. Target: our default for 32x32 pictures reaches its Fréchet distance in at most half of that time.

Both train on one thread and are charged processor time, 2400 s standing for 20 minutes of 2 cores: the numbers then do
not depend on what else the machine does. Features are those of a classifier fitted on the training split; 500 samples
against 500 test pictures. The peer samples with its own scheduler, its prediction clipped, in 100 steps.

    python -m benchmarks.diffusion_mnist FOLDER          FOLDER holds MNIST's four IDX files, .gz or not
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import record
from trilemma.core.noise import make_generator
from trilemma.core.registry import create
from trilemma.data import Dataset, load_data
from trilemma.metrics.evaluate import evaluate_samples
from trilemma.metrics.extractor import FeatureExtractor, fit_extractor

PEER_SECONDS, OUR_SECONDS = 2400.0, (1200.0, 2400.0)
BATCH, SAMPLES, SCORED = 64, 500, 100
METRICS = ("frechet", "clipped_density", "clipped_coverage")


def padded(folder: str) -> Dataset:
    """MNIST at 32x32 with its own test set."""

    def pair(split: Any) -> tuple[Any, Any]:
        batch = split.head(len(split))
        return F.pad(batch.x, (2, 2, 2, 2)).numpy(), batch.condition.numpy()

    data = load_data(folder)
    train, validation = pair(data.train), pair(data.validation)
    both = tuple(torch.cat([torch.from_numpy(a), torch.from_numpy(b)]) for a, b in zip(train, validation, strict=True))
    return load_data(both, test=pair(data.test))


def train_peer(data: Dataset) -> tuple[Callable[[int], Tensor], dict[str, Any]]:
    """Its sampler, and what its training cost."""
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
        )
    scheduler, generator = DDPMScheduler(num_train_timesteps=1000), make_generator("peer")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    start, steps = time.process_time(), 0
    while time.process_time() - start < PEER_SECONDS:
        x = data.train.batch(torch.randint(len(data.train), (BATCH,), generator=generator)).x.float() / 127.5 - 1.0
        eps = torch.randn(x.shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        F.mse_loss(net(scheduler.add_noise(x, eps, t), t).sample, eps).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    net.eval()

    @torch.no_grad()
    def draw(n: int) -> Tensor:
        parts = []
        for _ in range(0, n, 100):
            scheduler.set_timesteps(100)
            x = torch.randn(100, 1, 32, 32, generator=generator)
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t.expand(100)).sample, t, x, generator=generator).prev_sample
            parts.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return torch.cat(parts)[:n]

    return draw, {"steps": steps, "seconds": time.process_time() - start}


def train_ours(data: Dataset, seconds: float, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The trained model: as many steps as the processor time allows, found from the first twenty."""

    def fit(steps: int, out: Path) -> tuple[Any, float]:
        model = create("diffusion", data.spec)
        start = time.process_time()
        model.fit(data, steps=steps, batch_size=BATCH, threads=1, out=out, previews=0, validations=4, show=False)
        return model, time.process_time() - start

    _, first = fit(20, folder / "probe")
    _, second = fit(40, folder / "probe2")
    steps = round(seconds / ((second - first) / 20))
    model, used = fit(steps, folder / "run")
    return model, {"steps": steps, "seconds": used}


def measure(x: Tensor, data: Dataset, extractor: FeatureExtractor) -> dict[str, Any]:
    """The metrics of SAMPLES samples against as many test pictures, with standard errors."""
    found = evaluate_samples(x[:SAMPLES], data.test.head(SAMPLES).x, extractor)
    return {name: {"value": found[name].value, "se": found[name].se} for name in METRICS}


def main() -> None:
    """Measure, print and record."""
    if len(sys.argv) < 2 or not Path(sys.argv[-1]).is_dir():
        print("diffusion_mnist: not run; give the folder of MNIST's IDX files", file=sys.stderr)
        return
    torch.set_num_threads(1)
    data = padded(sys.argv[-1])
    extractor = fit_extractor(data.train, data.spec, seed=0)
    results: dict[str, Any] = {"real training pictures": measure(data.train.head(SAMPLES).x, data, extractor)}
    draw, cost = train_peer(data)
    results["diffusers"] = cost | measure(draw(SAMPLES), data, extractor)
    for seconds in OUR_SECONDS:
        with tempfile.TemporaryDirectory() as folder:
            model, cost = train_ours(data, seconds, Path(folder))
            results[f"diffusion, {seconds:g} s"] = cost | measure(model.sample(SAMPLES, generator=0), data, extractor)
            score = model.log_prob(data.test.head(SCORED).x).per_dim(data.spec).mean()
            results[f"diffusion, {seconds:g} s"]["bits/dim"] = {"value": float(score.value), "kind": score.kind}
    record("diffusion_mnist", results)


if __name__ == "__main__":
    main()
