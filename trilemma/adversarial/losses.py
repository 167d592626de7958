r"""Losses of adversarial training: plain functions in pairs, one for each player.

The relativistic pairing game (Jolicoeur-Martineau 2018, arXiv:1807.00734; Sun, Fang & Schwing 2020,
arXiv:2011.04926) asks of a critic D only which of a pair (real x, fake G(z)) is the more real:
    L_D = E f(D(G(z)) - D(x)),   L_G = E f(D(x) - D(G(z))),   f(t) = log(1 + e^t) = softplus(t),
so no generator can win by moving some samples far away while others are dropped: every real point has its own
decision boundary. D is defined up to a constant. At equilibrium D(x) - D(G(z)) = 0 and both losses are log 2.
For x ~ p and G(z) ~ q, independent, the best D is log p/q, and with it L_D = log 2 - JSD(p x q || q x p): the
players fight over the Jensen-Shannon divergence between the pair and the swapped pair.

The zero-centred gradient penalties
    R1 = E_{x ~ data} |grad_x D(x)|^2,   R2 = E_{x ~ G} |grad_x D(x)|^2
make the game converge locally (Mescheder, Geiger & Nowozin 2018, arXiv:1801.04406; with the relativistic loss,
Huang et al. 2024, arXiv:2501.05441). They enter as (gamma / 2) (R1 + R2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def relativistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(D(fake) - D(real)) over pairs; real and fake are the critic's values, each (N,)."""
    return softplus(fake - real).mean()


def relativistic_generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(D(real) - D(fake)) over pairs; real and fake are the critic's values, each (N,)."""
    return softplus(real - fake).mean()


def squared_gradient(values: Tensor, x: Tensor) -> Tensor:
    """|grad_x D(x)|^2 for each example (N,), differentiable in the critic's parameters.

    Its mean over real x is R1, over fake x it is R2.

    Arguments:
        values: D(x) (N,), each a function of its own row of x alone.
        x: (N, *), which requires a gradient.
    """
    (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)
