r"""TarFlow: affine maps over tokens, autoregressive by a causal transformer (Zhai et al. 2024, arXiv:2412.06329).

x is a sequence of T tokens, patches of a picture or a signal, or groups of the entries of a vector:
    z_i = (x_i - mu_i) exp(-alpha_i),   (mu_i, alpha_i) = net(x_0, .., x_{i-1}; c),   ladj = -sum alpha.
z takes one pass of the net; x from z takes T steps, each with the keys and values of those before it.

Two choices differ from the paper.
- There the first token of a block passes unchanged. Here its mu and alpha are a learned function of the context, as
  those of all tokens are: a flow of one block then already fits each conditional p(x_i | x_<i), the first included.
- The net ends in a layer norm. So |alpha_i - b| <= |w| sqrt(width) for the weights w, b of the last layer, whatever x
  is: outliers cannot make the exponential overflow, up to 1e19, where their squares do. No fixed bound is put on
  alpha beyond that, because narrow densities need large ones and weights can grow to it.

Numbers within one token are mapped alike in one block, given the tokens before; the order of the tokens turns round
from block to block, and through other tokens they come to depend on each other. So there must be other tokens.

On pictures the paper trains on y = x + sigma n, n ~ N(0, I), and removes the noise of samples by Tweedie's formula
(Efron 2011), E[x | y] = y + sigma^2 grad log p(y). The density of such a model is that of y; only with uniform
dequantization in place of n is it a bound on the probability of pictures with levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise
from trilemma.flow.transforms import Compose, Rearranged, Result, Transform, sum_dims
from trilemma.nets.causal import Cache, CausalTransformer
from trilemma.nets.dit import patchify, unpatchify


class CausalAffine(Transform):
    """One block, on x (N, tokens, token_dim). It starts as the identity.

    The affine map itself is computed in the dtype of x, also where autocast runs the net in half precision. There,
    however, one pass and T steps of the net round differently, and the inverse is only as good as that.

    Arguments:
        tokens, token_dim: shape of an example.
        width, depth, heads: of the transformer; heads divide the width.
        context_dim: size of the context, 0 for none.
        reverse: the last token is the first in the order.
    """

    def __init__(
        self,
        tokens: int,
        token_dim: int,
        *,
        width: int,
        depth: int,
        heads: int,
        context_dim: int = 0,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "depth": depth, "heads": heads, "context_dim": context_dim}
        self.net = CausalTransformer(tokens, token_dim, 2 * token_dim, **sizes)
        self.reverse = reverse

    def _ordered(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.reverse else x

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        x = self._ordered(x)
        mu, alpha = self.net(x, context).to(x.dtype).chunk(2, 2)
        return self._ordered((x - mu) * (-alpha).exp()), -sum_dims(alpha)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        tokens: list[Tensor] = []
        alphas: list[Tensor] = []
        cache: Cache = []
        x = torch.zeros_like(z[:, :1])
        for token in torch.split(self._ordered(z), 1, 1):
            raw, cache = self.net.step(x, context, cache)
            mu, alpha = raw.to(z.dtype).chunk(2, 2)
            x = token * alpha.exp() + mu
            tokens.append(x)
            alphas.append(alpha)
        return self._ordered(torch.cat(tokens, 1)), sum_dims(torch.cat(alphas, 1))


def token_shape(shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    """(tokens, token_dim) of examples (C, *space) or vectors (D,) in patches with sides of `patch`."""
    channels, space = (1, shape) if len(shape) == 1 else (shape[0], shape[1:])
    if any(side % patch for side in space):
        raise UsageError(
            f"patches of side {patch} do not tile {space}: choose a `patch` that divides {math.gcd(*space)}"
        )
    return math.prod(space) // patch ** len(space), channels * patch ** len(space)


class Patched(Rearranged):
    """`inner` on the tokens (N, tokens, token_dim) of x (N, *shape): the patches row by row.

    Arguments:
        shape: (C, *space), or (D,) for vectors.
        patch: side of a patch, the same along every dimension, which divides the sides of the space.
    """

    def __init__(self, inner: Transform, shape: tuple[int, ...], patch: int) -> None:
        full = (1, *shape) if len(shape) == 1 else shape
        super().__init__(
            inner,
            lambda x: patchify(x.reshape(-1, *full), patch),
            lambda tokens: unpatchify(tokens, patch, full[1:]).reshape(-1, *shape),
        )


def transformer_flow(
    shape: tuple[int, ...], *, patch: int, blocks: int, width: int, depth: int, heads: int, context_dim: int = 0
) -> Transform:
    """The stack of blocks of alternating order on x (N, *shape), pictures, signals or vectors.

    Arguments:
        shape, patch: of `Patched`.
        blocks: number of causal affine maps.
        width, depth, heads, context_dim: of each, see `CausalAffine`.

    Raises:
        UsageError: the patches do not tile x, or make a single token of several numbers, which would stay
            independent of each other; or `heads` does not divide `width`.
    """
    tokens, token_dim = token_shape(shape, patch)
    if tokens == 1 and token_dim > 1:
        raise UsageError(
            f"patches of side {patch} make one token of {shape}, with nothing to depend on: take a smaller one"
        )
    if width % heads:
        raise UsageError(f"a width of {width} is not a multiple of {heads} heads: change `width` or `heads`")
    sizes = {"width": width, "depth": depth, "heads": heads, "context_dim": context_dim}
    steps = (CausalAffine(tokens, token_dim, **sizes, reverse=index % 2 == 1) for index in range(blocks))
    return Patched(Compose(steps), shape, patch)


def denoise(log_density: Callable[[Tensor], Tensor], y: Tensor, sigma: float) -> Tensor:
    """E[x | y] for y = x + sigma n, n ~ N(0, I), from the density of y; one step of Tweedie's formula (Efron 2011).

    Arguments:
        log_density: y (N, *) -> log p(y) (N,), each from its own example alone.
        y: (N, *).
        sigma: standard deviation of the noise, in the units of y.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (score,) = torch.autograd.grad(log_density(y).sum(), y)
    return y.detach() + sigma**2 * score
