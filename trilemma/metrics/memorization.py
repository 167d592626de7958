r"""Does a model emit its training data? Tests on nearest neighbours.

The main test. Pool equally many training and held-out examples (both real, and exchangeable if the model has not looked
at either) and find each sample's nearest neighbour in the pool. A model that generalises is as often nearest to a
training as to a held-out example; one that copies is nearer to what it saw. The samples are sorted by the distance
to their neighbour, because copies are close: with a_q of the closest n_q samples nearest to a training example,
    z_q = (a_q - n_q / 2) / (sum_p c_{q,p}^2 / 4)^{1/2},    c_{q,p} how many of them have the neighbour p,
    T = max over q in {all, 1/2, 1/5, 1/10, 1/20, 1/50, 1/100} of z_q.
Identical examples count once: the splits keep them together, so only different ones are exchangeable. The p-value
comes from permuting which of the pooled examples are called training examples, and taking the same
maximum: it is exact whatever the model's distribution is, because under the hypothesis the labels are exchangeable.
Samples are not exchangeable (a collapsed model puts all of them beside one example); a permutation of labels of
*examples* does not need them to be.

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
        share: of all samples, how many are nearest to a training example; 1/2 is expected of unseen data.
        closest: the share of the closest samples at which the evidence is strongest.
        share_of_closest: how many of these are nearest to a training example.
        p_value: of the maximum over all shares, by permutation; at least 1 / (PERMUTATIONS + 1).
        n: samples.
        pooled: training examples in the pool, and as many held-out ones.
        trained: all training examples.
    """

    share: float
    closest: float
    share_of_closest: float
    p_value: float
    n: int
    pooled: int
    trained: int

    @property
    def detectable(self) -> float:
        """The share of exact copies of random training examples that would be found about half of the time.

        c visible copies, all nearest to training examples, have z = sqrt(c), and z of about 3 is needed.
        """
        return min(1.0, 9.0 * self.trained / (self.n * self.pooled))

    def caveat(self) -> str:
        """What the test could not have seen, in a sentence."""
        if self.p_value < ALARM:
            return "Nearest to training data more often than chance allows."
        return (
            f"No sign of copying; but with {self.n} samples against {self.pooled} + {self.pooled} examples, "
            f"copies would go unnoticed below about {self.detectable:.0%} of the samples."
        )


def neighbour_test(
    generated: Tensor, train: Tensor, test: Tensor, *, trained: int | None = None, seed: int = 0
) -> NeighbourTest:
    """Whether samples are nearer to training than to held-out examples.

    Arguments:
        generated, train, test: features (M, d), (N, d), (K, d). The pool holds equally many different examples of
            both, as many as the smaller part has; the larger part's are drawn at random.
        trained: how many examples the model was trained on, where `train` holds only some of them.
        seed: of that draw, of the order of the pool (which settles ties) and of the permutations.
    """
    g = make_generator("memorization", seed)
    train, test = (torch.unique(t, dim=0) for t in (train, test))
    size = min(len(train), len(test))
    chosen = [t[torch.randperm(len(t), generator=g)[:size]] for t in (train, test)]
    shuffled = torch.randperm(2 * size, generator=g)
    pool, is_train = torch.cat(chosen)[shuffled], (torch.arange(2 * size) < size)[shuffled]
    d2, index = nearest(generated, 1, pool)
    order = d2[:, 0].argsort(stable=True)
    counts = torch.stack(  # c_{q,p} (Q, P)
        [torch.bincount(index[order[: math.ceil(q * len(order))], 0], minlength=2 * size) for q in SHARES]
    ).double()
    scale = counts.square().sum(1).sqrt() / 2.0

    def z(labels: Tensor) -> Tensor:  # (P, R) -> (Q, R)
        return (counts @ (labels.double() - 0.5)) / scale[:, None]

    observed = z(is_train[:, None])[:, 0]
    best = int(observed.argmax())
    permuted = torch.stack([is_train[torch.randperm(2 * size, generator=g)] for _ in range(PERMUTATIONS)], 1)
    as_extreme = int((z(permuted).amax(0) >= observed[best] - 1e-9).sum())
    shares = counts @ is_train.double() / counts.sum(1)
    return NeighbourTest(
        share=float(shares[0]),
        closest=SHARES[best],
        share_of_closest=float(shares[best]),
        p_value=(as_extreme + 1) / (PERMUTATIONS + 1),
        n=len(generated),
        pooled=size,
        trained=len(train) if trained is None else trained,
    )


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
