"""The pipe of augmentations against closed forms, the test of symmetry and the controller of its strength.

Seeds are fixed. Frequencies are tested at 5 standard deviations of the binomial: a new seed fails one with probability
6e-7.
"""

import itertools
import math

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch.autograd import gradcheck, gradgradcheck

from trilemma.adversarial import augment
from trilemma.adversarial.augment import Augmentation, Controller, Draws, choose, possible, ramp
from trilemma.adversarial.symmetry import ALARM, is_symmetric, mirror, quarter_turn
from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise, make_generator
from trilemma.core.spec import DataSpec

SHAPES = [(5,), (2, 24), (1, 12, 20), (3, 16, 16), (2, 8, 9, 10)]
AXIS = torch.ones(3, dtype=torch.float64) / math.sqrt(3.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator("augment test", seed), dtype=torch.float64)


def noise(n: int, *key: int) -> Noise:
    return Noise("augment test", *key, n=n)


def draws(pipe: Augmentation, p: float, n: int, *key: int) -> Draws:
    """What the pipe draws from `noise(n, *key)`."""
    return Draws(pipe.names, p, noise(n, *key), torch.float64)


def assert_frequency(events: torch.Tensor, p: float) -> None:
    n = len(events)
    assert abs(events.double().mean().item() - p) < 5.0 * math.sqrt(p * (1.0 - p) / n)


# -- identity, independence, probabilities -------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_coin_an_example_comes_back_bit_for_bit(shape):
    y, pipe = normal(200, *shape), Augmentation(shape, possible(shape))
    assert torch.equal(pipe(y, 0.0, noise(200)), y)
    assert torch.equal(pipe(y, torch.tensor(0.0), noise(200)), y)
    coins = torch.stack(list(draws(pipe, 0.1, 200).coin.values())).any(0)
    out = pipe(y, torch.tensor(0.1), noise(200))
    assert 20 < coins.sum() < 200
    assert torch.equal(out[~coins], y[~coins])
    assert (out[coins] != y[coins]).flatten(1).any(1).double().mean() > 0.5  # a flip may fall on the identity


