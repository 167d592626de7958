"""Networks against other people's code with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.test_parity_diffusion import normal
from trilemma.nets.dit import DiT


def copy_linear(target: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    target.weight.copy_(weight)
    target.bias.copy_(bias)


def copy_dit(ours: Any, theirs: Any) -> None:
    """Their weights into ours. Their last map has the channel innermost, ours outermost."""
    width, inside = ours.stem.out_features, ours.patch**2
    copy_linear(ours.stem, theirs.pos_embed.proj.weight.flatten(1), theirs.pos_embed.proj.bias)
    ours.position.copy_(theirs.pos_embed.pos_embed[0])
    for block, other in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        attention, feed = other.attn1, other.ff.net
        key_value = [torch.cat([getattr(attention.to_k, p), getattr(attention.to_v, p)]) for p in ("weight", "bias")]
        copy_linear(block.attention.query, attention.to_q.weight, attention.to_q.bias)
        copy_linear(block.attention.key_value, key_value[0], key_value[1])
        copy_linear(block.attention.out, attention.to_out[0].weight, attention.to_out[0].bias)
        copy_linear(block.first, feed[0].proj.weight, feed[0].proj.bias)
        copy_linear(block.second, feed[2].weight, feed[2].bias)
        copy_linear(block.modulation, other.norm1.linear.weight, other.norm1.linear.bias)
    copy_linear(ours.modulation, theirs.proj_out_1.weight, theirs.proj_out_1.bias)
    head = theirs.proj_out_2
    copy_linear(
        ours.head,
        head.weight.view(inside, -1, width).transpose(0, 1).flatten(0, 1),
        head.bias.view(inside, -1).T.flatten(),
    )


@torch.no_grad()
def test_dit() -> None:
    """The whole network, given its context: the embeddings of time and class are each library's own."""
    diffusers = pytest.importorskip("diffusers")
    context = normal("context", shape=(2, 32))
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, num_layers=3, sample_size=6, num_embeds_ada_norm=2
    ).double()
    for i, (_, parameter) in enumerate(theirs.named_parameters()):
        parameter.copy_(0.3 * normal("dit", str(i), shape=tuple(parameter.shape)))
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # 1e-6 in some of theirs
    for block in theirs.transformer_blocks:
        block.norm1.emb = Fixed(context)
    ours = DiT((3, 6, 6), width=32, depth=3, heads=4, patch=2, context_dim=32).double()
    copy_dit(ours, theirs)
    x = normal("pictures", shape=(2, 3, 6, 6))
    expected = theirs(x, timestep=torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.long)).sample
    torch.testing.assert_close(ours(x, context), expected, rtol=1e-10, atol=1e-10)


class Fixed(nn.Module):
    """Always the same context."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.context = context

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.context
