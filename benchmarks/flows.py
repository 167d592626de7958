"""Our flows against nflows' and zuko's of the same structure: training steps, and 10,000 samples.

Six transforms, networks with 64 hidden units and one residual block, splines with 8 bins on [-5, 5]:

    coupling        fixed permutation, LU-decomposed linear map, rational-quadratic coupling     nflows
    spline          rational-quadratic autoregressive, the order reversed in between            nflows, zuko (NSF)
    affine          the same with affine maps (MAF)                                             nflows, zuko (MAF)

Ours has the peers' parameters but for the bias of nflows' linear maps, and silu where they have relu. A step is the
log-density of a batch of 256, backward and Adam: ours fused, as our engine has it; theirs both as it comes and fused,
and the faster of the two counts. The contestants take turns of ten steps, so that each finds its numbers in the cache,
as in training. With one thread the clock is that of the processor, which other work on the machine stretches less; with
two it is the wall's. Samples are drawn without gradients in batches of 4,096, as our `sample` does, by the peers also
in one, and again the faster counts; those of autoregressive flows of 43 dimensions are left out, because the peers need
minutes for them.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import nflows.transforms as peer
import torch
import zuko
from nflows.distributions import StandardNormal
from nflows.flows import Flow as PeerFlow
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from benchmarks.common import record
from trilemma.core.noise import make_generator
from trilemma.core.spec import DataSpec
from trilemma.flow.model import Flow

STEPS, WIDTH, BINS, BOUND = 6, 64, 8, 5.0
BATCH, SAMPLES = 256, 10_000
DIMS = (6, 12, 43)
REPETITIONS, BLOCK, SAMPLE_REPETITIONS = 7, 10, 5

Work = Callable[[], Any]


class Ours(nn.Module):
    def __init__(self, dims: int, **settings: Any) -> None:
        super().__init__()
        spec = DataSpec(kind="points", shape=(dims,))
        self.dims = dims
        self.flow = Flow(spec, steps=STEPS, width=WIDTH, depth=1, norm="none", **settings)
        self.flow.initialize(0)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow._density(x, None, None)

    def sample(self, n: int) -> Tensor:
        return self.flow._decode(torch.randn(n, self.dims), None)


class Zuko(nn.Module):
    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)  # type: ignore[no-any-return]

    def sample(self, n: int) -> Tensor:
        return self.flow().sample((n,))  # type: ignore[no-any-return]


def composed(dims: int, parts: Callable[[int], list[nn.Module]]) -> nn.Module:
    """nflows' flow of `parts` (index) for each of the steps."""
    transforms = [part for index in range(STEPS) for part in parts(index)]
    flow: nn.Module = PeerFlow(peer.CompositeTransform(transforms), StandardNormal([dims]))
    return flow


def nflows_coupling(dims: int) -> nn.Module:
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}

    def parts(index: int) -> list[nn.Module]:
        mask = torch.where(torch.arange(dims) < dims // 2, 1, -1) * (-1) ** (index + 1)
        coupling = peer.PiecewiseRationalQuadraticCouplingTransform(
            mask, lambda a, b: ResidualNet(a, b, hidden_features=WIDTH, num_blocks=1), **spline
        )
        return [peer.RandomPermutation(dims), peer.LULinear(dims, identity_init=True), coupling]

    return composed(dims, parts)


def nflows_autoregressive(dims: int, affine: bool) -> nn.Module:
    made: dict[str, Any] = {"features": dims, "hidden_features": WIDTH, "num_blocks": 1, "use_residual_blocks": True}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}

    def parts(index: int) -> list[nn.Module]:
        layer = (
            peer.MaskedAffineAutoregressiveTransform(**made)
            if affine
            else peer.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline)
        )
        return [peer.ReversePermutation(dims), layer] if index else [layer]

    return composed(dims, parts)


def contestants(dims: int) -> dict[str, tuple[Ours, dict[str, nn.Module]]]:
    """Ours and the peers of each structure."""
    net = {"transforms": STEPS, "hidden_features": (WIDTH,), "residual": True}
    ours = {"layer": "autoregressive", "mixing": "reverse"}
    return {
        "coupling": (Ours(dims, layer="coupling"), {"nflows": nflows_coupling(dims)}),
        "spline": (
            Ours(dims, elementwise="spline", **ours),
            {"nflows": nflows_autoregressive(dims, False), "zuko": Zuko(zuko.flows.NSF(dims, bins=BINS, **net))},
        ),
        "affine": (
            Ours(dims, elementwise="affine", **ours),
            {"nflows": nflows_autoregressive(dims, True), "zuko": Zuko(zuko.flows.MAF(dims, **net))},
        ),
    }


def training_step(net: nn.Module, x: Tensor, fused: bool) -> Work:
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4, fused=fused or None)

    def step() -> None:
        (-net.log_prob(x).mean()).backward()  # type: ignore[operator]
        optimiser.step()
        optimiser.zero_grad()

    return step


def sampling(net: nn.Module, size: int = SAMPLES) -> Work:
    @torch.no_grad()
    def draw() -> None:
        for start in range(0, SAMPLES, size):
            net.sample(min(size, SAMPLES - start))  # type: ignore[operator]

    return draw


def in_turn(works: list[Work], repetitions: int, block: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each, which take turns, `block` calls in a row, from a changing start."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for i in range(repetitions):
        for j in range(len(works)):
            k = (i + j) % len(works)
            start = clock()
            for _ in range(block):
                works[k]()
            times[k].append((clock() - start) / block)
    return times


def summary(ours: list[float], *theirs: list[float]) -> dict[str, Any]:
    """Ours against the faster of theirs."""
    peer_times = min(theirs, key=statistics.median)
    ratios = [b / a for a, b in zip(ours, peer_times, strict=True)]
    return {
        "ours_ms": 1e3 * statistics.median(ours),
        "peer_ms": 1e3 * statistics.median(peer_times),
        "peer_over_ours": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def compare(dims: int, structure: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    x = torch.randn(BATCH, dims, generator=make_generator("benchmark", "flows", dims))
    ours, peers = contestants(dims)[structure]
    result: dict[str, Any] = {}
    for name, net in peers.items():
        entry: dict[str, Any] = {"parameters": [sum(p.numel() for p in n.parameters()) for n in (ours, net)]}
        works = [training_step(ours, x, True), training_step(net, x, False), training_step(net, x, True)]
        entry["step"] = summary(*in_turn(works, REPETITIONS, BLOCK, clock))
        if threads == 1 and (structure == "coupling" or dims <= 12):
            size = ours.flow.default_batch_size
            works = [sampling(ours, size), sampling(net), sampling(net, size)]
            entry["samples"] = summary(*in_turn(works, SAMPLE_REPETITIONS, 1, clock))
        result[name] = entry
    return result


def main() -> None:
    warnings.filterwarnings("ignore", message="torch.triangular_solve")
    before = torch.get_num_threads()
    results: dict[str, Any] = {"peers": {name: version(name) for name in ("nflows", "zuko")}}
    for dims in DIMS:
        for structure in ("coupling", "spline", "affine"):
            for threads in (1, 2):
                key = f"{dims} dims, {structure}, {threads} thread{'s'[: threads - 1]}"
                results[key] = compare(dims, structure, threads)
                print(key, results[key], flush=True)
    torch.set_num_threads(before)
    record("flows", results)


if __name__ == "__main__":
    main()
