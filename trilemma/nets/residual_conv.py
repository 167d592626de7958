"""A residual network of convolutions that keeps the size of the picture."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu


class ResidualConv(nn.Module):
    """3x3 convolutions; the result is zero until it is trained.

    Pre-activation blocks that start as the identity and that the context is added to, as in `ResidualMLP`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, width: int, depth: int, context_dim: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(in_channels, width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.context = nn.Linear(context_dim, width * (depth + 1), bias=False) if context_dim else None
        self.output = nn.Conv2d(width, out_channels, 1)
        for last in (*self.second, self.output):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, in_channels, H, W), context (N, context_dim) or None -> (N, out_channels, H, W)."""
        h = self.input(x)
        parts = [None] * (len(self.first) + 1)
        if self.context is not None:
            parts = self.context(context)[..., None, None].chunk(len(parts), 1)
            h = h + parts[0]
        for first, second, part in zip(self.first, self.second, parts[1:], strict=True):
            r = first(silu(h))
            h = h + second(silu(r if part is None else r + part))
        return self.output(silu(h))  # type: ignore[no-any-return]
