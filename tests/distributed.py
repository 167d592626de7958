"""One process of a data-parallel run, started by torchrun from test_distributed.py: trains a toy model.

Arguments: run folder, model, steps. If the folder holds a run, it is resumed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from tests.toy_models import Gaussian, TinyGAN, gaussian_points
from trilemma.engine import Run, resume, train


def fit(out: Path, model: str, steps: int, **settings: object) -> Run:
    data = gaussian_points()
    if (out / "config.yaml").exists():
        return resume(out, data, show=False)
    made = {"toy-gaussian": Gaussian, "toy-gan": TinyGAN}[model](data.spec, name=model)
    common = {"checkpoint_steps": 2, "keep": 100, "previews": 0, "threads": 1, "batch_size": 16, "ema": 0.9}
    return train(made, data, out=out, show=False, steps=steps, **{**common, **settings})


if __name__ == "__main__":
    fit(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    dist.destroy_process_group()
