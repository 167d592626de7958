"""Metrics against other people's code on the same numbers."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_metrics_more import mixed, normal, table
from trilemma.metrics.jackknife import shuffle_into_blocks
from trilemma.metrics.kernel import kernel_distance
from trilemma.metrics.labels import inception_score
from trilemma.metrics.tables import column_complements, correlation_difference
from trilemma.metrics.two_sample import ROWS, ClassifierKind, classifier_auc, fold_members, make_classifier
from trilemma.metrics.wasserstein import wasserstein_1d


def import_without_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of torch-fidelity, or one that imports it, without the two of its files that need torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("torch-fidelity is not installed")
    package, utils = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.utils")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    for function in (
        "create_feature_extractor",
        "extract_featuresdict_from_input_id_cached",
        "resolve_feature_extractor",
        "resolve_feature_layer_for_metric",
    ):
        setattr(utils, function, None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    return importlib.import_module(name)


def test_kernel_distance_is_kid_of_one_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning_utilities")
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed")
    theirs = import_without_torchvision("torchmetrics.image.kid", monkeypatch)
    x, y = normal(90, 16, key="kid x") + 0.3, normal(90, 16, key="kid y")
    assert kernel_distance(x, y).value == pytest.approx(float(theirs.poly_mmd(y, x)), rel=1e-10)


def test_inception_score_is_that_of_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = import_without_torchvision("torch_fidelity.metric_isc", monkeypatch)
    logits = 2.0 * normal(200, 10, key="isc")
    expected = theirs.isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", [(40, 40), (13, 200)])
def test_wasserstein_is_scipys(sizes: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = normal(sizes[0], key="w a"), normal(sizes[1], key="w b") * 2.0 + 1.0
    assert float(wasserstein_1d(a, b)) == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-12)


def test_column_complements_are_sdmetrics_with_missing_values() -> None:
    theirs = pytest.importorskip("sdmetrics.single_column")
    (x, spec), (y, _) = mixed(150, "sd x"), mixed(190, "sd y")
    x[::7, 1], y[::5, 0] = math.nan, math.nan
    x[:, 1] = (x[:, 1] + 1.0).clamp(max=2.0)  # a category is missing
    for i, (name, found) in enumerate(column_complements(x, y, spec).items()):
        metric = theirs.TVComplement if spec.columns[i].kind == "categorical" else theirs.KSComplement
        assert found.value == pytest.approx(metric.compute(y[:, i].numpy(), x[:, i].numpy()), abs=1e-12), name


def test_correlation_difference_is_sdmetrics_with_missing_values() -> None:
    theirs = pytest.importorskip("sdmetrics.column_pairs")
    pd = pytest.importorskip("pandas")
    spec = table(a="numeric", b="numeric")
    mix = torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double()
    x, y = normal(80, 2, key="rho x") + 100.0, normal(120, 2, key="rho y") @ mix
    x[::6, 0], y[::9, 1] = math.nan, math.nan
    found = correlation_difference(x, y, spec)
    assert found is not None
    frames = [pd.DataFrame(t.numpy(), columns=["a", "b"]) for t in (y, x)]
    assert 1.0 - found.value == pytest.approx(theirs.CorrelationSimilarity.compute(*frames), abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_classifier_auc_is_cross_val_score_on_the_same_folds(kind: ClassifierKind) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    x, y = normal(110, 3, key="auc x") + 0.5, normal(97, 3, key="auc y")
    rows = torch.cat([shuffle_into_blocks(t)[0][:ROWS] for t in (x, y)]).numpy()
    labels = np.repeat([1, 0], [110, 97])
    cv = [(np.flatnonzero(~test), np.flatnonzero(test)) for test in fold_members(110, 97, 5)]
    expected = selection.cross_val_score(make_classifier(kind), rows, labels, cv=cv, scoring="roc_auc")
    assert classifier_auc(x, y, kind).value == pytest.approx(float(expected.mean()), rel=1e-12)
