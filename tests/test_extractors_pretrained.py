"""Inception and DINOv2: resizing, pooling and positions against brute force, what is loaded and what is refused."""

from __future__ import annotations

import importlib
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trilemma.core.errors import CheckpointError, DataError, MissingExtraError, UsageError
from trilemma.core.noise import make_generator
from trilemma.core.spec import ConditionSpec, DataSpec
from trilemma.core.storage import write_tensors
from trilemma.metrics import FeatureExtractor, dinov2, inception, load_extractor
from trilemma.metrics.dinov2 import DinoV2, resize_positions
from trilemma.metrics.encoders import LinearEncoder
from trilemma.metrics.inception import Inception, mean_pool, resize
from trilemma.metrics.pretrained import read_weights

RGB = DataSpec(kind="image", shape=(3, 6, 8), levels=256)
GREY = DataSpec(kind="image", shape=(1, 6, 8), levels=256)


def pictures(spec: DataSpec, n: int = 2) -> Tensor:
    return torch.randint(0, 256, (n, *spec.shape), generator=make_generator(0, "pictures"), dtype=torch.uint8)


def random_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Random weights of the network's names and shapes that keep the size of activations."""
    generator = make_generator(0, "weights")
    tensors = {}
    for name, tensor in network.state_dict().items():
        z = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and "token" not in name and "position" not in name:
            z *= math.sqrt(2.0 / tensor[0].numel())
        elif "var" in name or (tensor.ndim == 1 and "bias" not in name and "mean" not in name):
            z = 0.5 + torch.rand(tensor.shape, generator=generator)
        else:
            z *= 0.1
        tensors[name] = z
    return tensors


def tiny_dinov2(grid: int = 16, swiglu: bool = False) -> dict[str, Tensor]:
    return random_tensors(DinoV2(dim=128, depth=2, hidden=96, patch=14, grid=grid, swiglu=swiglu))


@pytest.fixture(scope="module")
def inception_tensors() -> dict[str, Tensor]:
    return random_tensors(Inception())


