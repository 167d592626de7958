"""Running the jobs of a comparison on a Ray cluster (extra `ray`).

Data and extractor travel as the bytes of their files, so the machines need no common disk; what a job leaves
(samples, the run, its result) comes back the same way. A job that a lost machine took with it runs again.
"""

from __future__ import annotations

import importlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trilemma.comparison.jobs import Say, is_done, prepare, watch
from trilemma.comparison.worker import Job
from trilemma.core.errors import MissingExtraError, TrilemmaError
from trilemma.core.storage import write_bytes
from trilemma.engine.run import read_json

Files = dict[str, bytes]
"""A folder's content by relative path."""


def run_on_cluster(jobs: Sequence[Job], data: Path, address: str, say: Say) -> None:
    """Work off all jobs that are not done, as many at once as the cluster has CPUs (or GPUs, where it has any).

    Arguments:
        data: folder of the saved data set.
        address: of the cluster ("auto", "ray://host:port", "host:port"), or "local" to start one here.

    Raises:
        MissingExtraError: Ray is not installed.
        TrilemmaError: there is no cluster at the address.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError("--cluster needs Ray: pip install 'trilemma[ray]'") from error
    waiting = [job for job in jobs if not is_done(job)]
    if not waiting:
        return
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrilemmaError(f"there is no Ray cluster at {address!r}: {error}") from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=2)(work_remotely)
        shared = ray.put({"data": read_folder(data), "extractor": read_folder(Path(waiting[0].extractor))})
        running = {}
        for job in waiting:
            prepare(job)
            running[remote.remote(job.model_dump(), shared)] = job
        say(f"{len(running)} jobs on a cluster with {ray.cluster_resources().get('CPU', 0):.0f} CPUs, {gpus:.0f} GPUs")
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            write_folder(Path(job.folder), ray.get(done))
            status = read_json(Path(job.folder) / "result.json")["status"]
            say(f"{Path(job.folder).name}: {'done' if status == 'ok' else status.replace('_', ' ')}")
    except ray.exceptions.RayError as error:
        raise TrilemmaError(f"the cluster failed; the same command again goes on: {error}") from error
    finally:
        ray.shutdown()


def work_remotely(job: Mapping[str, Any], shared: Mapping[str, Files]) -> Files:
    """Do one job in a temporary folder of the machine that this runs on, and return what it leaves."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part, files in shared.items():
            write_folder(root / part, files)
        folder = root / Path(job["folder"]).name
        here = {"folder": str(folder), "extractor": str(root / "extractor"), "data": {"source": str(root / "data")}}
        local = Job.model_validate({**job, **here, "origin": job["data"]})
        watch(prepare(local), local.budget, None, threading.Event())
        return {
            path: content for path, content in read_folder(folder).items() if path not in ("job.json", "stage.json")
        }


def read_folder(folder: Path) -> Files:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_folder(folder: Path, files: Files) -> None:
    """Write files below a folder; `result.json`, which says that the job is done, last.

    Raises:
        TrilemmaError: a path leads out of the folder.
    """
    root = folder.resolve()
    for name in sorted(files, key=lambda path: path == "result.json"):
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise TrilemmaError(f"a job returned the path {name!r}, which leads out of its folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, files[name])
