"""What comes with each example: classes, vectors, images or sequences (`ConditionSpec`), read from an array.

    setting "condition"    array
    class                  integers, truth values or texts (N,)
    attributes             numbers (N,), (N, K)                           a vector
    image                  real, uint8 or bool, (N, C', *space)           of as many axes as x; channels come first
    sequence               numbers (N, L, d)
    none                   it is left out

Without the setting, whole numbers and texts are classes, real numbers with two axes a vector, with three a sequence,
with as many as x (4 or 5) an image. Three axes that come with signals could be either: the setting must say which.
Numbers are taken as they are, in single precision; 8-bit pictures become real numbers in [-1, 1] (`to_real`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError
from trilemma.core.spec import RANKS, SPATIAL, ConditionKind, ConditionSpec, DataKind, to_real
from trilemma.data.dataset import class_condition

Chosen = tuple[Tensor, ConditionSpec]
KINDS: Mapping[str, ConditionKind] = {
    "class": "class",
    "attributes": "vector",
    "image": "image",
    "sequence": "sequence",
}
CONDITIONS = (*KINDS, "none")
AXES: Mapping[DataKind, str] = {"image": "(N, C, H, W)", "signal": "(N, C, L)", "volume": "(N, C, D, H, W)"}
CHANNELS = (1, 3, 4)


def choose_condition(
    values: np.ndarray | None, condition: str | None, x_kind: DataKind, name: str
) -> tuple[Chosen | None, tuple[str, ...]]:
    """The condition of every example and what it is, or None; and what to say about it.

    Arguments:
        values: the array that came with the examples.
        condition: the setting, see above.

    Raises:
        UsageError: the setting asks for what is not there, or does not say what cannot be guessed.
        DataError: the array is none of the above, or holds NaN or infinity.
    """
    if values is None:
        if condition in (None, "none"):
            return None, ()
        what = "labels; give them as the pair (x, y)"
        if condition in ("image", "sequence"):
            what = "condition; give it as the pair (x, condition)"
        raise UsageError(f"condition={condition!r}: {name} has no {what}")
    kind = _guess_kind(values, x_kind, name) if condition is None else KINDS[condition]
    if kind != "class":
        return read_values(values, kind, x_kind, name), ()
    texts = _class_texts(values, name)
    if len(set(texts)) == 1:
        if condition == "class":
            raise DataError(f"condition='class': {name} has only one class, {texts[0]!r}")
        return None, (f"there is only one class, {texts[0]!r}, so the data have no classes",)
    return class_condition(texts), ()


def _guess_kind(values: np.ndarray, x_kind: DataKind, name: str) -> ConditionKind:
    real = values.dtype.kind == "f"
    if values.ndim <= 2:
        return "vector" if real and values.ndim == 2 else "class"
    if values.ndim > 3:
        return "image"
    if real and x_kind != "signal":
        return "sequence"
    raise UsageError(
        f"{name}: a condition of shape {values.shape} and dtype {values.dtype} could be several things; say "
        f"condition='image' ({AXES.get(x_kind, 'not with ' + x_kind)}) or condition='sequence' (N, L, d)"
    )


def _class_texts(labels: np.ndarray, name: str) -> list[str]:
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "uibUS":
        raise DataError(
            f"{name}: class labels are integers or texts (N,), not {labels.dtype} {labels.shape}; "
            "real numbers are used with condition='attributes'"
        )
    return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in labels.tolist()]


def read_values(values: np.ndarray, kind: ConditionKind, x_kind: DataKind, name: str) -> Chosen:
    """A vector, image or sequence of each example, (N, *value_shape) float32.

    Raises:
        DataError: another shape or dtype, NaN or infinity.
    """
    check = {"vector": _check_vector, "sequence": _check_sequence, "image": _check_image}[kind]
    check(values, x_kind, name)
    if values.size == 0:
        raise DataError(f"{name}: the condition is empty: its shape is {values.shape}")
    if kind == "vector":
        values = values.reshape(len(values), -1)
        spec, noun = ConditionSpec(kind=kind, names=tuple(f"y{i}" for i in range(values.shape[1]))), "attributes"
    else:
        spec, noun = ConditionSpec(kind=kind, shape=values.shape[1:]), f"{kind} condition"
    is_8bit = kind == "image" and values.dtype == np.uint8
    reals = to_real(torch.from_numpy(np.ascontiguousarray(values, dtype=None if is_8bit else np.float32)))
    check_finite(reals.numpy(), f"{noun} of {name}")
    return reals, spec


def _check_vector(values: np.ndarray, x_kind: DataKind, name: str) -> None:
    if values.dtype.kind not in "uifb" or values.ndim > 2:
        raise DataError(f"{name}: attributes are numbers (N,) or (N, K), not {values.dtype} {values.shape}")


def _check_sequence(values: np.ndarray, x_kind: DataKind, name: str) -> None:
    if values.dtype.kind not in "uifb" or values.ndim != 3:
        raise DataError(f"{name}: sequences are numbers (N, L, d), not {values.dtype} {values.shape}")


def _check_image(values: np.ndarray, x_kind: DataKind, name: str) -> None:
    given = f"{values.dtype} {values.shape}"
    if x_kind not in SPATIAL:
        raise DataError(f"{name}: an image cannot be the condition of {x_kind} data; use attributes or a sequence")
    if values.ndim != RANKS[x_kind] + 1:
        raise DataError(f"{name}: an image condition of {x_kind} data is {AXES[x_kind]}, as they are, not {given}")
    is_8bit = values.dtype == np.uint8
    if values.dtype.kind not in "fb" and not is_8bit:
        raise DataError(
            f"{name}: an image condition is float, uint8 or bool, not {given}: convert 8-bit pictures to uint8, "
            "anything else to float"
        )
    if is_8bit and x_kind == "image" and values.shape[-1] in CHANNELS and values.shape[1] not in CHANNELS:
        raise DataError(f"{name}: the condition looks like (N, H, W, C), {given}: transpose it to (N, C, H, W)")


def check_finite(x: np.ndarray, name: str) -> None:
    """Raise a `DataError` that counts NaN and infinity and says where the first is."""
    bad = ~np.isfinite(x)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        nan = int(np.isnan(x).sum())
        raise DataError(
            f"{name} holds {nan} NaN and {int(bad.sum()) - nan} infinite value(s), the first at index {first}; "
            "remove these examples, fill them in, or load a table, which models missing values"
        )
