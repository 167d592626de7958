"""Kill it at any moment: every death is real (SIGKILL, SIGTERM, a file-size limit) and in a process of its own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toy_models import Gaussian, gaussian_points
from trilemma.check import same_state
from trilemma.core.registry import entries
from trilemma.data import save_dataset
from trilemma.engine import Run, load, train
from trilemma.engine.checkpoint import list_checkpoints, read_checkpoint

GRADIENT_MODELS = sorted(
    {e.model: n for n, e in entries().items() if not e.model.is_closed_form() and e.family != "toy"}.values()
)
"""One name of each class; that every name resumes is a check of `check_model`."""
COMMON = ["train.previews=0", "train.checkpoint_steps=10", "train.keep=10", "train.batch_size=32"]


def start(where: str, at: int, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.crash", where, str(at), *map(str, arguments)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def crash(where: str, at: int, *arguments: str | Path) -> tuple[int, str]:
    process = start(where, at, *arguments)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def resume(run: Path) -> None:
    """`trilemma resume RUN` in a new process."""
    code, err = crash("never", 0, "resume", run)
    assert code == 0, err


def assert_same_end(a: Path, b: Path, step: int = 20) -> None:
    ours, theirs = (read_checkpoint(p / "checkpoints" / f"step-{step:08d}") for p in (a, b))
    for part in ("model", "optimizer", "ema"):
        x, y = getattr(ours, part) or {}, getattr(theirs, part) or {}
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].numpy().tobytes() == y[name].numpy().tobytes(), f"{part} {name} differs"
    assert same_state(load(a), load(b))


@pytest.mark.parametrize("model", GRADIENT_MODELS)
def test_twenty_steps_equal_ten_and_a_kill_and_ten_more(model: str, tmp_path: Path) -> None:
    """Bit for bit: weights, optimiser, moving average, buffers, data order."""
    arguments = ["train", model, "digits", *COMMON, "--steps", "20"]
    code, err = crash("never", 0, *arguments, "--out", tmp_path / "whole")
    assert code == 0, err
    code, _ = crash("step", 13, *arguments, "--out", tmp_path / "killed")
    assert code == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-00000000", "step-00000010"]
    resume(tmp_path / "killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_kill_in_the_middle_of_writing_a_checkpoint(tmp_path: Path) -> None:
    arguments = ["train", "vae", "digits", *COMMON, "--steps", "20"]
    code, err = crash("never", 0, *arguments, "--out", tmp_path / "whole")
    assert code == 0, err
    code, _ = crash("write", 10, *arguments, "--out", tmp_path / "killed")
    assert code == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-00000000"]
    assert list((tmp_path / "killed" / "checkpoints").glob(".*.tmp")), "the torn write left no trace: was it torn?"
    resume(tmp_path / "killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*.tmp"))


def test_sigterm_saves_at_the_next_step(tmp_path: Path) -> None:
    arguments = ["train", "vae", "digits", *COMMON, "--steps", "20"]
    code, err = crash("term", 7, *arguments, "--out", tmp_path / "run")
    assert code == 128 + signal.SIGTERM
    assert "saved at step 8; go on with: trilemma resume" in err
    assert Run(tmp_path / "run").status["state"] == "interrupted"
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000008"
    resume(tmp_path / "run")
    code, err = crash("never", 0, *arguments, "--out", tmp_path / "whole")
    assert code == 0, err
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    resumed = [e["message"] for e in Run(tmp_path / "run").events() if e["event"] == "resumed"]
    assert resumed == ["resumed at step 8"]


def test_a_kill_after_the_model_is_written_but_before_the_run_is_finished(tmp_path: Path) -> None:
    data = gaussian_points()
    save_dataset(data, tmp_path / "data")
    arguments = ["train", "gmm", tmp_path / "data", "--out", tmp_path / "run"]
    code, _ = crash("finish", 0, *arguments)
    assert code == -signal.SIGKILL
    assert (tmp_path / "run" / "model" / "manifest.json").exists()
    assert Run(tmp_path / "run").status.get("state") != "finished"
    resume(tmp_path / "run")
    assert Run(tmp_path / "run").status["state"] == "finished"


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: the write of a large file fails in the middle."""
    arguments = ["train", "vae", "digits", *COMMON, "--steps", "20", "--out", tmp_path / "run"]
    code, err = crash("limit", 4096, *arguments)
    assert code == 1
    assert "cannot write" in err
    assert "file-size limit" in err
    assert "Traceback" not in err
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000000"]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000000").state.step == 0
    resume(tmp_path / "run")
    assert Run(tmp_path / "run").status["state"] == "finished"


def test_random_kills_always_leave_a_loadable_run(tmp_path: Path) -> None:
    """Twenty SIGKILLs at random moments, in a run that writes checkpoints all the time.

    The child is forked from a warm process, so that the kills fall into training and not into imports.
    """
    data = gaussian_points()
    save_dataset(data, tmp_path / "data")
    warm = Gaussian(data.spec, name="toy-gaussian")
    train(warm, data, out=tmp_path / "warm", show=False, steps=2, threads=1, previews=0)
    moments = random.Random(0)
    run = tmp_path / "run"
    steps_seen = []
    for attempt in range(20):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if (run / "config.yaml").exists():
                    Run(run).resume(data, show=False)
                else:
                    shutil.rmtree(run, ignore_errors=True)
                    model = Gaussian(data.spec, name="toy-gaussian")
                    train(model, data, out=run, show=False, steps=10**6, checkpoint_steps=3, threads=1, previews=0)
                code = 0
            finally:
                os._exit(code)
        time.sleep(moments.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"attempt {attempt} ended by itself: {status}"
        if (run / "checkpoints").is_dir() and list_checkpoints(run / "checkpoints"):
            assert Run(run).model().fitted
            steps_seen.append(read_checkpoint(list_checkpoints(run / "checkpoints")[-1]).state.step)
    assert len(steps_seen) >= 15
    assert steps_seen == sorted(steps_seen), "a kill lost a checkpoint"
    assert steps_seen[-1] > steps_seen[0]
