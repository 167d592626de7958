r"""Linear maps: z = W x + b over the channels (dimension 1) of x (N, C, *), that is, invertible 1x1 convolutions.

- `ActNorm`: W diagonal, initialised from data (Kingma & Dhariwal 2018, arXiv:1807.03039).
- `Dense`: W free, a random rotation at first; det W costs O(C^3) (the first form there, section 3.2).
- `LULinear`: W = L U P, whose determinant is read off (the second form there).
- `Householder`: W a product of reflections, orthogonal (Tomczak & Welling 2016, arXiv:1611.09630).
- `Permute`: W a fixed permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.flow.transforms import Result, Transform


def mix(weight: Tensor, x: Tensor) -> Tensor:
    """weight (C, C) times the channels of x (N, C, *)."""
    columns = x.transpose(0, 1)  # one large product is several times quicker than one for each picture
    # In half precision the map would no longer be the one whose determinant is added.
    with torch.autocast(x.device.type, enabled=False):
        return (weight @ columns.flatten(1)).view_as(columns).transpose(0, 1)


def pixels(x: Tensor) -> int:
    """The number of positions of x (N, C, *), at each of which a linear map acts."""
    return x[0].numel() // x.shape[1]


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
        return (self.log_scale.sum() * pixels(x)).expand(x.shape[0])

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


class Permute(Transform):
    """z_i = x_permutation[i] over the channels of x (N, C, *).

    Arguments:
        permutation: (C,) int64.
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", permutation.argsort())

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        return x.index_select(1, self.permutation), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return z.index_select(1, self.inverse_permutation), z.new_zeros(z.shape[0])


class Dense(Transform):
    """z = W x + b with a free W, whose determinant is computed each time. W starts as a random rotation.

    Nothing keeps W away from the singular matrices except ladj, which is -inf there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _ladj(self, x: Tensor) -> Tensor:
        logabsdet: Tensor = torch.linalg.slogdet(self.weight).logabsdet
        return (logabsdet * pixels(x)).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        return mix(self.weight, x) + self.bias.view(-1, *[1] * (x.ndim - 2)), self._ladj(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return mix(torch.linalg.inv(self.weight), z - self.bias.view(-1, *[1] * (z.ndim - 2))), -self._ladj(z)


def product_of_reflections(vectors: Tensor) -> Tensor:
    r"""The orthogonal matrix H_1 H_2 ... H_K with H_k = I - 2 v_k v_k^T / |v_k|^2, from vectors (..., K, C).

    With the vectors as columns of V it is I - V S^-1 V^T, S the upper triangle of V^T V with its diagonal halved
    (Joffrain et al. 2006, ACM TOMS 32): two products in place of K.
    """
    gram = vectors @ vectors.mT
    s = gram.triu(1) + torch.diag_embed(0.5 * gram.diagonal(dim1=-2, dim2=-1))
    eye = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    solved: Tensor = torch.linalg.solve_triangular(s, vectors, upper=True)
    return eye - vectors.mT @ solved


class Householder(Transform):
    """z = H_1 ... H_K x, a product of K reflections: orthogonal, so ladj = 0. K = C reaches every such matrix.

    Arguments:
        channels: C.
        reflections: K >= 1; they start as random ones.
    """

    def __init__(self, channels: int, reflections: int) -> None:
        super().__init__()
        assert reflections >= 1
        self.vectors = nn.Parameter(torch.randn(reflections, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        return mix(product_of_reflections(self.vectors), x), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return mix(product_of_reflections(self.vectors).mT, z), z.new_zeros(z.shape[0])


class LULinear(Transform):
    """z = L U P x + b over the channels (dimension 1) of x (N, C, *): an invertible 1x1 convolution.

    P is a fixed permutation, L unit lower triangular, U upper triangular with the positive diagonal
    exp(log_diagonal), so ladj = sum(log_diagonal) per pixel (Kingma & Dhariwal 2018, arXiv:1807.03039,
    section 3.2). It starts as P alone.

    Arguments:
        permutation: (C,) int64, (P x)_i = x_permutation[i].
        bias: learn b; without, b = 0.
    """

    inverse_permutation: Tensor

    def __init__(self, permutation: Tensor, bias: bool = False) -> None:
        super().__init__()
        n = permutation.shape[0]
        self.register_buffer("inverse_permutation", permutation.argsort())
        self.lower = nn.Parameter(torch.zeros(n, n))
        self.upper = nn.Parameter(torch.zeros(n, n))
        self.log_diagonal = nn.Parameter(torch.zeros(n))
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + self.log_diagonal.exp().diag()

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.log_diagonal.sum() * pixels(x)).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        lower, upper = self._factors()
        with torch.autocast(x.device.type, enabled=False):
            weight = (lower @ upper).index_select(1, self.inverse_permutation)  # cheaper than permuting x
        return self._biased(mix(weight, x), 1.0), self._ladj(x)

    def _biased(self, x: Tensor, sign: float) -> Tensor:
        return x if self.bias is None else x + sign * self.bias.view(-1, *[1] * (x.ndim - 2))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        lower, upper = self._factors()
        columns = self._biased(z, -1.0).transpose(0, 1)
        solved = torch.linalg.solve_triangular(lower, columns.flatten(1), upper=False, unitriangular=True)
        solved = torch.linalg.solve_triangular(upper, solved, upper=True)
        return solved.view(columns.shape)[self.inverse_permutation].transpose(0, 1), -self._ladj(z)