@pytest.fixture(scope="module")
def inception_file(inception_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    write_tensors(path, inception_tensors)
    return path


@pytest.fixture
def dinov2_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_tensors(path, tiny_dinov2())
    return path


# -- the steps before and inside the networks ----------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 11), (9, 6, 4), (1, 3, 5), (6, 6, 6)])
def test_resize_is_tensorflow_1s(height: int, width: int, side: int) -> None:
    x = pictures(DataSpec(kind="image", shape=(2, height, width), levels=256)).double()
    expected = torch.zeros(2, 2, side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            u, v = i * height / side, j * width / side
            top, left = int(u), int(v)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            s, t = u - top, v - left
            upper = (1 - t) * x[..., top, left] + t * x[..., top, right]
            lower = (1 - t) * x[..., bottom, left] + t * x[..., bottom, right]
            expected[..., i, j] = (1 - s) * upper + s * lower
    torch.testing.assert_close(resize(x, side).double(), expected, rtol=0, atol=1e-3)  # single precision of 0 .. 255
    if height == width == side:
        assert torch.equal(resize(x, side), x.float())


def test_mean_pooling_does_not_count_the_padding() -> None:
    x = torch.randn(1, 2, 4, 5, generator=make_generator(0), dtype=torch.float64)
    for i in range(4):
        for j in range(5):
            window = x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            torch.testing.assert_close(mean_pool(x)[..., i, j], window.mean((2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Mixed_7b", "Mixed_7c"])
def test_only_the_last_block_pools_by_the_maximum(name: str) -> None:
    block = Inception().get_submodule(name).requires_grad_(False)
    branch = block.get_submodule("branch_pool")
    inputs = branch.conv.weight.shape[1]
    branch.conv.weight.copy_(torch.eye(192, inputs).view(192, inputs, 1, 1))
    x = torch.rand(1, inputs, 3, 3, generator=make_generator(0))
    window = x[0, :192, :2, :2].flatten(1)  # what the corner sees
    expected = window.amax(1) if name == "Mixed_7c" else window.mean(1)
    torch.testing.assert_close(block(x)[0, -192:, 0, 0], expected / math.sqrt(1.001))


def test_inception_has_the_published_size_and_names() -> None:
    network = Inception()
    # Keras gives 21,802,784 for the convolutions and 3 x 17,216 numbers of normalization; ours has 2 x that as weights.
    assert sum(p.numel() for p in network.parameters()) == 21_802_784 - 17_216
    names = set(network.state_dict())
    assert len(names) == 94 * 5
    assert names >= {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch5x5_2.bn.running_mean",
        "Mixed_6a.branch3x3.conv.weight",
        "Mixed_6b.branch7x7dbl_5.conv.weight",
        "Mixed_7a.branch7x7x3_4.bn.running_var",
        "Mixed_7b.branch3x3_2a.conv.weight",
        "Mixed_7c.branch3x3dbl_3b.bn.bias",
        "Mixed_7c.branch_pool.bn.weight",
    }


def cubic(t: float) -> float:
    """The cubic convolution kernel with a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("grid", [37, 16, 5])
def test_positions_are_resized_as_in_the_original_code(grid: int) -> None:
    positions = torch.randn(1, 1 + grid**2, 3, generator=make_generator(0), dtype=torch.float64)
    resized = resize_positions(positions, 16)
    if grid == 16:
        assert torch.equal(resized, positions)
        return
    weights = torch.zeros(16, grid, dtype=torch.float64)
    for i in range(16):
        source = (i + 0.5) * grid / 16.1 - 0.5
        for j in range(math.floor(source) - 1, math.floor(source) + 3):
            weights[i, min(max(j, 0), grid - 1)] += cubic(source - j)
    patches = positions[0, 1:].view(grid, grid, 3)
    expected = torch.einsum("ia,jb,abc->ijc", weights, weights, patches)
    torch.testing.assert_close(resized[0, 1:], expected.reshape(256, 3), rtol=1e-9, atol=1e-9)
    assert torch.equal(resized[0, 0], positions[0, 0])


# -- features ------------------------------------------------------------------------------------------------------


def test_features_are_the_networks_and_grey_is_rgb_repeated(inception_file: Path, dinov2_file: Path) -> None:
    grey = pictures(GREY)
    for make, path, dim, name in ((inception, inception_file, 2048, "FID"), (dinov2, dinov2_file, 128, "FD-DINOv2")):
        of_rgb, of_grey = make(RGB, path), make(GREY, path)
        h = of_grey(grey)
        assert torch.equal(h, of_rgb(grey.repeat(1, 3, 1, 1)))
        assert h.shape == (2, dim)
        assert h.dtype == torch.float64
        assert of_grey.dim == dim
        assert of_grey.frechet_name == name
        assert torch.equal(h, of_grey._encoder.network(grey.repeat(1, 3, 1, 1)).double())  # no scale
        assert 0.01 < float((h[0] - h[1]).norm() / h.norm()) < 2.0  # not degenerate: pictures differ


def test_only_the_two_networks_have_names_of_their_own() -> None:
    assert FeatureExtractor("pixel-pca", RGB, LinearEncoder(RGB, 2)).frechet_name == "Fréchet distance"


def test_features_do_not_depend_on_the_batch(dinov2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, x = dinov2(RGB, dinov2_file), pictures(RGB, 5)
    whole = extractor(x)
    monkeypatch.setattr(extractor._encoder, "max_batch", 2)
    torch.testing.assert_close(extractor(x), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec(kind="image", shape=(3, 6, 8)),
        DataSpec(kind="image", shape=(1, 8, 8), levels=17),
        DataSpec(kind="image", shape=(4, 6, 8), levels=256),
        DataSpec(kind="signal", shape=(3, 8), levels=256),
        DataSpec(kind="points", shape=(2,)),
    ],
)
def test_other_data_are_refused_before_any_weights_are_read(spec: DataSpec) -> None:
    for make in (inception, dinov2):
        with pytest.raises(DataError, match="8-bit pictures with 1 or 3 channels, not of " + spec.describe()):
            make(spec, Path("does-not-exist.safetensors"))


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ""])
def test_files_that_can_run_code_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save({"a": torch.zeros(1)}, path)
    for make in (inception, dinov2):
        with pytest.raises(UsageError, match=r"can run code: only \.safetensors .* docs/extractors\.md") as caught:
            make(RGB, path)
        assert "\n" not in str(caught.value)


def test_the_documented_conversion_works(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "extractors.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("python -c")]
    _, *arguments = shlex.split(line)
    tensors = tiny_dinov2()
    torch.save(tensors, tmp_path / arguments[-2])
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    read = read_weights(tmp_path / arguments[-1])
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file.*docs/extractors\.md"):
        dinov2(RGB, tmp_path / "none.safetensors")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        inception(RGB, path)


def test_inception_refuses_other_tensors(inception_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    without = {k: v for k, v in inception_tensors.items() if k != "Mixed_6b.branch1x1.conv.weight"}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (without, r"missing \['Mixed_6b.branch1x1.conv.weight'\], unexpected \[\]"),
        (inception_tensors | {"AuxLogits.fc.bias": torch.zeros(1000)}, r"unexpected \['AuxLogits.fc.bias'\]"),
        (inception_tensors | {"fc.weight": torch.zeros(1000, 2048)}, "another Inception-v3"),
        (inception_tensors | {"Mixed_5b.branch_pool.bn.bias": torch.zeros(31)}, r"has shape \(31,\), not \(32,\)"),
    ]
    for tensors, message in cases:
        write_tensors(path, tensors)
        with pytest.raises(CheckpointError, match=message):
            inception(RGB, path)


def test_what_features_do_not_need_is_left_out(
    inception_tensors: dict[str, Tensor], inception_file: Path, dinov2_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "more.safetensors"
    more = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(3)}
    write_tensors(path, inception_tensors | more | counter)
    assert inception(RGB, path).id == inception(RGB, inception_file).id
    write_tensors(path, tiny_dinov2() | {"embeddings.mask_token": torch.zeros(1, 128)})
    assert dinov2(RGB, path).id == dinov2(RGB, dinov2_file).id


def test_dinov2_refuses_other_tensors(tmp_path: Path) -> None:
    path, good = tmp_path / "weights.safetensors", tiny_dinov2()
    positions, projection = "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"
    key = "encoder.layer.1.attention.attention.key.bias"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"pos_embed": torch.zeros(1, 5, 64)}, r"position_embeddings is missing; .*docs/extractors\.md"),
        ({k: v for k, v in good.items() if k != key}, rf"missing \['{key}'\]"),
        (good | {"embeddings.register_tokens": torch.zeros(1, 4, 128)}, "unexpected .*register_tokens"),
        (good | {positions: torch.zeros(1, 8, 128)}, "no DINOv2 has"),
        (good | {projection: torch.zeros(128, 1, 14, 14)}, "no DINOv2 has"),
        (good | {projection: torch.zeros(128, 3, 15, 15)}, "no DINOv2 has"),
    ]
    for tensors, message in cases:
        write_tensors(path, tensors)
        with pytest.raises(CheckpointError, match=message):
            dinov2(RGB, path)


def test_saved_extractors_come_back_with_their_id(inception_file: Path, dinov2_file: Path, tmp_path: Path) -> None:
    x = pictures(RGB)
    for extractor in (inception(RGB, inception_file), dinov2(RGB, dinov2_file)):
        extractor.save(tmp_path / extractor.kind)
        loaded = load_extractor(tmp_path / extractor.kind)
        assert (loaded.id, loaded.kind, loaded.frechet_name) == (extractor.id, extractor.kind, extractor.frechet_name)
        assert torch.equal(loaded(x), extractor(x))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("grid", [16, 4])
def test_sizes_are_read_from_the_file(tmp_path: Path, grid: int, swiglu: bool) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, tiny_dinov2(grid, swiglu))
    extractor = dinov2(RGB, path)
    extractor.save(tmp_path / "saved")
    assert torch.equal(load_extractor(tmp_path / "saved")(pictures(RGB)), extractor(pictures(RGB)))


def test_the_id_covers_weights_spec_and_preprocessing(
    dinov2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dinov2(RGB, dinov2_file)
    tensors = tiny_dinov2()
    tensors["layernorm.bias"][0] += 1e-6
    write_tensors(tmp_path / "other.safetensors", tensors)
    labelled = RGB.model_copy(update={"condition": ConditionSpec(kind="class", names=("a", "b"))})
    ids = {first.id, dinov2(RGB, tmp_path / "other.safetensors").id, dinov2(labelled, dinov2_file).id}
    monkeypatch.setattr(DinoV2, "preprocessing", "another")
    ids.add(dinov2(RGB, dinov2_file).id)
    assert len(ids) == 4
    assert dinov2(GREY, dinov2_file).id not in ids


def test_global_random_numbers_are_left_alone(inception_file: Path) -> None:
    state = torch.get_rng_state()
    inception(RGB, inception_file)
    assert torch.equal(torch.get_rng_state(), state)


# -- the weights of torch-fidelity ---------------------------------------------------------------------------------

FIDELITY = "torch_fidelity.feature_extractor_inceptionv3"


def test_without_a_file_the_weights_are_torch_fidelitys(
    inception_tensors: dict[str, Tensor], inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        def __init__(self, name: str, features_list: list[str]) -> None:
            assert features_list == ["2048"]

        def state_dict(self) -> dict[str, Tensor]:
            return inception_tensors | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}

    monkeypatch.setitem(sys.modules, FIDELITY, SimpleNamespace(FeatureExtractorInceptionV3=Fake))
    assert inception(RGB).id == inception(RGB, inception_file).id


def test_what_is_said_without_torch_fidelity_or_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, features_list: list[str]) -> None:
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, FIDELITY, SimpleNamespace(FeatureExtractorInceptionV3=unreachable))
    with pytest.raises(UsageError, match=r"no network.*docs/extractors\.md"):
        inception(RGB)
    monkeypatch.setitem(sys.modules, FIDELITY, None)
    with pytest.raises(MissingExtraError, match=r"weights= .*\.safetensors.* or pip install torch-fidelity"):
        inception(RGB)


def test_module_and_function_share_a_name() -> None:
    assert importlib.import_module("trilemma.metrics.inception").Inception is Inception
