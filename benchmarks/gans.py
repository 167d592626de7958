"""Training steps of our adversarial models against public packages' own, on pictures 3x32x32 and one thread.

Ours is `Trainer.train_step`, whole: batch, noise, dequantization, both players' turns, the check for finite numbers,
clipping, fused Adam, moving average. The peers' are the calls of their own training loops, with their Adam both as it
comes and fused; the faster counts. All take turns in one process; the clock is the processor's.

dcgan, torchgan          the same networks (the peer's with ReLU in the generator and linear ends), parameters equal but
                         for one bias of ours. Its `train_ops`: the generator's turn comes first, the gradients of the
                         discriminator's weights are taken there, too, and there is no moving average.
hinge-gan, torch_mimicry residual networks of its SNGAN, which has one width at all resolutions where ours grows
                         fourfold; widths are such that both need as many operations. No moving average. Ours takes
                         real and generated pictures through the discriminator in one pass, as it has no batch
                         normalisation.
stylegan2, stylegan2_pytorch
                         equal channels at equal resolutions in both networks (its own discriminator would start with
                         twice as many), latent and mapping network, hinge loss, no minibatch statistic, equal
                         penalties on real and generated pictures in every 4th step, path lengths in every 32nd, style
                         mixing. Its discriminator has three 3x3 convolutions per resolution, ours two, and goes on
                         from 4x4 to 2x2; its generator has one convolution more, of the constant. Its moving average
                         moves in every 10th step, ours in each. Steps are timed one by one and apart: plain ones,
                         those with penalties, and with path lengths besides; `mean` is over a cycle of 32.

`gflop` are those of one pass forward per example through generator and discriminator; a step has several of each.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gan_peers
from benchmarks.common import record
from benchmarks.flows import in_turn, summary
from trilemma.core.noise import make_generator
from trilemma.core.registry import create
from trilemma.core.spec import DataSpec
from trilemma.data.dataset import Dataset, TensorSplit
from trilemma.engine.config import TrainConfig
from trilemma.engine.progress import Silent
from trilemma.engine.run import Run
from trilemma.engine.runtime import Runtime
from trilemma.engine.trainer import Trainer

SIDE, LATENT = 32, 128
BATCHES = (16, 64)
WIDTHS = {"dcgan": 64, "hinge-gan": 48, "stylegan2": 32}
PEER_WIDTH = 80
"""Of torch_mimicry's networks, which then need as many operations as ours of `hinge-gan`."""
MAPPING = 4
REPETITIONS, BLOCK = 11, 3
CYCLE = 32
CYCLES = {16: 4, 64: 2}
START = 20_000
"""Step of stylegan2_pytorch behind which it has a moving average; path lengths come earlier."""

SETTINGS: dict[str, dict[str, Any]] = {
    "dcgan": {},
    "hinge-gan": {},
    "stylegan2": {
        "loss": "hinge",
        "mapping_depth": MAPPING,
        "w_dim": LATENT,
        "minibatch_std": False,
        "r1": 5.0,  # 10 E |grad D|^2 in every 4th step, as the peer has it
        "r2": 5.0,
        "penalty_every": 4,
        "path_length": 1.0 / CYCLE,
        "path_every": CYCLE,
        "style_mixing": 0.9,
    },
}

Step = Callable[[], Any]


def pictures(n: int) -> Tensor:
    """Random levels: what a step costs does not depend on what it learns."""
    size = (n, 3, SIDE, SIDE)
    return torch.randint(256, size, generator=make_generator("benchmark", "gans"), dtype=torch.uint8)


def ours(name: str, batch: int, folder: Path) -> Trainer:
    """A run of a preset, ready for its first step."""
    spec = DataSpec(kind="image", shape=(3, SIDE, SIDE), levels=256)
    splits = [TensorSplit(pictures(n)) for n in (2048, 64, 64)]
    data = Dataset(spec, *splits, name="noise", fingerprint="")
    model = create(name, spec, width=WIDTHS[name], z_dim=LATENT, **SETTINGS[name])
    plan = {"steps": 10**9, "batch_size": batch, "precision": "fp32", "compile": False, "device": "cpu", "threads": 1}
    config = TrainConfig.model_validate({**model.train_defaults, **plan})
    run = Run.create(folder / f"{name}-{batch}", model, config, data)
    trainer = Trainer(model, data, config, run, Runtime.start(config), Silent())
    trainer.start()
    return trainer


