r"""Metrics of tables: columns, pairs of columns, and what a predictor learns from generated rows.

Rows are (N, columns) in data units, missing values are NaN (`core.spec.Column`).

Column complement, per column, on the values that are not missing (the definitions of SDMetrics' KSComplement and
TVComplement):
    numeric, date:         1 - max_t |F(t) - G(t)|           (Kolmogorov-Smirnov)
    categorical, boolean:  1 - sum_c |p_c - q_c| / 2         (total variation)
1 is best. Where all generated values are missing it is 0; where all reference values are, it is NaN.

Correlation difference: the mean over pairs of numeric columns of |rho_x - rho_y| / 2 with Pearson's rho, from the
rows in which neither is missing; 0 is best. (SDMetrics' CorrelationSimilarity is 1 minus that of one pair.) A
correlation that does not exist, because a column is constant or fewer than two rows are complete, counts as 0: a
constant column has lost its correlations.

Train on synthetic, test on real (Esteban, Hyland & Raetsch 2017, arXiv:1706.02633): for each of the first 8 columns,
trees trained on generated rows predict it from the other columns of real test rows. Scores are R^2 for numbers and
dates,
    R^2 = 1 - sum (y - f)^2 / sum (y - mean y)^2,
and for categories (accuracy - base) / (1 - base), where base is the share of the most frequent category of the test
rows. 1 is perfect, 0 no better than a constant; both can be negative, and are not clipped.

Errors: delete-a-block jackknife over rows. Absolute values and maxima are not smooth where the distributions are nearly
equal: standard errors of complements and correlation differences are then up to 1.7 times too large (200 rows a side).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.spec import Column, DataSpec
from trilemma.metrics.jackknife import delete_one, shuffle_into_blocks
from trilemma.metrics.two_sample import TREES
from trilemma.metrics.uncertain import Uncertain, linear
from trilemma.metrics.wasserstein import MergedSamples

TARGETS = 8
MOST_CATEGORIES = 255
"""Columns with more categories are given to the trees as numbers: they split at most this many."""
CONSTANT = 1e-12
"""A variance below this share of the mean square about the median is rounding."""


def column_complements(x: Tensor, y: Tensor, spec: DataSpec) -> dict[str, Uncertain]:
    """1 - KS or 1 - TV, in [0, 1], of each column by name, of generated rows x and reference rows y.

    Raises:
        DataError: rows that do not fit the spec, or fewer than 2 a side.
    """
    (x, x_blocks), (y, y_blocks) = _in_blocks(x, spec, "generated"), _in_blocks(y, spec, "reference")
    return {
        column.name: _complement(column, x[:, i], y[:, i], x_blocks, y_blocks) for i, column in enumerate(spec.columns)
    }


def mean_complement(x: Tensor, y: Tensor, spec: DataSpec) -> Uncertain:
    """`mean_of_columns` of `column_complements`."""
    return mean_of_columns(column_complements(x, y, spec))


def mean_of_columns(columns: Mapping[str, Uncertain]) -> Uncertain:
    """The mean over columns; those without reference values (NaN) are left out and named in `method`."""
    found = {name: u for name, u in columns.items() if not math.isnan(u.value)}
    absent = [name for name in columns if name not in found]
    method = f"mean over {len(found)} columns; delete-a-block jackknife"
    if absent:
        method += f"; left out, for want of reference values: {', '.join(absent)}"
    if not found:
        return Uncertain(math.nan, {}, {}, method)
    value = sum(u.value for u in found.values()) / len(found)
    return linear(value, [(1.0 / len(found), u) for u in found.values()], method)


def correlation_difference(x: Tensor, y: Tensor, spec: DataSpec) -> Uncertain | None:
    """Mean of |rho_x - rho_y| / 2, in [0, 1], over pairs of numeric columns; None if there are fewer than two.

    Raises:
        DataError: rows that do not fit the spec, or fewer than 2 a side.
    """
    numeric = [i for i, column in enumerate(spec.columns) if column.kind == "numeric"]
    (x, x_blocks), (y, y_blocks) = _in_blocks(x, spec, "generated"), _in_blocks(y, spec, "reference")
    if len(numeric) < 2:
        return None
    upper = torch.triu_indices(len(numeric), len(numeric), 1)
    (rho_x, x_without), (rho_y, y_without) = (
        (rho[0][upper[0], upper[1]], rho[1:, upper[0], upper[1]])
        for rho in (_correlations(x[:, numeric], x_blocks), _correlations(y[:, numeric], y_blocks))
    )

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(-1) / 2.0

    value = float(difference(rho_x, rho_y))
    return delete_one(value, difference(x_without, rho_y), difference(rho_x, y_without), len(x), len(y))


def train_on_synthetic(x: Tensor, test_rows: Tensor, spec: DataSpec, targets: int = TARGETS) -> Uncertain:
    """Mean score, at most 1, of trees trained on generated rows x in predicting columns of real test rows.

    Rows whose target is missing are left out of that target. A target without any generated value scores 0, one
    that is constant in the test rows has no score and is left out of the mean; `method` says so.

    Raises:
        DataError: rows that do not fit the spec, fewer than 2 a side, a table of one column, or no target that varies.
    """
    if len(spec.columns) < 2:
        raise DataError("train on synthetic, test on real needs at least two columns: one predicts the other")
    (x, _), (y, blocks) = _in_blocks(x, spec, "generated"), _in_blocks(test_rows, spec, "reference")
    scores, notes = [], ["rows with a missing target left out"]
    for target, column in enumerate(spec.columns[:targets]):
        known = ~y[:, target].isnan()
        if len(np.unique(y[known, target].numpy())) < 2:
            notes.append(f"{column.name!r} is constant in the test rows and left out")
        elif bool(x[:, target].isnan().all()):
            notes.append(f"{column.name!r} has no generated value and scores 0")
            scores.append(torch.zeros(len(blocks) + 1, dtype=torch.float64))
        else:
            predicted = torch.full((len(y),), torch.nan, dtype=torch.float64)
            predicted[known] = _predict(x, y[known], spec, target)
            scores.append(_scores(y[:, target], predicted, column, blocks))
    if not scores:
        raise DataError("none of the columns varies in the test rows: there is nothing to predict")
    score = torch.stack(scores).mean(0)
    error = delete_one(float(score[0]), score[1:], score[1:], len(y), len(y)).sources["reference"]
    method = (
        f"mean over {len(scores)} targets; {'; '.join(notes)}; delete-a-block jackknife over test rows, "
        "without the variation of the generated rows"
    )
    return Uncertain(float(score[0]), {"reference": error}, {"generated": len(x), "reference": len(y)}, method)


# -- columns -----------------------------------------------------------------------------------------------------


def _complement(
    column: Column, x: Tensor, y: Tensor, x_blocks: Sequence[slice], y_blocks: Sequence[slice]
) -> Uncertain:
    """Of one column's values (M,) and (N,)."""
    groups, m, n = (len(x_blocks), len(y_blocks)), len(x), len(y)
    if bool(y.isnan().all()):
        return Uncertain(math.nan, {}, {"generated": m, "reference": n}, "no reference values")
    in_x, in_y = (_block_of(blocks)[~t.isnan()] for t, blocks in ((x, x_blocks), (y, y_blocks)))
    x, y = x[~x.isnan()], y[~y.isnan()]
    if not len(x):
        zeros = [torch.zeros(g, dtype=torch.float64) for g in groups]
        return replace(delete_one(0.0, zeros[0], zeros[1], m, n), method="no generated values, which counts as 0")
    if column.kind in ("numeric", "date"):
        merged = MergedSamples.of(x[None], y[None], in_x, in_y, groups)
        distance = torch.cat([merged.kolmogorov(g) for g in (None, *range(sum(groups)))])
    else:
        codes = _codes(torch.cat([x, y]))
        k = int(codes.max()) + 1
        p, q = (
            _shares((block * k + code).bincount(minlength=g * k).view(g, k))
            for block, code, g in ((in_x, codes[: len(x)], groups[0]), (in_y, codes[len(x) :], groups[1]))
        )
        pairs = [(p[:1], q[:1]), (p[1:], q[:1]), (p[:1], q[1:])]
        distance = torch.cat([(a - b).abs().sum(1) / 2.0 for a, b in pairs])
    found = _defined(1.0 - distance)
    return delete_one(float(found[0]), found[1 : 1 + groups[0]], found[1 + groups[0] :], m, n)


