r"""Diffusion models: learn to undo noise.

A schedule says how z_t = alpha(t) x + sigma(t) eps is noised (`trilemma.diffusion.schedule`), a network predicts x,
eps, v, the score or the velocity from z_t (`prediction`), an objective says at which times and with which weights it is
trained (`training`), a denoiser turns the prediction into a reverse step (`denoiser`), a solver takes the steps
(`solvers`). The likelihood is the bound of the reverse chain (`bound`) or that of the probability flow (`ode`). The
models of the literature are choices of these parts (`presets`).

Besides the weighted error there are two objectives that are bounds:
    bound     -log p(x) <= L_T + L_0 + sum of L_{t-1}, one of whose terms is drawn for each x; in continuous time the
              sum is an integral, and a schedule may be learned with the network (Kingma et al. 2021, arXiv:2107.00630)
    hybrid    the weighted error + T L_{t-1} / 1000, which moves the variance only (Nichol & Dhariwal 2021)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trilemma.core.codec import Space, check_data
from trilemma.core.config import validate
from trilemma.core.errors import DataError, UsageError
from trilemma.core.model import GenerativeModel, Losses, Objective, Step
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.core.spec import Batch, DataSpec, Split
from trilemma.core.storage import load_model, model_folder
from trilemma.diffusion import guidance, ode, solvers
from trilemma.diffusion.backbone import Backbone, NoisyClassifier
from trilemma.diffusion.bound import (
    Terms,
    bound_terms,
    chain_term,
    gaussian_log_prob,
    lattice_log_prob,
    prior_term,
    strata,
    variational_bound,
)
from trilemma.diffusion.denoiser import Clipped, Counted, Denoiser, Estimate, NetworkDenoiser, spread_scale
from trilemma.diffusion.grid import default_spacing, time_grid
from trilemma.diffusion.guidance import ClassifierGuided, Guided
from trilemma.diffusion.prediction import conversion, convert, weights
from trilemma.diffusion.schedule import Discrete, Learned, NoiseSchedule, Spacing, like
from trilemma.diffusion.settings import (
    FAST,
    DiffusionConfig,
    SampleSettings,
    ScoreSettings,
    make_key,
    make_schedule,
    network_settings,
)
from trilemma.diffusion.training import (
    WEIGHTINGS,
    ImportanceTimes,
    couple,
    draw_uniform,
    log_normal_times,
    uniform_times,
)

ERROR_RANGES = 32
"""Number of ranges of log SNR in which the prediction's error is averaged."""

CHAIN_STEPS = 1000
"""Steps, even in log SNR, of the chain whose bound scores a model in continuous time."""

LEAST_LOG_SNR = -15.0
"""Where that chain ends in log SNR, before it jumps to the last time of a schedule that ends without signal."""

HYBRID = 1e-3
"""Weight of the bound in the hybrid objective."""


