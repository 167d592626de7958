r"""Invertible maps with a known Jacobian determinant: the parts that normalizing flows are made of.

For z = f(x) with z ~ p_Z a flow has the density (Rezende & Mohamed 2015, arXiv:1505.05770)
    log p(x) = log p_Z(f(x)) + log |det df/dx|,
and the last term, `ladj`, adds up along a composition. Where f draws from q(z|x) instead (dequantization), ladj is the
term of the bound log p(x) >= E_q[log p_Z(z) + ladj] (Nielsen et al. 2020, arXiv:2007.02731); where the determinant is
estimated (Hutchinson, Russian roulette), so is ladj. `Transform.kind` says which, and a flow's `Score.kind` is the
combination of its parts' kinds: it is derived, never typed by hand.

A transform keeps the number of dimensions, so parts nest freely: a multi-scale flow (Dinh et al. 2017,
arXiv:1605.08803) is steps on a `Squeezed` picture, the last of which works on a `Part` of the channels only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.core.score import Kind, combine_kinds

Result = tuple[Tensor, Tensor]
"""An image (N, *) and ladj (N,)."""


class Transform(nn.Module):
    """An invertible map of x (N, *shape), given a context (N, size) or None.

    Attributes:
        kind: of ladj in `forward`: "exact", or "lower_bound" or "estimate" of what adds to log p(x).
        bijective: `inverse` gives x back; else several x have the same z, as the numbers between two levels have.
        stochastic: `forward` draws from `noise`, which must then be given.
        numerical: `inverse` iterates, so it is exact only to its tolerance.
    """

    kind: Kind = "exact"
    bijective: bool = True
    stochastic: bool = False
    numerical: bool = False

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        """z (N, *shape) and ladj (N,) = log |det dz/dx|, or its bound or estimate."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        """x (N, *shape) and ladj (N,) = log |det dx/dz|.

        Where `forward` is stochastic, ladj is NaN, because the true value is unknown.
        """
        raise NotImplementedError

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Set what is initialised from data x (N, *shape); returns z."""
        return self(x, context, noise)[0]  # type: ignore[no-any-return]

    def _be_like(self, inner: Transform) -> None:
        """Take over what is said of another transform."""
        self.kind, self.bijective = inner.kind, inner.bijective
        self.stochastic, self.numerical = inner.stochastic, inner.numerical


class Compose(Transform):
    """The transforms one after the other."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        for part in self._parts():
            self.kind = combine_kinds(self.kind, part.kind)
            self.bijective &= part.bijective
            self.stochastic |= part.stochastic
            self.numerical |= part.numerical

    def _parts(self) -> list[Transform]:
        return list(self.transforms)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        ladj = x.new_zeros(x.shape[0])
        for part in self._parts():
            x, term = part(x, context, noise)
            ladj = ladj + term
        return x, ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        ladj = z.new_zeros(z.shape[0])
        for part in reversed(self._parts()):
            z, term = part.inverse(z, context)
            ladj = ladj + term
        return z, ladj

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        for part in self._parts():
            x = part.initialize(x, context, noise)
        return x


class Inverse(Transform):
    """The inverse of `inner` as the way from x to z: what was quick becomes slow, and the other way round.

    An inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934) is the `Inverse` of a masked one.
    """

    def __init__(self, inner: Transform) -> None:
        super().__init__()
        assert inner.kind == "exact", "the inverse of a bound or an estimate is neither"
        assert not inner.stochastic, "the inverse of a stochastic transform has no density"
        assert not inner.numerical, "a density to a tolerance would pass for an exact one"
        self.inner = inner

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        return self.inner.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return self.inner(z, context)  # type: ignore[no-any-return]


class Rearranged(Transform):
    """`inner` on examples whose numbers are put in another order or shape, which costs no volume.

    Arguments:
        there, back: x (N, *shape) -> (N, *inner's shape), and back.
    """

    def __init__(self, inner: Transform, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.there, self.back = inner, there, back
        self._be_like(inner)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        z, ladj = self.inner(self.there(x), context, noise)
        return self.back(z), ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        x, ladj = self.inner.inverse(self.there(z), context)
        return self.back(x), ladj

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        return self.back(self.inner.initialize(self.there(x), context, noise))


class Reshaped(Rearranged):
    """`inner` on examples in another shape, such as flat vectors.

    Arguments:
        outer: shape of one example.
        shape: the same as `inner` takes it.
    """

    def __init__(self, inner: Transform, outer: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__(inner, lambda x: x.reshape(-1, *shape), lambda z: z.reshape(-1, *outer))


class Squeezed(Rearranged):
    """`inner` on the picture (N, C, H, W) with its fh x fw blocks of pixels as channels, (N, C fh fw, H/fh, W/fw).

    Arguments:
        factors: (fh, fw), which divide (H, W).
    """

    def __init__(self, inner: Transform, factors: tuple[int, int]) -> None:
        super().__init__(inner, self._squeeze, self._unsqueeze)
        self.factors = factors

    def _squeeze(self, x: Tensor) -> Tensor:
        (n, c, h, w), (fh, fw) = x.shape, self.factors
        blocks = x.reshape(n, c, h // fh, fh, w // fw, fw)
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, c * fh * fw, h // fh, w // fw)

    def _unsqueeze(self, y: Tensor) -> Tensor:
        (n, c, h, w), (fh, fw) = y.shape, self.factors
        blocks = y.reshape(n, c // (fh * fw), fh, fw, h, w)
        return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c // (fh * fw), h * fh, w * fw)


class Part(Transform):
    """`inner` on x[:, window]; the rest of x stays as it is.

    Arguments:
        window: one slice for each of the first dimensions of an example.
    """

    def __init__(self, inner: Transform, *window: slice) -> None:
        super().__init__()
        self.inner = inner
        self._be_like(inner)
        self.index = (slice(None), *window)

    def _put(self, x: Tensor, part: Tensor) -> Tensor:
        result = x.clone()
        result[self.index] = part
        return result

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        z, ladj = self.inner(x[self.index], context, noise)
        return self._put(x, z), ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        x, ladj = self.inner.inverse(z[self.index], context)
        return self._put(z, x), ladj

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        return self._put(x, self.inner.initialize(x[self.index], context, noise))


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of z (N, *), (N,)."""
    return sum_dims(-0.5 * (z.square() + math.log(2.0 * math.pi)))


def sum_dims(x: Tensor) -> Tensor:
    """x (N, *) summed over all but the first dimension, (N,)."""
    return x.flatten(1).sum(1)
