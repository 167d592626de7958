"""StyleGAN2: modulation, doubling and path lengths against plain definitions, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trilemma.adversarial.generator import mix_styles
from trilemma.adversarial.style import EqualizedLinear, MappingNetwork, demodulation, modulated_convolution
from trilemma.adversarial.stylegan2 import (
    Level,
    Output,
    PathLength,
    StyledConvolution,
    StyleGAN2Generator,
    StyleGAN2Trunk,
    TrunkBlock,
    path_lengths,
    with_minibatch_std,
)
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import ConditionSpec

F64 = torch.float64
CONV = {0: F.linear, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CLASSES = ConditionSpec(kind="class", names=("a", "b", "c"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("stylegan2", seed), dtype=F64)


def randomize(module: torch.nn.Module) -> None:
    """Give strengths and biases values too, so that zeros hide nothing."""
    for i, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, seed=i)


def generator(
    shape: tuple[int, ...] = (2, 12, 8), condition: ConditionSpec | None = None, **settings: object
) -> StyleGAN2Generator:
    torch.manual_seed(0)
    settings = {"w_dim": 5, "width": 3, "mapping_depth": 2, **settings}
    g = StyleGAN2Generator(shape, 4, condition, **settings).double()  # type: ignore[arg-type]
    randomize(g.levels)
    return g


# Plain definitions: one example and one line of the formula after another.


def pad_all(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, [before, after] * (x.ndim - 2))


def filtered(x: Tensor, taps: list[float]) -> Tensor:
    """Correlation of each channel with the outer product of taps, only where all of it lies inside."""
    dims = x.ndim - 2
    kernel = torch.ones((), dtype=F64)
    for _ in range(dims):
        kernel = kernel.unsqueeze(-1) * torch.tensor(taps, dtype=F64)
    y = CONV[dims](x.flatten(0, 1).unsqueeze(1), kernel[None, None]) if dims else x
    return y.reshape(*x.shape[:2], *y.shape[2:])


def zeros_between(x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:2], *(2 * side for side in x.shape[2:]))
    y[(..., *(slice(None, None, 2) for _ in x.shape[2:]))] = x
    return y


def doubled(x: Tensor) -> Tensor:
    return filtered(pad_all(zeros_between(x), 2, 1), [0.25, 0.75, 0.75, 0.25]) if x.ndim > 2 else x


def every_second(x: Tensor) -> Tensor:
    return x[(..., *(slice(None, None, 2) for _ in x.shape[2:]))]


BLUR = [0.125, 0.375, 0.375, 0.125]


def unfused(x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool, padding: int) -> Tensor:
    """The kernel W'' of each example, and a convolution with each in a group of its own."""
    n, dims = len(x), weight.ndim - 2
    kernels = torch.einsum("ni,oi...->noi...", style, weight)
    if demodulate:
        power = kernels.square().flatten(2).sum(2)
        kernels = kernels / (power + 1e-8).sqrt().view(*power.shape, *(1,) * (kernels.ndim - 2))
    if dims == 0:
        return torch.einsum("noi,ni->no", kernels, x)
    y = CONV[dims](x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=padding, groups=n)
    return y.view(n, -1, *y.shape[2:])


def test_mapping_network_is_the_formula_and_does_not_depend_on_the_scale_of_z() -> None:
    net = MappingNetwork(4, 5, CLASSES, depth=2).double()
    for i, p in enumerate(net.parameters()):
        p.data = normal(*p.shape, seed=i) * (100.0 if i else 1.0)
    z, c = normal(3, 4, seed=9), torch.tensor([2, 0, 1])
    unit = lambda t: t / (t.square().mean(1, keepdim=True) + 1e-8).sqrt()  # noqa: E731
    h = torch.cat([unit(z), unit(net.embed.embed.weight[c])], 1)
    for layer in net.layers:
        h = 0.01 * (h @ layer.weight.T / math.sqrt(h.shape[1]) + layer.bias)
        h = math.sqrt(2) * torch.where(h > 0, h, 0.2 * h)
    torch.testing.assert_close(net(z, c), h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(7.0 * z, c), h, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_modulated_convolution_is_its_unfused_definition(dims: int, demodulate: bool) -> None:
    inputs = [normal(4, 3, *(5, 4, 6)[:dims]), normal(2, 3, *(3,) * dims, seed=1), normal(4, 3, seed=2)]
    for t in inputs:
        t.requires_grad_()
    results = [f(*inputs, demodulate=demodulate, padding=1) for f in (modulated_convolution, unfused)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    direction = normal(*results[0].shape, seed=3)
    gradients = [torch.autograd.grad(y, inputs, direction) for y in results]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_demodulated_kernels_have_norm_one_whatever_the_style(dims: int) -> None:
    """The answers at the centre to every unit impulse are the entries of W''; for white input their norm is the std."""
    weight, places = normal(4, 3, *(3,) * dims), 3**dims
    for scale in (0.01, 1.0, 300.0):
        style = scale * normal(1, 3, seed=1).expand(3 * places, -1)
        impulses = torch.eye(3 * places, dtype=F64).view(-1, 3, *(3,) * dims)
        y = modulated_convolution(impulses, weight, style, padding=1)
        centre = y[(..., *(1,) * dims)]
        power = (style[:1, :, None] * weight.reshape(4, 3, -1)).square().sum((1, 2))
        torch.testing.assert_close(centre.square().sum(0), power / (power + 1e-8), rtol=1e-13, atol=0)


def test_scaling_a_style_commutes_with_demodulation() -> None:
    x, weight, style = normal(3, 4, 5, 6), normal(2, 4, 3, 3, seed=1), normal(3, 4, seed=2)
    factors = torch.tensor([[0.5], [20.0], [1.0]], dtype=F64)
    y = modulated_convolution(x, weight, style, padding=1)
    torch.testing.assert_close(
        modulated_convolution(x, weight, factors * style, padding=1), y, rtol=1e-8, atol=1e-8
    )  # up to eps in the denominator
    plain = modulated_convolution(x, weight, style, demodulate=False, padding=1)
    torch.testing.assert_close(y, plain * demodulation(weight, style)[:, :, None, None], rtol=1e-14, atol=1e-14)
    scaled = modulated_convolution(x, weight, factors * style, demodulate=False, padding=1)
    torch.testing.assert_close(scaled, factors[:, :, None, None] * plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_styled_convolution_is_the_formula(dims: int, up: bool) -> None:
    small = (5, 4, 3)[:dims]
    space = tuple(side * (2 if up else 1) for side in small)
    layer = StyledConvolution(6, 3, 4, space, up=up, noise=True).double()
    randomize(layer)
    x, w = normal(2, 3, *small, seed=11), normal(2, 6, seed=12)
    ones = (1,) * dims
    style = w @ layer.affine.weight.T / math.sqrt(6) + layer.affine.bias
    h = x * style.view(2, 3, *ones)
    if up and dims:
        # Zeros behind each sample, the transposed convolution (flipped kernel) wherever it reaches, the filter.
        kernel = layer.weight.flip(list(range(2, 2 + dims)))
        h = CONV[dims](pad_all(zeros_between(h), 2, 1), kernel)
        h = filtered(pad_all(h, 1, 1), [2 * tap for tap in BLUR])
    else:
        h = CONV[dims](h, layer.weight, **({"padding": 1} if dims else {}))
    power = torch.einsum("ni,oi->no", style.square(), layer.weight.square().reshape(4, 3, -1).sum(2))
    h = h / (power + 1e-8).sqrt().view(2, 4, *ones)
    for noise in (None, "fresh"):
        image = layer.image if noise is None else Noise("n", n=2).normal(1, *space, dtype=F64)
        expected = h + image * layer.strength + layer.bias.view(4, *ones)
        expected = math.sqrt(2) * torch.where(expected > 0, expected, 0.2 * expected)
        y = layer(x, w, None if noise is None else Noise("n", n=2))
        assert y.shape[2:] == space
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x, w, None if noise is None else Noise("n", n=2), 0.3), 0.3 * expected)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_a_level_adds_outputs_and_residuals_after_doubling_them(dims: int) -> None:
    small = (3, 4, 2)[:dims]
    space = tuple(2 * side for side in small)
    level = Level(5, 4, 3, space, Output(5, 3, 2), first=False, residual=True, noise=False).double()
    randomize(level)
    x, y, ws = normal(2, 4, *small, seed=1), normal(2, 2, *small, seed=2), [normal(2, 5, seed=i) for i in range(3, 6)]
    got_x, got_y = level(x, y, ws, None)
    skip = CONV[dims](x, level.skip.weight / math.sqrt(4))
    expected = (level.conv(level.up(x, ws[0]), ws[1]) + doubled(skip)) / math.sqrt(2)
    torch.testing.assert_close(got_x, expected, rtol=1e-12, atol=1e-12)
    output = level.output
    style = (ws[2] @ output.affine.weight.T / math.sqrt(5) + output.affine.bias) / math.sqrt(3)
    colours = torch.einsum("oi,ni,ni...->no...", output.weight, style, expected)
    torch.testing.assert_close(got_y, colours + output.bias.view(-1, *(1,) * dims) + doubled(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["skip", "residual"])
def test_places_of_w_are_in_the_official_order(architecture: str) -> None:
    """conv, (output = up), conv, (output = up), conv, ..., output: an output layer shares w with the next `up`."""
    g = generator((1, 16, 16), output=architecture)
    seen: dict[str, float] = {}
    for name, layer in g.levels.named_modules():
        if isinstance(layer, EqualizedLinear):
            layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0][0, 0].item()}))
    g.synthesis(torch.arange(g.num_ws, dtype=F64).view(1, -1, 1).expand(1, -1, 5))
    expected = {"0.conv": 0, "1.up": 1, "1.conv": 2, "2.up": 3, "2.conv": 4, "2.output": 5}
    if architecture == "skip":
        expected |= {"0.output": 1, "1.output": 3}
    assert seen == {f"{k}.affine": v for k, v in expected.items()}
    assert g.num_ws == 6


SHAPES = [(1, 28, 28), (3, 8, 8), (2, 6, 5), (1, 9), (3, 20), (2, 5, 9, 8), (2,), (7,)]


@pytest.mark.parametrize("architecture", ["skip", "residual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_uses_every_parameter_and_keeps_examples_apart(shape: tuple[int, ...], architecture: str) -> None:
    g = generator(shape, CLASSES, output=architecture)
    z, c = normal(3, 4), torch.tensor([0, 2, 1])
    y = g(z, c)
    assert y.shape == (3, *shape)
    for p, gradient in zip(
        g.parameters(), torch.autograd.grad((y * normal(3, *shape, seed=1)).sum(), list(g.parameters())), strict=True
    ):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0, p.shape
    fresh = g.synthesis(g.mapping(z, c), Noise("v", n=3))
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(g(z[row], c[row]), y[row], rtol=0, atol=1e-12)
        one = g.synthesis(g.mapping(z[row], c[row]), Noise("v", n=1, start=i))
        torch.testing.assert_close(one, fresh[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 20), (2, 6, 9, 8), (5,)])
def test_single_precision_agrees_with_double(shape: tuple[int, ...]) -> None:
    """Other kernels and another memory format are used in single precision."""
    g, d = generator(shape), StyleGAN2Trunk(shape, width=4).double()
    ws = normal(4, g.num_ws, 5)
    exact = g.synthesis(ws)
    features = d.features(exact)
    y = g.float().synthesis(ws.float())
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (d.float().features(exact.float()) - features).abs().max() < 1e-5 * features.abs().max()


def test_noise_counts_by_its_strength_and_is_fixed_or_fresh() -> None:
    g, z = generator(), normal(3, 4)
    fixed = g(z)
    assert torch.equal(fixed, g(z))
    fresh = g(z, noise=Noise("a", n=3))
    assert torch.equal(fresh, g(z, noise=Noise("a", n=3)))
    assert (fresh - fixed).abs().amax((1, 2, 3)).min() > 0.1
    for layer in g.modules():
        if isinstance(layer, StyledConvolution):
            layer.strength.data.zero_()
    assert torch.equal(g(z), g(z, noise=Noise("a", n=3)))
    assert not any("strength" in name or "image" in name for name, _ in generator((6,)).named_parameters())
    assert all(
        layer.strength is None for layer in generator(noise=False).modules() if isinstance(layer, StyledConvolution)
    )
    new = StyleGAN2Generator((1, 8, 8), 4, None, w_dim=4, width=2, mapping_depth=1)
    assert all(p.item() == 0 for name, p in new.named_parameters() if name.endswith("strength"))


def test_styles_are_mixed_from_a_place_on() -> None:
    g = generator()
    ws, others = g.mapping(normal(4, 4)), g.mapping(normal(4, 4, seed=1))
    first = torch.tensor([0, 1, 3, g.num_ws])
    mixed = mix_styles(ws, others, first)
    for i, place in enumerate(first.tolist()):
        assert torch.equal(mixed[i, :place], ws[i, :place])
        assert torch.equal(mixed[i, place:], others[i, place:])
    ends = torch.stack([g.synthesis(others)[0], g.synthesis(ws)[3]])
    torch.testing.assert_close(g.synthesis(mixed)[[0, 3]], ends, rtol=0, atol=1e-12)


def test_mean_of_w_is_tracked_per_class_and_is_where_truncation_leads() -> None:
    g = generator(condition=CLASSES)
    z, c = normal(6, 4), torch.tensor([0, 0, 2, 2, 2, 0])
    w = g.mapping(z, c)[:, 0].detach()
    g.track(g.mapping(z, c), c)
    torch.testing.assert_close(g.w_avg[0], w[c == 0].mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(g.w_avg[2], w[c == 2].mean(0), rtol=0, atol=1e-14)
    assert torch.equal(g.w_avg[1], torch.zeros(5, dtype=F64))
    centre = g.synthesis(g.w_avg[c].unsqueeze(1).expand(-1, g.num_ws, -1))
    torch.testing.assert_close(g(z, c, truncation=0.0), centre, rtol=0, atol=1e-12)
    assert (centre[0] - centre[2]).abs().max() > 0.01
    half = 0.5 * (g.mapping(z, c) + g.w_avg[c].unsqueeze(1))
    torch.testing.assert_close(g(z, c, truncation=0.5), g.synthesis(half), rtol=0, atol=1e-12)
    assert torch.equal(g(z, c, truncation=1.0), g(z, c))

    plain = generator()
    z = normal(2, 8, 4, seed=1)
    for i in range(2):
        plain.track(plain.mapping(z[i]), None)
    expected = plain.mapping(z.flatten(0, 1))[:, 0].mean(0)
    torch.testing.assert_close(plain.w_avg[0], expected, rtol=0, atol=1e-14)
    # Constant batches from here on: a plain mean up to 500 batches, a moving one with decay 0.998 after.
    constant = torch.ones(4, plain.num_ws, 5, dtype=F64)
    for _ in range(798):
        plain.track(constant, None)
    left = 2 / 500 * 0.998**300
    torch.testing.assert_close(plain.w_avg[0], 1 + left * (expected - 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "size"), [(8, 4), (6, 3), (9, 3), (2, 2), (5, 1), (1, 1), (10, 2)])
@pytest.mark.parametrize("space", [(), (3,), (2, 3)])
def test_minibatch_std_is_its_definition(n: int, size: int, space: tuple[int, ...]) -> None:
    x = normal(n, 4, *space)
    y = with_minibatch_std(x)
    assert torch.equal(y[:, :4], x)
    groups = n // size
    for i in range(n):
        members = x[[j for j in range(n) if j % groups == i % groups]]
        assert len(members) == size
        std = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[i, 4], std.expand(space), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_a_block_of_the_trunk_is_the_formula(dims: int) -> None:
    block, x = TrunkBlock(dims, 3, 4).double(), normal(2, 3, *(8, 6, 4)[:dims])
    randomize(block)
    phi = lambda t: math.sqrt(2) * torch.where(t > 0, t, 0.2 * t)  # noqa: E731
    fan, pad = math.sqrt(3 * 3**dims), ({"padding": 1} if dims else {})
    h = phi(CONV[dims](x, block.conv1.weight / fan, block.conv1.bias, **pad))
    if dims:
        h = every_second(CONV[dims](filtered(pad_all(h, 2, 2), BLUR), block.conv2.weight / fan, block.conv2.bias))
        skip = every_second(filtered(pad_all(x, 1, 1), BLUR))
    else:
        h, skip = F.linear(h, block.conv2.weight / fan, block.conv2.bias), x
    expected = (phi(h) + CONV[dims](skip, block.skip.weight / math.sqrt(3))) / math.sqrt(2)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 16)])
def test_trunk_mixes_examples_only_by_the_spread_of_the_batch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = normal(4, *shape)
    apart = StyleGAN2Trunk(shape, width=3, minibatch_std=False).double()
    together = StyleGAN2Trunk(shape, width=3).double()
    assert (apart.mixes, together.mixes) == (False, True)
    features = apart.features(x)
    assert features.shape == (4, apart.feature_dim)
    for i in range(4):
        torch.testing.assert_close(apart.features(x[i : i + 1]), features[i : i + 1], rtol=0, atol=1e-12)
    assert (together.features(x)[:1] - together.features(x[:1])).abs().max() > 1e-3
    gradients = torch.autograd.grad(together.features(x).square().sum(), list(together.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_path_lengths_of_a_linear_synthesis() -> None:
    """y = sum_l A_l w_l: |A^T y~| in closed form, and its gradient."""
    a = normal(3, 5, 2 * 4 * 4).requires_grad_()  # (num_ws, w_dim, outputs)
    ws = normal(6, 3, 5, seed=1).requires_grad_()
    y = torch.einsum("nlw,lwo->no", ws, a).view(6, 2, 4, 4)
    lengths = path_lengths(ws, y, Noise("y", n=6))
    direction = Noise("y", n=6).normal(2, 4, 4, dtype=F64).flatten(1) / 4.0
    pulled = torch.einsum("lwo,no->nlw", a, direction)
    expected = pulled.square().sum(2).mean(1).sqrt()
    torch.testing.assert_close(lengths, expected, rtol=1e-12, atol=0)
    for loss in (lambda t: t.sum(), lambda t: (t - 0.3).square().mean()):
        got, wanted = (torch.autograd.grad(loss(t), a, retain_graph=True)[0] for t in (lengths, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    # E |A^T y~|^2 = |A|^2 / (num_ws places). A sum of 20000 terms; 5 standard errors: false alarm 6e-7.
    ws = torch.zeros(20000, 3, 5, dtype=F64, requires_grad=True)
    y = torch.einsum("nlw,lwo->no", ws, a.detach()).view(-1, 2, 4, 4)
    squares = path_lengths(ws, y, Noise("many", n=20000)).square()
    mean = a.detach().square().sum() / (3 * 16)
    assert (squares.mean() - mean).abs() < 5 * squares.std() / math.sqrt(20000)


def test_path_penalty_is_the_distance_from_its_running_mean() -> None:
    path, ws = PathLength().double(), normal(4, 1, 6).requires_grad_()
    direction = Noise("y", n=4).normal(6, dtype=F64)
    length = direction.norm(dim=1)
    scales = (1.0 / length).unsqueeze(1)
    a = 0.0
    for _ in range(5):
        penalty = path(ws, 3.0 * scales * ws[:, 0], Noise("y", n=4))  # all lengths are 3
        a += 0.01 * (3.0 - a)
        torch.testing.assert_close(path.mean.item(), a, rtol=1e-12, atol=0)
        torch.testing.assert_close(penalty.item(), (3.0 - a) ** 2, rtol=1e-12, atol=0)
    assert "mean" in path.state_dict()


@pytest.mark.parametrize(("shape", "architecture"), [((2, 9, 8), "skip"), ((2, 8, 8), "residual"), ((3,), "skip")])
def test_path_lengths_of_a_network_are_those_of_its_jacobian(shape: tuple[int, ...], architecture: str) -> None:
    g = generator(shape, output=architecture, width=2)
    ws = normal(2, g.num_ws, 5).requires_grad_()

    def lengths() -> Tensor:
        return path_lengths(ws, g.synthesis(ws), Noise("y", n=2))

    direction = Noise("y", n=2).normal(*shape, dtype=F64) / math.sqrt(math.prod(shape[1:]))
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: g.synthesis(v[None])[0], ws[i].detach())
        pulled = torch.tensordot(direction[i], jacobian, dims=len(shape))
        torch.testing.assert_close(lengths()[i], pulled.square().sum(1).mean().sqrt(), rtol=1e-11, atol=0)
    # The second derivative, along a random line through the parameters, against a central difference.
    parameters = list(g.levels.parameters())
    steps = [1e-6 * normal(*p.shape, seed=100 + i) for i, p in enumerate(parameters)]
    gradients = torch.autograd.grad(lengths().sum(), parameters, allow_unused=True)  # last biases have none
    slope = sum((d * s).sum() for d, s in zip(gradients, steps, strict=True) if d is not None)
    values = []
    for sign in (1, -2):
        for p, s in zip(parameters, steps, strict=True):
            p.data += sign * s
        values.append(lengths().sum().detach())
    torch.testing.assert_close((values[0] - values[1]) / 2, slope, rtol=1e-6, atol=1e-12)
