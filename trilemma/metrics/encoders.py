r"""The networks behind the feature extractors, and how they are trained.

Labelled pictures and signals: a small convolutional classifier, cross-entropy,
    min E [ -log softmax(W h(y))_c ],
whose penultimate layer h is the feature. Pictures are turned, scaled and shifted a little while it trains
(signals get a little noise), so that it generalises from few examples.

Without labels: a denoising autoencoder (Vincent, Larochelle, Bengio & Manzagol 2008, ICML),
    min E | g(h(y + sigma e)) - y |^2,    e ~ N(0, I).

Tables, points and volumes, and pixels without a network: principal components,
    h(y) = V^T (y - mean),    whitened: h(y) = Lambda^{-1/2} V^T (y - mean).

h is divided by one number, so that the training data have unit variance per feature on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.core.codec import Codec
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import Batch, DataSpec, Split

BATCH = 128
SIDE = {3: 12, 2: 32, 1: 256}
"""Larger volumes and pictures and longer signals are averaged down to this side."""
POOL: Mapping[int, Callable[..., Tensor]] = {
    3: F.adaptive_avg_pool3d,
    2: F.adaptive_avg_pool2d,
    1: F.adaptive_avg_pool1d,
}
KEEP_VARIANCE = 1e-6
"""Principal components below this share of the mean variance are dropped: whitening would make them the loudest."""


def examples(train: Split, n: int, dims: int) -> Iterator[Tensor]:
    """The first n training examples x, some 16 million numbers at a time."""
    size = max(1, min(512, 2**24 // dims))
    for start in range(0, n, size):
        yield train.batch(torch.arange(start, min(start + size, n))).x


class Encoder(nn.Module):
    """Data (N, *spec.shape) -> features (N, dim), float64. The codec brings data to a fixed scale."""

    max_batch = 512
    scale: Tensor

    def __init__(self, spec: DataSpec, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.codec = Codec(spec, "onehot")  # pictures to [-1, 1] or standardized, categories one-hot
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        channels, *side = self.codec.shape
        shrink = min(1.0, SIDE[len(side)] / max(side)) if side else 1.0
        self.grid = [max(1, round(s * shrink)) for s in side]
        self.input_dims = channels * math.prod(self.grid)

    def inputs(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Data in model space, those on large grids averaged down: (N, C, *grid), or (N, D) for vectors."""
        y, _ = self.codec.encode(x, dtype=dtype)
        return y if list(y.shape[2:]) == self.grid else POOL[len(self.grid)](y, tuple(self.grid))

    def features(self, x: Tensor) -> Tensor:
        """h(x) before the common scale, (N, dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).double() / self.scale

    def fit_codec(self, train: Split, n: int) -> None:
        """Learn means and scales from at most n training examples and 64 million numbers."""
        dims = math.prod(self.codec.spec.shape)
        self.codec.fit(train.head(min(n, max(64, 2**26 // dims))).x)

    @torch.no_grad()
    def fit_scale(self, train: Split, n: int) -> None:
        """Set the scale from the first n training examples: unit mean variance."""
        dims = math.prod(self.codec.spec.shape)
        h = torch.cat([self.features(x) for x in examples(train, n, dims)]).double()
        variance = h.var(0, correction=0).mean()
        self.scale.copy_(variance.sqrt() if variance > 0 else torch.ones_like(variance))


class LinearEncoder(Encoder):
    """Principal components of the encoded data, whitened or not."""

    mean: Tensor
    projection: Tensor

    def __init__(self, spec: DataSpec, dim: int) -> None:
        super().__init__(spec, dim)
        self.register_buffer("mean", torch.zeros(self.input_dims, dtype=torch.float64))
        self.register_buffer("projection", torch.zeros(self.input_dims, dim, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        return (self.inputs(x, torch.float64).flatten(1) - self.mean) @ self.projection


class ConvEncoder(Encoder):
    """Strided convolutions over a picture (C, H, W) or a signal (C, L), and a head that only training uses.

    Arguments:
        outputs: of the head: the number of classes, or 0 for a decoder to the (averaged-down) input.
    """

    def __init__(self, spec: DataSpec, dim: int, outputs: int) -> None:
        super().__init__(spec, dim)
        axes, longest, width = len(self.grid), max(self.grid), 32
        conv = nn.Conv2d if axes == 2 else nn.Conv1d
        stride = 2 if longest > SIDE[axes] // 2 else 1
        layers: list[nn.Module] = [conv(spec.shape[0], width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
        longest = math.ceil(longest / stride)
        while longest > 2:
            wider = min(128, 2 * width)
            layers += [conv(width, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.SiLU()]
            width, longest = wider, math.ceil(longest / 2)
        layers += [nn.AdaptiveAvgPool2d(2) if axes == 2 else nn.AdaptiveAvgPool1d(2), nn.Flatten()]
        self.trunk = nn.Sequential(*layers, nn.Linear(width * 2**axes, dim), nn.SiLU())
        self.head = (
            nn.Linear(dim, outputs)
            if outputs
            else nn.Sequential(nn.Linear(dim, 256), nn.SiLU(), nn.Linear(256, self.input_dims))
        )

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.trunk(self.inputs(x))
        return h


def train_classifier(encoder: ConvEncoder, train: Split, n: int, steps: int, seed: int) -> None:
    """Minimise the cross-entropy over the first n training examples."""

    def loss(batch: Batch, noise: Noise) -> Tensor:
        assert batch.condition is not None
        y = encoder.inputs(batch.x)
        logits = encoder.head(encoder.trunk(augment(y, noise)))
        return F.cross_entropy(logits, batch.condition.long())

    _minimise(encoder, loss, train, n, steps, seed)


def train_denoiser(encoder: ConvEncoder, train: Split, n: int, steps: int, seed: int) -> None:
    """Minimise the squared error of the denoised input over the first n training examples; sigma is half their std."""
    sigma = 0.5 * float(encoder.inputs(train.head(min(n, 256)).x).std())

    def loss(batch: Batch, noise: Noise) -> Tensor:
        y = encoder.inputs(batch.x)
        reconstruction = encoder.head(encoder.trunk(y + sigma * noise.normal_like(y)))
        return F.mse_loss(reconstruction, y.flatten(1)) / max(sigma**2, 1e-12)

    _minimise(encoder, loss, train, n, steps, seed)


def _minimise(
    encoder: ConvEncoder, loss: Callable[[Batch, Noise], Tensor], train: Split, n: int, steps: int, seed: int
) -> None:
    """AdamW with a one-cycle cosine rate; every epoch sees each example once, in a fresh order."""
    parameters = [*encoder.trunk.parameters(), *encoder.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.02)
    size = min(BATCH, n)
    per_epoch = n // size
    warm = max(1, steps // 10)
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = torch.randperm(n, generator=make_generator(seed, "extractor", "order", epoch))
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        batch = train.batch(order[position * size : (position + 1) * size])
        optimizer.zero_grad()
        loss(batch, Noise(seed, "extractor", "step", step, n=size, block=size)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def augment(y: Tensor, noise: Noise) -> Tensor:
    """A small random change that keeps the label.

    Pictures: turned by up to 10 degrees, scaled by 0.9 to 1.1, shifted by up to 10% of the side.
    Signals: noise of a tenth of their standard deviation.
    """
    if y.ndim == 3:
        return y + 0.1 * y.std() * noise.normal_like(y)
    u = 2.0 * noise.uniform(4) - 1.0
    angle, zoom = u[:, 0] * math.radians(10.0), 1.0 + 0.1 * u[:, 1]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([cos, -sin, 0.2 * u[:, 2], sin, cos, 0.2 * u[:, 3]], 1).view(-1, 2, 3)  # [-1, 1] is the side
    grid = F.affine_grid(theta, list(y.shape), align_corners=False)
    return F.grid_sample(y, grid, padding_mode="border", align_corners=False)