def real(batch: int) -> Tensor:
    return pictures(batch) / 127.5 - 1.0


def adam(net: nn.Module, fused: bool) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=fused or None)


def torchgan(batch: int, fused: bool) -> tuple[nn.Module, nn.Module, Step]:
    """Generator, discriminator, step."""
    peer, width, x = gan_peers.torchgan(), WIDTHS["dcgan"], real(batch)
    g = peer.models.DCGANGenerator(
        LATENT, SIDE, 3, width, nonlinearity=nn.ReLU(inplace=True), last_nonlinearity=nn.Identity()
    )
    d = peer.models.DCGANDiscriminator(SIDE, 3, width, last_nonlinearity=nn.Identity())
    of_g, of_d = adam(g, fused), adam(d, fused)
    loss_g, loss_d = peer.losses.MinimaxGeneratorLoss(), peer.losses.MinimaxDiscriminatorLoss()

    def step() -> None:
        loss_g.train_ops(g, d, of_g, x.device, batch)
        loss_d.train_ops(g, d, of_d, x, x.device)

    return g, d, step


def mimicry(batch: int, fused: bool) -> tuple[nn.Module, nn.Module, Step]:
    """Generator, discriminator, step."""
    nets: Any = gan_peers.mimicry("nets.sngan.sngan_32")
    log: Any = gan_peers.mimicry("training.metric_log")
    x = real(batch)
    g, d = nets.SNGANGenerator32(nz=LATENT, ngf=PEER_WIDTH), nets.SNGANDiscriminator32(ndf=PEER_WIDTH)
    of_g, of_d = adam(g, fused), adam(d, fused)
    labelled = (x, torch.zeros(batch, dtype=torch.long))

    def step() -> None:
        lines = log.MetricLog()
        lines = d.train_step(real_batch=labelled, netG=g, optD=of_d, log_data=lines, device=x.device)
        g.train_step(real_batch=labelled, netD=d, optG=of_g, log_data=lines, device=x.device)

    return g, d, step


