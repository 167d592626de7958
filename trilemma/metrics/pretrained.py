"""Networks with published weights behind the interface of an encoder, and how a file of weights is read.

Weights are data: only `.safetensors` files are read, because loading a `.pth` file can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError
from trilemma.core.spec import DataSpec
from trilemma.core.storage import parse_tensors
from trilemma.metrics.dinov2 import DinoV2, dinov2_network
from trilemma.metrics.encoders import Encoder
from trilemma.metrics.inception import Inception


class PretrainedEncoder(Encoder):
    """A network on 8-bit pictures, grey ones repeated to RGB. Its scale stays 1: no data are seen."""

    max_batch = 32

    def __init__(self, spec: DataSpec, network: Inception | DinoV2) -> None:
        super().__init__(spec, network.dim)
        self.network = network

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.network(x.expand(-1, 3, -1, -1))
        return h


def takes(spec: DataSpec) -> bool:
    """Whether the data are 8-bit pictures with 1 or 3 channels."""
    return spec.kind == "image" and spec.is_8bit and spec.shape[0] in (1, 3)


def check_pictures(spec: DataSpec) -> None:
    """Raise a `DataError` unless a pretrained network takes such data."""
    if not takes(spec):
        raise DataError(
            f"pretrained features are of 8-bit pictures with 1 or 3 channels, not of {spec.describe()}; "
            "convert the data to 8-bit grey or RGB pictures, or use fit_extractor"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        UsageError: another kind of file, or one that cannot be read.
        CheckpointError: a damaged file.
    """
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path} is not read, because loading a {path.suffix or 'nameless'} file can run code: only .safetensors "
            "files are read, and docs/extractors.md has the line of Python that converts it"
        )
    try:
        return parse_tensors(path.read_bytes(), path)
    except OSError as error:
        raise UsageError(
            f"cannot read the weights {path}: {error.strerror}; docs/extractors.md says how to get them"
        ) from error


def empty_network(kind: str, tensors: Mapping[str, Tensor], where: str) -> Inception | DinoV2:
    """A network of the tensors' size whose weights are yet to be loaded.

    Raises:
        CheckpointError: the tensors' names or shapes are not those of a DINOv2.
    """
    with torch.device("meta"):  # draws no random numbers for weights that are replaced
        network = Inception() if kind == "inception" else dinov2_network(tensors, where)
    return network.to_empty(device="cpu")
