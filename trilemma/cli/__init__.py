"""The command line: talks to people, holds no logic. Starts without importing torch."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 it failed, 2 wrong usage, 130/143 interrupted (and saved)."""
    # Outside a training loop, which saves first, SIGTERM unwinds like Ctrl-C, so that child processes end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Idle OpenMP threads sleep instead of spinning; it must be set before torch loads its runtime.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments = [a for a in arguments if a != "--debug"]
    sys.exit(run(arguments, debug))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run a command and return its exit code."""
    import typer

    from trilemma.cli.app import app
    from trilemma.cli.output import complain

    try:
        code = app(arguments, prog_name="trilemma", standalone_mode=False)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        complain("interrupted")
        return 130
    except typer.TyperException as error:
        complain(_one_line(error.format_message()))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; say nothing, but do not claim success.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    from trilemma.cli.output import complain
    from trilemma.core.errors import TrilemmaError, UsageError

    if isinstance(error, TrilemmaError):
        complain(_one_line(str(error)))
        return 2 if isinstance(error, UsageError) else 1
    complain(f"{type(error).__name__}: {_one_line(str(error))} (unexpected; --debug shows where)")
    return 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
