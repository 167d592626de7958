"""What is seen of a run while it trains: the log, the validation loss and the best weights, previews, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilemma.core.model import GenerativeModel, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.storage import save_model
from trilemma.data.render import write_samples
from trilemma.engine.checkpoint import folder_of
from trilemma.engine.run import Run

if TYPE_CHECKING:
    from trilemma.engine.trainer import Trainer

PREVIEW_SAMPLES = 64
VALIDATION_EXAMPLES = 2048
LOG_EVERY_SECONDS = 2.0
MEASURING = 0.1
"""Share of a time budget that may go into measuring samples while training."""
DIAGNOSIS = "diagnosis"
"""Kind of record in the log."""


class Observer:
    """Looks at a trainer after each of its steps; changes nothing but the record of its best weights."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.start()

    def start(self) -> None:
        """A session of training begins: speed and time left are counted from here."""
        self._started, self._last_log = time.monotonic(), -math.inf
        self._measured = self._last_measured = 0.0
        self._first_step, self._first_progress = self.trainer.state.step, self.trainer.progress

    def observe(self, before: float) -> None:
        """Log, validate, draw previews, after a step that began at the progress `before`."""
        t = self.trainer
        after, step = t.progress, t.state.step
        if t.config.validations and _crossed(before, after, t.config.validations) and self._affords(after):
            began = time.monotonic()
            self._validate()
            if after < 1.0:
                self._diagnose(final=False)
            self._last_measured = time.monotonic() - began
            self._measured += self._last_measured
        if t.config.previews and _crossed_doubling(before, after, t.config.previews) and t.runtime.is_main:
            with t.averaged():
                draw_preview(t.model, t.run, step)
        if t.config.snapshots and _crossed_doubling(before, after, t.config.snapshots) and t.runtime.is_main:
            self._keep_snapshot()
        now = time.monotonic()
        if now - self._last_log < LOG_EVERY_SECONDS and after < 1.0 and step > 1:
            return
        self._last_log, spent = now, max(now - self._started, 1e-9)
        rate = (step - self._first_step) * t.config.batch_size / spent
        if t.runtime.is_main:
            record = {"step": step, "kind": "train", "seconds": round(t.state.elapsed, 3)}
            t.run.log(record | {"images_per_second": round(rate, 1)} | {k: float(v) for k, v in t.logged.items()})
        losses = "  ".join(f"{k.removesuffix('/loss')} {v:.4g}" for k, v in t.logged.items() if k.endswith("/loss"))
        left = spent * (1.0 - after) / max(after - self._first_progress, 1e-9)
        left = left if t.total_steps else t.config.seconds - t.state.elapsed
        t.reporter.update(after, step, f"{losses}  {rate:.0f} images/s", left)

    def _affords(self, progress: float) -> bool:
        """Whether measuring the model's samples takes no more than its share of a time budget, but at the end."""
        t = self.trainer
        if t.total_steps is not None or progress >= 1.0 or not t.model.overrides("held_out_loss"):
            return True
        affords = self._measured + self._last_measured <= MEASURING * (time.monotonic() - self._started)
        return t.runtime.broadcast(float(affords)) > 0.0  # the clocks of processes differ

    def _keep_snapshot(self) -> None:
        """Save the (averaged) weights of this moment, to be measured later; training does not read them."""
        t = self.trainer
        path = folder_of(t.run.snapshots, t.state.step)
        if not path.exists():
            with t.averaged():
                save_model(t.model, path)
        t.run.log({"step": t.state.step, "kind": "snapshot", "seconds": round(t.state.elapsed, 3)})

    def _validate(self) -> None:
        """The loss of the objective that can be validated, with averaged weights and fixed noise."""
        t = self.trainer
        objective = next((o for o in t.objectives if o.validate), None)
        if objective is not None:
            name, found = f"{objective.name}/loss", self._validation_loss(objective)
        elif t.model.overrides("held_out_loss") and len(t.data.validation) > 1:
            name, found = "held_out_loss", self._held_out_loss()
        else:
            return
        loss, state = t.runtime.broadcast(found), t.state
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
            path = folder_of(t.run.best, state.step)
            if t.runtime.is_main and not path.exists():
                with t.averaged():
                    save_model(t.model, path)
        else:
            state.waited += 1
            if not math.isfinite(loss):
                t.event("validation_not_finite", f"the validation loss is {loss} at step {state.step}")
        if t.runtime.is_main:
            t.run.log({"step": state.step, "kind": "validation", name: loss})

    def _held_out_loss(self) -> float:
        t = self.trainer
        noise = Noise(t.config.seed, "validation", n=1, device=t.runtime.device)
        with t.averaged(), t.model.inference(), t.runtime.precision():
            return t.model.held_out_loss(t.data.validation, noise)

    def _diagnose(self, final: bool) -> None:
        """Log what the model measures of itself; all processes do the same."""
        t = self.trainer
        if not t.model.overrides("diagnose"):
            return
        noise = Noise(t.config.seed, "diagnosis", n=1, device=t.runtime.device)
        with t.model.inference():
            found = t.model.diagnose(t.data.train, t.data.validation, noise, step=t.state.step, final=final)
        if t.runtime.is_main:
            t.run.log({"step": t.state.step, "kind": DIAGNOSIS, **found})

    def conclude(self) -> None:
        """Training has ended: a last diagnosis, and advice from all of them."""
        t = self.trainer
        if not t.config.validations or not t.model.overrides("diagnose"):
            return
        self._diagnose(final=True)
        if t.runtime.is_main:
            for advice in t.model.advise([r for r in t.run.metrics() if r["kind"] == DIAGNOSIS]):
                t.event("advice", advice)

    def _validation_loss(self, objective: Objective) -> float:
        t = self.trainer
        n, size = min(len(t.data.validation), VALIDATION_EXAMPLES), t.micro_batch_size
        total = 0.0
        with t.averaged(), t.model.inference(), t.runtime.precision():
            for start in range(0, n, size):
                indices = torch.arange(start, min(start + size, n))
                batch = t.conditioned(t.data.validation.batch(indices))
                noise = Noise(t.config.seed, "validation", n=len(indices), start=start, device=t.runtime.device)
                loss, _ = unpack(objective.loss(batch, Step(noise, 1.0, t.state.step)))
                total += loss.item() * len(indices) / n
        return total


