"""How settings move over the training budget."""

from __future__ import annotations

import math


def cosine(start: float, end: float, progress: float) -> float:
    """`start` at progress 0, `end` at 1, between them half a period of a cosine (Loshchilov & Hutter 2017)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
