r"""Metrics of class labels and of a classifier's outputs.

Inception score (Salimans et al. 2016, arXiv:1606.03498), from the logits of a classifier for generated examples:
    IS = exp( E_x KL(p(c | x) || p(c)) ),    p(c) = E_x p(c | x),
between 1 and the number of classes K. It sees no reference data. All samples count together, not averages over splits.

Class histogram: KL(p || q) = sum_c p_c ln(p_c / q_c) in nats, with p of the generated and q of the reference labels.
Each class starts with the count 1/2 (Jeffreys' prior), so that empty classes give finite values:
    p_c = (count_c + 1/2) / (M + K/2).

Modes hit: the number of classes whose share among the generated labels is at least a tenth of their share among the
reference labels; classes that the reference lacks do not count.
"""

from __future__ import annotations

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import delete_one, shuffle_into_blocks
from trilemma.metrics.uncertain import Uncertain

K_LABELLER = 15
HIT = 0.1
"""Share of its reference share that makes a class hit."""


def inception_score(logits: Tensor) -> Uncertain:
    """The inception score of logits (M, K), in [1, K].

    The error is that of the generated sample, by the delete-a-block jackknife; the classifier is taken as given.

    Raises:
        DataError: another shape, fewer than 2 examples, or logits that are not finite.
    """
    if logits.ndim != 2 or len(logits) < 2 or not bool(logits.isfinite().all()):
        raise DataError(f"an inception score needs finite logits (M, K) with M >= 2, got {tuple(logits.shape)}")
    logits, blocks = shuffle_into_blocks(logits.double().cpu())
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    sizes = torch.tensor([b.stop - b.start for b in blocks], dtype=torch.float64)
    neg_entropy = torch.stack([(p[b] * log_p[b]).sum() for b in blocks])
    marginal = torch.stack([p[b].sum(0) for b in blocks])

    def score(neg_entropy: Tensor, marginal: Tensor, n: Tensor) -> Tensor:
        mean = marginal / n[..., None]
        return (neg_entropy / n - torch.xlogy(mean, mean).sum(-1)).exp()

    total = (neg_entropy.sum(), marginal.sum(0), sizes.sum())
    value = score(*total)
    # Sums of the other blocks: a difference could leave a probability just below 0.
    others = (1.0 - torch.eye(len(blocks), dtype=torch.float64)) @ marginal
    without = score(total[0] - neg_entropy, others, total[2] - sizes)
    m = len(logits)
    error = delete_one(float(value), without, without, m, m).sources["generated"]
    return Uncertain(
        float(value), {"generated": error}, {"generated": m}, f"delete-a-block jackknife, {len(blocks)} blocks"
    )


def class_histogram_kl(generated_labels: Tensor, reference_labels: Tensor, classes: int) -> Uncertain:
    """KL in nats, >= 0, of the classes of generated labels (M,) from those of reference labels (N,), all in 0 .. K-1.

    Raises:
        DataError: labels outside the classes, or fewer than 2 a side.
    """
    sizes, counts = [], []
    for name, labels in (("generated", generated_labels), ("reference", reference_labels)):
        _check_labels(name, labels, classes, least=2)
        labels, blocks = shuffle_into_blocks(labels.cpu())
        counts.append(torch.stack([labels[b].bincount(minlength=classes) for b in blocks]))
        sizes.append(len(labels))
    (p, p_without), (q, q_without) = (_smoothed(c) for c in counts)
    return delete_one(float(_kl(p, q)), _kl(p_without, q), _kl(p, q_without), *sizes)


def modes_hit(generated_labels: Tensor, reference_labels: Tensor, classes: int) -> Uncertain:
    """How many classes hold, among generated labels (M,), at least a tenth of their share of reference labels (N,).

    Raises:
        DataError: labels outside the classes, or none.
    """
    _check_labels("generated", generated_labels, classes, least=1)
    _check_labels("reference", reference_labels, classes, least=1)
    m, n = len(generated_labels), len(reference_labels)
    p, q = (t.cpu().bincount(minlength=classes).double() for t in (generated_labels, reference_labels))
    hit = (q > 0) & (p * n >= HIT * q * m)
    method = f"classes with at least a tenth of their reference share, of {int((q > 0).sum())} classes; no interval"
    return Uncertain(float(hit.sum()), {}, {"generated": m, "reference": n}, method)


class Labeller:
    """Classes of features where there is no classifier: the majority among the 15 nearest training examples.

    Of classes with equally many neighbours the first is taken.

    Arguments:
        features: of labelled training examples, (N, d).
        labels: their classes (N,), int64.
        k: neighbours.

    Raises:
        DataError: unlike lengths, features that are not finite, or fewer than k examples.
    """

    def __init__(self, features: Tensor, labels: Tensor, k: int = K_LABELLER) -> None:
        features, _ = check_features(features, features)
        if labels.shape != features.shape[:1]:
            raise DataError(f"{len(features)} training examples, but labels of shape {tuple(labels.shape)}")
        if len(features) < k:
            raise DataError(f"{len(features)} training examples are too few for {k} nearest neighbours")
        self._features = features
        self._neighbours = KNeighborsClassifier(n_neighbors=k).fit(features.cpu().numpy(), labels.cpu().numpy())

    def __call__(self, features: Tensor) -> Tensor:
        """Classes (M,), int64, of features (M, d)."""
        features, _ = check_features(features, self._features)
        return torch.from_numpy(self._neighbours.predict(features.cpu().numpy())).long()


def _smoothed(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Histograms from the counts (G, K) of each block: of all (K,), and without each block (G, K)."""
    total = counts.sum(0)
    rest = torch.cat([total[None], total - counts]).double() + 0.5
    p = rest / rest.sum(1, keepdim=True)
    return p[0], p[1:]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def _check_labels(name: str, labels: Tensor, classes: int, least: int) -> None:
    if labels.ndim != 1 or len(labels) < least:
        raise DataError(f"{name} labels must be (N,) with N >= {least}, got shape {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(f"{name} labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
