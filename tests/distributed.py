"""One process of a data-parallel run, started by torchrun from test_distributed.py: trains a toy model.

Arguments: run folder, model, steps (or a time such as 1s). If the folder holds a run, it is resumed. Each process
writes the sum of its weights to RUN.rank-R.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.toy_models import Gaussian, TinyGAN, gaussian_points
from trilemma.core.registry import create
from trilemma.engine import Run, resume, train


def fit(out: Path, model: str, steps: int | str, **settings: object) -> Run:
    data = gaussian_points()
    if (out / "config.yaml").exists():
        return resume(out, data, show=False)
    own = {"toy-gaussian": Gaussian, "toy-gan": TinyGAN}
    made = own[model](data.spec, name=model) if model in own else create(model, data.spec)
    common = {"checkpoint_steps": 2, "keep": 100, "previews": 0, "threads": 1, "batch_size": 16, "ema": 0.9}
    budget = {"steps": int(steps)} if str(steps).isdigit() else {"budget": steps}
    run = train(made, data, out=out, show=False, **{**common, **budget, **settings})
    total = sum(p.double().sum().item() for p in made.parameters())
    out.with_name(f"{out.name}.rank-{os.environ.get('RANK', 0)}").write_text(repr(total))
    return run


if __name__ == "__main__":
    fit(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
