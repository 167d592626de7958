r"""Adaptive discriminator augmentation (Karras et al. 2020, arXiv:2006.06676).

The discriminator sees real and generated examples only through a random pipe T of transforms, so it cannot learn the
few real ones by heart. Each transform of the pipe draws its own coin for each example, which falls with probability p.

Why it does not leak. The game ends where T x and T G(z) have the same distribution; that implies x ~ G(z) if the map
A of distributions that T induces is invertible (Bora, Price & Dimakis 2018, AmbientGAN). With probability p, transform
T_g of a random g is applied, else nothing:
    A = (1 - p) I + p E_g T_g,
which is invertible for every p < 1 where E_g T_g has no eigenvalue below 0. That holds
    - for g uniform on a group (flip or not, quarter turns, angles, hues): E_g T_g is a projection;
    - for g of a density on R^k whose Fourier transform, which is the spectrum, is nowhere negative: normal (shift,
      brightness, added noise), lognormal (scale, contrast), or the difference of two uniform integers (translation;
      that of the paper's uniform ones falls to -1/3 over {-1, 0, 1}, which makes A singular at p = 3/4);
    - for commuting idempotents (cutout): the eigenvalues of their mean lie in [0, 1].
A product of invertible maps is invertible. At p = 1 all is lost: a picture flipped by a fair coin has no side. Close to
1 the inverse is so ill-conditioned that the game does not find it; the paper sees leaks beyond p = 0.8. What a
picture shows beyond its frame is made up by reflection, so for translation and resampling all this is approximate.

Geometry is a blit (flip, quarter turn, integer translation: a permuted copy, exact) and then one resampling
    G = Shift Rotate_2 Aspect Rotate_1 Scale,   out(u) = in(G^-1 u).
Each rotation has probability 1 - sqrt(1 - p), so that neither happens with probability 1 - p. Resampling is bilinear
without a low-pass filter, which is good enough for pictures of 8 to 64 pixels a side: factors rarely reach 1.5.
Colour is an affine map. With P = v v^T the projection on the grey axis v = (1, 1, 1) / sqrt(3), Q = I - P and K its
cross product, luma flip (e = -1), hue (angle t) and saturation (factor s) commute, so the whole is
    y -> c [e P + s (cos t Q + sin t K)] (y + b)
for brightness b and contrast c. Strengths are the paper's, in units of model space.

The pipe is differentiable in y. `grid_sample` has no double backward in every version and on every device of PyTorch,
so gradient penalties are taken at the critic's own input, behind the pipe.

The strength. r = E sign(D(x)) over real x grows to 1 as the discriminator overfits; `Controller` moves p so that r
stays at 0.6. `ramp` is R3GAN's alternative (Huang et al. 2024, arXiv:2501.05441): p is raised by a fixed ramp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.adversarial.symmetry import is_symmetric, mirror, quarter_turn
from trilemma.core.anneal import cosine
from trilemma.core.errors import UsageError
from trilemma.core.noise import Noise
from trilemma.core.spec import DataSpec

BLITS = ("flip", "rot90", "translate")
RESAMPLED = ("scale", "rotate", "aspect", "shift")
COLOURS = ("luma-flip", "hue", "saturation")
TRANSFORMS = {
    1: ("gain", "offset", "noise", "cutout"),
    2: ("translate", "gain", "offset", "noise", "cutout"),
    3: (*BLITS, *RESAMPLED, "brightness", "contrast", *COLOURS, "noise", "cutout"),
    4: ("flip", "translate", "brightness", "contrast", "noise"),
}
"""Transforms in the order of their application, by the axes of an example: vector, signal, picture, volume."""

LOG2_STD = {"scale": 0.2, "aspect": 0.2, "gain": 0.2, "contrast": 0.5, "saturation": 1.0}
"""Standard deviation of the base-2 logarithm of a factor."""

STD = {"shift": 0.125, "brightness": 0.2, "offset": 0.2, "noise": 0.1}
"""Standard deviations: of a side, of y, of y, and that of the standard deviation of the noise (half-normal)."""


def possible(shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the transforms that examples of a shape (channels first) can go through, in order of application."""
    impossible: set[str] = set()
    if not any(_reach(side) for side in shape[1:]):
        impossible.add("translate")
    if len(shape) == 3:
        impossible |= {"rot90"} if shape[1] != shape[2] else set()
        impossible |= set(COLOURS) if shape[0] != 3 else set()
    return tuple(name for name in TRANSFORMS[len(shape)] if name not in impossible)


