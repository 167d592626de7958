r"""Residual generators with conditional batch normalisation, and critics for spectral normalisation, of any rank.

(Miyato et al. 2018, arXiv:1802.05957; Brock, Donahue & Simonyan 2019, arXiv:1809.11096.) z is cut into one piece for
each place that takes in a w = [z_i, e(c)]: the first layer, and every block, whose gains and biases are linear in it:
    BN(h; w) = (1 + A w) (h - mean) / std + B w.
A block is W_2 relu(BN(W_1 up(relu(BN(h))))) + W_0 up(h). Attention is left out: it is meant for larger pictures.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.adversarial.dcgan import BATCH_NORM
from trilemma.adversarial.discriminator import Trunk
from trilemma.adversarial.generator import Generator
from trilemma.core.noise import Noise
from trilemma.core.spec import ConditionSpec
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.resample import canvas, channels_last, crop
from trilemma.nets.resnet import conv, level_widths


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose gain and bias are linear in a context (de Vries et al. 2017, arXiv:1707.00683)."""

    def __init__(self, dims: int, channels: int, context_dim: int) -> None:
        super().__init__()
        self.norm = BATCH_NORM[dims](channels, affine=False)
        self.gain = nn.Linear(context_dim, channels, bias=False)
        self.bias = nn.Linear(context_dim, channels, bias=False)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        ones = (1,) * (h.ndim - 2)
        gain, bias = (f(context).unflatten(1, (-1, *ones)) for f in (self.gain, self.bias))
        result: Tensor = torch.addcmul(bias, self.norm(h), 1.0 + gain)
        return result


class UpBlock(nn.Module):
    """h -> W_2 relu(BN(W_1 up(relu(BN(h))))) + W_0 up(h), where up doubles by nearest neighbours."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, w_dim: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(dims, channels_in, w_dim)
        self.norm2 = ConditionalBatchNorm(dims, channels_out, w_dim)
        self.conv1 = conv(dims, channels_in, channels_out)
        self.conv2 = conv(dims, channels_out, channels_out)
        self.skip = conv(dims, channels_in, channels_out, 1)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        r = self.conv1(F.interpolate(F.relu(self.norm1(h, w)), scale_factor=2.0, mode="nearest"))
        r = self.conv2(F.relu(self.norm2(r, w)))
        return r + F.interpolate(self.skip(h), scale_factor=2.0, mode="nearest")  # type: ignore[no-any-return]


class BigGANGenerator(Generator):
    """A residual generator whose every block takes in a piece of z and the class.

    Arguments:
        shape: (C, *space) of the result.
        z_dim: of all pieces together; rounded up to a multiple of their number.
        width: channels of the last block; doubled with every halving of the resolution, up to 4 times.
    """

    def __init__(
        self, shape: tuple[int, ...], z_dim: int, condition: ConditionSpec | None, condition_dim: int, *, width: int
    ) -> None:
        channels, *space = shape
        base, doublings, _ = canvas(tuple(space))
        piece = -(-z_dim // (doublings + 1))
        embed = ConditionEmbedding(condition, condition_dim)
        super().__init__(shape, piece * (doublings + 1), piece + embed.dim, doublings + 1)
        self.embed, self.base, self.space, dims = embed, base, tuple(space), len(space)
        widths = level_widths(width, doublings + 1)[::-1]
        self.stem = nn.Linear(self.w_dim, widths[0] * math.prod(base))
        self.blocks = nn.ModuleList(UpBlock(dims, a, b, self.w_dim) for a, b in itertools.pairwise(widths))
        self.norm = BATCH_NORM[dims](widths[-1])
        self.output = conv(dims, widths[-1], channels)
        for layer in self.modules():
            if isinstance(getattr(layer, "weight", None), nn.Parameter) and layer.weight.ndim > 1:  # type: ignore[operator]
                nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        pieces = z.unflatten(1, (self.num_ws, -1))  # type: ignore[no-untyped-call]
        context = self.embed(c)
        if context is None:
            return pieces  # type: ignore[no-any-return]
        return torch.cat([pieces, context.unsqueeze(1).expand(-1, self.num_ws, -1)], 2)

    def synthesis(self, ws: Tensor, noise: Noise | None = None) -> Tensor:
        h = channels_last(self.stem(ws[:, 0]).unflatten(1, (-1, *self.base)))
        for i, block in enumerate(self.blocks):
            h = block(h, ws[:, i + 1])
        return crop(self.output(F.relu(self.norm(h))), self.space)


class DownBlock(nn.Module):
    """h -> pool(W_2 relu(W_1 relu(h))) + pool(W_0 h); the first block of a trunk has no first relu."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, down: bool, first: bool) -> None:
        super().__init__()
        self.conv1 = conv(dims, channels_in, channels_out)
        self.conv2 = conv(dims, channels_out, channels_out)
        self.skip = conv(dims, channels_in, channels_out, 1)
        self.pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims] if down else None
        self.first = first

    def forward(self, h: Tensor) -> Tensor:
        r = self.conv2(F.relu(self.conv1(h if self.first else F.relu(h))))
        if self.pool is None:
            return r + self.skip(h)  # type: ignore[no-any-return]
        return self.pool(r, 2) + self.skip(self.pool(h, 2))  # type: ignore[no-any-return]


class BigGANTrunk(Trunk):
    """Residual blocks without normalisation, summed over places (Miyato et al. 2018; Brock et al. 2019).

    Arguments:
        shape: (C, *space) of one example.
        width: channels of the first block, doubled with every halving up to 4 times.
    """

    def __init__(self, shape: tuple[int, ...], *, width: int) -> None:
        super().__init__()
        channels, *space = shape
        _, doublings, self.size = canvas(tuple(space))
        widths = level_widths(width, doublings + 1)
        self.blocks = nn.ModuleList(
            DownBlock(len(space), a, b, down=i < doublings, first=i == 0)
            for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.feature_dim = widths[-1]

    def features(self, x: Tensor) -> Tensor:
        h = channels_last(crop(x, self.size))
        for block in self.blocks:
            h = block(h)
        return F.relu(h).flatten(2).sum(2)
