"""The transformer flow: proofs of every transform, the cache, and Tweedie's formula in closed form."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.utils.flop_counter import FlopCounterMode

from tests.flow_oracles import CONTEXT, contexts, normal, prove_bijection, prove_gradients, randomized, rng
from trilemma.core.errors import UsageError
from trilemma.flow.transformer import CausalAffine, Patched, denoise, token_shape, transformer_flow
from trilemma.flow.transforms import Rearranged, Transform
from trilemma.nets.causal import Cache, CausalTransformer


def causal(tokens: int, token_dim: int, context_dim: int = 0, reverse: bool = False) -> CausalAffine:
    sizes = {"width": 8, "depth": 2, "heads": 2, "context_dim": context_dim}
    return CausalAffine(tokens, token_dim, **sizes, reverse=reverse)


def stack(*shape: int, patch: int, context_dim: int) -> Transform:
    return transformer_flow(shape, patch=patch, blocks=2, width=8, depth=1, heads=2, context_dim=context_dim)


TRANSFORMS = {
    "tokens": ((4, 2), lambda c: causal(4, 2, c)),
    "tokens reversed": ((4, 2), lambda c: causal(4, 2, c, reverse=True)),
    "one token": ((1, 1), lambda c: causal(1, 1, c)),
    "vector": ((5,), lambda c: stack(5, patch=1, context_dim=c)),
    "vector in groups": ((6,), lambda c: stack(6, patch=2, context_dim=c)),
    "signal": ((2, 4), lambda c: stack(2, 4, patch=2, context_dim=c)),
    "picture": ((2, 2, 4), lambda c: stack(2, 2, 4, patch=2, context_dim=c)),
}


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_is_invertible_with_the_right_jacobian(name: str, context_dim: int) -> None:
    shape, make = TRANSFORMS[name]
    prove_bijection(randomized(make(context_dim)), 1.5 * normal(4, *shape, seed=1), contexts(context_dim, 4)[0])


@pytest.mark.parametrize("name", ["tokens", "tokens reversed", "picture"])
def test_gradients_of_value_and_ladj(name: str) -> None:
    shape, make = TRANSFORMS[name]
    prove_gradients(randomized(make(CONTEXT)), *shape)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_starts_as_the_identity(name: str) -> None:
    shape, make = TRANSFORMS[name]
    x, c = normal(3, *shape), normal(3, CONTEXT, seed=2)
    z, ladj = make(CONTEXT).double()(x, c)
    assert torch.equal(z, x)
    assert not ladj.any()


@pytest.mark.parametrize("reverse", [False, True])
def test_jacobian_is_triangular_over_tokens_and_diagonal_within_one(reverse: bool) -> None:
    transform = randomized(causal(4, 2, reverse=reverse))
    x = normal(1, 4, 2)
    matrix = jacobian(lambda v: transform(v)[0], x).reshape(4, 2, 4, 2).transpose(1, 2)
    for i in range(4):
        for j in range(4):
            before = j > i if reverse else j < i
            assert (matrix[i, j] != 0).all() if before else i == j or not matrix[i, j].any()
        assert not (matrix[i, i] - matrix[i, i].diag().diag()).any()


def test_the_first_token_is_mapped_too_and_the_context_reaches_every_token() -> None:
    transform, x = randomized(causal(4, 2, CONTEXT)), normal(3, 4, 2)
    a, b = (transform(x, normal(3, CONTEXT, seed=s))[0] for s in (1, 2))
    assert ((a - b).abs() > 1e-6).all()
    scale = (a[:, 0] - transform(x + 1.0, normal(3, CONTEXT, seed=1))[0][:, 0]).abs()
    assert ((scale - 1.0).abs() > 1e-3).all()


def test_cached_steps_equal_the_whole_pass_and_cost_no_more_than_it() -> None:
    net = randomized(CausalTransformer(9, 2, 3, width=16, depth=2, heads=4, context_dim=CONTEXT))
    assert isinstance(net, CausalTransformer)
    x, c = normal(3, 9, 2), normal(3, CONTEXT, seed=2)
    before = torch.cat([torch.zeros(3, 1, 2, dtype=torch.float64), x[:, :-1]], 1)
    outputs, flops, cache = [], [], Cache()
    for i in range(9):
        with FlopCounterMode(display=False) as counter:
            y, cache = net.step(before[:, i : i + 1], c, cache)
        outputs.append(y)
        flops.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        whole = net(x, c)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    # The context's own map is taken anew in every step: 2 N context_dim width operations.
    assert sum(flops) - 8 * 2 * 3 * CONTEXT * 16 <= counter.get_total_flops()
    rises = {b - a for a, b in itertools.pairwise(flops)}
    assert len(rises) == 1, "a step costs a constant and a term linear in the positions so far"


def test_inverse_equals_one_without_a_cache() -> None:
    transform = randomized(causal(5, 2, CONTEXT))
    z, c = normal(3, 5, 2), normal(3, CONTEXT, seed=2)
    x = torch.zeros_like(z)
    for i in range(5):
        mu, alpha = transform.net(x, c).chunk(2, 2)
        x[:, i] = (z * alpha.exp() + mu)[:, i].detach()
    torch.testing.assert_close(transform.inverse(z, c)[0], x, rtol=0, atol=1e-12)


def test_patches_are_blocks_of_pixels() -> None:
    """A change of the last block of a picture changes nothing but that block: it is the last token."""
    flow = Patched(randomized(causal(4, 4)), (1, 4, 4), 2)
    x = normal(1, 1, 4, 4)
    moved = x.clone()
    moved[..., 2:, 2:] += 1.0
    a, b = flow(x)[0], flow(moved)[0]
    assert torch.equal(a[..., :2, :], b[..., :2, :])
    assert torch.equal(a[..., 2:, :2], b[..., 2:, :2])
    assert (a[..., 2:, 2:] != b[..., 2:, 2:]).all()
    assert isinstance(flow, Rearranged)
    assert token_shape((3, 4, 6), 2) == (6, 12)


def test_what_cannot_work_is_refused() -> None:
    sizes = {"blocks": 2, "width": 8, "depth": 1, "heads": 2}
    with pytest.raises(UsageError, match=r"do not tile \(7, 4\)"):
        transformer_flow((3, 7, 4), patch=2, **sizes)
    with pytest.raises(UsageError, match="one token"):
        transformer_flow((2,), patch=2, **sizes)
    with pytest.raises(UsageError, match="3 heads"):
        transformer_flow((4,), patch=1, **{**sizes, "heads": 3})


@pytest.mark.parametrize(("direction", "largest"), [("forward", 1e18), ("inverse", 1e12)])
def test_extreme_inputs_in_single_precision_stay_finite(direction: str, largest: float) -> None:
    """Only beyond 1e19 do squares overflow; the inverse has factors up to 1e5 here."""
    transform = randomized(causal(5, 1), scale=1.0).float()
    values = torch.tensor([0.0, 1e-30, 1e3, -1e3, 1e8, -1e8, largest, -largest])
    x = values[torch.randint(len(values), (500, 5, 1), generator=rng(3))].requires_grad_()
    z, ladj = getattr(transform, direction)(x)
    assert z.isfinite().all()
    assert ladj.isfinite().all()
    (z.sum() + ladj.sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_half_precision_is_for_the_net_alone() -> None:
    transform, x = randomized(causal(4, 2)).float(), 100.0 * normal(8, 4, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        raw = transform.net(x)
        z, ladj = transform(x)
    assert raw.dtype == torch.bfloat16
    mu, alpha = raw.float().chunk(2, 2)
    assert torch.equal(z, (x - mu) * (-alpha).exp())
    assert torch.equal(ladj, -alpha.flatten(1).sum(1))


def test_learns_a_curved_density_to_its_entropy() -> None:
    """x_1 ~ N(0, 1), x_0 | x_1 ~ N(x_1^2 - 1, 0.2^2): -E log p comes within 0.05 nats of the entropy.

    One block in the order that does not suit needs a second one.
    """
    b = normal(6000)
    x = torch.stack([b.square() - 1.0 + 0.2 * normal(6000, seed=1), b], 1).float()
    torch.manual_seed(0)
    flow = transformer_flow((2,), patch=1, blocks=2, width=32, depth=1, heads=2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)

    def loss(x: Tensor) -> Tensor:
        z, ladj = flow(x)
        return (0.5 * (z.square() + math.log(2 * math.pi)).sum(1) - ladj).mean()

    for i in range(400):
        optimizer.zero_grad()
        loss(x[torch.randint(4000, (256,), generator=rng(i))]).backward()
        optimizer.step()
    entropy = math.log(2 * math.pi * math.e) + math.log(0.2)
    with torch.no_grad():
        held_out = loss(x[4000:]).item()
    stderr = 1.0 / math.sqrt(2000)  # the standard deviation of log N(x; 0, I_2) is 1
    assert entropy - 4 * stderr < held_out < entropy + 0.05 + 4 * stderr


# -- denoising ---------------------------------------------------------------------------------------------------


def test_denoising_a_gaussian_gives_its_posterior_mean() -> None:
    root = normal(3, 3)
    covariance, mean, sigma = root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64), normal(3, seed=1), 0.7
    noisy = covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(mean, noisy)
    y = 2.0 * normal(5, 3, seed=2)
    with torch.no_grad():
        got = denoise(density.log_prob, y, sigma)
    expected = mean + (y - mean) @ torch.linalg.solve(noisy, covariance)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert not got.requires_grad
    assert torch.equal(denoise(density.log_prob, y, 0.0), y)


def test_denoising_two_points_weighs_them_by_their_posterior() -> None:
    """x = -1 or 1: E[x|y] = tanh(y / sigma^2)."""
    y, sigma = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1), 0.5

    def log_density(y: Tensor) -> Tensor:
        logs = torch.cat([-0.5 * (y - c).square() / sigma**2 for c in (-1.0, 1.0)], 1)
        return torch.logsumexp(logs, 1)

    torch.testing.assert_close(denoise(log_density, y, sigma), (y / sigma**2).tanh(), rtol=0, atol=1e-12)
