r"""A flow without networks: simple maps, one after the other, each the best of its kind when it is added.

Tabak & Vanden-Eijnden 2010 (Commun. Math. Sci. 8, 217) and Tabak & Turner 2013 (Commun. Pure Appl. Math. 66, 145) bring
data to N(0, I) by a long composition of elementary maps with few parameters, each found by ascent of the log-likelihood
    L = 1/N sum_i [log N(z_i; 0, I) + log |det dz_i/dy_i|]
from the identity, so L never decreases. Here the first map whitens, z = C^{-1/2} (y - mean), and each step has two
parts:

1. Random planes, D/2 disjoint pairs of dimensions, are turned by random angles; every dimension of the turned z takes
   its own bend at a random datum g, over a random width e; and the planes are turned back. The bend has slope q on the
   left and p on the right,
       x -> b + p s_+ + q s_-,   s_+- = (u +- sqrt(u^2 + e^2)) / 2,   u = x - g,   p, q > 0;
   with A = (p + q)/2, B = (p - q)/2, v = x' - b its inverse is u = (A v - B sqrt(v^2 + p q e^2)) / (p q).
2. A radial expansion around a random datum or the mean, z -> z + beta (z - c) / (alpha + |z - c|) (the second paper,
   section 4; see `trilemma.flow.planar`), where alpha is the distance to a random fraction of the data.

Given (g, e), or (c, alpha), the map is linear in its parameters (b, p, q), or beta, and its Jacobian a product of
affine functions of them. So L is concave in the parameters: a few Newton steps, kept inside p, q > 0 or beta > -alpha
and taken only where they raise L, find its maximum.

The best of four bends is taken for each dimension. A map of k parameters is kept only where it raises L by more than
3 k / N, three times what Akaike's criterion asks for, as many are tried; this is what ends the learning, since later
steps find nothing. C is the sample's covariance, shrunk towards the multiple of the identity with its trace by the
factor (at least 1e-6) that is most likely for a fifth of the examples; it is diagonal in more than 1,024 dimensions.
Given classes, each has its own flow. Fewer than 10 examples (of a class) get the whitening alone, shrunk by 1/(N + 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.core.errors import DataError
from trilemma.core.model import GenerativeModel, ModelConfig
from trilemma.core.noise import Noise, make_generator
from trilemma.core.score import Score
from trilemma.core.spec import DataSpec, Split
from trilemma.flow.planar import contract, expand
from trilemma.flow.transforms import Result, standard_log_prob

MIN_EXAMPLES = 10
MAX_EXAMPLES, FEW_EXAMPLES, MAX_NUMBERS = 50_000, 2_000, 2**20
"""A flow is fitted to the first 50,000 training examples, fewer (but at least 2,000) where they would hold more than
2^20 numbers: the time is proportional to these. Splits are in random order."""
MAX_FULL_DIMS = 1024
MANY_DIMS = 256
NEWTON_STEPS = 4
TRIES = 4
"""Centres and widths that are tried for each bend."""
WIDTHS = 0.05, 1.0
"""Least and greatest width of a bend."""
LEAST_FRACTION = 0.02
"""Of the data, within alpha of the centre of an expansion."""
GAIN = 3.0
"""Times the number of parameters over N: what a map must add to L."""


class TabakTurnerConfig(ModelConfig):
    """Settings of the greedy flow."""

    steps: int = Field(500, ge=1, description="elementary maps one after the other; late ones add little and cost time")


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """The planes of dimensions (i, i + h) of x (N, D), i < h = D // 2, turned by angle (h,)."""
    h = len(angle)
    a, b, rest = x[:, :h], x[:, h : 2 * h], x[:, 2 * h :]
    c, s = angle.cos(), angle.sin()
    return torch.cat([c * a - s * b, s * a + c * b, rest], 1)


