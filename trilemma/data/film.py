"""Figures and films as files: one style, and equal input gives equal bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from trilemma.data.render import figure_style

Array = np.ndarray[Any, Any]

INK = "#202124"
DPI = 120
FRAME_SECONDS, LAST_SECONDS = 0.08, 2.0
GIF_COLOURS = 32

_STYLE: Any = {
    **figure_style(INK, 9.0, 8.0),
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}
style = rc_context(_STYLE)


def png(figure: Figure) -> bytes:
    """The figure as PNG, without the name and version of what drew it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def gif(frames: Sequence[Array]) -> bytes:
    """Frames (H, W, 3) uint8 as a film that loops and rests on its last frame, all in the colours of one palette."""
    few = np.concatenate([frames[i] for i in sorted({0, len(frames) // 2, len(frames) - 1})])
    palette = Image.fromarray(few).quantize(GIF_COLOURS, dither=Image.Dither.NONE)
    colours = palette.getpalette() or []
    colours[: 3 * GIF_COLOURS] = [255 if colour >= 248 else colour for colour in colours[: 3 * GIF_COLOURS]]
    palette.putpalette(colours)  # white is white, not the mean of nearly white
    first, *others = (Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    stay = [round(1000 * FRAME_SECONDS)] * (len(frames) - 1) + [round(1000 * LAST_SECONDS)]
    stream = io.BytesIO()
    first.save(stream, format="GIF", save_all=True, append_images=others, duration=stay, loop=0, optimize=False)
    return stream.getvalue()


def frame_of(figure: Figure) -> Array:
    """The figure as (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
