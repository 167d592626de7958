r"""Samplers as stateless steps z_t -> z_s, s < t, over a grid of times (`trilemma.diffusion.grid`).

With xhat = E[x | z_t], epshat its noise, u = alpha' xhat + sigma' epshat and h = (lambda_s - lambda_t) / 2 > 0:

    ancestral   z_s ~ p(z_s | z_t)                                              (Ho et al. 2020, arXiv:2006.11239)
    ddim        z_s = alpha_s xhat + sqrt(sigma_s^2 - w^2) epshat + w n,  w^2 = eta^2 small
                                                                                (Song et al. 2021, arXiv:2010.02502)
    sde         dz = (u - g^2 score / 2) dt + g dw, Euler-Maruyama   (Anderson 1982; Song et al. 2021, arXiv:2011.13456)
    euler, heun dz = u dt, the probability flow: orders 1 and 2
    rk45        the same, Dormand-Prince with error control                      (`trilemma.diffusion.ode`)
    edm         heun after a little noise is added, t -> that > t     (Karras et al. 2022, arXiv:2206.00364, alg. 2)
    dpm++       z_s = sigma_s / sigma_t z_t + alpha_s (1 - e^-h) X, X extrapolates xhat to the middle of the step:
                order 2, or with the SDE's noise                                 (Lu et al. 2022, arXiv:2211.01095)
    exponential the same linear part, exact for an xhat polynomial in lambda through the last k values: order k
                                                                                 (Zhang & Chen 2023, arXiv:2204.13902)
    langevin    at each level z <- z + d score + sqrt(2 d) n, d = 2 (snr sigma)^2  (Song & Ermon 2019, arXiv:1907.05600)
    pc          an ancestral step, then such corrections                         (Song et al. 2021)
    renoise     z_s = alpha_s xhat + sigma_s n   (Song et al. 2023, arXiv:2303.01469, alg. 1)

Every sampler ends with xhat at the last time: the last step adds no noise.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from trilemma.core.config import Config, validate
from trilemma.core.errors import UsageError, unknown_name
from trilemma.diffusion.denoiser import Denoiser
from trilemma.diffusion.prediction import convert
from trilemma.diffusion.schedule import Spacing

Normal = Callable[[], Tensor]
"""Returns a fresh N(0, I) of z's shape and dtype."""


class Evaluation(NamedTuple):
    """What a step leaves to the next: lambda / 2 and sigma of its time, its z, and the xhat that it saw."""

    level: float
    sigma: float
    z: Tensor
    x: Tensor


History = tuple[Evaluation, ...]
"""Earlier evaluations, newest first."""


class Solver(Config):
    """A step and its settings. `grid` is the spacing of times that it needs; None leaves it to the schedule."""

    grid: ClassVar[Spacing | None] = None

    @property
    def is_random(self) -> bool:
        """Whether steps add noise: these follow the reverse SDE, the others the flow."""
        return False

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        """From z_t (N, *) to z_s, and what the next step may want to know of this one."""
        raise NotImplementedError

    def evaluations(self, n: int) -> int:
        """Evaluations of the denoiser for a grid of n times."""
        return n


class RandomSolver(Solver):
    """A solver whose every step adds noise."""

    @property
    def is_random(self) -> bool:
        return True


class Ancestral(RandomSolver):
    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        mean, var = denoiser.posterior(z, t, s)
        return mean + (var.sqrt() if isinstance(var, Tensor) else math.sqrt(var)) * normal(), past


class DDIM(Solver):
    eta: float = Field(0.0, ge=0, description="0: a map; 1: as much noise as the small ancestral variance")

    @property
    def is_random(self) -> bool:
        return self.eta > 0

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        schedule, x = denoiser.schedule, denoiser.predict(z, t)
        eps = convert(x, "x0", "eps", z, t, schedule)
        noise = float(schedule.sigma(s)) ** 2
        share = self.eta**2 * -math.expm1(float(schedule.log_snr(t) - schedule.log_snr(s)))  # at most 1 for eta <= 1
        if share > 1.0:
            raise UsageError(
                f"eta={self.eta:g} asks for more noise than there is at t={float(s):g}: give a smaller one"
            )
        z = float(schedule.alpha(s)) * x + math.sqrt(noise * (1.0 - share)) * eps
        return (z + math.sqrt(noise * share) * normal() if self.eta else z), past


class Renoise(RandomSolver):
    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        schedule = denoiser.schedule
        return float(schedule.alpha(s)) * denoiser.predict(z, t) + float(schedule.sigma(s)) * normal(), past


class EulerMaruyama(RandomSolver):
    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        schedule, dt = denoiser.schedule, float(t - s)
        g2 = float(schedule.diffusion(t)) ** 2
        if not math.isfinite(g2):
            raise UsageError(
                f"the reverse SDE is singular at t={float(t):g}, where no signal is left: solve the flow (sampler=heun)"
            )
        x = denoiser.predict(z, t)
        velocity = convert(x, "x0", "velocity", z, t, schedule)
        score = convert(x, "x0", "score", z, t, schedule)
        return z - dt * (velocity - 0.5 * g2 * score) + math.sqrt(g2 * dt) * normal(), past


