"""Pictures of the diffusion process: what is drawn is right, and drawn for every kind of data and model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.diffusion_oracles import SCHEDULES
from trilemma import create, load_data
from trilemma.cli import run as cli
from trilemma.core.errors import CapabilityError, NotFittedError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.noise import Noise, make_generator
from trilemma.data import Dataset
from trilemma.data.film import png
from trilemma.diffusion.bound import log_normal_density
from trilemma.diffusion.figures import CHAINS, START, posterior_times, simulated_kernel, two_modes
from trilemma.diffusion.pictures import Album, in_turn, spread
from trilemma.diffusion.process import (
    distance_from_gaussian,
    forward_chain,
    path_times,
    posteriors,
    shown_times,
)
from trilemma.diffusion.schedule import Discrete, NoiseSchedule

ALWAYS = {"forward.png", "kernel.png", "posterior.png", "reverse.png", "schedule.png"}
PLANE = {"score.png", "sde.png"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One small data set of each kind, as `load_data` takes it."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    place = np.linspace(0.0, 1.0, 32)
    np.save(folder / "signals.npy", np.sin(6.0 * place + rng.uniform(0, 6, (120, 1, 1))).astype(np.float32))
    length = rng.normal(3.0, 1.0, 150)
    frame = pd.DataFrame({"length": length, "noise": rng.normal(size=150), "width": length + rng.normal(size=150)})
    frame.assign(colour=rng.choice(["red", "green"], 150)).to_csv(folder / "table.csv", index=False)
    return {
        "image": "digits", "points": "two-moons", "signal": str(folder / "signals.npy"),
        "table": str(folder / "table.csv"),
    }  # fmt: skip


def untrained(name: str, data: Dataset, **settings: Any) -> GenerativeModel:
    """A model of its first weights, with the constants of the data."""
    model = create(name, data.spec, width=16, depth=1, **settings)
    model.initialize(0)
    model.prepare(data.train, Noise(0, "prepare", n=1))
    model.fitted = True
    return model


def deviation(content: bytes) -> float:
    with Image.open(io.BytesIO(content)) as picture:
        return float(np.asarray(picture.convert("L"), dtype=np.float64).std())


# -- in one dimension ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_chains_have_the_moments_of_the_kernel(name: str) -> None:
    """Mean and variance of 20,000 chains at 101 times lie within 5 standard errors; false alarms below 2e-4 each."""
    schedule: NoiseSchedule = SCHEDULES[name]()
    times, chains = simulated_kernel(schedule, seed=1)
    assert bool((times[1:] > times[:-1]).all())
    assert (float(times[0]), float(times[-1])) == (schedule.t_min, schedule.t_max)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    mean_error = (chains.mean(1) - alpha * START) / (sigma / CHAINS**0.5)
    var_error = (chains.var(1) / sigma.square() - 1.0) / (2.0 / CHAINS) ** 0.5
    assert float(mean_error.abs().max()) < 5.0
    assert float(var_error.abs().max()) < 5.0


def test_a_chain_is_correlated_as_its_steps_say() -> None:
    """cov(z_s, z_t | x) = alpha_t / alpha_s sigma_s^2: not independent draws of the kernel. 5 standard errors."""
    schedule, n, g = SCHEDULES["cosine"](), 40_000, make_generator("correlation")
    times = torch.tensor([0.1, 0.4, 0.6], dtype=torch.float64)
    x = torch.zeros(n, dtype=torch.float64)
    z = forward_chain(schedule, x, times, lambda: torch.randn(n, generator=g, dtype=torch.float64))
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    for s, t in ((0, 1), (1, 2), (0, 2)):
        expected = float(alpha[t] / alpha[s] * sigma[s].square())
        error = float(((z[s] * z[t]).var() / n).sqrt())
        assert float((z[s] * z[t]).mean()) == pytest.approx(expected, abs=5.0 * error)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posteriors_are_densities_that_agree_with_closed_forms(name: str) -> None:
    """Each integrates to 1, and the mean of q(z_s | z_t) is the posterior's with E[x | z_t] in the place of x."""
    schedule: NoiseSchedule = SCHEDULES[name]()
    mixture, seen = two_modes(schedule), 0.2
    for t, ends in posterior_times(schedule):
        for s in ends:
            assert float(s) < float(t)
            found = posteriors(mixture, t, s, seen, 1.0)
            for density in (found.forward, found.reverse, found.known):
                assert float(torch.trapezoid(density, found.value)) == pytest.approx(1.0, abs=1e-6)
            z = torch.tensor([[seen]], dtype=torch.float64)
            mean = torch.trapezoid(found.reverse * found.value, found.value)
            torch.testing.assert_close(mean, mixture.posterior(z, t, s).mean.squeeze(), rtol=1e-6, atol=1e-8)


