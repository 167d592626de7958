"""Conditions that are arrays: what they are taken for, that they stay with their examples, and the way to samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.toy_models import Regression
from trilemma.check import QUICK, check_model
from trilemma.cli import run as cli
from trilemma.core.errors import CapabilityError, DataError, UsageError
from trilemma.core.registry import create
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.data import Dataset, describe_data, load_data, save_dataset
from trilemma.data.examples import load_examples
from trilemma.engine import load, resume, train
from trilemma.engine.checkpoint import list_checkpoints

N = 40
IMAGE = ConditionSpec(kind="image", shape=(2, 3, 5))
SEQUENCE = ConditionSpec(kind="sequence", shape=(6, 3))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pictures(n: int = N) -> np.ndarray:
    """Real pictures (n, 1, 6, 6) whose value is their index."""
    return np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 1, 6, 6)).copy()


def check_aligned(data: Dataset, c: np.ndarray) -> None:
    """Every example of every split has the condition of its index, bit for bit, in batches of any order too."""
    seen = []
    for split in data.splits.values():
        order = torch.arange(len(split)).flip(0)
        for batch in (split.head(len(split)), split.batch(order)):
            index = batch.x.flatten(1)[:, 0].long()
            assert batch.condition is not None
            assert batch.condition.dtype == torch.float32
            assert np.array_equal(batch.condition.numpy(), c[index.numpy()])
        seen += index.tolist()
    assert sorted(seen) == list(range(len(c)))
    assert seen != sorted(seen)


@pytest.mark.parametrize(
    ("c", "kind", "text"),
    [
        (numbers(N, 3), "vector", "image 1x6x6, real, 3 attributes"),
        (numbers(N, 1), "vector", "image 1x6x6, real, 1 attributes"),
        (numbers(N, 2, 3, 5), "image", "image 1x6x6, real, conditioned on image 2x3x5"),
        (numbers(N, 6, 3), "sequence", "image 1x6x6, real, conditioned on sequence 6x3"),
    ],
)
def test_conditions_stay_with_their_examples(c: np.ndarray, kind: str, text: str, tmp_path: Path) -> None:
    x = pictures()
    data = load_data((x, c))
    condition = data.spec.condition
    assert condition is not None
    assert condition.kind == kind
    assert condition.value_shape == c.shape[1:]
    assert data.spec.describe() == text
    assert describe_data(data)["condition"] == json.loads(condition.model_dump_json())
    check_aligned(data, c)
    again = load_data((torch.from_numpy(x), torch.from_numpy(c)))
    assert again.fingerprint == data.fingerprint
    np.savez(tmp_path / "a.npz", x=x, condition=c)
    from_file = load_data(tmp_path / "a.npz")
    assert from_file.fingerprint == data.fingerprint
    assert from_file.report.notes == ()
    save_dataset(data, tmp_path / "saved")
    saved = load_data(tmp_path / "saved")
    assert saved.spec == data.spec
    check_aligned(saved, c)
    examples = load_examples(str(tmp_path / "a.npz"), data.spec)
    assert examples.condition is not None
    assert np.array_equal(examples.condition.numpy(), c)


def test_the_splits_are_those_of_x_and_the_fingerprint_that_of_both() -> None:
    x, c = pictures(), numbers(N, 2, 3, 5)
    data, other = load_data((x, c)), c.copy()
    other[17, 1, 2, 3] += 1e-3
    changed, plain = load_data((x, other)), load_data((x, c), condition="none")
    for a, b, p in zip(data.splits.values(), changed.splits.values(), plain.splits.values(), strict=True):
        assert torch.equal(a.head(N).x, b.head(N).x)
        assert torch.equal(a.head(N).x, p.head(N).x)
    assert plain.spec.condition is None
    assert len({data.fingerprint, changed.fingerprint, plain.fingerprint}) == 3
    # The same numbers mean something else as a sequence of another shape.
    assert load_data((x, c.reshape(N, 6, 5))).fingerprint != load_data((x, c.reshape(N, 5, 6))).fingerprint


def test_8bit_pictures_become_real_and_all_else_stays() -> None:
    x = pictures()
    c = np.random.default_rng(0).integers(0, 256, (N, 3, 2, 2)).astype(np.uint8)
    c[0, 0, 0], c[0, 0, 1] = 0, 255
    expected = c.astype(np.float32) / np.float32(127.5) - 1
    assert expected.min() == -1.0
    assert expected.max() == 1.0
    check_aligned(load_data((x, c)), expected)
    check_aligned(load_data((x, c > 127)), (c > 127).astype(np.float32))
    check_aligned(load_data((x, c.astype(np.float64))), c.astype(np.float32))
    check_aligned(load_data((x, c[:, 0]), condition="sequence"), c[:, 0].astype(np.float32))
    spec = DataSpec(kind="image", shape=(1, 4, 4), condition=ConditionSpec(kind="image", shape=(3, 2, 2)))
    model = create("toy-regression", spec, conditional=True)
    given = model._conditions(torch.from_numpy(c[:2]), 2)  # the same at sampling
    assert given is not None
    assert np.array_equal(given.numpy(), expected[:2])


def test_signals_need_to_be_told() -> None:
    x = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None], (N, 2, 8)).copy()
    c = numbers(N, 3, 4)
    with pytest.raises(UsageError, match=r"condition='image' \(\(N, C, L\)\) or condition='sequence' \(N, L, d\)"):
        load_data((x, c))
    for name in ("image", "sequence"):
        data = load_data((x, c), condition=name)
        assert data.spec.condition == ConditionSpec(kind=name, shape=(3, 4))
        check_aligned(data, c)


@pytest.mark.parametrize(
    ("c", "options", "error", "words"),
    [
        (numbers(N - 1, 2, 3, 5), {}, DataError, "40 examples, but 39 conditions"),
        (numbers(N, 2, 3, 5, 1), {}, DataError, r"an image condition of image data is \(N, C, H, W\)"),
        (numbers(N, 3, 5), {"condition": "image"}, DataError, r"is \(N, C, H, W\), as they are, not float32 \(40, 3,"),
        (numbers(N, 3), {"condition": "sequence"}, DataError, r"sequences are numbers \(N, L, d\), not float32 \(40,"),
        (numbers(N, 2, 3, 5), {"condition": "attributes"}, DataError, r"attributes are numbers \(N,\) or \(N, K\)"),
        (numbers(N, 0, 3), {}, DataError, "is empty"),
        (np.zeros((N, 3, 5), np.int64), {}, UsageError, "condition='image'"),
        (np.zeros((N, 3, 5), np.uint8), {}, UsageError, "condition='image'"),
        (np.zeros((N, 1, 3, 5), np.int64), {}, DataError, "convert 8-bit pictures to uint8"),
        (np.zeros((N, 5, 6, 3), np.uint8), {}, DataError, r"looks like \(N, H, W, C\).*transpose"),
        (np.zeros((N, 3, 5), complex), {"condition": "sequence"}, DataError, "sequences are numbers"),
        (np.full((N, 3, 5), "a"), {"condition": "sequence"}, DataError, "sequences are numbers"),
        (np.full((N, 1, 3, 5), np.nan), {}, DataError, "image condition of array holds 600 NaN"),
        (np.full((N, 3, 5), np.inf), {}, DataError, "0 NaN and 600 infinite"),
        (np.full((N, 3), 1e60), {}, DataError, "120 infinite"),  # beyond single precision
        (numbers(N, 3, 5), {"test": (pictures(5) + N, numbers(5, 3, 4))}, DataError, "conditions of the test set are"),
        (numbers(N, 3, 5), {"test": pictures(5) + N}, DataError, "the test set has none"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_unusable_conditions(c: np.ndarray, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        load_data((pictures(), c), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (pictures(), "array has no condition; give it as the pair"),
        ("digits", "a built-in data set has none; give the pair"),
    ],
)
def test_conditions_that_are_not_there(source: Any, words: str, tmp_path: Path) -> None:
    for condition in ("image", "sequence"):
        with pytest.raises(UsageError, match=words):
            load_data(source, condition=condition)
    tmp_path.joinpath("a").mkdir()
    with pytest.raises(UsageError, match="a folder of pictures has none"):
        load_data(tmp_path / "a", condition="image")


def test_points_have_no_grid_for_an_image() -> None:
    x = numbers(N, 3)
    with pytest.raises(DataError, match="an image cannot be the condition of points data"):
        load_data((x, numbers(N, 1, 2, 2)))
    assert load_data((x, numbers(N, 5, 2))).spec.condition == ConditionSpec(kind="sequence", shape=(5, 2))


def test_test_sets_bring_their_conditions(tmp_path: Path) -> None:
    x, c = pictures(), numbers(N, 3, 5)
    np.savez(tmp_path / "a.npz", x_train=x[:30], condition_train=c[:30], x_test=x[30:], condition_test=c[30:])
    for data in (load_data(tmp_path / "a.npz"), load_data((x[:30], c[:30]), test=(x[30:], c[30:]))):
        check_aligned(data, c)
        assert sorted(data.test.head(N).x[:, 0, 0, 0].tolist()) == list(range(30, 40))


def test_labels_and_a_condition_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=pictures(), y=np.arange(N) % 2, condition=numbers(N, 3, 5))
    with pytest.raises(DataError, match="holds both 'y' and 'condition': say which with label=y or condition"):
        load_data(path)
    for label, kind in (("y", "class"), ("condition", "sequence")):
        condition = load_data(path, label=label).spec.condition
        assert condition is not None
        assert condition.kind == kind


def test_examples_for_another_condition_are_refused(tmp_path: Path) -> None:
    spec = load_data((pictures(), numbers(N, 3, 5))).spec
    for c, words in ((numbers(N, 3, 4), "the condition is sequence 3x4"), (numbers(9, 3, 5), "but 9 conditions")):
        np.savez(tmp_path / "b.npz", x=pictures(), condition=c)
        with pytest.raises(DataError, match=words):
            load_examples(str(tmp_path / "b.npz"), spec)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "class"},
        {"kind": "class", "names": ("a",), "shape": (1, 2)},
        {"kind": "image", "names": ("a",), "shape": (1, 2)},
        {"kind": "image"},
        {"kind": "sequence", "shape": (1, 2, 3)},
        {"kind": "sequence", "shape": (0, 2)},
    ],
)
def test_a_spec_has_what_its_kind_has(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ConditionSpec(**fields)
    with pytest.raises(ValidationError, match="cannot be the condition"):
        DataSpec(kind="signal", shape=(1, 8), condition=IMAGE)


def test_specs_of_classes_are_written_as_they_were() -> None:
    """A new field would change the content hash of every labelled data set, and the id of every extractor."""
    spec = ConditionSpec(kind="class", names=("a", "b"))
    assert spec.model_dump_json() == '{"kind":"class","names":["a","b"]}'
    assert IMAGE.model_dump_json() == '{"kind":"image","shape":[2,3,5]}'
    for condition in (spec, IMAGE, SEQUENCE):
        assert ConditionSpec.model_validate_json(condition.model_dump_json()) == condition


# -- models ----------------------------------------------------------------------------------------------------------


def make_model(condition: ConditionSpec) -> Regression:
    spec = DataSpec(kind="image", shape=(1, 4, 4), condition=condition)
    return Regression(spec, name="toy-regression", conditional=True)


@pytest.mark.parametrize("condition", [IMAGE, SEQUENCE], ids=lambda c: c.kind)
def test_a_model_with_array_conditions_keeps_every_promise(condition: ConditionSpec) -> None:
    check_model(make_model(condition))


def test_models_without_such_conditions_refuse_them() -> None:
    spec = DataSpec(kind="image", shape=(1, 4, 4), condition=IMAGE)
    with pytest.raises(CapabilityError, match=r"kde cannot be conditioned on an image; .*toy-regression"):
        create("kde", spec, conditional=True)
    assert create("kde", spec).condition is None


def test_conditions_of_samples_are_checked() -> None:
    for condition, name in ((IMAGE, "an image 2x3x5"), (SEQUENCE, "a sequence 6x3")):
        model, shape = make_model(condition), condition.value_shape
        with pytest.raises(UsageError, match=f"is conditional: give {name}"):
            model._conditions(None, 4)
        for wrong in ((3, *shape), shape[1:], (4, *shape, 1)):
            with pytest.raises(UsageError, match=r"the condition has shape .* expected"):
                model._conditions(torch.zeros(wrong), 4)
        bad = torch.zeros(4, *shape)
        bad[2, 1, 1] = torch.inf
        with pytest.raises(UsageError, match="NaN, infinite or complex"):
            model._conditions(bad, 4)
        one = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        given = model._conditions(one, 4)
        assert given is not None
        assert given.dtype == model.dtype
        assert torch.equal(given, one.float().expand(4, *shape))
        (example,) = model.example_condition(2)
        assert torch.equal(example, torch.zeros(2, *shape))


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A run on pictures that are twice the condition's first numbers, and its data."""
    folder = tmp_path_factory.mktemp("regression")
    c = numbers(400, 1, 2, 2)
    x = np.repeat(np.repeat(2.0 * c + 1.0, 3, axis=2), 3, axis=3) + 0.05 * numbers(400, 1, 6, 6, seed=1)
    np.savez(folder / "data.npz", x=x, condition=c)
    data = load_data(folder / "data.npz")
    settings: dict[str, Any] = {**QUICK, "steps": 150, "batch_size": 64, "checkpoint_steps": 50}
    train(create("toy-regression", data.spec, conditional=True), data, out=folder / "run", **settings)
    return folder / "run", x, c