def check_names(shape: Sequence[int], names: Sequence[str]) -> None:
    """Raise a `UsageError` that lists what is possible, if one of the transforms is not for examples of this shape."""
    known = possible(shape)
    for name in names:
        if name not in known:
            raise UsageError(
                f"augmentation {name!r} does not exist for data of shape {'x'.join(map(str, shape))} "
                f"in model space; possible are: {', '.join(known)}"
            )


def _reach(side: int) -> int:
    """Largest integer translation: an eighth of the side."""
    return round(side / 8)


class Draws:
    """What the transforms of a batch draw. The two rotations are "rotate" and "rotate again".

    Arguments:
        names: of the transforms.
        p: probability of each.
        noise: N draws.
        dtype: of the draws.

    Attributes:
        coin: name -> whether the transform is applied, (N,).
        uniform: name -> draws from [0, 1), (N, 6).
        normal: name -> standard normal draws, (N, 2).
    """

    def __init__(self, names: Sequence[str], p: Tensor | float, noise: Noise, dtype: torch.dtype) -> None:
        names = (*names, *(["rotate again"] if "rotate" in names else []))
        uniform, normal = noise.uniform(len(names), 7, dtype=dtype), noise.normal(len(names), 2, dtype=dtype)
        probability = {name: 1.0 - (1.0 - p) ** 0.5 if name.startswith("rotate") else p for name in names}
        self.coin = {name: uniform[:, i, 6] < probability[name] for i, name in enumerate(names)}
        self.uniform = dict(zip(names, uniform[..., :6].unbind(1), strict=True))
        self.normal = dict(zip(names, normal.unbind(1), strict=True))
        self.zero = uniform.new_zeros(len(uniform))

    def applied(self, name: str, value: Tensor, neutral: float) -> Tensor:
        """The value (N, *) where the coin fell, else the neutral one."""
        return torch.where(self.coin[name].view(-1, *[1] * (value.ndim - 1)), value, neutral)

    def factor(self, name: str) -> Tensor:
        """A lognormal factor (N,), or 1."""
        if name not in self.coin:
            return self.zero + 1.0
        return self.applied(name, (LOG2_STD[name] * self.normal[name][:, 0]).exp2(), 1.0)

    def term(self, name: str) -> Tensor:
        """A normal summand (N,), or 0."""
        return self.applied(name, STD[name] * self.normal[name][:, 0], 0.0) if name in self.coin else self.zero

    def angle(self, name: str) -> Tensor:
        """A uniform angle (N,) in radians, or 0."""
        if name not in self.coin:
            return self.zero
        return self.applied(name, 2.0 * math.pi * self.uniform[name][:, 0], 0.0)

    def flipped(self, name: str) -> Tensor:
        """Whether a flip is the one of its group of two, (N,): with probability p / 2."""
        if name not in self.coin:
            return self.zero > 0.0
        return self.coin[name] & (self.uniform[name][:, 0] < 0.5)

    def fell(self, names: Sequence[str]) -> Tensor:
        """Whether one of these coins fell, (N,)."""
        return torch.stack([coin for name, coin in self.coin.items() if name in names]).any(0)


def blit(y: Tensor, draws: Draws, noise: Noise) -> Tensor:
    """Flip the last axis, turn by quarters, translate y (N, C, *space): a copy of its pixels."""
    space, u, ones = y.shape[2:], draws.uniform, [1] * (y.ndim - 2)
    index = []  # where each pixel comes from, along each axis, broadcast over the others
    for axis, side in enumerate(space):
        row = torch.arange(side, device=y.device).expand(len(y), side)
        if "translate" in u:
            i, j = (u["translate"][:, 2 * axis : 2 * axis + 2] * (_reach(side) + 1)).long().unbind(1)
            row = row - draws.applied("translate", i - j, 0)[:, None]
            row = torch.minimum(row % (2 * side), (-1 - row) % (2 * side))  # mirrored at the outer edges
        index.append(row.view(len(y), *ones[:axis], side, *ones[axis + 1 :]))
    if "rot90" in u:
        turns = draws.applied("rot90", (4 * u["rot90"][:, 0]).long(), 0).view(-1, 1, 1)
        a, b = index
        a, b = torch.where(turns % 2 == 1, b, a), torch.where(turns % 2 == 1, a, b)
        index = [
            torch.where(turns >= 2, space[0] - 1 - a, a),
            torch.where((turns == 1) | (turns == 2), space[1] - 1 - b, b),
        ]
    index[-1] = torch.where(draws.flipped("flip").view(-1, *ones), space[-1] - 1 - index[-1], index[-1])
    flat = index[0]
    for side, place in zip(space[1:], index[1:], strict=True):
        flat = flat * side + place
    return y.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, y.shape[1], -1)).view_as(y)


