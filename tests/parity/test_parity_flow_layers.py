"""Linear, low-rank and residual layers and whole flows against nflows and normflows: same weights, both directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.flow_oracles import normal, randomized
from tests.parity.test_parity_flows import BINS, BOUND, Adapted, both_ways, by_dimension, same, transforms
from trilemma.core.spec import DataSpec
from trilemma.flow.coupling import Coupling
from trilemma.flow.linear import ActNorm, Dense, Householder, LULinear
from trilemma.flow.model import Flow
from trilemma.flow.planar import ONE, Planar, Radial
from trilemma.flow.residual import Residual
from trilemma.flow.transforms import Compose, Rearranged
from trilemma.nets.lipschitz import lipschitz_net

__all__ = ["transforms"]  # a fixture


# -- linear maps --------------------------------------------------------------------------------------------------


def copy_lu(ours: LULinear, theirs: nn.Module) -> None:
    rows, columns = torch.tril_indices(len(ours.lower), len(ours.lower), -1)
    with torch.no_grad():
        theirs.lower_entries.copy_(ours.lower[rows, columns])  # type: ignore[operator]
        rows, columns = torch.triu_indices(len(ours.lower), len(ours.lower), 1)
        theirs.upper_entries.copy_(ours.upper[rows, columns])  # type: ignore[operator]
        diagonal = ours.log_diagonal.exp() - theirs.eps  # type: ignore[operator]
        theirs.unconstrained_upper_diag.copy_(diagonal.expm1().log())  # type: ignore[operator]


def test_lu_linear_is_nflows(transforms: object) -> None:
    ours = LULinear(torch.tensor([2, 0, 3, 1]), bias=True)
    randomized(ours)
    lu = transforms.LULinear(4).double()  # type: ignore[attr-defined]
    copy_lu(ours, lu)
    with torch.no_grad():
        lu.bias.copy_(ours.bias)
    permutation = transforms.Permutation(torch.tensor([2, 0, 3, 1]))  # type: ignore[attr-defined]
    theirs = transforms.CompositeTransform([permutation, lu])  # type: ignore[attr-defined]
    both_ways(ours, theirs, normal(6, 4))
    for transform in (ours, theirs):
        z, ladj = transform(normal(6, 4))
        (z.pow(3).sum() + ladj.sum()).backward()
    rows, columns = torch.tril_indices(4, 4, -1)
    torch.testing.assert_close(ours.lower.grad[rows, columns], lu.lower_entries.grad, rtol=1e-9, atol=1e-9)  # type: ignore[index]
    rows, columns = torch.triu_indices(4, 4, 1)
    torch.testing.assert_close(ours.upper.grad[rows, columns], lu.upper_entries.grad, rtol=1e-9, atol=1e-9)  # type: ignore[index]
    slope = torch.sigmoid(lu.unconstrained_upper_diag) / ours.log_diagonal.exp()
    torch.testing.assert_close(ours.log_diagonal.grad * slope, lu.unconstrained_upper_diag.grad, rtol=1e-9, atol=1e-9)


def test_dense_linear_is_nflows(transforms: object) -> None:
    """Their inverse calls what PyTorch has no longer; the matrix of it still works."""
    ours = Dense(4)
    randomized(ours, scale=1.0)
    theirs = transforms.NaiveLinear(4).double()  # type: ignore[attr-defined]
    theirs._weight, theirs.bias = ours.weight, ours.bias
    parameters = [ours.weight, ours.bias]
    z = same(lambda x: ours(x), lambda x: theirs(x), normal(6, 4), parameters)

    def inverse(y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - theirs.bias) @ theirs.weight_inverse().T, -theirs.logabsdet().expand(len(y))

    same(lambda y: ours.inverse(y), inverse, z, parameters)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_reflections_are_nflows(transforms: object, count: int) -> None:
    """nflows has the first reflection first, ours last."""
    ours = Householder(4, count).double()
    theirs = transforms.HouseholderSequence(4, count).double()  # type: ignore[attr-defined]
    theirs.q_vectors.data = ours.vectors.detach().flip(0).clone()
    x, cotangent = normal(6, 4), normal(6, 4, seed=1)
    z = ours(x)[0]
    torch.testing.assert_close(z, theirs(x)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.inverse(z)[0], theirs.inverse(z)[0], rtol=1e-12, atol=1e-12)
    for result in (z, theirs(x)[0]):
        (result * cotangent).sum().backward()
    torch.testing.assert_close(ours.vectors.grad.flip(0), theirs.q_vectors.grad, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(4,), (3, 2, 5)])
def test_activation_norm_starts_as_nflows(transforms: object, shape: tuple[int, ...]) -> None:
    """nflows divides the sum of squares by n - 1, ours by n."""
    x = 3.0 * normal(7, *shape) + 1.0
    ours = ActNorm(shape[0]).double()
    theirs = transforms.ActNorm(shape[0]).double()  # type: ignore[attr-defined]
    ours.initialize(x)
    theirs(x)
    n = x.numel() / shape[0]
    with torch.no_grad():
        ours.log_scale += 0.5 * math.log((n - 1.0) / n)
    both_ways(ours, theirs, normal(6, *shape))


# -- low rank, and residual ---------------------------------------------------------------------------------------


def test_planar_is_normflows() -> None:
    """Both have w.u = softplus(.) - 1; ours is the identity at u = 0, so it shifts the argument."""
    peer = pytest.importorskip("normflows").flows.Planar
    ours, theirs = Planar(4), peer((4,)).double()
    randomized(ours, scale=1.0)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        w, u, b = ours.parameters_of_map(None)
        weights = {"w": w, "u": u + ONE * w / w.square().sum(), "b": b.view(1)}
        result: tuple[Tensor, Tensor] = torch.func.functional_call(theirs, weights, (x,))
        return result

    z = same(lambda x: ours(x), function, normal(6, 4), list(ours.parameters()))
    x, ladj = ours.inverse(z)
    torch.testing.assert_close(function(x), (z, -ladj), rtol=1e-9, atol=1e-9)


def test_radial_is_normflows() -> None:
    """normflows: beta = softplus(b) - |alpha|."""
    peer = pytest.importorskip("normflows").flows.Radial
    ours, theirs = Radial(4), peer((4,)).double()
    randomized(ours, scale=1.0)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        center, raw_alpha, raw_beta = ours.parameters_of_map(None)
        alpha = softplus(raw_alpha.view(1))
        beta = (alpha * softplus(raw_beta.view(1) + ONE)).expm1().log()
        result: tuple[Tensor, Tensor] = torch.func.functional_call(
            theirs, {"z_0": center, "alpha": alpha, "beta": beta}, (x,)
        )
        return result

    z = same(lambda x: ours(x), function, normal(6, 4), list(ours.parameters()))
    x, ladj = ours.inverse(z)
    torch.testing.assert_close(function(x), (z, -ladj), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dims", "terms"), [(2, None), (3, 60)])
def test_residual_determinant_is_normflows(dims: int, terms: int | None) -> None:
    """Theirs is exact in two dimensions; else a power series with exact traces, of which 0.6^60 is left out."""
    peer = pytest.importorskip("normflows.flows.residual").iResBlock
    net = lipschitz_net((dims,), width=7, depth=2, coefficient=0.6)
    randomized(net, scale=2.0)
    ours = Residual(net, "exact").eval()
    theirs = peer(net, exact_trace=True, n_power_series=terms).double()
    theirs.training = terms is not None
    parameters = [p for p in net.parameters() if p.ndim]

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z, minus_ladj = theirs(x, 0.0)
        return z, -minus_ladj.view(-1)

    z = same(lambda x: ours(x), function, normal(6, dims), parameters)
    torch.testing.assert_close(ours.inverse(z)[0], theirs.inverse(z), rtol=0, atol=1e-2)  # its tolerance
    torch.testing.assert_close(function(ours.inverse(z)[0])[0], z, rtol=0, atol=1e-9)


# -- whole flows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "seed"), [(5, 0), (8, 1)])
def test_density_of_a_flow_is_nflows(transforms: object, dims: int, seed: int) -> None:
    """RQ-NSF (C): permutation, LU-decomposed map and spline coupling, three times."""
    flows, distributions = pytest.importorskip("nflows.flows"), pytest.importorskip("nflows.distributions")
    model = Flow(DataSpec(kind="points", shape=(dims,)), steps=3, width=12, bins=BINS, bound=BOUND, norm="none")
    model.initialize(seed)
    randomized(model, seed)
    assert isinstance(model.transform, Rearranged)
    assert isinstance(model.transform.inner, Compose)
    parts: list[nn.Module] = []
    for part in model.transform.inner.transforms:
        if isinstance(part, LULinear):
            lu = transforms.LULinear(dims).double()  # type: ignore[attr-defined]
            copy_lu(part, lu)
            permutation = part.inverse_permutation.argsort()
            parts += [transforms.Permutation(permutation), lu]  # type: ignore[attr-defined]
        else:
            assert isinstance(part, Coupling)
            mask = torch.ones(dims).index_fill(0, part.passed, -1.0)
            net = Adapted(part.net, by_dimension)
            parts.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(  # type: ignore[attr-defined]
                    mask, lambda a, b, net=net: net, num_bins=BINS, tails="linear", tail_bound=BOUND
                )
            )
    theirs = flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([dims]))  # type: ignore[attr-defined]
    parameters = [p for m in model.modules() if isinstance(m, Coupling) for p in m.parameters()]

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return model.transform(x)[0], model._density(x, None, None)

    x = 1.5 * normal(40, dims, seed=seed + 10)
    same(ours, lambda v: (theirs.transform_to_noise(v), theirs.log_prob(v)), x, parameters)
    assert (x.abs() > BOUND).any()
    back = theirs._transform.inverse(model.transform(x)[0])[0]
    torch.testing.assert_close(back, model._decode(model.transform(x)[0], None), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
