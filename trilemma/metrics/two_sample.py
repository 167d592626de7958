r"""The classifier two-sample test: how well can a classifier tell generated from reference examples?

(Lopez-Paz & Oquab 2017, arXiv:1610.06545, here with the area under the ROC curve (AUC) in place of the accuracy, so
that unequal sizes need no correction.) A classifier is trained on 4/5 of the examples and scores the rest,
    AUC = P(s(x) > s(y)) + P(s(x) = s(y)) / 2
for generated x and reference y; the value is the mean over 5 folds. 0.5: they cannot be told apart; 1: always. By
chance it can be below 0.5. "linear" is logistic regression on standardised features and sees means only; "nonlinear",
gradient-boosted trees on histograms, sees the rest too.

Error: DeLong, DeLong & Clarke-Pearson 1988, Biometrics 44. The AUC of a fold is a U-statistic with the components
    V10_i = mean_j psi(s(x_i), s(y_j)),    V01_j = mean_i psi(s(x_i), s(y_j)),    psi(a, b) = [a > b] + [a = b] / 2,
and Var AUC = S10 / m + S01 / n with the sample variances S of the components. Within a fold of m examples the
contrasts are (V - AUC) / sqrt(m - 1), scaled such that the mean square over all folds is the variance of their mean.
How the classifier would vary with other training examples is not in the error: with 200 examples a side and an AUC near
1/2 the true spread is about a third larger than the standard error, farther off a tenth.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.metrics.estimate import check_features
from trilemma.metrics.jackknife import shuffle_into_blocks
from trilemma.metrics.uncertain import Source, Uncertain

ROWS = 2000
"""Examples of each sample that are used at most."""
TREES: dict[str, Any] = {
    "max_iter": 100,
    "max_leaf_nodes": 8,
    "l2_regularization": 10.0,
    "early_stopping": False,
    "random_state": 0,
}
"""Boosted trees for hundreds to thousands of rows: small ones, so that noise is learned less than structure."""

ClassifierKind = Literal["linear", "nonlinear"]


def make_classifier(kind: ClassifierKind) -> Any:
    """A fresh scikit-learn classifier, deterministic."""
    if kind == "linear":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return HistGradientBoostingClassifier(**TREES)


def classifier_auc(x: Tensor, y: Tensor, kind: ClassifierKind, folds: int = 5) -> Uncertain:
    """AUC in [0, 1] of telling generated features x (M, d) from reference features y (N, d); 0.5 is best.

    The order of the examples does not matter. Of larger samples 2000 examples are used, the same ones in any order.

    Raises:
        DataError: unlike dimensions, features that are not finite, or fewer than 2 examples a side in each fold.
    """
    x, y = check_features(x, y)
    if min(len(x), len(y)) < 2 * folds:
        few = min(len(x), len(y))
        raise DataError(f"{few} examples are too few for a classifier test in {folds} folds: give at least {2 * folds}")
    x, y = (shuffle_into_blocks(t)[0][:ROWS].cpu() for t in (x, y))  # the same folds in whatever order they come
    rows = torch.cat([x, y]).numpy()
    label = torch.cat([torch.ones(len(x)), torch.zeros(len(y))]).numpy()
    components = []
    for test in fold_members(len(x), len(y), folds):
        classifier = make_classifier(kind).fit(rows[~test], label[~test])
        score = torch.from_numpy(classifier.decision_function(rows[test])).double()
        generated = torch.from_numpy(label[test] == 1.0)
        components.append(delong_components(score[generated], score[~generated]))
    return mean_auc(components, f"mean AUC of {folds} folds, DeLong; without the variation of the {kind} classifier")


def fold_members(m: int, n: int, folds: int) -> list[Any]:
    """Boolean arrays (m + n,): who is tested in each fold, an equal share of both samples."""
    fold = torch.cat([torch.arange(size) * folds // size for size in (m, n)])
    return [(fold == f).numpy() for f in range(folds)]


def delong_components(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """V10 (m,) and V01 (n,) of scores x (m,) that ought to be high and y (n,) that ought to be low."""
    return _share_below(x, y), 1.0 - _share_below(y, x)


def mean_auc(components: list[tuple[Tensor, Tensor]], method: str) -> Uncertain:
    """The mean AUC of folds from the components (V10, V01) of each, with DeLong's error."""
    value = sum(float(v10.mean()) for v10, _ in components) / len(components)
    sources, n = {}, {}
    for name, parts in (("generated", [v for v, _ in components]), ("reference", [v for _, v in components])):
        total = n[name] = sum(len(v) for v in parts)
        # Var of the mean = sum over folds of S / size / folds^2 = (1 / total) sum of squared contrasts.
        contrasts = [(v - v.mean()) / math.sqrt(len(v) - 1) * math.sqrt(total / len(v)) / len(parts) for v in parts]
        sources[name] = Source(torch.cat(contrasts), total - len(parts))
    return Uncertain(value, sources, n, method)


def _share_below(x: Tensor, y: Tensor) -> Tensor:
    """For each x the share of y below it, equal ones by half."""
    y = y.sort().values.contiguous()
    below, at_most = torch.searchsorted(y, x.contiguous()), torch.searchsorted(y, x.contiguous(), right=True)
    return (below + at_most).double() / (2 * len(y))
