"""Scores: kinds propagate, units convert, and a mean carries its standard error."""

import math

import pytest
import torch

from trilemma.core.errors import UsageError
from trilemma.core.score import Score, cat_scores, combine_kinds, flip_kind
from trilemma.core.spec import DataSpec

KINDS = ("exact", "lower_bound", "upper_bound", "estimate")
PICTURE = DataSpec(kind="image", shape=(3, 2, 2), levels=256)
DIGIT = DataSpec(kind="image", shape=(1, 8, 8), levels=17)
POINTS = DataSpec(kind="points", shape=(4,))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_neutral_and_kinds_are_idempotent(kind):
    assert combine_kinds("exact", kind) == combine_kinds(kind, "exact") == kind
    assert combine_kinds(kind, kind) == kind
    assert flip_kind(flip_kind(kind)) == kind


@pytest.mark.parametrize(
    ("a", "b"), [("lower_bound", "upper_bound"), ("lower_bound", "estimate"), ("upper_bound", "estimate")]
)
def test_unlike_kinds_give_an_estimate(a, b):
    assert combine_kinds(a, b) == combine_kinds(b, a) == "estimate"


def test_combining_is_associative():
    for a in KINDS:
        for b in KINDS:
            for c in KINDS:
                assert combine_kinds(combine_kinds(a, b), c) == combine_kinds(a, combine_kinds(b, c))


def test_the_negative_of_a_bound_is_the_other_bound():
    assert flip_kind("lower_bound") == "upper_bound"
    assert flip_kind("exact") == "exact"
    assert flip_kind("estimate") == "estimate"


def test_mean_and_its_standard_error():
    score = Score(torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64), "lower_bound")
    mean = score.mean()
    assert mean.value == 4.0
    assert mean.stderr.item() == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3 / 4), abs=1e-15)
    assert mean.kind == "lower_bound"
    assert mean.mean() is mean


def test_mean_of_one_example_has_no_standard_error():
    assert Score(torch.tensor([3.0]), "exact").mean().stderr is None


def test_an_infinite_example_is_not_dropped():
    assert Score(torch.tensor([0.0, -math.inf]), "exact").mean().value == -math.inf
    assert Score(torch.tensor([0.0, math.nan]), "exact").mean().value.isnan()


def test_bits_per_dim_of_a_uniform_picture_is_eight():
    nats = torch.full((5,), -12 * math.log(256.0), dtype=torch.float64)
    bits = Score(nats, "lower_bound", stderr=torch.full((5,), 12 * math.log(2.0))).per_dim(PICTURE)
    assert bits.unit == "bits/dim"
    torch.testing.assert_close(bits.value, torch.full((5,), 8.0, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(bits.stderr, torch.ones(5))
    assert bits.kind == "upper_bound"  # bits are negated log-likelihoods


@pytest.mark.parametrize("spec", [DIGIT, POINTS])
def test_bits_per_dim_is_for_8_bit_data_only(spec):
    score = Score(torch.tensor([-8.0]), "lower_bound")
    with pytest.raises(UsageError, match="8-bit data only"):
        score.bits_per_dim(spec)
    per_dim = score.per_dim(spec)
    assert per_dim.unit == "nats/dim"
    assert per_dim.kind == "lower_bound"
    assert per_dim.value.item() == pytest.approx(-8.0 / spec.dims)


def test_per_dim_twice_changes_nothing():
    score = Score(torch.tensor([-8.0]), "exact").per_dim(POINTS)
    assert score.per_dim(POINTS) is score


def test_joining_batches():
    a = Score(torch.tensor([1.0]), "estimate", torch.tensor([0.1]))
    b = Score(torch.tensor([2.0, 3.0]), "estimate", torch.tensor([0.2, 0.3]))
    both = cat_scores([a, b])
    assert both.value.tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(both.stderr, torch.tensor([0.1, 0.2, 0.3]))
    assert cat_scores([a, Score(torch.tensor([2.0]), "estimate")]).stderr is None
    with pytest.raises(AssertionError, match="unlike"):
        cat_scores([a, Score(torch.tensor([2.0]), "exact")])


def test_a_score_says_what_it_is():
    assert str(Score(torch.tensor(-1.5), "lower_bound", torch.tensor(0.25))) == ">= -1.5 +- 0.25 nats (lower bound)"
    assert str(Score(torch.tensor(3.0), "upper_bound", unit="bits/dim")) == "<= 3 bits/dim (upper bound)"
    assert "2 examples, mean = 1 +- 1 nats (exact)" in str(Score(torch.tensor([0.0, 2.0]), "exact"))
    with pytest.raises(ValueError, match="differ"):
        Score(torch.zeros(2), "exact", torch.zeros(3))
