r"""Discriminators: (x, c) -> a real number per example, the larger, the more real.

    D(x, c) = u . phi(x) + b + <e(c), phi(x)> / sqrt(F),   phi(x) in R^F,
where phi is the trunk and e(c) the embedded condition; 1 / sqrt(F) is ours, and left out where weights are spectrally
normalised, which could not make up for it. For the best D, log p(x|c) / q(x|c) splits into
log p(c|x) / q(c|x), which is linear in an embedding of c if both are softmax models in phi(x), and log p(x) / q(x)
(projection discriminator: Miyato & Koyama 2018, arXiv:1802.05637). A critic of the Wasserstein distance has the same
form; its range is all of R.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trilemma.core.spec import ConditionSpec
from trilemma.nets.conditioning import ConditionEmbedding


class Trunk(nn.Module):
    """phi: x (N, *shape) -> (N, feature_dim).

    Attributes:
        feature_dim: F.
        mixes: whether the examples of a batch influence each other's features.
    """

    feature_dim: int
    mixes = False

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Discriminator(nn.Module):
    """A trunk, a linear output and, with a condition, its projection.

    Arguments:
        trunk: has `features(x)` and `feature_dim`.
        condition: what D is conditioned on, or None.
        normalized: weights will be spectrally normalised.
    """

    def __init__(self, trunk: nn.Module, condition: ConditionSpec | None, *, normalized: bool = False) -> None:
        super().__init__()
        self.trunk, self.normalized = trunk, normalized
        self.mixes = bool(getattr(trunk, "mixes", False))
        size = int(trunk.feature_dim)  # type: ignore[arg-type]
        self.output = nn.Linear(size, 1)
        self.embed = ConditionEmbedding(condition, size)

    def features(self, x: Tensor) -> Tensor:
        """phi(x), (N, F)."""
        features: Tensor = self.trunk.features(x)  # type: ignore[operator]
        return features

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """x (N, *shape), c (N,), (N, size) or None -> (N,)."""
        features = self.features(x)
        value: Tensor = self.output(features).squeeze(1)
        context = self.embed(c)
        if context is not None:
            projection = (context * features).sum(1)
            value = value + (projection if self.normalized else projection / math.sqrt(features.shape[1]))
        # Differences of large logits need single precision, also where networks compute in half.
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


class NetworkTrunk(Trunk):
    """Any network to vectors as a trunk.

    Arguments:
        network: x (N, *shape) -> (N, feature_dim).
        flat: it takes x (N, D).
    """

    def __init__(self, network: nn.Module, *, flat: bool = False) -> None:
        super().__init__()
        self.network, self.flat = network, flat
        self.feature_dim = int(network.feature_dim)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x.flatten(1) if self.flat else x)
        return features
