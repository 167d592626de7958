r"""Perceptual path length: how smoothly examples change along paths between codes.

    PPL = E | h(G(z_t)) - h(G(z_{t + eps})) |^2 / eps^2,    z_t = interpolation of z_a and z_b at t ~ U(0, 1 - eps)
for a decoder G and features h (Karras, Laine & Aila 2019, arXiv:1812.04948). Low: the code leads through examples by
small steps. It depends on the features and their scale: compare within one feature extractor.

    lerp:  z_t = (1 - t) z_a + t z_b
    slerp: z_t = (sin((1 - t) w) z_a + sin(t w) z_b) / sin w, with the angle w between z_a and z_b (Shoemake 1985).
Slerp is for normal codes: it keeps their length. (The original rescales its codes to length 1 first, as its network
does; here the codes keep theirs.)

All pairs count. The original drops the lowest and highest hundredth of the values; a mean without its tail would hide
the jumps that it is to find.

The step eps is 1e-2, not the original's 1e-4. Rounding errors of float32 outputs add to each difference, and their
squares to the mean: on lerp paths of a linear decoder, where any eps gives the value exactly, outputs about 1000 with
derivatives about 1 make paths 3% too long at 1e-4, and right to 1e-5 at 1e-2. What a step of 1e-2 costs on curved
paths is less: 0.3% for eight layers of tanh. Data rounded to 8 bits have no small differences: `decode` must stay in
the model's own real-valued space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trilemma.core.errors import DataError, UsageError
from trilemma.core.noise import make_generator
from trilemma.metrics.uncertain import Uncertain, mean

EPSILON = 1e-2
BATCH = 256

Interpolation = Literal["slerp", "lerp"]


@torch.no_grad()
def perceptual_path_length(
    decode: Callable[[Tensor], Tensor],
    codes_a: Tensor,
    codes_b: Tensor,
    features: Callable[[Tensor], Tensor],
    *,
    interpolation: Interpolation = "slerp",
    epsilon: float = EPSILON,
    seed: int = 0,
    batch: int = BATCH,
) -> Uncertain:
    """Perceptual path length, >= 0, in squared feature units per squared unit of t.

    Arguments:
        decode: codes (B, *) -> data in the model's space, not rounded.
        codes_a, codes_b: the ends of N independent paths, (N, *), floating point.
        features: data -> features (B, ...).
        interpolation: "slerp" for normal codes, "lerp" for others.
        epsilon: the step, in (0, 1).
        seed: of the positions t.
        batch: paths decoded at once.

    Raises:
        UsageError: epsilon outside (0, 1).
        DataError: codes of unlike shapes, none, or features that are not finite.
    """
    if not 0.0 < epsilon < 1.0:
        raise UsageError(f"epsilon must lie between 0 and 1, got {epsilon}")
    if codes_a.shape != codes_b.shape or not len(codes_a):
        raise DataError(f"paths need equally many codes, got {tuple(codes_a.shape)} and {tuple(codes_b.shape)}")
    n, device = len(codes_a), codes_a.device
    t = torch.rand(n, generator=make_generator("path-length", seed), dtype=torch.float64) * (1.0 - epsilon)
    values = []
    for start in range(0, n, batch):
        a, b = (c[start : start + batch] for c in (codes_a, codes_b))
        at = t[start : start + batch].to(device)
        low, high = (
            features(decode(interpolate(a, b, s, interpolation))).flatten(1).double() for s in (at, at + epsilon)
        )
        values.append((high - low).square().sum(1) / epsilon**2)
    found = torch.cat(values)
    if not bool(found.isfinite().all()):
        raise DataError("features along the paths hold NaN or infinity; look at the decoded examples")
    return mean(found, "generated", f"mean over {n} {interpolation} paths, step {epsilon:g}, no trimming")


def interpolate(a: Tensor, b: Tensor, t: Tensor, interpolation: Interpolation) -> Tensor:
    """Codes between a and b (B, *) at t (B,), computed in float64 and returned in the dtype of a.

    Slerp between codes of equal or opposite directions is lerp.
    """
    u, v = a.double().flatten(1), b.double().flatten(1)
    t = t.double()[:, None]
    weights = (1.0 - t, t)
    if interpolation == "slerp":
        cosine = torch.nn.functional.cosine_similarity(u, v, dim=1)[:, None].clamp(-1.0, 1.0)
        w = cosine.acos()
        sine = w.sin()
        flat = sine < 1e-6
        spherical = (((1.0 - t) * w).sin() / sine, (t * w).sin() / sine)
        weights = (torch.where(flat, 1.0 - t, spherical[0]), torch.where(flat, t, spherical[1]))
    return (weights[0] * u + weights[1] * v).view_as(a).to(a.dtype)
