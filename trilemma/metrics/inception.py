r"""The Inception-v3 in whose features the Fréchet inception distance (FID) is defined.

    FID(P, Q) = |mu_P - mu_Q|^2 + tr(S_P + S_Q - 2 (S_P S_Q)^{1/2}),    mu, S the moments of h(x)

(Heusel et al. 2017, arXiv:1706.08500), with h the 2048 outputs of the last pooling of *one* network with *one* set
of weights: TensorFlow's "inception-2015-12-05" (Szegedy et al. 2015, arXiv:1512.00567). It differs from the
Inception-v3 of other libraries, and each difference moves the FID:
    mean pooling inside the blocks does not count the padding;
    the last block, Mixed_7c, pools by the maximum;
    pictures are resized to 299 x 299 as TensorFlow 1 did, without half-pixel centres:
        y_i = (1 - t) x_l + t x_h,    s = i n / 299,  l = floor(s),  h = min(l + 1, n - 1),  t = s - l;
    inputs are (x - 128) / 128, and there are 1008 classes.

Tensors are named as in the published conversions of these weights (`pt_inception-2015-12-05-6726825d` of
pytorch-fid, `weights-inception-2015-12-05-6726825d` of torch-fidelity). The classification layer `fc` lies behind
the features: a file may hold it, and it is not kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.core.errors import CheckpointError, MissingExtraError, UsageError

SIDE = 299
CLASSES = 1008
FEATURES = 2048

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel] | tuple[int, Kernel, int]
"""Of a branch: channels, kernel, and a stride other than 1. A stride of 1 pads to the same size, 2 does not pad."""


def resize(x: Tensor, side: int) -> Tensor:
    """Bilinear resizing of x (N, C, H, W) to (N, C, side, side) as in TensorFlow 1, in float32.

    Positions are rounded to single precision and rows are resized before columns, as there: the same bits.
    """
    x = x.float()
    for axis in (3, 2):
        n = x.shape[axis]
        position = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(n / side)
        low = position.long()
        t = (position - low).view(-1, *[1] * (3 - axis))
        a = x.index_select(axis, low)
        b = x.index_select(axis, (low + 1).clamp_max(n - 1))
        x = a + (b - a) * t
    return x


class _Norm(nn.Module):
    """Batch normalization with frozen statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)  # type: ignore[arg-type]


