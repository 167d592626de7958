r"""What keeps a discriminator D smooth.

R1 = E_{x ~ data} |grad_x D(x)|^2 and R2 = E_{x ~ G} |grad_x D(x)|^2 make the game converge locally (Mescheder, Geiger &
Nowozin 2018, arXiv:1801.04406; with the relativistic loss Huang et al. 2024, arXiv:2501.05441). They enter with weight
gamma / 2.

The gradient penalty pulls D towards slope 1 between the two distributions, where the best 1-Lipschitz D has it
(Gulrajani et al. 2017, arXiv:1704.00028):
    E (|grad D(x^)| - 1)^2,   x^ = u x + (1 - u) G(z),   u ~ U(0, 1), one number per pair.

Consistency: E (D(x) - D(T x))^2 with a random transform T, for real and generated x (Zhang et al. 2020,
arXiv:1910.12027; Zhao et al. 2021, arXiv:2002.04724).

Weight clipping puts each weight back into [-c, c] after a step, a crude bound of the Lipschitz constant (Arjovsky et
al. 2017, arXiv:1701.07875). Spectral normalisation divides each weight matrix by its largest singular value, followed
by a step of the power iteration per pass (Miyato et al. 2018, arXiv:1802.05957); as a kernel (O, I, *space) it is the
matrix (O, I space) of that paper, not the norm of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


def squared_gradient(values: Tensor, x: Tensor) -> Tensor:
    """|grad_x D(x)|^2 for each example (N,), differentiable in the critic's parameters.

    Its mean over real x is R1, over generated x it is R2.

    Arguments:
        values: D(x) (N,), each a function of its own row of x alone.
        x: (N, *), which requires a gradient.
    """
    return squared_gradients(values.sum(), [x])[0]


def squared_gradients(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same for several inputs (N, *) at once, in one backward pass of the sum of all values."""
    gradients = torch.autograd.grad(total, list(inputs), create_graph=True)
    return [g.square().flatten(1).sum(1) for g in gradients]


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """E (|grad D(x^)| - 1)^2, a scalar.

    Arguments:
        critic: x (N, *) -> (N,).
        real, fake: pairs (N, *).
        u: uniform draws (N,).
    """
    x = torch.lerp(fake, real, u.view(-1, *(1,) * (real.ndim - 1))).requires_grad_()
    # The root has no derivative at 0, where a critic may start.
    norm = (squared_gradient(critic(x), x) + 1e-12).sqrt()
    return (norm - 1.0).square().mean()


@torch.no_grad()
def clip_weights(parameters: Iterable[nn.Parameter], bound: float) -> None:
    """Put every parameter back into [-bound, bound], in place."""
    weights: list[Tensor] = list(parameters)
    torch._foreach_clamp_min_(weights, -bound)
    torch._foreach_clamp_max_(weights, bound)


def spectral_normalize(network: nn.Module) -> None:
    """Divide the weights of all linear, convolution and embedding layers by their largest singular value.

    They start orthogonal (Brock et al. 2019, arXiv:1809.11096): a weight that starts at zero has no direction.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for layer in [m for m in network.modules() if isinstance(m, (*kinds, nn.Embedding))]:
        nn.init.orthogonal_(layer.weight)
        parametrizations.spectral_norm(layer)
