"""Masked networks see what they may see, and drawing x step by step inverts the direct pass."""

import pytest
import torch
from torch import Tensor

from tests.flow_oracles import CONTEXT, contexts, normal, prove_bijection, prove_gradients, randomized
from tests.test_flow import SPLINE
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
    prove_bijection(flow, 1.5 * normal(4, dims, seed=1), contexts(context_dim, 4)[0])


def test_gradients_in_both_directions() -> None:
    flow = Autoregressive(network(3, CONTEXT), SPLINE)
    prove_gradients(flow, 3)
