r"""The invertible map between the user's data and the space a model works in.

For y = f(x) a density transforms as
    log p(x) = log p_Y(f(x)) + log |det df/dx|,
so every codec returns y and `ladj` = log |det df/dx|, and likelihoods come out in the user's units whatever
the model. Where f adds noise q(y|x) (dequantization, the filling-in of missing values), the same place holds
the term of the bound
    log p(x) >= E_q[log p_Y(y) - log q(y|x)]
(Theis, van den Oord & Bethge 2016, arXiv:1511.01844; Ho et al. 2019, arXiv:1902.00275; the general rule is that
of Nielsen et al. 2020, arXiv:2007.02731). `kind` says which of the two it is.

A codec is fitted on the training split, is part of the model and is saved with it. `decode` maps onto the
support of the data: the nearest level, category or grid point of a discrete dimension.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trilemma.core.errors import DataError, DivergedError
from trilemma.core.noise import Noise
from trilemma.core.score import Kind, combine_kinds
from trilemma.core.spec import Column, DataSpec, Split
from trilemma.core.support import describe_support, grid_index, grid_value, off_support

Space = Literal["standard", "logit", "center", "integer", "onehot"]
"""Where a model works.

standard: dequantized and standardized, a density on R^D.
logit: pictures with levels are dequantized and mapped to R by the logit (RealNVP's preprocessing);
    everything else as "standard".
center: pictures with levels sit on the bin centres of [-1, 1], a lattice: a model there gives
    *probabilities* (a discretized likelihood) or none at all; everything else as "standard".
integer: the integers 0 .. levels - 1 themselves, for models of counts; everything else as "standard".
onehot: as "center", and categories of tables become one-hot vectors. It has no density.
"""


class Transform(nn.Module):
    """One invertible step: `encode` returns (y, ladj) with ladj in float64, `decode` goes back."""

    kind: Kind = "exact"

    def fit(self, x: Tensor) -> Tensor:
        """Learn constants from training data x (N, *) and return its image (without noise: the cell's middle)."""
        return self.encode(x, None)[0]

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """x (N, *) -> y (N, *), ladj (N,). Without noise a stochastic step takes the middle of its cell."""
        raise NotImplementedError

    def decode(self, y: Tensor) -> Tensor:
        """y (N, *) -> x (N, *)."""
        raise NotImplementedError

    def unrounded(self, y: Tensor) -> Tensor:
        """The same, smooth in y: levels are real numbers, not yet rounded to one of them."""
        return self.decode(y)


class Dequantize(Transform):
    """Integers 0 .. levels-1 to (0, 1): y = (x + u) / levels, u ~ U(0, 1). log q(u|x) = 0."""

    kind: Kind = "lower_bound"

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        # Single precision cannot hold k + u for k beyond 8 bits without reaching the next level.
        x = _floating(x) if self.levels <= 256 else x.double()
        u = 0.5 if noise is None else _open_uniform(noise, x, float(self.levels))
        dims = math.prod(x.shape[1:])
        return (x + u) / self.levels, _constant(x, -dims * math.log(self.levels))

    def decode(self, y: Tensor) -> Tensor:
        return (y * self.levels).floor().clamp(0, self.levels - 1)

    def unrounded(self, y: Tensor) -> Tensor:
        return y * self.levels - 0.5


class Center(Transform):
    """Integers 0 .. levels-1 to the bin centres of [-1, 1]: a relabelling, so probabilities stay as they are."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        x = _floating(x)
        return (2.0 * x + 1.0) / self.levels - 1.0, _constant(x, 0.0)

    def decode(self, y: Tensor) -> Tensor:
        return ((y + 1.0) * 0.5 * self.levels).floor().clamp(0, self.levels - 1)

    def unrounded(self, y: Tensor) -> Tensor:
        return (y + 1.0) * 0.5 * self.levels - 0.5


class Integer(Transform):
    """Integers stay integers, as floating-point numbers."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        x = _floating(x)
        return x, _constant(x, 0.0)

    def decode(self, y: Tensor) -> Tensor:
        return y.round().clamp(0, self.levels - 1)

    def unrounded(self, y: Tensor) -> Tensor:
        return y


class Logit(Transform):
    """(0, 1) to R: y = logit(alpha + (1 - 2 alpha) x). The margin alpha keeps the edges finite."""

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        self.alpha = alpha

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1.0 - 2.0 * self.alpha) * x
        log_p, log_q = p.log(), torch.log1p(-p)
        ladj = math.log(1.0 - 2.0 * self.alpha) - log_p - log_q
        return log_p - log_q, ladj.flatten(1).sum(1, dtype=torch.float64)

    def decode(self, y: Tensor) -> Tensor:
        return (torch.sigmoid(y) - self.alpha) / (1.0 - 2.0 * self.alpha)


class Standardize(Transform):
    """y = (x - mean) / std, one mean and std per dimension or one pair for all."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))

    def fit(self, x: Tensor) -> Tensor:
        x = x.double()
        per_dim = self.mean.ndim > 0
        mean = x.mean(0) if per_dim else x.mean()
        std = (x - mean).square().mean(0 if per_dim else None).sqrt()
        # A dimension that never varies is only shifted: its density would be a point mass.
        std = torch.where(std > 1e-12 * (1.0 + mean.abs()), std, torch.ones_like(std))
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self.encode(x, None)[0]

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        # The difference is taken in the precision of x: float64 dates and large integers keep theirs.
        y = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        ladj = -self.std.double().log().expand(x.shape[1:]).sum()
        return y, ladj.expand(x.shape[0])

    def decode(self, y: Tensor) -> Tensor:
        return y * self.std.to(y.dtype) + self.mean.to(y.dtype)


class ColumnCodec(Transform):
    """One column of a table, (N,) -> (N, width), for each kind of column.

    A discrete value k of a grid, a list of values or a list of categories becomes k + u, u ~ U(0, 1), and is
    standardized; or, with `onehot`, a category becomes a vector of zeros and a one (no density).
    A column with missing values gets one more dimension, the dequantized indicator m + u of missingness, and
    a missing value is filled with v ~ N(0, 1) after standardization: the bound's term is -log N(v; 0, 1).
    """

    mean: Tensor
    std: Tensor
    grid: Tensor

    def __init__(self, column: Column, onehot: bool) -> None:
        super().__init__()
        self.column = column
        self.onehot = onehot and column.kind == "categorical"
        # A category that can be missing has "missing" as one more category.
        self.categories = len(column.categories) + column.missing
        self.has_indicator = column.missing and column.kind != "categorical"
        self.width = self.categories if self.onehot else 1 + self.has_indicator
        self.kind = "lower_bound" if column.is_discrete or column.missing else "exact"
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))
        self.register_buffer("grid", torch.tensor(column.values, dtype=torch.float64))

    def fit(self, x: Tensor) -> Tensor:
        if not self.onehot:
            code = self._to_code(x.double()) + (0.5 if self.column.is_discrete else 0.0)
            seen = code[~code.isnan()]
            mean = seen.mean() if len(seen) else seen.new_zeros(())
            std = (seen - mean).square().mean().sqrt() if len(seen) else seen.new_ones(())
            # Dequantization adds 1/12 to the variance of a discrete column.
            std = (std.square() + 1.0 / 12.0).sqrt() if self.column.is_discrete else std
            self.mean.copy_(mean)
            self.std.copy_(torch.where(std > 1e-12 * (1.0 + mean.abs()), std, torch.ones_like(std)))
        return self.encode(x, None)[0]

    def _to_code(self, x: Tensor) -> Tensor:
        """Grid index, value index or category of a discrete column; the number itself of a continuous one."""
        column = self.column
        if column.kind == "categorical":
            return torch.where(x.isnan(), float(len(column.categories)), x) if column.missing else x
        if column.values:
            code = torch.searchsorted(self.grid, x.contiguous()).double()
            return torch.where(x.isnan(), x, code)
        if column.resolution is not None:
            return grid_index(column, x)
        return x

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        n, column = x.shape[0], self.column
        code = self._to_code(x.double())
        ladj = torch.zeros(n, dtype=torch.float64, device=x.device)
        if self.onehot:
            return nn.functional.one_hot(code.long(), self.categories).double(), ladj.fill_(math.nan)
        missing = code.isnan()
        if column.is_discrete:
            code = code + (0.5 if noise is None else _open_uniform(noise, code, code.abs() + self.mean.abs()))
        y = (code - self.mean) / self.std
        ladj = ladj - self.std.log()
        if not self.has_indicator:
            return y.unsqueeze(1), ladj
        fill = torch.zeros_like(y) if noise is None else noise.normal(dtype=torch.float64)
        log_q = -0.5 * fill.square() - 0.5 * math.log(2.0 * math.pi)
        ladj = torch.where(missing, -log_q, ladj)
        u = 0.5 if noise is None else _open_uniform(noise, y)
        indicator = 2.0 * (missing.double() + u) - 2.0  # (-2, 0) present, (0, 2) missing
        return torch.stack([torch.where(missing, fill, y), indicator], 1), ladj + math.log(2.0)

    def decode(self, y: Tensor) -> Tensor:
        column, y = self.column, y.double()
        if self.onehot:
            code = y.argmax(1).double()
        else:
            code = y[:, 0] * self.std + self.mean
            code = code.floor() if column.is_discrete else code
        if column.kind == "categorical":
            code = code.clamp(0, self.categories - 1)
            x = torch.where(code == len(column.categories), math.nan, code) if column.missing else code
        elif column.kind == "boolean":
            x = code.clamp(0, 1)
        elif column.values:
            x = self.grid[code.long().clamp(0, len(column.values) - 1)]
        elif column.resolution is not None:
            x = grid_value(column, code)
        else:
            x = code
        return torch.where(y[:, 1] > 0, math.nan, x) if self.has_indicator else x


class TableCodec(Transform):
    """The columns of a table side by side: (N, columns) -> (N, sum of widths)."""

    def __init__(self, columns: tuple[Column, ...], onehot: bool) -> None:
        super().__init__()
        self.columns = nn.ModuleList(ColumnCodec(column, onehot) for column in columns)
        self.widths = [c.width for c in self._codecs()]
        self.kind = "exact"
        for c in self._codecs():
            self.kind = combine_kinds(self.kind, c.kind)

    def _codecs(self) -> list[ColumnCodec]:
        return list(self.columns)  # type: ignore[arg-type]

    def fit(self, x: Tensor) -> Tensor:
        return torch.cat([c.fit(x[:, i]) for i, c in enumerate(self._codecs())], 1)

    def encode(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        parts = [c.encode(x[:, i], noise) for i, c in enumerate(self._codecs())]
        return torch.cat([y for y, _ in parts], 1), torch.stack([ladj for _, ladj in parts]).sum(0)

    def decode(self, y: Tensor) -> Tensor:
        pieces = torch.split(y, self.widths, 1)
        return torch.stack([c.decode(p) for c, p in zip(self._codecs(), pieces, strict=True)], 1)


class Codec(nn.Module):
    """The composition that takes data of a `DataSpec` to a `Space` and back.

    Attributes:
        shape: shape of one example in model space.
        discrete: model space is a lattice, so a likelihood there is a probability, not a density.
        has_density: whether log-likelihoods can be computed through it.
        kind: "exact", or "lower_bound" where encoding adds noise.
    """

    def __init__(self, spec: DataSpec, space: Space) -> None:
        super().__init__()
        self.spec, self.space = spec, space
        self.transforms = nn.ModuleList(_steps(spec, space))
        lattice = space in ("center", "integer", "onehot") and spec.levels is not None
        self.discrete = lattice
        self.has_density = space != "onehot"
        self.kind: Kind = "exact"
        self.shape = spec.shape
        for step in self._steps():
            self.kind = combine_kinds(self.kind, step.kind)
            if isinstance(step, TableCodec):
                self.shape = (sum(step.widths),)

    def _steps(self) -> list[Transform]:
        return list(self.transforms)  # type: ignore[arg-type]

    @property
    def dims(self) -> int:
        """Number of dimensions in model space."""
        return math.prod(self.shape)

    def fit_split(self, train: Split) -> None:
        """Learn from the first training examples: at most 50,000, and at most 2^25 numbers unless that is under 1,000.

        A codec without constants to learn reads nothing, so that streamed pictures stay on the disk.
        """
        buffers = [b for step in self._steps() for b in step.buffers()]
        if buffers:
            n = min(len(train), 50_000, max(1000, 2**25 // self.spec.dims))
            self.fit(train.head(n).x.to(buffers[0].device))

    def fit(self, x: Tensor) -> None:
        """Learn means and scales from training data x (N, *spec.shape)."""
        check_data(self.spec, x)
        for step in self._steps():
            x = step.fit(x)

    def encode(
        self, x: Tensor, noise: Noise | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data x (N, *spec.shape) -> y (N, *shape) in `dtype` and ladj (N,) in float64.

        Without `noise`, discrete dimensions sit in the middle of their cells: right for features and
        encoders, but no likelihood may be computed from it.
        """
        dtype = dtype or torch.get_default_dtype()
        y = x.double() if self.spec.kind == "table" or dtype == torch.float64 else _floating(x)
        ladj = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        for step in self._steps():
            y, term = step.encode(y, noise)
            ladj = ladj + term
        return y.to(dtype), ladj

    def unrounded(self, y: Tensor) -> Tensor:
        """Model space y (N, *shape) -> data (N, *spec.shape) as real numbers, smooth in y; not for tables."""
        assert self.spec.kind != "table", "the categories of a table have nothing between them"
        for step in reversed(self._steps()):
            y = step.unrounded(y)
        return y

    def decode(self, y: Tensor) -> Tensor:
        """Model space y (N, *shape) -> data (N, *spec.shape): uint8 or int64 levels, float64 tables, else y's dtype.

        Raises:
            DivergedError: y holds NaN, which would pass for a level, a category or a missing value.
        """
        if bool(y.isnan().any()):
            raise DivergedError(
                f"{int(y.isnan().sum())} of {y.numel()} numbers in model space are NaN: the model has diverged; "
                "train it again with a lower learning rate"
            )
        x = y.double() if self.spec.kind == "table" else y
        for step in reversed(self._steps()):
            x = step.decode(x)
        if self.spec.levels is not None:
            x = x.to(torch.uint8 if self.spec.levels <= 256 else torch.int64)
        return x


def _steps(spec: DataSpec, space: Space) -> list[Transform]:
    if spec.kind == "table":
        return [TableCodec(spec.columns, onehot=space == "onehot")]
    if spec.levels is None:
        return [Standardize(spec.shape if spec.kind == "points" else ())]
    if space in ("center", "onehot"):
        return [Center(spec.levels)]
    if space == "integer":
        return [Integer(spec.levels)]
    if space == "logit":
        return [Dequantize(spec.levels), Logit(), Standardize()]
    return [Dequantize(spec.levels), Standardize(spec.shape if spec.kind == "points" else ())]


def check_data(spec: DataSpec, x: Tensor) -> None:
    """Raise a `DataError` unless x (N, *spec.shape) is data of this spec: shape, range, finite."""
    if tuple(x.shape[1:]) != spec.shape:
        raise DataError(
            f"data have shape {tuple(x.shape[1:])} per example, but the model was made for {spec.describe()}"
        )
    if spec.levels is not None and x.numel():
        low, high = x.min().item(), x.max().item()
        if x.is_floating_point() and bool((x != x.round()).any()):
            raise DataError(f"data hold fractions, but {spec.describe()} has integers 0..{spec.levels - 1}")
        if low < 0 or high > spec.levels - 1:
            raise DataError(f"data lie in [{low:g}, {high:g}], but {spec.describe()} has integers 0..{spec.levels - 1}")
    if not x.is_floating_point():
        return
    if spec.kind != "table":
        if not bool(x.isfinite().all()):
            raise DataError(f"{int((~x.isfinite()).sum())} values are NaN or infinite; remove or mend those examples")
        return
    for i, column in enumerate(spec.columns):
        values = x[:, i]
        if bool(values.isinf().any()):
            raise DataError(f"column {column.name!r} holds infinite values; remove or mend those rows")
        if not column.missing and bool(values.isnan().any()):
            raise DataError(f"column {column.name!r} has missing values, but had none in the training data")
        strange = off_support(column, values.double())
        if bool(strange.any()):
            value = values[strange][0].item()
            raise DataError(
                f"column {column.name!r} holds {value:.12g}, which is not among its possible values "
                f"({describe_support(column)}): remove or mend {int(strange.sum())} row(s)"
            )


def _constant(x: Tensor, value: float) -> Tensor:
    """The log-determinant (N,), the same for every example."""
    return torch.full((x.shape[0],), value, dtype=torch.float64, device=x.device)


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _open_uniform(noise: Noise, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """U(0, 1) in the dtype of x, kept off both ends: k + u may not become k + 1 by rounding.

    Arguments:
        scale: the size of the numbers between encoding and decoding. Of the 24 or 53 bits of a float, those beyond
            it remain for u; the margin is a few units in the last of them.
    """
    u = noise.uniform(*x.shape[1:], dtype=x.dtype)
    eps = (2.0**-24 if x.dtype == torch.float32 else 2.0**-50) * scale
    return u * (1.0 - 2.0 * eps) + eps
