"""Held-out log-likelihood of tables: our flows and those of zuko and nflows, for the same processor time.

    python -m benchmarks.flow_tables FOLDER [seconds]     FOLDER holds the UCI tables as CSV files

Data: numeric columns of wine (white), California housing, abalone and adult. One codec for all: discrete columns are
dequantized with new noise in every batch, all columns standardized by the training split; the splits are those of
`load_data`. Each model gets the same seconds of processor time on one thread (120 s stand for 60 s of two cores), found
in steps from a first few, and the same recipe: AdamW, a cosine from 2e-3 after a warm-up, gradients clipped at norm 1,
batches of 256, a moving average of the weights, and the weights that are best on the validation split.
Peers have their own architectures at the sizes of their documentation; as most of our lead comes from the first map, to
normal margins, they are also measured behind it. Figures are nats per row of the standardized
table, one draw of the dequantization noise, the same for all; differences are paired over the test rows.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.common import record
from trilemma.core.codec import Codec
from trilemma.core.noise import Noise, make_generator
from trilemma.core.registry import create
from trilemma.data import Dataset, load_data
from trilemma.flow.architecture import MARGINALS
from trilemma.flow.marginal import Marginal
from trilemma.flow.model import INIT_BATCH

SECONDS, BATCH, LR, EMA, DECAY, VALIDATIONS = 120.0, 256, 2e-3, 0.999, 0.01, 20
OURS: dict[str, dict[str, Any]] = {
    "nsf": {},
    "nsf, marginals=0": {"marginals": 0},
}
Density = Callable[[Tensor], Tensor]


def tables(folder: Path, target: Path) -> dict[str, Dataset]:
    """The numeric columns of each table, written as CSV files with a head and loaded."""
    names = {"wine": "winequality-white.csv", "california": "california_housing.csv", "abalone": "abalone.csv"}
    found = {}
    for name, file in {**names, "adult": "adult-train.csv"}.items():
        frame = pd.read_csv(folder / file, header=0 if name == "california" else None, skipinitialspace=True)
        numeric = frame.select_dtypes("number").dropna()
        numeric.columns = [str(c) if name == "california" else f"c{c}" for c in numeric.columns]
        numeric.to_csv(target / f"{name}.csv", index=False)
        found[name] = load_data(target / f"{name}.csv")
    return found


def zuko_flow(kind: str, dims: int) -> nn.Module:
    import zuko

    if kind == "nsf":
        return zuko.flows.NSF(dims, bins=8, transforms=5, hidden_features=(128, 128))
    return zuko.flows.MAF(dims, transforms=5, hidden_features=(128, 128))


def nflows_coupling(dims: int) -> nn.Module:
    from nflows import transforms as T
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    def net(a: int, b: int) -> nn.Module:
        return ResidualNet(a, b, hidden_features=128, num_blocks=2)

    steps: list[nn.Module] = []
    for index in range(6):
        mask = torch.ones(dims)
        mask[index % 2 :: 2] = -1
        steps += [T.RandomPermutation(dims), T.LULinear(dims, identity_init=True)]
        steps.append(
            T.PiecewiseRationalQuadraticCouplingTransform(mask, net, num_bins=8, tails="linear", tail_bound=5.0)
        )
    return Flow(T.CompositeTransform(steps), StandardNormal([dims]))


class WithMargins(nn.Module):
    """A peer after our first map, which is fitted to the training data and not trained."""

    def __init__(self, inner: nn.Module, density: Callable[[nn.Module], Density], dims: int) -> None:
        super().__init__()
        self.margins, self.inner, self.density = Marginal(dims, MARGINALS), inner, density

    def log_prob(self, y: Tensor) -> Tensor:
        z, ladj = self.margins(y)
        return self.density(self.inner)(z) + ladj


def of_zuko(model: nn.Module) -> Density:
    return model().log_prob  # type: ignore[no-any-return]


def of_nflows(model: nn.Module) -> Density:
    return model.log_prob  # type: ignore[return-value]


PEERS: dict[str, Callable[[int], tuple[nn.Module, Callable[[nn.Module], Density]]]] = {
    "zuko nsf": lambda d: (zuko_flow("nsf", d), of_zuko),
    "zuko maf": lambda d: (zuko_flow("maf", d), of_zuko),
    "nflows rq-nsf(c)": lambda d: (nflows_coupling(d), of_nflows),
    "zuko nsf after our margins": lambda d: (WithMargins(zuko_flow("nsf", d), of_zuko, d), of_nflows),
}


def encoded(codec: Codec, x: Tensor, *key: int | str) -> Tensor:
    return codec.encode(x, Noise("flow tables", *key, n=len(x), block=len(x)), dtype=torch.float32)[0]


def train_peer(
    model: nn.Module, density: Callable[[nn.Module], Density], data: Dataset, codec: Codec, seconds: float
) -> Any:
    """The averaged weights that were best on the validation split, and the number of steps."""
    x, held_out = data.train.head(len(data.train)).x, encoded(codec, data.validation.head(4096).x, "validation")
    if isinstance(model, WithMargins):
        with torch.no_grad():
            model.margins.initialize(encoded(codec, x[:INIT_BATCH], "margins"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    average, best, best_loss = copy.deepcopy(model), copy.deepcopy(model), math.inf
    generator, start, steps, validated = make_generator("flow tables", "batches"), time.process_time(), 0, 0
    while (progress := (time.process_time() - start) / seconds) < 1.0:
        rate = min(progress / 0.02, 1.0) if progress < 0.02 else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LR * max(rate, 1e-3)
        y = encoded(codec, x[torch.randint(len(x), (BATCH,), generator=generator)], steps)
        loss = -density(model)(y).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        keep = min(EMA, steps / (steps + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - keep)
            if progress * VALIDATIONS >= validated + 1:
                validated += 1
                value = -float(density(average)(held_out).mean())
                if value < best_loss:
                    best_loss = value
                    best.load_state_dict(average.state_dict())
    return best, {"steps": steps, "seconds": round(time.process_time() - start, 1)}


def train_ours(settings: dict[str, Any], data: Dataset, seconds: float, folder: Path) -> Any:
    """As many steps as the processor time allows, found from the first two hundred."""

    def fit(steps: int, out: Path) -> tuple[Any, float]:
        model = create("nsf", data.spec, **settings)
        start = time.process_time()
        model.fit(
            data, steps=steps, batch_size=BATCH, threads=1, out=out, previews=0,
            validations=VALIDATIONS if steps > 100 else 0, show=False,
        )  # fmt: skip
        return model, time.process_time() - start

    (_, a), (_, b) = fit(20, folder / "a"), fit(220, folder / "b")
    steps = round(seconds / ((b - a) / 200))
    model, used = fit(steps, folder / "run")
    return model, {"steps": steps, "seconds": round(used, 1)}


@torch.no_grad()
def one_table(data: Dataset, seconds: float, names: list[str]) -> dict[str, Any]:
    """Every model's test log-likelihood, and the best of ours against each peer."""
    codec = Codec(data.spec, "standard")
    codec.fit_split(data.train)
    y = encoded(codec, data.test.head(len(data.test)).x, "test")
    found: dict[str, Any] = {"train": len(data.train), "test": len(data.test), "dims": data.spec.dims}
    scores: dict[str, np.ndarray] = {}
    with torch.enable_grad():
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                if name in PEERS:
                    with torch.random.fork_rng():
                        torch.manual_seed(0)
                        model, density = PEERS[name](codec.dims)
                    model, cost = train_peer(model, density, data, codec, seconds)
                    with torch.no_grad():
                        value = density(model.eval())(y)
                else:
                    model, cost = train_ours(OURS[name], data, seconds, Path(folder))
                    with torch.no_grad():
                        value = model.eval()._density(y, None, None)
            scores[name] = value.double().numpy()
            found[name] = cost | mean_with_error(scores[name])
            print(data.name, name, found[name], flush=True)
    ours = scores["nsf"]  # chosen beforehand, not by these scores
    found["nsf minus the others, paired"] = {n: mean_with_error(ours - v) for n, v in scores.items() if n != "nsf"}
    return found


def mean_with_error(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "se": float(values.std(ddof=1) / math.sqrt(len(values)))}


def main() -> None:
    """Measure, print and record."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        print("flow_tables: not run; give the folder of the UCI tables", file=sys.stderr)
        return
    torch.set_num_threads(1)
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else SECONDS
    chosen = sys.argv[3].split(",") if len(sys.argv) > 3 else ["wine", "california", "abalone", "adult"]
    models = sys.argv[4].split(",") if len(sys.argv) > 4 else [*PEERS, *OURS]
    with tempfile.TemporaryDirectory() as folder:
        data = tables(Path(sys.argv[1]), Path(folder))
        results = {name: one_table(data[name], seconds, models) for name in chosen}
    if len(sys.argv) <= 4:
        record("flow_tables", results)


if __name__ == "__main__":
    main()
