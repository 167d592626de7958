"""Convolutional backbones and embeddings: identities that hold at initialisation, exact resolutions, closed forms.

Transformers, and what every backbone of a diffusion model must do with conditions, stand in the second half.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trilemma.core.errors import UsageError
from trilemma.nets.attention import Attention
from trilemma.nets.dit import DiT, DiTBlock, patchify, positions, unpatchify
from trilemma.nets.embedding import FourierMLP, TimeEmbedding, sinusoidal
from trilemma.nets.resnet import (
    ResNetBlock,
    ResNetDecoder,
    ResNetEncoder,
    average_down,
    group_norm,
    halvings,
    nearest_up,
)
from trilemma.nets.unet import FiLMBlock, SpatialAttention, UNet

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
    block = ResNetBlock(2, 8, 3, norm, blocks=4).double()
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


def test_channels_of_a_position_lie_side_by_side_in_every_stage_of_a_unet_of_pictures():
    net = UNet((1, 7, 6), width=8, multipliers=(1, 2), depth=1, context_dim=4, attention_below=16)
    layouts = []
    for stage in (*net.down[0], *net.down[1], net.middle, *net.up[0], *net.up[1]):
        stage.register_forward_hook(lambda _, __, out: layouts.append(out.stride(1)))
    randomize(net)(torch.randn(2, 1, 7, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    assert layouts == [1] * 5


def test_film_block_is_scale_and_shift_of_the_normalised_branch():
    block = randomize(FiLMBlock(1, 4, 4, 3))
    h, c = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    silu, film = nn.functional.silu, block.film(nn.functional.silu(c))
    branch = block.norm2(block.conv1(silu(block.norm1(h))))
    expected = h + block.conv2(silu((1 + film[:, :4, None]) * branch + film[:, 4:, None]))
    torch.testing.assert_close(block(h, c), expected, rtol=0, atol=1e-12)


def test_sinusoidal_embedding_has_the_stated_frequencies_and_a_shift_rotates_it():
    t = torch.tensor([0.0, 3.0, 700.5], dtype=torch.float64)
    e = sinusoidal(t, 8)
    w = torch.tensor([10_000 ** (-k / 3) for k in range(4)], dtype=torch.float64)
    torch.testing.assert_close(e, torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], 1), rtol=0, atol=1e-10)
    # <e(t), e(s)> depends on t - s alone.
    torch.testing.assert_close(e @ e.T, (w * (t[:, None, None] - t[None, :, None])).cos().sum(-1), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="even"):
        sinusoidal(t, 5)


@pytest.mark.parametrize("kind", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("dim", [3, 10, 300])
def test_time_embedding_tells_neighbouring_steps_apart(dim: int, kind: str):
    e = TimeEmbedding(dim, kind).double()(torch.arange(0, 1000, dtype=torch.float64))
    assert e.shape == (1000, dim)
    assert (e[1:] - e[:-1]).norm(dim=1).min() > 1e-4


def test_fourier_time_embedding_has_fixed_gaussian_frequencies_in_periods_over_a_thousand():
    net = TimeEmbedding(300, "fourier", scale=8.0).double()
    f, t = net.state_dict()["fourier"], torch.tensor([0.0, 31.5, 1000.0], dtype=torch.float64)
    angle = 2 * math.pi * f * t[:, None] / 1000
    torch.testing.assert_close(net(t), net.layers(torch.cat([angle.cos(), angle.sin()], 1)), rtol=0, atol=1e-12)
    torch.manual_seed(1)  # not of the global state
    torch.testing.assert_close(TimeEmbedding(300, "fourier").double().fourier, 2 * f, rtol=0, atol=0)
    # 64 draws of N(0, 8^2), the same in every run: mean within 3 / sqrt(64), variance within 3 sqrt(2 / 64), of it.
    assert abs(float(f.mean())) < 8 * 3 / 8
    assert 1 - 0.54 < float(f.square().mean()) / 64 < 1 + 0.54


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


# Attention


def softmax_attention(layer: Attention, x: Tensor, y: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, head by head, from the definition."""
    width, heads = x.shape[2], []
    d = width // layer.heads
    q, k, v = layer.query(x), *layer.key_value(y).split(width, 2)
    for i in range(layer.heads):
        part = slice(i * d, (i + 1) * d)
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(d)).softmax(-1)
        heads.append(weights @ v[..., part])
    return layer.out(torch.cat(heads, 2))