def test_the_reverse_is_gaussian_for_short_steps_only() -> None:
    for name in ("cosine", "edm"):
        schedule = SCHEDULES[name]()
        for t, (short, long) in posterior_times(schedule):
            near, far = (posteriors(two_modes(schedule), t, s, 0.1, 1.0).distance for s in (short, long))
            assert 0.0 <= near < 0.1 * far
    value = torch.linspace(-30.0, 30.0, 8001, dtype=torch.float64)
    assert distance_from_gaussian(value, log_normal_density(value, 1.0, 4.0).exp()) == pytest.approx(0.0, abs=1e-9)
    laplace = 0.5 * (-value.abs()).exp()  # KL = log sqrt(4 pi e) - log(2 e), as its variance is 2
    expected = 0.5 * float(np.log(4.0 * np.pi * np.e)) - float(np.log(2.0 * np.e))
    assert distance_from_gaussian(value, laplace) == pytest.approx(expected, rel=1e-3)  # it has a kink


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_rise_to_the_last_and_are_steps_of_a_chain(name: str) -> None:
    schedule: NoiseSchedule = SCHEDULES[name]()
    for times in (shown_times(schedule, 9), path_times(schedule)):
        assert bool((times[1:] > times[:-1]).all())
        assert float(times[0]) >= schedule.t_min
        assert float(times[-1]) == schedule.t_max
        assert not isinstance(schedule, Discrete) or bool((times == times.round()).all())


# -- of models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "settings", "drawing_settings"),
    [
        ("ddpm", "image", {"conditional": True}, {"steps": 4}),
        ("iddpm", "points", {}, {"steps": 4}),
        ("edm", "points", {"conditional": True}, {"steps": 4, "guidance": 2.0}),
        ("ve-sde", "signal", {}, {"steps": 4}),
        ("vdm", "table", {}, {"steps": 4, "n": 3}),
        ("flow-matching", "points", {}, {"sampler": "rk45"}),
        ("consistency", "points", {}, {}),
    ],
)
def test_every_kind_of_model_is_drawn(
    name: str, kind: str, settings: dict[str, Any], drawing_settings: dict[str, Any], sources: dict[str, str]
) -> None:
    data = load_data(sources[kind])
    model = untrained(name, data, **settings)
    drawn = model.pictures(data.train, **drawing_settings)
    expected = ALWAYS | ({"reverse.gif"} if kind != "table" else set())
    assert set(drawn) == expected | (PLANE if kind == "points" and name != "consistency" else set())
    for file, content in drawn.items():
        assert deviation(content) > 5.0, f"{file} is nearly blank"
        assert len(content) < 1_000_000
        if file.endswith(".png"):
            assert b"Software" not in content[:200]
    if "reverse.gif" in drawn:
        with Image.open(io.BytesIO(drawn["reverse.gif"])) as film:
            assert film.n_frames == {"consistency": 2, "flow-matching": 20}.get(name, 4)  # type: ignore[attr-defined]
            assert film.info["loop"] == 0


def test_the_same_seed_draws_the_same_bytes(sources: dict[str, str]) -> None:
    data = load_data(sources["points"])
    model = untrained("edm", data)
    first, again = (model.pictures(data.train, generator=4, steps=3) for _ in range(2))
    assert first == again
    other = Album(model, data.train, 5, 8, None, 3, 1.0)  # type: ignore[arg-type]
    assert png(other.forward()) != first["forward.png"]
    with model.inference():
        assert png(other.reverse(other.reverse_states())) != first["reverse.png"]


def test_the_reverse_chain_ends_in_the_samples(sources: dict[str, str]) -> None:
    data = load_data(sources["image"])
    model = untrained("ddpm", data, conditional=True)
    assert model.condition is not None
    album = Album(model, data.train, 7, 8, None, 5, 1.0)  # type: ignore[arg-type]
    assert album.examples.condition is not None
    assert album.examples.condition.tolist() == list(range(8))
    with model.inference():
        _, _, x = album.reverse_states()[-1]
    samples = model.sample(8, torch.arange(8), generator=7, steps=5)
    assert torch.equal(model.codec.decode(x), samples)


