"""Neighbour metrics and the Frechet distance against other people's code on the same features."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from tests.parity.test_parity_metrics import import_without_torchvision
from tests.test_metrics_more import normal
from trilemma.metrics import density_coverage, precision_recall
from trilemma.metrics.frechet import SampleMoments, frechet, frechet_distance


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("m", "n", "d"), [(60, 60, 2), (45, 80, 5), (300, 250, 40)])
def test_precision_recall_density_coverage_are_prdcs(m: int, n: int, d: int, k: int) -> None:
    """prdc's balls are open and ours are closed: the same where no distance ties with a radius. One k serves all."""
    prdc = pytest.importorskip("prdc")
    x, y = 1.2 * normal(m, d, key="prdc x") + 0.3, normal(n, d, key="prdc y")
    theirs = prdc.compute_prdc(y.numpy(), x.numpy(), nearest_k=k)
    ours = dict(
        zip(
            ("precision", "recall", "density", "coverage"),
            precision_recall(x, y, k) + density_coverage(x, y, k),
            strict=True,
        )
    )
    assert ours == pytest.approx({name: float(v) for name, v in theirs.items()}, rel=1e-13)


def pair(m: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    mix = normal(d, d, key="fid mix") / d**0.5
    return normal(m, d, key="fid x") @ mix + 0.2, 1.3 * normal(n, d, key="fid y")


@pytest.mark.parametrize(("m", "n", "d"), [(100, 100, 1), (200, 150, 16), (400, 500, 64)])
def test_frechet_distance_is_torchmetrics(m: int, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the features themselves in the place of the network, in two batches."""
    pytest.importorskip("lightning_utilities")
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed")
    theirs: Any = import_without_torchvision("torchmetrics.image.fid", monkeypatch)
    x, y = pair(m, n, d)
    expected = theirs._compute_fid(y.mean(0), y.T.cov().view(d, d), x.mean(0), x.T.cov().view(d, d))
    torch.testing.assert_close(frechet_distance(x, y), expected, rtol=1e-9, atol=0)
    network = torch.nn.Identity()
    network.num_features = d  # type: ignore[assignment]
    metric = theirs.FrechetInceptionDistance(feature=network)
    for real, features in ((True, y), (False, x)):
        for batch in (features[:60], features[60:]):
            metric.update(batch, real=real)
    assert frechet(SampleMoments(x), SampleMoments(y)).value == pytest.approx(float(metric.compute()), rel=1e-9)


@pytest.mark.parametrize(("m", "n", "d"), [(200, 150, 16), (400, 500, 64)])
def test_frechet_distance_is_torch_fidelitys(m: int, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = fidelity(monkeypatch)
    x, y = pair(m, n, d)
    statistics = [theirs.fid_features_to_statistics(t) for t in (x, y)]
    expected = theirs.fid_statistics_to_metric(*statistics, verbose=False)[theirs.KEY_METRIC_FID]
    assert float(frechet_distance(x, y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("m", "n", "d"), [(12, 15, 30), (20, 200, 30)])
def test_frechet_distance_of_few_examples(m: int, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer examples than dimensions: the product of the covariances is singular.

    Its zero eigenvalues come back as some 1e-16 of the largest, and their roots as some 1e-8 of its root; so the
    peers agree to 1e-6. A root of the small matrix C_x^{1/2} C_y C_x^{1/2} on the range of C_x is stable.
    """
    x, y = pair(m, n, d)
    found = float(frechet_distance(x, y))
    centred = ((x - x.mean(0)) / (m - 1) ** 0.5).numpy()
    small = centred @ np.cov(y.numpy(), rowvar=False) @ centred.T  # the non-zero eigenvalues of C_x C_y, and one zero
    basis = np.linalg.svd(np.ones((1, m)))[2][1:]  # off the direction in which centred examples add up to zero
    root = np.trace(sqrtm(basis @ small @ basis.T)).real if n > d else np.sqrt(np.linalg.eigvalsh(small)[1:]).sum()
    trace = float(x.var(0).sum() + y.var(0).sum())
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + trace - 2.0 * root
    assert found == pytest.approx(expected, rel=1e-9)
    theirs = fidelity(monkeypatch)
    statistics = [theirs.fid_features_to_statistics(t) for t in (x, y)]
    peer = theirs.fid_statistics_to_metric(*statistics, verbose=False)[theirs.KEY_METRIC_FID]
    assert found == pytest.approx(peer, abs=1e-6 * trace)


def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = import_without_torchvision("torch_fidelity.helpers", monkeypatch)  # skips where it is not installed
    utils = importlib.import_module("torch_fidelity.utils")
    for name in ("get_cacheable_input_name", "cache_lookup_one_recompute_on_miss"):
        monkeypatch.setattr(utils, name, None, raising=False)
    assert module is not None
    return importlib.import_module("torch_fidelity.metric_fid")
