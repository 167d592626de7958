r"""Gaussian mixture fitted by expectation-maximization (Dempster, Laird & Rubin 1977, J. R. Statist. Soc. B 39).

    p(y) = sum_k w_k N(y; mu_k, Sigma_k),   Sigma_k = L_k L_k^T full, or diagonal,
in standardized model space, fitted by scikit-learn. Where they are not given, covariance type and number of
components (1, 2, 4, ... while that helps) are those with the greatest likelihood of a held-out fifth of the
examples; the mixture is then fitted to all of them. Selection sees at most 10,000 examples. Full covariances
are tried in up to 256 dimensions.

Given classes, each has its own mixture. A class (or a data set) of fewer than 10 examples gets one diagonal Gaussian
around its mean, whose variances are those of its n examples shrunk by one example of variance 1, the variance of
model space: (n s^2 + 1) / (n + 1).
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from trilemma.classical.base import ClosedForm
from trilemma.core.model import ModelConfig
from trilemma.core.noise import Key, Noise, hash_key
from trilemma.core.score import Score
from trilemma.core.spec import Split

MIN_EXAMPLES = 10
MAX_COMPONENTS = 128
MAX_FULL_DIMS = 256
MAX_SELECTION = 10_000


class GMMConfig(ModelConfig):
    components: int | None = Field(None, ge=1, description="per class; by default chosen by held-out likelihood")
    covariance: Literal["auto", "full", "diag"] = Field("auto", description="auto: by held-out likelihood")
    floor: float = Field(1e-6, gt=0, description="added to every variance, in squared standard deviations of the data")
    iterations: int = Field(100, ge=1, description="most steps of expectation-maximization")


class GMM(ClosedForm):
    """A mixture of Gaussians with full or diagonal covariances."""

    Config = GMMConfig
    config: GMMConfig
    label: Tensor
    log_weight: Tensor
    mean: Tensor
    scale: Tensor

    def build(self) -> None:
        self.register_buffer("label", torch.empty(0, dtype=torch.int64))  # (K,) the class of each component
        self.register_buffer("log_weight", torch.empty(0, dtype=torch.float64))  # (K,) sums to one in each class
        self.register_buffer("mean", torch.empty(0, dtype=torch.float64))  # (K, D)
        self.register_buffer("scale", torch.empty(0, dtype=torch.float64))  # (K, D, D) Cholesky, or (K, D) diagonal

    def prepare(self, train: Split, noise: Noise) -> None:
        y, labels = self.examples(train, noise)
        weights, means, scales, sizes = [], [], [], []
        for c in range(self.classes):
            w, m, s = self._fit_class(y[labels == c].cpu().numpy(), (*noise.key, "gmm", c))
            weights.append(w)
            means.append(m)
            scales.append(s)
            sizes.append(len(w))
        if any(s.ndim == 3 for s in scales):
            scales = [s if s.ndim == 3 else s[:, :, None] * np.eye(s.shape[1]) for s in scales]
        self.label = torch.arange(self.classes).repeat_interleave(torch.tensor(sizes)).to(y.device)
        self.log_weight = torch.from_numpy(np.log(np.concatenate(weights))).to(y.device)
        self.mean = torch.from_numpy(np.concatenate(means)).to(y.device)
        self.scale = torch.from_numpy(np.concatenate(scales)).to(y.device)

    def _fit_class(self, y: np.ndarray, key: tuple[Key, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights (K,), means (K, D) and scales (K, D, D) or (K, D) of one mixture."""
        n = len(y)
        if n < MIN_EXAMPLES:
            variance = (n * y.var(0) + 1.0) / (n + 1.0)
            return np.ones(1), y.mean(0, keepdims=True), np.sqrt(variance)[None]
        seed = hash_key(*key) % 2**32
        kind, components = self._select(y, seed)
        mixture = self._mixture(y, kind, components, seed)
        if kind == "diag":
            return mixture.weights_, mixture.means_, np.sqrt(mixture.covariances_)
        return mixture.weights_, mixture.means_, np.linalg.cholesky(mixture.covariances_)

    def _select(self, y: np.ndarray, seed: int) -> tuple[str, int]:
        """Covariance type and number of components with the greatest held-out likelihood."""
        fixed = self.config.covariance
        kinds = [fixed] if fixed != "auto" else ["full", "diag"] if y.shape[1] <= MAX_FULL_DIMS else ["diag"]
        sizes = [self.config.components] if self.config.components else [2**i for i in range(8)]
        if len(kinds) == len(sizes) == 1:
            return kinds[0], min(sizes[0], len(y))
        y = y[:MAX_SELECTION]
        held = len(y) // 5
        best, choice = -math.inf, (kinds[0], 1)
        for kind in kinds:
            before = -math.inf
            for k in sizes:
                if k > min(MAX_COMPONENTS, (len(y) - held) // 2) and k != sizes[0]:
                    break
                score = self._mixture(y[held:], kind, k, seed).score(y[:held])
                if score > best:
                    best, choice = score, (kind, k)
                if score < before:
                    break
                before = score
        return choice

    def _mixture(self, y: np.ndarray, kind: str, components: int, seed: int) -> GaussianMixture:
        mixture = GaussianMixture(
            min(components, len(y)),
            covariance_type=kind,
            reg_covar=self.config.floor,
            max_iter=self.config.iterations,
            random_state=seed,
        )
        with warnings.catch_warnings():
            # The number of iterations is a budget: the likelihood has grown with each, and is judged on held-out data.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return mixture.fit(y)

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        own = self.label == self.class_index(condition, noise.n)[:, None]  # (n, K)
        k = noise.categorical(torch.where(own, self.log_weight.exp(), 0.0))
        eps = noise.normal(self.codec.dims, dtype=torch.float64)
        y = self.mean[k]
        for j in torch.unique(k).tolist():
            rows = k == j
            y[rows] += eps[rows] * self.scale[j] if self.scale.ndim == 2 else eps[rows] @ self.scale[j].T
        return self.to_model_space(y)

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        y, label = y.flatten(1), self.class_index(condition, len(y))
        log_p = y.new_full((len(y), len(self.mean)), -math.inf)
        for j in range(len(self.mean)):
            rows = label == self.label[j]
            log_p[rows, j] = self.log_weight[j] + self._log_component(y[rows], j)
        return Score(log_p.logsumexp(1), "exact")

    def _log_component(self, y: Tensor, j: int) -> Tensor:
        """log N(y; mu_j, Sigma_j) of y (N, D), (N,)."""
        difference, scale = y - self.mean[j], self.scale[j]
        if scale.ndim == 1:
            z, log_det = difference / scale, scale.log().sum()
        else:
            z = torch.linalg.solve_triangular(scale, difference.T, upper=False).T
            log_det = scale.diagonal().log().sum()
        return -0.5 * z.square().sum(1) - log_det - 0.5 * y.shape[1] * math.log(2.0 * math.pi)
