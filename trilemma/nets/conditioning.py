"""Conditions as vectors that a network can take in.

A class becomes a learned vector, an attribute vector a learned linear map of itself. A model that has no
condition uses the same lines: `dim` is then 0, which is what networks take as `context_dim`, and the
embedding of None is None, which is what they take as `context`.
"""

from __future__ import annotations

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

    def __init__(self, condition: ConditionSpec | None, dim: int) -> None:
        super().__init__()
        self.dim = dim if condition is not None else 0
        self.embed: nn.Module | None = None
        if condition is not None:
            is_class = condition.kind == "class"
            self.embed = nn.Embedding(condition.size, dim) if is_class else nn.Linear(condition.size, dim)

    def forward(self, condition: Tensor | None) -> Tensor | None:
        """Class indices (N,) int64 or vectors (N, size) -> (N, dim)."""
        if self.embed is None:
            return None  # the data may bring labels that this model leaves out
        assert condition is not None, "this model is conditional, but got no condition"
        return self.embed(condition)  # type: ignore[no-any-return]
