"""StyleGAN3: filters, features and layers against closed forms; equivariance in decibels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor, nn
from torch.nn import functional as F

from trilemma.adversarial.equivariance import eq_r, eq_t, rotation, translation
from trilemma.adversarial.style import GAIN, SLOPE, modulated_convolution
from trilemma.adversarial.stylegan3 import (
    FilteredActivation,
    FourierInput,
    ModulatedLayer,
    Stage,
    StyleGAN3Generator,
    default_layers,
    lowpass,
    schedule,
)
from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise
from trilemma.nets.resample import crop


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def built(shape: tuple[int, ...], *, width: int = 8, **settings: object) -> StyleGAN3Generator:
    """A generator away from its initial point, so that all weights count."""
    generator = StyleGAN3Generator(shape, 8, None, w_dim=8, width=width, **settings)  # type: ignore[arg-type]
    for p in generator.parameters():
        p.data += 0.1 * torch.randn_like(p)
    generator.train()(torch.randn(4, 8))  # measures the magnitudes
    return generator.eval()


# --- filters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taps", "cutoff", "half_width"), [(24, 4.0, 3.0), (12, 8.0, 7.0), (48, 2.0, 1.0)])
def test_kaiser_filter_meets_its_design(taps: int, cutoff: float, half_width: float):
    rate = 32.0
    h = lowpass(taps, cutoff, half_width, rate, 1).numpy()
    assert h.sum() == pytest.approx(1.0, abs=1e-14)
    np.testing.assert_allclose(h, h[::-1], atol=1e-16)
    f, response = signal.freqz(h, worN=4096, fs=rate)
    # Kaiser's formula estimates the attenuation within 4 dB; a sum of 1 can double the deviation in the passband.
    ripple = 10 ** (-(signal.kaiser_atten(taps, 4 * half_width / rate) - 4.0) / 20)
    assert ripple < 0.05
    gain = np.abs(response)
    assert np.abs(gain[f <= cutoff - half_width] - 1).max(initial=0) < 2 * ripple
    assert gain[f >= cutoff + half_width].max() < ripple
    assert gain[np.abs(f - cutoff).argmin()] == pytest.approx(0.5, abs=0.02)
    close(lowpass(taps, cutoff, half_width, rate, 2), torch.outer(*[torch.from_numpy(h)] * 2), 1e-16)


def test_radial_filter_is_the_same_in_all_directions():
    taps, cutoff, half_width, rate = 24, 5.0, 3.0, 32.0
    kernels = [lowpass(taps, cutoff, half_width, rate, 2, radial=radial) for radial in (True, False)]
    place = (torch.arange(taps) - (taps - 1) / 2) / rate
    gains = []
    for f in (1.0, 2.0, 5.0, 8.5, 12.0):
        angle = torch.linspace(0, math.pi / 2, 9)
        waves = [torch.cos(2 * math.pi * f * place[:, None] * axis) for axis in (angle.cos(), angle.sin())]
        gains.append([torch.einsum("yx,ya,xa->a", k, *waves) for k in kernels])
    for k in kernels:
        close(k.sum(), torch.tensor(1.0))
    radial, separable = (torch.stack(g) for g in zip(*gains, strict=True))
    assert (radial.amax(1) - radial.amin(1)).max() < 0.03
    assert (separable.amax(1) - separable.amin(1)).max() > 0.25  # a square passes more along its diagonals
    close(radial.mean(1)[[0, 1, 3, 4]], torch.tensor([1.0, 1.0, 0.0, 0.0]), 0.02)
    close(radial.mean(1)[2], torch.tensor(0.5), 0.1)


def wave(stage: Stage, frequencies: tuple[float, ...]) -> Tensor:
    """sin(2 pi f x + 0.3) along each axis, multiplied."""
    places = [(torch.arange(n) - (n - 1) / 2) / stage.rate for n in stage.size]
    axes = [torch.sin(2 * math.pi * f * x + 0.3) for f, x in zip(frequencies, places, strict=True)]
    return math.prod(torch.meshgrid(axes, indexing="ij"), start=torch.ones(()))[None, None]


@pytest.mark.parametrize(("dims", "rate"), [(1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (2, 32), (3, 16)])
def test_linear_filtered_layer_returns_a_band_limited_signal(dims: int, rate: int):
    sizes = (80, 77) if dims < 3 else (40, 37, 39)
    source = Stage(4.0, 3.0, 16.0, sizes[:dims], 1)
    cutoff = rate / 4
    target = Stage(cutoff, 0.75 * cutoff, float(rate), tuple(n * rate // 16 - 14 for n in source.size), 1)
    layer = FilteredActivation(source, target, radial=False, slope=1.0, filter_size=12)
    frequencies = (0.45, 0.3, 0.4)[:dims]
    result, expected = layer(wave(source, frequencies)), wave(target, frequencies)
    assert result.shape == expected.shape
    edge = 8 * max(1, rate // 16)
    inside = (..., *[slice(edge, -edge)] * dims)
    close(result[inside], expected[inside], 2e-3)  # the filters' ripples, 70 dB down
    assert expected[inside].abs().max() > 0.4


def test_filtered_leaky_relu_of_a_wave_is_its_fourier_series():
    """leaky(sin) = (1 + a) / 2 sin + (1 - a) / 2 |sin|, |sin t| = 2/pi - 4/pi sum_k cos(2 k t) / (4 k^2 - 1)."""
    stage = Stage(7.0, 0.9, 32.0, (32 * 10,), 1)
    layer = FilteredActivation(stage, stage, radial=False, filter_size=96)
    t = 2 * math.pi * (torch.arange(320) - 159.5) / 32
    series = 2 / math.pi - 4 / math.pi * sum(torch.cos(2 * k * t) / (4 * k * k - 1) for k in (1, 2, 3))
    expected = 0.5 * (1 + SLOPE) * torch.sin(t) + 0.5 * (1 - SLOPE) * series
    result = layer(torch.sin(t)[None, None])[0, 0]
    # Harmonic 58 and higher ones fold into the band at 64 samples per period: 0.4 * 4 / pi / 58^2 = 1.5e-4.
    close(result[110:-110], expected[110:-110], 1e-3)
    aliased = F.leaky_relu(torch.sin(t), SLOPE)
    assert (aliased - expected)[110:-110].abs().max() > 0.005


# --- input -------------------------------------------------------------------------------------------------------


def test_features_are_waves_of_the_transformed_coordinates():
    stage = schedule((12, 20), width=6, layers=6, margin=4)[0]
    source = FourierInput(stage, 5)
    assert source.frequencies.norm(dim=1).max() <= stage.cutoff
    angle, shift = torch.tensor([0.7, -2.0]), torch.tensor([[0.13, -0.4], [0.0, 0.31]])
    transform = rotation(angle) @ translation(shift)
    x = source.grid.T - shift[:, None]  # (2, P, d): shifted, then turned back
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x = torch.stack([cos * x[..., 0] + sin * x[..., 1], cos * x[..., 1] - sin * x[..., 0]], 2)
    expected = torch.sin(2 * math.pi * (x @ source.frequencies.T + source.phases)).mT
    close(source.features(transform).flatten(2), expected)


def test_translation_by_a_sample_shifts_the_features_by_it():
    stage = schedule((8, 8), width=6, layers=4, margin=3)[0]
    source, w = FourierInput(stage, 5), torch.randn(2, 5)
    source.affine.weight.data.normal_()
    shift = torch.tensor([[1.0, -2.0]]) / stage.rate
    moved, still = source(w, translation(shift)), source(w)
    close(moved[..., 1:, :-2], still[..., :-1, 2:])


def test_frequencies_above_the_band_fade_out():
    stage = schedule((32, 32), width=64, layers=8, margin=4)[0]
    source = FourierInput(stage, 5)
    transform = torch.diag(torch.tensor([2.5, 2.5, 1.0]))[None]
    length = 2.5 * source.frequencies.norm(dim=1)
    amplitude = ((8.0 - length) / (8.0 - 2.0)).clamp(0, 1)  # half the rate is 8, the band ends at 2
    assert stage.rate == 16.0
    assert (amplitude < 1).any()
    assert (amplitude == 1).any()
    waves = torch.sin(2 * math.pi * (2.5 * source.frequencies @ source.grid + source.phases[:, None]))
    close(source.features(transform)[0].flatten(1), amplitude[:, None] * waves)


def test_the_input_turns_and_moves_with_w():
    source = FourierInput(schedule((8, 8), width=6, layers=4, margin=3)[0], 3)
    w = torch.randn(2, 3)
    close(source.transform(w), torch.eye(3).expand(2, -1, -1))
    source.affine.bias.data = 2.5 * torch.tensor([math.cos(0.4), math.sin(0.4), 0.1, -0.2])
    expected = rotation(torch.tensor([-0.4])) @ translation(torch.tensor([[0.1, -0.2]]))
    close(source.transform(w), expected.expand(2, -1, -1))


# --- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [0, 2])
def test_layer_is_its_unfused_definition(dims: int):
    layer = ModulatedLayer(dims, 3, 4, 5, 3, nn.LeakyReLU(SLOPE)).eval()
    layer.bias.data.normal_()
    layer.magnitude.fill_(2.7)
    x, w = torch.randn(2, 3, *[7] * dims), torch.randn(2, 5)
    y = modulated_convolution(x, layer.weight, layer.affine(w), padding=1) / math.sqrt(2.7)
    y = y + layer.bias.view(-1, *[1] * dims)
    close(layer(x, w), GAIN * F.leaky_relu(y, SLOPE))


def test_magnitude_is_averaged_in_training_under_grad_only():
    layer = ModulatedLayer(2, 3, 4, 5, 3, nn.Identity())
    w = torch.randn(2, 5)
    x = [s * torch.randn(2, 3, 6, 6) for s in (2.0, 0.5, 3.0)]
    with torch.no_grad():
        layer.train()(x[0], w)
    layer.eval()(x[0], w)
    close(layer.magnitude, torch.tensor(1.0))
    layer.train()(x[0], w)
    close(layer.magnitude, x[0].square().mean())
    layer(x[1], w)
    close(layer.magnitude, 0.5 * (x[0].square().mean() + x[1].square().mean()))
    layer.averaged.fill_(1e9)
    before = layer.magnitude.clone()
    layer(x[2], w)
    close(layer.magnitude, torch.lerp(x[2].square().mean(), before, 0.5 ** (2 / 20_000)))


def test_the_first_outputs_have_the_size_of_the_data_whatever_the_input():
    torch.set_default_dtype(torch.float32)
    generator = StyleGAN3Generator((3, 16, 16), 8, None, w_dim=8, width=16).train()
    z = torch.randn(16, 8)
    small = generator(z)
    generator.input.weight.data *= 100.0
    for layer in generator.layers:
        layer.averaged.zero_()
    close(generator(z), small, 1e-4)
    assert 0.1 < small.std() < 1.4  # 1/4 for independent channels and styles of 1


def test_schedule_is_the_paper_s_at_256_pixels():
    stages = schedule((256, 256), width=128, layers=14, margin=10)
    assert default_layers((256, 256)) == 14
    assert [default_layers((n, n)) for n in (6, 8, 28, 32, 1024)] == [4, 4, 8, 8, 14]
    assert [s.rate for s in stages] == [16, 16, 16, 32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 256]
    assert [s.size[0] for s in stages[-5:]] == [148, 276, 276, 276, 256]
    assert [s.channels for s in stages] == [512] * 9 + [362, 256, 181, 128, 128]
    assert stages[0].cutoff == 2.0
    assert stages[-1].cutoff == 128.0
    assert stages[6].cutoff == pytest.approx(16.0)


# --- the generator -----------------------------------------------------------------------------------------------


def output_range(generator: StyleGAN3Generator, ws: Tensor) -> float:
    with torch.no_grad():
        y = generator.synthesis(ws)
    return float(y.max() - y.min())


class Pointwise(nn.Module):
    """The nonlinearity at the sampling rate of its result, as in StyleGAN2: only a change of rate has a filter."""

    def __init__(self, filtered: FilteredActivation) -> None:
        super().__init__()
        self.filtered, filtered.slope = filtered, 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.filtered(x)
        if self.filtered.up_factor == self.filtered.down_factor:
            y = crop(x, tuple(y.shape[2:]))
        return F.leaky_relu(y, SLOPE)


def pointwise(generator: StyleGAN3Generator) -> StyleGAN3Generator:
    """The same weights without filters about the nonlinearity."""
    for layer in generator.layers[:-1]:
        layer.activation = Pointwise(layer.activation)
    return generator


def figures(generator: StyleGAN3Generator) -> list[float]:
    """EQ-T by whole samples and by fractions, and EQ-R, relative to the range of the output."""
    generator = generator.float()
    ws = generator.mapping(torch.randn(2, 8)).detach().float()
    scale, space = output_range(generator, ws), generator.shape[1:]
    shifts = torch.tensor([[1.0, -2.0, 1.0][: len(space)]]), torch.tensor([[0.5, 1.3, 0.25][: len(space)]])
    result = [float(eq_t(generator, ws, s, value_range=scale)) for s in shifts]
    if len(space) == 2 and min(space) >= 16:
        result.append(float(eq_r(generator, ws, torch.tensor([0.3, 2.0]), value_range=scale)))
    return result


def test_equivariance_to_translation():
    """Measured: 84 dB by whole samples and 68 by fractions; 57 and 47 without filters about the nonlinearity."""
    torch.set_default_dtype(torch.float32)
    generator = built((3, 32, 32))
    torch.manual_seed(0)
    whole, fraction, turned = figures(generator)
    assert whole > 70
    assert fraction > 58
    assert turned < 35  # 3x3 kernels know directions
    torch.manual_seed(0)
    whole, fraction, _ = figures(pointwise(generator))
    assert whole < 65
    assert fraction < 53


def test_equivariance_to_rotation():
    """Measured: 80 dB for rotations, 61 without filters about the nonlinearity, 24 with 3x3 kernels (above)."""
    torch.set_default_dtype(torch.float32)
    generator = built((3, 32, 32), rotation=True)
    torch.manual_seed(0)
    whole, fraction, turned = figures(generator)
    assert whole > 80
    assert fraction > 62
    assert turned > 65
    torch.manual_seed(0)
    assert figures(pointwise(generator))[2] < 63


@pytest.mark.parametrize(
    ("shape", "whole", "fraction"),
    [((1, 28, 28), 70, 55), ((2, 12, 20), 70, 50), ((1, 8, 8), 35, 30), ((2, 64), 50, 50), ((1, 10, 10, 8), 50, 30)],
)
def test_equivariance_at_any_size(shape: tuple[int, ...], whole: float, fraction: float):
    torch.set_default_dtype(torch.float32)
    generator = built(shape)
    torch.manual_seed(0)
    measured = figures(generator)
    assert measured[0] > whole and measured[1] > fraction, measured  # noqa: PT018


class Analytic(StyleGAN3Generator):
    """cos(2 pi (3 x_0 + 2 x_1)) of the transformed coordinates, or of others."""

    def __init__(self, moves: bool) -> None:
        nn.Module.__init__(self)
        self.shape, self.moves = (1, 24, 24), moves

    def synthesis(self, ws: Tensor, noise: Noise | None = None, transform: Tensor | None = None) -> Tensor:
        x = (torch.arange(24) - 11.5) / 24
        grid = torch.cartesian_prod(x, x)
        if transform is not None and self.moves:
            grid = grid @ transform[0, :2, :2].T + transform[0, :2, 2]
        return torch.cos(2 * math.pi * (grid @ torch.tensor([3.0, 2.0]))).view(1, 1, 24, 24)


def test_figures_of_known_functions():
    ws, shift, angle = torch.zeros(1, 1, 1), torch.tensor([[2.0, -3.0]]), torch.tensor([0.3, 1.2])
    moving, still = Analytic(True), Analytic(False)
    assert eq_t(moving, ws, shift) > 250
    assert eq_t(moving, ws, shift + 0.4, lobes=5) > 50  # what Lanczos' kernel allows
    assert eq_r(moving, ws, angle) > 45
    assert eq_t(still, ws, shift + 0.4) < 20
    assert eq_r(still, ws, angle) < 20
    # Nothing moves: the difference of two waves with the phase d between them has the mean square 1 - cos d.
    # A shift by 12 samples along axis 0 turns the phase by 3 half periods: y - t y = 2 y.
    y = still.synthesis(ws)[:, :, 12:]
    expected = 10 * torch.log10(1.5**2 / (2 * y).square().mean())
    close(eq_t(still, ws, torch.tensor([[12.0, 0.0]]), value_range=1.5), expected, 1e-9)
    with pytest.raises(UsageError, match="smaller shifts"):
        eq_t(still, ws, torch.tensor([[30.5, 0.0]]))


def test_gradients_are_those_of_finite_differences():
    generator = built((1, 6, 5), width=2, layers=3, margin=2)
    ws = torch.randn(1, generator.num_ws, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(generator.synthesis(ws).square().sum(), ws)
    assert (slope.norm(dim=2) > 0).all()  # each layer takes in its own w
    transform = translation(torch.tensor([[0.1, 0.2]])).requires_grad_()
    assert torch.autograd.gradcheck(lambda ws, t: generator.synthesis(ws, transform=t), (ws, transform))
    y = generator(torch.randn(3, 8))
    (slope,) = torch.autograd.grad(y.square().sum(), generator.layers[0].weight, create_graph=True)
    slope.square().sum().backward()  # penalties of gradients need second ones
    grads = [p.grad for name, p in generator.named_parameters() if "mapper" not in name]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_examples_are_independent_and_repeat():
    generator = built((1, 6, 5), rotation=True)
    z = torch.randn(3, 8)
    y = generator(z)
    assert y.shape == (3, 1, 6, 5)
    assert torch.equal(generator(z, noise=Noise(0, n=3)), y)  # there is no noise
    close(generator(z[1:2])[0], y[1], 1e-12)
    turned = rotation(torch.tensor([0.1, 0.2, 0.3]))
    one = generator.synthesis(generator.mapping(z[1:2]), transform=turned[1:2])[0]
    close(generator.synthesis(generator.mapping(z), transform=turned)[1], one, 1e-12)
    close(generator.synthesis(generator.mapping(z), transform=torch.eye(3)[None]), y, 1e-12)


def test_saved_weights_bring_their_frequencies():
    first, second = built((1, 8, 8)), built((1, 8, 8))
    z = torch.randn(2, 8)
    assert not torch.equal(first(z), second(z))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(z), second(z))


def test_vectors_are_modulated_linear_layers():
    generator = built((3,), width=4)
    z = torch.randn(5, 8)
    ws = generator.mapping(z)
    h = generator.input.constant.expand(5, -1)
    for layer, w in zip(generator.layers, ws[:, 1:].unbind(1), strict=True):
        last = layer is generator.layers[-1]
        y = modulated_convolution(h, layer.weight, layer.affine(w), demodulate=not last) * layer.magnitude.rsqrt()
        h = 0.25 / 2 * y + layer.bias if last else GAIN * F.leaky_relu(y + layer.bias, SLOPE)
    close(generator(z), h)


def test_wrong_requests_say_why():
    with pytest.raises(UsageError, match="no coordinates"):
        built((3,)).synthesis(torch.zeros(1, 6, 8), transform=torch.eye(3)[None])
    with pytest.raises(UsageError, match="rotation=True is for pictures"):
        built((1, 32), rotation=True)
    with pytest.raises(UsageError, match="at least 3 layers"):
        built((1, 8, 8), layers=2)
    with pytest.raises(UsageError, match="EQ-R"):
        eq_r(built((1, 16)), torch.zeros(1, 6, 8), torch.tensor([0.1]))
