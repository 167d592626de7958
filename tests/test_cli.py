"""The command line as a script sees it: exit codes, one-line errors, JSON, files."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from trilemma.cli import run as cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional VAE on the digits, a few steps old."""
    path = tmp_path_factory.mktemp("runs") / "vae"
    settings = ["conditional=true", "width=32", "train.previews=1"]
    assert cli(["train", "vae", "digits", *settings, "--steps", "30", "--seed", "3", "--out", str(path)]) == 0
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def parse(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], 2, ["nonsense"]),
        (["train", "vea", "digits"], 2, ["unknown model 'vea'", "There are:", "vae"]),
        (["train", "vae", "digitz"], 2, ["digitz", "did you mean 'digits'", "There are:", "spiral"]),
        (["train", "vae", "digits", "widht=3"], 2, ["unknown setting 'widht'", "did you mean 'width'", "latent_dim"]),
        (["train", "vae", "digits", "optimizer.lrr=3"], 2, ["'optimizer.lrr'", "did you mean 'lr'", "betas"]),
        (["train", "vae", "digits", "train.batchsize=3"], 2, ["'batchsize'", "did you mean 'batch_size'"]),
        (["train", "vae", "digits", "--steps", "5", "train.steps=3"], 2, ["given twice"]),
        (["train", "vae", "digits", "--steps", "5", "--budget", "3s"], 2, ["give one of"]),
        (["train", "vae", "digits", "--budget", "soon"], 2, ["duration 'soon'"]),
        (["train", "kde", "digits", "train.batch_size=5"], 2, ["closed form", "no effect"]),
        (["train", "vae", "digits", "data.size=3"], 2, ["size"]),
        (["train", "vae", "digits", "data.sizee=3"], 2, ["unknown data setting 'sizee'", "did you mean 'size'"]),
        (["check", "digits", "nope=3"], 2, ["unknown data setting 'nope'", "label"]),
        (["train", "vae", "digits", "name=x"], 2, ["unknown setting 'name'"]),
        (["train", "vae", "digits", "train.out=x"], 2, ["unknown setting 'out'"]),
        (["train", "vae", "digits", "train=5"], 2, ["train.KEY=VALUE"]),
        (["train", "vae", "digits", "train.micro_batch_size=48", "train.batch_size=64"], 2, ["micro_batch_size"]),
        (["train", "vae", "digits", "train.device=tpu"], 2, ["tpu", "cpu"]),
        (["sample", "no-such-run"], 1, ["no-such-run", "does not exist"]),
        (["resume", "no-such-run"], 1, ["no-such-run", "not a run"]),
        (["compare", "digits", "--models", "vae,gann"], 2, ["unknown model 'gann'"]),
        (["compare", "digits", "latent_dim=3"], 2, ["vae.latent_dim"]),
        (["export", "no-such-run", "--out", "x", "--format", "bmp"], 2, ["unknown export format"]),
    ],
)
def test_errors_are_one_line_with_the_right_exit_code(
    arguments: list[str],
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = call(capsys, *arguments)
    assert got == code, err
    assert err.startswith("trilemma: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == [], "a refused command left something behind"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="unknown model"):
        cli(["train", "vea", "digits"], debug=True)


def test_models_and_info(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    records = {r["name"]: r for r in parse(capsys, "models")}
    assert {"histogram", "kde", "gmm", "independent", "rbm", "vae", "nsf", "r3gan", "ddpm"} <= records.keys()
    assert records["vae"]["family"] == "autoencoder"
    assert "log_prob" not in records["r3gan"]["abilities"]
    assert parse(capsys, "info", "vae")["latent_dim="]
    described = parse(capsys, "info", str(trained))
    assert described["model"] == "vae"
    assert described["state"] == "finished"
    assert described["step"] == 30
    assert parse(capsys, "info", "digits")["levels"] == 17


def test_a_run_folder_is_complete_and_readable(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "data.json", "metrics.jsonl", "status.json", "samples", "checkpoints",
        "model", "best", "card.md",
    }  # fmt: skip
    assert (trained / "samples" / "final.png").exists()
    assert "# vae on digits" in (trained / "card.md").read_text()
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 30


def test_resuming_a_finished_run_changes_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "model" / "model.safetensors").read_bytes()
    assert parse(capsys, "resume", str(trained))["state"] == "finished"
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_sample_formats_labels_and_seeds(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def draw(name: str, *more: str) -> Path:
        out = tmp_path / name
        assert call(capsys, "sample", str(trained), "-n", "6", "--out", str(out), *more)[0] == 0
        return out

    with Image.open(draw("a.png")) as picture:
        assert picture.mode == "RGB"
    x = np.load(draw("a.npy", "--seed", "5", "--label", "3"))
    assert x.shape == (6, 1, 8, 8)
    assert x.dtype == np.uint8
    assert x.max() <= 16
    assert np.array_equal(x, np.load(draw("b.npy", "--seed", "5", "--label", "3")))
    assert not np.array_equal(x, np.load(draw("c.npy", "--seed", "6", "--label", "3")))
    archive = np.load(draw("a.npz", "--label", "7"))
    assert archive["y"].tolist() == [7] * 6
    rows = list(csv.reader(open(draw("a.csv", "--label", "2"))))  # noqa: SIM115
    assert rows[0][-1] == "label"
    assert rows[1][-1] == "2"
    assert parse(capsys, "sample", str(trained), "-n", "2", "--out", str(tmp_path / "d.npy"))["shape"] == [2, 1, 8, 8]
    for arguments, word in (
        (["--label", "12"], "unknown label '12'"),
        (["--out", str(tmp_path / "x.gif")], "suffix"),
        (["strange=1"], "no setting 'strange'"),
    ):
        code, _, err = call(capsys, "sample", str(trained), *arguments)
        assert code == 2
        assert word in err


def test_score_ranks_examples(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An unconditional model finds real pictures likelier than the same pictures with their pixels shuffled."""
    rng = np.random.default_rng(0)
    real = np.clip(rng.normal(128, 40, (300, 1, 1)) + 60 * np.sin(np.arange(6))[None, :, None], 0, 255)
    real = np.broadcast_to(real, (300, 6, 6)).astype(np.uint8)
    strange = rng.permuted(real.reshape(300, -1), axis=1).reshape(300, 6, 6)
    for name, x in (("real", real), ("strange", strange)):
        np.save(tmp_path / f"{name}.npy", x)
    run = str(tmp_path / "run")
    assert call(capsys, "train", "gmm", str(tmp_path / "real.npy"), "--out", run)[0] == 0
    scored = {name: parse(capsys, "score", run, str(tmp_path / f"{name}.npy")) for name in ("real", "strange")}
    assert scored["real"]["unit"] == "bits/dim"
    assert scored["real"]["kind"] == "upper_bound"
    assert min(scored["real"]["nats"]) > max(scored["strange"]["nats"])
    result = parse(capsys, "score", str(trained), "digits")
    assert result["kind"] == "lower_bound"
    assert result["unit"] == "nats/dim"
    assert len(result["nats"]) == result["n"]
    assert result["mean"] == pytest.approx(np.mean(result["nats"]) / 64)


def test_score_and_sample_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "length": rng.normal(3, 1, 300),
            "count": rng.poisson(4, 300),
            "colour": rng.choice(["red", "green"], 300),
            "day": pd.to_datetime("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, 300), "D"),
        }
    )
    frame.loc[::7, "length"] = np.nan
    frame.to_csv(tmp_path / "table.csv", index=False)
    run = str(tmp_path / "run")
    assert call(capsys, "train", "gmm", str(tmp_path / "table.csv"), "--out", run)[0] == 0
    assert call(capsys, "sample", run, "-n", "50", "--out", str(tmp_path / "new.csv"))[0] == 0
    new = pd.read_csv(tmp_path / "new.csv")
    assert list(new.columns) == list(frame.columns)
    assert set(new["colour"]) <= {"red", "green"}
    assert pd.api.types.is_integer_dtype(new["count"])
    assert pd.to_datetime(new["day"]).between("2023-06-01", "2025-06-01").all()
    assert 0 < new["length"].isna().mean() < 0.5
    far = frame.copy()
    far.loc[0, "length"] = 30.0
    far.to_csv(tmp_path / "far.csv", index=False)
    assert call(capsys, "score", run, str(tmp_path / "far.csv"), "--out", str(tmp_path / "scores.csv"))[0] == 0
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert len(scores) == 300
    assert scores["log_likelihood_nats"].idxmin() == 0  # the strange row is the least likely
    frame.assign(colour="blue").to_csv(tmp_path / "blue.csv", index=False)
    code, out, _ = call(capsys, "score", run, str(tmp_path / "blue.csv"))
    assert code == 0
    assert "colour = blue: never seen in training" in out


def test_check_lists_what_is_bad(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("not a picture")
    code, out, _ = call(capsys, "check", str(tmp_path), "--list-bad")
    assert code == 0
    assert "broken.png" in out
    described = parse(capsys, "check", str(tmp_path))
    assert described["skipped"] >= 1
    assert described["shape"] == [3, 9, 9]


def test_evaluate_writes_scores(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from trilemma.metrics import fit_extractor

    module = importlib.import_module("trilemma.comparison.compare")
    monkeypatch.setattr(module, "fit_extractor", lambda *a, **k: fit_extractor(*a, **{**k, "steps": 20}))
    metrics = parse(capsys, "evaluate", str(trained))
    assert metrics["frechet"]["ci"][0] <= metrics["frechet"]["value"] <= metrics["frechet"]["ci"][1]
    assert metrics["log_likelihood"]["kind"] == "lower_bound"
    saved = json.loads((trained / "scores.json").read_text())
    assert saved["split"] == "test"
    assert saved["metrics"]["frechet"] == metrics["frechet"]
    assert 0.0 < saved["copying"]["p_value"] <= 1.0
    code, out, _ = call(capsys, "evaluate", str(trained))
    assert code == 0
    assert "nearest neighbours (p = " in out


def test_evaluate_looks_for_copies_where_the_run_was_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Against new rows of the same kind, whose columns look a little different, copies of the training rows show."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 600), ("new", 150)):
        frame = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n), "age": rng.integers(18, 18 + n, n)})
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    run = str(tmp_path / "run")
    copier = ["train", "kde", str(tmp_path / "train.csv"), "bandwidth=0.000001", "--out", run]
    assert call(capsys, *copier)[0] == 0
    found = parse(capsys, "evaluate", run, str(tmp_path / "new.csv"))
    assert found["copying"]["p_value"] < 0.01
    assert "Nearest to training data" in found["copying"]["verdict"]
    assert found["training_distance"]["value"] < 0.1
    code, _, err = call(capsys, "evaluate", run, "size=3")
    assert code in (1, 2), err


def test_comparing_finished_runs_takes_no_settings_of_training(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for option in (["--budget", "3s"], ["--seeds", "2"], ["--models", "vae"], ["--cluster", "local"]):
        code, _, err = call(capsys, "compare", str(trained), *option, "--out", str(tmp_path / "out"))
        assert code == 2
        assert f"{option[0]} has no effect" in err
    code, _, err = call(capsys, "compare", str(trained), "no-such-run", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "neither a run folder nor a comparison" in err
    code, _, err = call(capsys, "compare", "digits", "--features", "resnet", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "inception:FILE.safetensors" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["safetensors", "torch", "onnx"])
def test_export_is_checked_by_reading_it_back(
    trained: Path, form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    result = parse(capsys, "export", str(trained), "--out", str(tmp_path / "out"), "--format", form)
    assert result["largest_difference"] <= 1e-4
    assert {"card.md", "manifest.json", "model.safetensors"} <= set(result["files"])
