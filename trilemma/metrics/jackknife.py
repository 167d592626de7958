r"""The jackknife of a two-sample statistic: its standard error and 95% interval by deleting blocks.

Let theta = T(X, Y) for independent samples X (m generated) and Y (n reference). To first order
    T = T(P, Q) + (1/m) sum_i a(x_i) + (1/n) sum_j b(y_j),
with influence functions a and b of mean zero. The two sums are independent, so
    Var T = Var_X + Var_Y,
and each part comes from deleting in one sample while the other stays whole. (Deleting block g from both samples
at once has the same expectation, but needs equal group numbers and has G - 1 degrees of freedom instead of up to
2 (G - 1): the parts are therefore taken apart and added.) A sample is cut at random into G = 20 blocks.

Smooth statistics (means, moments): delete one block. With n_g examples in block g, h_g = n / n_g and
theta_(g) the statistic without it,
    pseudo_g = h_g theta - (h_g - 1) theta_(g),    theta_J = G theta - sum_g (1 - 1/h_g) theta_(g),
    c_g = (pseudo_g - theta_J) / sqrt(h_g - 1),    Var = (1/G) sum_g c_g^2
(Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m", Statistics and Computing 9).

Nearest-neighbour statistics: delete half of the blocks. They are not smooth: who is whose neighbour changes with
every example that goes, and deleting few examples overstates the variance by a factor that no sample size
removes (measured: standard errors 1.1 to 2 times too large; that the jackknife errs upwards is Efron & Stein 1981,
that large blocks are the cure Shao & Wu 1989, both Annals of Statistics). Halves A and B of a sample are
independent and half as long, so (theta_A - theta_B)^2 / 4 has the expectation Var(theta_{n/2}) / 2, which is
Var(theta_n) wherever variances fall as 1/n. The 19 rows of a Hadamard matrix of order 20 give 19 such halvings
that are balanced over the blocks (McCarthy 1969, balanced repeated replication):
    c_r = (theta_{A_r} - theta_{B_r}) / 2,    Var = (1/19) sum_r c_r^2.
For a mean both are the variance of the block means / 20; with blocks of one example, s^2 / n.

`uncertain` makes the interval of the contrasts, and combines them.

The value reported is the plain theta, not the bias-corrected theta_J: the Frechet distance and the
neighbour metrics depend on the sample size, are compared at equal sizes, and the interval is one for
their expectation at these sizes, not for the limit of infinitely many examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.noise import make_generator
from trilemma.metrics.uncertain import Source, Uncertain

GROUPS = 20
"""Blocks per sample."""


def _paley() -> Tensor:
    """The 19 balanced rows of Paley's Hadamard matrix of order 20: [[1, 1], [1, Q - I]], Q_ij = chi(i - j) mod 19."""
    q = GROUPS - 1
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([-1] + [1 if i in squares else -1 for i in range(1, q)])  # with the -I on the diagonal
    i = torch.arange(q)
    return torch.cat([torch.ones(q, 1, dtype=torch.long), chi[(i[:, None] - i) % q]], 1)


HALVES = _paley() > 0
"""(19, 20): which blocks make the first half A_r of each halving; the others make B_r."""


def jackknife(statistic: Callable[[Tensor, Tensor], float | Tensor], generated: Tensor, reference: Tensor) -> Uncertain:
    """A smooth statistic of two independent samples, recomputed without each block.

    Arguments:
        statistic: (generated (m, *), reference (n, *)) -> a number.
        generated, reference: the samples; blocks are cut along the first dimension.
    """
    x, x_blocks = shuffle_into_blocks(generated)
    y, y_blocks = shuffle_into_blocks(reference)
    value = float(statistic(x, y))
    without_x = torch.tensor([float(statistic(without(x, b), y)) for b in x_blocks], dtype=torch.float64)
    without_y = torch.tensor([float(statistic(x, without(y, b))) for b in y_blocks], dtype=torch.float64)
    return delete_one(value, without_x, without_y, len(x), len(y))