@pytest.mark.parametrize("shape", SHAPES)
def test_an_example_does_not_depend_on_its_batch(shape):
    y, pipe = normal(40, *shape), Augmentation(shape, possible(shape))
    whole = pipe(y, 0.7, Noise("k", n=40))
    part = pipe(y[13:30], 0.7, Noise("k", n=17, start=13))
    torch.testing.assert_close(part, whole[13:30], rtol=1e-12, atol=1e-12)
    other = y.clone()
    other[0] = 0.0
    torch.testing.assert_close(pipe(other, 0.7, Noise("k", n=40))[1:], whole[1:], rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_single():
    y = normal(8, 3, 16, 16)
    pipe = Augmentation((3, 16, 16), possible((3, 16, 16)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pipe(y.bfloat16(), 0.8, noise(8))
    assert torch.equal(low, pipe(y.bfloat16().float(), 0.8, noise(8)))


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_each_coin_has_its_own_probability(p):
    pipe = Augmentation((3, 16, 16), possible((3, 16, 16)))
    d = draws(pipe, p, 20_000)
    for name, coin in d.coin.items():
        assert_frequency(coin, 1.0 - math.sqrt(1.0 - p) if name.startswith("rotate") else p)
    assert_frequency(d.fell(("rotate", "rotate again")), p)
    for a, b in itertools.combinations(d.coin.values(), 2):
        assert_frequency(a & b, (a.double().mean() * b.double().mean()).item())


# -- blits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 4, 5, 6)])
def test_flips_are_exact_and_have_half_the_probability(shape):
    y = normal(1, *shape).expand(20_000, *shape)
    out = Augmentation(shape, ["flip"])(y, 0.6, noise(20_000))
    flipped = (out == y.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(out == y).flatten(1).all(1))
    assert_frequency(flipped, 0.3)


def test_quarter_turns_are_exact_and_uniform():
    y = normal(1, 2, 5, 5).expand(20_000, 2, 5, 5)
    out = Augmentation((2, 5, 5), ["rot90"])(y, 0.6, noise(20_000))
    hits = [(out == y.rot90(k, (-2, -1))).flatten(1).all(1) for k in range(4)]
    assert torch.equal(torch.stack(hits).sum(0), torch.ones(20_000, dtype=torch.int64))
    for k in range(4):
        assert_frequency(hits[k], 0.4 * (k == 0) + 0.15)


@pytest.mark.parametrize("shape", [(1, 16), (1, 16, 8), (1, 8, 16, 8)])
def test_translations_are_exact_reflected_and_triangular(shape):
    y, n = normal(1, *shape), 5_000
    out = Augmentation(shape, ["translate"])(y.expand(n, *shape), 1.0, noise(n))
    reaches = [round(side / 8) for side in shape[1:]]
    seen = torch.zeros(n)
    for steps in itertools.product(*[range(-m, m + 1) for m in reaches]):
        expected = y
        for axis, (step, m) in enumerate(zip(steps, reaches, strict=True), start=2):
            expected = torch.cat([expected.narrow(axis, 0, m).flip(axis), expected,
                                  expected.narrow(axis, shape[axis - 1] - m, m).flip(axis)], axis)  # fmt: skip
            expected = expected.narrow(axis, m - step, shape[axis - 1])
        hit = (out == expected).flatten(1).all(1)
        seen += hit
        p = math.prod((m + 1 - abs(step)) / (m + 1) ** 2 for step, m in zip(steps, reaches, strict=True))
        assert_frequency(hit, p)
    assert (seen == 1).all()


def test_blits_compose_as_flip_then_turn_then_translation():
    pipe, n = Augmentation((1, 8, 8), ["translate", "rot90", "flip"]), 300
    y, d = normal(n, 1, 8, 8), draws(pipe, 0.7, n)
    out = pipe(y, 0.7, noise(n))
    for i in range(n):
        expected = y[i].flip(-1) if d.flipped("flip")[i] else y[i]
        if d.coin["rot90"][i]:
            expected = expected.rot90(int(4 * d.uniform["rot90"][i, 0]), (-2, -1))
        if d.coin["translate"][i]:
            u = (2 * d.uniform["translate"][i]).long()
            padded = torch.cat([expected[:, :1], expected, expected[:, -1:]], 1)
            padded = torch.cat([padded[..., :1], padded, padded[..., -1:]], 2)
            down, right = int(u[0] - u[1]), int(u[2] - u[3])
            expected = padded[:, 1 - down : 9 - down, 1 - right : 9 - right]
        assert torch.equal(out[i], expected)


# -- resampling ------------------------------------------------------------------------------------------------


def geometry(d: Draws, i: int, height: int, width: int) -> torch.Tensor:
    """Shift Rotate_2 Aspect Rotate_1 Scale, 3 x 3, in pixels from the centre."""

    def rotate(name: str) -> torch.Tensor:
        t = 2.0 * math.pi * d.uniform[name][i, 0].item()
        return torch.tensor([[math.cos(t), -math.sin(t), 0.0], [math.sin(t), math.cos(t), 0.0], [0.0, 0.0, 1.0]])

    matrix = torch.eye(3, dtype=torch.float64)
    for name in ("scale", "rotate", "aspect", "rotate again", "shift"):
        if not d.coin[name][i]:
            continue
        g = d.normal[name][i]
        factor = 2.0 ** (0.2 * g[0].item())
        step = torch.eye(3, dtype=torch.float64)
        if name == "scale":
            step = torch.diag(torch.tensor([factor, factor, 1.0], dtype=torch.float64))
        elif name == "aspect":
            step = torch.diag(torch.tensor([factor, 1.0 / factor, 1.0], dtype=torch.float64))
        elif name == "shift":
            step[:2, 2] = 0.125 * g * torch.tensor([width, height])
        else:
            step = rotate(name).double()
        matrix = step @ matrix
    return matrix


def test_one_resampling_equals_the_product_of_the_matrices():
    """A linear function is interpolated exactly, where its places of origin lie among the pixels."""
    n, height, width = 64, 20, 28
    pipe = Augmentation((1, height, width), ["scale", "rotate", "aspect", "shift"])
    v, h = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    points = torch.stack([h, v, torch.ones_like(h)], -1).double()
    slope = torch.tensor([0.7, -0.3, 0.1], dtype=torch.float64)
    out = pipe((points @ slope).expand(n, 1, height, width), 0.8, noise(n))
    d, compared = draws(pipe, 0.8, n), 0
    for i in range(n):
        origin = points @ geometry(d, i, height, width).inverse().T
        inside = (origin[..., 0].abs() < width / 2 - 0.5) & (origin[..., 1].abs() < height / 2 - 0.5)
        # angles were rounded to single precision above
        torch.testing.assert_close(out[i, 0][inside], (origin @ slope)[inside], rtol=0, atol=1e-5)
        compared += int(inside.sum())
    assert compared > 0.5 * n * height * width


def test_resampling_is_close_to_the_truth_for_a_smooth_wave():
    """Bilinear interpolation of cos(k.u): error at most |k|^2 / 4 of one pixel (two axes, h^2 / 8 f'' each)."""
    n, side, k = 32, 32, 0.3
    pipe = Augmentation((1, side, side), ["scale", "rotate", "aspect", "shift"])
    u = torch.arange(side, dtype=torch.float64) + 0.5 - side / 2
    points = torch.stack([u.expand(side, side), u[:, None].expand(side, side), torch.ones(side, side)], -1)
    wave = torch.tensor([k, 0.0, 0.0], dtype=torch.float64)
    out, d = pipe((points @ wave).cos().expand(n, 1, side, side), 0.8, noise(n)), draws(pipe, 0.8, n)
    for i in range(n):
        origin = points @ geometry(d, i, side, side).inverse().T
        inside = (origin[..., :2].abs() < side / 2 - 0.5).all(-1)
        torch.testing.assert_close(out[i, 0][inside], (origin @ wave).cos()[inside], rtol=0, atol=k**2 / 8 + 1e-5)


# -- colour ----------------------------------------------------------------------------------------------------


def test_hue_keeps_the_luma_and_the_saturation_and_its_angle_adds():
    y, pipe = normal(50, 3, 4, 5), Augmentation((3, 4, 5), ["hue"])
    out, d = pipe(y, 1.0, noise(50)), draws(pipe, 1.0, 50)
    torch.testing.assert_close(out.mean(1), y.mean(1))
    torch.testing.assert_close(out.norm(dim=1), y.norm(dim=1))
    matrix = augment.colour_matrix(d)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(50, dtype=torch.float64))
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(trace, 1.0 + 2.0 * (2.0 * math.pi * d.uniform["hue"][:, 0]).cos())
    torch.testing.assert_close(matrix @ AXIS, AXIS.expand(50, 3))


def test_saturation_scales_what_is_left_without_the_luma():
    y, pipe = normal(50, 3, 4, 5), Augmentation((3, 4, 5), ["saturation"])
    out, d = pipe(y, 1.0, noise(50)), draws(pipe, 1.0, 50)
    luma, factor = y.mean(1, keepdim=True), 2.0 ** d.normal["saturation"][:, 0].view(-1, 1, 1, 1)
    torch.testing.assert_close(out, luma + factor * (y - luma))


def test_luma_flip_twice_is_the_identity():
    y, pipe = normal(50, 3, 4, 5), Augmentation((3, 4, 5), ["luma-flip"])
    once = pipe(y, 1.0, noise(50))
    flipped = draws(pipe, 1.0, 50).flipped("luma-flip")
    assert 10 < flipped.sum() < 40
    torch.testing.assert_close(once[flipped].mean(1), -y[flipped].mean(1))
    torch.testing.assert_close(once - once.mean(1, keepdim=True), y - y.mean(1, keepdim=True))
    torch.testing.assert_close(pipe(once, 1.0, noise(50)), y)


def test_all_colours_together_are_their_composition():
    names = ["brightness", "contrast", "luma-flip", "hue", "saturation"]
    y, pipe, n = normal(60, 3, 4, 5), Augmentation((3, 4, 5), names), 60
    out, d = pipe(y, 0.7, noise(n)), draws(pipe, 0.7, n)
    for i in range(n):
        x = y[i].flatten(1)
        if d.coin["brightness"][i]:
            x = x + 0.2 * d.normal["brightness"][i, 0]
        if d.coin["contrast"][i]:
            x = x * 2.0 ** (0.5 * d.normal["contrast"][i, 0])
        if d.coin["luma-flip"][i] and d.uniform["luma-flip"][i, 0] < 0.5:
            x = x - 2.0 * torch.outer(AXIS, AXIS) @ x
        if d.coin["hue"][i]:
            generator = torch.linalg.cross(AXIS.expand(3, 3), torch.eye(3, dtype=torch.float64)).T
            x = torch.linalg.matrix_exp(2.0 * math.pi * d.uniform["hue"][i, 0] * generator) @ x
        if d.coin["saturation"][i]:
            x = x.mean(0) + 2.0 ** d.normal["saturation"][i, 0] * (x - x.mean(0))
        torch.testing.assert_close(out[i].flatten(1), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "offset", "gain", "strength"),
    [((4,), "offset", "gain", 0.2), ((2, 9), "offset", "gain", 0.2), ((1, 4, 5), "brightness", "contrast", 0.5)],
)
def test_gain_and_offset(shape, offset, gain, strength):
    y, pipe = normal(50, *shape), Augmentation(shape, [gain, offset])
    d, ones = draws(pipe, 0.5, 50), [1] * len(shape)
    b = torch.where(d.coin[offset], 0.2 * d.normal[offset][:, 0], 0.0).view(-1, *ones)
    c = torch.where(d.coin[gain], 2.0 ** (strength * d.normal[gain][:, 0]), 1.0).view(-1, *ones)
    torch.testing.assert_close(pipe(y, 0.5, noise(50)), c * (y + b))


# -- noise and cutout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4000,), (2, 2000), (1, 50, 80)])
def test_noise_is_white_with_a_half_normal_standard_deviation(shape):
    n = 200
    out = Augmentation(shape, ["noise"])(torch.zeros(n, *shape, dtype=torch.float64), 1.0, noise(n)).flatten(1)
    sigma = out.std(1)
    assert stats.kstest(sigma / 0.1, stats.halfnorm.cdf).pvalue > 1e-6
    assert stats.kstest((out[0] / sigma[0]).numpy(), stats.norm.cdf).pvalue > 1e-6
    assert (out.mean(1).abs() < 6.0 * sigma / math.sqrt(4000)).all()


def test_cutout_is_a_box_of_half_the_side_around_a_uniform_centre():
    n, side = 4000, 16
    out = Augmentation((2, side, side), ["cutout"])(torch.ones(n, 2, side, side), 0.5, noise(n))
    assert torch.equal(out[:, 0], out[:, 1])
    hole = 1.0 - out[:, 0]
    rows, columns = hole.amax(2), hole.amax(1)
    assert torch.equal(hole, rows[:, :, None] * columns[:, None])  # a box
    cut = hole.flatten(1).any(1)
    assert_frequency(cut, 0.5)
    widths = rows[cut].sum(1)
    assert widths.max() == side / 2
    assert_frequency(widths == side / 2, 0.5)  # the centre is a quarter of the side away from the edges
    assert_frequency(rows[cut][:, side // 2] > 0, 0.5)


def test_cutout_of_signals_and_vectors():
    out = Augmentation((3, 16), ["cutout"])(torch.ones(500, 3, 16), 1.0, noise(500))
    assert torch.equal(out[:, 0], out[:, 2])
    starts = (out[:, 0].diff(dim=1) < 0).sum(1) + (out[:, 0, 0] == 0)
    assert torch.equal(starts, torch.ones(500, dtype=torch.int64))
    vectors = Augmentation((10,), ["cutout"])(torch.ones(2000, 10), 1.0, noise(2000))
    assert_frequency(vectors.flatten() == 0, 0.5)


# -- derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 8), (3, 8, 8), (1, 2, 3, 8)])
def test_gradients(shape):
    pipe = Augmentation(shape, possible(shape))
    y = normal(3, *shape).requires_grad_()
    assert gradcheck(lambda y: pipe(y, 0.6, noise(3)), y, fast_mode=True)
    exact = Augmentation(shape, [name for name in possible(shape) if name not in augment.RESAMPLED])
    assert gradgradcheck(lambda y: exact(y, 0.6, noise(3)).sin(), y, fast_mode=True)


# -- leaks -----------------------------------------------------------------------------------------------------


def test_flips_below_one_can_be_undone_and_at_one_they_leak():
    """Two pictures that are mirror images, of probabilities (0.9, 0.1) and, for another generator, (0.4, 0.6)."""
    left = torch.tensor([[[1.0, 0.0]]])
    pipe, n = Augmentation((1, 1, 2), ["flip"]), 40_000

    def seen(share: float, p: float, key: int) -> torch.Tensor:
        first = int(share * n)
        y = torch.cat([left.expand(first, 1, 1, 2), left.flip(-1).expand(n - first, 1, 1, 2)])
        is_left = pipe(y, p, noise(n, key))[:, 0, 0, 0].mean()
        return torch.stack([is_left, 1.0 - is_left])

    for p in (0.5, 0.8):
        a = torch.tensor([[1.0 - p / 2, p / 2], [p / 2, 1.0 - p / 2]])
        assert torch.linalg.det(a).item() == pytest.approx(1.0 - p)
        for share in (0.9, 0.4):
            undone = torch.linalg.solve(a, seen(share, p, 0))
            assert undone[0].item() == pytest.approx(share, abs=5.0 * 0.5 / math.sqrt(n) / (1.0 - p))
    error = 5.0 * 0.5 * math.sqrt(2.0 / n)
    assert (seen(0.9, 0.5, 1) - seen(0.4, 0.5, 2)).abs().max() > 0.2
    assert (seen(0.9, 1.0, 3) - seen(0.4, 1.0, 4)).abs().max() < error


def kernel_on_states(side: int, name: str, weights: dict[tuple[float, ...], float]) -> torch.Tensor:
    """E T on distributions of the 2^side binary signals, by the module's own transform at given uniform draws."""
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=side)))[:, None]
    codes = 2 ** torch.arange(side - 1, -1, -1)
    stage = augment.blit if name == "translate" else augment.cut
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    for place, weight in weights.items():
        d = Draws([name], 1.0, noise(len(states)), torch.float32)
        d.uniform[name][:, : len(place)] = torch.tensor(place)
        image = (stage(states, d, noise(len(states)))[:, 0].long() * codes).sum(1)
        matrix[image, torch.arange(len(states))] += weight
    return matrix


