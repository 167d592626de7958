"""`train` and `resume`: the two ways into the training loop."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from trilemma.core.config import validate
from trilemma.core.errors import TrilemmaError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.storage import model_from_header
from trilemma.data import load_data
from trilemma.data.dataset import Dataset
from trilemma.engine.checkpoint import TrainState, list_checkpoints
from trilemma.engine.config import TrainConfig
from trilemma.engine.progress import make_reporter
from trilemma.engine.run import Run, describe_environment, new_run_folder, read_json
from trilemma.engine.runtime import Runtime
from trilemma.engine.trainer import Trainer

ITERATIVE = {
    "batch_size",
    "micro_batch_size",
    "warmup",
    "schedule",
    "final_lr",
    "clip",
    "ema",
    "ema_half_life",
    "ema_ramp",
    "patience",
    "compile",
}
"""Settings that mean nothing without gradient steps. A budget is a limit, which a closed-form model never reaches."""


def train(
    model: GenerativeModel,
    data: Any,
    *,
    out: str | Path | None = None,
    show: bool = True,
    **settings: Any,
) -> Run:
    """Fit a model, leave a run folder, and put the trained weights into the model.

    Arguments:
        data: a `Dataset`, or anything that `load_data` takes.
        out: the run folder, new or empty; runs/MODEL-DATA by default.
        show: report progress on stderr.
        settings: of `TrainConfig`, on top of the model's own `train_defaults`.

    Raises:
        UsageError: a bad setting, data of another spec, or an existing run in `out`.
        DivergedError: the loss or gradient was not finite twice.
    """
    if not isinstance(data, Dataset):
        data = load_data(data)
    if data.spec != model.spec:
        raise UsageError(f"the model was made for {model.spec.describe()}, the data are {data.spec.describe()}")
    defaults = dict(model.train_defaults)
    if "ema" in settings or "ema_half_life" in settings:  # the user's kind of average, in the place of the model's
        defaults = {k: v for k, v in defaults.items() if not k.startswith("ema")}
    config = validate(TrainConfig, {**defaults, **settings}, "train")
    if model.is_closed_form():
        for key in settings:
            if key in ITERATIVE:
                raise UsageError(f"{model.name} learns in closed form: the setting {key!r} has no effect on it")
    runtime = Runtime.start(config)
    _check_batches(config, runtime)
    path = Path(out) if out is not None else new_run_folder(model.name, data.name)
    runtime.barrier()  # all processes have chosen the same folder before one makes it
    if runtime.is_main:
        Run.create(path, model, config, data)
    runtime.barrier()
    run = Run(path)
    reporter = make_reporter(f"{model.name} on {data.name}", show and runtime.is_main)
    trainer = Trainer(model, data, config, run, runtime, reporter)
    return _complete(trainer, fresh=True)


def resume(run: Run | str | Path, data: Any = None, *, show: bool = True) -> Run:
    """Go on with an interrupted or killed run from its newest good checkpoint; a finished run is left as it is.

    Arguments:
        data: the same data again; by default they are loaded from where they came from.

    Raises:
        UsageError: the data differ from those the run was started with, or cannot be loaded again.
        CheckpointError: the run has no usable checkpoint and cannot start over.
    """
    run = run if isinstance(run, Run) else Run(run)
    if run.status.get("state") == "finished":
        return run
    data = run.load_data() if data is None else data
    data = data if isinstance(data, Dataset) else load_data(data)
    if data.fingerprint != run.data["fingerprint"]:
        raise UsageError(f"these data are not those of {run.path}: the content hash differs")
    config = run.train_config
    runtime = Runtime.start(config)
    _check_batches(config, runtime)
    model = model_from_header(run.config, run.path)
    runtime.place(model)
    reporter = make_reporter(f"{model.name} on {data.name}", show and runtime.is_main)
    trainer = Trainer(model, data, config, run, runtime, reporter)
    # A run that was killed before its first checkpoint starts over; its folder is already made.
    return _complete(trainer, fresh=not list_checkpoints(run.checkpoints), resumed=True)


def _check_batches(config: TrainConfig, runtime: Runtime) -> None:
    size, world = config.batch_size, runtime.world
    if size % world:
        raise UsageError(f"batch_size {size} is not a multiple of the {world} processes")
    if (size // world) % (config.micro_batch_size or 1):
        raise UsageError(f"micro_batch_size {config.micro_batch_size} does not divide the {size // world} per process")


def _complete(trainer: Trainer, fresh: bool, resumed: bool = False) -> Run:
    run, runtime = trainer.run, trainer.runtime
    threads = torch.get_num_threads()
    try:
        with trainer.reporter:
            trainer.start() if fresh else trainer.restore()
            if fresh:
                trainer.tick()  # setting up is part of the budget
            if resumed:
                _note_resumption(trainer)
            state = trainer.loop() if trainer.objectives else "finished"
            if state == "finished":
                trainer.finish()
        if runtime.is_main:
            run.set_status(
                state,
                step=trainer.state.step,
                elapsed=round(trainer.state.elapsed, 3),
                parameters=sum(p.numel() for p in trainer.model.parameters()),
                best_step=trainer.state.best_step,
                best_loss=trainer.state.best_loss,
                signal=trainer.stop_signal,
            )
    except Exception as error:
        if runtime.is_main:
            _note_failure(run, trainer.state, error)
        raise
    finally:
        torch.set_num_threads(threads)
    runtime.barrier()
    return run


def _note_resumption(trainer: Trainer) -> None:
    """Say where it goes on, and what is no longer as it was: then the end need not be the same bit for bit."""
    before = read_json(trainer.run.path / "environment.json")
    now = describe_environment()
    different = sorted(k for k in ("packages", "processor", "gpu", "processes") if before.get(k) != now.get(k))
    note = f"; not as before: {', '.join(different)}" if different else ""
    trainer.event("resumed", f"resumed at step {trainer.state.step}{note}")


def _note_failure(run: Run, state: TrainState, error: Exception) -> None:
    with contextlib.suppress(TrilemmaError):  # on a full disk the error itself says so
        run.set_status("failed", step=state.step, elapsed=round(state.elapsed, 3), reason=str(error))
