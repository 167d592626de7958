"""The training loop: knows objectives, budgets and failures, and nothing about families.

One training step lets every objective take its turns. A turn draws a batch, sums the gradients of its shards
(over accumulation and processes), checks loss and gradient for finiteness *before* the optimiser moves, clips,
steps and calls `after_step`. A non-finite number sends the run back to the newest checkpoint once, at half the
learning rate; the second one ends it.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.core.codec import Codec
from trilemma.core.errors import BudgetError, CheckpointError, DivergedError, TrilemmaError
from trilemma.core.model import GenerativeModel, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch
from trilemma.core.storage import load_state, parse_tensors, read_manifest, save_model
from trilemma.data.dataset import Dataset
from trilemma.engine import card
from trilemma.engine.batches import BatchOrder
from trilemma.engine.checkpoint import (
    TrainState,
    folder_of,
    latest_checkpoint,
    prune,
    prune_best,
    restore_optimizers,
    save_checkpoint,
)
from trilemma.engine.config import TrainConfig
from trilemma.engine.observer import Observer, draw_preview, unpack
from trilemma.engine.progress import Reporter
from trilemma.engine.run import Run, remove_newer
from trilemma.engine.runtime import Runtime, available_cores, choose_threads


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the trainer answers it."""


class Trainer:
    """One training run, from its first step or from a checkpoint, to the end of its budget."""

    def __init__(
        self, model: GenerativeModel, data: Dataset, config: TrainConfig, run: Run, runtime: Runtime, reporter: Reporter
    ) -> None:
        self.model, self.data, self.config = model, data, config
        self.run, self.runtime, self.reporter = run, runtime, reporter
        self.state = TrainState()
        self.total_steps = config.total_steps(len(data.train))
        self.order = BatchOrder(len(data.train), config.batch_size, config.seed)
        self.caught_signal = 0
        self.stop_signal = 0
        self.logged: dict[str, float | Tensor] = {}
        self._clock = time.perf_counter()
        self._last_checkpoint, self._checkpoint_due = time.monotonic(), False
        self.observer = Observer(self)

    # -- setting up --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Build the model, fit its codec, run `prepare`, write the checkpoint of step 0."""
        self.model.initialize(self.config.seed)
        self.runtime.place(self.model)
        self.model.prepare(self.data.train, Noise(self.config.seed, "prepare", n=1, device=self.runtime.device))
        self.model.fitted = True
        self._collect_objectives()
        if not self.objectives:
            return
        per_process = self.config.batch_size // self.runtime.world
        self.state.accumulation = per_process // (self.config.micro_batch_size or per_process)
        self.state.threads = self.config.threads or self._choose_threads()
        self.ema = self._copy_parameters() if self.config.averages else None
        self._finish_setup()
        self._save()

    def restore(self) -> None:
        """Put everything as it was at the newest good checkpoint."""
        checkpoint, complaints = latest_checkpoint(self.run.checkpoints, self.runtime.rank)
        for complaint in complaints:
            self.event("checkpoint_skipped", complaint)
        if checkpoint is None:
            raise CheckpointError(f"{self.run.path} has no usable checkpoint to go on from")
        checkpoint.restore(self.model)
        self.model.zero_grad(set_to_none=True)  # what a failed step left behind
        self._collect_objectives()
        self.state = checkpoint.state
        if self.runtime.is_main:
            # Best weights from beyond this checkpoint belong to steps that will be taken again.
            remove_newer(self.run.best, self.state.step)
        self.ema = None
        if checkpoint.ema is not None:
            self.ema = {k: v.to(self.runtime.device) for k, v in checkpoint.ema.items()}
        self._finish_setup()
        restore_optimizers(self.optimizers, checkpoint.optimizer)

    def _collect_objectives(self) -> None:
        self.objectives: list[Objective] = list(self.model.objectives())
        names = [o.name for o in self.objectives]
        assert len(set(names)) == len(names), f"objectives share a name: {names}"

    def _finish_setup(self) -> None:
        self.optimizers = {o.name: o.optimizer.make(o.parameters) for o in self.objectives}
        self.turns = sum(o.turns for o in self.objectives)
        self.parameters_by_name = dict(self.model.named_parameters())
        mine = {name: {id(p) for p in o.parameters} for name, o in zip(self.optimizers, self.objectives, strict=True)}
        self._others = {
            name: [p for p in self.parameters_by_name.values() if p.requires_grad and id(p) not in ids]
            for name, ids in mine.items()
        }
        average = self.ema or {}
        self._averages: list[Tensor] = list(average.values())
        self._averaged: list[Tensor] = [self.parameters_by_name[name] for name in average]
        self.model.train()
        torch.set_num_threads(self.state.threads)
        if self.runtime.compiled and not any(o.double_backward for o in self.objectives):
            for child in self.model.children():
                if not isinstance(child, Codec):
                    child.compile()

    def _choose_threads(self) -> int:
        if self.runtime.device.type != "cpu":
            return available_cores()
        states = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        objective = self.objectives[0]
        batch = self.data.train.batch(self.order[0][: self.micro_batch_size])
        noise = Noise(self.config.seed, "threads", n=len(batch.x), block=len(batch.x))
        threads = choose_threads(lambda: unpack(objective.loss(self.conditioned(batch), Step(noise)))[0].backward())  # type: ignore[no-untyped-call]
        for parameter in self.model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(states[name])
        return threads

    @property
    def micro_batch_size(self) -> int:
        """Examples that pass through the model at once."""
        return self.config.batch_size // (self.runtime.world * self.state.accumulation)

    def conditioned(self, batch: Batch) -> Batch:
        """The batch on the device, with its condition if the model has one."""
        batch = batch.to(self.runtime.device)
        return batch if self.model.condition is not None else Batch(batch.x)

    # -- one step ----------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Fraction of the budget that is spent, in [0, 1]."""
        if self.total_steps is not None:
            return self.state.step / self.total_steps
        return min(1.0, self.state.elapsed / self.config.seconds)

    def train_step(self) -> None:
        """Every objective takes its turns, then the moving average moves."""
        progress = self.progress
        turn = 0
        for objective in self.objectives:
            for _ in range(objective.turns):
                self._turn(objective, self.state.step * self.turns + turn, progress)
                turn += 1
        self.state.step += 1
        self.tick()
        if self.ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self._averages, self._averaged, 1.0 - self.config.ema_decay(self.state.step))

    def _turn(self, objective: Objective, draw: int, progress: float) -> None:
        optimizer = self.optimizers[objective.name]
        others = self._others[objective.name]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            loss = self._gradients(objective, draw, progress)
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
        parameters = [p for p in objective.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm_value = norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NonFiniteError(f"the {what} of {objective.name!r} is not finite at step {self.state.step}")
        if self.config.clip is not None and norm_value > self.config.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        rate = objective.optimizer.lr * self.state.lr_scale * self.config.learning_rate(progress)
        objective.optimizer.set(optimizer, rate, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if objective.after_step is not None:
            objective.after_step()
        self.logged |= {f"{objective.name}/loss": loss, f"{objective.name}/grad_norm": norm_value}
        self.logged[f"{objective.name}/lr"] = rate

    def _gradients(self, objective: Objective, draw: int, progress: float) -> float:
        """Accumulate the gradient of the whole batch into `.grad`; return its loss."""
        while True:
            try:
                local, out_of_memory = self._local_gradients(objective, draw, progress), False
            except torch.OutOfMemoryError:
                local, out_of_memory = 0.0, True
            if not self.runtime.any(out_of_memory):
                break
            self._halve_micro_batch(objective)
        return self.runtime.reduce(tuple(objective.parameters), local)

    def _local_gradients(self, objective: Objective, draw: int, progress: float) -> float:
        shards = self.runtime.world * self.state.accumulation
        size = self.micro_batch_size
        first = self.runtime.rank * self.state.accumulation
        indices = self.order[draw]
        total = 0.0
        for shard in range(first, first + self.state.accumulation):
            batch = self.data.train.batch(indices[shard * size : (shard + 1) * size])
            noise = Noise(self.config.seed, "train", draw, shard, n=size, device=self.runtime.device, block=size)
            with self.runtime.precision():
                loss, logs = unpack(objective.loss(self.conditioned(batch), Step(noise, progress, self.state.step)))
            (loss / shards).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / shards
        for key, value in logs.items():
            self.logged[f"{objective.name}/{key}"] = value.detach()  # read when it is logged: reading waits for the GPU
        return total

    def _halve_micro_batch(self, objective: Objective) -> None:
        for parameter in objective.parameters:
            parameter.grad = None
        shards = 2 * self.state.accumulation * self.runtime.world
        if self.config.batch_size % shards:
            raise TrilemmaError(
                f"out of memory with {self.config.batch_size // (shards // 2)} example(s) at once, which cannot be "
                "halved: give a smaller batch_size or a smaller model"
            )
        self.state.accumulation *= 2
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        micro = self.config.batch_size // shards
        self.event("out_of_memory", f"out of memory: going on with {micro} examples at once, the same batch size")

    def tick(self) -> None:
        """Move the clock on; all processes agree on it, on whether to stop and on whether to save."""
        now = time.perf_counter()
        elapsed, self._clock = self.state.elapsed + now - self._clock, now
        due = time.monotonic() - self._last_checkpoint >= self.config.checkpoint_every
        self.state.elapsed, stop, due_anywhere = self.runtime.agree([elapsed, self.caught_signal, due])
        self.stop_signal, self._checkpoint_due = int(stop), bool(due_anywhere)

    # -- the loop ----------------------------------------------------------------------------------------------

    def loop(self) -> str:
        """Train to the end of the budget; return "finished" or "interrupted"."""
        if self.progress >= 1.0 and self.state.step == 0:
            seconds, budget = self.state.elapsed, self.config.seconds
            raise BudgetError(f"setting up took {seconds:.1f} s, all of the budget of {budget:g} s: give a longer one")
        self.observer.start()
        self._clock = time.perf_counter()
        self._last_checkpoint = time.monotonic()
        with _catch_signals(self):
            while self.progress < 1.0 and not self._stops_early:
                before = self.progress
                try:
                    self.train_step()
                except NonFiniteError as error:
                    self._roll_back(error)
                    continue
                self.observer.observe(before)
                if self.stop_signal:
                    self._save()
                    return "interrupted"
                steps = self.config.checkpoint_steps
                if self._checkpoint_due or (steps is not None and self.state.step % steps == 0):
                    self._save()
        if self._stops_early:
            self.event("early_stop", f"no better validation loss for {self.state.waited} measurements")
        self._save()
        return "finished"

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights are the result; a distance of samples only says which are worth a look."""
        return any(o.validate for o in self.objectives)

    @property
    def _stops_early(self) -> bool:
        return self.config.patience is not None and self.state.waited >= self.config.patience

    def _roll_back(self, error: NonFiniteError) -> None:
        if self.state.rollbacks:
            message = (
                f"{error}, for the second time: training diverged. Try a lower learning rate; "
                f"`trilemma info {self.model.name}` lists the settings"
            )
            self.event("diverged", message)
            raise DivergedError(message)
        lr_scale, elapsed = self.state.lr_scale * 0.5, self.state.elapsed
        failed = self.state.step
        self.restore()
        self.state.rollbacks, self.state.lr_scale, self.state.elapsed = 1, lr_scale, max(elapsed, self.state.elapsed)
        self.event("rollback", f"{error}: back to step {self.state.step}, at half the learning rate", from_step=failed)
        self._clock = time.perf_counter()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights."""
        if self.ema is None:
            yield
            return
        backup = {name: p.data for name, p in self.parameters_by_name.items()}
        for name, parameter in self.parameters_by_name.items():
            parameter.data = self.ema[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters_by_name.items():
                parameter.data = backup[name]

    def _copy_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    # -- saving ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.runtime.synchronize()
        others = self.runtime.gather_buffers(self.model)
        if self.runtime.is_main:
            save_checkpoint(self.run.checkpoints, self.model, self.state, self.ema, self.optimizers, others)
            prune(self.run.checkpoints, self.config.keep)
            prune_best(self.run.best, self.run.checkpoints, self.state.best_step)
            self.run.set_status("running", step=self.state.step, elapsed=round(self.state.elapsed, 3))
        self.runtime.barrier()
        self._last_checkpoint = time.monotonic()

    def finish(self) -> None:
        """Leave the model with its final weights and write them.

        They are the best where an objective itself was validated; else the last, averaged if there is an average.
        """
        if self.objectives:
            self.observer.conclude()
        if self.keeps_best and self.state.best_loss is not None:
            best = folder_of(self.run.best, self.state.best_step)
            _, content = read_manifest(best)
            load_state(self.model, parse_tensors(content["model.safetensors"], best), str(best))
        elif self.objectives and self.ema is not None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self.ema[name])
        self.model.eval()
        if self.runtime.is_main:
            # What an earlier attempt left when it was killed right here is written again.
            shutil.rmtree(self.run.path / "model", ignore_errors=True)
            save_model(self.model, self.run.path / "model")
            if self.config.previews:
                draw_preview(self.model, self.run, self.state.step, name="final")
            card.write_card(self.run, self.model, self.state)

    def event(self, kind: str, message: str, **details: Any) -> None:
        if self.runtime.is_main:
            self.run.event(kind, message, step=self.state.step, **details)
        self.reporter.say(message)


@contextmanager
def _catch_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and Ctrl-C stop at the next step boundary, with a checkpoint; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if trainer.caught_signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.caught_signal = number

    previous: Sequence[tuple[int, Any]] = [(s, signal.signal(s, handler)) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, old in previous:
            signal.signal(number, old)