def test_translation_and_cutout_are_invertible_on_all_distributions_of_binary_signals():
    """The eigenvalues of E T are not below 0, so those of (1 - p) I + p E T are at least 1 - p."""
    quarter = {(i, j): 0.25 for i in (0.1, 0.6) for j in (0.1, 0.6)}
    boxes = {(u,): 1.0 / 64 for u in torch.linspace(0, 1, 65)[:-1].tolist()}
    for name, weights in (("translate", quarter), ("cutout", boxes)):
        mean = kernel_on_states(8, name, weights)
        torch.testing.assert_close(mean.sum(0), torch.ones(256, dtype=torch.float64))
        spectrum = torch.linalg.eigvals(mean)
        assert spectrum.imag.abs().max() < 1e-9
        assert spectrum.real.min() > -1e-9
        assert torch.linalg.svdvals(0.2 * torch.eye(256, dtype=torch.float64) + 0.8 * mean)[-1] > 0.05


def test_uniform_translation_would_be_singular_before_one():
    thirds = {(0.6, 0.1): 1.0 / 3.0, (0.1, 0.1): 1.0 / 3.0, (0.1, 0.6): 1.0 / 3.0}
    lowest = torch.linalg.eigvals(kernel_on_states(8, "translate", thirds)).real.min().item()
    assert 1.0 / (1.0 - lowest) < 0.8  # the p of (1 - p) + p lowest = 0


