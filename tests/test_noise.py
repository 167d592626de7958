"""Random draws: the same in every batching, of the right distribution, and never from a global state.

Seeds are fixed. The distribution tests reject at p < 1e-6, the false-alarm rate that a new seed would have.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from trilemma.core.noise import BLOCK, Noise, draw_seed, hash_key, make_generator

N = 20_000
P_MIN = 1e-6


def draw_all(noise: Noise) -> list[torch.Tensor]:
    """One draw of every kind, in a fixed order."""
    n = noise.n
    return [
        noise.normal(3, dtype=torch.float64),
        noise.uniform(2, 2),
        noise.integers(7, 4),
        noise.bernoulli(torch.full((n, 5), 0.3)),
        noise.categorical(torch.tensor([1.0, 2.0, 3.0])),
        noise.normal(),
    ]


@pytest.mark.parametrize("size", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 40])
@pytest.mark.parametrize("first", [0, 5, BLOCK, 37])
def test_draws_do_not_depend_on_the_batching(first, size):
    total = 100
    whole = draw_all(Noise(1, "x", n=total))
    starts = [0, *range(first, total, size)] if first else list(range(0, total, size))
    stops = [*starts[1:], total]
    parts = [draw_all(Noise(1, "x", n=b - a, start=a)) for a, b in zip(starts, stops, strict=True)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)


def test_any_window_of_the_stream_is_the_same():
    whole = Noise("k", n=3 * BLOCK).normal()
    for start, stop in itertools.combinations(range(0, 3 * BLOCK + 1, 7), 2):
        assert torch.equal(Noise("k", n=stop - start, start=start).normal(), whole[start:stop])


def test_consecutive_draws_differ_and_repeat():
    a, b = Noise(3, n=50), Noise(3, n=50)
    first, second = a.normal(4), a.normal(4)
    assert not torch.equal(first, second)
    assert torch.equal(first, b.normal(4))
    assert torch.equal(second, b.normal(4))


@pytest.mark.parametrize(
    "other", [("a", 2), ("b", 1), ("a", "1"), ("a1",), ("a", 1, 0)], ids=["number", "word", "type", "joined", "longer"]
)
def test_different_keys_are_independent(other):
    x, y = Noise("a", 1, n=N).normal(dtype=torch.float64), Noise(*other, n=N).normal(dtype=torch.float64)
    correlation = np.corrcoef(x, y)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(N)  # 5 sigma: a false alarm in 1.7 million
    assert hash_key("a", 1) != hash_key(*other)


def test_neighbouring_blocks_are_independent():
    x = Noise("blocks", n=N).normal(dtype=torch.float64)
    for lag in (1, BLOCK, BLOCK + 1):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 5 / math.sqrt(N)


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002 (the global state is what is tested)
    noise = Noise(0, n=20)
    draw_all(noise)
    make_generator("a").seed()
    draw_seed(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_uniform_and_normal_have_their_distributions():
    uniform, normal = Noise("u", n=N).uniform(2, dtype=torch.float64), Noise("n", n=N).normal(2, dtype=torch.float64)
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > P_MIN
    assert stats.kstest(normal.flatten(), "norm").pvalue > P_MIN
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0


def test_integers_are_uniform():
    counts = Noise("i", n=N).integers(6, 3).flatten().bincount(minlength=6)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > P_MIN


def test_categorical_follows_shared_and_own_weights():
    weights = torch.tensor([0.5, 0.0, 3.0, 1.5])
    counts = Noise("c", n=N).categorical(weights).bincount(minlength=4)
    assert counts[1] == 0
    kept = counts[weights > 0]
    assert stats.chisquare(kept, weights[weights > 0] / weights.sum() * N).pvalue > P_MIN

    own = torch.eye(4)[torch.arange(N) % 4]
    assert torch.equal(Noise("c", n=N).categorical(own), torch.arange(N) % 4)


def test_bernoulli_has_its_rate_and_its_edges():
    p = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64).expand(N, 3)
    drawn = Noise("b", n=N).bernoulli(p)
    assert drawn.dtype == torch.float64
    assert drawn[:, 0].sum() == 0
    assert drawn[:, 2].sum() == N
    assert abs(drawn[:, 1].mean() - 0.2) < 5 * math.sqrt(0.16 / N)


def test_like_draws_take_shape_and_dtype():
    x = torch.zeros(5, 2, 3, dtype=torch.float64)
    assert torch.equal(Noise(0, n=5).normal_like(x), Noise(0, n=5).normal(2, 3, dtype=torch.float64))
    assert torch.equal(Noise(0, n=5).uniform_like(x), Noise(0, n=5).uniform(2, 3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="5 samples asked for a batch of 4"):
        Noise(0, n=5).normal_like(x[:4])
    with pytest.raises(ValueError, match="at least one sample"):
        Noise(0, n=0)


def test_seeds_of_public_calls():
    assert draw_seed(7) == 7
    assert draw_seed(torch.Generator().manual_seed(1)) == draw_seed(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    assert draw_seed(generator) != draw_seed(generator)  # a generator moves on
    assert draw_seed(None) != draw_seed(None)  # fresh entropy: equal once in 2^63
    assert 0 <= hash_key("x") < 2**63
    assert hash_key("x", 1) == 2319442240190766601  # saved runs are resumed with these seeds: they may not change
