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

The interval is Student's, with Satterthwaite's degrees of freedom
    (Var_X + Var_Y)^2 / (Var_X^2 / (G - 1) + Var_Y^2 / (G - 1)).

The value reported is the plain theta, not the bias-corrected theta_J: the Frechet distance and the
neighbour metrics depend on the sample size, are compared at equal sizes, and the interval is one for
their expectation at these sizes, not for the limit of infinitely many examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.noise import make_generator
from trilemma.metrics.estimate import LEVEL, Estimate, t_interval

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


@dataclass(frozen=True)
class Replicates:
    """A two-sample statistic and its contrasts c: their mean square is the variance that a sample contributes.

    They are kept because they are linear in the statistic: the difference of two models on one reference has
    the difference of their reference contrasts.

    Attributes:
        value: the statistic of the whole samples.
        generated, reference: contrasts from deleting in one sample; empty where it is too small to be cut.
        n: sizes of the two samples.
        method: how the contrasts were made, in a few words.
    """

    value: float
    generated: Tensor
    reference: Tensor
    n: dict[str, int]
    method: str

    def estimate(
        self, *, unit: str, higher_is_better: bool, extractor: str | None = None, share_of: str | None = None
    ) -> Estimate:
        """Value, standard error and interval.

        Arguments:
            share_of: for a share (a mean of zeros and ones), the sample whose members are counted. Where all of
                them or none count, in every replicate, the jackknife sees no spread; the interval is then
                the exact binomial one (Clopper & Pearson 1934), whose far end is 0.025^(1/n) away from 1 (or 0).
        """
        se, ci, method = None, None, self.method
        if len(self.generated) and len(self.reference):
            var_x, var_y = (float(c.square().mean()) for c in (self.generated, self.reference))
            se, ci = (var_x + var_y) ** 0.5, (self.value, self.value)
            if se > 0.0:
                degrees = [min(GROUPS, size) - 1 for size in (self.n["generated"], self.n["reference"])]
                ci = t_interval(self.value, se, se**4 / (var_x**2 / degrees[0] + var_y**2 / degrees[1]))
            elif share_of is None:
                se, ci, method = None, None, f"{method}; no spread, so no interval"
            elif self.value in (0.0, 1.0):
                edge = ((1.0 - LEVEL) / 2.0) ** (1.0 / self.n[share_of])
                ci = (0.0, 1.0 - edge) if self.value == 0.0 else (edge, 1.0)
                method += "; no spread, so the interval is Clopper-Pearson's"
        return Estimate(
            value=self.value,
            se=se,
            ci=ci,
            n=self.n,
            unit=unit,
            higher_is_better=higher_is_better,
            extractor=extractor,
            method=method,
        )


def jackknife(
    statistic: Callable[[Tensor, Tensor], float | Tensor],
    generated: Tensor,
    reference: Tensor,
    *,
    unit: str = "",
    higher_is_better: bool = True,
) -> Estimate:
    """Standard error and interval of a smooth statistic of two independent samples, recomputed without each block.

    Arguments:
        statistic: (generated (m, *), reference (n, *)) -> a number.
        generated, reference: the samples; blocks are cut along the first dimension.
    """
    x, x_blocks = shuffle_into_blocks(generated)
    y, y_blocks = shuffle_into_blocks(reference)
    value = float(statistic(x, y))
    without_x = torch.tensor([float(statistic(without(x, b), y)) for b in x_blocks], dtype=torch.float64)
    without_y = torch.tensor([float(statistic(x, without(y, b))) for b in y_blocks], dtype=torch.float64)
    return delete_one(value, without_x, without_y, len(x), len(y)).estimate(
        unit=unit, higher_is_better=higher_is_better
    )


def delete_one(value: float, generated: Tensor, reference: Tensor, m: int, n: int) -> Replicates:
    """`Replicates` from the statistics without each block of the generated and of the reference sample."""
    return Replicates(
        value,
        _delete_one_contrasts(value, generated, m),
        _delete_one_contrasts(value, reference, n),
        {"generated": m, "reference": n},
        f"delete-a-block jackknife, {len(generated)} + {len(reference)} blocks",
    )


def delete_half(value: float, generated: Tensor, reference: Tensor, m: int, n: int) -> Replicates:
    """`Replicates` from the statistics (38,) of the 19 halves A_r, then of the 19 halves B_r, of each sample."""
    a, b = (theta.double().cpu().view(2, -1) for theta in (generated, reference))
    blocks = f"delete-half jackknife, {GROUPS} + {GROUPS} blocks"
    return Replicates(
        value,
        (a[0] - a[1]) / 2.0,
        (b[0] - b[1]) / 2.0,
        {"generated": m, "reference": n},
        blocks if len(generated) else "no interval: too few examples to be halved",
    )


def shuffle_into_blocks(x: Tensor) -> tuple[Tensor, list[slice]]:
    """x (N, *) in a fixed random order, and the slices that cut it into min(20, N) blocks of nearly equal size.

    The order is a function of N alone. It is random because examples often come sorted or cycling by label:
    blocks cut from such an order would be unlike each other, or too much alike.

    Raises:
        UsageError: fewer than two examples.
    """
    n = len(x)
    if n < 2:
        raise UsageError(f"the jackknife needs at least 2 examples a side, got {n}")
    order = torch.randperm(n, generator=make_generator("jackknife", n)).to(x.device)
    return x[order], _cut(n)


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
