"""Metrics against their peers on the same arrays: N = 10,000 examples a side and d = 2,048 features.

Fréchet: torchmetrics with an identity module (its class accumulates moments in float64), and its trace term
alone, the eigenvalues of C_1 C_2. Two spectra: flat (Gaussian noise) and falling (variances i^-1.5, as features of
networks have), because a condition number beyond 1 / sqrt(eps) takes the slower, exact path.

Neighbours: precision, recall, density and coverage by prdc against all six of ours. The bound is three N x N x d
products; `share_of_matrix_rate` is what is reached of the rate of one plain product of the same type.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import paired, record, seconds
from trilemma.core.noise import make_generator
from trilemma.metrics.frechet import (
    SampleMoments,
    _cross,
    covariance_factor,
    frechet_distance,
    frechet_from_factors,
    nuclear_norm,
    sample_factor,
)
from trilemma.metrics.neighbours import neighbour_metrics

N, D = 10_000, 2_048
FALLING = 1.5


def features(key: str, n: int, d: int, decay: float, dtype: torch.dtype) -> Tensor:
    """Gaussian features with variances i^-decay in the directions of one fixed rotation."""
    x = torch.randn(n, d, generator=make_generator("benchmark", key), dtype=torch.float32)
    x *= torch.arange(1, d + 1).float() ** (-decay / 2.0)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=make_generator("benchmark", "rotation", d))).Q
    return (x @ rotation).to(dtype)


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two 4096 x 2048 and 2048 x 4096 matrices."""
    a, b = torch.randn(4096, 2048, dtype=dtype), torch.randn(2048, 4096, dtype=dtype)
    a @ b
    return 2.0 * 4096 * 4096 * 2048 / min(seconds(lambda: a @ b) for _ in range(5))


def frechet_benchmark(decay: float) -> dict[str, Any]:
    metric_class = torchmetrics_fid()
    x, y = (features(key, N, D, decay, torch.float64) for key in ("x", "y"))

    def peer() -> Tensor:
        metric = metric_class(feature=_Identity(D), normalize=True).set_dtype(torch.float64)
        metric.update(x, real=False)
        metric.update(y, real=True)
        return metric.compute()

    c_x, c_y = x.T.cov(), y.T.cov()
    reference = SampleMoments(y)
    known = reference.mean, reference.factor

    def trace() -> Tensor:
        return nuclear_norm(_cross(covariance_factor(c_x), covariance_factor(c_y)))

    def peer_trace() -> Tensor:
        return torch.linalg.eigvals(c_x @ c_y).sqrt().real.sum()

    def cached() -> Tensor:
        return frechet_from_factors(x.mean(0), sample_factor(x), *known)

    ours, theirs = float(frechet_distance(x, y)), float(peer())
    return {
        "relative_difference": abs(ours - theirs) / abs(theirs),
        "relative_difference_of_trace": abs(float(trace()) / float(peer_trace()) - 1.0),
        "trace": paired(trace, peer_trace, 3),
        "from_scratch": paired(lambda: frechet_distance(x, y), peer, 3),
        "reference_cached": paired(cached, peer, 3),
    }


def torchmetrics_fid() -> Any:
    """torchmetrics' class; it imports torch-fidelity, whose package would import torchvision, file by file."""
    spec = importlib.util.find_spec("torch_fidelity")
    assert spec is not None
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    package.__spec__ = spec
    sys.modules["torch_fidelity"] = package
    return importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance


class _Identity(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.num_features = d

    def forward(self, x: Tensor) -> Tensor:
        return x


def neighbour_benchmark(dtype: torch.dtype) -> dict[str, Any]:
    from prdc import compute_prdc

    x, y = (features(key, N, D, 0.5, dtype) for key in ("x", "y"))

    def ours() -> dict[str, float]:
        found = neighbour_metrics(x, y, k_precision=5, k_density=5, interval=False)
        return {name: u.value for name, u in found.items()}

    def peer() -> Any:
        return compute_prdc(real_features=y.numpy(), fake_features=x.numpy(), nearest_k=5)

    a, b = ours(), peer()
    timing = paired(ours, peer, 3)
    rate = matrix_rate(torch.float32)
    return {
        "largest_difference": max(abs(a[name] - float(b[name])) for name in b),
        "timing": timing,
        "share_of_matrix_rate": 2.0 * 3.0 * N * N * D / timing["median_a"] / rate,
        "matrix_rate_gflops": rate / 1e9,
        "memory_above_arrays_mib": in_a_process(N, D, dtype, frechet=False)["mebibytes"],
    }


def in_a_process(n: int, d: int, dtype: torch.dtype, *, frechet: bool) -> dict[str, float]:
    """Peak memory above the arrays, and seconds, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (n, d, str(dtype), frechet))


def _measure_memory(n: int, d: int, dtype: str, frechet: bool) -> dict[str, float]:
    x, y = (features(key, n, d, 0.5, getattr(torch, dtype.removeprefix("torch."))) for key in ("x", "y"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS:")
    start = time.perf_counter()
    neighbour_metrics(x, y, interval=False)
    if frechet:
        frechet_distance(x, y)
    return {"mebibytes": _status("VmHWM:") - before, "seconds": time.perf_counter() - start, "total": _status("VmHWM:")}


def _status(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**10


def main() -> None:
    parts: dict[str, Callable[[], Any]] = {
        "frechet, flat spectrum": lambda: frechet_benchmark(0.0),
        "frechet, falling spectrum": lambda: frechet_benchmark(FALLING),
        "neighbours, float32": lambda: neighbour_benchmark(torch.float32),
        "neighbours, float64": lambda: neighbour_benchmark(torch.float64),
        "N = 50,000, d = 256": lambda: in_a_process(50_000, 256, torch.float32, frechet=True),
    }
    record("metrics", {name: part() for name, part in parts.items()})


if __name__ == "__main__":
    main()