def jackknife_halves(
    statistic: Callable[[Tensor, Tensor], float | Tensor], generated: Tensor, reference: Tensor
) -> Uncertain:
    """A statistic that is not smooth (a median, neighbours), recomputed in the halves of each sample.

    Arguments:
        statistic: (generated (m, *), reference (n, *)) -> a number.
        generated, reference: the samples; halves are cut along the first dimension.
    """
    m, n = len(generated), len(reference)
    if min(m, n) < GROUPS:
        return delete_half(float(statistic(generated, reference)), torch.empty(0), torch.empty(0), m, n)
    x, x_halves = shuffle_into_halves(generated)
    y, y_halves = shuffle_into_halves(reference)
    of_x = torch.tensor([float(statistic(x[h], y)) for h in x_halves], dtype=torch.float64)
    of_y = torch.tensor([float(statistic(x, y[h])) for h in y_halves], dtype=torch.float64)
    return delete_half(float(statistic(x, y)), of_x, of_y, m, n)


def delete_one(value: float, generated: Tensor, reference: Tensor, m: int, n: int) -> Uncertain:
    """From the statistics without each block of the generated and of the reference sample."""
    return Uncertain(
        value,
        {
            "generated": Source(_delete_one_contrasts(value, generated, m), len(generated) - 1),
            "reference": Source(_delete_one_contrasts(value, reference, n), len(reference) - 1),
        },
        {"generated": m, "reference": n},
        f"delete-a-block jackknife, {len(generated)} + {len(reference)} blocks",
    )


def delete_half(value: float, generated: Tensor, reference: Tensor, m: int, n: int) -> Uncertain:
    """From the statistics (38,) of the 19 halves A_r, then of the 19 halves B_r, of each sample.

    Empty statistics (too few examples to be halved) give a number without sources.
    """
    if not len(generated):
        none = "no interval: too few examples to be halved"
        return Uncertain(value, {}, {"generated": m, "reference": n}, none)
    a, b = (theta.double().cpu().view(2, -1) for theta in (generated, reference))
    return Uncertain(
        value,
        {
            "generated": Source((a[0] - a[1]) / 2.0, GROUPS - 1),
            "reference": Source((b[0] - b[1]) / 2.0, GROUPS - 1),
        },
        {"generated": m, "reference": n},
        f"delete-half jackknife, {GROUPS} + {GROUPS} blocks",
    )


def shuffle_into_blocks(x: Tensor) -> tuple[Tensor, list[slice]]:
    """x (N, *) in random order, and the slices that cut it into min(20, N) blocks of nearly equal size.

    Blocks must be random: examples often come sorted or cycling by label, and blocks cut from such an order would
    be unlike each other, or too much alike. They must also be the same in whatever order the examples come. So
    the examples are sorted (along a random direction) and then shuffled by a permutation that their content seeds.
    (A permutation that is a function of N alone would put the same ranks into a block for every sample.)

    Raises:
        UsageError: fewer than two examples.
    """
    n = len(x)
    if n < 2:
        raise UsageError(f"the jackknife needs at least 2 examples a side, got {n}")
    flat = x.reshape(n, -1).double()
    direction = torch.randn(flat.shape[1], generator=make_generator("jackknife", "direction"), dtype=torch.float64)
    by_rank = x[(flat * direction.to(x.device)).sum(1).argsort()]
    # -0.0 + 0.0 is 0.0: equal examples have equal bytes.
    digest = hashlib.sha256((by_rank + 0.0).cpu().contiguous().numpy().tobytes()).hexdigest()
    order = torch.randperm(n, generator=make_generator("jackknife", digest)).to(x.device)
    return by_rank[order], _cut(n)


def shuffle_into_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, *) in the order of its 20 blocks, and which examples are in each half (38, N): A_1..A_19, B_1..B_19."""
    x, blocks = shuffle_into_blocks(x)
    block = torch.cat([torch.full((b.stop - b.start,), g) for g, b in enumerate(blocks)])
    return x, torch.cat([HALVES, ~HALVES])[:, block]


def without(x: Tensor, block: slice) -> Tensor:
    """x without the rows of one block."""
    return torch.cat([x[: block.start], x[block.stop :]])


def _cut(n: int) -> list[slice]:
    groups = min(GROUPS, n)
    return [slice(n * g // groups, n * (g + 1) // groups) for g in range(groups)]


def _delete_one_contrasts(value: float, theta: Tensor, n: int) -> Tensor:
    h = torch.tensor([n / (b.stop - b.start) for b in _cut(n)], dtype=torch.float64)
    theta = theta.double().cpu()
    corrected = len(h) * value - ((1.0 - 1.0 / h) * theta).sum()
    pseudo = h * value - (h - 1.0) * theta
    return (pseudo - corrected) / (h - 1.0).sqrt()