def stylegan2(batch: int, fused: bool, folder: Path) -> Any:
    """Their trainer, with as many channels as ours."""
    peer, width, never = gan_peers.stylegan2_pytorch(), WIDTHS["stylegan2"], 10**9
    trainer = peer.Trainer(
        base_dir=folder / f"peer-{batch}-{fused}",
        image_size=SIDE,
        batch_size=batch,
        save_every=never,
        evaluate_every=never,
        latent_dim=LATENT,
        style_depth=MAPPING,
    )
    trainer.init_GAN()
    gan, x = trainer.GAN, real(batch)
    # Its own averaged generator would have other channels than the generator.
    gan.G, gan.GE = (peer.Generator(SIDE, LATENT, width // 2, fmap_max=4 * width) for _ in range(2))
    gan.D = gan.D_aug.D = peer.Discriminator(SIDE, width // 4, fmap_max=4 * width)
    gan._init_weights()
    gan.reset_parameter_averaging()
    gan.GE.requires_grad_(False)
    nets = (nn.ModuleList([gan.G, gan.S]), gan.D)
    gan.G_opt, gan.D_opt = (adam(net, fused) for net in nets)
    trainer.loader = iter(x.clone, None)  # endless
    trainer.pl_mean = 1.0  # or else the first path lengths would be left out of the loss
    return trainer


def describe(g: nn.Module, d: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Any]:
    """Parameters of both networks, and operations of `forward`, which makes a batch and judges it."""
    with FlopCounterMode(display=False) as counter:
        n = len(forward())
    return {
        "parameters": [sum(p.numel() for p in net.parameters()) for net in (g, d)],
        "gflop": counter.get_total_flops() / n / 1e9,
    }


def describe_ours(trainer: Trainer) -> dict[str, Any]:
    g, d = trainer.model.g, trainer.model.d
    return describe(g, d, lambda: d(g(torch.randn(BATCHES[0], g.z_dim))))


def compare(name: str, peer: Callable[[int, bool], tuple[nn.Module, nn.Module, Step]], folder: Path) -> dict[str, Any]:
    """Blocks of steps of ours and of the peer, in turn."""
    result: dict[str, Any] = {}
    for batch in BATCHES:
        trainer = ours(name, batch, folder)
        g, d, plain = peer(batch, False)
        works = [trainer.train_step, plain, peer(batch, True)[2]]
        torch.set_num_threads(1)
        entry = result[f"batch {batch}"] = summary(*in_turn(works, REPETITIONS, BLOCK, time.process_time))
        print(name, batch, entry, flush=True)
    result["ours"] = describe_ours(trainer)
    result["peer"] = describe(g, d, lambda: d(g(torch.randn(BATCHES[0], LATENT))))
    return result


def compare_stylegan2(folder: Path) -> dict[str, Any]:
    """Single steps in turn, each of the same kind for all."""
    result: dict[str, Any] = {}
    for batch in BATCHES:
        trainer = ours("stylegan2", batch, folder)
        peers = [stylegan2(batch, fused, folder) for fused in (False, True)]
        torch.set_num_threads(1)
        times: dict[int, list[float]] = {}
        for index in range(START + 1, START + 1 + CYCLES[batch] * CYCLE):
            trainer.state.step = index
            for peer in peers:
                peer.steps = index
            works = [trainer.train_step, *(peer.train for peer in peers)]
            times[index] = [0.0] * len(works)
            for j in range(len(works)):
                k = (index + j) % len(works)
                start = time.process_time()
                works[k]()
                times[index][k] = time.process_time() - start
        warm = {index: t for index, t in times.items() if index > START + 3}
        kinds = {
            "plain": [t for index, t in warm.items() if index % 4],
            "with penalties": [t for index, t in warm.items() if index % 4 == 0 and index % CYCLE],
            "with penalties and path lengths": [t for index, t in warm.items() if index % CYCLE == 0],
        }
        entry = {kind: summary(*zip(*t, strict=True)) for kind, t in kinds.items()}
        totals = [sum(t) for t in zip(*times.values(), strict=True)]
        entry["mean"] = {"ours_ms": 1e3 * totals[0] / len(times), "peer_ms": 1e3 * min(totals[1:]) / len(times)}
        entry["mean"]["peer_over_ours"] = entry["mean"]["peer_ms"] / entry["mean"]["ours_ms"]
        result[f"batch {batch}"] = entry
        print("stylegan2", batch, entry, flush=True)
    gan = peers[0].GAN
    result["ours"] = describe_ours(trainer)
    result["peer"] = describe(nn.ModuleList([gan.G, gan.S]), gan.D, forward_of(gan))
    return result


def forward_of(gan: Any) -> Callable[[], Tensor]:
    """What `describe` counts, of their networks."""

    def forward() -> Tensor:
        n = BATCHES[0]
        w = gan.S(torch.randn(n, LATENT))
        styles = w.unsqueeze(1).expand(-1, gan.G.num_layers, -1)
        return gan.D(gan.G(styles, torch.rand(n, SIDE, SIDE, 1)))[0]  # type: ignore[no-any-return]

    return forward


def main() -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    random.seed(0)
    results: dict[str, Any] = {
        "peers": {name: version(name) for name in ("torchgan", "torch_mimicry", "stylegan2_pytorch", "kornia")}
    }
    with tempfile.TemporaryDirectory() as name, gan_peers.on_the_cpu():
        folder = Path(name)
        results["dcgan / torchgan"] = compare("dcgan", torchgan, folder)
        results["hinge-gan / torch_mimicry"] = compare("hinge-gan", mimicry, folder)
        results["stylegan2 / stylegan2_pytorch"] = compare_stylegan2(folder)
    torch.set_num_threads(before)
    record("gans", results)


if __name__ == "__main__":
    main()
