r"""Whether data are distributed as their mirror images, which decides on the augmentations that suit them.

With the kernel k(x, x') = exp(-|x - x'|^2 / h), the squared discrepancy (Gretton et al. 2012, JMLR 13:723) between x
and T^k x, k uniform in 0 .. order - 1, is estimated without bias from pairs of different examples by the mean of
    k(x_i, x_j) - mean_k k(x_i, T^k x_j).
h is the mean squared distance of nearest neighbours, so it sees more than means (rising stripes against falling
ones) and many modes (each of a hundred characters). Under the hypothesis that x and T x have the same distribution,
T^k x_i of independent random k could as well have been the data; so comparing the sum with its values there is an
exact test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.core.noise import make_generator

ALARM, RESAMPLES = 0.01, 199
"""False-alarm rate of the test of symmetry, and its random transforms; ALARM (RESAMPLES + 1) is an integer."""

FEW, MANY, SIDE = 100, 256, 64
"""The test of symmetry takes at least FEW examples and uses at most MANY, averaged down to at most SIDE pixels."""


def mirror(y: Tensor) -> Tensor:
    """y (N, *) with its last axis reversed."""
    return y.flip(-1)


def quarter_turn(y: Tensor) -> Tensor:
    """Square pictures y (N, C, H, H) turned by 90 degrees."""
    return y.rot90(1, (-2, -1))


def is_symmetric(y: Tensor, transform: Callable[[Tensor], Tensor], order: int, condition: Tensor | None = None) -> bool:
    """Whether nothing tells x from T x. Symmetric data are called asymmetric with probability `ALARM`.

    Arguments:
        y: examples (N, C, *space); fewer than `FEW` show nothing, so the answer is False.
        transform: T, an isometry with T^order = 1.
        order: of T.
        condition: class indices (N,) or vectors (N, size): pairs are weighted by the likeness of theirs, so that
            p(x | c) has to be symmetric, where p(x) is in any case that of "b" and "d".
    """
    n = min(len(y), MANY)
    if n < FEW:
        return False
    y = y[:n].double()
    if y.ndim == 4:
        y = F.adaptive_avg_pool2d(y, (min(y.shape[2], SIDE), min(y.shape[3], SIDE)))
    images = [y]
    for _ in range(order - 1):
        images.append(transform(images[-1]))
    kernel = _kernel(torch.stack([torch.cdist(y.flatten(1), image.flatten(1)) for image in images]))
    if condition is not None:
        c = condition[:n].to(y)
        kernel = kernel * (_kernel(torch.cdist(c, c)[None]) if c.ndim == 2 else (c[:, None] == c))
    kernel = kernel - kernel.mean(0)  # (order, N, N): of x_i and T^k x_j
    k = torch.arange(order, device=y.device)
    full = kernel[(k - k[:, None]) % order].transpose(1, 2).reshape(order * n, order * n)  # of T^a x_i and T^b x_j
    draws = torch.randint(order, (RESAMPLES + 1, n), generator=make_generator("augment", "symmetry", order))
    draws[0] = 0
    which = F.one_hot(draws, order).transpose(1, 2).reshape(RESAMPLES + 1, order * n).to(full)
    u = ((which @ full) * which).sum(1)
    rounding = 1e-9 * kernel.abs().sum()  # data that are their own images give ties
    return int((u >= u[0] - rounding).sum()) > ALARM * (RESAMPLES + 1)


def _kernel(distance: Tensor) -> Tensor:
    """Gaussian kernel (K, N, N) of distances; 0 for an example with itself."""
    others = ~torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
    squares = distance.square().masked_fill(~others, math.inf)
    nearest = squares.amin((0, 2)).mean().clamp_min(torch.finfo(squares.dtype).tiny)
    return (-squares / nearest).exp()