class Diffusion(GenerativeModel):
    """A denoiser trained on noised data, sampled by a solver of the reverse process."""

    Config = DiffusionConfig
    config: DiffusionConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class", "vector", "image", "sequence"})
    space: ClassVar[Space] = "center"
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128, "ema": 0.999}
    default_drop: ClassVar[float] = 0.1
    """Share of conditions left out in training where `drop_condition` does not say."""
    setting_help: ClassVar[Mapping[str, str]] = {
        "sampler": "one of " + ", ".join(solvers.SOLVERS),
        "steps": "times at which samples are denoised",
        "grid": "their spacing: linspace, trailing, leading, karras, log-snr",
        "clip": "pictures: the estimate of x stays in their range",
        "guidance": guidance.FORMULA,
        "guide": "folder of a worse model, for autoguidance; else the model without its condition",
        "interval": "[low, high] of sigma / alpha in which guidance acts",
        "rescale": "0..1: share of the prediction rescaled to the unguided standard deviation",
        **solvers.setting_help(),
        "method": "bound or ode",
        "terms": "bound: evaluations for each example, 64 by default, or all",
        "trace": "ode: of the divergence, estimate or exact",
        "probes": "ode: random signs for the estimate, 4 by default",
        "rtol": "rk45, ode: tolerated relative error per step",
        "atol": "rk45, ode: tolerated absolute error per step",
    }
    teaches: ClassVar[bool] = True
    """Whether students can be distilled from it: a denoiser of many steps, with this class's times and space."""
    error_sum: Tensor
    error_count: Tensor
    data_variance: Tensor

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        if spec.kind in ("points", "table"):
            return {"width": 128, "depth": 3, "optimizer": FAST}
        if spec.dims <= 256:  # small enough for a CPU to train in a minute
            return {"width": 24, "depth": 1, "optimizer": FAST}
        if spec.dims <= 4096:  # or in minutes
            return {"width": 32, "depth": 1, "optimizer": {"lr": 2e-3, "betas": (0.9, 0.99)}}
        return {}

    # -- life ------------------------------------------------------------------------------------------------

    def build(self) -> None:
        c = self.config
        schedule = make_schedule(c, self.levels)
        self.schedule: NoiseSchedule = schedule
        self.register_buffer("error_sum", torch.zeros(ERROR_RANGES, dtype=torch.float64))
        self.register_buffer("error_count", torch.zeros(ERROR_RANGES, dtype=torch.float64))
        self.register_buffer("data_variance", torch.ones((), dtype=torch.float64))
        self._data_std: float | None = None
        self._guides: dict[str, GenerativeModel] = {}
        if c.times == "importance":
            self.importance = ImportanceTimes()
        condition = None if c.classifier else self.condition
        share = self.default_drop if c.drop_condition is None else c.drop_condition
        self.drop = 0.0 if condition is None else share
        if c.flips and (self.spec.kind != "image" or (condition is not None and condition.kind == "image")):
            raise UsageError("flips=true is for pictures, and not for those conditioned on a picture")
        kind = c.backbone or ("mlp" if len(self.codec.shape) == 1 else "unet")
        self.net = Backbone(
            self.codec.shape,
            condition,
            kind,
            width=c.width,
            depth=c.depth,
            optional=self.drop > 0,
            outputs=2 if c.variance in ("learned", "learned-range") else 1,
            time=c.time_embedding,
            **network_settings(c, kind, self.codec.shape),
        )
        if c.classifier:
            spec = self.condition
            if spec is None or spec.kind != "class":
                raise UsageError("classifier=true needs data with classes")
            self.classifier = NoisyClassifier(self.codec.shape, spec.size, max(16, c.width // 2))

    def prepare(self, train: Split, noise: Noise) -> None:
        self.codec.fit_split(train)
        y, _ = self.codec.encode(train.head(4096).x.to(self.device), dtype=torch.float64)
        self.data_variance.copy_(y.var(0, correction=0).mean())
        if not self.data_variance > 0:
            raise DataError("the training examples are all the same: there is nothing to learn")
        self._data_std = None

    def objectives(self) -> Sequence[Objective]:
        parameters = list(self.net.parameters())
        if isinstance(self.schedule, Learned):
            parameters += list(self.schedule.parameters())
        optimizer = self.config.optimizer
        found = [Objective("denoising", parameters, self.loss, optimizer=optimizer, validate=True)]
        if self.config.classifier:
            found.append(
                Objective("classifier", self.classifier.parameters(), self.classifier_loss, optimizer=optimizer)
            )
        return found

    @property
    def levels(self) -> int | None:
        """Number of cells of model space along each dimension, None where it is no lattice."""
        return self.spec.levels if self.codec.discrete else None

    @property
    def data_std(self) -> float:
        """Standard deviation of the data in model space."""
        if self._data_std is None:  # read once: reading waits for the GPU
            self._data_std = float(self.data_variance.sqrt())
        return self._data_std

    # -- training --------------------------------------------------------------------------------------------

    def network(
        self,
        z: Tensor,
        t: Tensor,
        condition: Tensor | None,
        present: Tensor | None = None,
        net: torch.nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction and second output of the network, or of another `net`, for z (N, *) at t (N,)."""
        z_in = z
        if self.config.scale_input:
            scale = (self.schedule.alpha(t).square() * self.data_variance + self.schedule.sigma(t).square()).rsqrt()
            z_in = like(scale, z) * z
        label = self.schedule.label(t).to(self.dtype)
        value, spread = (self.net if net is None else net)(z_in.to(self.dtype), label, condition, present)
        return value, spread

    def _training_data(self, batch: Batch, noise: Noise) -> Tensor:
        """The examples in model space (N, *codec.shape), half of them mirrored where that is set."""
        x, _ = self.codec.encode(batch.x, noise, dtype=self.dtype)
        if not self.config.flips or not torch.is_grad_enabled():
            return x
        mirrored = (noise.uniform() < 0.5).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(mirrored, x.flip(-1), x)

    def draw_times(self, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Training times t (N,), their places u in the uniform density, and weights that make up for another one."""
        c, u = self.config, draw_uniform(noise, self.config.stratified)
        weight = torch.ones_like(u)
        if c.times == "log-normal":
            mean = -1.2 if c.times_mean is None else c.times_mean
            return log_normal_times(u, self.schedule, mean, 1.2 if c.times_std is None else c.times_std), u, weight
        if c.times == "importance":
            u, weight = self.importance(u)
        return uniform_times(u, self.schedule), u, weight

    def noised(self, x: Tensor, t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """z_t and its eps for x (N, *), t (N,)."""
        eps = noise.normal_like(x)
        if self.config.coupling == "optimal-transport":
            eps = couple(x, eps)
        return like(self.schedule.alpha(t), x) * x + like(self.schedule.sigma(t), x) * eps, eps

    def kept(self, noise: Noise) -> Tensor | None:
        """Where the condition is present (N,) in a training step; None where it never is left out."""
        return noise.uniform() >= self.drop if self.drop > 0 else None

    def loss(self, batch: Batch, step: Step) -> Losses:
        """The configured objective, per dimension."""
        x = self._training_data(batch, step.noise)
        t, u, correction = self.draw_times(step.noise)
        z, eps = self.noised(x, t, step.noise)
        condition = None if self.config.classifier else batch.condition
        value, spread = self.network(z, t, condition, self.kept(step.noise))
        if self.config.loss == "bound":
            loss, logs = self._bound_loss(x, z, t, value.to(x.dtype), spread), {}
        else:
            loss = self._weighted_error(x, eps, t, value.to(x.dtype))
            logs = {"error": loss.detach().mean()}
            if self.config.loss == "hybrid":
                loss = loss + HYBRID * self._chain_term(x, z, t, value.detach().to(x.dtype), spread)
        if torch.is_grad_enabled():  # a training step: validation leaves the model as it is
            self._record_error(x, z, t, value.detach(), step.index)
            if self.config.times == "importance":
                self.importance.record(u, loss.detach())
        return (correction.to(loss) * loss).mean(), logs

    def _weighted_error(self, x: Tensor, eps: Tensor, t: Tensor, value: Tensor) -> Tensor:
        """w(t) |x - xhat|^2 / D as a squared error of the prediction (N,)."""
        prediction, schedule = self.config.prediction, self.schedule
        p, q = weights(prediction, schedule, t, self.data_std)
        target = like(p, x) * x + like(q, x) * eps
        error = (value - target).square().flatten(1).mean(1)
        if self.config.weighting == "uniform":
            return error
        weight = WEIGHTINGS[self.config.weighting](schedule, t)
        return error * (weight * conversion(prediction, "x0", t, schedule, self.data_std)[1].square()).to(error)

    def _bound_loss(self, x: Tensor, z: Tensor, t: Tensor, value: Tensor, spread: Tensor | None) -> Tensor:
        """The bound on -log p(x) / D with one of its terms (N,)."""
        schedule, dims = self.schedule, x[0].numel()
        if isinstance(schedule, Discrete):
            return prior_term(schedule, x.double()) / dims + self._chain_term(x, z, t, value, spread)
        first = schedule.times[0].to(t)
        alpha, variance = schedule.alpha(first), schedule.sigma(first).square()
        x_hat = convert(value, self.config.prediction, "x0", z, t, schedule, self.data_std)
        error = (x - x_hat).square().flatten(1).mean(1)
        diffusion = WEIGHTINGS["likelihood"](schedule, t) * error.double()
        # p(x | z_0) by Bayes' rule with a flat prior: no second evaluation of the network (Kingma et al. 2021, eq. 7)
        eps = (z - like(schedule.alpha(t), z) * x) / like(schedule.sigma(t), z)
        seen = x.double() + (variance.sqrt() / alpha) * eps.double()
        if self.levels is None:
            data = -gaussian_log_prob(x.double(), seen, variance / alpha.square())
        else:
            data = -lattice_log_prob(x.double(), seen, variance / alpha.square(), self.levels)
        return diffusion + (data + prior_term(schedule, x.double())) / dims

    def _chain_term(self, x: Tensor, z: Tensor, t: Tensor, value: Tensor, spread: Tensor | None) -> Tensor:
        """T L_{t-1} / D of a chain (N,)."""
        chain = self.schedule
        assert isinstance(chain, Discrete)
        x_hat = convert(value, self.config.prediction, "x0", z, t, chain, self.data_std)
        estimate = Estimate(x_hat, None if spread is None else spread.to(x.dtype))
        times = torch.arange(chain.steps + 1, dtype=torch.float64, device=t.device)
        terms = chain_term(self._plain(None), times, t.long(), z.double(), x.double(), estimate, self.levels)
        return terms * (chain.steps / x[0].numel())

    def classifier_loss(self, batch: Batch, step: Step) -> Losses:
        """Cross-entropy of the noisy classifier."""
        x = self._training_data(batch, step.noise)
        t, _, weight = self.draw_times(step.noise)
        z, _ = self.noised(x, t, step.noise)
        log_p = self.class_log_prob(z, t)
        assert batch.condition is not None, "a classifier needs classes"
        loss = torch.nn.functional.nll_loss(log_p, batch.condition, reduction="none")
        return (weight.to(loss) * loss).mean(), {"accuracy": log_p.argmax(1).eq(batch.condition).double().mean()}

    def class_log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """log p(c | z_t) of every class (N, classes), of z scaled to unit variance."""
        scale = (self.schedule.alpha(t).square() * self.data_variance + self.schedule.sigma(t).square()).rsqrt()
        z = (like(scale, z) * z).to(self.dtype)
        log_p: Tensor = self.classifier(z, self.schedule.label(t).to(self.dtype))
        return log_p

    def _record_error(self, x: Tensor, z: Tensor, t: Tensor, value: Tensor, index: int) -> None:
        """Average |x - xhat|^2 / D, in units of `spread_scale`, into ranges of log SNR; step i weighs as i^5."""
        x_hat = convert(value.to(x.dtype), self.config.prediction, "x0", z, t, self.schedule, self.data_std)
        square = (x - x_hat).square().flatten(1).mean(1).double() / spread_scale(self.schedule, t).detach()
        member = torch.nn.functional.one_hot(self._range_of(t), ERROR_RANGES).double()
        keep = 1.0 - 5.0 / (index + 6.0)
        self.error_sum.mul_(keep).add_(square @ member)
        self.error_count.mul_(keep).add_(member.sum(0))

    def _range_of(self, t: Tensor) -> Tensor:
        low, high = (float(v) for v in self.schedule.log_snr(torch.stack(self.schedule.times)).detach().flip(0))
        low, high = max(low, -15.0), min(high, 15.0)
        place = (self.schedule.log_snr(t.detach()).detach() - low) / (high - low)
        return (place * ERROR_RANGES).long().clamp(0, ERROR_RANGES - 1)

    def error(self, t: Tensor) -> Tensor:
        """The measured E|x - xhat|^2 / D at t, () or (N,), float64.

        It starts from one imagined example with the error of x ~ N(0, 1), the value before anything was learned.
        """
        measured = (self.error_sum + 1.0) / (self.error_count + 1.0)
        return (measured.to(t.device)[self._range_of(t)] * spread_scale(self.schedule, t)).detach()

    # -- sampling --------------------------------------------------------------------------------------------

    def _plain(self, condition: Tensor | None, present: bool = True) -> NetworkDenoiser:
        def network(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            there = None if present else torch.zeros(len(z), dtype=torch.bool, device=z.device)
            return self.network(z, t, condition, there)

        return NetworkDenoiser(
            network,
            self.schedule,
            self.config.prediction,
            variance=self.config.variance,
            error=self.error,
            data_std=self.data_std,
        )

    def denoiser(
        self,
        condition: Tensor | None = None,
        *,
        clip: bool = True,
        guidance: float = 1.0,
        guide: Diffusion | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> Denoiser:
        """The trained denoiser, guided (`trilemma.diffusion.guidance`).

        Arguments:
            condition: of each example to come, (N, ..).
            clip: on a lattice the estimate of x, guided or not, stays inside [-1, 1].
            guidance: the scale; 1 is the model itself.
            guide: a worse model of the same data, for autoguidance; else the same network without the condition.
        """
        found: Denoiser = self._plain(None if self.config.classifier else condition)
        if self.config.classifier:
            assert condition is not None
            wanted = condition.unsqueeze(1)
            found = ClassifierGuided(
                found, lambda z, t: self.class_log_prob(z, t).gather(1, wanted).squeeze(1), guidance
            )
        elif guidance != 1.0:
            worse = self._plain(condition, present=False) if guide is None else guide._plain(condition)
            found = Guided(found, worse, guidance, interval=interval, rescale=rescale)
        return Clipped(found, -1.0, 1.0) if clip and self.levels is not None else found

    def sampler_network(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The network f(z_t, label): its prediction, (N, *shape)."""
        z = torch.zeros(2, *self.codec.shape, dtype=self.dtype, device=self.device)
        label = torch.ones(2, dtype=self.dtype, device=self.device)
        example = () if self.config.classifier else self.example_condition(2)
        return lambda z, label, condition=None: self.net(z, label, condition)[0], (z, label, *example)

    def _sample(
        self,
        noise: Noise,
        condition: Tensor | None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        grid: Spacing | None = None,
        clip: bool | None = None,
        guidance: float = 1.0,
        guide: Diffusion | str | Path | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        eta: float | None = None,
        order: int | None = None,
        corrector: bool | None = None,
        stochastic: bool | None = None,
        churn: float | None = None,
        churn_from: float | None = None,
        churn_to: float | None = None,
        churn_noise: float | None = None,
        corrections: int | None = None,
        snr: float | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> Tensor:
        """`steps` times of the `grid`, taken by the `sampler` with its own settings (`trilemma.diffusion.solvers`).

        Guidance: guided = guide + scale (conditional - guide), where `guidance` is the scale and 1 is no guidance;
        `guide` another model (or its folder), `interval` the noise levels sigma / alpha in which it acts.
        """
        given = {
            "eta": eta, "order": order, "corrector": corrector,
            "stochastic": stochastic, "churn": churn, "churn_from": churn_from,
            "churn_to": churn_to, "churn_noise": churn_noise, "corrections": corrections, "snr": snr, "rtol": rtol,
            "atol": atol,
        }  # fmt: skip
        own: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": grid, "clip": clip, "guidance": guidance}
        own |= {"interval": interval, "rescale": rescale}
        checked = validate(SampleSettings, own, f"sample of {self.name}")
        solver = self.solver(checked.sampler, **{k: v for k, v in given.items() if v is not None})
        times = self.time_grid(solver, checked.steps, checked.grid)
        self._check_guidance(checked, guide)
        denoiser = self.denoiser(
            condition,
            clip=checked.clip is not False,
            guidance=checked.guidance,
            guide=self._loaded(guide),
            interval=checked.interval,
            rescale=checked.rescale or 0.0,
        )

        def normal() -> Tensor:
            return noise.normal(*self.codec.shape, dtype=self.dtype)

        return solvers.sample(denoiser, solver, times, self.start_std(times) * normal(), normal)

    def start_std(self, times: Tensor) -> float:
        """Standard deviation of z at the first of the times; grids that do not begin at t_max start with less noise."""
        schedule = self.schedule
        return schedule.prior_std * float((schedule.sigma(times[0]) / schedule.sigma(schedule.times[1])).detach())

    def solver(self, sampler: str | None = None, **settings: Any) -> solvers.Solver:
        """The named solver, or the model's own."""
        solver = solvers.make_solver(sampler or self.config.sampler, **settings)
        if solver.is_random and self.flow_only:
            raise UsageError(
                f"this {self.name} has learned a flow, not its SDE: give a solver without noise, such as heun"
            )
        return solver

    @property
    def flow_only(self) -> bool:
        """Whether noise and data were coupled in training: the flow is right then, the reverse chain is not."""
        return self.config.coupling != "independent"

    def time_grid(self, solver: solvers.Solver, steps: int | None = None, grid: Spacing | None = None) -> Tensor:
        """The times of a solver: `steps` of them, falling."""
        if isinstance(solver, solvers.RK45):
            if steps is not None or grid is not None:
                raise UsageError(
                    "steps and grid have no effect on sampler=rk45, which chooses its own: give rtol and atol"
                )
            return torch.stack(self.schedule.times).flip(0)
        n = self.config.sampling_steps if steps is None else steps
        try:
            spacing = grid or self.config.sampling_grid or default_spacing(solver.grid, self.schedule)
            return time_grid(self.schedule, n, spacing)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def _check_guidance(self, given: SampleSettings, guide: object) -> None:
        others = {"guide": guide, "interval": given.interval, "rescale": given.rescale}
        named = [name for name, value in others.items() if value is not None]
        if given.clip is not None and self.levels is None:
            raise UsageError("clip has no effect on data without levels, whose range is open")
        if given.rescale is not None and self.spec.dims == 1:
            raise UsageError("rescale needs more than one dimension to take a standard deviation over")
        if self.config.classifier:
            if named:
                raise UsageError(f"{named[0]} has no effect on guidance by a classifier")
        elif given.guidance == 1.0:
            if named:
                raise UsageError(f"{named[0]} has no effect at guidance=1, which is no guidance: give for example 2")
        elif guide is None and self.drop == 0.0:
            why = "was trained without a condition" if self.condition is None else "never left its condition out"
            how = "conditional=true" if self.condition is None else "drop_condition=0.1"
            raise UsageError(
                f"guidance={given.guidance:g}: this {self.name} {why}: train it with {how}, or give a guide"
            )

    def _loaded(self, given: GenerativeModel | str | Path | None) -> Diffusion | None:
        """The guide, read from its folder once."""
        if given is None:
            return None
        guide = given if isinstance(given, GenerativeModel) else self._guides.get(str(given))
        if guide is None:
            guide = self._guides[str(given)] = load_model(model_folder(str(given))).to(self.device)
        if not isinstance(guide, Diffusion) or "log_prob" not in guide.abilities():
            raise UsageError(f"the guide is a {guide.name}: give a diffusion model that denoises")
        same = guide.spec == self.spec and guide.condition == self.condition
        same = same and type(guide.schedule) is type(self.schedule)
        if not same or make_key(guide.config) != make_key(self.config) or isinstance(self.schedule, Learned):
            raise UsageError("a guide is a model of the same data and condition, with the same fixed schedule")
        ours, theirs = self.codec.state_dict(), guide.codec.state_dict()
        if any(not torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours):
            raise UsageError("the guide was fitted to other data: its codec differs")
        guide.eval()
        return guide

    def evaluations(
        self,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        grid: Spacing | None = None,
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        **settings: Any,
    ) -> int:
        """Counted: the solver runs on a denoiser that says 0; rk45, whose steps depend on it, on the trained one."""
        fields = solvers.SOLVERS[sampler or self.config.sampler].model_fields
        solver = self.solver(sampler, **{k: v for k, v in settings.items() if k in fields})
        times, by_guide = self.time_grid(solver, steps, grid), guidance != 1.0 and not self.config.classifier
        noise = Noise(0, "evaluations", n=1, device=self.device)
        good, guide = Counted(self.schedule), Counted(self.schedule)
        if isinstance(solver, solvers.RK45):
            good = Counted(self.schedule, self.denoiser(next(iter(self.example_condition(1)), None)))
        denoiser = Guided(good, guide, guidance, interval=interval) if by_guide else good
        z = self.start_std(times) * noise.normal(*self.codec.shape, dtype=self.dtype)
        with self.inference():
            solvers.sample(denoiser, solver, times, z, lambda: torch.zeros_like(z))
        return good.count + guide.count

    def knob(self) -> tuple[str, tuple[float, ...]] | None:
        if self.config.sampler == "rk45":
            return None
        largest = self.config.timesteps or math.inf
        return "steps", tuple(n for n in (3, 5, 10, 30, 100) if n <= largest)

    def _pictures(
        self,
        data: Split,
        seed: int,
        *,
        n: int = 8,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> dict[str, bytes]:
        """`trilemma.diffusion.pictures`, with n examples and samples in a strip."""
        from trilemma.diffusion.pictures import Album  # Matplotlib, which nothing else here needs

        if n < 1:
            raise UsageError(f"pictures need n >= 1, got {n}")
        given = validate(SampleSettings, {"steps": steps, "guidance": guidance}, f"pictures of {self.name}")
        self._check_guidance(given, None)
        return Album(self, data, seed, n, sampler, given.steps, given.guidance).draw()

    # -- likelihood ------------------------------------------------------------------------------------------

    def _log_prob(
        self,
        y: Tensor,
        condition: Tensor | None,
        noise: Noise,
        *,
        method: Literal["bound", "ode"] | None = None,
        terms: int | Literal["all"] | None = None,
        trace: Literal["estimate", "exact"] | None = None,
        probes: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> Score:
        """log p by the bound of the reverse chain, or by the change of variables along the probability flow.

        bound: `terms` evaluations for each example (64), two in each of half as many strata, or "all"; a lower bound.
            Single values may by chance lie above log p; their mean does not.
        ode: from t_min to t_max with tolerances `rtol`, `atol` (1e-5); `trace` estimated with `probes` random signs
            (4; with at least 2 a standard error comes with it), or exact, in as many derivatives as dimensions. Data
            on a lattice are dequantized uniformly, which makes it a lower bound.
        """
        given = {"method": method, "terms": terms, "trace": trace, "probes": probes, "rtol": rtol, "atol": atol}
        checked = validate(ScoreSettings, given, f"log_prob of {self.name}")
        method = checked.method or ("ode" if self.flow_only else "bound")
        for name in ("trace", "probes", "rtol", "atol") if method == "bound" else ("terms",):
            if given[name] is not None:
                raise UsageError(f"{name} has no effect on method={method}")
        if method == "bound":
            return self._bound(y, condition, noise, checked.terms or 64)
        if checked.trace == "exact" and checked.probes is not None:
            raise UsageError("probes have no effect on trace=exact")
        draws = None if checked.trace == "exact" else checked.probes or 4
        denoiser = self.denoiser(condition, clip=False)
        return ode.log_prob(denoiser, y, noise, self.levels, draws, checked.rtol or 1e-5, checked.atol or 1e-5)

    def vlb(self, x: Tensor, condition: Tensor | None = None, *, generator: int = 0) -> Terms:
        """Every term of the bound on -log p(x) in nats, at one draw of its noise, in model space.

        Arguments:
            x: examples (N, *spec.shape) in data units. The codec's own terms are not in it: log_prob has them.
        """
        self._require("log_prob")
        self._check_chain()
        check_data(self.spec, x)
        noise = Noise(generator, "vlb", n=len(x), device=self.device)
        with self.inference():
            y, _ = self.codec.encode(x.to(self.device), noise, dtype=self.dtype)
            denoiser = self.denoiser(self._conditions(condition, len(x)))
            return bound_terms(denoiser, self.chain_times(), y, noise, self.levels)

    def _bound(self, y: Tensor, condition: Tensor | None, noise: Noise, terms: int | Literal["all"]) -> Score:
        self._check_chain()
        times = self.chain_times()
        evaluations = None if terms == "all" else terms
        denoiser = self.denoiser(condition)
        value, stderr = variational_bound(denoiser, times, y, noise, self.levels, evaluations)
        used = len(times) if stderr is None else 2 * len(strata(len(times), terms // 2))  # type: ignore[operator]
        return Score(value, "lower_bound", stderr, method=f"bound of {len(times)} steps", evaluations=used)

    def _check_chain(self) -> None:
        if self.flow_only:
            raise UsageError(
                f"this {self.name} has learned a flow, and a bound needs the reverse chain: give method=ode"
            )

    def chain_times(self) -> Tensor:
        """t_1 < ... < t_T of the chain that the bound is of: the model's own, or even in log SNR.

        On a lattice it starts where sigma / alpha is half a cell, for L_0 is a probability there.
        """
        if isinstance(self.schedule, Discrete):
            return torch.arange(1, self.schedule.steps + 1, dtype=torch.float64)
        low, high = self.schedule.log_snr(torch.stack(self.schedule.times)).detach()
        last = self.schedule.times[1]
        if self.levels is not None:  # below half a cell of noise there is nothing to learn but the lattice
            low = low.clamp(max=2.0 * math.log(self.levels))
        log_snr = torch.linspace(float(low), max(float(high), LEAST_LOG_SNR), CHAIN_STEPS, dtype=torch.float64)
        return torch.cat([self.schedule.time(log_snr[:-1]).detach(), last.unsqueeze(0)])
