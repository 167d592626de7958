"""Backbones: identities that hold at initialisation, exact resolutions, independence of examples, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trilemma.nets.embedding import FourierMLP, TimeEmbedding, sinusoidal
from trilemma.nets.resnet import (
    ResidualBlock,
    ResNetDecoder,
    ResNetEncoder,
    average_down,
    group_norm,
    halvings,
    nearest_up,
)
from trilemma.nets.unet import FiLMBlock, SelfAttention, UNet

SHAPES = [(1, 8, 8), (3, 28, 28), (2, 19, 13), (2, 50), (1, 5, 6, 7), (1, 2, 9), (3, 1, 1)]


@pytest.fixture(autouse=True)
def _seeded() -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randomize(net: nn.Module) -> nn.Module:
    """Give every parameter a value, so that no zero-initialised layer hides a path."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn_like(p) / math.sqrt(max(1, p[0].numel()) if p.ndim > 1 else 1.0))
    return net.double()


def jacobian_support(net: nn.Module, x: Tensor, *context: Tensor) -> Tensor:
    """|d sum(out[i]) / d x[j]| summed over j's own dimensions: (N, N)."""
    x = x.clone().requires_grad_()
    out = net(x, *context).flatten(1).sum(1)
    rows = [torch.autograd.grad(o, x, retain_graph=True)[0].abs().flatten(1).sum(1) for o in out]
    return torch.stack(rows)


def test_halvings_round_up_and_stop_at_the_smallest_side():
    assert halvings((100, 75)) == [(100, 75), (50, 38), (25, 19), (13, 10), (7, 5), (4, 3)]
    assert halvings((4,)) == [(4,)]
    assert halvings((2, 9)) == [(2, 9), (2, 5), (2, 3)]


