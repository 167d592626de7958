"""How fast a model samples: samples per second at its best batch size, and the time for a single one."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from trilemma.core.model import GenerativeModel
from trilemma.metrics.catalogue import plain
from trilemma.metrics.estimate import Estimate

REPETITIONS = 10
BATCHES = (64, 512, 2048)
"""Batch sizes tried for the sampling speed."""
PATIENCE = 1.5
"""Seconds of a trial after which no larger batch size is tried."""


def measure_speed(model: GenerativeModel, condition: Tensor | None) -> dict[str, Estimate]:
    """ "samples_per_second", "latency" and "evaluations" with the sampler's own settings.

    Arguments:
        condition: of a conditional model, to be taken in turn, or None.
    """
    found = measure_latency(model, condition)
    best, trial = 1, found["latency"].value
    for batch in BATCHES:
        seconds = _seconds(model, batch, condition, {})
        if seconds / batch < trial / best:
            best, trial = batch, seconds
        if seconds > PATIENCE:
            break
    times = [_seconds(model, best, condition, {}) for _ in range(REPETITIONS)]
    rates = [best / t for t in times]
    method = f"median of {REPETITIONS} after a warm-up, batch size {best}, {model.device.type}"
    return {"samples_per_second": _median("samples_per_second", rates, method)} | found


def measure_latency(model: GenerativeModel, condition: Tensor | None, **settings: Any) -> dict[str, Estimate]:
    """ "latency" and "evaluations" under some sampler settings."""
    _seconds(model, 1, condition, settings)
    times = [_seconds(model, 1, condition, settings) for _ in range(REPETITIONS)]
    method = f"median of {REPETITIONS} after a warm-up, batch size 1, {model.device.type}"
    evaluations = plain("evaluations", model.evaluations(**settings), "count", kind="exact")
    return {"latency": _median("latency", times, method), "evaluations": evaluations}


def _median(name: str, values: list[float], method: str) -> Estimate:
    low, _, high = statistics.quantiles(values, n=4)
    return plain(name, statistics.median(values), method, quartiles=(low, high))


def _seconds(model: GenerativeModel, batch: int, condition: Tensor | None, settings: dict[str, Any]) -> float:
    """Wall-clock time until the samples are in the computer's memory."""
    c = None if condition is None else condition[torch.arange(batch) % len(condition)]
    _wait(model.device)
    start = time.perf_counter()
    model.sample(batch, c, generator=0, batch_size=batch, **settings).cpu()
    _wait(model.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