def test_states_are_shown_with_the_spread_of_the_data(sources: dict[str, str]) -> None:
    """At every time 128,000 numbers shown have the standard deviation of the data to 2% (about five errors)."""
    data = load_data(sources["image"])
    for name in ("ddpm", "edm", "ve-sde"):
        album = Album(untrained(name, data), data.train, 0, 2, None, 2, 1.0)  # type: ignore[arg-type]
        y, _ = album.model.codec.encode(data.train.head(1000).x, dtype=torch.float64)
        times, noise = shown_times(album.schedule, 5), Noise(0, "spread", n=len(y))
        chain = forward_chain(album.schedule, y, times, partial(noise.normal_like, y))
        for z, t in zip(chain, times, strict=True):
            shown = (z * album.view.scale(t)).var(0).mean().sqrt()
            assert float(shown) == pytest.approx(album.model.data_std, rel=0.02)
    picture = album.view.pixels(torch.tensor([-9.0, -1.0 + 1 / 17, 0.0, 1.0 - 1 / 17, 9.0]).reshape(5, 1, 1, 1))
    assert picture[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]  # one fixed range of grey, cut beyond it


def test_a_table_shows_its_most_correlated_columns(sources: dict[str, str]) -> None:
    data = load_data(sources["table"])
    album = Album(untrained("vdm", data), data.train, 0, 2, None, 2, 1.0)  # type: ignore[arg-type]
    assert album.view.names == ("length", "width")


def test_classes_take_turns() -> None:
    assert in_turn(torch.tensor([2, 0, 0, 2, 1]), 4, 5) == [1, 4, 0, 2]
    assert in_turn(None, 3, 9) == [0, 1, 2]
    assert spread(100, 3) == [0, 50, 99]
    assert spread(2, 10) == [0, 1]


# -- refusals and the command ---------------------------------------------------------------------------------------


def test_refusals(sources: dict[str, str]) -> None:
    data = load_data(sources["points"])
    with pytest.raises(CapabilityError, match=r"vae has no process to be shown; models that do: .*ddpm.*vdm"):
        create("vae", data.spec).pictures(data.train)
    with pytest.raises(NotFittedError, match="not fitted"):
        create("edm", data.spec).pictures(data.train)
    model = untrained("edm", data)
    with pytest.raises(UsageError, match=r"pictures of edm has no setting 'stepz'; it has: n, sampler"):
        model.pictures(data.train, stepz=3)
    with pytest.raises(UsageError, match="n >= 1"):
        model.pictures(data.train, n=0)
    with pytest.raises(UsageError, match="trained without a condition"):
        model.pictures(data.train, guidance=2.0)


def test_show_writes_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["width=16", "depth=1", "train.batch_size=32", "train.threads=1", "--steps", "2"]
    assert cli(["train", "edm", "two-moons", *small, "--out", str(run)]) == 0
    capsys.readouterr()
    assert cli(["show", str(run), "steps=3", "--seed", "2", "--json"]) == 0
    files = [Path(file) for file in json.loads(capsys.readouterr().out)["files"]]
    assert {file.name for file in files} == ALWAYS | PLANE | {"reverse.gif"}
    assert all(file.parent == run / "pictures" and file.stat().st_size > 1000 for file in files)
    assert cli(["show", str(run), "--out", str(tmp_path / "no"), "stepz=3"]) == 2
    assert "no setting 'stepz'" in capsys.readouterr().err
    assert cli(["show", str(tmp_path / "nothing")]) == 1
    assert not (tmp_path / "no").exists()


def test_show_refuses_before_it_reads_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 2)))
    run = str(tmp_path / "run")
    assert cli(["train", "gmm", str(tmp_path / "x.npy"), "--out", run]) == 0
    (tmp_path / "x.npy").unlink()
    capsys.readouterr()
    assert cli(["show", run, "--out", str(tmp_path / "no")]) == 1
    assert "gmm has no process to be shown; models that do: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_models_do_not_need_matplotlib() -> None:
    code = "import sys, trilemma.diffusion; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