class Euler(Solver):
    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        return z + float(s - t) * denoiser.predict(z, t, "velocity"), past


class Heun(Solver):
    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        dt = float(s - t)
        first = denoiser.predict(z, t, "velocity")
        second = denoiser.predict(z + dt * first, s, "velocity")
        return z + 0.5 * dt * (first + second), past

    def evaluations(self, n: int) -> int:
        return 2 * n - 1


class EDMSampler(Heun):
    grid: ClassVar[Spacing | None] = "karras"
    churn: float = Field(0.2, gt=0, le=0.4143, description="gamma: sigma / alpha grows by this share (S_churn / steps)")
    churn_from: float = Field(0.05, ge=0, description="S_tmin: smallest sigma / alpha at which noise is added")
    churn_to: float = Field(50.0, gt=0, description="S_tmax: the largest")
    churn_noise: float = Field(1.003, gt=0, description="S_noise: standard deviation of that noise")

    @model_validator(mode="after")
    def _ordered(self) -> EDMSampler:
        if self.churn_from >= self.churn_to:
            raise ValueError("churn_from is not below churn_to, so that no noise is ever added")
        return self

    @property
    def is_random(self) -> bool:
        return True

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        schedule = denoiser.schedule
        level = math.exp(-0.5 * float(schedule.log_snr(t)))
        if self.churn_from <= level <= self.churn_to:
            more = schedule.time(schedule.log_snr(t) - 2.0 * math.log1p(self.churn)).clamp(max=schedule.t_max)
            if more > t:
                scale = float(schedule.alpha(more) / schedule.alpha(t))
                z = scale * z + self.churn_noise * math.sqrt(float(schedule.back(more, t).large)) * normal()
                t = more
        return super().step(denoiser, z, t, s, normal, past)


class DPMpp(Solver):
    """DPM-Solver++(2M), of the flow or (stochastic) of the SDE. Its first step is of order 1."""

    grid: ClassVar[Spacing | None] = "log-snr"
    stochastic: bool = Field(False, description="solve the reverse SDE in place of the flow")

    @property
    def is_random(self) -> bool:
        return self.stochastic

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        schedule, x = denoiser.schedule, denoiser.predict(z, t)
        here, there = 0.5 * float(schedule.log_snr(t)), 0.5 * float(schedule.log_snr(s))
        now = Evaluation(here, float(schedule.sigma(t)), z, x)
        h, ahead = there - here, x
        if past and math.isfinite(h):
            before, x_before = past[0].level, past[0].x
            ahead = x + (0.5 * h / (here - before)) * (x - x_before) if math.isfinite(before) else x
        alpha, ratio = float(schedule.alpha(s)), float(schedule.sigma(s) / schedule.sigma(t))
        decay = math.exp(-h) if self.stochastic else 1.0
        z = ratio * decay * z - alpha * math.expm1(-h * (2.0 if self.stochastic else 1.0)) * ahead
        if self.stochastic:
            z = z + float(schedule.sigma(s)) * math.sqrt(-math.expm1(-2.0 * h)) * normal()
        return z, (now,)


class Exponential(Solver):
    """Adams-Bashforth in lambda: the integral of e^lambda xhat(lambda) with xhat a polynomial through past values.

    The corrector takes the last step again with the xhat found at its end as a further value, which costs no evaluation
    (UniPC: Zhao et al. 2023, arXiv:2302.04867).
    """

    grid: ClassVar[Spacing | None] = "log-snr"
    order: Annotated[int, Field(ge=1, le=4, description="values used, and the order of convergence")] = 3
    corrector: bool = Field(False, description="take each step again with the value at its end, for one order more")

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        schedule, x = denoiser.schedule, denoiser.predict(z, t)
        here, there = 0.5 * float(schedule.log_snr(t)), 0.5 * float(schedule.log_snr(s))
        sigma = float(schedule.sigma(t))
        past = tuple(p for p in past if math.isfinite(p.level))
        if self.corrector and past:
            seen = (past[0], Evaluation(here, sigma, z, x), *past[1 : self.order])
            z = self._integrate(seen, here, sigma, float(schedule.alpha(t)))
        now = Evaluation(here, sigma, z, x)
        known = (now, *past)[: self.order if math.isfinite(here) else 1]
        return self._integrate(known, there, float(schedule.sigma(s)), float(schedule.alpha(s))), known

    def _integrate(self, known: History, level: float, sigma: float, alpha: float) -> Tensor:
        """z at a level, from that of the first evaluation, with xhat a polynomial through all of them."""
        z = (sigma / known[0].sigma) * known[0].z
        for seen, weight in zip(known, _exponential_weights([k.level for k in known], level), strict=True):
            z = z + alpha * weight * seen.x
        return z