def _ramps(x: Tensor, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s_+, s_- and ds_+/dx of x (N, D)."""
    u = x - center
    root = (u.square() + width.square()).sqrt()
    return 0.5 * (u + root), 0.5 * (u - root), 0.5 * (1.0 + u / root)


def bend(x: Tensor, center: Tensor, width: Tensor, theta: Tensor) -> Result:
    """x (N, D) under the bends theta (3, D) = (b, p, q), and ladj."""
    (b, p, q), (plus, minus, slope) = theta, _ramps(x, center, width)
    return b + p * plus + q * minus, (q + (p - q) * slope).log().sum(1)


def unbend(z: Tensor, center: Tensor, width: Tensor, theta: Tensor) -> Tensor:
    """The inverse of `bend`."""
    b, p, q = theta
    v, pq = z - b, p * q
    x: Tensor = center + (0.5 * (p + q) * v - 0.5 * (p - q) * (v.square() + pq * width.square()).sqrt()) / pq
    return x


def fit_bend(x: Tensor, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """theta (3, D) of the bends of x (N, D) that raise L most, the identity where that is too little; and the gains."""
    plus, minus, slope = _ramps(x, center, width)
    one = torch.ones_like(center)
    features = torch.stack([torch.ones_like(x), plus, minus])
    moments = torch.einsum("ind,jnd->dij", features, features) / len(x)

    def gain(t: Tensor) -> Tensor:
        return -0.5 * torch.einsum("di,dij,dj->d", t, moments, t) + (t[:, 2] + (t[:, 1] - t[:, 2]) * slope).log().mean(
            0
        )

    theta = identity = torch.stack([center, one, one], 1)
    best = start = gain(theta)
    for _ in range(NEWTON_STEPS):
        p, q = theta[:, 1], theta[:, 2]
        # Of the derivatives a and c of the log-slope to p and q, p a + q c = 1: the means of c follow from those of a.
        a = slope / (q + (p - q) * slope)
        a1, a2 = a.mean(0), a.square().mean(0)
        c1, ac, c2 = (1.0 - p * a1) / q, (a1 - p * a2) / q, (1.0 - 2.0 * p * a1 + p.square() * a2) / q.square()
        gradient = torch.stack([torch.zeros_like(a1), a1, c1], 1) - (moments @ theta.unsqueeze(2)).squeeze(2)
        curvature = moments.clone()
        curvature[:, 1:, 1:] += torch.stack([a2, ac, ac, c2], 1).view(-1, 2, 2)
        step = torch.linalg.solve(curvature, gradient)
        room = torch.where(step[:, 1:] < 0, -0.9 * theta[:, 1:] / step[:, 1:], 1.0).amin(1).clamp_max(1.0)
        moved = theta + room.unsqueeze(1) * step
        value = gain(moved)
        better = value > best
        theta, best = torch.where(better.unsqueeze(1), moved, theta), torch.where(better, value, best)
    keep = best - start > GAIN * 3.0 / len(x)
    chosen: Tensor = torch.where(keep.unsqueeze(1), theta, identity)
    return chosen.T, best - start


def fit_expansion(x: Tensor, center: Tensor, alpha: Tensor) -> Tensor:
    """beta () of the expansion of x (N, D) around center (1, D) that raises L most; 0 where that is too little."""
    difference, d = x - center, x.shape[1]
    h: Tensor = 1.0 / (alpha + torch.linalg.vector_norm(difference, dim=1))
    k = alpha * h.square()
    linear = ((x * difference).sum(1) * h).mean()
    square = (difference.square().sum(1) * h.square()).mean()

    def gain(b: Tensor) -> Tensor:
        ladj = (d - 1) * torch.log1p(b * h) + torch.log1p(b * k)
        return ladj.mean() - linear * b - 0.5 * square * b.square()

    beta = best = torch.zeros_like(alpha)
    for _ in range(NEWTON_STEPS):
        w, v = h / (1.0 + beta * h), k / (1.0 + beta * k)
        gradient = ((d - 1) * w + v).mean() - linear - square * beta
        step = gradient / (square + ((d - 1) * w.square() + v.square()).mean())
        moved = torch.maximum(beta + step, beta - 0.9 * (beta + alpha))
        value = gain(moved)
        beta, best = torch.where(value > best, moved, beta), torch.maximum(value, best)
    chosen: Tensor = torch.where(best > GAIN / len(x), beta, 0.0)
    return chosen


def _spectrum(x: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) >= 0 and eigenvectors (D, D) of x^T x / N; with `diagonal`, of its diagonal, and no vectors."""
    if diagonal:
        return x.square().mean(0), x.new_empty(0)
    values, axes = torch.linalg.eigh(x.T @ x / len(x))
    return values.clamp_min(0.0), axes  # rounding can leave them


def choose_shrinkage(x: Tensor, level: Tensor, diagonal: bool) -> float:
    """The s of (1 - s) C + s level I that is most likely for a fifth of the centred x (N, D), with C from the rest."""
    n = len(x)
    if n < MIN_EXAMPLES:
        return 1.0 / (n + 1.0)
    values, axes = _spectrum(x[n // 5 :], diagonal)
    held = x[: n // 5] if diagonal else x[: n // 5] @ axes
    grid = torch.logspace(-6, 0, 31, dtype=x.dtype, device=x.device).unsqueeze(1)
    variance = (1.0 - grid) * values + grid * level
    loss = (variance.log() + held.square().mean(0) / variance).sum(1)
    return float(grid[loss.argmin()])


class GreedyFlow(nn.Module):
    """The composition, y (N, D) -> z (N, D); its constants are buffers.

    Arguments:
        dims: D.
        steps: T.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor | None
    order: Tensor
    inverse_order: Tensor
    angle: Tensor
    bend_center: Tensor
    bend_width: Tensor
    bend_theta: Tensor
    center: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, dims: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("mean", _zeros(dims))
        self.register_buffer("scale", _zeros(dims) + 1.0)  # C^{1/2} = axes diag(scale) axes^T
        self.register_buffer("axes", torch.eye(dims, dtype=torch.float64) if dims <= MAX_FULL_DIMS else None)
        self.register_buffer("order", torch.arange(dims).expand(steps, -1).clone())
        self.register_buffer("inverse_order", self.order.clone())
        self.register_buffer("angle", _zeros(steps, dims // 2))
        self.register_buffer("bend_center", _zeros(steps, dims))
        self.register_buffer("bend_width", _zeros(steps, dims) + 1.0)
        self.register_buffer("bend_theta", _zeros(steps, 3, dims) + torch.tensor([[0.0], [1.0], [1.0]]))
        self.register_buffer("center", _zeros(steps, 1, dims))
        self.register_buffer("alpha", _zeros(steps, 1) + 1.0)
        self.register_buffer("beta", _zeros(steps, 1))

    def _stretch(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.axes is None:
            return x * scale
        return (x @ self.axes * scale) @ self.axes.T

    def _turned(self, z: Tensor, t: int) -> Tensor:
        return turn(z.index_select(1, self.order[t]), self.angle[t])

    def _turned_back(self, z: Tensor, t: int) -> Tensor:
        return turn(z, -self.angle[t]).index_select(1, self.inverse_order[t])

    def _bends(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.bend_center[t], self.bend_width[t], self.bend_theta[t]

    def _expansion(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.center[t], self.alpha[t], self.beta[t]

    def step(self, z: Tensor, t: int) -> Result:
        """z (N, D) under step t, and its ladj (N,)."""
        bent, ladj = bend(self._turned(z, t), *self._bends(t))
        z, term = expand(self._turned_back(bent, t), *self._expansion(t))
        return z, ladj + term

    def whiten(self, y: Tensor) -> Result:
        return self._stretch(y - self.mean, 1.0 / self.scale), -self.scale.log().sum().expand(len(y))

    def forward(self, y: Tensor) -> Result:
        z, ladj = self.whiten(y)
        for t in range(self.steps):
            z, term = self.step(z, t)
            ladj = ladj + term
        return z, ladj

    def inverse(self, z: Tensor) -> Tensor:
        for t in reversed(range(self.steps)):
            z, _ = contract(z, *self._expansion(t))
            z = self._turned_back(unbend(self._turned(z, t), *self._bends(t)), t)
        return self._stretch(z, self.scale) + self.mean

    def fit(self, y: Tensor, generator: torch.Generator) -> None:
        """Learn from y (N, D); the draws come from `generator`, on the CPU."""
        self._fit_whitening(y)
        if len(y) < MIN_EXAMPLES:
            return
        z, _ = self.whiten(y)
        for t in range(self.steps):
            self._fit_step(z, t, generator)
            z, _ = self.step(z, t)

    def _fit_whitening(self, y: Tensor) -> None:
        self.mean.copy_(y.mean(0))
        centered = y - self.mean
        variance = centered.square().mean(0)
        if not bool(variance.any()):
            return  # of one example, or of copies of one, nothing is known but the variance 1 of model space
        level, diagonal = variance.mean(), self.axes is None
        shrinkage = choose_shrinkage(centered, level, diagonal)
        values, axes = _spectrum(centered, diagonal)
        self.scale.copy_(((1.0 - shrinkage) * values + shrinkage * level).sqrt())
        if self.axes is not None:
            self.axes.copy_(axes)

    def _fit_step(self, z: Tensor, t: int, generator: torch.Generator) -> None:
        n, dims = z.shape
        self.order[t] = torch.randperm(dims, generator=generator)
        self.inverse_order[t] = self.order[t].argsort()
        self.angle[t] = 2.0 * math.pi * torch.rand(dims // 2, generator=generator, dtype=z.dtype)
        turned = self._turned(z, t)
        low, high = (math.log(w) for w in WIDTHS)
        most = torch.full_like(self.bend_width[t], -math.inf)
        for _ in range(TRIES):
            data = torch.randint(n, (1, dims), generator=generator).to(z.device)
            u = torch.rand(dims, generator=generator, dtype=z.dtype).to(z.device)
            center, width = turned.gather(0, data).squeeze(0), (low + (high - low) * u).exp()
            theta, gain = fit_bend(turned, center, width)
            better = gain > most
            most = torch.maximum(gain, most)
            for kept, new in ((self.bend_center, center), (self.bend_width, width), (self.bend_theta, theta)):
                kept[t] = torch.where(better, new, kept[t])
        z = self._turned_back(bend(turned, *self._bends(t))[0], t)

        index = int(torch.randint(n, (), generator=generator))
        at_datum, u = torch.rand(2, generator=generator, dtype=z.dtype).tolist()
        self.center[t] = z[index] if at_datum < 0.8 else 0.0
        distance = torch.linalg.vector_norm(z - self.center[t], dim=1)
        rank = round((n - 1) * LEAST_FRACTION ** (1.0 - u))
        self.alpha[t] = distance.sort().values[rank].clamp_min(1e-3)  # a datum may have copies
        self.beta[t] = fit_expansion(z, self.center[t], self.alpha[t, 0])


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class TabakTurner(GenerativeModel):
    """A greedy composition of elementary maps, learned without gradient steps; the latent z has the shape of y."""

    Config: ClassVar[type[ModelConfig]] = TabakTurnerConfig
    config: TabakTurnerConfig
    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class"})
    bijective = True
    space = "logit"

    @classmethod
    def sized_for(cls, spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fewer steps where each costs much and most find nothing."""
        return {"steps": 100} if spec.dims > MANY_DIMS else {}

    @property
    def dtype(self) -> torch.dtype:
        """float64: hundreds of maps are inverted one after the other."""
        return torch.float64

    def build(self) -> None:
        classes = 1 if self.condition is None else self.condition.size
        self.flows = nn.ModuleList(GreedyFlow(self.codec.dims, self.config.steps) for _ in range(classes))

    def _flow(self, index: int) -> GreedyFlow:
        return self.flows[index]  # type: ignore[return-value]

    def prepare(self, train: Split, noise: Noise) -> None:
        """Fit the codec and each class's flow.

        Raises:
            DataError: the model is conditional and a class has no example: nothing is known of p(x | class).
        """
        self.codec.fit_split(train)
        n = min(len(train), MAX_EXAMPLES, max(FEW_EXAMPLES, MAX_NUMBERS // self.spec.dims))
        batch = train.head(n).to(self.device)
        y, _ = self.codec.encode(batch.x, Noise(*noise.key, "encode", n=n, device=self.device), dtype=self.dtype)
        for c in range(len(self.flows)):
            own = y.flatten(1) if self.condition is None else y.flatten(1)[batch.condition == c]
            if len(own) == 0:
                assert self.condition is not None
                label = self.condition.names[c]
                raise DataError(
                    f"{self.name}: class {label!r} has no training example, so p(x | {label}) cannot be estimated; "
                    "fit with conditional=false, or add examples of it"
                )
            self._flow(c).fit(own, make_generator(*noise.key, "tabak-turner", c))

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        value = y.new_empty(len(y))
        for c, rows in self._groups(condition, y):
            z, ladj = self._flow(c)(y[rows].flatten(1))
            value[rows] = standard_log_prob(z) + ladj
        return Score(value, "exact")

    def _groups(self, condition: Tensor | None, y: Tensor) -> list[tuple[int, Tensor]]:
        """Each class that occurs, and a mask (N,) of its examples."""
        label = y.new_zeros(len(y), dtype=torch.int64) if condition is None else condition
        return [(c, label == c) for c in torch.unique(label).tolist()]

    def _encode(self, y: Tensor, condition: Tensor | None) -> Tensor:
        z = torch.empty_like(y)
        for c, rows in self._groups(condition, y):
            z[rows] = self._flow(c)(y[rows].flatten(1))[0].view(-1, *y.shape[1:])
        return z

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        y = torch.empty_like(z, dtype=self.dtype)
        for c, rows in self._groups(condition, z):
            y[rows] = self._flow(c).inverse(z[rows].flatten(1).to(self.dtype)).view(-1, *z.shape[1:])
        # Dates and large integers of tables need the digits.
        return y if self.spec.kind == "table" else y.to(torch.get_default_dtype())

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        return self._decode(self._prior(noise), condition)

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(*self.codec.shape, dtype=self.dtype)
