r"""DINOv2's vision transformer, in whose features the Fréchet distance "FD-DINOv2" is taken.

A picture is cut into patches of 14 x 14, each a token; a class token comes first. With e the embeddings,
    h_0 = [cls; W patch_1; ...; W patch_n] + positions,
    h' = h + lambda_1 * attention(norm(h)),    h'' = h' + lambda_2 * mlp(norm(h'))    in every layer,
and the feature is the class token after the last layer's norm (Oquab et al. 2023, arXiv:2304.07193). Stein et al.
2023 (arXiv:2306.04675) find that distances in these features agree with people where those of Inception do not;
their FD-DINOv2 is that of ViT-L/14.

Inputs are resized to 224 x 224 (antialiased bicubic, not rounded back to 8 bits) and standardized with ImageNet's
mean and standard deviation. The published positions belong to a 37 x 37 grid and are resized to 16 x 16 (bicubic).
The original code scales them by (16 + 0.1) / 37, and so do we; Hugging Face's scales by 16 / 37, a fifth of a patch
apart at the far edge.

Tensors are named as in `model.safetensors` of `facebook/dinov2-{small,base,large,giant}` on the Hugging Face hub;
sizes are read from their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.core.errors import CheckpointError

SIDE = 224
HEAD = 64
"""Dimensions of one head of attention, in every published size."""
EPS = 1e-6
OFFSET = 0.1
"""Added to the number of patches where positions are resized, as in the original code."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

POSITIONS = "embeddings.position_embeddings"
PROJECTION = "embeddings.patch_embeddings.projection.weight"
UNUSED = "embeddings.mask_token"
"""Only training uses it."""


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Positions (1, 1 + g^2, D) of the class token and a g x g grid -> (1, 1 + side^2, D)."""
    grid = math.isqrt(positions.shape[1] - 1)
    if grid == side:
        return positions
    patches = positions[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], 1)


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.lambda1


class _Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim)})

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = (layer(h).unflatten(2, (-1, HEAD)).transpose(1, 2) for layer in self.attention.values())
        mixed = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.output["dense"](mixed.transpose(1, 2).flatten(2))
        return y


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(h)))
        return y


class _SwiGLU(nn.Module):
    """silu(A h) * B h, then mixed again (Shazeer 2020, arXiv:2002.05202); the giant has it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.weights_in = nn.Linear(dim, 2 * hidden)
        self.weights_out = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.weights_in(h).chunk(2, -1)
        y: Tensor = self.weights_out(F.silu(gate) * up)
        return y


class _Layer(nn.Module):
    def __init__(self, dim: int, hidden: int, swiglu: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attention = _Attention(dim)
        self.layer_scale1 = _Scale(dim)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = _SwiGLU(dim, hidden) if swiglu else _MLP(dim, hidden)
        self.layer_scale2 = _Scale(dim)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.layer_scale1(self.attention(self.norm1(h)))
        y: Tensor = h + self.layer_scale2(self.mlp(self.norm2(h)))
        return y


class _Embeddings(nn.Module):
    def __init__(self, dim: int, patch: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, dim, patch, patch)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch_embeddings["projection"](x)
        side = h.shape[-1]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), h.flatten(2).transpose(1, 2)], 1)
        return tokens + resize_positions(self.position_embeddings, side)


class DinoV2(nn.Module):
    """RGB pictures (N, 3, H, W) in 0 .. 255 -> features (N, dim), float32.

    Arguments:
        dim: of a token: 384 (S), 768 (B), 1024 (L), 1536 (giant).
        depth: number of layers.
        hidden: width inside the MLP, of one half where it is gated.
        patch: side of a patch in pixels.
        grid: side of the grid that the positions belong to.
        swiglu: whether the MLP is gated.
    """

    layer = "class token after norm"
    preprocessing = f"to RGB, antialiased bicubic to 224, ImageNet mean and std; positions bicubic, offset {OFFSET}"
    frechet_name = "FD-DINOv2"

    def __init__(self, dim: int, depth: int, hidden: int, patch: int, grid: int, swiglu: bool) -> None:
        super().__init__()
        self.dim = dim
        self.embeddings = _Embeddings(dim, patch, grid)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(dim, hidden, swiglu) for _ in range(depth))})
        self.layernorm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
        mean, std = x.new_tensor(MEAN).view(3, 1, 1), x.new_tensor(STD).view(3, 1, 1)
        h = self.embeddings((x / 255.0 - mean) / std)
        for layer in self.encoder["layer"].children():
            h = layer(h)
        y: Tensor = self.layernorm(h[:, 0])
        return y


def dinov2_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that features need."""
    return {k: v for k, v in tensors.items() if k != UNUSED}


def dinov2_network(tensors: Mapping[str, Tensor], where: str) -> DinoV2:
    """An empty network of the size that the tensors have.

    Raises:
        CheckpointError: they are not a DINOv2 in Hugging Face's names.
    """
    swiglu = "encoder.layer.0.mlp.weights_in.weight" in tensors
    inner = "encoder.layer.0.mlp." + ("weights_out.weight" if swiglu else "fc2.weight")
    missing = [name for name in (POSITIONS, PROJECTION, inner) if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{where} does not fit: {missing[0]} is missing; a DINOv2 named as facebook/dinov2-* on the "
            "Hugging Face hub is needed (docs/extractors.md)"
        )
    positions, projection = tuple(tensors[POSITIONS].shape), tuple(tensors[PROJECTION].shape)
    dim, patch, grid = projection[0], projection[-1], math.isqrt(tensors[POSITIONS].numel() // projection[0])
    fits = projection == (dim, 3, patch, patch) and SIDE % patch == 0 and dim % HEAD == 0
    if not fits or positions != (1, 1 + grid**2, dim):
        raise CheckpointError(
            f"{where}: no DINOv2 has {PROJECTION} of shape {projection} and {POSITIONS} of shape {positions}"
        )
    depth = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")})
    return DinoV2(dim, depth, tensors[inner].shape[1], patch, grid, swiglu)
