r"""Autoregressive: each dimension by an elementwise map whose parameters come from the dimensions before it.

    z_i = g(x_i; net(x_<i, c)),   log |det dz/dx| = sum_i log g'(x_i)
(Papamakarios et al. 2017, arXiv:1705.07057; with other maps g: Huang et al. 2018, arXiv:1804.00779; Durkan et al. 2019,
arXiv:1906.04032). The direct way is one pass; the inverse goes through the dimensions, one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.core.noise import Noise
from trilemma.flow.elementwise import ElementwiseMap
from trilemma.flow.transforms import Result, Transform
from trilemma.nets.masked import MaskedMLP


class Autoregressive(Transform):
    """An autoregressive map of vectors x (N, D).

    Arguments:
        net: of D inputs and `elementwise.size` outputs for each.
        elementwise: the map g.
    """

    def __init__(self, net: MaskedMLP, elementwise: ElementwiseMap) -> None:
        super().__init__()
        assert net.size == elementwise.size
        self.net, self.elementwise, self.numerical = net, elementwise, elementwise.numerical

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Result:
        raw = self.net(x, context).to(x.dtype)
        # Examples stand last within the map: there the network's last product puts them.
        z, log_slope = self.elementwise.forward(x.T.contiguous(), raw.T.reshape(self.net.size, *x.T.shape))
        return z.T, log_slope.sum(0)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        log_slopes, columns = [], z.T.contiguous()

        def choose(i: int, outputs: Tensor) -> Tensor:
            x, log_slope = self.elementwise.inverse(columns[i], outputs.to(z.dtype).T.contiguous())
            log_slopes.append(log_slope)
            return x

        x = self.net.sequential(choose, z.shape[0], context)
        return x, torch.stack(log_slopes).sum(0)
