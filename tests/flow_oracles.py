"""What every transform of a flow must satisfy, and random ones to try it on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from trilemma.flow.transforms import Transform

CONTEXT = 3


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def randomized(module: nn.Module, seed: int = 0, scale: float = 0.4) -> nn.Module:
    """In float64, every parameter random: nothing is tested at the identity it starts as."""
    module.double()
    g = rng(seed)
    for p in module.parameters():
        fan_in = p.shape[-1] if p.ndim == 2 else 1
        p.data = scale * torch.randn(p.shape, generator=g, dtype=torch.float64) / fan_in**0.5
    return module.eval()


def determinants(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """log |det| of the Jacobian of each example's function, by automatic differentiation; (N,)."""
    matrices = [jacobian(lambda v: function(v.unsqueeze(0))[0], row) for row in x]  # fewer tricks, fewer doubts
    d = x[0].numel()
    return torch.stack([torch.linalg.slogdet(m.reshape(d, d)).logabsdet for m in matrices])


def contexts(size: int, n: int) -> tuple[Tensor | None, Tensor | None]:
    """A random context (1, size), and the same n times; None and None for size 0."""
    one = normal(1, size, seed=2) if size else None
    return one, None if one is None else one.expand(n, -1)


def prove_bijection(transform: Transform, x: Tensor, context: Tensor | None = None, atol: float = 1e-10) -> None:
    """Round trips both ways, and both log-determinants against automatic differentiation.

    Arguments:
        context: (1, *), the same for all of x.
    """
    shared = None if context is None else context.expand(len(x), *context.shape[1:])
    with torch.no_grad():
        z, ladj = transform(x, shared)
        back, ladj_inverse = transform.inverse(z, shared)
        again, _ = transform(transform.inverse(x, shared)[0], shared)
    assert z.shape == x.shape
    assert ladj.shape == (len(x),)
    assert not ladj.requires_grad
    assert (z - x).abs().max() > 1e-3
    torch.testing.assert_close(back, x, rtol=0, atol=atol)
    torch.testing.assert_close(again, x, rtol=0, atol=atol)
    torch.testing.assert_close(ladj_inverse, -ladj, rtol=0, atol=10 * atol)
    torch.testing.assert_close(ladj, determinants(lambda v: transform(v, context)[0], x), rtol=0, atol=10 * atol)
    of_inverse = determinants(lambda v: transform.inverse(v, context)[0], z)
    torch.testing.assert_close(ladj_inverse, of_inverse, rtol=0, atol=100 * atol)


def prove_gradients(transform: Transform, *shape: int, context_dim: int = CONTEXT) -> None:
    """Those of value and ladj in both directions, by finite differences, for x (2, *shape) and the context."""
    x = normal(2, *shape, seed=1).requires_grad_()
    inputs = (x, normal(2, context_dim, seed=2).requires_grad_()) if context_dim else (x,)
    assert torch.autograd.gradcheck(lambda *v: transform(*v), inputs)
    assert torch.autograd.gradcheck(lambda *v: transform.inverse(*v), inputs)
