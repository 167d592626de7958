"""A training process that dies on purpose: `python -m tests.crash WHERE STEP train ARGS...`, run by test_crashes.py.

WHERE: "step" kills itself with SIGKILL after STEP finished steps; "write" in the middle of writing the checkpoint of
STEP; "finish" when the final model is written but the run is not yet finished; "term" sends itself SIGTERM after STEP
steps; "limit" lets no file grow beyond STEP bytes once training has begun.
The rest is a command line of Trilemma.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

from trilemma.engine import card, checkpoint
from trilemma.engine.trainer import Trainer


def arm(where: str, at: int) -> None:
    train_step, write_tensors = Trainer.train_step, checkpoint.write_tensors

    def step_and_die(self: Trainer) -> None:
        if where == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
        train_step(self)
        if self.state.step == at and where in ("step", "term"):
            os.kill(os.getpid(), signal.SIGKILL if where == "step" else signal.SIGTERM)

    def write_and_die(path, tensors):  # type: ignore[no-untyped-def]
        write_tensors(path, tensors)
        if where == "write" and f"step-{at:08d}" in str(path) and path.name == "optimizer.safetensors":
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "finish":
        card.write_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    Trainer.train_step = step_and_die  # type: ignore[method-assign]
    checkpoint.write_tensors = write_and_die


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    from trilemma.cli import main

    sys.argv = ["trilemma", *sys.argv[3:]]
    main()
