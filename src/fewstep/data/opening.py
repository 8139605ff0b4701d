"""A picture's file, opened: which kinds are read, what Pillow would read wrong, and one sentence for what does not decode."""

import io
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from fewstep.data.colour import read_code_points
from fewstep.errors import UserError, first_line

_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "TGA", "PPM", "ICO")
BITS = 258  # a tag of TIFF
_COMPRESSION, _SAMPLES, _PLANAR, _COLOURS = 259, 277, 284, 320
_LARGE_PIXELS = 40_000_000  # 160 MB of them, several times while they are decoded
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Around reading a picture: whatever Pillow and the libraries below it raise becomes one sentence with its name.

    Raises:
        UserError: in place of any exception but a lack of memory.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"picture {name} does not decode (its bytes are no picture of a kind that is read); replace or remove it"
        ) from None
    except FileNotFoundError:
        raise UserError(f"picture {name} is missing: there is no such file; replace or remove it") from None
    except Exception as error:  # of AVIF a RuntimeError, of others struct.error, EOFError and more
        words = (error.strerror if isinstance(error, OSError) else "") or first_line(error)
        raise UserError(f"picture {name} does not decode ({words}); replace or remove it") from None


@contextmanager
def open_picture(row: dict[str, Any], name: str) -> Iterator[Image.Image]:
    """A picture's file, given as {"bytes": ...} or {"path": ...}; of very large ones one at a time.

    Pillow never gets the path: it would map a TIFF into memory, and such a one is garbled where a tag turns it.

    Raises:
        UserError: the row has no picture, or Pillow would read another one out of the file.
    """
    stored = row.get("bytes")
    if stored is None and not row.get("path"):
        raise UserError(f"picture {name} is missing: its row has neither bytes nor a path")
    with ExitStack() as stack:
        content = stack.enter_context(Path(row["path"]).open("rb")) if stored is None else io.BytesIO(stored)
        picture = stack.enter_context(Image.open(content, formats=_kinds()))
        if picture.width * picture.height > _LARGE_PIXELS:
            stack.enter_context(_ONE_AT_A_TIME)
        if picture.format == "TIFF":
            _refuse_garbled_tiff(picture, name)
        if picture.format == "GIF" and picture.tile and picture.tile[0][1] != (0, 0, *picture.size):
            picture.info["frame_box"] = picture.tile[0][1]
        if (points := read_code_points(content, picture.format)) is not None:
            picture.info["code_points"] = points
        if picture.format == "PNG" and picture.mode in ("1", "L", "RGB") and "transparency" in picture.info:
            picture.info["transparency"] = _transparent_colour(picture.info["transparency"], content)
        yield picture


@lru_cache(maxsize=1)
def _kinds() -> tuple[str, ...]:
    """What is read, as Pillow calls it. Its other kinds are not: for PostScript it would start another program on the file."""
    Image.init()
    return tuple(kind for kind in _KINDS if kind in Image.OPEN)  # AVIF only where Pillow was built with it


def _refuse_garbled_tiff(picture: Any, name: str) -> None:
    """Raise UserError for layouts of TIFF whose bytes Pillow puts in another order or whose colours it makes black."""
    tags = picture.tag_v2
    is_raw, kind = tags.get(_COMPRESSION, 1) == 1, ""
    if is_raw and tags.get(_PLANAR) == 2 and tags.get(_SAMPLES, 1) > 1 and max(tags.get(BITS, (1,))) > 8:
        kind = "more than 8 bits a channel in one plane for each, uncompressed"
    elif picture.mode == "F" and not is_raw and tags.prefix == b"MM":
        kind = "compressed floating-point pixels in big-endian order"
    elif picture.mode in ("P", "PA") and max(tags.get(_COLOURS, (256,))) < 256:
        kind = "a colour map of 8 bits, where the format has 16"
    if kind:
        raise UserError(f"picture {name} is a TIFF with {kind}, which is not read; save it as PNG")


def _transparent_colour(stored: Any, content: IO[bytes]) -> Any:
    """The transparent colour of a PNG, of as many bits as Pillow makes its pixels; None: it cannot be told by these.

    Pillow keeps the file's number, which for grey of less than 8 bits and for RGB of 16 no decoded pixel has.
    """
    place = content.tell()
    content.seek(24)  # the bits a channel, in the first chunk
    depth = (content.read(1) or b"\x08")[0]
    content.seek(place)
    if depth >= 8 or not isinstance(stored, int):
        return None if depth > 8 else stored
    return min(255, stored * 255 // (2**depth - 1))  # of one bit, some versions of Pillow have done it
