"""Tables conditioned on some of their columns: loading, errors, files of conditions, and p(y | x) in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import trilemma as tl
from trilemma.cli import run as cli
from trilemma.core.errors import DataError, UsageError
from trilemma.core.spec import ConditionSpec
from trilemma.data.examples import load_condition, load_examples
from trilemma.data.given import condition_frame, read_condition
from trilemma.data.render import write_samples
from trilemma.data.tables import read_rows
from trilemma.engine import Run
from trilemma.nets.conditioning import ConditionEmbedding


def make_frame(n: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "size": rng.normal(1000, 50, n),
            "colour": rng.choice(["red", "green", "blue"], n),
            "old": rng.random(n) < 0.5,
            "y": rng.normal(size=n),
            "k": rng.poisson(3, n),
        }
    )


def test_columns_become_a_vector_in_the_users_units() -> None:
    frame = make_frame()
    data = tl.load_data(frame, given=["old", "size", "colour"])
    spec = data.spec.condition
    assert spec is not None
    assert [c.name for c in data.spec.columns] == ["y", "k"]
    assert spec.names == ("old", "size", "colour=blue", "colour=green", "colour=red")
    # Every row keeps its own condition, in whatever split it is.
    found = {x[0].item(): c for s in data.splits.values() for x, c in zip(*s.head(len(s)), strict=True)}  # type: ignore[arg-type]
    for row in frame.itertuples():
        onehot = [float(row.colour == c) for c in ("blue", "green", "red")]
        assert found[row.y].tolist() == [float(row.old), row.size, *onehot]
    train = data.train.head(len(data.train)).condition
    assert train is not None
    assert spec.mean == (0.0, train[:, 1].mean().item(), 0.0, 0.0, 0.0)
    assert spec.std[1] == pytest.approx(train[:, 1].std(correction=0).item(), rel=1e-12)
    assert spec.std[0] == spec.std[2] == 1.0
    assert type(data.spec).model_validate_json(data.spec.model_dump_json()) == data.spec


def test_one_column_of_categories_becomes_classes() -> None:
    frame = make_frame()
    data = tl.load_data(frame, given="colour")
    spec = data.spec.condition
    assert spec is not None
    assert (spec.kind, spec.names, spec.mean) == ("class", ("blue", "green", "red"), ())
    labelled = tl.load_data(frame, label="colour").test.head(10**6)
    rows = dict(zip(labelled.x[:, 2].tolist(), labelled.condition.tolist(), strict=True))  # type: ignore[union-attr]
    given = {x[2].item(): c.item() for s in data.splits.values() for x, c in zip(*s.head(10**6), strict=True)}  # type: ignore[arg-type]
    assert rows.items() <= given.items()
    declared = tl.load_data(frame, given="k", types={"k": "categorical"}).spec.condition
    assert declared is not None
    assert declared.kind == "class"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"given": ["syze"]}, UsageError, "unknown column 'syze'; did you mean 'size'"),
        ({"given": []}, UsageError, "names no column"),
        ({"given": ["y", "y"]}, UsageError, "2 times"),
        ({"given": ["y"], "types": {"y": "drop"}}, UsageError, "cannot be dropped"),
        ({"given": ["y"], "label": "colour"}, UsageError, "label= and given="),
        ({"given": ["size", "colour", "old", "y", "k"]}, DataError, "no columns to model"),
        ({"given": ["gap"]}, DataError, "'gap' is conditioned on, but missing in 2 row\\(s\\), first in row 4"),
    ],
)
def test_what_cannot_be_given(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    frame = make_frame(60)
    if settings["given"] == ["gap"]:
        frame["gap"] = 1.5
        frame.loc[[3, 7], "gap"] = np.nan
    with pytest.raises(error, match=words):
        tl.load_data(frame, **settings)


def test_given_has_no_effect_on_other_data() -> None:
    with pytest.raises(UsageError, match="given= has no effect on a built-in data set"):
        tl.load_data("digits", given="y")


def test_hashes_of_data_without_given_columns_are_what_they_were() -> None:
    """The fingerprints are those of the version before conditions had columns."""
    frame = pd.DataFrame({"a": np.arange(40) * 0.37 % 1, "kind": ["x", "y"] * 20, "n": np.arange(40) % 7})
    assert tl.load_data(frame, label="kind").fingerprint == "89a407ec758a306fc9720cd2e750f085"
    x = np.arange(60.0).reshape(20, 3) % 7.3
    data = tl.load_data((x, x[:, :2].copy()), condition="attributes")
    assert data.fingerprint == "4ea4b7a988ecdf5e7746b30d4c34f910"
    assert ConditionSpec(kind="class", names=("a",)).model_dump() == {"kind": "class", "names": ("a",)}


def test_given_columns_must_be_conditioned_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_frame().to_csv(tmp_path / "data.csv", index=False)
    train = ["train", "gmm", str(tmp_path / "data.csv"), "--out", str(tmp_path / "run")]
    assert cli([*train, "data.given=[size,colour]"]) == 2
    said = "the columns size, colour are given but the model does not condition on them: add conditional=true"
    assert said in capsys.readouterr().err
    assert cli([*train, "data.given=colour"]) == 2
    assert "the column colour is given but" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli([*train, "data.label=colour"]) == 0


def test_a_row_is_all_of_its_columns() -> None:
    """Two values of y are enough, and rows that differ in what is given are no duplicates."""
    data = tl.load_data(make_frame().drop(columns=["y", "k", "colour"]), given="size")
    assert min(len(s) for s in data.splits.values()) > 0
    assert data.report.duplicates == 0


def test_other_tables_are_read_for_the_same_condition(tmp_path: Path) -> None:
    frame = make_frame()
    data = tl.load_data(frame, given=["size", "colour"])
    shuffled = frame.iloc[:20, ::-1]
    x, c = read_rows(data.spec, shuffled)
    spec = data.spec.condition
    assert spec is not None
    assert c is not None
    assert c[:, 0].tolist() == frame["size"][:20].tolist()
    assert x[:, 1].tolist() == frame["y"][:20].tolist()
    back = condition_frame(spec, c)
    pd.testing.assert_frame_equal(back, frame[["size", "colour"]][:20])
    # Numbers between those of the training table are no error: a condition has no grid.
    assert read_condition(spec, frame[:1].assign(size=1000.123456)).tolist()[0][0] == 1000.123456
    assert read_rows(data.spec, frame[["y", "k", "old"]])[1] is None
    for bad, words in (
        (frame.drop(columns="size"), "lacks 'size': the model is conditioned on size, colour"),
        (frame.assign(colour="pink"), "holds 'pink' in 300 row"),
        (frame.assign(size=np.nan), "missing in 300 row"),
    ):
        with pytest.raises(DataError, match=words):
            read_rows(data.spec, bad)
    with pytest.raises(UsageError, match="has no effect"):
        read_rows(data.spec, frame, label="colour")
    # What is sampled can be scored: the file holds all columns.
    write_samples(x, data.spec, tmp_path / "new.csv", c)
    again = load_examples(str(tmp_path / "new.csv"), data.spec)
    assert torch.equal(again.x, x)
    assert torch.equal(again.condition, c)  # type: ignore[arg-type]


def test_conditions_of_samples_come_from_a_table(tmp_path: Path) -> None:
    frame = make_frame()
    spec = tl.load_data(frame, given=["colour", "size"]).spec.condition
    assert spec is not None
    frame[:5].to_csv(tmp_path / "five.csv", index=False)
    frame[["size", "colour"]][:1].to_csv(tmp_path / "one.csv", index=False)
    five = load_condition(tmp_path / "five.csv", spec, None)
    assert five[:, 3].tolist() == frame["size"][:5].tolist()
    assert load_condition(tmp_path / "one.csv", spec, 3).shape == (3, 4)
    assert load_condition(tmp_path / "one.csv", spec, None).shape == (64, 4)
    with pytest.raises(UsageError, match="holds 5 conditions"):
        load_condition(tmp_path / "five.csv", spec, 4)
    np.save(tmp_path / "two.npy", five[:2].numpy())
    assert torch.equal(load_condition(tmp_path / "two.npy", spec, None), five[:2])


def test_networks_see_standardised_numbers() -> None:
    """Dates a second apart differ, though single precision tells them only to two minutes."""
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(60) * 37 % 60, "s")
    data = tl.load_data(pd.DataFrame({"when": days, "y": np.arange(60) * 0.37 % 1}), given="when")
    spec = data.spec.condition
    assert spec is not None
    embed = ConditionEmbedding(spec, 3)
    assert isinstance(embed.embed, torch.nn.Linear)
    c = torch.tensor(spec.mean, dtype=torch.float64) + torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    expected = embed.embed(torch.tensor([[0.0], [1.0 / spec.std[0]]]))
    torch.testing.assert_close(embed(c), expected, rtol=1e-5, atol=1e-6)
    model = tl.create("vae", data.spec, conditional=True)
    model.initialize(0)
    assert torch.equal(model._conditions(c, 2), c)  # type: ignore[arg-type]


def test_train_score_and_sample_given_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_frame().to_csv(tmp_path / "data.csv", index=False)
    run = str(tmp_path / "run")
    train = ["train", "vae", str(tmp_path / "data.csv"), "data.given=[size,colour]", "conditional=true"]
    assert cli([*train, "--steps", "3", "--out", run]) == 0
    again = Run(run).load_data()
    assert again.spec == Run(run).spec
    assert again.fingerprint == Run(run).data["fingerprint"]
    make_frame(6).to_csv(tmp_path / "new.csv", index=False)
    capsys.readouterr()
    assert cli(["score", run, str(tmp_path / "new.csv"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["p_value"]) == 6
    out = tmp_path / "samples.csv"
    assert cli(["sample", run, "--condition", str(tmp_path / "new.csv"), "--out", str(out)]) == 0
    drawn = pd.read_csv(out)
    assert list(drawn.columns) == ["old", "y", "k", "size", "colour"]
    pd.testing.assert_frame_equal(drawn[["size", "colour"]], make_frame(6)[["size", "colour"]], check_dtype=False)
    capsys.readouterr()
    assert cli(["sample", run]) == 2
    assert "FILE.csv with these columns" in capsys.readouterr().err
    classes = str(tmp_path / "classes")
    train = ["train", "gmm", str(tmp_path / "data.csv"), "data.given=colour", "conditional=true", "--out", classes]
    assert cli(train) == 0
    assert cli(["sample", classes, "--condition", str(tmp_path / "new.csv"), "--out", str(out)]) == 0
    assert pd.read_csv(out)["colour"].tolist() == make_frame(6)["colour"].tolist()
    assert cli(["sample", classes, "--label", "red", "-n", "2", "--out", str(out)]) == 0
    assert pd.read_csv(out)["colour"].tolist() == ["red", "red"]
    assert cli(["score", classes, str(tmp_path / "new.csv")]) == 0


def test_a_flow_learns_the_conditional_density(tmp_path: Path) -> None:
    """y = 2 x + 30 e: the held-out log-likelihood is that of N(2 x, 30^2) to 0.1 nats, and far above the marginal's."""
    rng = np.random.default_rng(0)
    x = rng.normal(1000, 50, 10_000)
    frame = pd.DataFrame({"x": x, "y": 2 * x + 30 * rng.normal(size=10_000)})
    data = tl.load_data(frame, given="x")
    model = tl.create("nsf", data.spec, conditional=True)
    model.fit(data, steps=400, seed=0, batch_size=256, out=tmp_path / "run")
    test = data.test.head(len(data.test))
    assert test.condition is not None
    found = model.log_prob(data.test).value.mean().item()
    exact = torch.distributions.Normal(2 * test.condition, 30.0).log_prob(test.x).mean().item()
    marginal = torch.distributions.Normal(2000.0, math.hypot(100, 30)).log_prob(test.x).mean().item()
    assert found > exact - 0.1
    assert found > marginal + 1.0
    drawn = model.sample(2000, torch.tensor([1050.0]), generator=0).double()
    assert drawn.mean().item() == pytest.approx(2100, abs=10.0)
    assert drawn.std().item() == pytest.approx(30.0, rel=0.15)