def test_attention_equals_its_definition():
    x, y = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    itself, cross = randomize(Attention(8, 2)), randomize(Attention(8, 4, 3))
    torch.testing.assert_close(itself(x), softmax_attention(itself, x, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(cross(x, y), softmax_attention(cross, x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", [(7,), (3, 4), (2, 3, 2)])
def test_spatial_attention_reads_positions_as_a_sequence_and_starts_as_the_identity(space: tuple[int, ...]):
    layer = SpatialAttention(8, head_dim=4).double()
    h = torch.randn(2, 8, *space, dtype=torch.float64)
    assert torch.equal(layer(h), h)
    randomize(layer)
    sequence = layer.norm(h).flatten(2).mT
    mixed = softmax_attention(layer.attention, sequence, sequence).mT.unflatten(2, space)
    torch.testing.assert_close(layer(h), h + mixed, rtol=0, atol=1e-12)


def test_heads_divide_the_channels():
    assert [SpatialAttention(c).attention.heads for c in (8, 32, 96, 100, 128)] == [1, 1, 3, 2, 4]


# The diffusion transformer


@pytest.mark.parametrize(("space", "patch"), [((6,), 3), ((4, 6), 2), ((2, 4, 6), 2), ((3, 5), 1)])
def test_patches_are_cells_in_row_order_and_come_back(space: tuple[int, ...], patch: int):
    x = torch.randn(2, 3, *space, dtype=torch.float64)
    tokens = patchify(x, patch)
    assert torch.equal(unpatchify(tokens, patch, space), x)
    corners = torch.cartesian_prod(*[torch.arange(0, side, patch) for side in space]).reshape(-1, len(space))
    for token, corner in zip(tokens.unbind(1), corners.tolist(), strict=True):
        cell = x[(..., *(slice(c, c + patch) for c in corner))]
        assert torch.equal(token, cell.flatten(1))


@pytest.mark.parametrize("grid", [(50,), (7, 9), (3, 4, 5)])
def test_positions_are_distinct_and_their_products_depend_on_differences(grid: tuple[int, ...]):
    code = positions(grid, 26)
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid]).reshape(-1, len(grid))
    assert code.shape == (len(index), 26)
    assert torch.cdist(code, code).fill_diagonal_(1.0).min() > 0.1
    share = 26 // (2 * len(grid))
    w = 10_000 ** (-torch.arange(share, dtype=torch.float64) / (share - 1))
    expected = (w * (index[:, None] - index[None]).unsqueeze(-1)).cos().sum((-1, -2))
    torch.testing.assert_close(code @ code.T, expected, rtol=0, atol=1e-12)


def test_dit_block_is_the_identity_at_the_start_and_its_formula_later():
    net = DiT((1, 4), width=8, depth=1, heads=2, context_dim=3, cross_dim=5).double()
    (block,) = net.blocks
    h, y = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    c = torch.randn(2, 3, dtype=torch.float64)
    assert isinstance(block, DiTBlock)
    assert torch.equal(block(h, c, y), h)
    randomize(block)
    b1, s1, g1, b2, s2, g2 = block.modulation(nn.functional.silu(c))[:, None].split(8, 2)

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()

    z = (1 + s1) * norm(h) + b1
    expected = h + g1 * softmax_attention(block.attention, z, z)
    expected = expected + softmax_attention(block.cross, norm(expected), y)
    hidden = nn.functional.gelu(block.first((1 + s2) * norm(expected) + b2), approximate="tanh")
    torch.testing.assert_close(block(h, c, y), expected + g2 * block.second(hidden), rtol=0, atol=1e-12)


def test_only_its_positions_tell_a_dit_the_order_of_patches():
    net = randomize(DiT((2, 12), width=8, depth=2, heads=2, patch=3, context_dim=3))
    x, c = torch.randn(2, 2, 12, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    swapped = x.unflatten(2, (4, 3))[:, :, [2, 0, 3, 1]].flatten(2)

    def gap() -> Tensor:
        return (net(swapped, c) - net(x, c).unflatten(2, (4, 3))[:, :, [2, 0, 3, 1]].flatten(2)).abs().max()

    assert gap() > 1e-3
    net.position.zero_()
    assert gap() < 1e-12


def test_dit_refuses_sizes_that_patches_do_not_tile_in_one_line():
    with pytest.raises(UsageError, match=r"^patches of side 4 do not tile \(12, 18\): choose one that divides 6$"):
        DiT((1, 12, 18), patch=4, context_dim=2)
    with pytest.raises(UsageError, match=r"^a width of 10 does not suit: take a multiple of 4"):
        DiT((1, 4), width=10, context_dim=2)


# What every backbone does with a context, tokens and concatenated channels

BACKBONES = ["unet-1d", "unet-2d", "unet-3d", "dit-1d", "dit-2d", "dit-3d"]
SPACES = {"1d": (9,), "2d": (7, 5), "3d": (3, 5, 3)}


def conditional(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A float64 backbone of a picture of 2 channels and a condition of 1 more, context and tokens, and its input."""
    kind, rank = name.split("-")
    space = SPACES[rank] if kind == "unet" else tuple(2 * (side // 2) for side in SPACES[rank])
    settings = {"channels_in": 3, "width": 24, "depth": 1, "context_dim": 4, "cross_dim": 5}
    # No resolution of the U-Net is coarse enough for attention: the middle alone must see the tokens.
    net = UNet((2, *space), multipliers=(1, 2), attention_below=0, **settings) if kind == "unet" else None
    net = (net or DiT((2, *space), heads=2, **settings)).double()
    draw = torch.randn(3, 3 * math.prod(space) + 4 + 6 * 5, dtype=torch.float64)
    x, c, y = draw.split([3 * math.prod(space), 4, 30], 1)
    return net, (x.reshape(3, 3, *space), c, y.reshape(3, 6, 5))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_starts_at_zero_and_a_few_steps_bring_every_input_to_the_output(name: str):
    net, inputs = conditional(name)
    target = torch.randn_like(inputs[0][:, :2])
    assert torch.equal(net(*inputs), torch.zeros_like(target))
    for _ in range(4):  # the head first, then what ends the branches, then the rest
        (net(*inputs) - target).square().mean().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.3 * p.grad
                p.grad = None
    leaves = [value.requires_grad_() for value in inputs]
    for gradient in torch.autograd.grad(net(*leaves).square().sum(), leaves):
        assert (gradient.abs() > 0).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_mixes_no_examples_and_the_order_of_tokens_is_nothing(name: str):
    net, (x, c, y) = conditional(name)
    randomize(net)
    out = net(x, c, y)
    assert out.shape == (3, 2, *x.shape[2:])
    for changed in ((x + 1, c, y), (x, c + 1, y), (x, c, y * 2)):
        mixed = tuple(torch.cat([new[:1], old[1:]]) for new, old in zip(changed, (x, c, y), strict=True))
        other = net(*mixed)
        assert (other[0] - out[0]).abs().max() > 1e-4
        torch.testing.assert_close(other[1:], out[1:], rtol=0, atol=1e-13)
    torch.testing.assert_close(net(x, c, y[:, [3, 0, 5, 1, 4, 2]]), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_compiles_without_graph_breaks_and_in_any_memory_layout(name: str):
    net, (x, c, y) = conditional(name)
    out = randomize(net)(x, c, y)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c, y), out, rtol=0, atol=1e-13)
    if x.ndim > 3:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        net.to(memory_format=layout)
        torch.testing.assert_close(net(x.contiguous(memory_format=layout), c, y), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["unet-1d", "dit-1d"])
def test_backbone_insists_on_tokens_if_and_only_if_it_was_made_for_them(name: str):
    net, (x, c, y) = conditional(name)
    with pytest.raises(AssertionError, match="cross_dim is 5"):
        net(x, c)
    net.cross_dim = 0
    with pytest.raises(AssertionError, match="cross_dim is 0"):
        net(x, c, y)


def test_attention_stands_where_it_was_asked_for():
    def places(**settings: int) -> list[tuple[bool, bool]]:
        net = UNet((1, 8, 8), width=8, multipliers=(1, 2, 2), depth=1, context_dim=2, **settings)
        stages = [*(level[0] for level in net.down), net.middle, *(level[0] for level in net.up)]
        return [(stage.attention is not None, stage.cross is not None) for stage in stages]

    no, own, both = (False, False), (True, False), (True, True)
    # resolutions of 64, 16 and 4 positions
    assert places(attention_below=3) == [no] * 7
    assert places(attention_below=15) == [no, no, own, own, own, no, no]
    assert places(attention_below=16) == [no, own, own, own, own, own, no]
    assert places(attention_below=0, attention_middle=True) == [no, no, no, own, no, no, no]
    assert places(attention_below=0, cross_dim=3) == [no, no, no, (False, True), no, no, no]
    assert places(attention_below=4, cross_dim=3) == [no, no, both, both, both, no, no]
