r"""Invertible maps with a known Jacobian determinant: the parts that normalizing flows are made of.

For z = f(x) with z ~ p_Z a flow has the density (Rezende & Mohamed 2015, arXiv:1505.05770)
    log p(x) = log p_Z(f(x)) + log |det df/dx|,
and the last term, `ladj`, adds up along a composition. Every `Transform` keeps the shape of x, so parts nest
freely: a multi-scale flow (Dinh et al. 2017, arXiv:1605.08803) is steps on a `Squeezed` picture, the last of
which works on a `Part` of the channels only. Where a transform is conditional, f depends on a `context`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trilemma.flow.splines import ElementwiseMap


class Transform(nn.Module):
    """An invertible map of x (N, *shape), given a context (N, size) or None."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (N, *shape) and ladj (N,) = log |det dz/dx|."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (N, *shape) and ladj (N,) = log |det dx/dz|."""
        raise NotImplementedError

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Set what is initialised from data x (N, *shape); returns z."""
        return self(x, context)[0]  # type: ignore[no-any-return]


class Compose(Transform):
    """The transforms one after the other."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def _parts(self) -> list[Transform]:
        return list(self.transforms)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ladj = x.new_zeros(x.shape[0])
        for part in self._parts():
            x, term = part(x, context)
            ladj = ladj + term
        return x, ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ladj = z.new_zeros(z.shape[0])
        for part in reversed(self._parts()):
            z, term = part.inverse(z, context)
            ladj = ladj + term
        return z, ladj

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for part in self._parts():
            x = part.initialize(x, context)
        return x


class ActNorm(Transform):
    """z = (x - shift) exp(log_scale), one pair for each channel (dimension 1) of x (N, C, *).

    Initialised such that z has mean 0 and variance 1 on the first data (Kingma & Dhariwal 2018, arXiv:1807.03039).
    A channel that is constant there is only shifted.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * (x[0].numel() // x.shape[1])).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.shift.view(shape)) * self.log_scale.exp().view(shape), self._ladj(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (z.ndim - 2))
        return z * (-self.log_scale).exp().view(shape) + self.shift.view(shape), -self._ladj(z)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            channels = x.transpose(0, 1).flatten(1)
            mean, std = channels.mean(1), channels.std(1, correction=0)
            varies = std > 1e-6 * (1.0 + mean.abs())
            self.shift.copy_(mean)
            self.log_scale.copy_(-torch.where(varies, std, torch.ones_like(std)).log())
        return self(x, context)[0]  # type: ignore[no-any-return]


class LULinear(Transform):
    """z = L U P x over the channels (dimension 1) of x (N, C, *): an invertible 1x1 convolution.

    P is a fixed permutation, L unit lower triangular, U upper triangular with the positive diagonal
    exp(log_diagonal), so ladj = sum(log_diagonal) per pixel (Kingma & Dhariwal 2018, arXiv:1807.03039,
    section 3.2). It starts as P alone.

    Arguments:
        permutation: (C,) int64, (P x)_i = x_permutation[i].
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        n = permutation.shape[0]
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", permutation.argsort())
        self.lower = nn.Parameter(torch.zeros(n, n))
        self.upper = nn.Parameter(torch.zeros(n, n))
        self.log_diagonal = nn.Parameter(torch.zeros(n))

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + self.log_diagonal.exp().diag()

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.log_diagonal.sum() * (x[0].numel() // x.shape[1])).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        columns = x.transpose(0, 1)[self.permutation]
        # In half precision the map would no longer be the one whose determinant is added.
        with torch.autocast(x.device.type, enabled=False):
            z = (lower @ upper) @ columns.flatten(1)
        return z.view_as(columns).transpose(0, 1), self._ladj(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        columns = z.transpose(0, 1)
        solved = torch.linalg.solve_triangular(lower, columns.flatten(1), upper=False, unitriangular=True)
        solved = torch.linalg.solve_triangular(upper, solved, upper=True)
        return solved.view(columns.shape)[self.inverse_permutation].transpose(0, 1), -self._ladj(z)


class Elementwise(Transform):
    """Each dimension by its own univariate map, whose parameters depend on the context alone.

    It starts as the identity.

    Arguments:
        shape: of one example.
        elementwise: the map.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, shape: tuple[int, ...], elementwise: ElementwiseMap, context_dim: int = 0) -> None:
        super().__init__()
        self.elementwise = elementwise
        self.parameters_of_map = nn.Parameter(torch.zeros(elementwise.size, 1, *shape))
        self.context = nn.Linear(context_dim, self.parameters_of_map.numel(), bias=False) if context_dim else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def _parameters_for(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(size, N, *shape)"""
        shared = self.parameters_of_map.expand(-1, *x.shape)
        if self.context is None:
            return shared
        own: Tensor = self.context(context)
        return shared + own.view(x.shape[0], self.elementwise.size, *x.shape[1:]).transpose(0, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.elementwise.forward(x, self._parameters_for(x, context))
        return z, log_slope.flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.elementwise.inverse(z, self._parameters_for(z, context))
        return x, log_slope.flatten(1).sum(1)


class Squeezed(Transform):
    """`inner` on the picture (N, C, H, W) with its fh x fw blocks of pixels as channels, (N, C fh fw, H/fh, W/fw).

    Arguments:
        factors: (fh, fw), which divide (H, W).
    """

    def __init__(self, inner: Transform, factors: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.factors = inner, factors

    def _squeeze(self, x: Tensor) -> Tensor:
        (n, c, h, w), (fh, fw) = x.shape, self.factors
        blocks = x.reshape(n, c, h // fh, fh, w // fw, fw)
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, c * fh * fw, h // fh, w // fw)

    def _unsqueeze(self, y: Tensor) -> Tensor:
        (n, c, h, w), (fh, fw) = y.shape, self.factors
        blocks = y.reshape(n, c // (fh * fw), fh, fw, h, w)
        return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c // (fh * fw), h * fh, w * fw)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.inner(self._squeeze(x), context)
        return self._unsqueeze(y), ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.inner.inverse(self._squeeze(z), context)
        return self._unsqueeze(y), ladj

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._unsqueeze(self.inner.initialize(self._squeeze(x), context))


class Part(Transform):
    """`inner` on x[:, window]; the rest of x stays as it is.

    Arguments:
        window: one slice for each of the first dimensions of an example.
    """

    def __init__(self, inner: Transform, *window: slice) -> None:
        super().__init__()
        self.inner = inner
        self.index = (slice(None), *window)

    def _put(self, x: Tensor, part: Tensor) -> Tensor:
        result = x.clone()
        result[self.index] = part
        return result

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, ladj = self.inner(x[self.index], context)
        return self._put(x, z), ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.inner.inverse(z[self.index], context)
        return self._put(z, x), ladj

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._put(x, self.inner.initialize(x[self.index], context))


class Reshaped(Transform):
    """`inner` on examples in another shape, such as flat vectors.

    Arguments:
        shape: of one example, as `inner` takes it.
    """

    def __init__(self, inner: Transform, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.shape = inner, shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, ladj = self.inner(x.reshape(-1, *self.shape), context)
        return z.reshape(x.shape), ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.inner.inverse(z.reshape(-1, *self.shape), context)
        return x.reshape(z.shape), ladj

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.inner.initialize(x.reshape(-1, *self.shape), context).reshape(x.shape)
