r"""Generators: a latent z and a condition c to data, through one interface.

    ws = mapping(z, c),   y = synthesis(ws),   z ~ N(0, I)
ws (N, num_ws, w_dim) holds one latent vector w per place where the synthesis network takes one in. What edits, inverts
or mixes samples works on ws, whatever the architecture. Where the literature has no mapping network, w is z itself with
the embedded condition behind it, [z, e(c)].

Truncation trades coverage for quality (Brock et al. 2019, arXiv:1809.11096; Karras et al. 2019, arXiv:1812.04948):
    ws' = centre(c) + psi (ws - centre(c)),   0 <= psi <= 1,
where centre(c) is the mean of ws over z. It is taken per class, so that a truncated sample stays in its class. Of
[z, e(c)] the mean is [0, e(c)], and truncation scales z (where Brock et al. redraw its large entries); the mean of a
mapping network is tracked in training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.core.noise import Noise
from trilemma.nets.conditioning import ConditionEmbedding


class Generator(nn.Module):
    """z (N, z_dim), c -> y (N, *shape).

    c is the condition as the data have it: class indices (N,), vectors (N, size), or None.

    Attributes:
        shape: of y.
        z_dim, w_dim: sizes of z and of one w.
        num_ws: how many w the synthesis takes.
    """

    def __init__(self, shape: tuple[int, ...], z_dim: int, w_dim: int, num_ws: int) -> None:
        super().__init__()
        self.shape, self.z_dim, self.w_dim, self.num_ws = shape, z_dim, w_dim, num_ws

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """ws (N, num_ws, w_dim)."""
        raise NotImplementedError

    def synthesis(self, ws: Tensor, noise: Noise | None = None) -> Tensor:
        """y (N, *shape) from ws (N, num_ws, w_dim).

        Arguments:
            noise: draws for networks that take in noise of their own; None is the fixed noise of the network.
        """
        raise NotImplementedError

    def centre(self, c: Tensor | None) -> Tensor:
        """The mean of ws given c, (N or 1, num_ws, w_dim): that of z = 0, where ws are linear in z."""
        zero = next(self.parameters()).new_zeros(1 if c is None else len(c), self.z_dim)
        return self.mapping(zero, c)

    def truncate(self, ws: Tensor, c: Tensor | None, psi: float) -> Tensor:
        """ws drawn towards their mean; psi = 1 leaves them, 0 is the mean."""
        return ws if psi == 1.0 else torch.lerp(self.centre(c).to(ws.dtype), ws, psi)

    def track(self, ws: Tensor, c: Tensor | None) -> None:
        """Learn what `centre` needs from the ws of a training batch."""

    def forward(
        self, z: Tensor, c: Tensor | None = None, *, truncation: float = 1.0, noise: Noise | None = None
    ) -> Tensor:
        """y (N, *shape)."""
        return self.synthesis(self.truncate(self.mapping(z, c), c, truncation), noise)


def mix_styles(ws: Tensor, others: Tensor, first: Tensor) -> Tensor:
    """Each example's ws, from the place first (N,) on those of the other (Karras et al. 2019)."""
    place = torch.arange(ws.shape[1], device=ws.device)
    return torch.where((place < first.unsqueeze(1)).unsqueeze(2), ws, others)


class DirectGenerator(Generator):
    """w = [z, e(c)], taken in at one place; a network (z, context) -> y is all that differs.

    Arguments:
        network: z (N, z_dim), context (N, embed.dim) or None -> (N, *shape), or flat.
        embed: the condition's embedding.
    """

    def __init__(self, network: nn.Module, embed: ConditionEmbedding, z_dim: int, shape: tuple[int, ...]) -> None:
        super().__init__(shape, z_dim, z_dim + embed.dim, 1)
        self.embed, self.network = embed, network

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        context = self.embed(c)
        return (z if context is None else torch.cat([z, context], 1)).unsqueeze(1)

    def synthesis(self, ws: Tensor, noise: Noise | None = None) -> Tensor:
        z, context = torch.split(ws.squeeze(1), [self.z_dim, self.w_dim - self.z_dim], 1)
        y: Tensor = self.network(z, context if context.shape[1] else None)
        return y.reshape(-1, *self.shape)
