"""`show RUN`: pictures of the process by which a run's model makes samples, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trilemma.core.storage import write_bytes
from trilemma.engine.run import Run
from trilemma.engine.runtime import choose_device


def write_pictures(run: Run, out: Path | None = None, *, seed: int = 0, **settings: Any) -> list[Path]:
    """Write the pictures of `GenerativeModel.pictures`, with the run's data, and return their paths.

    Arguments:
        out: a folder, made where it is missing; RUN/pictures by default. Files of the same names are replaced.
        settings: of the model's pictures.

    Raises:
        CapabilityError: the model has no process to be shown.
        UsageError: an unknown setting, or the run's data were in memory.
    """
    model = run.model()
    model.check_pictures(settings)
    data = run.load_data()
    drawn = model.to(choose_device("auto")).pictures(data.train, generator=seed, **settings)
    folder = out or run.path / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        write_bytes(folder / name, content)
    return [folder / name for name in drawn]
