"""The training loop: knows objectives, budgets and failures, and nothing about families.

One training step lets every objective take its turns. A turn draws a batch, sums the gradients of its shards
(over accumulation and processes), checks loss and gradient for finiteness *before* the optimiser moves, clips,
steps and calls `after_step`. A non-finite number sends the run back to the newest checkpoint once, at half the
learning rate; the second one ends it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.core.codec import Codec
from trilemma.core.errors import CheckpointError, DivergedError, TrilemmaError, UsageError
from trilemma.core.model import GenerativeModel, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch
from trilemma.core.storage import load_state, parse_tensors, read_manifest, save_model
from trilemma.data.dataset import Dataset
from trilemma.data.render import write_samples
from trilemma.engine import card
from trilemma.engine.batches import BatchOrder
from trilemma.engine.checkpoint import (
    TrainState,
    latest_checkpoint,
    prune,
    restore_optimizers,
    save_checkpoint,
)
from trilemma.engine.config import TrainConfig
from trilemma.engine.progress import Reporter
from trilemma.engine.run import Run, remove_newer, remove_older
from trilemma.engine.runtime import Runtime, available_cores, choose_threads

PREVIEW_SAMPLES = 64
VALIDATION_EXAMPLES = 2048
LOG_EVERY_SECONDS = 2.0


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
        self.stop_signal = 0
        self._logged: dict[str, float] = {}
        self._last_log = self._last_checkpoint = -math.inf
        self._clock = time.perf_counter()
        self._session = (time.monotonic(), 0)
        if config.batch_size % runtime.world:
            raise UsageError(f"batch_size {config.batch_size} is not a multiple of the {runtime.world} processes")

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
        micro = self.config.micro_batch_size or per_process
        if per_process % micro:
            raise UsageError(f"micro_batch_size {micro} does not divide the {per_process} examples per process")
        self.state.accumulation = per_process // micro
        self.state.threads = self.config.threads or self._choose_threads()
        self.ema = self._parameters_copy() if self.config.ema else None
        self._finish_setup()
        self._save()

    def restore(self) -> None:
        """Put everything as it was at the newest good checkpoint."""
        checkpoint, complaints = latest_checkpoint(self.run.checkpoints, self.runtime.rank)
        for complaint in complaints:
            self.event("checkpoint_skipped", complaint)
        if checkpoint is None:
            raise CheckpointError(f"{self.run.path} has no usable checkpoint to go on from")
        if "codec" not in self.model._modules:
            self.model.initialize(self.config.seed)
            self.runtime.place(self.model)
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
        self.optimizers = {o.name: _make_optimizer(o) for o in self.objectives}
        self.turns = sum(o.turns for o in self.objectives)
        self._parameters = dict(self.model.named_parameters())
        mine = {name: {id(p) for p in o.parameters} for name, o in zip(self.optimizers, self.objectives, strict=True)}
        self._others = {
            name: [p for p in self._parameters.values() if p.requires_grad and id(p) not in ids]
            for name, ids in mine.items()
        }
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
        batch = self.data.train.batch(self.order[0][: self.config.batch_size // self.runtime.world])
        noise = Noise(self.config.seed, "threads", n=len(batch.x), block=len(batch.x))
        threads = choose_threads(lambda: _unpack(objective.loss(self._condition(batch), Step(noise)))[0].backward())  # type: ignore[no-untyped-call]
        for parameter in self.model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(states[name])
        return threads

    def _condition(self, batch: Batch) -> Batch:
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
        self._tick()
        if self.ema is not None and self.config.ema is not None:
            decay = min(self.config.ema, (1 + self.state.step) / (10 + self.state.step))
            with torch.no_grad():
                ours = [self.ema[name] for name in self._parameters]
                torch._foreach_lerp_(ours, list(self._parameters.values()), 1.0 - decay)

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
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if objective.after_step is not None:
            objective.after_step()
        self._logged |= {f"{objective.name}/loss": loss, f"{objective.name}/grad_norm": norm_value}
        self._logged[f"{objective.name}/lr"] = rate

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
        # The sum over processes also carries the stop signal and the clock of process 0, so that all agree.
        mine = torch.tensor([local, float(self.stop_signal), self.state.elapsed if self.runtime.is_main else 0.0])
        loss, stop, elapsed = self.runtime.reduce(tuple(objective.parameters), mine).tolist()
        if self.runtime.world > 1:
            self.stop_signal, self.state.elapsed = int(stop > 0) * (self.stop_signal or signal.SIGTERM), elapsed
        return float(loss)

    def _local_gradients(self, objective: Objective, draw: int, progress: float) -> float:
        shards = self.runtime.world * self.state.accumulation
        size = self.config.batch_size // shards
        first = self.runtime.rank * self.state.accumulation
        indices = self.order[draw]
        total = 0.0
        for shard in range(first, first + self.state.accumulation):
            batch = self.data.train.batch(indices[shard * size : (shard + 1) * size])
            noise = Noise(self.config.seed, "train", draw, shard, n=size, device=self.runtime.device, block=size)
            with self.runtime.precision():
                loss, logs = _unpack(objective.loss(self._condition(batch), Step(noise, progress, self.state.step)))
            (loss / shards).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / shards
        for key, value in logs.items():
            self._logged[f"{objective.name}/{key}"] = float(value.detach())
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

    def _tick(self) -> None:
        now = time.perf_counter()
        self.state.elapsed += now - self._clock
        self._clock = now

    # -- the loop ----------------------------------------------------------------------------------------------

    def loop(self) -> str:
        """Train to the end of the budget; return "finished" or "interrupted"."""
        self._clock = time.perf_counter()
        self._last_checkpoint = time.monotonic()
        self._session = (time.monotonic(), self.state.step)
        with _catch_signals(self):
            while self.progress < 1.0:
                before = self.progress
                try:
                    self.train_step()
                except NonFiniteError as error:
                    self._roll_back(error)
                    continue
                self.observe(before)
                if self.stop_signal:
                    self._save()
                    return "interrupted"
                if self._should_checkpoint():
                    self._save()
                if self.config.patience is not None and self.state.waited >= self.config.patience:
                    self.event("early_stop", f"no better validation loss for {self.state.waited} measurements")
                    break
        self._save()
        return "finished"

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

    def observe(self, before: float) -> None:
        """Log, validate, draw previews, after a step that began at the progress `before`."""
        session_start, session_step = self._session
        after, step = self.progress, self.state.step
        if self.config.validations and _crossed(before, after, self.config.validations):
            self._validate()
        if self.config.previews and _crossed_doubling(before, after, self.config.previews):
            self._preview()
        now = time.monotonic()
        if now - self._last_log >= LOG_EVERY_SECONDS or after >= 1.0 or step == 1:
            self._last_log = now
            rate = (step - session_step) * self.config.batch_size / max(now - session_start, 1e-9)
            if self.runtime.is_main:
                record = {"step": step, "kind": "train", "seconds": round(self.state.elapsed, 3)}
                self.run.log(record | {"images_per_second": round(rate, 1)} | self._logged)
            losses = "  ".join(f"{k.removesuffix('/loss')} {v:.4g}" for k, v in self._logged.items() if "/loss" in k)
            spent = now - session_start
            done = max(after - (before if step == session_step + 1 else 0.0), 1e-9)
            left = spent * (1.0 - after) / done if self.total_steps else self.config.seconds - self.state.elapsed
            self.reporter.update(after, step, f"{losses}  {rate:.0f} images/s", left)

    def _validate(self) -> None:
        """The loss of the objective that can be validated, with averaged weights and fixed noise."""
        objective = next((o for o in self.objectives if o.validate), None)
        if objective is None:
            return
        loss = self._validation_loss(objective)
        self.runtime.barrier()
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step, self.state.waited = loss, self.state.step, 0
            if self.runtime.is_main:
                path = self.run.best / f"step-{self.state.step:08d}"
                with self._averaged():
                    if not path.exists():
                        save_model(self.model, path)
                remove_older(self.run.best, path)
        else:
            self.state.waited += 1
        if self.runtime.is_main:
            self.run.log({"step": self.state.step, "kind": "validation", f"{objective.name}/loss": loss})

    def _validation_loss(self, objective: Objective) -> float:
        n = min(len(self.data.validation), VALIDATION_EXAMPLES)
        total = 0.0
        with self._averaged(), self.model.inference(), self.runtime.precision():
            for start in range(0, n, self.config.batch_size):
                indices = torch.arange(start, min(start + self.config.batch_size, n))
                batch = self._condition(self.data.validation.batch(indices))
                noise = Noise(
                    self.config.seed,
                    "validation",
                    start,
                    n=len(indices),
                    device=self.runtime.device,
                    block=len(indices),
                )
                loss, _ = _unpack(objective.loss(batch, Step(noise, 1.0, self.state.step)))
                total += loss.item() * len(indices) / n
        return total

    def _preview(self) -> None:
        if self.runtime.is_main:
            with self._averaged():
                draw_preview(self.model, self.run, self.state.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights."""
        if self.ema is None:
            yield
            return
        backup = {name: p.data for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self.ema[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = backup[name]

    def _parameters_copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    # -- saving ------------------------------------------------------------------------------------------------

    def _should_checkpoint(self) -> bool:
        steps = self.config.checkpoint_steps
        by_step = steps is not None and self.state.step % steps == 0
        by_time = time.monotonic() - self._last_checkpoint >= self.config.checkpoint_every
        # Only process 0 reads the clock: saving is collective.
        return by_step or self.runtime.any(by_time and self.runtime.is_main)

    def _save(self) -> None:
        self.runtime.synchronize()
        others = self.runtime.gather_buffers(self.model)
        if self.runtime.is_main:
            save_checkpoint(self.run.checkpoints, self.model, self.state, self.ema, self.optimizers, others)
            prune(self.run.checkpoints, self.config.keep)
            self.run.set_status("running", step=self.state.step, elapsed=round(self.state.elapsed, 3))
        self.runtime.barrier()
        self._last_checkpoint = time.monotonic()

    def finish(self) -> None:
        """Leave the model with its final weights (best, else averaged, else last) and write them."""
        best = self.run.best / f"step-{self.state.best_step:08d}"
        if self.objectives and self.state.best_loss is not None and best.exists():
            _, content = read_manifest(best)
            load_state(self.model, parse_tensors(content["model.safetensors"], best), str(best))
        elif self.objectives and self.ema is not None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self.ema[name])
        self.model.eval()
        if self.runtime.is_main:
            save_model(self.model, self.run.path / "model")
            if self.config.previews:
                draw_preview(self.model, self.run, self.state.step, name="final")
            card.write_card(self.run, self.model, self.state)

    def event(self, kind: str, message: str, **details: Any) -> None:
        if self.runtime.is_main:
            self.run.event(kind, message, step=self.state.step, **details)
        self.reporter.say(message)


def draw_preview(model: GenerativeModel, run: Run, step: int, name: str | None = None) -> None:
    """Samples at fixed noise, one file per call under samples/."""
    spec = model.spec
    n = PREVIEW_SAMPLES if spec.kind in ("image", "table") else 1000
    condition = None
    if model.condition is not None:
        if model.condition.kind != "class":
            return  # vectors have no natural fixed choice
        condition = torch.arange(n) % model.condition.size
    x = model.sample(n, condition, generator=0)
    suffix = "csv" if spec.kind == "table" else "png"
    write_samples(x, spec, run.path / "samples" / f"{name or f'step-{step:08d}'}.{suffix}", condition)


def _make_optimizer(objective: Objective) -> torch.optim.Optimizer:
    config = objective.optimizer
    parameters = list(objective.parameters)
    keywords: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if config.weight_decay:
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, **keywords)
    return torch.optim.Adam(parameters, **keywords)


def _unpack(losses: Tensor | tuple[Tensor, Mapping[str, Tensor]]) -> tuple[Tensor, Mapping[str, Tensor]]:
    loss, logs = losses if isinstance(losses, tuple) else (losses, {})
    assert loss.ndim == 0, f"a loss must be a scalar, got shape {tuple(loss.shape)}"
    return loss, logs


def _crossed(before: float, after: float, parts: int) -> bool:
    """Whether progress passed a multiple of 1/parts."""
    return math.floor(after * parts + 1e-9) > math.floor(before * parts + 1e-9)


def _crossed_doubling(before: float, after: float, count: int) -> bool:
    """Whether progress passed one of 1/2, 1/4, 1/8, ... (`count` of them; the end has its own preview)."""
    return any(before < 2.0**-k <= after for k in range(1, count + 1))


@contextmanager
def _catch_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and Ctrl-C stop at the next step boundary, with a checkpoint; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if trainer.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_signal = number

    previous: Sequence[tuple[int, Any]] = [(s, signal.signal(s, handler)) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, old in previous:
            signal.signal(number, old)