def _exponential_weights(nodes: list[float], end: float) -> list[float]:
    """w_i with sum_i w_i f(n_i) = int_{n_0}^{end} e^(x - end) f(x) dx for polynomials f through the nodes."""
    if len(nodes) == 1:
        return [-math.expm1(nodes[0] - end)]
    h = end - nodes[0]
    scaled = torch.tensor([(n - nodes[0]) / h for n in nodes], dtype=torch.float64)
    # Moments int_0^1 y^j h e^(h (y - 1)) dy by quadrature: their recursion loses its digits for small h.
    y, w = _legendre()
    powers = torch.arange(len(nodes), dtype=torch.float64)
    moments = ((w * h * (h * (y - 1.0)).exp()).unsqueeze(1) * y.unsqueeze(1) ** powers).sum(0)
    vandermonde = scaled.unsqueeze(0) ** powers.unsqueeze(1)
    weights: list[float] = torch.linalg.solve(vandermonde, moments).tolist()
    return weights


@cache
def _legendre() -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1); found once, for every step of a sampler asks."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    return torch.from_numpy(0.5 * (nodes + 1.0)), torch.from_numpy(0.5 * weights)


def langevin(denoiser: Denoiser, z: Tensor, t: Tensor, normal: Normal, snr: float) -> Tensor:
    """One step of Langevin dynamics at level t.

    The step is d = 2 (snr sigma)^2: that of Song et al. 2021 with the lengths of score and noise at their
    expectation, so that no sample's step depends on the others'.
    """
    d = 2.0 * (snr * float(denoiser.schedule.sigma(t))) ** 2
    return z + d * denoiser.predict(z, t, "score") + math.sqrt(2.0 * d) * normal()


class Langevin(RandomSolver):
    """Annealed: between levels z is only rescaled, by alpha_s / alpha_t."""

    corrections: int = Field(10, ge=1, description="Langevin steps at each level")
    snr: float = Field(0.2, gt=0, description="step size: 2 (snr sigma)^2")

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        if float(denoiser.schedule.alpha(t)) == 0.0:
            raise UsageError("annealed Langevin dynamics needs a signal at every level: give sampler=ddim")
        for _ in range(self.corrections):
            z = langevin(denoiser, z, t, normal, self.snr)
        return float(denoiser.schedule.alpha(s) / denoiser.schedule.alpha(t)) * z, past

    def evaluations(self, n: int) -> int:
        return self.corrections * (n - 1) + 1


class PredictorCorrector(RandomSolver):
    corrections: int = Field(1, ge=1, description="Langevin steps after each ancestral step")
    snr: float = Field(0.16, gt=0, description="step size: 2 (snr sigma)^2")

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        z, past = Ancestral().step(denoiser, z, t, s, normal, past)
        for _ in range(self.corrections):
            z = langevin(denoiser, z, s, normal, self.snr)
        return z, past

    def evaluations(self, n: int) -> int:
        return (1 + self.corrections) * (n - 1) + 1


class RK45(Solver):
    rtol: float = Field(1e-4, gt=0, description="tolerated relative error per step, of each sample")
    atol: float = Field(1e-4, gt=0, description="tolerated absolute error per step, of each sample")

    def step(
        self, denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, normal: Normal, past: History = ()
    ) -> tuple[Tensor, History]:
        from trilemma.diffusion.ode import flow

        return flow(denoiser, z, float(t), float(s), rtol=self.rtol, atol=self.atol).z, past


SOLVERS: dict[str, type[Solver]] = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "sde": EulerMaruyama,
    "euler": Euler,
    "heun": Heun,
    "rk45": RK45,
    "edm": EDMSampler,
    "dpm++": DPMpp,
    "exponential": Exponential,
    "langevin": Langevin,
    "pc": PredictorCorrector,
    "renoise": Renoise,
}


def make_solver(name: str, **settings: Any) -> Solver:
    """The named solver.

    Raises:
        UsageError: no such solver, or a setting that it does not have.
    """
    if name not in SOLVERS:
        raise unknown_name("sampler", name, list(SOLVERS))
    for key in settings.keys() - SOLVERS[name].model_fields.keys():
        owners = [other for other, solver in SOLVERS.items() if key in solver.model_fields]
        if owners:
            raise UsageError(f"{key} has no effect on sampler={name}: it is a setting of {', '.join(owners)}")
    return validate(SOLVERS[name], settings, f"sampler {name}")


def setting_help() -> dict[str, str]:
    """What the settings of the solvers mean, whose they are, and their defaults."""
    found: dict[str, list[str]] = {}
    for name, solver in SOLVERS.items():
        for key, field in solver.model_fields.items():
            found.setdefault(key, []).append(f"{name}: {field.description}, {field.default} by default")
    return {key: "; ".join(texts) for key, texts in found.items()}


def states(denoiser: Denoiser, solver: Solver, times: Tensor, z: Tensor, normal: Normal) -> Iterator[Tensor]:
    """z (N, *) at each of the falling `times`, the first as it is given."""
    past: History = ()
    yield z
    for t, s in itertools.pairwise(times):
        z, past = solver.step(denoiser, z, t, s, normal, past)
        yield z


def sample(denoiser: Denoiser, solver: Solver, times: Tensor, z: Tensor, normal: Normal) -> Tensor:
    """From z (N, *) at times[0] to x (N, *), through the falling `times`."""
    (last,) = deque(states(denoiser, solver, times, z, normal), maxlen=1)
    return denoiser.predict(last, times[-1])
