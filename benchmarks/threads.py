"""Seconds per training step with one and with all CPU threads, beside the work per operator that decides the choice.

`trilemma.engine.runtime.FLOPS_PER_THREADED_OP` is the threshold; this shows which side each model falls on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import paired, record
from trilemma.core.registry import create
from trilemma.data import load_data
from trilemma.engine.config import TrainConfig
from trilemma.engine.progress import Silent
from trilemma.engine.run import Run
from trilemma.engine.runtime import Runtime, available_cores, count_work
from trilemma.engine.trainer import Trainer

CASES = [(m, d) for m in ("rbm", "vae", "nsf", "r3gan", "ddpm") for d in ("digits", "eight-gaussians")]
CASES += [("ddpm", "patches"), ("vae", "patches")]


def measure(name: str, source: str, folder: Path) -> dict[str, Any]:
    data = load_data(source)
    model = create(name, data.spec)
    config = TrainConfig.model_validate({**model.train_defaults, "steps": 10**9, "device": "cpu"})
    run = Run.create(folder / f"{name}-{source}", model, config, data)
    trainer = Trainer(model, data, config, run, Runtime.start(config), Silent())
    trainer.start()
    chosen = trainer.state.threads
    operators, flops = count_work(trainer.train_step)

    def steps(threads: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(10):
            trainer.train_step()

    result = paired(lambda: steps(1), lambda: steps(available_cores()), 7)
    return {
        "chosen_threads": chosen,
        "operators_per_step": operators,
        "flops_per_operator": flops / operators,
        "ms_per_step_one_thread": 100.0 * result["median_a"],
        "ms_per_step_all_threads": 100.0 * result["median_b"],
        "speedup_of_all_threads": result["ratio_a_over_b"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record("threads", {f"{m} on {d}": measure(m, d, Path(folder)) for m, d in CASES})


if __name__ == "__main__":
    main()
