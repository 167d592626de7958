r"""The Frechet distance between the moments of two samples.

For means mu and covariances C, in float64,
    d^2 = |mu_1 - mu_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^{1/2}
is the squared 2-Wasserstein distance of the two Gaussians with these moments (Dowson & Landau 1982; as a
metric of generative models: Heusel et al. 2017, arXiv:1706.08500). It is a distance between moments, not
between distributions: it is zero for any two distributions that share mean and covariance.
On Inception features it is called FID; on ours it is not.

It is biased: with N examples a side its expectation exceeds the limit by a term of order 1/N that depends
on the distributions. Compare only values taken at equal N. Over N / 2, 3 N / 4 and N examples it is nearly linear in
1/N; the intercept of that line estimates the value for infinitely many (Chong & Forsyth 2020, arXiv:1911.07023). We
average over four choices of blocks in which each example is used equally often, so the intercept has the same
first-order error as the distance itself, and its contrasts.

For any factors C_i = F_i F_i^T, (C_1 C_2)^{1/2} has the trace of the nuclear norm of F_1^T F_2:
    tr (C_1 C_2)^{1/2} = sum of the singular values of F_1^T F_2.
With N > d examples F is the Cholesky factor of C (or V sqrt(lambda) where C is singular); with N <= d it is the
centred sample (X - mu)^T / sqrt(N - 1) itself, and F_1^T F_2 the cross-Gram matrix. No matrix square root is
taken, and singular covariances are nothing special. Covariances have the divisor N - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import GROUPS, delete_one, jackknife, shuffle_into_blocks, without
from trilemma.metrics.uncertain import Uncertain


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """d^2 between the moments of two samples of features.

    Arguments:
        x, y: (N, d) and (M, d), at least two examples each.

    Returns:
        () float64. Rounding may leave it below zero by some 1e-14 of the traces; it is not clipped.

    Raises:
        DataError: fewer than two examples, unlike dimensions, or features that are not finite.
    """
    x, y = _check(x, y)
    return frechet_from_factors(x.mean(0), sample_factor(x), y.mean(0), sample_factor(y))


def frechet_from_moments(mu_x: Tensor, cov_x: Tensor, mu_y: Tensor, cov_y: Tensor) -> Tensor:
    """d^2 between means (d,) and covariances (d, d), () float64."""
    return frechet_from_factors(
        mu_x.double(), covariance_factor(cov_x.double()), mu_y.double(), covariance_factor(cov_y.double())
    )


def frechet(generated: SampleMoments, reference: SampleMoments) -> Uncertain:
    """d^2 with its delete-a-block contrasts.

    The bias grows as examples are deleted, by the same amount for every block, so it shifts the mean of the
    replicates and not their spread: the standard error is right for the value at this sample size. Between
    equal distributions d^2 has no linear term, and the standard error is too large, by 1.4 and less.
    """
    x, y = generated, reference
    return delete_one(
        float(frechet_from_factors(x.mean, x.factor, y.mean, y.factor)),
        torch.stack([frechet_from_factors(*x.without(b), y.mean, y.factor) for b in x.blocks]),
        torch.stack([frechet_from_factors(x.mean, x.factor, *y.without(b)) for b in y.blocks]),
        len(x.x),
        len(y.x),
    )


def spread(generated: SampleMoments, reference: SampleMoments) -> Uncertain:
    """tr C_x / tr C_y with its delete-a-block contrasts; a trace needs no factor."""
    return jackknife(lambda x, y: x.var(0).sum() / y.var(0).sum(), generated.x, reference.x)


def frechet_limit(generated: SampleMoments, reference: SampleMoments, at_n: Uncertain) -> Uncertain:
    """The distance for infinitely many examples: the intercept of d^2 over 1/N.

    Arguments:
        at_n: `frechet` of the same samples, for its value and contrasts.

    Raises:
        DataError: fewer than 40 examples.
    """
    x, y = generated, reference
    if min(len(x.x), len(y.x)) < 2 * GROUPS:
        raise DataError(f"fewer than {2 * GROUPS} examples cannot be extrapolated from")
    inverse, values = [(1.0 / len(x.x) + 1.0 / len(y.x)) / 2.0], [at_n.value]
    for share in (0.5, 0.75):
        for start in range(0, GROUPS, GROUPS // 4):
            a, b = x.part(start, share), y.part(start, share)
            inverse.append((1.0 / len(a) + 1.0 / len(b)) / 2.0)
            values.append(float(frechet_distance(a, b)))
    t, d = (torch.tensor(v, dtype=torch.float64) for v in (inverse, values))
    # The whole sample counts as much as the four parts of each size together.
    w = torch.tensor([4.0] + 8 * [1.0], dtype=torch.float64) / 12.0
    slope = (w * (t - w @ t) * d).sum() / (w * (t - w @ t).square()).sum()
    return Uncertain(float(w @ d - slope * (w @ t)), at_n.sources, at_n.n, f"extrapolated in 1/N; {at_n.method}")


@dataclass(frozen=True)
class Moments:
    """Of features that may be too many to keep: they accumulate over batches and over processes (`merge`).

    Number, mean (d,) and scatter sum (x - mean)(x - mean)^T (d, d), in float64 (Chan, Golub & LeVeque 1983,
    The American Statistician 37).
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of features (N, d); shifted by their mean before they are squared."""
        x = x.double()
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, gram(centred.T))

    def merge(self, other: Moments) -> Moments:
        """Of both samples together."""
        n = self.n + other.n
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.n / n)
        return Moments(n, mean, self.scatter + other.scatter + torch.outer(shift, shift) * (self.n * other.n / n))

    def without(self, part: Moments) -> Moments:
        """What is left when `part` of the sample is taken out."""
        n = self.n - part.n
        shift = part.mean - self.mean
        mean = self.mean - shift * (part.n / n)
        return Moments(n, mean, self.scatter - part.scatter - torch.outer(shift, shift) * (self.n * part.n / n))

    @property
    def covariance(self) -> Tensor:
        """With the divisor n - 1."""
        if self.n < 2:
            raise DataError(f"a covariance needs at least 2 examples, got {self.n}")
        return self.scatter / (self.n - 1)


class SampleMoments:
    """Mean and covariance factor of a sample (N, d), and the same without each of its blocks.

    Raises:
        DataError: fewer than three examples.
    """

    def __init__(self, x: Tensor) -> None:
        if len(x) < 3:
            raise DataError(f"{len(x)} examples are too few for a Frechet distance with an interval: give at least 3")
        self.x, self.blocks = shuffle_into_blocks(x)

    @cached_property
    def moments(self) -> Moments:
        return Moments.of(self.x)

    @cached_property
    def mean(self) -> Tensor:
        return self.moments.mean if self._many else self.x.mean(0)

    @cached_property
    def factor(self) -> Tensor:
        """F (d, min(N, d)) with F F^T the covariance."""
        return covariance_factor(self.moments.covariance) if self._many else sample_factor(self.x)

    @property
    def _many(self) -> bool:
        return len(self.x) > self.x.shape[1]

    def without(self, block: slice) -> tuple[Tensor, Tensor]:
        """Mean and factor of the sample without one block."""
        if self._many:
            rest = self.moments.without(Moments.of(self.x[block]))
            return rest.mean, covariance_factor(rest.covariance)
        rows = without(self.x, block)
        return rows.mean(0), sample_factor(rows)

    def part(self, start: int, share: float) -> Tensor:
        """The examples of a share of the blocks, from block `start` on, round the end."""
        count = round(share * len(self.blocks))
        return torch.cat([self.x[self.blocks[(start + g) % len(self.blocks)]] for g in range(count)])


def sample_factor(x: Tensor) -> Tensor:
    """F (d, min(N, d)) with F F^T the covariance of x (N, d)."""
    n, d = x.shape
    centred = x - x.mean(0)
    return covariance_factor(gram(centred.T) / (n - 1)) if n > d else centred.T / (n - 1) ** 0.5


def covariance_factor(cov: Tensor) -> Tensor:
    """F (d, d) with F F^T = cov, for a covariance of any rank.

    Eigenvalues below d eps lambda_max cannot be told from the rounding of zero and are taken as zero.
    """
    d, eps = len(cov), torch.finfo(cov.dtype).eps
    factor: Tensor
    values: Tensor
    vectors: Tensor
    factor, failed = torch.linalg.cholesky_ex(cov)
    pivots = factor.diagonal()
    if not failed and float(pivots.min()) > (d * eps) ** 0.25 * float(pivots.max()):
        return factor
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.where(values > d * eps * values[-1], torch.zeros_like(values)).sqrt()


def nuclear_norm(a: Tensor) -> Tensor:
    """Sum of the singular values s_i of a (m, n), to 1e-9 of itself.

    The eigenvalues s_i^2 of the Gram matrix are the fast way. Each has a rounding error of about eps max s^2, its root
    so one of eps max s^2 / (2 s_i). Where these add up (as squares: their signs are random) to more than 1e-9 of the
    sum, the singular values are taken from a itself.
    """
    values: Tensor = torch.linalg.eigvalsh(gram(a if a.shape[0] <= a.shape[1] else a.T))
    eps = torch.finfo(a.dtype).eps
    if float(values[0]) > eps * float(values[-1]):
        roots = values.sqrt()
        error = eps * values[-1] * (0.5 / roots).square().sum().sqrt()
        if float(error) <= 1e-9 * float(roots.sum()):
            return roots.sum()
    singular: Tensor = torch.linalg.svdvals(a)
    return singular.sum()


def gram(a: Tensor) -> Tensor:
    """a a^T (m, m) of a (m, n), from the blocks on and below its diagonal: nearly half of the operations."""
    m = len(a)
    size = max(256, -(-m // 8))
    out = a.new_empty(m, m)
    for start in range(0, m, size):
        rows, below = slice(start, start + size), slice(start + size, m)
        out[start:, rows] = a[start:] @ a[rows].T
        out[rows, below] = out[below, rows].T
    return out


def _cross(f_x: Tensor, f_y: Tensor) -> Tensor:
    """F_x^T F_y; of a triangular F_y the zeros are left out."""
    d = len(f_y)
    size = max(256, -(-d // 8))
    if f_y.shape[1] != d or d <= size or not torch.equal(f_y, f_y.tril()):
        return f_x.T @ f_y
    parts = [f_x[start:].T @ f_y[start:, start : start + size] for start in range(0, d, size)]
    return torch.cat(parts, 1)


def frechet_from_factors(mu_x: Tensor, f_x: Tensor, mu_y: Tensor, f_y: Tensor) -> Tensor:
    """d^2 between means (d,) and factors (d, r) of covariances F F^T, () float64."""
    trace = f_x.square().sum() + f_y.square().sum()
    return (mu_x - mu_y).square().sum() + trace - 2.0 * nuclear_norm(_cross(f_x, f_y))


def _check(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_features(x, y)
    if min(len(x), len(y)) < 2:
        raise DataError(f"a covariance needs at least 2 examples a side, got {len(x)} and {len(y)}")
    return x, y
