"""Linear flows: inverses, determinants and gradients of every parametrisation, and what each matrix must be."""

from collections.abc import Callable

import pytest
import torch

from tests.flow_oracles import determinants, normal, randomized, rng
from trilemma.flow.linear import Dense, Householder, LULinear, Permute, product_of_reflections
from trilemma.flow.transforms import Transform

ORDER = torch.tensor([2, 0, 3, 1])
# Name -> shape of an example and constructor.
TRANSFORMS: dict[str, tuple[tuple[int, ...], Callable[[], Transform]]] = {
    "permute vector": ((4,), lambda: Permute(ORDER)),
    "permute picture": ((4, 1, 2), lambda: Permute(ORDER)),
    "dense vector": ((4,), lambda: Dense(4)),
    "dense signal": ((3, 2), lambda: Dense(3)),
    "dense picture": ((3, 2, 2), lambda: Dense(3)),
    "householder one": ((5,), lambda: Householder(5, 1)),
    "householder vector": ((4,), lambda: Householder(4, 3)),
    "householder more than channels": ((3,), lambda: Householder(3, 5)),
    "householder picture": ((3, 2, 2), lambda: Householder(3, 2)),
    "lu with bias": ((4,), lambda: LULinear(ORDER, bias=True)),
    "lu picture with bias": ((4, 2, 1), lambda: LULinear(ORDER, bias=True)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_linear_map_is_invertible_with_the_right_jacobian(name: str) -> None:
    shape, make = TRANSFORMS[name]
    transform = randomized(make(), scale=1.0)
    x = 3.0 * normal(4, *shape, seed=1)
    z, ladj = transform(x)
    back, ladj_inverse = transform.inverse(z)
    assert z.shape == x.shape
    assert (z - x).abs().max() > 1e-3
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(transform(transform.inverse(x)[0])[0], x, rtol=0, atol=1e-11)
    torch.testing.assert_close(ladj, determinants(lambda v: transform(v)[0], x), rtol=0, atol=1e-11)
    torch.testing.assert_close(ladj_inverse, determinants(lambda v: transform.inverse(v)[0], z), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "permute" not in n])
def test_gradients_with_respect_to_x_and_parameters(name: str) -> None:
    shape, make = TRANSFORMS[name]
    transform = randomized(make(), scale=1.0)
    x, parameters = normal(2, *shape, seed=1).requires_grad_(), tuple(transform.parameters())

    def there(x: torch.Tensor, *_: torch.Tensor) -> object:
        return transform(x)

    def back(x: torch.Tensor, *_: torch.Tensor) -> object:
        return transform.inverse(x)

    assert torch.autograd.gradcheck(there, (x, *parameters))
    assert torch.autograd.gradcheck(back, (x, *parameters))


def test_householder_is_the_product_of_its_reflections() -> None:
    """H_1 H_2 ... H_K, one after the other, and orthogonal whatever the vectors' lengths."""
    vectors = torch.cat([normal(3, 5), 1e-3 * normal(1, 5, seed=1), 1e3 * normal(1, 5, seed=2)])
    eye = torch.eye(5, dtype=torch.float64)
    product = eye
    for v in vectors:
        product = product @ (eye - 2.0 * torch.outer(v, v) / v.square().sum())
    q = product_of_reflections(vectors)
    torch.testing.assert_close(q, product, rtol=0, atol=1e-13)
    torch.testing.assert_close(q.T @ q, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.linalg.det(q).item(), -1.0, rtol=0, atol=1e-13)
    batch = product_of_reflections(torch.stack([vectors, vectors.flip(0)]))
    torch.testing.assert_close(batch[0], q, rtol=0, atol=1e-13)
    torch.testing.assert_close(batch[1], q.T, rtol=0, atol=1e-13)


def test_dense_starts_as_a_rotation() -> None:
    weight = Dense(6).double().weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_bias_is_added_last() -> None:
    plain, biased = (randomized(LULinear(ORDER, bias=b)) for b in (False, True))
    biased.load_state_dict({**plain.state_dict(), "bias": torch.arange(4.0, dtype=torch.float64)})
    x = normal(3, 4)
    expected = plain(x)[0] + torch.arange(4.0, dtype=torch.float64)
    torch.testing.assert_close(biased(x)[0], expected, rtol=0, atol=0)


def test_permutation_is_that_of_indexing() -> None:
    x = torch.rand(2, 4, 3, generator=rng(0))
    assert torch.equal(Permute(ORDER)(x)[0], x[:, ORDER])
