r"""Independent dimensions: p(x) = prod_i p_i(x_i), the floor of every comparison.

Each p_i is a histogram (see `bins`): one cell per level, category or value where there are at most 256 of them, else
equal widths chosen by the leave-one-out likelihood; cell probabilities are (n + a) / (N + a F) (Laplace 1774, a = 1).
Its log-probability is exact on pictures with levels. On a table the codec dequantizes discrete columns, but cells
are whole values, so its lower bound is tight there. "Independent" means the columns: a column's values depend on its
own indicator of missingness. With conditional=true each class has its own p_i, shrunk towards that of all data as
`forest` states, so a class of few examples resembles all data.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trilemma.classical.base import ClosedForm
from trilemma.classical.bins import Bins, axes_of, choose_edges, indicator_parents
from trilemma.classical.forest import Forest
from trilemma.core.model import ModelConfig
from trilemma.core.noise import Noise
from trilemma.core.score import Score
from trilemma.core.spec import Split


class IndependentConfig(ModelConfig):
    pseudocount: float = Field(1.0, gt=0, description="added to the count of every cell")


class Independent(ClosedForm):
    """p(x) = prod_i p_i(x_i) with histograms p_i."""

    Config: ClassVar[type[ModelConfig]] = IndependentConfig
    config: IndependentConfig
    space = "integer"

    def build(self) -> None:
        self.bins, self.forest = Bins(), Forest()

    def prepare(self, train: Split, noise: Noise) -> None:
        y, labels = self.examples(train, noise)
        f = self.fit_cells(y)
        self.forest.fit(f, labels, self.classes, self.bins.valid, self.find_parents(f, labels), self.config.pseudocount)

    def fit_cells(self, y: Tensor) -> Tensor:
        """Cut each dimension of y (N, D) into cells; return the cells f (N, D)."""
        axes, columns = axes_of(self.codec), y.T.cpu().numpy()
        edges = [
            choose_edges(column, axis, self.config.pseudocount) for column, axis in zip(columns, axes, strict=True)
        ]
        self.bins.fit(y, axes, edges)
        return self.bins.index(y)

    def find_parents(self, f: Tensor, labels: Tensor) -> Tensor:
        """The forest: no edges but those inside a column."""
        return indicator_parents(self.codec).to(f.device)

    def _sample(self, noise: Noise, condition: Tensor | None) -> Tensor:
        labels = self.class_index(condition, noise.n)
        u, v, w = (noise.uniform(self.codec.dims, dtype=torch.float64) for _ in range(3))
        return self.to_model_space(self.bins.draw(self.draw_cells(labels, u, v), w))

    def draw_cells(self, labels: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Cells (N, D) of each label, from uniform draws (N, D)."""
        return self.forest.draw(labels, u, v)

    def _log_prob(self, y: Tensor, condition: Tensor | None, noise: Noise) -> Score:
        y = y.flatten(1)
        f = self.bins.index(y)
        log_cells = self.log_prob_cells(f, self.class_index(condition, len(y)))
        return Score(log_cells + self.bins.log_density(y, f).sum(1), "exact")

    def log_prob_cells(self, f: Tensor, labels: Tensor) -> Tensor:
        """log P(f | class), (N,)."""
        return self.forest.log_prob(f, labels)
