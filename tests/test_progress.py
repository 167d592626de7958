"""What a person reads while it trains."""

from __future__ import annotations

import re

import pytest

from trilemma.engine.progress import LiveLine, PlainLines, clock


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (75, "1:15"), (3675, "1:01:15"), (-3, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_plain_lines_say_step_loss_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainLines("vae on digits", every=0.0) as reporter:
        reporter.update(0.25, 10, "elbo 1.5  300 images/s", 90.0)
        reporter.update(0.5, 20, "elbo 1.2  300 images/s", 600.0)
        reporter.say("rolled back")
    out, err = capsys.readouterr()
    assert out == ""
    first, second, third = err.splitlines()
    assert first == "vae on digits:  25%  step 10  elbo 1.5  300 images/s  1:30 left"
    assert re.fullmatch(r"vae on digits:  50%  step 20 .* 10:00 left, done at \d\d:\d\d", second)
    assert third == "vae on digits: rolled back"


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainLines("x", every=60.0)
    for step in range(100):
        reporter.update(step / 100, step, "", 1.0)
    reporter.update(1.0, 100, "", 0.0)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_live_line_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveLine("vae on digits") as reporter:
        reporter.update(0.5, 20, "elbo 1.2", 60.0)
    assert "vae on digits" in capsys.readouterr().err
