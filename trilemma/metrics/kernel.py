r"""Squared maximum mean discrepancy (MMD), the unbiased estimate from all pairs.

For a kernel k, generated x_1..x_m and reference y_1..y_n,
    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)
          ~ S_xx / (m (m - 1)) + S_yy / (n (n - 1)) - 2 S_xy / (m n),
where S_xx and S_yy sum over pairs of different examples (Gretton, Borgwardt, Rasch, Schoelkopf & Smola 2012, "A kernel
two-sample test", JMLR 13). The expectation is the true MMD^2 at every sample size, so values at different sizes can
be compared, and the estimate can be negative.

Kernels:
    polynomial: k(a, b) = (a.b / d + 1)^3, of the kernel inception distance (Binkowski, Sutherland, Arbel & Gretton
        2018, arXiv:1801.01401). KID averages over random subsets; here all pairs count once.
    Gaussian: k(a, b) = exp(-|a - b|^2 / (2 h^2)) with the median distance h of reference examples (Gretton et al.).
        It does not depend on the model, so models are measured with one kernel.

The sums of the kernel matrix over pairs of blocks (20 x 20) give the statistic without each block in closed form:
    S_xx without block g = S_xx - 2 sum_h B_gh + B_gg,    S_xy without block g = S_xy - sum_h C_gh.
The kernel matrix is computed in tiles, and never held.

Error: delete-a-block jackknife, with h held fixed. Where the distributions are equal the terms of first order vanish,
MMD^2 is of order 1/n instead of its error being of order 1/sqrt(n), and the standard
error is about 1.5 times too large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import delete_one, shuffle_into_blocks
from trilemma.metrics.uncertain import Uncertain

TILE = 512
"""Rows and columns of the kernel matrix held at once: 2 MB, a processor's cache."""
BANDWIDTH_ROWS = 2000
"""Reference examples whose pairs give the median distance."""

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Rows a (A, d) and b (B, d) -> k(a_i, b_j) as (A, B)."""


@dataclass(frozen=True)
class KernelSums:
    """A sample and the sums of its kernel matrix over pairs of blocks, computed once for many comparisons.

    Attributes:
        x: (N, d) in the order of its blocks.
        blocks: (N,) the block of each row.
        sums: (G, G) over pairs of different examples in blocks g and h.
        kernel: the kernel.
    """

    x: Tensor
    blocks: Tensor
    sums: Tensor
    kernel: Kernel

    @classmethod
    def of(cls, x: Tensor, kernel: Kernel) -> KernelSums:
        """Of features (N, d).

        Raises:
            DataError: fewer than 3 examples: without one of them there must still be a pair.
        """
        if len(x) < 3:
            raise DataError(f"{len(x)} examples are too few for an MMD with an interval: give at least 3")
        x, cuts = shuffle_into_blocks(x.double())
        blocks = torch.cat([torch.full((b.stop - b.start,), g, device=x.device) for g, b in enumerate(cuts)])
        return cls(x, blocks, _block_sums(kernel, x, blocks, x, blocks, itself=True), kernel)

    @property
    def sizes(self) -> Tensor:
        """(G,) examples in each block, float64."""
        return self.blocks.bincount().double()


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / d + 1)^3."""
    k = (a @ b.T).div_(a.shape[1]).add_(1.0)
    return k.square().mul_(k)


