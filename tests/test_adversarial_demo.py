"""The demos: what they draw beside the players against closed forms, a short game, reproducibility, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trilemma.adversarial.demo import DEMOS, MODE_PRESETS, count_modes, eight_gaussians
from trilemma.adversarial.line_game import (
    CELL,
    Game1d,
    Game1dConfig,
    best_critic,
    cell_edges,
    jensen_shannon,
    latent_nodes,
    least_loss,
    normal_masses,
    pushed_masses,
    quantiles,
    shown_critic,
    wasserstein,
)
from trilemma.adversarial.losses import LOSSES, LossName
from trilemma.cli import run as cli
from trilemma.core.noise import Noise, make_generator

F64 = torch.float64
EDGES = cell_edges(1.0)
CENTRES = torch.cat([EDGES[:1] - CELL / 2, EDGES + CELL / 2])
P = normal_masses(1.0, 0.75, EDGES)
Q = normal_masses(0.2, 1.1, EDGES)


def log_ratio(x: torch.Tensor) -> torch.Tensor:
    """log p/q of N(1, 0.75^2) and N(0.2, 1.1^2)."""
    return math.log(1.1 / 0.75) - 0.5 * ((x - 1.0) / 0.75) ** 2 + 0.5 * ((x - 0.2) / 1.1) ** 2


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_pushed_masses_of_known_maps(latent: Any) -> None:
    z, weights = latent_nodes(latent)
    if latent == "normal":
        found = pushed_masses(0.2 - 1.1 * z, weights, EDGES)
        torch.testing.assert_close(found, Q, rtol=0, atol=1e-6)  # even within pieces: O(piece^2)
        edges = EDGES[EDGES >= 0]
        folded = pushed_masses(z.abs(), weights, EDGES)  # two branches: the half-normal distribution
        torch.testing.assert_close(folded.cumsum(0)[:-1][EDGES >= 0], torch.erf(edges / 2**0.5), rtol=0, atol=1e-5)
    else:
        found = pushed_masses(1.0 + 2.0 * z, weights, EDGES).cumsum(0)[:-1]
        torch.testing.assert_close(found, ((EDGES + 1.0) / 4.0).clamp(0.0, 1.0), rtol=0, atol=1e-12)


def test_best_critic_of_gaussians_and_what_is_left_open() -> None:
    inside = (CENTRES - 1.0).abs() < 3.0
    exact = log_ratio(CENTRES)
    for loss in ("minimax", "non-saturating", "least-squares", "relativistic"):
        best = best_critic(loss, P, Q)
        torch.testing.assert_close(best[inside], exact.sigmoid()[inside], rtol=0, atol=1e-3)  # means over cells
    assert torch.equal(best_critic("hinge", P, Q)[inside], exact.sign()[inside])
    shown = shown_critic("relativistic", exact + 7.0, P, Q)
    torch.testing.assert_close(shown[inside], best_critic("relativistic", P, Q)[inside], rtol=0, atol=1e-3)
    potential = best_critic("wasserstein", P, Q)
    gap = (P * potential.nan_to_num()).sum() - (Q * potential.nan_to_num()).sum()
    torch.testing.assert_close(gap, w1_of_gaussians(0.8, -0.35), rtol=0, atol=5e-3)
    again = shown_critic("wasserstein", torch.where(potential.isnan(), 0.0, potential) * 0.01, P, Q)
    assert again.diff().abs().max().item() == pytest.approx(CELL, rel=1e-9)


def w1_of_gaussians(shift: float, widening: float) -> torch.Tensor:
    """E |shift + widening N(0, 1)|, the mean of a folded normal: the quantiles are linear in each other."""
    m, s = torch.tensor(shift, dtype=F64), torch.tensor(abs(widening), dtype=F64)
    return s * math.sqrt(2.0 / math.pi) * torch.exp(-0.5 * (m / s) ** 2) + m * torch.erf(m / (s * math.sqrt(2.0)))


def test_wasserstein_by_sorting() -> None:
    z = torch.special.ndtri(quantiles())
    quantile = 1.0 + 0.75 * z
    shuffled = z[torch.randperm(len(z), generator=make_generator("shuffle"))]
    equal = wasserstein(-0.6 + 0.75 * shuffled, quantile)
    torch.testing.assert_close(equal, torch.tensor(1.6, dtype=F64), rtol=0, atol=1e-12)
    for mean, std in ((0.2, 1.1), (1.0, 0.1), (3.0, 0.75 + 1e-3)):
        found = wasserstein(mean - std * shuffled, quantile)
        torch.testing.assert_close(found, w1_of_gaussians(mean - 1.0, std - 0.75), rtol=0, atol=5e-4)


def test_divergence_against_quadrature() -> None:
    x = torch.linspace(-12.0, 14.0, 200_001, dtype=F64)
    p = torch.exp(-0.5 * ((x - 1.0) / 0.75) ** 2) / (0.75 * math.sqrt(2.0 * math.pi))
    r = log_ratio(x)
    logs = torch.nn.functional.logsigmoid
    exact = math.log(2.0) + 0.5 * torch.trapezoid(p * (logs(r) + torch.exp(-r) * logs(-r)), x)
    torch.testing.assert_close(jensen_shannon(P, Q), exact, rtol=0, atol=1e-5)
    assert jensen_shannon(P, P).item() == pytest.approx(0.0, abs=1e-12)
    far = normal_masses(-8.0, 0.1, EDGES)
    assert jensen_shannon(P, far).item() == pytest.approx(math.log(2.0), abs=1e-12)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_least_loss_is_the_loss_of_the_best_critic(loss: LossName) -> None:
    z = torch.special.ndtri(quantiles(1024))
    real, fake = 1.0 + 0.75 * z, 0.2 + 1.1 * z
    w1 = wasserstein(fake, real)
    least = least_loss(loss, P, Q, w1)
    if loss == "wasserstein":
        assert least == -w1
        return
    critic = {"hinge": log_ratio(fake).sign(), "least-squares": log_ratio(fake).sigmoid()}.get(loss, log_ratio(fake))
    on_real = {"hinge": log_ratio(real).sign(), "least-squares": log_ratio(real).sigmoid()}.get(loss, log_ratio(real))
    if loss == "relativistic":
        on_real, critic = torch.cartesian_prod(on_real, critic).unbind(1)
    torch.testing.assert_close(LOSSES[loss].d(on_real, critic), least, rtol=0, atol=2e-3)  # for 1024 quantiles
    worse = LOSSES[loss].d(on_real + 0.3 * on_real.sin(), critic + 0.3 * critic.sin())
    assert worse > least


def test_a_short_game_comes_to_its_equilibrium() -> None:
    config = Game1dConfig(steps=400, frames=2, head_start=300, batch_size=128)
    first, last = Game1d(config, 1).play()
    assert first.w1 > 2.0
    assert first.accuracy > 0.99
    assert first.gradients["minimax"] < 0.05 * first.gradients["non-saturating"]
    assert last.w1 < 0.25
    likely = last.p > 0.2 * last.p.max()
    assert (last.critic[likely] - 0.5).abs().max() < 0.15
    assert last.loss == pytest.approx(math.log(4.0), abs=0.05)
    assert last.loss >= last.least - 1e-3
    assert last.accuracy == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("loss", ["minimax", "wasserstein", "hinge", "least-squares", "relativistic"])
def test_no_critic_is_better_than_the_best(loss: LossName) -> None:
    for state in Game1d(Game1dConfig(loss=loss, steps=20, frames=2, head_start=60), 0).play():
        assert state.loss >= state.least - 0.02  # of pairs, one of many pairings is taken
        assert set(state.gradients) == ({"minimax", "non-saturating"} if loss == "minimax" else {loss})


def test_modes_and_good_samples_of_the_data() -> None:
    toy = eight_gaussians(0.1)
    x = toy.sample(4000, Noise("test", n=4000)).x
    modes, good = count_modes(x, toy)
    assert modes == 8
    assert good > 0.9975  # 1 - exp(-8) = 0.99966; fewer with probability below 1e-5
    assert count_modes(x[x[:, 0] > 1.0], toy)[0] == 3
    assert count_modes(torch.zeros(100, 2), toy) == (0, 0.0)


def test_the_command_writes_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["steps=20", "frames=2", "head_start=5", "batch_size=16"]
    assert cli(["demo", "gan-1d", *quick, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [str(Path("demo-gan-1d") / f"gan-1d.{kind}") for kind in ("gif", "png")]
    assert [row["step"] for row in said["figures"]] == [0, 20, 20]
    assert cli(["demo", "gan-1d", *quick, "--out", "again"]) == 0
    for name in ("gan-1d.gif", "gan-1d.png"):
        assert Path("again", name).read_bytes() == Path("demo-gan-1d", name).read_bytes()
    with Image.open("again/gan-1d.gif") as film:
        assert getattr(film, "n_frames", 0) == 2
        assert np.asarray(film.convert("RGB")).std() > 0
    out = capsys.readouterr().out
    assert "W1" in out
    assert str(Path("again") / "gan-1d.png") in out


def test_all_losses_are_played_and_counted() -> None:
    demo = DEMOS["gan-modes"]
    shown = demo.show(demo.config(steps=2, frames=2, batch_size=8), 0)  # type: ignore[call-arg]
    assert [row["preset"] for row in shown.rows] == list(MODE_PRESETS)
    assert set(shown.files) == {"gan-modes.gif", "gan-modes.png"}
    assert [row["gradient ratio"] is None for row in shown.rows] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gan-2d"], ["unknown demo 'gan-2d'", "did you mean 'gan-1d'", "gan-modes"]),
        (["gan-1d", "stepz=3"], ["unknown setting 'stepz'", "did you mean 'steps'", "head_start"]),
        (["gan-1d", "loss=minmax"], ["'loss'", "minimax"]),
        (["gan-1d", "frames=1"], ["'frames'"]),
        (["gan-modes", "loss=minimax"], ["unknown setting 'loss'", "steps"]),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["demo", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_the_demos_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["demo", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(DEMOS)
