r"""The probability flow as an adaptive ODE: samples, codes, and likelihoods by the change of variables.

    dz/dt = u(z, t),        d log p_t(z_t) / dt = -div u(z_t, t)
    log p(z_0) = log p_T(z_T) + int_0^T div u dt           (Chen et al. 2018, arXiv:1806.07366; Song et al. 2021,
                                                            arXiv:2011.13456; Grathwohl et al. 2019, arXiv:1810.01367)
    div u      = E[v . (du/dz) v],   v of independent signs (Hutchinson 1990): unbiased; or exact, at D times the cost

The solver is Dormand & Prince's pair of orders 5 and 4 (1980). Every sample has its own time, step and error, so the
result does not depend on the others of its batch; a step is taken where
    sqrt(mean_d (e_d / (atol + rtol max(|z_d|, |z'_d|)))^2) <= 1.
Steps of a size given beforehand (`step`) are those of the same pair's order 5, or of the classical order 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.diffusion.bound import gaussian_log_prob
from trilemma.diffusion.denoiser import Denoiser

MAX_STEPS = 10_000

_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Butcher's tableau): S nodes, rows of S - 1 stages, S weights."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUX: Mapping[str, Tableau] = {
    "rk4": Tableau((0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "dormand-prince": Tableau(_NODES[:-1], _STAGES[:-1], _STAGES[-1]),
}
"""Methods of orders 4 and 5, by name."""


class Flowed(NamedTuple):
    """z (N, *) at the end, int div u dt (N, probes) along the way, and evaluations of u (the same for all samples)."""

    z: Tensor
    divergence: Tensor
    evaluations: int


Field = Callable[[Tensor, Tensor], Tensor]
"""(y (N, D), t (N,)) -> dy/dt (N, D), all float64."""

Rates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z (N, *), t (N,) float64) -> dz/dt (N, *) and integrands (N, Q), which z does not depend on."""


def step(rates: Rates, z: Tensor, t: float, h: float, tableau: Tableau) -> tuple[Tensor, Tensor]:
    """z (N, *) from t to t + h in one step, and the integrals (N, Q) on the way."""
    slopes: list[Tensor] = []
    total = z.new_zeros(())
    for node, row, weight in zip(tableau.nodes, ((), *tableau.rows), tableau.weights, strict=True):
        stage = sum(((h * w) * k for w, k in zip(row, slopes, strict=True) if w), start=z)
        slope, integrand = rates(stage, torch.full((len(z),), t + node * h, dtype=torch.float64, device=z.device))
        slopes.append(slope)
        total = total + (h * weight) * integrand
    z = sum(((h * w) * k for w, k in zip(tableau.weights, slopes, strict=True) if w), start=z)
    return z, total


