"""Running the jobs of a comparison: one process each, on this machine (one per GPU) or on a Ray cluster.

A job is a folder with job.json; it is done when result.json is there. So a comparison that was killed goes on with
the jobs that are not done, and a job that was killed goes on from its own run.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from trilemma.comparison.worker import Job
from trilemma.core.errors import CheckpointError, TrilemmaError
from trilemma.core.storage import replace_file, to_json
from trilemma.engine.run import read_json

PATIENCE = {"training": 1.5, "sampling": 3.0, "timing": 3.0, "scoring": 3.0}
"""How many budgets (and a minute) each stage may take before the model counts as out of budget."""

Say = Callable[[str], None]


def is_done(job: Job) -> bool:
    return (Path(job.folder) / "result.json").exists()


def prepare(job: Job) -> Path:
    """The job's folder with job.json, ready for a worker."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "job.json", job.model_dump_json(indent=2))
    (folder / "stage.json").unlink(missing_ok=True)
    return folder


def run_here(jobs: Sequence[Job], say: Say) -> None:
    """Work off all jobs that are not done: one at a time on the CPU, so that timings are not disturbed; one per GPU.

    Raises:
        TrilemmaError: a worker was stopped by a signal; the comparison can go on later.
    """
    gpus: queue.Queue[int | None] = queue.Queue()
    for gpu in range(torch.cuda.device_count()) if torch.cuda.is_available() else [None]:
        gpus.put(gpu)
    stop = threading.Event()

    def work(number: int, job: Job) -> None:
        title = f"[{number}/{len(jobs)}] {Path(job.folder).name}"
        if is_done(job):
            say(f"{title}: already there{_how_to_retry(job)}")
            return
        gpu = gpus.get()
        try:
            if not stop.is_set():
                what = "measuring" if job.run else f"up to {job.budget:g} s of training"
                say(f"{title}: {what}{'' if gpu is None else f' on GPU {gpu}'}")
                started = time.monotonic()
                watch(prepare(job), job.budget, gpu, stop)
                _say_how_it_ended(title, job, time.monotonic() - started, say)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        futures = [pool.submit(work, number, job) for number, job in enumerate(jobs, start=1)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise


def _how_to_retry(job: Job) -> str:
    """For a job that failed: it is not tried again by itself, because most failures would come again."""
    result = Path(job.folder) / "result.json"
    return "" if read_json(result)["status"] == "ok" else f", failed; delete {result} to try it again"


def _say_how_it_ended(title: str, job: Job, seconds: float, say: Say) -> None:
    result = read_json(Path(job.folder) / "result.json")
    ending = "done" if result["status"] == "ok" else f"{result['status'].replace('_', ' ')}: {result['reason']}"
    say(f"{title}: {ending} ({seconds:.0f} s)")


def watch(folder: Path, budget: float, gpu: int | None, stop: threading.Event) -> None:
    """Run a worker to its end; one that overruns, or ends without a result, gets a result that says so.

    Raises:
        TrilemmaError: it was stopped by a signal.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = _visible(gpu)
    with open(folder / "worker.log", "ab") as log:
        command = [sys.executable, "-m", "trilemma.comparison.worker", str(folder / "job.json"), "--watched"]
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                overrun = _overrun(folder, budget)
                if overrun is not None:
                    result = {"status": "out_of_budget", "reason": overrun, "metrics": {}}
                    replace_file(folder / "result.json", to_json(result))
                    return
                if stop.is_set():
                    return
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
    if process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT):
        raise TrilemmaError(f"the training of {folder.name} was stopped; the same command again goes on from there")
    if not (folder / "result.json").exists():
        tail = (folder / "worker.log").read_text(errors="replace").strip().splitlines()[-1:]
        reason = f"the process ended with code {process.returncode}. {' '.join(tail)}".strip()
        replace_file(folder / "result.json", to_json({"status": "failed", "reason": reason, "metrics": {}}))


def _visible(gpu: int) -> str:
    """The name of this process's GPU number `gpu` for a child, where this process itself sees only some."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if not seen else seen.split(",")[gpu]


def _overrun(folder: Path, budget: float) -> str | None:
    try:
        stage = read_json(folder / "stage.json")
    except CheckpointError:
        return None  # not begun yet
    limit = PATIENCE[stage["stage"]] * budget + 60.0
    if time.time() - stage["since"] <= limit:
        return None
    return f"{stage['stage']} took more than {limit:.0f} s"
