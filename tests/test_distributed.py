"""Two gloo processes compute what one process computes on the joined batch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import fit
from trilemma.engine.checkpoint import list_checkpoints, read_checkpoint

OWN = ("signs", "count", "w_avg", "averaged")
"""Buffers in which each process counts its own examples."""


def torchrun(out: Path, model: str, steps: int | str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distributed", str(out), model, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", ["toy-gaussian", "toy-gan", "wgan-gp", "stylegan2-ada"])
def test_two_processes_equal_one_and_resume(model: str, tmp_path: Path) -> None:
    """Gradients (Adam's first moments) and weights agree with one process that accumulates two shards; a resumed
    two-process run ends bit for bit like an uninterrupted one."""
    torchrun(tmp_path / "two", model, 4)
    one = fit(tmp_path / "one", model, 4, micro_batch_size=8)
    for step in (0, 2, 4):
        ours, theirs = (read_checkpoint(tmp_path / n / "checkpoints" / f"step-{step:08d}") for n in ("one", "two"))
        assert ours.optimizer.keys() == theirs.optimizer.keys()
        for name, tensor in ours.optimizer.items():
            assert torch.allclose(tensor, theirs.optimizer[name], rtol=1e-5, atol=1e-7), name
        for name, tensor in ours.model.items():
            if name.endswith(OWN):
                continue
            assert torch.allclose(tensor, theirs.model[name], rtol=1e-5, atol=1e-6), name
    assert one.status["step"] == 4

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "two", cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "best", ignore_errors=True)
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    (cut / "status.json").unlink()
    torchrun(cut, model, 4)
    assert list_checkpoints(cut / "checkpoints")[-1].name == "step-00000004"
    ours, theirs = (read_checkpoint(p / "checkpoints" / "step-00000004") for p in (tmp_path / "two", cut))
    for part in ("model", "ema", "optimizer"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def test_two_processes_agree_under_a_time_budget(tmp_path: Path) -> None:
    """Learning rates follow the clock of process 0: the checksums of both processes' weights are equal."""
    torchrun(tmp_path / "run", "toy-gaussian", "6s")
    sums = [(tmp_path / f"run.rank-{rank}").read_text() for rank in range(2)]
    assert sums[0] == sums[1]