def rk45(
    field: Field, y: Tensor, start: float, end: float, *, rtol: float, atol: float, controlled: int | None = None
) -> tuple[Tensor, int]:
    """y (N, D) float64 from `start` to `end`; and the number of evaluations.

    Arguments:
        controlled: the first so many entries of a row are held to the tolerances, all by default. Integrals on which
            the others do not depend may be left out (Kidger et al. 2021, arXiv:2009.09457).

    Raises:
        ArithmeticError: a step becomes too small, or there are too many.
    """
    sign, total = math.copysign(1.0, end - start), abs(end - start)
    done = y.new_zeros(len(y))  # time travelled by each sample
    h = y.new_full((len(y),), 0.01 * total)
    first, evaluations = field(y, done * sign + start), 1
    for _ in range(MAX_STEPS):
        active = done < total
        if not active.any():
            return y, evaluations
        h = torch.minimum(h, total - done)
        slopes = [first]
        for node, row in zip(_NODES[1:], _STAGES, strict=True):
            move = sum(w * k for w, k in zip(row, slopes, strict=True) if w)
            stage = y + (sign * h).unsqueeze(1) * move
            slopes.append(field(stage, (done + node * h) * sign + start))
        evaluations += len(_STAGES)
        error = h.unsqueeze(1) * sum(w * k for w, k in zip(_ERROR, slopes, strict=True) if w)
        scale = atol + rtol * torch.maximum(y.abs(), stage.abs())
        ratio = (error / scale)[:, :controlled].square().mean(1).sqrt()
        if not ratio.isfinite().all():
            raise ArithmeticError("the probability flow is not finite")
        accept = active & (ratio <= 1.0)
        y = torch.where(accept.unsqueeze(1), stage, y)
        first = torch.where(accept.unsqueeze(1), slopes[-1], first)  # first same as last
        left = total - done - h
        done = torch.where(accept, torch.where(left <= 1e-12 * total, total, done + h), done)
        h = h * (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
        if bool((active & (h < 1e-12 * total) & (done < total)).any()):
            raise ArithmeticError("the probability flow is too stiff for these tolerances: give larger rtol and atol")
    raise ArithmeticError(f"the probability flow took more than {MAX_STEPS} steps: give larger rtol and atol")


def flow(
    denoiser: Denoiser,
    z: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    probes: Tensor | None = None,
    exact: bool = False,
) -> Flowed:
    """The flow of z (N, *) from time `start` to `end`, computed in float64.

    Arguments:
        probes: (P, N, *) signs, whose divergence estimates are integrated with z.
        exact: integrate the exact divergence: D derivatives for each evaluation.

    Raises:
        UsageError: the flow cannot be solved to these tolerances.
    """
    shape, dims = z.shape, math.prod(z.shape[1:])
    kept = 0 if probes is None and not exact else 1 if exact else len(probes)  # type: ignore[arg-type]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return denoiser.predict(x, t, "velocity")

    def field(y: Tensor, t: Tensor) -> Tensor:
        x = y[:, :dims].reshape(shape)
        if not kept:
            return velocity(x, t).flatten(1)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = velocity(x, t)
            divergence, _ = traces(u, x, None if exact else probes)
        return torch.cat([u.detach().flatten(1), divergence], 1)

    y = torch.cat([z.double().flatten(1), z.new_zeros(len(z), kept, dtype=torch.float64)], 1)
    try:
        y, evaluations = rk45(field, y, start, end, rtol=rtol, atol=atol)
    except ArithmeticError as error:
        raise UsageError(str(error)) from error
    return Flowed(y[:, :dims].reshape(shape).to(z.dtype), y[:, dims:], evaluations)


def traces(u: Tensor, x: Tensor, probes: Tensor | None = None, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """tr J = div u and tr J J^T = |J|^2 of J = du/dx, example by example.

    Arguments:
        probes: (P, N, *): v . J v and |v . J|^2 (N, P) for each v; None: the exact ones (N, 1), row by row.
        create_graph: the result is to be differentiated.
    """
    if probes is not None:
        found = []
        for v in probes:
            (product,) = torch.autograd.grad(u, x, v, retain_graph=True, create_graph=create_graph)
            found.append(((product * v).flatten(1).sum(1), product.square().flatten(1).sum(1)))
        return torch.stack([a for a, _ in found], 1), torch.stack([b for _, b in found], 1)
    flat = u.flatten(1)
    divergence = square = torch.zeros(len(x), 1, dtype=u.dtype, device=u.device)
    for d in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, d].sum(), x, retain_graph=True, create_graph=create_graph)
        row = row.flatten(1)
        divergence, square = divergence + row[:, d : d + 1], square + row.square().sum(1, keepdim=True)
    return divergence, square


def log_prob(
    denoiser: Denoiser, y: Tensor, noise: Noise, levels: int | None, probes: int | None, rtol: float, atol: float
) -> Score:
    """log p(y) by the flow from t_min to t_max, for y (N, *) in model space.

    The flow has the law of z at t_min, and x = z / alpha there, up to the noise that is left.

    Arguments:
        levels: y lies on the centres of so many cells of [-1, 1], and is dequantized: with u uniform in its cell,
            log P(y) >= E log p(y + u) + log |cell|.
        probes: random signs for the divergence; None for the exact one.

    Raises:
        UsageError: the flow cannot be solved to these tolerances.
    """
    schedule, dims, ladj = denoiser.schedule, y[0].numel(), 0.0
    if levels is not None:
        cell = 2.0 / levels
        y, ladj = y + cell * (noise.uniform_like(y) - 0.5), dims * math.log(cell)
    signs = None
    if probes is not None:
        half = torch.full_like(y, 0.5, dtype=torch.float64)
        signs = 2.0 * torch.stack([noise.bernoulli(half) for _ in range(probes)]) - 1.0
    alpha = float(schedule.alpha(schedule.times[0]))
    span = (schedule.t_min, schedule.t_max)
    end = flow(denoiser, alpha * y.double(), *span, rtol=rtol, atol=atol, probes=signs, exact=probes is None)
    prior = gaussian_log_prob(end.z, torch.zeros_like(end.z), schedule.prior_std**2)
    value = prior + end.divergence.mean(1) + ladj + dims * math.log(alpha)
    stderr = end.divergence.std(1, correction=1) / math.sqrt(probes) if probes is not None and probes > 1 else None
    trace = "exact trace" if probes is None else f"trace by {probes} probe{'s' if probes > 1 else ''}"
    dequantized = "" if levels is None else ", dequantized uniformly"
    return Score(
        value,
        "lower_bound" if levels is not None else "exact" if probes is None else "estimate",
        stderr,
        method=f"probability flow, {trace}, rtol {rtol:g}, atol {atol:g}{dequantized}",
        evaluations=end.evaluations,
    )