# -- what can be asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1, 8, 8), "hue"), ((3, 8, 10), "rot90"), ((4,), "flip"), ((1, 4, 4), "translate"), ((3, 8, 8), "flop")],
)
def test_what_is_not_possible_is_refused_with_what_is(shape, name):
    with pytest.raises(UsageError, match=f"'{name}' .* {'x'.join(map(str, shape))} .*possible are: .*noise") as error:
        Augmentation(shape, ["noise", name])
    assert f" {name}," not in str(error.value)


# -- the choice ------------------------------------------------------------------------------------------------


def digits() -> torch.Tensor:
    return torch.from_numpy(load_digits().images).double()[:, None] * (2.0 / 17.0) + 1.0 / 17.0 - 1.0


def textures(n: int, seed: int) -> torch.Tensor:
    """Colour pictures, distributed as their mirror images and quarter turns, of any number of examples."""
    y = normal(n, 3, 8, 8, seed=seed)
    y[..., 0, 0] += 3.0
    turns = make_generator("augment test turns", seed)
    k, f = torch.randint(4, (n,), generator=turns), torch.randint(2, (n,), generator=turns)
    return torch.stack([(a.flip(-1) if b else a).rot90(int(c), (-2, -1)) for a, b, c in zip(y, f, k, strict=True)])


