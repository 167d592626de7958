"""Losses, penalties, layers and networks of adversarial models against other people's code: values and gradients.

torchgan has the losses and the DCGAN, torch_mimicry the hinge, the gradient penalty, spectral normalisation, class
conditions and projection, stylegan2_pytorch the style networks and their penalties, diffusers the resampling. Where
they see a thing in another way, a test says how ours is brought there. Attention, and a blur that mirrors at the edge,
have no counterpart here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, relu

from benchmarks import gan_peers
from tests.flow_oracles import normal, randomized
from trilemma.adversarial.biggan import ConditionalBatchNorm, DownBlock
from trilemma.adversarial.dcgan import DCGANDecoder, DCGANTrunk
from trilemma.adversarial.discriminator import Discriminator, Trunk
from trilemma.adversarial.losses import LOSSES, LossName
from trilemma.adversarial.penalties import gradient_penalty, spectral_normalize, squared_gradients
from trilemma.adversarial.style import GAIN, EqualizedLinear, modulated_convolution
from trilemma.adversarial.stylegan2 import (
    DownConvolution,
    Level,
    Output,
    StyledConvolution,
    StyleGAN2Generator,
    path_lengths,
)
from trilemma.core.noise import Noise
from trilemma.core.spec import ConditionSpec
from trilemma.nets.resample import BINOMIAL, taps_of, upfirdn

RTOL = 1e-10


def peer(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")


@pytest.fixture
def torchgan() -> Any:
    return peer(gan_peers.torchgan)


@pytest.fixture
def mimicry() -> Callable[[str], Any]:
    return lambda name: peer(lambda: gan_peers.mimicry(name))


@pytest.fixture
def stylegan2() -> Any:
    return peer(gan_peers.stylegan2_pytorch)


@pytest.fixture
def default_float64() -> Iterator[None]:
    """The peers make tensors of the default type in the middle of things."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float64
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=RTOL * theirs.abs().max().item())


