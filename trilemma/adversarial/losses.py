r"""Losses of adversarial training in pairs: d(real, fake) for the discriminator D, g(fake, real) for the generator G.

With p the density of the data, q that of G(z), and D(x) a real number (a logit):

minimax (Goodfellow et al. 2014, arXiv:1406.2661), literally, so that G descends E log(1 - sigma(D(G(z)))):
    d = E softplus(-D(x)) + E softplus(D(G(z))),   g = -E softplus(D(G(z))).
    The best D is log p/q, and there -d = -log 4 + 2 JSD(p, q). Where D rejects all that G makes, the gradient of g is
    sigma(D(G(z))) times that of D, nearly 0: it vanishes.
non-saturating (the same paper's modified game): g = E softplus(-D(G(z))), whose gradient is then that of D itself.
wasserstein (Arjovsky, Chintala & Bottou 2017, arXiv:1701.07875): d = E D(G(z)) - E D(x), g = -E D(G(z)). If D ranges
    over all 1-Lipschitz functions, min d = -W1(p, q). D is no probability: its range is all of R, and G raises it.
hinge (Lim & Ye 2017, arXiv:1705.02894): d = E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))), g = -E D(G(z)).
    The best D is sign(p - q), and there d = 2 - 2 TV(p, q).
least-squares (Mao et al. 2017, arXiv:1611.04076): d = E (D(x) - 1)^2 / 2 + E D(G(z))^2 / 2, g = E (D(G(z)) - 1)^2 / 2.
    The best D is p / (p + q).
relativistic (pairing: Jolicoeur-Martineau 2018, arXiv:1807.00734; Sun, Fang & Schwing 2020, arXiv:2011.04926):
    d = E softplus(D(G(z)) - D(x)),   g = E softplus(D(x) - D(G(z))),
    which asks only which of a pair is the more real, so no generator can win by moving some samples far away while
    others are dropped. The best D is log p/q, and there d = log 2 - JSD(p x q, q x p). A pair shares its condition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import relu, softplus

LossName = Literal["minimax", "non-saturating", "wasserstein", "hinge", "least-squares", "relativistic"]


@dataclass(frozen=True)
class PairedLoss:
    """The losses of both players, to be minimised, of D's values (N,) on real and generated examples.

    Attributes:
        d: (real, fake) -> scalar.
        g: (fake, real) -> scalar.
        undecided: the value of D at which it takes neither side; None where only differences of D mean something.
        pairs: whether g depends on `real`, so that D has to be evaluated there.
    """

    d: Callable[[Tensor, Tensor], Tensor]
    g: Callable[[Tensor, Tensor], Tensor]
    undecided: float | None = None
    pairs: bool = False

    def margins(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """How far D is on the right side, for real and for generated examples (N,); for pairs both are the same."""
        if self.undecided is None:
            return real - fake, real - fake
        return real - self.undecided, self.undecided - fake


def _minimax_d(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


def _raise_fake(fake: Tensor, real: Tensor) -> Tensor:
    return -fake.mean()


LOSSES: dict[LossName, PairedLoss] = {
    "minimax": PairedLoss(_minimax_d, lambda fake, real: -softplus(fake).mean(), undecided=0.0),
    "non-saturating": PairedLoss(_minimax_d, lambda fake, real: softplus(-fake).mean(), undecided=0.0),
    "wasserstein": PairedLoss(lambda real, fake: fake.mean() - real.mean(), _raise_fake),
    "hinge": PairedLoss(
        lambda real, fake: relu(1.0 - real).mean() + relu(1.0 + fake).mean(), _raise_fake, undecided=0.0
    ),
    "least-squares": PairedLoss(
        lambda real, fake: 0.5 * ((real - 1.0).square().mean() + fake.square().mean()),
        lambda fake, real: 0.5 * (fake - 1.0).square().mean(),
        undecided=0.5,
    ),
    "relativistic": PairedLoss(
        lambda real, fake: softplus(fake - real).mean(), lambda fake, real: softplus(real - fake).mean(), pairs=True
    ),
}
