"""`Runtime` hides the device, the precision, the threads and the processes from everything else.

Data parallelism: the global batch is cut into S = world size x accumulation *shards*; shard s draws its noise
from the key (..., s). So one process that accumulates over two shards, and two processes with one shard each,
compute the same gradient, up to the order of a sum. Gradients travel as one flat vector in a single
all-reduce after the backward pass, rather than through DistributedDataParallel's hooks: that works unchanged for
several objectives and for losses that differentiate twice, at the price of not overlapping communication with
the backward pass.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trilemma.core.errors import UsageError
from trilemma.engine.config import TrainConfig
from trilemma.nets.resample import lay_out

FLOPS_PER_THREADED_OP = 1.0e6
"""Mean floating-point operations per operator above which all cores are used; `benchmarks/threads.py` measures it."""


@dataclass(frozen=True)
class Runtime:
    """Where and how the arithmetic happens.

    Attributes:
        device: of this process.
        rank, world: this process's number and how many there are.
        autocast: whether the losses run in bfloat16 autocast.
        compiled: whether networks may be compiled.
    """

    device: torch.device
    rank: int
    world: int
    autocast: bool
    compiled: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @classmethod
    def start(cls, config: TrainConfig) -> Runtime:
        """Read torchrun's environment and pick the device: CUDA, else the CPU, unless the config says."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(_leave_group)
        return cls(
            device=device,
            rank=rank,
            world=world,
            autocast=config.precision == "bf16" or (config.precision == "auto" and cuda),
            compiled=cuda if config.compile is None else config.compile,
        )

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which losses run."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def place(self, model: nn.Module) -> None:
        """Move a model to the device; on CUDA, 4-D weights are laid out channels last."""
        model.to(self.device)
        if self.device.type == "cuda":
            lay_out(model)

    def reduce(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Sum gradients (in place) and the loss over the processes, in one all-reduce."""
        if self.world == 1:
            return loss
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        own = torch.tensor([loss], dtype=torch.float32, device=self.device)
        flat = torch.cat([g.reshape(-1).float() for g in grads] + [own])
        dist.all_reduce(flat)
        offset = 0
        for parameter in parameters:
            # In the parameter's own memory layout, which fused optimisers rely on.
            part = flat[offset : offset + parameter.numel()].view(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(part)
            offset += parameter.numel()
        return float(flat[-1])

    def agree(self, mine: Sequence[float]) -> list[float]:
        """Process 0's first number, and the largest of each further one over the processes."""
        if self.world == 1:
            return [float(x) for x in mine]
        vote = torch.tensor([mine[0] if self.is_main else -math.inf, *mine[1:]], dtype=torch.float64)
        vote = vote.to(self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return [float(x) for x in vote]

    def broadcast(self, value: float) -> float:
        """Process 0's value."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, src=0)
        return float(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def gather_buffers(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """The persistent buffers of ranks 1 .. world-1, on rank 0: state such as Markov chains differs by rank."""
        if self.world == 1:
            return []
        names = [n for n, _ in model.named_buffers() if n in model.state_dict()]
        others: list[dict[str, Tensor]] = [{} for _ in range(self.world - 1)]
        for name in names:
            buffer = model.get_buffer(name).contiguous()
            parts = [torch.empty_like(buffer) for _ in range(self.world)]
            dist.all_gather(parts, buffer)
            for target, part in zip(others, parts[1:], strict=True):
                target[name] = part
        return others if self.is_main else []

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for queued GPU work, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _leave_group() -> None:
    """End the process group while the interpreter lives.

    A thread of gloo drops its last tensors under the interpreter's lock; if that is gone by then, it aborts the process
    (pytorch/pytorch issue 190489). The pause lets go of the lock for threads that already wait for it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.2)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else the CPU.

    Apple's MPS has no float64, in which codecs and likelihoods are computed, so it is refused rather than
    chosen and then failing.

    Raises:
        UsageError: no such device here.
    """
    available = ["cpu"]
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    name = available[0] if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; here are: {', '.join(available)}") from error
    if device.type == "mps":
        raise UsageError("the device 'mps' has no float64, which likelihoods need; use cpu")
    if device.type not in available or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"the device {name!r} is not available; here are: {', '.join(available)}")
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device


class _WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators and the floating-point operations of those that multiply matrices or convolve."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def choose_threads(evaluate: Any) -> int:
    """How many CPU threads pay for the work that `evaluate()` does.

    Small operators lose more to waking threads up than they gain. The choice depends on counted work, not on a
    clock, so that the same run always gets the same number, and with it the same order of summation.
    """
    cores = available_cores()
    if cores == 1:
        return 1
    operators, flops = count_work(evaluate)
    return cores if flops > FLOPS_PER_THREADED_OP * operators else 1


def count_work(evaluate: Any) -> tuple[int, int]:
    """How many operators `evaluate()` calls, and the floating-point operations of its products and convolutions."""
    with _WorkCounter() as work:
        evaluate()
    return work.operators, work.flops


def available_cores() -> int:
    """CPU cores for this process: what it may use, no more than OMP_NUM_THREADS, shared with its torchrun siblings."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return min(cores, int(limit))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