def _defined(scores: Tensor) -> Tensor:
    """Scores (1 + G,) of all rows and without each block: where a deletion leaves nothing to score (the block held all
    values, or all of a rare category), it counts as having changed nothing.
    """
    return scores.where(scores.isfinite(), scores[0])


def _shares(counts: Tensor) -> Tensor:
    """From counts (G, K) per block: shares of all, then without each block, (1 + G, K)."""
    total = counts.sum(0)
    rest = torch.cat([total[None], total - counts]).double()
    return rest / rest.sum(1, keepdim=True)


def _correlations(z: Tensor, blocks: Sequence[slice]) -> Tensor:
    """Correlations (1 + G, c, c) of columns z (N, c) over complete rows: of all rows, and without each block."""
    # About the median, which is an element, a constant column is exactly 0.
    centred = z - torch.nanmedian(z, 0).values
    present = (~z.isnan()).double()
    centred = torch.where(z.isnan(), 0.0, centred)
    scale = centred.abs().amax(0)
    centred = centred / torch.where(scale > 0.0, scale, 1.0)

    def moments(b: slice) -> Tensor:
        c, p = centred[b], present[b]
        return torch.stack([p.T @ p, c.T @ p, c.square().T @ p, c.T @ c])

    per_block = torch.stack([moments(b) for b in blocks])  # (G, 4, c, c)
    keep = torch.cat([torch.ones(1, len(blocks)), 1.0 - torch.eye(len(blocks))]).double()
    n, s, ss, sp = torch.einsum("rg,gkab->krab", keep, per_block)  # s[a, b]: sum of a where b is present
    at_least = n.clamp(min=1.0)
    covariance = sp - s * s.mT / at_least
    variance = ss - s.square() / at_least
    exists = (variance > CONSTANT * ss) & (variance > CONSTANT * ss).mT & (n >= 2.0)
    return torch.where(exists, covariance / torch.where(exists, variance * variance.mT, 1.0).sqrt(), 0.0)


