"""The small networks: what they start as, that the context reaches every block, that examples stay apart."""

import pytest
import torch
from torch import Tensor

from trilemma.core.spec import ConditionSpec
from trilemma.nets.conditioning import ConditionEmbedding
from trilemma.nets.mlp import ResidualMLP


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter a random value, so that zero initialisation hides nothing."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) / max(1, p.shape[-1]) ** 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_matches_the_formula() -> None:
    net = ResidualMLP(3, 2, width=5, depth=2, context_dim=4).double()
    randomize(net, 1)
    x, c = normal(7, 3), normal(7, 4, seed=1)
    silu = lambda t: t * torch.sigmoid(t)  # noqa: E731
    p = dict(net.named_parameters())
    h = torch.cat([x, c], 1) @ p["input.weight"].T + p["input.bias"]
    for k in range(2):
        b = f"blocks.{k}."
        r = silu(h) @ p[b + "first.weight"].T + p[b + "first.bias"] + c @ p[b + "context.weight"].T
        h = h + silu(r) @ p[b + "second.weight"].T + p[b + "second.bias"]
    expected = silu(h) @ p["output.weight"].T + p["output.bias"]
    torch.testing.assert_close(net(x, c), expected, rtol=1e-12, atol=1e-12)


def test_blocks_start_as_the_identity_and_the_output_at_zero() -> None:
    torch.manual_seed(0)
    deep, x = ResidualMLP(3, 2, width=5, depth=4).double(), normal(7, 3)
    shallow = ResidualMLP(3, 2, width=5, depth=0).double()
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if not k.startswith("blocks")})
    assert torch.equal(deep(x), shallow(x))
    assert not ResidualMLP(3, 2, width=5, zero_init=True).double()(x).any()


def test_examples_do_not_mix() -> None:
    net = ResidualMLP(3, 2, width=5, context_dim=1).double()
    randomize(net, 2)
    x, c = normal(6, 3), normal(6, 1, seed=1)
    torch.testing.assert_close(net(x, c)[2:3], net(x[2:3], c[2:3]), rtol=1e-12, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, c).sum(1), x)
    assert not (jacobian.abs().sum(-1) - torch.diag(jacobian.abs().sum(-1).diagonal())).any()


def test_a_missing_or_surplus_context_is_refused() -> None:
    with pytest.raises(AssertionError, match="context_dim is 4"):
        ResidualMLP(3, 2, context_dim=4)(torch.zeros(1, 3))
    with pytest.raises(AssertionError, match="context_dim is 0"):
        ResidualMLP(3, 2)(torch.zeros(1, 3), torch.zeros(1, 4))


def test_condition_embedding() -> None:
    none = ConditionEmbedding(None, 8)
    assert none.dim == 0
    assert none(None) is None
    assert none(torch.tensor([1, 2])) is None

    classes = ConditionEmbedding(ConditionSpec(kind="class", names=("a", "b", "c")), 8)
    rows = classes(torch.tensor([2, 0, 2]))
    weight = next(classes.parameters())
    assert classes.dim == 8
    assert torch.equal(rows, weight[[2, 0, 2]])

    vectors = ConditionEmbedding(ConditionSpec(kind="vector", names=("age", "height")), 8).double()
    a, b = normal(1, 2), normal(1, 2, seed=1)
    mid = vectors(0.25 * a + 0.75 * b)
    torch.testing.assert_close(mid, 0.25 * vectors(a) + 0.75 * vectors(b), rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError, match="got no condition"):
        vectors(None)
