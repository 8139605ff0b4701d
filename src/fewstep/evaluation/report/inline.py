"""Pictures inside of a page: as they are where they are small, smaller or as JPEG where a page would grow too large."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

_QUALITY, _SMALLER = 85, 0.8


def data_url(picture: Image.Image, most_bytes: int) -> str:
    """A picture as a data URL of about `most_bytes` or less: a PNG to the last bit, else a JPEG, shrunk until it fits."""
    found, kind = _encoded(picture, "PNG"), "png"
    while len(found) * 4 > most_bytes * 3 and (kind == "png" or min(picture.size) > 16):
        if kind == "jpeg":
            size = [max(1, round(side * _SMALLER)) for side in picture.size]
            picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        found, kind = _encoded(picture, "JPEG"), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(found).decode()}"


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels wide and high."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def stacked(pictures: Sequence[Image.Image], gap: int = 1) -> Image.Image:
    """Pictures of one size below one another."""
    return tiled(pictures, 1, gap)


def tiled(pictures: Sequence[Image.Image], columns: int, gap: int = 1) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (number % columns * (width + gap), number // columns * (height + gap)))
    return canvas


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": _QUALITY} if kind == "JPEG" else {"optimize": True}))
    return buffer.getvalue()
