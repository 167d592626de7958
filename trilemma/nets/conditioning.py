"""Conditions as vectors that a network can take in.

A class becomes a learned vector, an attribute vector c a learned linear map of itself, or of (c - mean) / std where its
`ConditionSpec` has these. A model that has no condition uses the same lines: `dim` is then 0, which is what networks
take as `context_dim`, and the embedding of None is None, which is what they take as `context`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.core.spec import ConditionSpec


class ConditionEmbedding(nn.Module):
    """Condition -> context (N, dim), or None -> None.

    Arguments:
        condition: what the model is conditioned on; None for a model without.
        dim: size of the embedding.

    Attributes:
        dim: size of the embedding, 0 without a condition.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, condition: ConditionSpec | None, dim: int) -> None:
        super().__init__()
        self.dim = dim if condition is not None else 0
        self.embed: nn.Module | None = None
        if condition is not None:
            is_class = condition.kind == "class"
            self.embed = nn.Embedding(condition.size, dim) if is_class else nn.Linear(condition.size, dim)
        self.standardizes = condition is not None and bool(condition.mean)
        if condition is not None and self.standardizes:
            # In double precision: dates and large numbers differ in digits that single precision does not have.
            self.register_buffer("mean", torch.tensor(condition.mean, dtype=torch.float64), persistent=False)
            self.register_buffer("std", torch.tensor(condition.std, dtype=torch.float64), persistent=False)

    def forward(self, condition: Tensor | None) -> Tensor | None:
        """Class indices (N,) int64 or vectors (N, size) -> (N, dim)."""
        if self.embed is None:
            return None  # the data may bring labels that this model leaves out
        assert condition is not None, "this model is conditional, but got no condition"
        if self.standardizes:
            assert isinstance(self.embed, nn.Linear)
            condition = ((condition - self.mean) / self.std).to(self.embed.weight.dtype)
        return self.embed(condition)  # type: ignore[no-any-return]
