"""Masked networks see what they may see, and drawing x step by step inverts the direct pass."""

import pytest
import torch
from torch import Tensor

from tests.test_flow import CONTEXT, SPLINE, determinants, normal, randomized
from trilemma.flow.autoregressive import Autoregressive
from trilemma.nets.masked import MaskedMLP


def network(dims: int, context_dim: int, width: int = 11, size: int = SPLINE.size) -> MaskedMLP:
    net = randomized(MaskedMLP(dims, size, width=width, depth=2, context_dim=context_dim))
    assert isinstance(net, MaskedMLP)
    return net


@pytest.mark.parametrize(("dims", "width"), [(1, 5), (2, 4), (5, 11), (7, 3)])
def test_outputs_see_exactly_the_inputs_before(dims: int, width: int) -> None:
    """d out_i / d x_j is zero for j >= i; for j < i it is not, unless there are too few units to carry it."""
    net = network(dims, 0, width, size=2)
    rows = torch.autograd.functional.jacobian(lambda v: net(v.unsqueeze(0))[0], normal(dims))
    sees = rows.view(2, dims, dims).abs().amax(0)
    assert not sees.triu().any()
    if width >= dims:
        assert (sees.tril(-1) + torch.ones(dims, dims).triu() > 0).all()


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("dims", [1, 2, 5, 13])
def test_step_by_step_equals_the_direct_pass(dims: int, context_dim: int) -> None:
    net, n = network(dims, context_dim), 6
    context = normal(n, context_dim, seed=2) if context_dim else None
    x, seen = normal(n, dims, seed=3), []

    def choose(i: int, outputs: Tensor) -> Tensor:
        seen.append(outputs)
        return x[:, i]

    assert torch.equal(net.sequential(choose, n, context), x)
    direct = net(x, context).view(n, net.size, dims)
    torch.testing.assert_close(torch.stack(seen, 2), direct, rtol=0, atol=1e-13)


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("dims", [1, 2, 6])
def test_autoregressive_is_invertible_with_the_right_jacobian(dims: int, context_dim: int) -> None:
    flow = Autoregressive(network(dims, context_dim), SPLINE).eval()
    x = 1.5 * normal(4, dims, seed=1)
    one = normal(1, context_dim, seed=2) if context_dim else None
    context = None if one is None else one.expand(4, -1)
    z, ladj = flow(x, context)
    back, ladj_inverse = flow.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj_inverse, -ladj, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj, determinants(lambda v: flow(v, one)[0], x), rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj_inverse, determinants(lambda v: flow.inverse(v, one)[0], z), rtol=0, atol=1e-8)


def test_gradients_in_both_directions() -> None:
    flow = Autoregressive(network(3, CONTEXT), SPLINE)
    x, c = normal(2, 3, seed=1).requires_grad_(), normal(2, CONTEXT, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: flow(x, c), (x, c))
    assert torch.autograd.gradcheck(lambda x, c: flow.inverse(x, c), (x, c))
