r"""Multi-head attention over a sequence (Vaswani et al. 2017, arXiv:1706.03762).

    attention(x, y) = W_o [head_1, ..., head_H] + b_o,   head_i = softmax(Q_i K_i^T / sqrt(d)) V_i,
    Q = W_q x + b_q,   [K, V] = W_kv y + b_kv,           d = channels / H.
y = x is self-attention. Another y (the tokens of a condition) is cross-attention; the result does not depend on the
order of y's positions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Attention(nn.Module):
    """Attention from a sequence to itself or to another one.

    Arguments:
        channels: of x and of the result, a multiple of `heads`.
        source_dim: channels of y; None for self-attention.
    """

    def __init__(self, channels: int, heads: int, source_dim: int | None = None) -> None:
        super().__init__()
        assert channels % heads == 0, f"{heads} heads do not divide {channels} channels"
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels if source_dim is None else source_dim, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x (N, P, channels), y (N, L, source_dim) or None for x -> (N, P, channels)."""
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, P, d)
        k, v = self.key_value(x if y is None else y).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        result: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result
