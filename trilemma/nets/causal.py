r"""A causal transformer: the result at position i depends on the inputs before i alone, i itself not included.

    h_i = W x_{i-1} + p_i + V c,   x_{-1} = 0
    h <- h + attention(LN(h)),     position i sees the positions j <= i   (Vaswani et al. 2017, arXiv:1706.03762)
    h <- h + mlp(LN(h))            norms before the branches              (Xiong et al. 2020, arXiv:2002.04745)
    y_i = W_out LN(h_i) + b_out    zero at the start
with learned p_i. As the inputs are moved on by one position, y_0 is a function of the context c alone, learned like
all the others.

One pass gives every y_i where x is known. Where x_i is made from y_i, the keys and values of earlier positions are
kept, and a new position costs its own layers and one row of attention: linear in the positions so far.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from trilemma.nets.attention import zero_init

MLP_RATIO = 4
"""Hidden units of a block's MLP, in widths."""

Cache = list[tuple[Tensor, Tensor]]
"""For each block the keys and the values (N, heads, positions so far, width / heads)."""


class CausalBlock(nn.Module):
    """Attention to the positions so far, then an MLP; the identity at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = zero_init(nn.Linear(width, width))
        self.first = nn.Linear(width, MLP_RATIO * width)
        self.second = zero_init(nn.Linear(MLP_RATIO * width, width))

    def forward(self, h: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h (N, P, width), the first P positions, or the next one (P = 1) after those in `past` -> the same, and
        the keys and values up to it."""
        q, k, v = (
            self.query_key_value(self.first_norm(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attention = scaled_dot_product_attention(q, k, v, is_causal=past is None)
        h = h + self.attended(attention.transpose(1, 2).flatten(2))
        h = h + self.second(gelu(self.first(self.second_norm(h)), approximate="tanh"))
        return h, (k, v)


class CausalTransformer(nn.Module):
    """A map from sequences to sequences of the same length.

    Arguments:
        length: T, of the sequences.
        in_dim, out_dim: numbers of an input and of a result at one position.
        width: of the tokens, a multiple of `heads`.
        depth: number of blocks.
        heads: of each attention.
        context_dim: size of the context, which is added to every position; 0 for none.
    """

    def __init__(
        self, length: int, in_dim: int, out_dim: int, *, width: int, depth: int, heads: int, context_dim: int = 0
    ) -> None:
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide a width of {width}"
        self.stem = nn.Linear(in_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_init(nn.Linear(width, out_dim))

    def _run(self, h: Tensor, context: Tensor | None, cache: Cache | None) -> tuple[Tensor, Cache]:
        if self.context is not None:
            h = h + self.context(context).unsqueeze(1)
        kept: Cache = []
        for index, block in enumerate(self.blocks):
            h, pair = block(h, cache[index] if cache else None)
            kept.append(pair)
        return self.head(self.norm(h)), kept

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, T, in_dim), context (N, context_dim) or None -> y (N, T, out_dim), y_i from x_0 .. x_{i-1}."""
        before = pad(x[:, :-1], (0, 0, 1, 0))
        return self._run(self.stem(before) + self.position, context, None)[0]

    def step(self, before: Tensor, context: Tensor | None, cache: Cache) -> tuple[Tensor, Cache]:
        """The next position alone.

        Arguments:
            before: x_{i-1} (N, 1, in_dim).
            context: (N, context_dim) or None.
            cache: of positions 0 .. i-1; empty for i = 0.

        Returns:
            y_i (N, 1, out_dim), and the cache of positions 0 .. i.
        """
        index = cache[0][0].shape[2] if cache else 0
        return self._run(self.stem(before) + self.position[index], context, cache)