def gaussian(h: float) -> Kernel:
    """exp(-|a - b|^2 / (2 h^2)) with the bandwidth h > 0."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return _squared_distances(a, b).mul_(-0.5 / h**2).exp_()

    return kernel


def median_distance(y: Tensor) -> float:
    """Median distance of two different points among 2000 examples of y (N, d), or all if there are fewer.

    Pairs of equal points do not count: in discrete data more than half may be equal. In the even case it is
    the lower median.

    Raises:
        DataError: all examples are equal.
    """
    rows = shuffle_into_blocks(y.double())[0][:BANDWIDTH_ROWS]
    d2 = torch.nn.functional.pdist(rows).square_()
    d2 = d2[d2 > 0.0]
    if not len(d2):
        raise DataError("the reference examples are all equal: a Gaussian kernel has no bandwidth for them")
    return float(d2.median().sqrt())


def polynomial_sums(x: Tensor) -> KernelSums:
    """`KernelSums` of a sample (N, d) with the polynomial kernel."""
    return KernelSums.of(x, polynomial)


def gaussian_sums(y: Tensor) -> KernelSums:
    """`KernelSums` of the reference (N, d) with a Gaussian kernel of its own median distance."""
    centre = y.double().mean(0)  # distances do not depend on it, their rounding does
    h = median_distance(y)
    kernel = gaussian(h)
    return KernelSums.of(y, lambda a, b: kernel(a - centre, b - centre))


def kernel_distance(x: Tensor, y: Tensor | KernelSums) -> Uncertain:
    """MMD^2 of generated features x (M, d) and reference features y (N, d), with the polynomial kernel.

    Arguments:
        y: features, or what `polynomial_sums` made of them.

    Raises:
        DataError: unlike dimensions, features that are not finite, or fewer than 3 examples a side.
    """
    return squared_mmd(x, polynomial_sums(check_features(x, y)[1]) if isinstance(y, Tensor) else y)


def rbf_mmd(x: Tensor, y: Tensor | KernelSums) -> Uncertain:
    """MMD^2 of generated features x (M, d) and reference features y (N, d), with a Gaussian kernel; at most 2.

    Arguments:
        y: features, or what `gaussian_sums` made of them.

    Raises:
        DataError: unlike dimensions, features that are not finite, fewer than 3 examples a side, or a reference
            of equal examples.
    """
    return squared_mmd(x, gaussian_sums(check_features(x, y)[1]) if isinstance(y, Tensor) else y)


def squared_mmd(x: Tensor, reference: KernelSums) -> Uncertain:
    """The unbiased MMD^2 of features x (M, d) from a reference, with the reference's kernel."""
    x, _ = check_features(x, reference.x)
    gen, ref = KernelSums.of(x, reference.kernel), reference
    cross = _block_sums(ref.kernel, gen.x, gen.blocks, ref.x, ref.blocks, itself=False)
    m, n = len(gen.x), len(ref.x)
    xx, xx_without = _own_means(gen)
    yy, yy_without = _own_means(ref)
    total = cross.sum()
    xy_without_x = (total - cross.sum(1)) / ((m - gen.sizes) * n)
    xy_without_y = (total - cross.sum(0)) / ((n - ref.sizes) * m)
    return delete_one(
        float(xx + yy - 2.0 * total / (m * n)),
        xx_without + yy - 2.0 * xy_without_x,
        xx + yy_without - 2.0 * xy_without_y,
        m,
        n,
    )


def _own_means(s: KernelSums) -> tuple[Tensor, Tensor]:
    """The mean over pairs of different examples, and (G,) the same without each block."""
    n, total = len(s.x), s.sums.sum()
    rest = n - s.sizes
    return total / (n * (n - 1)), (total - 2.0 * s.sums.sum(1) + s.sums.diagonal()) / (rest * (rest - 1.0))


def _block_sums(kernel: Kernel, x: Tensor, x_blocks: Tensor, y: Tensor, y_blocks: Tensor, *, itself: bool) -> Tensor:
    """Sums of the kernel matrix over pairs of blocks (G_x, G_y); with `itself`, y is x and its diagonal is left out."""
    in_x, in_y = (torch.nn.functional.one_hot(b).double() for b in (x_blocks, y_blocks))
    sums = x.new_zeros(in_x.shape[1], in_y.shape[1])
    for r in range(0, len(x), TILE):
        rows = slice(r, r + TILE)
        for c in range(r if itself else 0, len(y), TILE):
            columns = slice(c, c + TILE)
            k = kernel(x[rows], y[columns])
            if itself and c == r:
                k.fill_diagonal_(0.0)
            part = in_x[rows].T @ (k @ in_y[columns])
            sums += part
            if itself and c > r:
                sums += part.T
    return sums


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    d2 = torch.addmm(b.square().sum(1), a, b.T, alpha=-2.0).add_(a.square().sum(1, keepdim=True))
    return d2.clamp_(min=0.0)  # rounding
