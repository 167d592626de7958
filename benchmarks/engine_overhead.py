"""Training through the engine against a hand-written loop of the same model: same batches, noise, clipping, average.

Target: at most 3% over the hand-written loop.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import paired, record
from trilemma.core.model import Step
from trilemma.core.noise import Noise
from trilemma.core.registry import create
from trilemma.core.spec import Batch
from trilemma.data import load_data
from trilemma.engine.batches import BatchOrder
from trilemma.engine.config import TrainConfig
from trilemma.engine.progress import Silent
from trilemma.engine.run import Run
from trilemma.engine.runtime import Runtime
from trilemma.engine.trainer import Trainer

STEPS = 20
REPETITIONS = 40
MODELS = ("vae", "nsf", "ddpm")


class HandWritten:
    """What one would write for one model: the least that trains it the same way."""

    def __init__(self, name: str, data: Any, config: TrainConfig, device: torch.device) -> None:
        self.data, self.config, self.device = data, config, device
        self.model = create(name, data.spec)
        self.model.initialize(0)
        self.model.to(device)
        self.model.prepare(data.train, Noise(0, "prepare", n=1, device=device))
        (objective,) = self.model.objectives()
        self.loss, settings = objective.loss, objective.optimizer
        self.parameters = list(self.model.parameters())
        kind = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
        extra = {"weight_decay": settings.weight_decay} if settings.weight_decay else {}
        self.optimizer = kind(self.parameters, lr=settings.lr, betas=settings.betas, fused=True, **extra)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.order = BatchOrder(len(data.train), config.batch_size, 0)
        self.step = 0

    def run(self) -> None:
        size = self.config.batch_size
        for _ in range(STEPS):
            x = self.data.train.batch(self.order[self.step]).x.to(self.device)
            noise = Noise(0, self.step, n=size, block=size, device=self.device)
            losses = self.loss(Batch(x), Step(noise))
            loss = losses[0] if isinstance(losses, tuple) else losses
            loss.backward()
            if self.config.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.config.ema is not None:
                with torch.no_grad():
                    torch._foreach_lerp_(self.ema, self.parameters, 1.0 - self.config.ema)
            self.step += 1


def measure(name: str, folder: Path) -> dict[str, Any]:
    data = load_data("digits")
    model = create(name, data.spec)
    config = TrainConfig.model_validate({**model.train_defaults, "steps": 10**9, "precision": "fp32", "compile": False})
    runtime = Runtime.start(config)
    trainer = Trainer(model, data, config, Run.create(folder / name, model, config, data), runtime, Silent())
    trainer.start()
    hand = HandWritten(name, data, config, runtime.device)

    def through_the_engine() -> None:
        for _ in range(STEPS):
            before = trainer.progress
            trainer.train_step()
            trainer.observer.observe(before)
        runtime.synchronize()

    def by_hand() -> None:
        hand.run()
        runtime.synchronize()

    result = paired(through_the_engine, by_hand, REPETITIONS)
    return {"device": str(runtime.device), "threads": torch.get_num_threads(), "steps": STEPS, **result}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record("engine_overhead", {name: measure(name, Path(folder)) for name in MODELS})


if __name__ == "__main__":
    main()
