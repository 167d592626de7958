r"""The Frechet distance between the moments of two samples.

For means mu and covariances C, in float64,
    d^2 = |mu_1 - mu_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^{1/2}
is the squared 2-Wasserstein distance of the two Gaussians with these moments (Dowson & Landau 1982; as a
metric of generative models: Heusel et al. 2017, arXiv:1706.08500). It is a distance between moments, not
between distributions: it is zero for any two distributions that share mean and covariance.
On Inception features it is called FID; on ours it is not.

It is biased: with N examples a side its expectation exceeds the limit by a term of order 1/N that depends
on the distributions (Chong & Forsyth 2020, arXiv:1911.07023). Compare only values taken at equal N.

For any factors C_i = F_i F_i^T, (C_1 C_2)^{1/2} has the trace of the nuclear norm of F_1^T F_2:
    tr (C_1 C_2)^{1/2} = sum of the singular values of F_1^T F_2.
With N > d examples F is the Cholesky factor of C (or V sqrt(lambda) where C is singular); with N <= d it is the
centred sample (X - mu)^T / sqrt(N - 1) itself, and F_1^T F_2 the cross-Gram matrix. No matrix square root is
taken, and singular covariances are nothing special. Covariances have the divisor N - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import Replicates, delete_one, shuffle_into_blocks, without


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
    return _distance(x.mean(0), sample_factor(x), y.mean(0), sample_factor(y))


def frechet_from_moments(mu_x: Tensor, cov_x: Tensor, mu_y: Tensor, cov_y: Tensor) -> Tensor:
    """d^2 between means (d,) and covariances (d, d), () float64."""
    return _distance(mu_x.double(), covariance_factor(cov_x.double()), mu_y.double(), covariance_factor(cov_y.double()))


def frechet_replicates(x: Tensor, y: Tensor) -> Replicates:
    """d^2 of generated (N, d) and reference (M, d) features with its delete-a-block contrasts.

    The bias grows as examples are deleted, by the same amount for every block, so it shifts the mean of the
    replicates and not their spread: the standard error is right for the value at this sample size. Between
    equal distributions d^2 has no linear term, and the standard error is too large, by 1.4 and less.
    """
    x, y = _check(x, y)
    mu_x, f_x, without_x = _moments_without(x)
    mu_y, f_y, without_y = _moments_without(y)
    return delete_one(
        float(_distance(mu_x, f_x, mu_y, f_y)),
        torch.stack([_distance(mu, f, mu_y, f_y) for mu, f in without_x]),
        torch.stack([_distance(mu_x, f_x, mu, f) for mu, f in without_y]),
        len(x),
        len(y),
    )


def sample_factor(x: Tensor) -> Tensor:
    """F (d, min(N, d)) with F F^T the covariance of x (N, d)."""
    n, d = x.shape
    centred = x - x.mean(0)
    return covariance_factor(centred.T @ centred / (n - 1)) if n > d else centred.T / (n - 1) ** 0.5


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
    """Sum of the singular values of a (m, n).

    The eigenvalues of the Gram matrix are the fast way. Their square roots lose half of the digits of small
    singular values, so a Gram matrix of condition above 1 / sqrt(eps) is passed to the SVD.
    """
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    values: Tensor = torch.linalg.eigvalsh(gram)
    if float(values[0]) > torch.finfo(a.dtype).eps ** 0.5 * float(values[-1]):
        return values.sqrt().sum()
    singular: Tensor = torch.linalg.svdvals(a)
    return singular.sum()


def _distance(mu_x: Tensor, f_x: Tensor, mu_y: Tensor, f_y: Tensor) -> Tensor:
    trace = f_x.square().sum() + f_y.square().sum()
    return (mu_x - mu_y).square().sum() + trace - 2.0 * nuclear_norm(f_x.T @ f_y)


def _moments_without(x: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Mean and factor of x (N, d), and the same without each block, from sums per block about the common mean."""
    x, blocks = shuffle_into_blocks(x)
    n, d = x.shape
    mu = x.mean(0)
    centred = x - mu
    pairs = []
    total = centred.T @ centred if n > d else None
    for b in blocks:
        rest = n - (b.stop - b.start)
        if rest < 2:
            raise DataError(f"{n} examples are too few for a Frechet distance with an interval: give at least 3")
        part = centred[b]
        shift = -part.sum(0) / rest
        if total is not None:
            cov = (total - part.T @ part - rest * torch.outer(shift, shift)) / (rest - 1)
            pairs.append((mu + shift, covariance_factor(cov)))
        else:
            pairs.append((mu + shift, sample_factor(without(x, b))))
    return mu, sample_factor(x), pairs


def _check(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_features(x, y)
    if min(len(x), len(y)) < 2:
        raise DataError(f"a covariance needs at least 2 examples a side, got {len(x)} and {len(y)}")
    return x, y
