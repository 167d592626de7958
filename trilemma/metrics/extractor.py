"""`FeatureExtractor`: the frozen map from data to the features in which distances are taken.

It is fitted on the real training split only, never on held-out data, and never taken from a model that takes
part in the comparison; or it is a published network. `id` is a hash of all that the features depend on; numbers
taken with different extractors are not comparable, and the id is how one can tell.

    labelled pictures, signals      a small classifier's penultimate layer
    unlabelled pictures, signals    a denoising autoencoder's bottleneck
    tables, points, volumes         standardized, categories one-hot, then PCA-whitened
    `pixel_pca`, for any data       principal components of the raw values, a second opinion without a network
    `inception`, 8-bit pictures     the network that defines FID
    `dinov2`, 8-bit pictures        the network that defines FD-DINOv2
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trilemma.core.codec import check_data
from trilemma.core.errors import CheckpointError, DataError
from trilemma.core.noise import hash_key
from trilemma.core.spec import DataSpec, Split
from trilemma.core.storage import load_state, parse_tensors, read_manifest, staged_folder, write_manifest, write_tensors
from trilemma.metrics.dinov2 import DinoV2, dinov2_weights
from trilemma.metrics.encoders import (
    KEEP_VARIANCE,
    ConvEncoder,
    Encoder,
    LinearEncoder,
    examples,
    train_classifier,
    train_denoiser,
)
from trilemma.metrics.inception import Inception, inception_weights, torch_fidelity_weights
from trilemma.metrics.pretrained import PretrainedEncoder, check_pictures, empty_network, read_weights, takes

ExtractorKind = Literal["classifier", "denoiser", "whitened-pca", "pixel-pca", "inception", "dinov2"]

DIM = 64
"""Features of a network, and the most that `pixel_pca` keeps."""
MAX_WHITENED = 128
STEPS = 400
"""Training steps of a network."""
MAX_EXAMPLES = 10_000
"""Examples from which scales and principal components come; splits are in random order, so any part is a fair one."""
MAX_HELD_OUT = 2_000

_LAYERS: dict[ExtractorKind, str] = {
    "classifier": "penultimate",
    "denoiser": "bottleneck",
    "whitened-pca": "components / sqrt(variance)",
    "pixel-pca": "components",
    "inception": Inception.layer,
    "dinov2": DinoV2.layer,
}


class FeatureExtractor:
    """A frozen map x (N, *spec.shape), in data units, -> features (N, dim), float64.

    Attributes:
        id: 16 hex digits of a SHA-256 over kind, layer, dtype, spec, preprocessing and weights.
        kind: which of the six it is.
        spec: of the data.
        dim: number of features.
        accuracy: a classifier's share of right answers on training examples it did not see, else None.
        notes: what a person should know, one sentence each.
    """

    def __init__(
        self,
        kind: ExtractorKind,
        spec: DataSpec,
        encoder: Encoder,
        *,
        accuracy: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.spec, self.dim = kind, spec, encoder.dim
        self.accuracy, self.notes = accuracy, notes
        self._encoder = encoder.eval().requires_grad_(False)
        self.id = self._hash()

    def __call__(self, x: Tensor) -> Tensor:
        """Features (N, dim) of x (N, *spec.shape), in float64 on the CPU.

        Raises:
            DataError: x is not data of this spec (shape, range, NaN).
        """
        check_data(self.spec, x)
        return self._map(self._encoder, x)

    @property
    def is_pretrained(self) -> bool:
        """Whether its weights come from a file; such networks are large, and their features worth keeping."""
        return isinstance(self._encoder, PretrainedEncoder)

    def smooth(self, x: Tensor) -> Tensor:
        """Features of data whose levels are not rounded to integers (`GenerativeModel.decode(rounded=False)`)."""
        return self._map(self._encoder, x)

    def logits(self, x: Tensor) -> Tensor:
        """A classifier's logits (N, classes) of x (N, *spec.shape)."""
        encoder = self._encoder
        assert isinstance(encoder, ConvEncoder), f"a {self.kind} has no classes"
        return self._map(lambda part: encoder.head(encoder.features(part)), x)

    def _map(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        size = max(1, min(self._encoder.max_batch, 2**24 // self.spec.dims))
        with torch.no_grad():
            return torch.cat([function(part.cpu()) for part in torch.split(x, size)])

    @property
    def frechet_name(self) -> str:
        """What the Fréchet distance in these features is called: "FID" and "FD-DINOv2" are of one network each."""
        encoder = self._encoder
        return encoder.network.frechet_name if isinstance(encoder, PretrainedEncoder) else "Fréchet distance"

    def describe(self) -> str:
        """In words: "classifier 3f2a..., 64 features, 98.4% right on held-out training examples"."""
        text = f"{self.kind} {self.id}, {self.dim} features"
        return text if self.accuracy is None else f"{text}, {self.accuracy:.1%} right on held-out training examples"

    def save(self, path: Path) -> None:
        """Write to the new or empty folder `path`."""
        with staged_folder(path) as stage:
            write_tensors(stage / "extractor.safetensors", self._encoder.state_dict())
            write_manifest(stage, self._header() | {"id": self.id, "accuracy": self.accuracy, "notes": self.notes})

    def _header(self) -> dict[str, Any]:
        header = {
            "extractor": self.kind,
            "layer": _LAYERS[self.kind],
            "dtype": "float64" if isinstance(self._encoder, LinearEncoder) else "float32",
            "dim": self.dim,
            "spec": self.spec.model_dump(mode="json"),
        }
        if isinstance(self._encoder, PretrainedEncoder):
            header["preprocessing"] = self._encoder.network.preprocessing
        return header

    def _hash(self) -> str:
        h = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for name, tensor in sorted(self._encoder.state_dict().items()):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            h.update(tensor.cpu().contiguous().numpy().tobytes())
        return h.hexdigest()[:16]


def load_extractor(path: Path) -> FeatureExtractor:
    """Load what `FeatureExtractor.save` wrote.

    Raises:
        CheckpointError: missing, damaged, or its features would not be those of its id.
    """
    manifest, content = read_manifest(path)
    try:
        kind, spec = manifest["extractor"], DataSpec.model_validate(manifest["spec"])
        tensors = parse_tensors(content["extractor.safetensors"], path)
        encoder = _make_encoder(kind, spec, int(manifest["dim"]), tensors)
        load_state(encoder, tensors, str(path))
        extractor = FeatureExtractor(kind, spec, encoder, accuracy=manifest["accuracy"], notes=tuple(manifest["notes"]))
        saved_id = manifest["id"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a feature extractor of this version: {error}") from error
    if extractor.id != saved_id:
        raise CheckpointError(
            f"{path}: the extractor's id is {extractor.id}, its manifest says {saved_id}; fit it again"
        )
    return extractor


def fit_extractor(train: Split, spec: DataSpec, *, seed: int, steps: int = STEPS) -> FeatureExtractor:
    """Fit the default extractor of this kind of data.

    The same data and seed give the same extractor on the same machine and versions.

    Arguments:
        train: the real training split; nothing else may be seen.
        seed: of initial weights, order, augmentation and corruption.
        steps: of training, for networks.

    Raises:
        DataError: nothing varies in the data.
    """
    if spec.kind in ("points", "table", "volume"):
        return _fit_linear("whitened-pca", train, spec)
    labelled = _is_labelled(spec)
    # The last tenth measures the classifier's accuracy; splits are in random order.
    held_out = min(MAX_HELD_OUT, len(train) // 10) if labelled else 0
    n = len(train) - held_out
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_key(seed, "extractor", "init"))  # initial weights; the state is put back afterwards
        encoder = _make_encoder("classifier" if labelled else "denoiser", spec, DIM)
        assert isinstance(encoder, ConvEncoder)
        encoder.fit_codec(train, min(n, MAX_EXAMPLES))
        (train_classifier if labelled else train_denoiser)(encoder, train, n, steps, seed)
        encoder.fit_scale(train, min(n, MAX_EXAMPLES))
        if not labelled:
            return FeatureExtractor("denoiser", spec, encoder)
        extractor = FeatureExtractor("classifier", spec, encoder)
        if held_out:
            x, label = train.batch(torch.arange(n, len(train)))
            assert label is not None
            extractor.accuracy = float(torch.eq(extractor.logits(x).argmax(1), label).double().mean())
        return extractor


def pixel_pca(train: Split, spec: DataSpec, *, dim: int = DIM) -> FeatureExtractor:
    """Principal components of the raw values (of standardized, one-hot columns for tables), at most `dim`."""
    return _fit_linear("pixel-pca", train, spec, dim)


def inception(spec: DataSpec, weights: Path | None = None) -> FeatureExtractor:
    """The Inception-v3 of FID, 2048 features, for 8-bit pictures.

    Arguments:
        weights: a .safetensors file of its published weights (docs/extractors.md); without one they are those that
            the torch-fidelity package keeps or downloads.

    Raises:
        DataError: the data are no 8-bit pictures with 1 or 3 channels.
        UsageError: the file is of another kind or cannot be read, or torch-fidelity cannot fetch the weights.
        CheckpointError: the tensors are not those of this network.
        MissingExtraError: no file is given, and torch-fidelity is not installed.
    """
    check_pictures(spec)
    where = "the network of torch-fidelity" if weights is None else str(weights)
    tensors = torch_fidelity_weights() if weights is None else read_weights(Path(weights))
    return _pretrained("inception", spec, inception_weights(tensors, where), where)


def dinov2(spec: DataSpec, weights: Path) -> FeatureExtractor:
    """DINOv2's class token, for 8-bit pictures; 384, 768, 1024 or 1536 features by the size in the file.

    Arguments:
        weights: `model.safetensors` of facebook/dinov2-* (docs/extractors.md).

    Raises:
        DataError: the data are no 8-bit pictures with 1 or 3 channels.
        UsageError: the file is of another kind or cannot be read.
        CheckpointError: the tensors are not those of such a network.
    """
    check_pictures(spec)
    return _pretrained("dinov2", spec, dinov2_weights(read_weights(Path(weights))), str(weights))


def _pretrained(kind: ExtractorKind, spec: DataSpec, tensors: Mapping[str, Tensor], where: str) -> FeatureExtractor:
    network = empty_network(kind, tensors, where)
    load_state(network, tensors, where)
    return FeatureExtractor(kind, spec, PretrainedEncoder(spec, network))


def _is_labelled(spec: DataSpec) -> bool:
    return spec.condition is not None and spec.condition.kind == "class" and spec.condition.size > 1


def _make_encoder(
    kind: ExtractorKind, spec: DataSpec, dim: int, tensors: Mapping[str, Tensor] | None = None
) -> Encoder:
    """An encoder to fit or to load; a pretrained one takes its size from the saved tensors."""
    if kind in ("inception", "dinov2") and tensors is not None and takes(spec):
        saved = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
        return PretrainedEncoder(spec, empty_network(kind, saved, f"a saved {kind}"))
    if kind in ("whitened-pca", "pixel-pca"):
        return LinearEncoder(spec, dim)
    if kind == "denoiser":
        return ConvEncoder(spec, dim, outputs=0)
    if kind != "classifier" or spec.condition is None:
        raise ValueError(f"no extractor of kind {kind!r} for {spec.describe()}")
    return ConvEncoder(spec, dim, outputs=spec.condition.size)


def _fit_linear(kind: ExtractorKind, train: Split, spec: DataSpec, dim: int = MAX_WHITENED) -> FeatureExtractor:
    n = min(len(train), MAX_EXAMPLES)
    probe = LinearEncoder(spec, 1)
    probe.fit_codec(train, n)
    y = torch.cat([probe.inputs(x, torch.float64).flatten(1) for x in examples(train, n, spec.dims)])
    mean = y.mean(0)
    with _one_thread():
        values, vectors = torch.linalg.eigh((y - mean).T @ (y - mean) / len(y))
    values, vectors = values.flip(0), vectors.flip(1)
    varying = int((values > KEEP_VARIANCE * values.mean()).sum()) if values[0] > 0 else 0
    if varying == 0:
        raise DataError(f"nothing varies in the {n} training examples, so there are no features to compare by")
    kept = min(varying, dim)
    encoder = LinearEncoder(spec, kept)
    encoder.codec.load_state_dict(probe.codec.state_dict())
    encoder.mean.copy_(mean)
    whiten = values[:kept].rsqrt() if kind == "whitened-pca" else torch.ones(kept, dtype=torch.float64)
    encoder.projection.copy_(vectors[:, :kept] * whiten)
    encoder.fit_scale(train, n)
    notes = []
    if varying < len(values):
        notes.append(f"{len(values) - varying} of {len(values)} directions hardly vary and are left out")
    if kept < varying:
        share = float(values[:kept].sum() / values.sum())
        notes.append(f"the first {kept} of {varying} principal components are used, {share:.1%} of the variance")
    return FeatureExtractor(kind, spec, encoder, notes=tuple(notes))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in a fixed order: with several threads the last bits, and with them the id, depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
