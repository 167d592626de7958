"""What the closed-form models share: no gradient steps, float64, one estimator per class."""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.core.errors import DataError
from trilemma.core.model import GenerativeModel
from trilemma.core.noise import Noise
from trilemma.core.spec import Split

MAX_EXAMPLES = 50_000
MAX_NUMBERS = 2**25
"""Closed-form models learn from the first 50,000 training examples, fewer (but at least 1,000) where those would
hold more than 2^25 numbers. Splits are in random order, so the first ones are a random sample."""


class ClosedForm(GenerativeModel):
    """A model that `prepare` fits whole. With conditional=true, p(x | class) is one estimator per class."""

    data_kinds = GenerativeModel.data_kinds | {"volume"}
    condition_kinds = frozenset({"class"})

    @property
    def dtype(self) -> torch.dtype:
        """float64: these models have no networks, and cell edges and sharp kernels need the digits."""
        return torch.float64

    @property
    def classes(self) -> int:
        """Number of estimators."""
        return 1 if self.condition is None else self.condition.size

    def examples(self, train: Split, noise: Noise) -> tuple[Tensor, Tensor]:
        """Fit the codec; return training examples y (N, D) in model space, float64, and class indices (N,).

        Raises:
            DataError: the model is conditional and a class has no example: nothing is known of p(x | class).
        """
        n = min(len(train), MAX_EXAMPLES, max(1000, MAX_NUMBERS // self.spec.dims))
        batch = train.head(n).to(self.device)
        self.codec.fit(batch.x)
        y, _ = self.codec.encode(batch.x, Noise(*noise.key, "encode", n=n, device=self.device), dtype=self.dtype)
        if self.condition is None:
            return y.flatten(1), torch.zeros(n, dtype=torch.int64, device=self.device)
        assert batch.condition is not None
        counts = torch.bincount(batch.condition, minlength=self.classes)
        if bool((counts == 0).any()):
            missing = self.condition.names[int(counts.argmin())]
            raise DataError(
                f"{self.name}: class {missing!r} has no training example, so p(x | {missing}) cannot be estimated; "
                "fit with conditional=false, or add examples of it"
            )
        return y.flatten(1), batch.condition

    def class_index(self, condition: Tensor | None, n: int) -> Tensor:
        """The estimator of each of n examples, (n,) int64."""
        return torch.zeros(n, dtype=torch.int64, device=self.device) if condition is None else condition

    def to_model_space(self, y: Tensor) -> Tensor:
        """Flat draws (N, D) -> (N, *codec.shape), in float64 for tables (dates need it), else the default dtype."""
        dtype = torch.float64 if self.spec.kind == "table" else torch.get_default_dtype()
        return y.reshape(-1, *self.codec.shape).to(dtype)