class _Conv(nn.Module):
    """Convolution without bias, normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = _Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def mean_pool(x: Tensor) -> Tensor:
    """3 x 3 means of x (N, C, H, W), over the pixels inside the picture only."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _Mixed(nn.Module):
    """Branches of convolutions and one of pooling, side by side.

    Arguments:
        inputs: channels.
        branches: the steps of each, by name.
        pool: "mean" or "max", followed by a 1 x 1 convolution to `pool_outputs` channels, or "stride", a maximum
            with stride 2 alone.
        forked: branches that end in 1 x 3 and 3 x 1 convolutions side by side, 384 channels each.
    """

    def __init__(
        self,
        inputs: int,
        branches: Mapping[str, list[Step]],
        pool: str,
        pool_outputs: int = 0,
        forked: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self._pool = pool
        self._paths: list[list[list[str]]] = []
        for branch, steps in branches.items():
            channels, path = inputs, []
            for i, step in enumerate(steps, 1):
                name = f"{branch}_{i}" if len(steps) > 1 or branch in forked else branch
                self.add_module(name, _branch_step(channels, *step))
                path.append([name])
                channels = step[0]
            if branch in forked:
                across, down = (f"{branch}_{len(steps) + 1}{side}" for side in "ab")
                self.add_module(across, _branch_step(channels, 384, (1, 3)))
                self.add_module(down, _branch_step(channels, 384, (3, 1)))
                path.append([across, down])
            self._paths.append(path)
        if pool_outputs:
            self.branch_pool = _Conv(inputs, pool_outputs, 1, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self._paths:
            h = x
            for names in path:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            outputs.append(h)
        if self._pool == "stride":
            outputs.append(F.max_pool2d(x, 3, 2))
        else:
            outputs.append(self.branch_pool(mean_pool(x) if self._pool == "mean" else F.max_pool2d(x, 3, 1, 1)))
        return torch.cat(outputs, 1)


def _branch_step(inputs: int, outputs: int, kernel: Kernel, stride: int = 1) -> _Conv:
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    return _Conv(inputs, outputs, kernel, stride, (sides[0] // 2, sides[1] // 2) if stride == 1 else 0)


def _block_a(inputs: int, pool: int) -> _Mixed:
    return _Mixed(
        inputs,
        {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]},
        "mean",
        pool,
    )


def _block_b(inputs: int) -> _Mixed:
    return _Mixed(inputs, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, "stride")


def _block_c(inputs: int, c: int) -> _Mixed:
    across, down = (1, 7), (7, 1)
    return _Mixed(
        inputs,
        {
            "branch1x1": [(192, 1)],
            "branch7x7": [(c, 1), (c, across), (192, down)],
            "branch7x7dbl": [(c, 1), (c, down), (c, across), (c, down), (192, across)],
        },
        "mean",
        192,
    )


def _block_d(inputs: int) -> _Mixed:
    return _Mixed(
        inputs,
        {"branch3x3": [(192, 1), (320, 3, 2)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]},
        "stride",
    )


def _block_e(inputs: int, pool: str) -> _Mixed:
    branches: dict[str, list[Step]] = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1)],
        "branch3x3dbl": [(448, 1), (384, 3)],
    }
    return _Mixed(inputs, branches, pool, 192, forked=("branch3x3", "branch3x3dbl"))


class Inception(nn.Module):
    """RGB pictures (N, 3, H, W) in 0 .. 255 -> features (N, 2048), float32."""

    layer = "pool3 2048"
    preprocessing = "to RGB, bilinear to 299 without half-pixel centres, (x - 128) / 128"
    frechet_name = "FID"
    dim = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, 1, 0)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, 1, 0)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, "mean")
        self.Mixed_7c = _block_e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = (resize(x, SIDE) - 128.0) / 128.0
        for name, module in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                h = F.max_pool2d(h, 3, 2)
            h = module(h)
        return h.mean((2, 3))


def inception_weights(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors that features need: without `fc` and the counters of training batches.

    Raises:
        CheckpointError: `fc` shows that these are the weights of another Inception-v3.
    """
    fc = tensors.get("fc.weight")
    if fc is not None and tuple(fc.shape) != (CLASSES, FEATURES):
        raise CheckpointError(
            f"{where}: fc.weight has shape {tuple(fc.shape)}, not {(CLASSES, FEATURES)}: another Inception-v3, whose "
            "distances are not FID; get the weights that docs/extractors.md names"
        )
    return {k: v for k, v in tensors.items() if k not in ("fc.weight", "fc.bias") and "num_batches_tracked" not in k}


def torch_fidelity_weights() -> dict[str, Tensor]:
    """The weights that the torch-fidelity package keeps, or downloads with its own loader.

    Raises:
        MissingExtraError: torch-fidelity is not installed, or does not work here.
        UsageError: it has no weights and cannot get them.
    """
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:  # a torchvision of another build raises RuntimeError
        raise MissingExtraError(
            f"no weights for the Inception-v3: torch-fidelity cannot be imported ({error}); pass weights= a "
            ".safetensors file (docs/extractors.md says how to get it), or pip install torch-fidelity"
        ) from error
    try:
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise UsageError(
            f"torch-fidelity cannot fetch the weights of the Inception-v3 ({error}); pass weights= a .safetensors "
            "file (docs/extractors.md says how to get it)"
        ) from error
    tensors: dict[str, Tensor] = network.state_dict()
    return tensors