@pytest.mark.parametrize("part", range(4))
def test_200_digits_have_no_flips_turns_or_colours(part):
    y = digits()[200 * part : 200 * (part + 1)]
    names = choose(DataSpec(kind="image", shape=(1, 8, 8), levels=17), y)
    assert names == ("translate", "scale", "aspect", "shift", "brightness", "contrast")


def test_symmetric_colour_pictures_have_it_all():
    names = choose(DataSpec(kind="image", shape=(3, 8, 8), levels=256), textures(300, 1))
    assert names == tuple(name for name in possible((3, 8, 8)) if name not in ("noise", "cutout"))


def test_a_picture_and_its_mirror_image_have_flips_and_no_turns():
    y = digits()[:100].expand(100, 3, 8, 8)
    names = choose(DataSpec(kind="image", shape=(3, 8, 8), levels=17), torch.cat([y, y.flip(-1)]))
    assert "flip" in names
    assert not {"rot90", "rotate"} & set(names)


def test_orientation_is_seen_where_means_agree():
    u = torch.arange(12, dtype=torch.float64)
    phase = 2.0 * math.pi * torch.rand(100, 1, 1, 1, generator=make_generator("phases"), dtype=torch.float64)
    rising = (0.8 * u[:, None] + 0.4 * u + phase).sin() + 0.3 * normal(100, 1, 12, 12)
    assert not is_symmetric(rising, mirror, 2)
    assert not is_symmetric(rising, quarter_turn, 4)