def test_a_model_learns_from_its_conditions(regression: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """Upsampling is learned only if conditions and examples stay together through training, saving and loading."""
    run, x, c = regression
    got = load(run).sample(len(c), torch.from_numpy(c), generator=0)
    assert (got - torch.from_numpy(x)).square().mean().sqrt() < 0.3  # the standard deviation of x is 2


def test_resuming_needs_the_same_conditions(regression: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    run, x, c = regression
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "model")
    (cut / "status.json").unlink()
    for path in [*list_checkpoints(cut / "checkpoints"), *list_checkpoints(cut / "best")]:
        if path.name > "step-00000050":
            shutil.rmtree(path)
    with pytest.raises(UsageError, match="the content hash differs"):
        resume(cut, (x, -c), show=False)
    resume(cut, show=False)  # from the file, whose conditions are the same
    seeds = {"generator": 3}
    condition = torch.from_numpy(c[:5])
    assert torch.equal(load(cut).sample(5, condition, **seeds), load(run).sample(5, condition, **seeds))


# -- command line ------------------------------------------------------------------------------------------------------


def test_sample_takes_exactly_the_conditions_of_a_file(
    regression: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, c = regression
    model, out = load(run), tmp_path / "out.npz"
    np.save(tmp_path / "six.npy", c[:6])
    np.save(tmp_path / "one.npy", c[7])
    np.savez(tmp_path / "six.npz", x=np.zeros(3), condition=c[:6])
    for file, condition in (("six.npy", c[:6]), ("six.npz", c[:6]), ("one.npy", c[[7] * 6])):
        file_path = str(tmp_path / file)
        assert cli(["sample", str(run), "-n", "6", "--condition", file_path, "--out", str(out), "--seed", "4"]) == 0
        written = np.load(out)
        expected = model.sample(6, torch.from_numpy(condition), generator=4)
        assert np.array_equal(written["x"], expected.numpy())
        assert np.array_equal(written["condition"], condition)
    assert cli(["score", str(run), str(out)]) == 0  # what was written can be read again
    assert cli(["sample", str(run), "-n", "6", "--condition", str(tmp_path / "six.npy")]) == 0
    assert (run / "samples-n6-seed0-six.png").is_file()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("array", "arguments", "words"),
    [
        (None, [], "is conditioned on image 1x2x2: give --condition FILE.npy"),
        (None, ["--label", "3"], "is conditioned on image 1x2x2; give --condition"),
        (np.zeros((5, 1, 2, 2)), [], "(5, 1, 2, 2); the condition is image 1x2x2: give one for all, (1, 2, 2), or"),
        (np.zeros((6, 1, 2, 3)), [], "(6, 1, 2, 3)"),
        (np.full((6, 1, 2, 2), np.nan), [], "NaN, infinite or complex"),
        (np.full((6, 1, 2, 2), "a"), [], "numbers are needed"),
        (np.zeros((6, 1, 2, 2)), ["--label", "3"], "--label and --condition"),
    ],
)
def test_sample_refuses_other_conditions(
    array: np.ndarray | None,
    arguments: list[str],
    words: str,
    regression: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if array is not None:
        np.save(tmp_path / "c.npy", array)
        arguments = [*arguments, "--condition", str(tmp_path / "c.npy")]
    assert cli(["sample", str(regression[0]), "-n", "6", "--out", str(tmp_path / "a.npy"), *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a.npy").exists()


def test_sample_refuses_files_that_hold_no_conditions(
    regression: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    (tmp_path / "c.csv").write_text("1,2\n")
    for name, words in (
        ("two.npz", "call the conditions 'condition'"),
        ("c.csv", ".npy and .npz"),
        ("no.npy", "exist"),
    ):
        assert cli(["sample", str(regression[0]), "--condition", str(tmp_path / name)]) in (1, 2)
        assert words in capsys.readouterr().err


def test_sample_with_vectors_and_of_models_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, c = numbers(N, 2), numbers(N, 3)
    np.savez(tmp_path / "a.npz", x=x, condition=c)
    np.save(tmp_path / "c.npy", c[0])
    for name, settings in (("vector", ["conditional=true"]), ("plain", [])):
        arguments = ["train", "toy-regression", str(tmp_path / "a.npz"), *settings, "--steps", "2"]
        assert cli([*arguments, "--out", str(tmp_path / name)]) == 0
    sample = ["sample", str(tmp_path / "vector"), "-n", "3", "--out", str(tmp_path / "x.csv")]
    capsys.readouterr()
    assert cli([*sample, "--condition", str(tmp_path / "c.npy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["condition"] == str(tmp_path / "c.npy")
    rows = (tmp_path / "x.csv").read_text().splitlines()
    assert rows[0] == "x0,x1,y0,y1,y2"
    assert np.array_equal(np.array(rows[3].split(",")[2:], np.float32), c[0])
    assert cli(sample) == 2
    assert "conditioned on the vector y0, y1, y2: give --condition" in capsys.readouterr().err
    assert cli(["sample", str(tmp_path / "plain"), "--condition", str(tmp_path / "c.npy")]) == 2
    assert "was trained without a condition" in capsys.readouterr().err
