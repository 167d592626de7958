r"""Linear maps: z = W x + b over the channels, parametrised such that det W is cheap and never 0.

Kingma & Dhariwal 2018 (arXiv:1807.03039): activation normalisation, and the LU form of an invertible 1x1 convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.flow.transforms import Result, Transform


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

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.shift.view(shape)) * self.log_scale.exp().view(shape), self._ladj(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        shape = (-1, *[1] * (z.ndim - 2))
        return z * (-self.log_scale).exp().view(shape) + self.shift.view(shape), -self._ladj(z)

    def initialize(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
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

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        lower, upper = self._factors()
        columns = x.transpose(0, 1)[self.permutation]
        # In half precision the map would no longer be the one whose determinant is added.
        with torch.autocast(x.device.type, enabled=False):
            z = (lower @ upper) @ columns.flatten(1)
        return z.view_as(columns).transpose(0, 1), self._ladj(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        lower, upper = self._factors()
        columns = z.transpose(0, 1)
        solved = torch.linalg.solve_triangular(lower, columns.flatten(1), upper=False, unitriangular=True)
        solved = torch.linalg.solve_triangular(upper, solved, upper=True)
        return solved.view(columns.shape)[self.inverse_permutation].transpose(0, 1), -self._ladj(z)
