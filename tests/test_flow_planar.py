"""Planar, radial and Sylvester flows: exact inverses for all parameters, Jacobians, gradients, and their limits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.flow_oracles import CONTEXT, contexts, normal, prove_bijection, randomized
from trilemma.flow.planar import Planar, Radial, Sylvester, contract, expand, implicit_root, invert_tanh_map
from trilemma.flow.transforms import Compose, Transform

# Name -> number of dimensions and constructor, given the size of the context.
TRANSFORMS: dict[str, tuple[int, Callable[[int], Transform]]] = {
    "planar": (4, lambda c: Planar(4, c)),
    "planar one": (1, lambda c: Planar(1, c)),
    "radial": (4, lambda c: Radial(4, c)),
    "radial one": (1, lambda c: Radial(1, c)),
    "sylvester": (5, lambda c: Sylvester(5, 3, reflections=2, context_dim=c)),
    "sylvester full": (3, lambda c: Sylvester(3, 3, context_dim=c)),
    "sylvester one": (1, lambda c: Sylvester(1, 1, reflections=1, context_dim=c)),
    "composed": (3, lambda c: Compose([Planar(3, c), Radial(3, c), Sylvester(3, 2, context_dim=c), Planar(3, c)])),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_low_rank_flow_is_invertible_with_the_right_jacobian(name: str, context_dim: int, seed: int) -> None:
    dims, make = TRANSFORMS[name]
    transform = randomized(make(context_dim), seed=seed, scale=1.0)
    prove_bijection(transform, 1.5 * normal(4, dims, seed=1), contexts(context_dim, 4)[0])


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_gradients_of_both_directions(name: str, context_dim: int) -> None:
    """With respect to x, the context and the parameters: the root's derivatives are those of its equation."""
    dims, make = TRANSFORMS[name]
    transform = randomized(make(context_dim))
    x = normal(2, dims, seed=1).requires_grad_()
    c = normal(2, context_dim, seed=2).requires_grad_() if context_dim else None
    inputs = (x, *transform.parameters(), *(() if c is None else (c,)))
    assert torch.autograd.gradcheck(lambda *_: transform(x, c), inputs)
    assert torch.autograd.gradcheck(lambda *_: transform.inverse(x, c), inputs)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_starts_as_the_identity_whatever_the_context(name: str) -> None:
    dims, make = TRANSFORMS[name]
    transform, x = make(CONTEXT).double(), normal(5, dims)
    z, ladj = transform(x, normal(5, CONTEXT, seed=1))
    torch.testing.assert_close(z, x, rtol=0, atol=1e-6)  # constants that were rounded to single precision
    torch.testing.assert_close(ladj, torch.zeros_like(ladj), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_context_belongs_to_its_own_example(name: str) -> None:
    dims, make = TRANSFORMS[name]
    transform, x, c = randomized(make(CONTEXT)), normal(4, dims), normal(4, CONTEXT, seed=1)
    z, ladj = transform(x, c)
    for i in range(4):
        alone, own = transform(x[i : i + 1], c[i : i + 1])
        torch.testing.assert_close(z[i : i + 1], alone, rtol=0, atol=1e-13)
        torch.testing.assert_close(ladj[i : i + 1], own, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_invertible_for_extreme_parameters_and_inputs(name: str) -> None:
    """Products of raw parameters of size 40 bring p to -1 in all digits, and to 80; inputs reach 1e6.

    There dz/dx may be as good as 0, so x returns to fewer digits; z must be met to its precision.
    """
    dims, make = TRANSFORMS[name]
    for seed in range(20):
        transform = randomized(make(0), seed=seed, scale=2.0 if name == "sylvester" else 5.0)
        z = torch.cat(
            [normal(50, dims, seed=seed), 1e6 * normal(5, dims, seed=seed + 1), torch.zeros(1, dims).double()]
        )
        x, ladj = transform.inverse(z)
        assert x.isfinite().all()
        assert ladj.isfinite().all()
        torch.testing.assert_close(transform(x)[0], z, rtol=1e-12, atol=1e-10)


def test_formulas_of_the_papers() -> None:
    x = normal(3, 2)
    planar = randomized(Planar(2))
    w, u, b, p = planar._parameters_for(None)
    torch.testing.assert_close((w * u).sum(1), p, rtol=0, atol=1e-14)
    expected = x + u * torch.tanh(x @ w[0] + b)[:, None]
    torch.testing.assert_close(planar(x)[0], expected, rtol=0, atol=1e-14)
    center, alpha, beta = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([0.7]).double(), torch.tensor([-0.5])
    r = (x - center).norm(dim=1, keepdim=True)
    torch.testing.assert_close(expand(x, center, alpha, beta)[0], x - 0.5 / (0.7 + r) * (x - center))
    sylvester = randomized(Sylvester(4, 2))
    q, outer, inner, b, _ = (t[0] for t in sylvester._parameters_for(None))
    y = normal(3, 4)
    torch.testing.assert_close(q.T @ q, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-13)
    assert not outer.tril(-1).any()
    assert not inner.tril(-1).any()
    assert (outer.diagonal() * inner.diagonal() > -1.0).all()
    expected = torch.stack([v + q @ outer @ torch.tanh(inner @ q.T @ v + b) for v in y])
    torch.testing.assert_close(sylvester(y)[0], expected, rtol=0, atol=1e-13)


def test_radial_map_fixes_its_centre_and_keeps_directions() -> None:
    center = torch.tensor([[1.0, 2.0, 3.0]]).double()
    alpha, beta = torch.tensor([0.5]).double(), torch.tensor([3.0]).double()
    z, ladj = expand(center, center, alpha, beta)
    assert torch.equal(z, center)
    torch.testing.assert_close(ladj, torch.full((1,), 3.0).double() * torch.tensor(7.0).double().log())
    assert torch.equal(contract(center, center, alpha, beta)[0], center)
    x = center.clone().requires_grad_()
    expand(x, center, alpha, beta)[1].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scalar_equation_is_met_to_the_precision_of_its_terms(dtype: torch.dtype) -> None:
    y = torch.cat([3.0 * normal(2000), 1e4 * normal(2000, seed=1), torch.zeros(1).double()]).to(dtype)
    for p in (-1.0 + 1e-6, -0.9, 0.0, 2.0, 1e5):
        c = torch.tensor(p, dtype=dtype)
        a = invert_tanh_map(y, c)
        residual = (a + c * a.tanh() - y).abs()
        size = y.abs() + a.abs() + abs(p)  # a rounding error of tanh alone is p eps
        assert (residual <= 8.0 * torch.finfo(dtype).eps * size).all()


def test_root_of_a_function_that_newton_alone_misses() -> None:
    """atan has slopes so small far out that Newton's steps leave every bracket."""
    y = torch.tensor([-1.5, -0.1, 0.0, 1.2, 1.57], dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.atan(), 1.0 / (1.0 + x.square())

    bracket = torch.full_like(y, 1e8)
    x = implicit_root(function, y, -bracket, bracket)
    torch.testing.assert_close(x, y.tan(), rtol=1e-11, atol=1e-12)
    (slope,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(slope, 1.0 + y.detach().tan().square(), rtol=1e-9, atol=0)