# -- prediction --------------------------------------------------------------------------------------------------


def _predict(x: Tensor, y: Tensor, spec: DataSpec, target: int) -> Tensor:
    """The target column of rows y, predicted by trees trained on rows x."""
    x = x[~x[:, target].isnan()]
    others = [i for i in range(len(spec.columns)) if i != target]
    labels = x[:, target].numpy()
    numeric = spec.columns[target].kind in ("numeric", "date")
    if len(np.unique(labels)) == 1:
        return torch.full((len(y),), float(labels[0]), dtype=torch.float64)
    categorical = [
        spec.columns[i].kind == "categorical" and len(spec.columns[i].categories) <= MOST_CATEGORIES for i in others
    ]
    trees = HistGradientBoostingRegressor if numeric else HistGradientBoostingClassifier
    model = trees(categorical_features=categorical, **TREES)
    silent = x[:, others].isnan().all(0)  # a column without any generated value teaches nothing
    train, test = (rows[:, others].masked_fill(silent, 0.0).numpy() for rows in (x, y))
    predicted = model.fit(train, labels).predict(test)
    return torch.from_numpy(np.asarray(predicted, dtype=np.float64))


def _scores(y: Tensor, predicted: Tensor, column: Column, blocks: Sequence[slice]) -> Tensor:
    """The score over all rows, then without each block, (1 + G,); missing rows are NaN in both columns."""
    known = ~y.isnan()
    keep = torch.cat([torch.ones(1, len(blocks)), 1.0 - torch.eye(len(blocks))]).double()[:, _block_of(blocks)[known]]
    y, predicted = y[known], predicted[known]
    n = keep.sum(1)
    if column.kind in ("numeric", "date"):
        y, predicted = y - y.mean(), predicted - y.mean()
        spread = keep @ y.square() - (keep @ y).square() / n
        return _defined(1.0 - keep @ (y - predicted).square() / spread)
    base = (keep @ torch.nn.functional.one_hot(_codes(y)).double()).amax(1) / n
    return _defined((keep @ (y == predicted).double() / n - base) / (1.0 - base))


# -- rows --------------------------------------------------------------------------------------------------------


def _in_blocks(rows: Tensor, spec: DataSpec, name: str) -> tuple[Tensor, list[slice]]:
    """Rows in float64, in the order of their blocks, which missing values do not upset."""
    if rows.ndim != 2 or rows.shape[1] != len(spec.columns):
        raise DataError(f"{name} rows must be (N, {len(spec.columns)}), got shape {tuple(rows.shape)}")
    if len(rows) < 2:
        raise DataError(f"metrics of tables need at least 2 {name} rows, got {len(rows)}")
    if bool(rows.isinf().any()):
        raise DataError(f"{name} rows hold infinity; look at those rows")
    rows = rows.double().cpu()
    missing = rows.isnan()
    filled, blocks = shuffle_into_blocks(torch.cat([rows.masked_fill(missing, 0.0), missing.double()], 1))
    values, missing = filled.chunk(2, 1)
    return values.masked_fill(missing > 0.0, torch.nan), blocks


def _codes(x: Tensor) -> Tensor:
    """(N,) values numbered from 0."""
    return torch.from_numpy(np.unique(x.numpy(), return_inverse=True)[1])


def _block_of(blocks: Sequence[slice]) -> Tensor:
    """(N,) the block of each row."""
    return torch.cat([torch.full((b.stop - b.start,), g) for g, b in enumerate(blocks)])
