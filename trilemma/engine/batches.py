"""The order of the data is a function of the seed: batch k is known without having seen batch k - 1."""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.core.noise import make_generator


class BatchOrder:
    """Indices of batch k = 0, 1, ... over n examples: each epoch is a permutation; batches run across epochs."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._permutation = torch.randperm(self.n, generator=make_generator(self.seed, "data", epoch))
            self._epoch = epoch
        return self._permutation

    def __getitem__(self, k: int) -> Tensor:
        """Indices (batch_size,) of batch k."""
        start, stop = k * self.batch_size, (k + 1) * self.batch_size
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            length = min(self.n - offset, stop - start)
            parts.append(self.permutation(epoch)[offset : offset + length])
            start += length
        return parts[0] if len(parts) == 1 else torch.cat(parts)
