r"""The networks of the diffusion family: one wrapper for every backbone, kind of data and kind of condition.

    F(z, t, c):     t and classes or vectors become one context, which every block sees;
                    a picture is resampled to z's resolution and concatenated to z
                    (Saharia et al. 2021: SR3, arXiv:2104.07636, and Palette, arXiv:2111.05826);
                    a sequence becomes tokens for cross-attention (Rombach et al. 2022, arXiv:2112.10752)

A condition can be left out, example by example (classifier-free guidance: Ho & Salimans 2022, arXiv:2207.12598): a
learned vector or token then stands in its place; pictures come with a channel that says whether they are there.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.core.errors import CapabilityError
from trilemma.core.spec import ConditionSpec
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.dit import DiT
from trilemma.nets.embedding import FourierMLP, TimeEmbedding, sinusoidal
from trilemma.nets.mlp import ResidualMLP
from trilemma.nets.resnet import ResNetEncoder
from trilemma.nets.unet import UNet

Kind = Literal["unet", "dit", "mlp"]


class Backbone(nn.Module):
    """F(z, t, c) with `outputs` channels for each of z's.

    Arguments:
        shape: of z, without the batch.
        condition: what comes with z, or None.
        kind: unet and dit for pictures, signals and volumes; mlp for vectors.
        optional: the condition may be left out.
        outputs: 1, or 2 for a second output of z's shape.
        settings: of the network: width, depth, and its own.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        condition: ConditionSpec | None,
        kind: Kind,
        *,
        width: int,
        depth: int,
        optional: bool = False,
        outputs: int = 1,
        time: Literal["sinusoidal", "fourier"] = "sinusoidal",
        **settings: object,
    ) -> None:
        super().__init__()
        self.kind, self.outputs = condition.kind if condition is not None else None, outputs
        context_dim = width if kind == "mlp" else 4 * width
        self.time = TimeEmbedding(context_dim, kind=time)
        vector = condition if self.kind in ("class", "vector") else None
        self.condition = ConditionEmbedding(vector, context_dim)
        self.absent = nn.Parameter(torch.zeros(context_dim)) if optional and vector is not None else None
        extra, cross = 0, 0
        if self.kind == "image":
            assert condition is not None
            extra = condition.shape[0] + optional
            self.flagged = optional
        elif self.kind == "sequence":
            assert condition is not None
            cross = context_dim
            self.tokens = nn.Linear(condition.shape[1], cross)
            self.absent = nn.Parameter(torch.zeros(cross)) if optional else None
        self.net: nn.Module
        if kind == "mlp":
            if self.kind in ("image", "sequence"):
                raise CapabilityError(f"vectors cannot be conditioned on a {self.kind} here: give classes or vectors")
            self.net = FourierMLP(
                shape[0], outputs * shape[0], width=width, depth=depth, context_dim=context_dim, zero_init=True
            )
            return
        network = UNet if kind == "unet" else DiT
        self.net = network(
            shape,
            channels_in=shape[0] + extra,
            channels_out=outputs * shape[0],
            width=width,
            depth=depth,
            context_dim=context_dim,
            cross_dim=cross,
            **settings,  # type: ignore[arg-type]
        )

    def forward(
        self, z: Tensor, label: Tensor, condition: Tensor | None = None, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """z (N, *shape), label (N,) in 0 .. 1000 -> prediction (N, *shape), second output (N, *shape) or None.

        Arguments:
            condition: (N, ..) as its `ConditionSpec` says.
            present: (N,) bool, where the condition is given; None for everywhere.
        """
        context = self.time(label)
        tokens = None
        if self.kind in ("class", "vector"):
            embedded = self.condition(condition)
            if present is not None:
                embedded = torch.where(present.unsqueeze(1), embedded, self.absent.to(embedded.dtype))  # type: ignore[union-attr]
            context = context + embedded
        elif self.kind == "image":
            z = self._concatenated(z, condition, present)
        elif self.kind == "sequence":
            tokens = self._tokens(condition, present)
        out: Tensor = self.net(z, context, tokens) if tokens is not None else self.net(z, context)
        if self.outputs == 1:
            return out, None
        first, second = out.chunk(2, 1)
        return first, second

    def _concatenated(self, z: Tensor, condition: Tensor | None, present: Tensor | None) -> Tensor:
        assert condition is not None, "this network takes a picture"
        if condition.shape[2:] != z.shape[2:]:
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[z.ndim - 2]
            condition = F.interpolate(condition, size=z.shape[2:], mode=mode)
        parts = [z, condition.to(z.dtype)]
        if self.flagged:
            there = torch.ones(len(z), device=z.device) if present is None else present
            flag = there.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
            parts = [z, parts[1] * flag, flag.expand(-1, 1, *z.shape[2:])]
        return torch.cat(parts, 1)

    def _tokens(self, condition: Tensor | None, present: Tensor | None) -> Tensor:
        assert condition is not None, "this network takes a sequence"
        tokens: Tensor = self.tokens(condition)
        # in float32 whatever the precision of the tokens: bf16 cannot count beyond 256
        place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        tokens = tokens + sinusoidal(place, tokens.shape[2]).to(tokens.dtype)
        if present is None:
            return tokens
        return torch.where(present.reshape(-1, 1, 1), tokens, self.absent.to(tokens.dtype))  # type: ignore[union-attr]


class NoisyClassifier(nn.Module):
    """log p(c | z_t) over classes, for classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        context_dim = 4 * width
        self.time = TimeEmbedding(context_dim)
        self.net: nn.Module
        if len(shape) == 1:
            self.net = ResidualMLP(math.prod(shape), classes, width=2 * width, depth=2, context_dim=context_dim)
        else:
            self.net = ResNetEncoder(shape, classes, width=width, depth=1, context_dim=context_dim, norm=True)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """(N, classes)."""
        result: Tensor = self.net(z, self.time(label))
        return result.log_softmax(1)
