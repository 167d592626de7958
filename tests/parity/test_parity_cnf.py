"""Continuous flows against torchdiffeq's `odeint_adjoint` and zuko, with the same weights and probes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.test_flow_continuous import model_of, normal
from trilemma.core.noise import Noise
from trilemma.flow.continuous import FFJORD, Motion, solve

F64 = torch.float64


class Theirs(nn.Module):
    """d(z, l, k, j)/dt as FFJORD's and RNODE's codes write it, on our network."""

    def __init__(self, model: FFJORD, probe: Tensor | None) -> None:
        super().__init__()
        self.net, self.model, self.probe = model.net, [model], probe

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            u, _ = self.net(z, torch.full((len(z),), 2.0 * math.pi * t.item(), dtype=F64))
            if self.probe is None:
                columns = [torch.autograd.grad(u[:, d].sum(), z, create_graph=True)[0] for d in range(2)]
                jacobian = torch.stack(columns, 1)
                trace, square = jacobian.diagonal(dim1=1, dim2=2).sum(1), jacobian.square().sum((1, 2))
            else:
                (product,) = torch.autograd.grad(u, z, self.probe, create_graph=True)
                trace, square = (product * self.probe).sum(1), product.square().sum(1)
        return u, trace, u.square().mean(1), square / 2


@pytest.mark.parametrize("exact", [True, False])
def test_values_and_gradients_are_those_of_odeint_adjoint(exact: bool) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    model = model_of(gradient="adjoint", tolerance=1e-9, scale=0.2)
    parameters = list(model.net.parameters())
    probe = None if exact else normal(4, 2, seed="v").sign()
    z = normal(4, 2).requires_grad_(True)
    ours = solve(Motion(partial(model._velocity, None), probe, True), z, parameters, model.config)
    start = (z, *(torch.zeros(4, dtype=F64) for _ in range(3)))
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    found = torchdiffeq.odeint_adjoint(Theirs(model, probe), start, ends, rtol=1e-9, atol=1e-9, method="dopri5")
    theirs = [part[-1] for part in found]
    cotangents = [normal(4, 2, seed="c"), *normal(3, 4, seed="d").unbind(0)]
    results = []
    for parts in (list(ours), theirs):
        total = sum((c * p).sum() for c, p in zip(cotangents, parts, strict=True))
        results.append([*parts, *torch.autograd.grad(total, (z, *parameters))])
    assert max(g.abs().max().item() for g in results[0][5:]) > 0.1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_density_is_that_of_zukos_free_form_flow() -> None:
    """The exact trace, on our network: codes, samples and log-determinants, each solver at its own 1e-9."""
    zuko = pytest.importorskip("zuko")
    model = model_of(scale=0.2)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return model._velocity(None, x, t.expand(len(x)))

    theirs = zuko.transforms.FreeFormJacobianTransform(velocity, atol=1e-9, rtol=1e-9)
    x = normal(5, 2)
    with torch.no_grad():
        z, ladj = theirs.call_and_ladj(x)
        base = -0.5 * (z.square() + math.log(2.0 * math.pi)).sum(1)
        score = model._log_prob(x, None, Noise("parity", n=5), trace="exact", rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(score.value, base + ladj, rtol=0, atol=1e-7)
        drawn = model._sample(Noise("parity", n=5), None, rtol=1e-9, atol=1e-9)
        start = model._prior(Noise("parity", n=5))
        torch.testing.assert_close(drawn, theirs.inv(start), rtol=0, atol=1e-7)
