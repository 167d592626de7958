"""Every random draw in Trilemma comes from here, never from a global state.

A draw is a pure function of a *key*, a tuple of integers and strings such as
``(seed, "train", step, shard)``. The key is hashed to the seed of a `torch.Generator`.

Samples must not depend on the batch they happen to be drawn in. So sample ``i`` of a key belongs to
block ``i // BLOCK``, each block owns one generator, and a block is always drawn whole, whatever part
of it is asked for: samples 0..9 are the same when drawn alone, with 90 others, or in batches of three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str
"""A part of the name of a random stream."""

BLOCK = 16
"""Samples per generator: large enough that generators cost nothing, small enough that waste does not."""


def hash_key(*key: Key) -> int:
    """A seed in [0, 2^63) from a key; different keys give independent seeds (BLAKE2b)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` in the state that `key` names."""
    return torch.Generator(device).manual_seed(hash_key(*key))


def draw_seed(generator: torch.Generator | int | None) -> int:
    """The seed for a public call: an int is the seed itself, a generator is advanced, None is fresh entropy."""
    if isinstance(generator, int):
        return generator
    if generator is None:
        return torch.Generator().seed() >> 1
    return int(torch.randint(2**62, (), generator=generator, device=generator.device).item())


class Noise:
    """Random draws for samples ``start .. start + n`` of the stream that `key` names.

    Each call advances the stream; the same sequence of calls gives the same draws, in any batching.

    Arguments:
        key: the name of the stream.
        n: how many samples.
        start: index of the first one.
        device: where the draws are made and returned.
        block: samples per generator. Training passes its batch size, because a batch is always drawn whole.
    """

    def __init__(
        self, *key: Key, n: int, start: int = 0, device: torch.device | str = "cpu", block: int = BLOCK
    ) -> None:
        if n < 1:
            raise ValueError(f"Noise needs at least one sample, got n={n}")
        self.key, self.n, self.start = key, n, start
        self.device, self.block = torch.device(device), block
        first, last = start // block, (start + n - 1) // block
        self._generators = [make_generator(*key, index, device=device) for index in range(first, last + 1)]
        self._offset = start - first * block

    def _gather(self, blocks: Sequence[Tensor]) -> Tensor:
        whole = blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))
        return whole[self._offset : self._offset + self.n]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal draws, shape (n, *shape)."""
        size = (self.block, *shape)
        return self._gather([torch.randn(size, generator=g, device=self.device, dtype=dtype) for g in self._generators])

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform draws in [0, 1), shape (n, *shape)."""
        size = (self.block, *shape)
        return self._gather([torch.rand(size, generator=g, device=self.device, dtype=dtype) for g in self._generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in 0 .. high - 1, shape (n, *shape), int64."""
        size = (self.block, *shape)
        return self._gather([torch.randint(high, size, generator=g, device=self.device) for g in self._generators])

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal draws of the shape and dtype of x, whose first dimension must be n."""
        self._check(x)
        return self.normal(*x.shape[1:], dtype=x.dtype)

    def uniform_like(self, x: Tensor) -> Tensor:
        """Uniform draws of the shape and dtype of x, whose first dimension must be n."""
        self._check(x)
        return self.uniform(*x.shape[1:], dtype=x.dtype)

    def bernoulli(self, p: Tensor) -> Tensor:
        """Zeros and ones in the dtype of p (n, *), one with probability p."""
        return (self.uniform_like(p) < p).to(p.dtype)

    def categorical(self, weights: Tensor) -> Tensor:
        """Indices (n,) drawn in proportion to the non-negative `weights`, (K,) or (n, K), by inversion."""
        cumulative = weights.double().cumsum(-1)
        cumulative = cumulative / cumulative[..., -1:]
        u = self.uniform(1, dtype=torch.float64)
        if weights.ndim == 1:  # one search for all; the copy below would be (n, K)
            index = torch.searchsorted(cumulative, u.squeeze(-1), right=True)
            return index.clamp_(max=weights.shape[-1] - 1)
        index = torch.searchsorted(cumulative.expand(self.n, -1).contiguous(), u, right=True).squeeze(-1)
        return index.clamp_(max=weights.shape[-1] - 1)  # u == 1 - ulp can round onto the last edge

    def _check(self, x: Tensor) -> None:
        assert x.shape[0] == self.n, f"noise for {self.n} samples asked for a batch of {x.shape[0]}"


class Middle(Noise):
    """No noise: uniform draws are 1/2 and normal ones 0, so that what is computed is a function of the data alone.

    Arguments:
        n: how many samples.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        super().__init__("middle", n=n, device=device, block=n)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(self.n, *shape, device=self.device, dtype=dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((self.n, *shape), 0.5, device=self.device, dtype=dtype)