def test_symmetry_given_the_condition():
    """Two classes that are each other's mirror images: p(x) is symmetric, p(x | c) is not."""
    y = normal(200, 1, 6, 6)
    y[..., 0] += 1.0
    c = torch.arange(200) % 2
    y = torch.where(c.view(-1, 1, 1, 1) == 1, y.flip(-1), y)
    assert is_symmetric(y, mirror, 2)
    assert not is_symmetric(y, mirror, 2, c)
    assert not is_symmetric(y, mirror, 2, torch.stack([c + 0.1 * normal(200), normal(200, seed=1)], 1))
    assert is_symmetric(y, mirror, 2, c.roll(1)[torch.randperm(200, generator=make_generator("order"))])


def test_false_alarms_have_the_stated_rate():
    """At most the 1 - 1e-6 quantile of the binomial, of 300 data sets each."""
    limit = stats.binom.ppf(1.0 - 1e-6, 300, ALARM)
    for transform, order in ((mirror, 2), (quarter_turn, 4)):
        alarms = sum(not is_symmetric(textures(100, seed)[:, :1], transform, order) for seed in range(300))
        assert alarms <= limit


def test_pictures_that_are_their_own_images_are_symmetric_and_few_say_nothing():
    y = normal(120, 1, 6, 6)
    y = y + y.flip(-1)
    assert is_symmetric(y, mirror, 2)
    assert is_symmetric(torch.ones(120, 1, 6, 6), mirror, 2)
    assert not is_symmetric(y[:99], mirror, 2)