def same(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Values, and gradients of a random functional in the inputs and in pairs of parameters (ours, theirs)."""
    results = []
    for i, function in enumerate((ours, theirs)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        total = (value * normal(*value.shape, seed=8)).sum()
        gradients = torch.autograd.grad(total, [*leaves, *(pair[i] for pair in parameters)])
        results.append([value.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        close(a.reshape(b.shape), b)


def critic() -> nn.Module:
    """Pictures (N, 3, 8, 8) -> (N, 1), smooth."""
    return randomized(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(72, 1)), scale=1.0)


# -- losses and penalties -----------------------------------------------------------------------------------------

NAMES: dict[LossName, tuple[str, dict[str, Any]]] = {
    "minimax": ("minimax", {"nonsaturating": False}),
    "non-saturating": ("minimax", {}),
    "wasserstein": ("wasserstein", {}),
    "least-squares": ("least_squares", {}),
}


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_torchgans(torchgan: Any, name: LossName) -> None:
    theirs, settings = NAMES[name]
    real, fake = 2.0 * normal(7), 2.0 * normal(7, seed=1)
    same(LOSSES[name].d, getattr(torchgan.functional, f"{theirs}_discriminator_loss"), [real, fake])
    g = getattr(torchgan.functional, f"{theirs}_generator_loss")
    same(lambda fake: LOSSES[name].g(fake, real), lambda fake: g(fake, **settings), [fake])


@pytest.mark.parametrize("name", ["hinge", "wasserstein"])
def test_losses_are_mimicrys(mimicry: Any, name: LossName) -> None:
    losses = mimicry("modules.losses")
    real, fake = 2.0 * normal(7), 2.0 * normal(7, seed=1)
    d, g = getattr(losses, f"{name}_loss_dis"), getattr(losses, f"{name}_loss_gen")
    same(LOSSES[name].d, lambda real, fake: d(output_fake=fake, output_real=real), [real, fake])
    same(lambda fake: LOSSES[name].g(fake, real), g, [fake])


def test_hinge_is_stylegan2_pytorchs(stylegan2: Any) -> None:
    """Its discriminator is high on generated pictures: D has the other sign."""
    real, fake = 2.0 * normal(7), 2.0 * normal(7, seed=1)
    same(LOSSES["hinge"].d, lambda real, fake: stylegan2.hinge_loss(-fake, -real), [real, fake])
    same(lambda fake: LOSSES["hinge"].g(fake, real), lambda fake: stylegan2.gen_hinge_loss(-fake, None), [fake])


def test_gradient_penalty_is_mimicrys(mimicry: Any) -> None:
    """The places on the lines are drawn in float32. torchgan's takes the norm over the whole batch instead."""
    theirs = mimicry("nets.wgan_gp.wgan_gp_base").WGANGPBaseDiscriminator.compute_gradient_penalty_loss
    net = critic()
    real, fake = normal(5, 3, 8, 8), normal(5, 3, 8, 8, seed=1)

    def function(real: Tensor, fake: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return theirs(SimpleNamespace(forward=net), real, fake, gp_scale=1.0)  # type: ignore[no-any-return]

    u = torch.rand(5, 1, generator=torch.Generator().manual_seed(3)).double().view(5)
    results = []
    for penalty in (
        gradient_penalty(lambda x: net(x).squeeze(1), real, fake, u),
        function(real, fake),
    ):
        weights = [p for p in net.parameters() if p.ndim > 1]
        results.append([penalty.detach(), *torch.autograd.grad(penalty, weights)])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_r1_and_r2_are_stylegan2_pytorchs(stylegan2: Any, default_float64: None) -> None:
    net = critic()
    real, fake = normal(5, 3, 8, 8), normal(5, 3, 8, 8, seed=1)

    def ours(real: Tensor, fake: Tensor) -> Tensor:
        total = net(torch.cat([real, fake])).sum()
        return torch.stack([s.mean() for s in squared_gradients(total, [real, fake])])

    def theirs(*pictures: Tensor) -> Tensor:
        return torch.stack([stylegan2.gradient_penalty(x, net(x), weight=1) for x in pictures])

    same(ours, theirs, [real, fake], [(p, p) for p in net.parameters() if p.ndim > 1])


def test_path_lengths_are_stylegan2_pytorchs(stylegan2: Any, default_float64: None) -> None:
    g = StyleGAN2Generator((3, 8, 8), 6, None, w_dim=6, width=4, mapping_depth=2)
    for i, (name, p) in enumerate(g.named_parameters()):
        p.data = normal(*p.shape, seed=i) * (0.3 if name.endswith("strength") else 1.0)
    direction = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))

    class Drawn(Noise):
        def normal_like(self, x: Tensor) -> Tensor:
            return direction

    def theirs(ws: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return stylegan2.calc_pl_lengths(ws, g.synthesis(ws))  # type: ignore[no-any-return]

    weights = [p for name, p in g.named_parameters() if name.startswith("levels") and p.ndim > 1]
    ws = normal(4, g.num_ws, 6)
    same(lambda ws: path_lengths(ws, g.synthesis(ws), Drawn(n=4)), theirs, [ws], [(p, p) for p in weights])


# -- style networks and resampling --------------------------------------------------------------------------------


@pytest.mark.parametrize(("demodulate", "kernel"), [(True, 3), (False, 1), (True, 1)])
def test_modulated_convolution_is_stylegan2_pytorchs(stylegan2: Any, demodulate: bool, kernel: int) -> None:
    """Theirs makes a kernel for each example, and adds 1 to the style."""
    theirs = randomized(stylegan2.Conv2DMod(6, 5, kernel, demod=demodulate), scale=1.0)
    x, style = normal(4, 6, 8, 8), normal(4, 6, seed=1)

    def ours(x: Tensor, style: Tensor) -> Tensor:
        return modulated_convolution(x, theirs.weight, style + 1.0, demodulate=demodulate, padding=kernel // 2)

    same(ours, theirs, [x, style], [(theirs.weight, theirs.weight)])


def copy_affine(ours: EqualizedLinear, theirs: nn.Module) -> None:
    ours.weight.copy_(theirs.weight / ours.scale)  # type: ignore[arg-type, operator]
    ours.bias.copy_(theirs.bias + 1.0)  # type: ignore[arg-type, operator]


def test_layers_of_a_level_are_stylegan2_pytorchs(stylegan2: Any) -> None:
    """A block that keeps the resolution: theirs doubles before the convolution, ours filters behind it.

    Theirs has a strength of the noise, and with it a bias, for each channel, its noise has height and width exchanged,
    and its leaky ReLU has no gain.
    """
    theirs = randomized(stylegan2.GeneratorBlock(7, 6, 5, upsample=False, upsample_rgb=False), scale=1.0)
    image = normal(8, 8, seed=3)
    convolutions = [StyledConvolution(7, i, 5, (8, 8), up=False, noise=True).double() for i in (6, 5)]
    output = Output(7, 5, 3).double()
    with torch.no_grad():
        for i, ours in enumerate(convolutions, start=1):
            assert ours.strength is not None
            assert ours.image is not None
            noise = getattr(theirs, f"to_noise{i}")
            noise.weight.fill_(0.3 * i)
            ours.strength.fill_(0.3 * i)
            ours.image.copy_(image)
            ours.bias.copy_(noise.bias)
            ours.weight.copy_(getattr(theirs, f"conv{i}").weight)
            copy_affine(ours.affine, getattr(theirs, f"to_style{i}"))
        output.weight.copy_(theirs.to_rgb.conv.weight.flatten(1) * math.sqrt(5))
        copy_affine(output.affine, theirs.to_rgb.to_style)

    def function(x: Tensor, before: Tensor, w: Tensor) -> Tensor:
        for convolution in convolutions:
            x = convolution(x, w, gain=1.0 / GAIN)
        return torch.cat([x, output(x, w) + before], 1)

    def block(x: Tensor, before: Tensor, w: Tensor) -> Tensor:
        return torch.cat(theirs(x, before, w, image.T.expand(4, 8, 8).unsqueeze(3)), 1)

    pairs = [(ours.weight, getattr(theirs, f"conv{i}").weight) for i, ours in enumerate(convolutions, start=1)]
    pairs += [(ours.bias, getattr(theirs, f"to_noise{i}").bias) for i, ours in enumerate(convolutions, start=1)]
    same(function, block, [normal(4, 6, 8, 8), normal(4, 3, 8, 8, seed=1), normal(4, 7, seed=2)], pairs)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_doubling_and_halving_are_diffusers(size: tuple[int, int]) -> None:
    up = pytest.importorskip("diffusers.models.upsampling").upsample_2d
    down = pytest.importorskip("diffusers.models.downsampling").downsample_2d
    level = Level(4, 3, 3, (16, 16), None, first=True, residual=False, noise=False).double()
    halve = DownConvolution(2, 3, 3).double()
    for module in (level, halve):
        module.taps = taps_of(BINOMIAL).double() * (2.0 if module is level else 1.0)
    same(level.upsample, lambda x: up(x, list(BINOMIAL)), [normal(2, 3, *size)])
    same(halve.downsample, lambda x: down(x, list(BINOMIAL)), [normal(2, 3, *size)])


@pytest.mark.parametrize(
    ("taps", "up", "down", "padding"),
    [(5, 3, 2, (3, 1)), (4, 2, 1, (-1, 3)), (4, 1, 2, (1, 1)), (6, 2, 2, (4, 5)), (3, 1, 1, (-1, 0))],
)
def test_filters_are_diffusers(taps: int, up: int, down: int, padding: tuple[int, int]) -> None:
    """Taps that are no mirror image of themselves."""
    theirs = pytest.importorskip("diffusers.models.upsampling").upfirdn2d_native
    k = normal(taps, seed=1)
    same(
        lambda x: upfirdn(x, k, up=up, down=down, padding=padding),
        lambda x: theirs(x, torch.outer(k, k), up=up, down=down, pad=padding),
        [normal(2, 3, 8, 9)],
    )


# -- normalisation ------------------------------------------------------------------------------------------------


def normalized_convolution() -> nn.Conv2d:
    """With a weight that is not orthogonal, as it is after some training."""
    ours = nn.Conv2d(3, 8, 3).double()
    spectral_normalize(nn.Sequential(ours))
    with torch.no_grad():
        ours.parametrizations.weight.original.copy_(normal(8, 3, 3, 3))  # type: ignore[union-attr, operator]
    return ours


def test_a_step_of_spectral_normalisation_is_mimicrys(mimicry: Any) -> None:
    """Theirs moves the right singular vector first, ours the left one: theirs has the transposed matrix."""
    ours = normalized_convolution()
    parametrization: Any = ours.parametrizations.weight  # type: ignore[union-attr]
    theirs = mimicry("modules.spectral_norm").SNLinear(8, 27).double()
    with torch.no_grad():
        theirs.weight.copy_(parametrization.original.flatten(1).T)
        theirs.sn_u.copy_(parametrization[0]._v)
    for _ in range(3):
        a, b = ours.weight.flatten(1), theirs.sn_weights().T
        close(a.detach(), b.detach())
        cotangent = normal(8, 27, seed=2)
        (of_ours,) = torch.autograd.grad((a * cotangent).sum(), parametrization.original)
        (of_theirs,) = torch.autograd.grad((b * cotangent).sum(), theirs.weight)
        close(of_ours.flatten(1), of_theirs.T)


def test_spectral_normalisation_converges_as_torchgans(torchgan: Any) -> None:
    ours = normalized_convolution()
    plain = nn.Conv2d(3, 8, 3).double()
    plain.weight.data = ours.parametrizations.weight.original.detach().clone()  # type: ignore[union-attr, operator]
    theirs = torchgan.layers.SpectralNorm2d(plain, power_iterations=400)
    theirs(normal(1, 3, 4, 4))
    for _ in range(400):
        weight = ours.weight
    close(weight.detach(), plain.weight.detach())


def test_conditional_batch_norm_is_mimicrys(mimicry: Any) -> None:
    """Theirs has a gain and a bias for each class: ours of the indicator of the class."""
    theirs = randomized(mimicry("modules.layers").ConditionalBatchNorm2d(6, 4), scale=1.0).train()
    ours = ConditionalBatchNorm(2, 6, 4).double()
    gain, bias = theirs.embed.weight.detach().chunk(2, 1)
    ours.gain.weight.data, ours.bias.weight.data = (gain - 1.0).T.clone(), bias.T.clone()
    y = torch.tensor([3, 0, 0, 2, 1])
    for training in (True, False):
        ours.train(training), theirs.train(training)
        same(lambda h: ours(h, one_hot(y, 4).double()), lambda h: theirs(h, y), [3.0 * normal(5, 6, 4, 4) + 1.0])
        for name in ("running_mean", "running_var"):
            close(getattr(ours.norm, name), getattr(theirs.bn, name))


# -- networks -----------------------------------------------------------------------------------------------------


def random_norms(net: nn.Module) -> nn.Module:
    """All parameters random, gains about 1, in training mode."""
    randomized(net, scale=1.0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data += 1.0
    return net.train()


def in_our_shape(ours: Tensor, theirs: Tensor) -> Tensor:
    """A transposed convolution of a single place is a linear layer with the transposed matrix."""
    return theirs.flatten(1).T if ours.ndim == 2 and len(ours) != len(theirs) else theirs.reshape(ours.shape)


def same_networks(ours: nn.Module, theirs: nn.Module, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """In training and, with the running moments of two batches, in evaluation."""
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(in_our_shape(a, b))
    for training in (True, False):
        ours.train(training), theirs.train(training)
        same(ours, theirs, [x])
        gradients = []
        for net in (ours, theirs):
            net.zero_grad()
            y = net(x)
            (y * normal(*y.shape, seed=4)).sum().backward()
        gradients = [(a.grad, b.grad) for a, b in pairs]
        for a, b in gradients:
            assert a is not None
            assert b is not None
            close(a, in_our_shape(a, b))


def test_dcgan_generator_is_torchgans(torchgan: Any) -> None:
    theirs = torchgan.models.DCGANGenerator(10, 32, 3, 4, nonlinearity=nn.ReLU(), last_nonlinearity=nn.Identity())
    random_norms(theirs)
    ours = DCGANDecoder(10, (3, 32, 32), width=4).double()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    first, *rest, last = theirs.model
    pairs = [(ours.stem.weight, first[0].weight), (ours.bias, last[0].bias)]
    pairs += [(up.weight, layer[0].weight) for up, layer in zip(ours.ups, [*rest, last], strict=True)]  # type: ignore[misc]
    for norm, layer in zip(ours.norms, [first, *rest], strict=True):
        pairs += [(norm.weight, layer[1].weight), (norm.bias, layer[1].bias)]  # type: ignore[list-item]
    same_networks(ours, theirs, normal(6, 10), pairs)
    for norm, layer in zip(ours.norms, [first, *rest], strict=True):
        close(norm.running_mean, layer[1].running_mean)  # type: ignore[arg-type]
        close(norm.running_var, layer[1].running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_dcgan_discriminator_is_torchgans(torchgan: Any, batch_norm: bool) -> None:
    """Behind batch normalisation, theirs has no last bias."""
    theirs = torchgan.models.DCGANDiscriminator(32, 3, 4, batchnorm=batch_norm, last_nonlinearity=nn.Identity())
    random_norms(theirs)
    ours = Discriminator(DCGANTrunk((3, 32, 32), width=4, batch_norm=batch_norm), None).double()
    nn.init.zeros_(ours.output.bias)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert sizes[0] == sizes[1] + batch_norm
    last = theirs.disc[0]
    pairs = [(ours.output.weight, last.weight)] + ([] if batch_norm else [(ours.output.bias, last.bias)])
    for down, layer in zip(ours.trunk.downs, theirs.model, strict=True):  # type: ignore[arg-type]
        pairs += [(down.weight, layer[0].weight)] + ([] if down.bias is None else [(down.bias, layer[0].bias)])
    for norm, layer in zip(ours.trunk.norms or (), theirs.model[1:], strict=batch_norm):  # type: ignore[arg-type]
        pairs += [(norm.weight, layer[1].weight), (norm.bias, layer[1].bias)]
    same_networks(ours, theirs, normal(6, 3, 32, 32), pairs)


class Blocks(Trunk):
    """Two halvings and two blocks that keep the resolution, as torch_mimicry has them for 32x32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        downs, widths = (True, True, False, False), (3, width, width, width)
        self.blocks = nn.ModuleList(
            DownBlock(2, a, width, down=down, first=i == 0)
            for i, (a, down) in enumerate(zip(widths, downs, strict=True))
        )
        self.feature_dim = width

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return relu(x).flatten(2).sum(2)


def test_projection_discriminator_is_mimicrys(mimicry: Any) -> None:
    """Ours divides the projection by the root of the number of features.

    Its ReLU changes in place what its shortcut then takes in; here it does not. Blocks without halving have no weight
    in the shortcut: ours has the unit matrix. Weights are those that spectral normalisation leaves.
    """
    theirs = randomized(mimicry("nets.cgan_pd.cgan_pd_32").CGANPDDiscriminator32(num_classes=5, ndf=6), scale=1.0)
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x, y = normal(4, 3, 32, 32), torch.tensor([4, 0, 1, 4])
    theirs.train()
    for _ in range(5):
        theirs(x, y)
    theirs.eval()(x, y)
    ours = Discriminator(Blocks(6), ConditionSpec(kind="class", names=tuple("abcde"))).double()
    with torch.no_grad():
        for i, block in enumerate(ours.trunk.blocks, start=1):  # type: ignore[arg-type]
            other = getattr(theirs, f"block{i}")
            for name, layer in (("c1", block.conv1), ("c2", block.conv2), ("c_sc", block.skip)):
                if hasattr(other, name):
                    layer.weight.copy_(getattr(other, name).weight)
                    layer.bias.copy_(getattr(other, name).bias)
                else:
                    layer.weight.copy_(torch.eye(6).view(6, 6, 1, 1))
                    layer.bias.zero_()
        ours.output.weight.copy_(theirs.l5.sn_weights())
        ours.output.bias.copy_(theirs.l5.bias)
        assert isinstance(ours.embed.embed, nn.Embedding)
        ours.embed.embed.weight.copy_(theirs.l_y.sn_weights() * math.sqrt(6))
    same(lambda x: ours(x, y), lambda x: theirs(x, y).squeeze(1), [x])
    assert (ours(x, y) - ours(x, y.flip(0))).abs().max() > 1e-3
