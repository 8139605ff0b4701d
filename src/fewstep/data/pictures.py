"""One picture at a time: bytes to the pixels that a viewer shows, then to the model's size."""

import io
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageColor, ImageOps

from fewstep.data.colour import stated_profile
from fewstep.data.opening import BITS, decoding, open_picture
from fewstep.errors import UserError
from fewstep.progress import tell

Fit = Literal["crop", "pad", "exact"]
_PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 262, 274, 339  # tags of TIFF and EXIF
_SIXTEEN_BITS = ("PNG", "PPM")  # Pillow opens their 16-bit grey with 32, scaled to 0..65535


class FirstAnimation:
    """Tells of the first picture that has several frames, from whichever thread decodes it; of the others nothing."""

    def __init__(self, report: Callable[[str], None] = tell) -> None:
        self._report, self._told, self._lock = report, False, threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            told, self._told = self._told, True
        if not told:
            self._report(f"{name} has several frames or pages: of it, and of any others, the first one is taken")


def decode_picture(
    row: dict[str, Any], name: str, resolution: int, channels: int, fit: Fit, background: str = "white",
    on_animation: Callable[[str], None] = lambda name: None,
) -> np.ndarray:  # fmt: skip
    """One picture, given as {"bytes": ...} or {"path": ...}, (C, resolution, resolution), uint8.

    Args:
        background: the colour under transparent pixels, as CSS names it ("white", "#102030").
        on_animation: called with the name of a picture of several frames; the first one is taken.

    Raises:
        UserError: it does not decode or fit, or its pixels have no known range; the message has its name.
    """
    with decoding(name), open_picture(row, name) as file:
        if getattr(file, "is_animated", False):
            on_animation(name)
        picture = shown_picture(file, name, "L" if channels == 1 else "RGB", background)
    array = np.asarray(fit_picture(picture, resolution, fit, name))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def shown_picture(file: Image.Image, name: str, mode: Literal["L", "RGB"], background: str = "white") -> Image.Image:
    """What a viewer shows of an opened picture, as 8-bit grey or sRGB: turned upright, in sRGB, on a background.

    The first frame of an animation is taken. 16-bit grey and floats between 0 and 1 are scaled to 0..255.

    Raises:
        UserError: pixels whose range is not known (32-bit or signed integers, floats outside 0..1), or whose colours.
    """
    file.load()  # the result outlives the file
    picture: Image.Image = _eight_bit(file, name)
    if picture.getexif().get(_ORIENTATION, 1) != 1:  # what is upright is not copied
        turned = ImageOps.exif_transpose(picture)
        picture = picture if turned is None else turned
    alpha = _alpha(picture)
    if picture.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa"):
        whole = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
        picture = whole.convert("L" if whole.mode == "LA" else "RGB")
        del whole  # of a large picture, each copy is hundreds of megabytes
    profile = stated_profile(file, picture.mode, name)
    if profile and (transform := _to_srgb(profile, picture.mode)) is not None:
        picture = transform.apply(picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB" if picture.mode not in ("1",) else "L")
    if alpha is not None:
        picture = picture if picture.mode == "RGB" and picture is not file else picture.convert("RGB")
        picture.paste(ImageColor.getrgb(background), mask=ImageChops.invert(alpha))
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bit(file: Image.Image, name: str) -> Image.Image:
    """The picture with at most 8 bits a channel; its orientation tag comes along."""
    tags = getattr(file, "tag_v2", {})
    if "transparency" in file.info and file.info["transparency"] is None:
        raise UserError(
            f"picture {name} has 16 bits a channel and one colour that is transparent, which is not read; save it with 8 bits "
            "or with an alpha channel"
        )
    if file.mode == "L" and 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise UserError(f"picture {name} has signed pixels, whose range is not known; save it with unsigned ones")
    if not (file.mode.startswith("I") or file.mode == "F"):
        return file
    values = np.asarray(file)
    if file.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError(
                f"picture {name} has floating-point pixels from {values.min():g} to {values.max():g}, whose meaning is "
                "not known; save it with values between 0 and 1, or with 8 bits"
            )
        pixels = (values * 255).round()
    elif file.mode.startswith("I;16") or (file.format in _SIXTEEN_BITS and values.min() >= 0 and values.max() <= 65535):
        lacking = max(0, 16 - min(tags.get(BITS, (16,))))  # of a TIFF, whose pixels Pillow does not scale
        pixels = (values.astype(np.int32) << lacking) // 256
    else:
        raise UserError(
            f"picture {name} has 32-bit integer pixels, whose range is not known; save it with 8 or 16 bits a channel"
        )
    pixels = pixels.clip(0, 255).astype(np.uint8)
    made = Image.fromarray(255 - pixels if tags.get(_PHOTOMETRIC) == 0 else pixels)  # 0: white is zero
    if (transparent := file.info.get("transparency")) is not None:
        made.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    made.getexif().update(dict(file.getexif()))
    made.info.update({key: value for key, value in file.info.items() if key in ("exif", "icc_profile")})
    return made


def _alpha(picture: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, (W, H) of mode L; None where all are. Outside of a GIF's frame there is nothing."""
    alpha, box = None, picture.info.get("frame_box")
    if picture.has_transparency_data:
        alpha = (picture if picture.mode in ("RGBA", "LA") else picture.convert("RGBA")).getchannel("A")
    if box is not None:
        inside = Image.new("L", picture.size)
        inside.paste(255 if alpha is None else alpha.crop(box), box)
        alpha = inside
    return None if alpha is None or alpha.getextrema() == (255, 255) else alpha


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an embedded profile to sRGB; None where it is sRGB already, or not for pixels of this mode, as viewers do."""
    if mode not in ("L", "RGB", "CMYK"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "RGB":
        colours = Image.fromarray(
            np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3), -1).reshape(6, 36, 3).astype(np.uint8)
        )
        changed = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours)
        if np.abs(changed).max() <= 2:  # sRGB under one of its many names: rounding alone would be applied
            return None
    return transform


def check_colour(name: str, setting: str) -> None:
    """Raise UserError where a colour has no such name."""
    try:
        colour = ImageColor.getrgb(name)
    except ValueError as error:
        raise UserError(f"{setting}={name!r} is not a colour ({error}); try white, black or #102030") from None
    if len(colour) > 3:
        raise UserError(f"{setting}={name!r} is itself transparent; give a colour of three parts, as #102030")


def fit_picture(picture: Image.Image, resolution: int, fit: Fit, name: str) -> Image.Image:
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
        raise UserError(
            f"{size}; data.fit='crop' (--fit crop) resizes larger pictures, data.fit='pad' pads smaller ones"
        )
    if fit == "pad":
        if max(width, height) > resolution:
            raise UserError(f"{size}: data.fit='pad' cannot shrink it; use data.fit='crop' (--fit crop)")
        padded = Image.new(picture.mode, (resolution, resolution))
        padded.paste(picture, ((resolution - width) // 2, (resolution - height) // 2))
        return padded
    if min(width, height) < resolution:
        raise UserError(
            f"{size}: it would have to be enlarged; use larger pictures, a model of lower resolution, or data.fit='pad' (--fit pad)"
        )
    scale = resolution / min(width, height)
    new = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    picture = picture.resize(new, Image.Resampling.LANCZOS)
    left, top = (new[0] - resolution) // 2, (new[1] - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))