def draw_preview(model: GenerativeModel, run: Run, step: int, name: str | None = None) -> None:
    """Samples at fixed noise, one file per call under samples/."""
    spec = model.spec
    n = 1000 if spec.kind == "points" else PREVIEW_SAMPLES
    condition = None
    if model.condition is not None:
        if model.condition.kind != "class":
            return  # vectors have no natural fixed choice
        condition = torch.arange(n) % model.condition.size
    x = model.sample(n, condition, generator=0)
    suffix = "csv" if spec.kind == "table" else "png"
    write_samples(x, spec, run.path / "samples" / f"{name or f'step-{step:08d}'}.{suffix}", condition)


def unpack(losses: Tensor | tuple[Tensor, Mapping[str, Tensor]]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss of an objective, and what else it logs."""
    loss, logs = losses if isinstance(losses, tuple) else (losses, {})
    assert loss.ndim == 0, f"a loss must be a scalar, got shape {tuple(loss.shape)}"
    return loss, logs


def _crossed(before: float, after: float, parts: int) -> bool:
    """Whether progress passed a multiple of 1/parts."""
    return math.floor(after * parts + 1e-9) > math.floor(before * parts + 1e-9)


def _crossed_doubling(before: float, after: float, count: int) -> bool:
    """Whether progress passed one of 1/2, 1/4, 1/8, ... (`count` of them; the end has its own preview)."""
    return any(before < 2.0**-k <= after for k in range(1, count + 1))
