"""What a person sees while it trains: a live line in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol


class Reporter(Protocol):
    """Receives the course of a run; used as a context manager around it."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def update(self, progress: float, step: int, text: str, seconds_left: float) -> None:
        """progress in [0, 1]; text holds losses and speed."""

    def say(self, message: str) -> None:
        """A line that stays."""


class Silent:
    """Reports nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        pass

    def update(self, progress: float, step: int, text: str, seconds_left: float) -> None:
        pass

    def say(self, message: str) -> None:
        pass


class PlainLines:
    """One line every few seconds on stderr, for logs and pipes."""

    def __init__(self, title: str, every: float = 10.0) -> None:
        self.title, self.every, self._last = title, every, time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        pass

    def update(self, progress: float, step: int, text: str, seconds_left: float) -> None:
        now = time.monotonic()
        if now - self._last >= self.every or progress >= 1.0:
            self._last = now
            self.say(f"{progress:4.0%}  step {step}  {text}  {clock(seconds_left)} left{_finish(seconds_left)}")

    def say(self, message: str) -> None:
        print(f"{self.title}: {message}", file=sys.stderr, flush=True)


class LiveLine:
    """A progress bar with loss, speed, time left and the estimated finish (rich)."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = self._progress.add_task(title, total=1.0, text="")

    def __enter__(self) -> LiveLine:
        self._progress.start()
        return self

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        self._progress.stop()

    def update(self, progress: float, step: int, text: str, seconds_left: float) -> None:
        text = f"step {step}  {text}  {clock(seconds_left)} left{_finish(seconds_left)}"
        self._progress.update(self._task, completed=progress, text=text)

    def say(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)


def make_reporter(title: str, show: bool) -> Reporter:
    """A live line where stderr is a terminal, plain lines where it is not, nothing if not `show`."""
    if not show:
        return Silent()
    return LiveLine(title) if sys.stderr.isatty() else PlainLines(title)


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _finish(seconds_left: float) -> str:
    """When it will be done, for runs of more than two minutes."""
    return time.strftime(", done at %H:%M", time.localtime(time.time() + seconds_left)) if seconds_left > 120 else ""
