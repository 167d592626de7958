"""Resampling filters against their plain definition in numpy, in every form of the computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trilemma.core.noise import make_generator
from trilemma.nets import resample
from trilemma.nets.resample import BINOMIAL, canvas, channels_last, crop, taps_of, upfirdn

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator("resample", seed), dtype=F64)


def by_definition(x: np.ndarray, taps: np.ndarray, up: int, down: int, padding: tuple[int, int]) -> np.ndarray:
    """Zeros behind each sample, padding or cropping, convolution, every down-th sample; axis after axis."""

    def line(values: np.ndarray) -> np.ndarray:
        spread = np.zeros(up * len(values))
        spread[::up] = values
        before, after = padding
        spread = np.pad(spread, (max(before, 0), max(after, 0)))
        spread = spread[max(-before, 0) : len(spread) - max(-after, 0)]
        return np.convolve(spread, taps, "valid")[::down]

    for axis in range(2, x.ndim):
        x = np.apply_along_axis(line, axis, x)
    return x


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("space", [(11,), (9, 12), (6, 7, 5)])
@pytest.mark.parametrize(
    ("taps", "up", "down", "padding"),
    [
        (4, 1, 1, (1, 1)),
        (4, 1, 1, (2, 2)),
        (4, 1, 2, (1, 1)),
        (4, 2, 1, (2, 1)),
        (3, 1, 1, (2, 0)),
        (3, 1, 2, (0, 3)),
        (5, 1, 1, (-1, 2)),
        (2, 1, 1, (-1, -2)),
        (6, 2, 1, (3, 2)),
        (6, 2, 1, (7, 9)),
        (4, 2, 1, (-2, 1)),
        (1, 3, 1, (0, 0)),
        (2, 4, 1, (1, 5)),
        (5, 2, 3, (4, 1)),
        (7, 3, 2, (2, 6)),
    ],
)
def test_equals_the_definition_and_its_gradient_is_the_adjoint(monkeypatch, joint, space, taps, up, down, padding):
    monkeypatch.setattr(resample, "JOINT", 10**6 if joint else 0)
    x, h = normal(2, 3, *space), normal(taps, seed=1)  # not symmetric: the order of taps counts
    x.requires_grad_()
    y = upfirdn(x, h, up=up, down=down, padding=padding)
    expected = by_definition(x.detach().numpy(), h.numpy(), up, down, padding)
    torch.testing.assert_close(y.detach(), torch.from_numpy(expected), rtol=0, atol=1e-12)
    direction, other = normal(*y.shape, seed=2), normal(*x.shape, seed=3)
    (adjoint,) = torch.autograd.grad((y * direction).sum(), x)
    forward = (upfirdn(other, h, up=up, down=down, padding=padding) * direction).sum()
    torch.testing.assert_close((adjoint * other).sum(), forward, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("space", [(16,), (10, 8), (6, 4, 8)])
@pytest.mark.parametrize(("up", "down", "padding"), [(1, 1, (1, 1)), (2, 1, (2, 1)), (1, 2, (1, 1))])
def test_single_precision_in_either_memory_format_is_the_same(space, up, down, padding):
    x, h = normal(3, 5, *space), taps_of(BINOMIAL)
    exact = upfirdn(x, h, up=up, down=down, padding=padding)
    for form in (x.float(), channels_last(x.float())):
        y = upfirdn(form, h, up=up, down=down, padding=padding)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6)


def test_the_binomial_filter_keeps_constants_and_linear_ramps_and_removes_the_mirror_image():
    h = taps_of(BINOMIAL).double()
    ramp = torch.arange(12, dtype=F64).view(1, 1, 12)
    inside = slice(3, -3)
    up = upfirdn(ramp, 2 * h, up=2, padding=(2, 1))
    torch.testing.assert_close(up[0, 0, inside], (torch.arange(24, dtype=F64) / 2 - 0.25)[inside], rtol=0, atol=1e-13)
    down = upfirdn(ramp, h, down=2, padding=(1, 1))
    torch.testing.assert_close(down[0, 0, 1:-1], torch.arange(6, dtype=F64)[1:-1] * 2 + 0.5, rtol=0, atol=1e-13)
    alternating = torch.tensor([1.0, -1.0], dtype=F64).repeat(6).view(1, 1, 12)
    assert upfirdn(alternating, h, down=2, padding=(1, 1))[0, 0, 1:-1].abs().max() < 1e-15


def test_vectors_stay_as_they_are():
    x = normal(4, 3)
    assert upfirdn(x, taps_of(BINOMIAL), up=2, padding=(2, 1)) is x
    assert channels_last(x) is x


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ((32, 32), ((4, 4), 3, (32, 32))),
        ((28, 28), ((7, 7), 2, (28, 28))),
        ((6, 5), ((6, 5), 0, (6, 5))),
        ((9,), ((5,), 1, (10,))),
        ((16, 3, 8), ((4, 1, 2), 2, (16, 4, 8))),
    ],
)
def test_canvas_is_the_smallest_doubled_grid_that_holds_the_data(space, expected):
    assert canvas(space) == expected


def test_crop_takes_the_centre_and_pads_back_with_zeros():
    x = torch.arange(1.0, 11.0).view(1, 1, 10)
    assert crop(x, (7,)).flatten().tolist() == [2, 3, 4, 5, 6, 7, 8]
    y = normal(2, 3, 5, 6)
    wide = crop(y, (8, 7))
    assert torch.equal(wide[:, :, 1:6, 0:6], y)
    assert wide.count_nonzero() == y.numel()
    assert torch.equal(crop(wide, (5, 6)), y)
