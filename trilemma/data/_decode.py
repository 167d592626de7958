"""One picture file to 8-bit pixels, by Pillow.

Only raster formats are tried (no EPS, whose reader starts another program). The header is read first: a picture
of more than `MAX_PIXELS` is refused before anything is decoded.

A picture is turned as its EXIF orientation says; 16-bit grey v becomes round(v / 257); transparency is laid on
white; a palette, CMYK and the like become RGB. With `size` s the largest centred square is resampled to s x s
by the Lanczos filter, after an exact integer box reduction (in a JPEG by its DCT scaling, never below 2 s).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import (  # noqa: F401  (the plugins register their formats)
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from trilemma.data.dataset import hash_bytes

FORMATS = tuple(f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN)
MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

NOTES = {
    "16-bit": "had 16 bits per channel and were scaled down to 8",
    "alpha": "had transparent parts, which were laid on white",
    "frames": "hold several frames or pages, of which the first was taken",
    "enlarged": "were smaller than size and were enlarged",
}


@dataclass(frozen=True)
class PictureFile:
    """A name to report a picture by, and where its bytes are: a file, or a function that returns them."""

    name: str
    content: Path | Callable[[], bytes]

    def open(self) -> Image.Image:
        content = self.content if isinstance(self.content, Path) else io.BytesIO(self.content())
        return Image.open(content, formats=FORMATS)


@dataclass(frozen=True)
class Options:
    """How pictures are decoded: size of the square or None for the own size, channels 1, 3 or None for the own."""

    size: int | None
    channels: int | None


@dataclass(frozen=True)
class Picture:
    """Decoded pixels: `planes` are the bytes of uint8 (C, H, W)."""

    planes: bytes
    shape: tuple[int, int, int]
    digest: bytes
    notes: frozenset[str]


@dataclass(frozen=True)
class Bad:
    """A picture that was not decoded: why, and its (height, width) if only that was wrong."""

    reason: str
    other_size: tuple[int, int] | None = None


def decode(file: PictureFile, options: Options, expected: tuple[int, int] | None = None) -> Picture | Bad:
    """Decode one picture; where `size` is not given, one of another (H, W) than `expected` is `Bad`."""
    try:
        with file.open() as image:
            if image.width * image.height > MAX_PIXELS:
                return Bad(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}: not decoded")
            own_size = oriented_size(image)
            if options.size is None and expected is not None and own_size != expected:
                image.load()  # a damaged picture has no say in what the sizes are
                return Bad("another size", own_size)
            notes = set()
            if getattr(image, "is_animated", False):
                notes.add("frames")
            if _has_16_bits(image):
                notes.add("16-bit")
            if options.size is not None:
                if min(own_size) < options.size:
                    notes.add("enlarged")
                if image.format == "JPEG":
                    image.draft(None, (2 * options.size, 2 * options.size))
            picture = _to_channels(image, options.channels, notes)
            if (turn := TURNS.get(_orientation(image))) is not None:
                picture = picture.transpose(turn)
            if options.size is not None:
                picture = _square(picture, options.size)
    except Image.DecompressionBombError:
        return Bad(f"its header claims more than {MAX_PIXELS:,} pixels: not decoded")
    except Exception as error:  # damaged files make decoders raise nearly anything
        return Bad(_explain(error))
    planes = b"".join(plane.tobytes() for plane in picture.split())
    shape = (len(picture.getbands()), picture.height, picture.width)
    # A grey picture and its copy in colour are the same pixels wherever the channels are not yet settled.
    hashed = 3 * planes if shape[0] == 1 and options.channels is None else planes
    return Picture(planes, shape, hash_bytes(hashed), frozenset(notes))


def _has_16_bits(image: Image.Image) -> bool:
    """By the mode, or by the raw modes of its tiles ("RGB;16B"); their other arguments are numbers such as strides."""
    if image.mode.startswith("I"):
        return True
    tiles = [tile.args for tile in getattr(image, "tile", ())]
    return any(";16" in str(a) for args in tiles for a in (args if isinstance(args, tuple) else (args,)))


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) after the EXIF orientation, from the header."""
    return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow turns TIFF files itself, and asking a PNG for EXIF that it lacks would decode it
    return int(image.getexif().get(ORIENTATION, 1))


def _to_channels(image: Image.Image, channels: int | None, notes: set[str]) -> Image.Image:
    """To mode "L" or "RGB"; without `channels`, grey pictures stay grey."""
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert them to 8 bits")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = _on_white(image, notes)
    grey = image.mode in ("L", "1") or (image.mode == "P" and _is_grey(image))
    mode = "L" if channels == 1 or (channels is None and grey) else "RGB"
    if image.mode != mode:
        return image.convert(mode)
    image.load()
    return image


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are 32-bit integers; convert them to 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _on_white(image: Image.Image, notes: set[str]) -> Image.Image:
    grey = image.mode in ("LA", "La", "L", "1") or (image.mode == "P" and _is_grey(image))
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] != 255:
        notes.add("alpha")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").getchannel(0) if grey else image.convert("RGB")


def _is_grey(image: Image.Image) -> bool:
    palette = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _explain(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return f"cannot be decoded: {text}" if text else f"cannot be decoded ({type(error).__name__})"
