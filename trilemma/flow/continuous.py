r"""Continuous normalizing flows: x is carried to z(1) ~ N(0, I) by an ordinary differential equation.

    dz/dt = u(z, t),   z(0) = x,      log p(x) = log N(z(1); 0, I) + int_0^1 div u dt
(instantaneous change of variables: Chen et al. 2018, arXiv:1806.07366; with the divergence estimated by one random
probe v per example and solve, E v . J v = tr J: FFJORD, Grathwohl et al. 2019, arXiv:1810.01367). The flow, its
likelihood and its samplers are the probability flow of `trilemma.diffusion` on the path from data at t = 0 to noise at
t = 1. Here that path begins at t = 0 itself, so that the likelihood is the density of the samples, and nothing else.

Two objectives train the same u:
    likelihood      -log p(x) / D + int_0^1 (k |u|^2 + j |v . J|^2) dt / D, J = du/dz; the integrals keep the paths
                    straight and cheap to solve (Finlay et al. 2020, arXiv:2002.02798)
    flow-matching   the loss of the diffusion family, without simulation (Lipman et al. 2023, arXiv:2210.02747)

The gradient of the likelihood, for a loss L with a = dL/dz and b = dL/dq of the integrals q = int f dt:
    backprop        through the S equal steps of a Runge-Kutta method: exact for what these compute
    checkpoint      the same numbers; every step is computed again on the way back, so that only S states are kept
    adjoint         da/dt = -d(a . u + b . f)/dz,   dL/dtheta = int_0^1 d(a . u + b . f)/dtheta dt,
                    solved backwards together with z: constant memory, exact up to the tolerance (Chen et al. 2018).
                    Forwards each example has its own steps. Backwards they are common to the batch, which shares its
                    parameters, and bear on z and a only (Kidger et al. 2021, arXiv:2009.09457).

The steps of backprop and checkpoint do not see their own error. Without the two integrals training finds fields that
these steps get wrong in its favour: four of rk4 claimed -3.31 nats on the checkerboard, more than its entropy 3.47
allows, where the flow had -3.90. With the weights 0.01 of Finlay et al. the two differed by 0.002 (-3.66). So pure
maximum likelihood, kinetic = jacobian = 0, is for the adjoint, whose steps are held to a tolerance.

Networks see t on the slow clock 2 pi t. The thousand radians of a denoiser's clock are lost between the steps of a
solver, which would then be free to follow one equation in training and another in sampling, and they make a smooth flow
expensive: after flow matching on two moons a likelihood took 925 evaluations by that clock and 97 by this one.
Data with levels are dequantized by the codec and mapped to R^D by the logit, for N(0, I) is never carried into a box:
so training, likelihood and samples are all of the same density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from trilemma.core.codec import Space
from trilemma.core.errors import UsageError
from trilemma.core.model import GenerativeModel, Losses, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.spec import Batch, DataSpec
from trilemma.diffusion import ode
from trilemma.diffusion.bound import gaussian_log_prob
from trilemma.diffusion.model import Diffusion
from trilemma.diffusion.schedule import Rectified, Spacing
from trilemma.diffusion.settings import DiffusionConfig
from trilemma.diffusion.solvers import RK45, Solver

CLOCK = 2.0 * math.pi
"""The time at t = 1 as networks see it."""

CODE_TOLERANCE = 1e-5
"""rtol and atol of the flow between data and codes."""

OF_LIKELIHOOD = ("gradient", "trace", "probe", "kinetic", "jacobian", "scheme", "solver_steps", "tolerance")
OF_MATCHING = ("weighting", "times", "stratified", "coupling")
"""Settings that the other objective has no use for."""


class FFJORDConfig(DiffusionConfig):
    """Settings of a continuous normalizing flow: those of a diffusion model that a flow has, and its own."""

    schedule: Literal["rectified"] = Field("rectified", description="the path between data and noise: rectified")
    prediction: Literal["velocity"] = Field("velocity", description="what the network predicts: velocity")
    variance: Literal["optimal"] = Field("optimal", description="of reverse steps, which a flow does not have")
    loss: Literal["weighted"] = Field("weighted", description="weighted")
    drop_condition: None = Field(None, description="null: guidance would not sample the model's own density")
    sampler: Literal["rk45", "heun", "euler"] = Field("rk45", description="solver: rk45, heun or euler")
    objective: Literal["likelihood", "flow-matching"] = Field("likelihood", description="likelihood or flow-matching")
    gradient: Literal["backprop", "checkpoint", "adjoint"] = Field(
        "backprop", description="of the likelihood: backprop, checkpoint (less memory) or adjoint (constant memory)"
    )
    trace: Literal["hutchinson", "exact"] = Field(
        "hutchinson", description="divergence in training: hutchinson (one probe) or exact, at D times the cost"
    )
    probe: Literal["rademacher", "gaussian"] = Field("rademacher", description="entries of the probe")
    kinetic: float = Field(0.01, ge=0, description="weight of int |u|^2 dt / D")
    jacobian: float = Field(0.01, ge=0, description="weight of int |du/dz|^2 dt / D")
    scheme: Literal["rk4", "dormand-prince"] = Field(
        "rk4", description="backprop, checkpoint: Runge-Kutta method of order 4 (rk4) or 5 (dormand-prince)"
    )
    solver_steps: int = Field(4, ge=1, description="backprop, checkpoint: steps from data to noise in training")
    tolerance: float = Field(1e-3, gt=0, description="adjoint: relative and absolute error per step in training")

    @model_validator(mode="after")
    def _has_an_effect(self) -> FFJORDConfig:
        likelihood = self.objective == "likelihood"
        self._refuse(OF_MATCHING if likelihood else OF_LIKELIHOOD, f"objective={self.objective}")
        adjoint = self.gradient == "adjoint"
        self._refuse(("scheme", "solver_steps") if adjoint else ("tolerance",), f"gradient={self.gradient}")
        return self

    def _refuse(self, names: Sequence[str], where: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on {where}")


class Path(Rectified):
    """z = (1 - t) x + t eps from t = 0 itself, with a slow clock."""

    grid: Spacing = "linspace"  # to t = 0, where nothing is left to be denoised

    def __init__(self) -> None:
        super().__init__(t_min=0.0)

    def label(self, t: Tensor) -> Tensor:
        return t * CLOCK


# -- training ---------------------------------------------------------------------------------------------------


class Motion:
    """u, and the integrands along z(t) (N, Q): div u, and, where it is `regularised`, |u|^2 / D and |J|^2 / D.

    It is differentiable where gradients are on.

    Arguments:
        velocity: (z (N, *), t (N,)) -> u (N, *).
        probe: v (N, *) of the estimates of div u and |J|^2; None for the exact ones.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor], probe: Tensor | None, regularised: bool) -> None:
        self.velocity, self.probe, self.regularised = velocity, probe, regularised

    def __call__(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = z if graph and z.requires_grad else z.detach().requires_grad_(True)
            u = self.velocity(x, t)
            probes = None if self.probe is None else self.probe.to(u).unsqueeze(0)
            divergence, square = ode.traces(u, x, probes, create_graph=graph)
        integrands = divergence
        if self.regularised:
            integrands = torch.cat([divergence, u.square().flatten(1).mean(1, keepdim=True), square / u[0].numel()], 1)
        return (u, integrands) if graph else (u.detach(), integrands.detach())


@contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Full precision, and attention written out: its fast kernels have no second derivatives."""
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


class _Recomputed(torch.autograd.Function):
    """function(z), computed again for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.function = function
        ctx.save_for_backward(z, *parameters)
        return function(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        z, *parameters = ctx.saved_tensors
        with torch.enable_grad(), twice_differentiable(z.device):
            z = z.detach().requires_grad_(True)
            found = torch.autograd.grad(ctx.function(z), (z, *parameters), cotangents, allow_unused=True)
        return (None, *found)


class _Adjoint(torch.autograd.Function):
    """z(1) and the integrals of a motion from z(0), with the gradient of the continuous adjoint."""

    @staticmethod
    def forward(ctx: Any, motion: Motion, tolerance: float, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        dims, shape = z[0].numel(), z.shape

        def field(y: Tensor, t: Tensor) -> Tensor:
            u, integrands = motion(y[:, :dims].reshape(shape), t)
            return torch.cat([u.flatten(1), integrands], 1)

        y = torch.cat([z.double().flatten(1), z.new_zeros(len(z), 3 if motion.regularised else 1).double()], 1)
        y = _solved(field, y, 0.0, 1.0, tolerance, dims)
        end = y[:, :dims].reshape(shape)
        ctx.motion, ctx.tolerance, ctx.dtype = motion, tolerance, z.dtype
        ctx.save_for_backward(end, *parameters)
        return end.to(z.dtype), y[:, dims:].to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        end, *parameters = ctx.saved_tensors
        weights, size = cotangents[1].double(), end.numel()
        sizes = [size, size, *(p.numel() for p in parameters)]

        def field(y: Tensor, t: Tensor) -> Tensor:
            z, a, *_ = torch.split(y[0], sizes)
            with torch.enable_grad():
                z = z.view_as(end).detach().requires_grad_(True)
                u, integrands = ctx.motion(z, t.expand(len(end)))
                power = (a.view_as(u) * u).sum() + (weights * integrands).sum()
                found = torch.autograd.grad(power, (z, *parameters), materialize_grads=True)
            return torch.cat([u.detach().flatten(), *(-g.double().flatten() for g in found)]).unsqueeze(0)

        y = torch.cat([end.flatten(), cotangents[0].double().flatten(), end.new_zeros(sum(sizes[2:]))])
        with twice_differentiable(end.device):
            y = _solved(field, y.unsqueeze(0), 1.0, 0.0, ctx.tolerance, 2 * size)
        _, start, *found = torch.split(y[0], sizes)
        gradients = (g.view_as(p).to(p.dtype) for g, p in zip(found, parameters, strict=True))
        return (None, None, start.view_as(end).to(ctx.dtype), *gradients)


def _solved(field: ode.Field, y: Tensor, start: float, end: float, tolerance: float, controlled: int) -> Tensor:
    try:
        return ode.rk45(field, y, start, end, rtol=tolerance, atol=tolerance, controlled=controlled)[0]
    except ArithmeticError as error:
        raise UsageError(
            f"gradient=adjoint: the flow cannot be solved to tolerance={tolerance:g}: "
            "give a larger one, or larger kinetic and jacobian"
        ) from error


class Solved(NamedTuple):
    """z(1) (N, *), and int div u dt, int |u|^2 dt / D and int |J|^2 dt / D (N,) each; None where not asked for."""

    z: Tensor
    ladj: Tensor
    kinetic: Tensor | None = None
    jacobian: Tensor | None = None


def solve(motion: Motion, z: Tensor, parameters: Sequence[Tensor], config: FFJORDConfig) -> Solved:
    """z (N, *) from t = 0 to 1, differentiable in z and in the `parameters` of the velocity.

    Raises:
        UsageError: the flow cannot be solved to the tolerance of the adjoint.
    """
    if config.gradient == "adjoint":
        z, total = _Adjoint.apply(motion, config.tolerance, z, *parameters)  # type: ignore[no-untyped-call]
    else:
        h, total = 1.0 / config.solver_steps, z.new_zeros(())
        for k in range(config.solver_steps):
            move = partial(ode.step, motion, t=k * h, h=h, tableau=ode.TABLEAUX[config.scheme])
            z, moved = move(z) if config.gradient == "backprop" else _Recomputed.apply(move, z, *parameters)  # type: ignore[no-untyped-call]
            total = total + moved
    return Solved(z, *total.unbind(1))


# -- the model --------------------------------------------------------------------------------------------------


class FFJORD(Diffusion):
    """A flow along a learned velocity, trained by maximum likelihood or by flow matching.

    It has the flow only: no stochastic samplers, guidance or bounds, and no pictures of a process that is not its own.
    """

    Config = FFJORDConfig
    config: FFJORDConfig
    space: ClassVar[Space] = "logit"
    default_drop = 0.0
    teaches = False
    bijective = True
    setting_help: ClassVar[Mapping[str, str]] = {
        **{key: Diffusion.setting_help[key] for key in ("steps", "trace", "probes", "rtol", "atol")},
        "sampler": "one of rk45, heun, euler",
        "grid": "their spacing: linspace, trailing, leading",
        "method": "ode",
    }
    _pictures = GenerativeModel._pictures  # type: ignore[assignment]

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A step of likelihood costs dozens of evaluations with second derivatives: small networks for vectors, and
        flow matching for all else."""
        if spec.kind in ("points", "table"):
            return {"width": 64, "depth": 2, "optimizer": {"lr": 3e-3, "betas": (0.9, 0.99)}}
        return {**super().sized_for(spec, settings), "objective": "flow-matching"}

    def build(self) -> None:
        super().build()
        self.schedule = Path()

    @property
    def flow_only(self) -> bool:
        return True

    def objectives(self) -> Sequence[Objective]:
        if self.config.objective == "flow-matching":
            return super().objectives()
        parameters, optimizer = self.net.parameters(), self.config.optimizer
        return (Objective("nll", parameters, self.loss, optimizer=optimizer, double_backward=True, validate=True),)

    def loss(self, batch: Batch, step: Step) -> Losses:
        """The configured objective, per dimension."""
        c = self.config
        if c.objective == "flow-matching":
            return super().loss(batch, step)
        x = self._training_data(batch, step.noise)
        end = self.solved(x, batch.condition, step.noise)
        log_p = gaussian_log_prob(end.z, torch.zeros_like(end.z), 1.0) + end.ladj
        nll = -log_p.mean() / self.codec.dims
        if end.kinetic is None or end.jacobian is None:
            return nll
        kinetic, jacobian = end.kinetic.mean(), end.jacobian.mean()
        logs = {"nll": nll.detach(), "kinetic": kinetic.detach(), "jacobian": jacobian.detach()}
        return nll + c.kinetic * kinetic + c.jacobian * jacobian, logs

    def solved(self, x: Tensor, condition: Tensor | None, noise: Noise) -> Solved:
        """x (N, *) in model space, carried to the noise as in training."""
        c, probe = self.config, None
        if c.trace == "hutchinson":
            gaussian = c.probe == "gaussian"
            probe = noise.normal_like(x) if gaussian else 2.0 * noise.bernoulli(torch.full_like(x, 0.5)) - 1.0
        motion = Motion(partial(self._velocity, condition), probe, c.kinetic > 0 or c.jacobian > 0)
        with twice_differentiable(x.device):
            return solve(motion, x, [p for p in self.net.parameters() if p.requires_grad], c)

    def _velocity(self, condition: Tensor | None, z: Tensor, t: Tensor) -> Tensor:
        return self.network(z, t, condition)[0].to(z.dtype)

    # -- the flow ------------------------------------------------------------------------------------------------

    def solver(self, sampler: str | None = None, **settings: Any) -> Solver:
        """The named solver of the flow, or the model's own."""
        solver = super().solver(sampler, **settings)
        if sampler not in (None, "rk45", "heun", "euler"):
            raise UsageError(
                f"sampler={sampler} follows a denoiser, and {self.name} has none: give rk45, heun or euler"
            )
        return solver

    def _sample(  # type: ignore[override]
        self,
        noise: Noise,
        condition: Tensor | None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        grid: Spacing | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> Tensor:
        """The flow from noise to data: rk45 to `rtol` and `atol`, or heun or euler at `steps` times of the `grid`."""
        return super()._sample(noise, condition, sampler=sampler, steps=steps, grid=grid, rtol=rtol, atol=atol)

    def evaluations(self, *, sampler: str | None = None, **settings: Any) -> int:
        """Of one sample; rk45 takes its own steps for each."""
        if (sampler or self.config.sampler) != "rk45":
            return super().evaluations(sampler=sampler, **settings)
        solver = self.solver("rk45", **settings)
        assert isinstance(solver, RK45)
        z = self._prior(Noise(0, "evaluations", n=1, device=self.device))
        denoiser = self.denoiser(next(iter(self.example_condition(1)), None))
        with self.inference():  # and one evaluation says that nothing is left to be denoised at t = 0
            return 1 + ode.flow(denoiser, z, 1.0, 0.0, rtol=solver.rtol, atol=solver.atol).evaluations

    def _encode(self, y: Tensor, condition: Tensor | None) -> Tensor:
        return self._flow(y, condition, 0.0, 1.0)

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self._flow(z, condition, 1.0, 0.0)

    def _flow(self, z: Tensor, condition: Tensor | None, start: float, end: float) -> Tensor:
        return ode.flow(self.denoiser(condition), z, start, end, rtol=CODE_TOLERANCE, atol=CODE_TOLERANCE).z

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(*self.codec.shape, dtype=self.dtype)
