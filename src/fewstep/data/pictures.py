"""One picture at a time: bytes to pixels of the model's size."""

import io
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError

from fewstep.errors import UserError


def decode_picture(
    row: dict[str, Any], name: str, resolution: int, channels: int, fit: Literal["crop", "pad", "exact"]
) -> np.ndarray:
    """One picture of a `datasets.Image(decode=False)` column, (C, resolution, resolution), uint8.

    Raises:
        UserError: it does not decode or fit; the message has its name.
    """
    try:
        with Image.open(io.BytesIO(row["bytes"]) if row.get("bytes") else row["path"]) as file:
            whole: Image.Image = file
            if file.mode.startswith("I"):  # 16 bit grey, which Pillow would clip at 255
                whole = Image.fromarray((np.asarray(file) // 256).clip(0, 255).astype(np.uint8))
            picture = whole.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, DecompressionBombError) as error:
        raise UserError(f"picture {name} does not decode ({error}); replace or remove it") from None
    array = np.asarray(fit_picture(picture, resolution, fit, name))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def fit_picture(picture: Image.Image, resolution: int, fit: Literal["crop", "pad", "exact"], name: str) -> Image.Image:
    """Bring one picture to resolution x resolution pixels.

    crop: Lanczos-resize the shorter side, centre crop. pad: centre on black, no resizing. exact: only check.

    Raises:
        UserError: the picture is smaller than the resolution (crop), larger (pad) or different (exact).
    """
    width, height = picture.size
    if (width, height) == (resolution, resolution):
        return picture
    size = f"picture {name} has {width}x{height} pixels, the model {resolution}x{resolution}"
    if fit == "exact":
        raise UserError(f"{size}; data.fit='crop' resizes larger pictures, data.fit='pad' pads smaller ones")
    if fit == "pad":
        if max(width, height) > resolution:
            raise UserError(f"{size}: data.fit='pad' cannot shrink it; use data.fit='crop'")
        padded = Image.new(picture.mode, (resolution, resolution))
        padded.paste(picture, ((resolution - width) // 2, (resolution - height) // 2))
        return padded
    if min(width, height) < resolution:
        raise UserError(
            f"{size}: it would have to be enlarged; use larger pictures, a model of lower resolution, or data.fit='pad'"
        )
    scale = resolution / min(width, height)
    new = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    picture = picture.resize(new, Image.Resampling.LANCZOS)
    left, top = (new[0] - resolution) // 2, (new[1] - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))
