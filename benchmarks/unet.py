"""Our U-Net against the peers' at the same widths (32, 64, 128), on 64 pictures of 32 x 32 and one channel.

A step is forward, mean squared error, backward and AdamW; each network embeds the time itself. No two networks are
the same, so the floating-point operations of a forward pass stand beside the times (`flops_a_over_b`), and
`time_per_flop_a_over_b` is the ratio of times over the ratio of operations. Residual blocks per resolution:

    ours                         down 2, 2, 2; middle 1; up 2, 2, 2        13 blocks; 3 deep: 19
    diffusers                    down 2, 2, 2; middle 2; up 3, 3, 3        17, and 3 x 3 convolutions that resample
    denoising-diffusion-pytorch  down 2, 2, 2; middle 2; up 2, 2, 2, end 1  15, of the narrower width on the way down,
                                 a 7 x 7 stem, and linear attention at every resolution (once more without it)

All have softmax attention once, in the middle, over 8 x 8 positions (diffusers with 16 heads, the others with 4).
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import paired, record
from trilemma.core.noise import make_generator
from trilemma.nets.embedding import TimeEmbedding
from trilemma.nets.unet import UNet

BATCH, SIDE, WIDTH = 64, 32, 32
REPETITIONS = 7


class Ours(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(4 * WIDTH)
        self.net = UNet(
            (1, SIDE, SIDE),
            width=WIDTH,
            multipliers=(1, 2, 4),
            depth=depth,
            context_dim=4 * WIDTH,
            attention_below=0,
            attention_middle=True,
        )

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.net(x, self.time(t))


class Diffusers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=SIDE,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
        )

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.net(x, t).sample


class Nothing(nn.Module):
    """In place of a residual branch."""

    def forward(self, x: Tensor) -> float:
        return 0.0


def denoising_diffusion_pytorch(linear_attention: bool) -> nn.Module:
    """lucidrains' U-Net. Its module imports torchvision, of which the network uses nothing, after all its others."""
    import accelerate  # noqa: F401  these look whether torchvision is there
    import diffusers.models.unets.unet_2d  # noqa: F401
    import ema_pytorch  # noqa: F401

    stubs = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")}
    for name, stub in stubs.items():
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    stubs["torchvision"].transforms = stubs["torchvision.transforms"]  # type: ignore[attr-defined]
    stubs["torchvision"].utils = stubs["torchvision.utils"]  # type: ignore[attr-defined]
    sys.modules.update(stubs)
    try:
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet
    finally:
        for name in stubs:
            del sys.modules[name]
    net = Unet(dim=WIDTH, dim_mults=(1, 2, 4), channels=1, full_attn=(False, False, False), flash_attn=True)
    if not linear_attention:
        for level in (*net.downs, *net.ups):
            level[2] = Nothing()
    assert isinstance(net, nn.Module)
    return net


def work(net: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass without gradients, and a training step."""
    generator = make_generator("benchmark", "unet")
    x, target = torch.randn(2, BATCH, 1, SIDE, SIDE, generator=generator)
    t = 1000.0 * torch.rand(BATCH, generator=generator)
    optimiser = torch.optim.AdamW(net.parameters(), fused=True)

    @torch.no_grad()
    def forward() -> None:
        net(x, t)

    def step() -> None:
        (net(x, t) - target).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return forward, step


def operations(forward: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops())


def compare(ours: nn.Module, peer: nn.Module) -> dict[str, Any]:
    """Times of one and of two threads; a is ours, b is the peer."""
    a, b = work(ours), work(peer)
    flops = operations(a[0]) / operations(b[0])
    result: dict[str, Any] = {"flops_a_over_b": flops}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, of_a, of_b in (("forward", a[0], b[0]), ("step", a[1], b[1])):
            timing = paired(of_a, of_b, REPETITIONS)
            timing["time_per_flop_a_over_b"] = timing["ratio_a_over_b"] / flops
            result[f"{name}, {threads} thread{'s'[: threads - 1]}"] = timing
    torch.set_num_threads(before)
    return result


def describe(net: nn.Module) -> dict[str, float]:
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "gflop_per_example": operations(work(net)[0]) / BATCH / 1e9,
    }


def main() -> None:
    nets = {
        "ours": Ours(2),
        "ours, 3 deep": Ours(3),
        "diffusers": Diffusers(),
        "denoising-diffusion-pytorch": denoising_diffusion_pytorch(True),
        "denoising-diffusion-pytorch without linear attention": denoising_diffusion_pytorch(False),
    }
    pairs = [("ours", peer) for peer in list(nets)[2:]] + [("ours, 3 deep", "diffusers")]
    results = {
        "peers": {name: version(name) for name in ("diffusers", "denoising-diffusion-pytorch")},
        "networks": {name: describe(net) for name, net in nets.items()},
        "comparisons": {f"{a} / {b}": compare(nets[a], nets[b]) for a, b in pairs},
    }
    record("unet", results)


if __name__ == "__main__":
    main()
