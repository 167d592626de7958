r"""Does a model emit its training data? Tests on nearest neighbours.

The main test. Pool N training and K held-out examples (both real, and exchangeable if the model has not looked at
either) and find each sample's nearest neighbour in the pool. A model that generalises is nearest to a training example
in a share p = N / (N + K) of its samples; one that copies is nearer to what it saw. The samples are sorted by the
distance to their neighbour, because copies are close: with a_q of the n_q closest nearest to a training example,
    z_q = (a_q - p n_q) / (p (1 - p) sum_i c_{q,i}^2)^{1/2},    c_{q,i} how many of them have the neighbour i,
    T = max over q in {all, 1/2, 1/5, 1/10, 1/20, 1/50, 1/100} of z_q.
The p-value comes from permuting which of the pooled examples are called training examples, and taking the same
maximum: it is exact whatever the model's distribution is, because under the hypothesis the labels are exchangeable.
Samples are not exchangeable (a collapsed model puts all of them beside one example); a permutation of labels of
*examples* does not need them to be. All training examples are pooled, not only as many as are held out: a copy of an
example that is not in the pool would look like any other sample.

Exchangeable they are only if the distances treat them alike. Principal components whitened on the training split do
not (its covariance is the identity, that of other data is a little larger), so these are whitened again on the pool.
A network fitted to the training split is not undone; there the p-value is approximate. Where the splits keep
identical examples together, only different ones are pooled.

Beside it:
    authenticity: share of samples x farther from their nearest training example t than t is from the rest of the
        training data (Alaa, van Breugel, Saveliev & van der Schaar 2022, arXiv:2102.08921); low for copies.
    training distance: median distance of a sample to the training data over that of a held-out example
        (distance to the closest record); 1 for unseen real data, 0 for copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.noise import make_generator
from trilemma.metrics.distances import nearest
from trilemma.metrics.jackknife import jackknife_halves
from trilemma.metrics.uncertain import Uncertain, mean

SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
PERMUTATIONS = 4000
ALARM = 0.01
"""A p-value below this is called memorization."""


@dataclass(frozen=True)
class NeighbourTest:
    """What the test on nearest neighbours found.

    Attributes:
        share: of all samples, how many are nearest to a training example.
        expected: the same of unseen data, N / (N + K).
        closest: the share of the closest samples at which the evidence is strongest.
        share_of_closest: how many of these are nearest to a training example.
        p_value: of the maximum over all shares, by permutation; at least 1 / (PERMUTATIONS + 1).
        n: samples.
        pooled: training examples in the pool, N.
        held_out: held-out examples in the pool, K.
        trained: all training examples.
    """

    share: float
    expected: float
    closest: float
    share_of_closest: float
    p_value: float
    n: int
    pooled: int
    held_out: int
    trained: int

    def detectable(self, level: float = ALARM) -> float:
        """The least share of exact copies of random training examples that gives p below `level`, roughly.

        c visible copies are all nearest to training examples by chance with probability p^c, at some three
        independent depths q; a share c of the samples in copies has c n N / trained of them visible.
        """
        copies = math.log(level / 3.0) / math.log(self.expected)
        return min(1.0, copies * self.trained / (self.n * self.pooled))

    def caveat(self, level: float = ALARM) -> str:
        """Whether p is below `level`, and if not, what the test could not have seen."""
        if self.p_value < level:
            return "Nearest to training data more often than chance allows."
        if self.detectable(level) >= 1.0:
            return f"With {self.n} samples and {self.held_out} held-out examples nothing can be said about copying."
        return (
            f"No sign of copying; but with {self.n} samples against {self.pooled} training and {self.held_out} "
            f"held-out examples, copies would go unnoticed below about {self.detectable(level):.0%} of the samples."
        )


def neighbour_test(
    generated: Tensor,
    train: Tensor,
    test: Tensor,
    *,
    whiten: bool = False,
    trained: int | None = None,
    seed: int = 0,
) -> NeighbourTest:
    """Whether samples are nearer to training than to held-out examples.

    Arguments:
        generated, train, test: features (M, d), (N, d), (K, d).
        whiten: take distances in the pool's own whitened principal components.
        trained: how many examples the model was trained on, where `train` holds only some of them.
        seed: of the order of the pool (which settles ties) and of the permutations.
    """
    g = make_generator("memorization", seed)
    size = len(train) + len(test)
    shuffled = torch.randperm(size, generator=g)
    pool, is_train = torch.cat([train, test])[shuffled], (torch.arange(size) < len(train))[shuffled]
    if whiten:
        generated, pool = whiten_by(pool, generated), whiten_by(pool, pool)
    expected = len(train) / size
    d2, index = nearest(generated, 1, pool)
    order = d2[:, 0].argsort(stable=True)
    counts = torch.stack(  # c_{q,i} (Q, N + K)
        [torch.bincount(index[order[: math.ceil(q * len(order))], 0], minlength=size) for q in SHARES]
    ).double()
    scale = (counts.square().sum(1) * expected * (1.0 - expected)).sqrt()

    def z(labels: Tensor) -> Tensor:  # (N + K, R) -> (Q, R)
        return (counts @ (labels.double() - expected)) / scale[:, None]

    observed = z(is_train[:, None])[:, 0]
    best = int(observed.argmax())
    as_extreme = 0
    for start in range(0, PERMUTATIONS, 500):  # in parts: the labels of all at once would be large
        some = range(start, min(start + 500, PERMUTATIONS))
        permuted = torch.stack([is_train[torch.randperm(size, generator=g)] for _ in some], 1)
        as_extreme += int((z(permuted).amax(0) >= observed[best] - 1e-9).sum())
    shares = counts @ is_train.double() / counts.sum(1)
    return NeighbourTest(
        share=float(shares[0]),
        expected=expected,
        closest=SHARES[best],
        share_of_closest=float(shares[best]),
        p_value=(as_extreme + 1) / (PERMUTATIONS + 1),
        n=len(generated),
        pooled=len(train),
        held_out=len(test),
        trained=len(train) if trained is None else trained,
    )


def whiten_by(pool: Tensor, x: Tensor) -> Tensor:
    """x (M, d) in the principal components of the pool (N, d), each divided by its standard deviation."""
    values, vectors = torch.linalg.eigh(pool.T.cov().reshape(pool.shape[1], -1))
    kept = values > 1e-9 * values[-1]
    projection: Tensor = vectors[:, kept] / values[kept].sqrt()
    return (x - pool.mean(0)) @ projection


class TrainingDistances:
    """Distances to the training data, of samples and of held-out examples.

    Arguments:
        train: features (N, d), at least two.
        test: features of held-out examples (K, d).
    """

    def __init__(self, train: Tensor, test: Tensor) -> None:
        self.train = train
        self.test = nearest(test, 1, train)[0][:, 0].sqrt()
        self.among_train = nearest(train, 1)[0][:, 0].sqrt()

    def measure(self, generated: Tensor) -> dict[str, Uncertain]:
        """ "authenticity" and "training_distance" of samples (M, d)."""
        d2, index = nearest(generated, 1, self.train)
        distance, t = d2[:, 0].sqrt(), index[:, 0]
        authentic = mean((distance > self.among_train[t]).double(), "generated", "share of samples; training set fixed")
        ratio = jackknife_halves(_ratio_of_medians, distance, self.test)
        return {"authenticity": authentic, "training_distance": ratio}


def _ratio_of_medians(a: Tensor, b: Tensor) -> float:
    below = float(b.quantile(0.5))
    return float(a.quantile(0.5)) / below if below > 0.0 else math.nan
