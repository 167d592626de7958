r"""The joint histogram, and what is left of it in many dimensions: the Chow-Liu tree of pairwise histograms.

structure="joint": the product of K equal cells (and the two outer ones, see `bins`) per dimension is a grid of joint
cells; n of the N examples lie in cell f, and
    P(f) = (n(f) + alpha prod_i p_i(f_i)) / (N + alpha),   p(x) = P(f(x)) prod_i q_i(x_i | f_i),
with p_i the smoothed marginal histograms. So density is positive everywhere and integrates to one. K and alpha
maximize the leave-one-out likelihood. The number of cells grows as K^D, which is why this stops at three dimensions.

structure="tree": prod_i P(x_i | x_pa(i)) along a maximum spanning tree of mutual informations (see `forest`).

structure="auto": joint in up to three dimensions of model space, tree in more.

Given classes, each has its own table, shrunk towards that of all data, so a class of few examples resembles all data.
Pictures with levels have exact probabilities; the bound on the discrete columns of a table is tight where their
cells are single values.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trilemma.classical.bins import CANDIDATES, axes_of, edges_for, shrink, tally
from trilemma.classical.forest import STRENGTHS, chow_liu
from trilemma.classical.independent import Independent, IndependentConfig
from trilemma.core.errors import UsageError
from trilemma.core.model import ModelConfig
from trilemma.core.noise import Noise
from trilemma.core.spec import Split

MAX_JOINT_DIMS = 3
MAX_JOINT_CELLS = 2**18
MAX_TREE_DIMS = 4096
"""The tree compares all D^2 pairs; 4096 is a grey picture of 64 x 64."""


class HistogramConfig(IndependentConfig):
    pseudocount: float = Field(1.0, gt=0, description="added to the count of every one-dimensional cell")
    structure: Literal["auto", "joint", "tree"] = Field("auto", description="joint cells or a tree of pairs")


class Histogram(Independent):
    """A joint histogram in few dimensions, a Chow-Liu tree of pairwise histograms in many."""

    Config: ClassVar[type[ModelConfig]] = HistogramConfig
    config: HistogramConfig
    p_joint: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("p_joint", torch.empty(0, dtype=torch.float64))  # (C, cells), if joint

    @property
    def is_joint(self) -> bool:
        if self.config.structure == "auto":
            return self.codec.dims <= MAX_JOINT_DIMS
        return self.config.structure == "joint"

    def prepare(self, train: Split, noise: Noise) -> None:
        """Fit.

        Raises:
            UsageError: the chosen structure cannot be had in that many dimensions.
        """
        d = self.codec.dims
        if self.is_joint and d > MAX_JOINT_DIMS:
            raise UsageError(
                f"{self.name}: structure=joint fills at most {MAX_JOINT_DIMS} dimensions and these data have {d}; "
                "use structure=tree"
            )
        if not self.is_joint and d > MAX_TREE_DIMS:
            raise UsageError(
                f"{self.name}: structure=tree compares all pairs of at most {MAX_TREE_DIMS} dimensions and these data "
                f"have {d}; make the data smaller, or use the model independent"
            )
        if self.is_joint:
            self._fit_joint(*self.examples(train, noise))
        else:
            super().prepare(train, noise)

    def find_parents(self, f: Tensor, labels: Tensor) -> Tensor:
        """The Chow-Liu forest."""
        return chow_liu(f, self.bins.valid, labels, self.classes)

    # -- joint cells -------------------------------------------------------------------------------------------

    def _fit_joint(self, y: Tensor, labels: Tensor) -> None:
        axes, columns = axes_of(self.codec), y.T.cpu().numpy()
        best, cells, alpha = -float("inf"), 0, 0.0
        for k in CANDIDATES:
            self.bins.fit(y, axes, [edges_for(c, a, k) for c, a in zip(columns, axes, strict=True)])
            if self.bins.size ** len(axes) > MAX_JOINT_CELLS and best > -float("inf"):
                break
            f = self.bins.index(y)
            within = self.bins.log_density(y, f).sum(1)
            for strength in STRENGTHS:
                score = (self._leave_one_out(f, labels, strength) + within).mean().item()
                if score > best:
                    best, cells, alpha = score, k, strength
        self.bins.fit(y, axes, [edges_for(c, a, cells) for c, a in zip(columns, axes, strict=True)])
        self._set_joint(self.bins.index(y), labels, alpha)

    def _counts(self, f: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Joint counts (C, cells) and marginal counts (D, F)."""
        joint = tally(self._ravel(f), self.bins.size ** f.shape[1], labels, self.classes)[:, 0]
        return joint, tally(f, self.bins.size, torch.zeros_like(labels), 1)[0]

    def _leave_one_out(self, f: Tensor, labels: Tensor, alpha: float) -> Tensor:
        """log P(f_i) without example i in any count, (N,); one strength serves the prior and the classes."""
        joint, single = self._counts(f, labels)
        cell, n, d = self._ravel(f)[:, 0], len(f), torch.arange(f.shape[1], device=f.device)
        n_cells = self.bins.valid.sum(1).double()
        prior = shrink(single[d, f] - 1, n - 1, 1 / n_cells, self.config.pseudocount * n_cells).prod(1)
        p = shrink(joint.sum(0)[cell] - 1, n - 1, prior, alpha)
        if self.classes > 1:
            p = shrink(joint[labels, cell] - 1, joint.sum(1)[labels] - 1, p, alpha)
        return p.log()

    def _set_joint(self, f: Tensor, labels: Tensor, alpha: float) -> None:
        joint, single = self._counts(f, labels)
        n_cells = self.bins.valid.sum(1, keepdim=True).double()
        marginals = shrink(single, len(f), self.bins.valid / n_cells, self.config.pseudocount * n_cells)
        prior = marginals[0]
        for p in marginals[1:]:
            prior = (prior[:, None] * p).flatten()
        table = shrink(joint.sum(0), len(f), prior, alpha)
        if self.classes > 1:
            table = shrink(joint, joint.sum(1, keepdim=True), table, alpha)
        self.p_joint = table.expand(self.classes, -1).clone()

    def _ravel(self, f: Tensor) -> Tensor:
        """The joint cell (N, 1) of cells f (N, D)."""
        cell = f[:, :1]
        for i in range(1, f.shape[1]):
            cell = cell * self.bins.size + f[:, i : i + 1]
        return cell

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        if not self.is_joint:
            return super()._sample(noise, condition)
        u, labels = noise.uniform(dtype=torch.float64), self.class_index(condition, noise.n)
        cell = torch.empty_like(labels)
        for c in torch.unique(labels).tolist():
            cumulative = self.p_joint[c].cumsum(0)
            own = labels == c
            # u < 1 keeps the threshold below the last increase: a cell of probability zero is never drawn.
            cell[own] = torch.searchsorted(cumulative, u[own] * cumulative[-1], right=True)
        powers = self.bins.size ** torch.arange(self.codec.dims - 1, -1, -1, device=cell.device)
        f = cell[:, None] // powers % self.bins.size
        return self.to_model_space(self.bins.draw(f, noise.uniform(self.codec.dims, dtype=torch.float64)))

    def log_prob_cells(self, f: Tensor, labels: Tensor) -> Tensor:
        """log P(f | class), (N,)."""
        if not self.is_joint:
            return super().log_prob_cells(f, labels)
        return self.p_joint[labels, self._ravel(f)[:, 0]].log()