@pytest.mark.parametrize("space", [(9,), (5, 8), (3, 6, 7)])
def test_average_down_is_the_mean_of_each_cell(space: tuple[int, ...]):
    after = tuple(-(-s // 2) for s in space)
    x = torch.randn(2, 3, *space, dtype=torch.float64)
    y = average_down(x, space, after)
    assert y.shape[2:] == after
    for corner in (tuple(0 for _ in space), tuple(a - 1 for a in after)):
        cell = x[(..., *(slice(2 * c, 2 * c + 2) for c in corner))]  # a cell at the far edge may be cut short
        torch.testing.assert_close(y[(..., *corner)], cell.flatten(2).mean(2), rtol=0, atol=1e-14)


def test_average_down_of_nearest_up_is_the_identity_on_even_sizes():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(average_down(nearest_up(x, (8, 10)), (8, 10), (4, 5)), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 6, 20, 32, 64, 96, 512])
def test_group_norm_groups_hold_at_least_four_channels(channels: int):
    layer = group_norm(channels)
    assert channels % layer.num_groups == 0
    assert layer.num_groups == 1 or channels // layer.num_groups >= 4
    y = layer.double()(torch.randn(5, channels, 40, dtype=torch.float64)).unflatten(1, (layer.num_groups, -1))
    torch.testing.assert_close(
        y.mean((2, 3)), torch.zeros(5, layer.num_groups, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("norm", [False, True])
def test_residual_blocks_start_as_the_identity(norm: bool):
    block = ResidualBlock(2, 8, 3, norm, blocks=4).double()
    h, c = torch.randn(2, 8, 5, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(block(h, c), h)


def test_depth_does_not_change_the_network_at_the_start():
    """Fixup: the signal at initialisation passes only stem, pools, 1x1 convolutions and head."""
    deep = ResNetEncoder((1, 8, 8), 4, width=8, depth=5).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    h = average_down(deep.stem(x), (8, 8), (4, 4))
    expected = deep.head(nn.functional.leaky_relu(deep.widen[0](h), 0.2).flatten(1))
    torch.testing.assert_close(deep(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [False, True])
def test_encoder_and_decoder_reach_every_position_and_mix_no_examples(shape: tuple[int, ...], norm: bool):
    encoder = randomize(ResNetEncoder(shape, 5, width=8, context_dim=2, norm=norm))
    decoder = randomize(ResNetDecoder(5, shape, width=8, context_dim=2, norm=norm))
    x, c = torch.randn(3, *shape, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    z = encoder(x, c)
    assert z.shape == (3, 5)
    assert decoder(z, c).shape == (3, *shape)
    for net, value in ((encoder, x), (decoder, z)):
        support = jacobian_support(net, value, c)
        assert (support.diagonal() > 0).all()
        assert torch.equal(support, torch.diag(support.diagonal()))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(x, c).square().sum(), x)
    assert (gradient.abs() > 0).all()  # no pixel is left out by the rounding of sizes


def test_context_reaches_encoder_decoder_and_unet():
    x, z = torch.randn(2, 1, 6, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    nets = [
        (ResNetEncoder((1, 6, 6), 3, width=4, context_dim=2), x),
        (ResNetDecoder(3, (1, 6, 6), width=4, context_dim=2), z),
        (UNet((1, 6, 6), width=8, multipliers=(1, 2), depth=1, context_dim=2), x),
    ]
    for net, value in nets:
        randomize(net)
        c = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(value, c).square().sum(), c)
        assert (gradient.abs() > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_unet_starts_at_zero_keeps_any_resolution_and_mixes_no_examples(shape: tuple[int, ...]):
    multipliers = (1, 2, 2)[: len(halvings(shape[1:], 1))]
    net = UNet(shape, width=8, multipliers=multipliers, depth=1, context_dim=4, attention_below=64)
    x, c = torch.randn(3, *shape, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(net.double()(x, c), torch.zeros_like(x))
    support = jacobian_support(randomize(net), x, c)
    assert (support.diagonal() > 0).all()
    assert torch.equal(support, torch.diag(support.diagonal()))


def test_unet_refuses_more_resolutions_than_there_are():
    with pytest.raises(ValueError, match="cannot be halved 3 times"):
        UNet((1, 4, 4), multipliers=(1, 1, 1, 1), context_dim=2)


def test_film_block_is_scale_and_shift_of_the_normalised_branch():
    block = randomize(FiLMBlock(1, 4, 4, 3))
    h, c = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    silu, film = nn.functional.silu, block.film(nn.functional.silu(c))
    branch = block.norm2(block.conv1(silu(block.norm1(h))))
    expected = h + block.conv2(silu((1 + film[:, :4, None]) * branch + film[:, 4:, None]))
    torch.testing.assert_close(block(h, c), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", [(7,), (3, 4)])
def test_self_attention_equals_the_softmax_formula(space: tuple[int, ...]):
    channels, heads = 8, 2
    layer = randomize(SelfAttention(len(space), channels, head_dim=4))
    h = torch.randn(2, channels, *space, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(h)).reshape(2, 3, heads, channels // heads, -1).unbind(1)
    weights = (torch.einsum("nhdi,nhdj->nhij", q, k) / math.sqrt(channels // heads)).softmax(-1)
    mixed = torch.einsum("nhij,nhdj->nhdi", weights, v).reshape(h.shape)
    torch.testing.assert_close(layer(h), h + layer.out(mixed), rtol=0, atol=1e-12)


def test_self_attention_commutes_with_permutations_of_positions():
    layer = randomize(SelfAttention(1, 8))
    h, order = torch.randn(2, 8, 9, dtype=torch.float64), torch.randperm(9)
    torch.testing.assert_close(layer(h[..., order]), layer(h)[..., order], rtol=0, atol=1e-12)


def test_sinusoidal_embedding_has_the_stated_frequencies_and_a_shift_rotates_it():
    t = torch.tensor([0.0, 3.0, 700.5], dtype=torch.float64)
    e = sinusoidal(t, 8)
    w = torch.tensor([10_000 ** (-k / 3) for k in range(4)], dtype=torch.float64)
    torch.testing.assert_close(e, torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], 1), rtol=0, atol=1e-10)
    # <e(t), e(s)> depends on t - s alone.
    torch.testing.assert_close(e @ e.T, (w * (t[:, None, None] - t[None, :, None])).cos().sum(-1), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="even"):
        sinusoidal(t, 5)


@pytest.mark.parametrize("dim", [3, 10, 300])
def test_time_embedding_tells_neighbouring_steps_apart(dim: int):
    e = TimeEmbedding(dim).double()(torch.arange(0, 1000, dtype=torch.float64))
    assert e.shape == (1000, dim)
    assert (e[1:] - e[:-1]).norm(dim=1).min() > 1e-4


def test_fourier_mlp_is_the_mlp_of_its_features():
    net = randomize(FourierMLP(2, 3, width=8, depth=1, context_dim=2, octaves=2))
    x, c = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    angles = torch.stack([x[:, 0], 2 * x[:, 0], x[:, 1], 2 * x[:, 1]], 1)
    expected = net.net(torch.cat([x, angles.sin(), angles.cos()], 1), c)
    torch.testing.assert_close(net(x, c), expected, rtol=0, atol=1e-12)
    assert torch.equal(FourierMLP(2, 3, zero_init=True)(x.float()), torch.zeros(4, 3))


@pytest.mark.parametrize("kind", ["encoder", "decoder", "unet"])
def test_networks_trace_into_one_graph(kind: str):
    """No data-dependent control flow: the traced program agrees on new input."""
    x, c = torch.randn(2, 1, 7, 6), torch.randn(2, 4)
    net: nn.Module = {
        "encoder": ResNetEncoder((1, 7, 6), 3, width=8, context_dim=4),
        "decoder": ResNetDecoder(4, (1, 7, 6), width=8, context_dim=4),
        "unet": UNet((1, 7, 6), width=8, multipliers=(1, 2), depth=1, context_dim=4),
    }[kind]
    randomize(net).float()
    args = (c, c) if kind == "decoder" else (x, c)
    program = torch.export.export(net, args).module()
    new = tuple(a + 1.0 for a in args)
    torch.testing.assert_close(program(*new), net(*new), rtol=1e-5, atol=1e-5)


def test_encoder_is_twice_differentiable():
    """The gradient of a gradient penalty agrees with finite differences in the parameters."""
    net = randomize(ResNetEncoder((1, 5, 5), 1, width=2))
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    parameters = dict(net.named_parameters())
    names, values = list(parameters), [p.detach().clone() for p in parameters.values()]
    direction = [torch.randn_like(v) for v in values]

    def penalty(h: float) -> Tensor:
        moved = {n: (v + h * d).requires_grad_() for n, v, d in zip(names, values, direction, strict=True)}
        (g,) = torch.autograd.grad(functional_call(net, moved, (x,)).sum(), x, create_graph=True)
        return g.square().sum(), list(moved.values())

    value, moved = penalty(0.0)
    gradients = torch.autograd.grad(value, moved, allow_unused=True)
    slope = sum(((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None), torch.zeros(()))
    h = 1e-6
    numeric = (penalty(h)[0] - penalty(-h)[0]) / (2 * h)
    torch.testing.assert_close(slope.double(), numeric.detach(), rtol=1e-6, atol=1e-8)