def test_other_kinds_of_data():
    table = {"kind": "points", "shape": (3,)}
    assert choose(DataSpec.model_validate(table), normal(50, 3)) == ("gain", "offset", "noise")
    assert choose(DataSpec(kind="signal", shape=(1, 32)), normal(50, 1, 32)) == ("translate", "gain", "offset", "noise")
    volume = DataSpec(kind="volume", shape=(1, 8, 8, 8))
    assert choose(volume, normal(150, 1, 8, 8, 8)) == ("flip", "translate", "brightness", "contrast")
    lopsided = normal(150, 1, 8, 8, 8) + torch.linspace(-0.3, 0.3, 8, dtype=torch.float64)
    assert choose(volume, lopsided) == ("translate", "brightness", "contrast")


# -- the strength ----------------------------------------------------------------------------------------------


def play(controller: Controller, steps: range, total: int) -> list[float]:
    """A discriminator that overfits as r(p) = 0.9 - 0.8 p: of 2000 margins, the share (1 + r) / 2 is positive."""
    path = []
    for step in steps:
        r = 0.9 - 0.8 * controller.p.item()
        margin = torch.ones(2000)
        margin[: round(1000 * (1.0 - r))] = -1.0
        controller.observe(margin)
        controller.adjust((step + 1) / total)
        path.append(controller.p.item())
    return path


@pytest.mark.parametrize("start", [0.0, 0.8])
def test_the_controller_reaches_its_target(start):
    """r(p) = 0.6 at p = 0.375. p moves by 4 / 1000 / 0.2 = 0.02 every fourth step: 76 or 88 steps."""
    controller = Controller()
    controller.p.fill_(start)
    path = play(controller, range(1000), 1000)
    assert path[3] - start == pytest.approx(math.copysign(0.02, 0.375 - start), abs=1e-6)
    assert path[:3] == [pytest.approx(start)] * 3
    assert all(abs(p - 0.375) <= 0.02 + 1e-6 for p in path[88:])
    assert abs(controller.r.item() - 0.6) <= 0.8 * 0.02 + 1e-3


def test_the_strength_stays_in_its_range_and_speed_is_a_share_of_the_budget():
    for total in (50, 5000):
        controller = Controller(speed=0.2, max_p=0.7, every=1)
        for step in range(total):
            controller.observe(torch.ones(4))
            controller.adjust((step + 1) / total)
            if step + 1 == total // 10:
                assert controller.p.item() == pytest.approx(0.5, abs=1e-4)
        assert controller.p.item() == pytest.approx(0.7)
        for step in range(total):
            controller.observe(-torch.ones(4))
            controller.adjust(1.0 + (step + 1) / total)
        assert controller.p.item() == 0.0


def test_without_observations_nothing_moves():
    controller = Controller(every=1)
    controller.p.fill_(0.3)
    controller.adjust(0.5)
    assert controller.p.item() == pytest.approx(0.3)
    assert controller.progress.item() == 0.0


def test_the_state_survives_a_checkpoint():
    whole, first, second = Controller(), Controller(), Controller()
    path = play(whole, range(60), 100)
    start = play(first, range(30), 100)  # between two adjustments: 30 is no multiple of 4
    second.load_state_dict(first.state_dict())
    assert start + play(second, range(30, 60), 100) == path
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), second.buffers(), strict=True))


def test_processes_keep_one_strength(monkeypatch):
    """This process sees r = 1 on 10 margins, another one r = -1 on 30: together -0.5."""
    monkeypatch.setattr(augment.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(augment.dist, "all_reduce", lambda sums: sums.add_(torch.tensor([-30.0, 30.0])))
    controller = Controller(every=1)
    controller.p.fill_(0.5)
    controller.observe(torch.ones(10))
    controller.adjust(0.01)
    assert controller.r.item() == -0.5
    assert controller.p.item() == pytest.approx(0.45)
    assert controller.signs.item() == controller.count.item() == 0.0


def test_margins_are_counted_in_single_precision():
    controller = Controller(every=1)
    controller.observe(torch.cat([torch.ones(1001), torch.zeros(998), -torch.ones(2)]).bfloat16())
    assert controller.signs.item() == 999.0


def test_the_ramp():
    assert [ramp(t, 0.3) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.15, 0.3])
    assert ramp(0.25, 1.0) == pytest.approx(math.sin(math.pi / 8) ** 2)
