"""What is counted and timed of a sampler: its evaluations are those that the network sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trilemma as tl
from trilemma.check import QUICK
from trilemma.comparison.speed import measure_latency, measure_speed


@pytest.mark.parametrize(("model", "settings"), [("ddpm", {"steps": 7}), ("ddpm", {}), ("r3gan", {}), ("vae", {})])
def test_evaluations_are_those_that_the_network_sees(model: str, settings: dict[str, Any], tmp_path: Path) -> None:
    data = tl.load_data("two-moons")
    fitted = tl.create(model, data.spec)
    fitted.fit(data, out=tmp_path / "run", **QUICK)
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1

    network = {"ddpm": "net", "r3gan": "g", "vae": "decoder"}[model]
    getattr(fitted, network).register_forward_hook(count)
    fitted.sample(3, generator=0, **settings)
    assert seen == fitted.evaluations(**settings)


def test_speed_is_a_median_with_its_quartiles() -> None:
    data = tl.load_data(torch.randn(60, 2, generator=torch.Generator().manual_seed(0)))
    model = tl.create("gmm", data.spec, components=2)
    model.initialize(0)
    model.prepare(data.train, tl.Noise("prepare", n=1))
    model.fitted = True
    found = measure_speed(model, None)
    rate = found["samples_per_second"]
    assert rate.quartiles is not None
    assert rate.quartiles[0] <= rate.value <= rate.quartiles[1]
    assert "median of 10 after a warm-up, batch size" in rate.method
    assert rate.higher_is_better
    latency = measure_latency(model, None)["latency"]
    assert latency.quartiles is not None
    assert not latency.higher_is_better
    assert found["evaluations"].value == 0.0