def inverse_geometry(draws: Draws, height: int, width: int) -> Tensor:
    """G^-1 (N, 2, 3), acting on (x, y) in [-1, 1]^2 as `affine_grid` takes it."""
    scale, aspect = draws.factor("scale"), draws.factor("aspect")
    factors = torch.stack([1.0 / (scale * aspect), aspect / scale], 1)
    linear = rotation(-draws.angle("rotate")) * factors[:, None] @ rotation(-draws.angle("rotate again"))
    sides = factors.new_tensor([width, height])  # angles are those of square pixels
    linear = linear * sides / sides[:, None]
    if "shift" not in draws.coin:
        return F.pad(linear, (0, 1))
    shift = draws.applied("shift", 2.0 * STD["shift"] * draws.normal["shift"], 0.0)
    return torch.cat([linear, -linear @ shift[..., None]], 2)


def rotation(angle: Tensor) -> Tensor:
    """(N,) -> (N, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def resample(y: Tensor, draws: Draws, noise: Noise) -> Tensor:
    """Scale, rotate, stretch and shift pictures y (N, C, H, W)."""
    grid = F.affine_grid(inverse_geometry(draws, *y.shape[2:]), list(y.shape), align_corners=False)
    out = F.grid_sample(y, grid, padding_mode="reflection", align_corners=False)
    return torch.where(draws.fell((*RESAMPLED, "rotate again")).view(-1, 1, 1, 1), out, y)


def rescale(y: Tensor, draws: Draws, noise: Noise) -> Tensor:
    """c (y + b) for y (N, *)."""
    c, b = draws.factor("gain") * draws.factor("contrast"), draws.term("offset") + draws.term("brightness")
    return torch.addcmul(_spread(c * b, y), _spread(c, y), y)


def recolour(y: Tensor, draws: Draws, noise: Noise) -> Tensor:
    """All colour transforms of pictures y (N, 3, H, W)."""
    matrix = colour_matrix(draws)
    grey = matrix.sum(2, keepdim=True) * _spread(draws.term("brightness"), matrix)
    out = torch.baddbmm(grey, matrix, y.flatten(2)).view_as(y)
    return torch.where(_spread(draws.fell(("brightness", "contrast", *COLOURS)), y), out, y)


def colour_matrix(draws: Draws) -> Tensor:
    """c [e P + s (cos t Q + sin t K)], (N, 3, 3)."""
    grey = draws.zero.new_full((3, 3), 1.0 / 3.0)
    rest = torch.eye(3, dtype=grey.dtype, device=grey.device) - grey
    cross = grey.new_tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    angle, saturation, contrast, flipped = (
        x.view(-1, 1, 1)
        for x in (draws.angle("hue"), draws.factor("saturation"), draws.factor("contrast"), draws.flipped("luma-flip"))
    )
    chroma = saturation * (angle.cos() * rest + angle.sin() * cross)
    return contrast * (torch.where(flipped, -grey, grey) + chroma)


def disturb(y: Tensor, draws: Draws, noise: Noise) -> Tensor:
    """Add white noise to y (N, *), of one standard deviation for each example."""
    return torch.addcmul(y, _spread(draws.term("noise"), y), noise.normal_like(y))


def cut(y: Tensor, draws: Draws, noise: Noise) -> Tensor:
    """Set to 0: a box of half the sides with its centre anywhere; of vectors, each coordinate with probability 1/2."""
    if y.ndim == 2:
        inside = noise.uniform_like(y) < 0.5
    else:
        inside = torch.ones_like(y[:, :1], dtype=torch.bool)
        for axis, side in enumerate(y.shape[2:]):
            places = (torch.arange(side, dtype=y.dtype, device=y.device) + 0.5) / side
            near = (places - draws.uniform["cutout"][:, axis, None]).abs() < 0.25
            inside = inside & near.view(len(y), 1, *[1] * axis, side, *[1] * (y.ndim - 3 - axis))
    return y.masked_fill(inside & _spread(draws.coin["cutout"], y), 0.0)


def _spread(x: Tensor, y: Tensor) -> Tensor:
    """x (N,), to broadcast with y (N, *)."""
    return x.view(-1, *[1] * (y.ndim - 1))


STAGES: tuple[tuple[Callable[[Tensor, Draws, Noise], Tensor], tuple[str, ...]], ...] = (
    (blit, BLITS),
    (resample, RESAMPLED),
    (recolour, COLOURS),
    (rescale, ("brightness", "contrast", "gain", "offset")),
    (disturb, ("noise",)),
    (cut, ("cutout",)),
)
"""The pipe, and whose transforms a stage applies. `recolour` does what `rescale` does, too."""


class Augmentation(nn.Module):
    """y (N, *shape) in model space, p, noise for N -> the same shape, where each transform has probability p.

    An example does not depend on the others of its batch, and comes back bit for bit if none of its coins fell.

    Arguments:
        shape: of one example: (D,), (C, L), (C, H, W) or (C, D, H, W).
        names: of the transforms, of `possible(shape)`.

    Raises:
        UsageError: if a transform is not possible for the shape.
    """

    chosen: Tensor

    def __init__(self, shape: tuple[int, ...], names: Sequence[str]) -> None:
        super().__init__()
        check_names(shape, names)
        self._possible = possible(shape)
        # A buffer, so that what was chosen from the data is saved and loaded with the model.
        self.register_buffer("chosen", torch.tensor([name in names for name in self._possible]))
        self.register_load_state_dict_post_hook(lambda module, _: module._arrange())  # type: ignore[no-untyped-call]
        self._arrange()

    def _arrange(self) -> None:
        """The stages of the pipe, of the transforms that are chosen."""
        self.names = tuple(n for n, chosen in zip(self._possible, self.chosen.tolist(), strict=True) if chosen)
        self._stages = [stage for stage, own in STAGES if set(own) & set(self.names)]
        if recolour in self._stages and rescale in self._stages:
            self._stages.remove(rescale)

    def forward(self, y: Tensor, p: Tensor | float, noise: Noise) -> Tensor:
        """p in [0, 1], a number or a scalar tensor. Half precision comes back as single, which positions need."""
        with torch.autocast(y.device.type, enabled=False):
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            draws = Draws(self.names, p, noise, y.dtype)
            for stage in self._stages:
                y = stage(y, draws, noise)
            return y


def choose(spec: DataSpec, y: Tensor, condition: Tensor | None = None) -> tuple[str, ...]:
    """The transforms that suit the data.

    All that are possible, but
        - flips and quarter turns only where `is_symmetric` finds nothing against them, and rotations by any angle only
          where quarter turns are among them: else they make 9 of 6;
        - no noise for pictures and volumes (the paper's set "bgc"), and no cutout.

    Arguments:
        spec: of the data.
        y: training examples (N, *shape) in model space; the first few hundred are enough.
        condition: theirs, where the model is conditional: class indices (N,) or vectors (N, size).
    """
    names = possible(y.shape[1:])
    unsuitable = {"cutout"}
    if spec.kind in ("image", "volume"):
        unsuitable.add("noise")
        if not is_symmetric(y, mirror, 2, condition):
            unsuitable.add("flip")
        if "rot90" not in names or not is_symmetric(y, quarter_turn, 4, condition):
            unsuitable |= {"rot90", "rotate"}
    return tuple(name for name in names if name not in unsuitable)


class Controller(nn.Module):
    """The strength p, moved so that the discriminator's sign statistic r stays at its target.

    Every `every` calls of `adjust`:  p <- p + sign(r - target) (progress - last progress) / speed, in [0, max_p].

    Arguments:
        target: of r, in (-1, 1).
        speed: share of the training budget in which p can go from 0 to 1.
        max_p: largest p.
        every: steps over which r is averaged.

    Attributes:
        p, r: the strength, and the statistic that moved it last, scalars.
    """

    p: Tensor
    r: Tensor
    signs: Tensor
    count: Tensor
    calls: Tensor
    progress: Tensor

    def __init__(self, target: float = 0.6, speed: float = 0.2, max_p: float = 0.8, every: int = 4) -> None:
        super().__init__()
        self.target, self.speed, self.max_p, self.every = target, speed, max_p, every
        for name in ("p", "r", "signs", "count"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, margin: Tensor) -> None:
        """Count the signs of margins (N,): D(x) of real x where 0 is the border, D(x) - D(G(z)) of pairs elsewhere."""
        self.signs += margin.sign().sum(dtype=torch.float32)
        self.count += margin.numel()

    @torch.no_grad()
    def adjust(self, progress: float) -> None:
        """Move p when the share `progress` of the training budget is spent. Nothing waits for the device."""
        sums = torch.stack([self.signs, self.count])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)  # at every call: to ask on the host whether it is time would wait for the device
        self.calls += 1
        due = (self.calls % self.every == 0) & (sums[1] > 0)
        r = sums[0] / sums[1]
        p = (self.p + (r - self.target).sign() * (progress - self.progress) / self.speed).clamp(0.0, self.max_p)
        for buffer, value in (
            (self.p, p),
            (self.r, r),
            (self.progress, progress),
            (self.signs, 0.0),
            (self.count, 0.0),
        ):
            buffer.copy_(torch.where(due, value, buffer))


def ramp(progress: float, max_p: float) -> float:
    """R3GAN's schedule: from 0 at the start of the budget to max_p at its end, for progress in [0, 1]."""
    return cosine(0.0, max_p, progress)
