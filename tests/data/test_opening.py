"""What is read of a picture's file, and what is refused by its name."""

import contextlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.data.look import look_at_pictures
from fewstep.data.opening import open_picture
from fewstep.data.pictures import check_colour, decode_picture
from fewstep.errors import UserError
from fewstep.settings import DataSettings
from tests.data.test_pictures import tiff


def stored(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "TGA", "PPM", "BMP"])
def test_damage_is_a_sentence_whatever_the_library_raises(kind: str) -> None:
    """AVIF's decoder raises RuntimeError, others what they like."""
    if kind not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow does not read {kind}")
    whole = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)), kind)
    for cut in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        with contextlib.suppress(UserError):  # a picture whose end alone is missing may be whole
            decode_picture({"bytes": whole[:cut]}, "p", 24, 3, "exact")


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow knows PostScript by its first bytes, whatever the suffix says, and hands the file to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho called > {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="no picture of a kind that is read"):
        decode_picture({"bytes": content}, "p", 16, 3, "exact")
    assert not (tmp_path / "called").exists()


def test_tiffs_that_pillow_garbles_are_refused() -> None:
    """Of 16 bits in one plane for each channel it mixes the planes; big-endian floats that are compressed it turns around."""
    planes = np.arange(3 * 4, dtype=np.uint16).reshape(3, 2, 2) * 5000
    entries = {256: 2, 257: 2, 258: 16, 262: 2, 273: 8, 277: 3, 278: 2, 279: 8, 284: 2}
    with pytest.raises(UserError, match="more than 8 bits a channel in one plane for each"):
        decode_picture({"bytes": tiff(planes.view(np.uint8).reshape(6, 4), entries)}, "p", 2, 3, "exact")
    masks = Image.fromarray(np.eye(4, dtype=np.float32))
    plain = stored(masks, "TIFF", compression="tiff_deflate")
    np.testing.assert_array_equal(decode_picture({"bytes": plain}, "p", 4, 1, "exact")[0], np.eye(4) * 255)
    with pytest.raises(UserError, match="big-endian"):
        decode_picture({"bytes": big_endian(plain)}, "p", 4, 1, "exact")


def big_endian(content: bytes) -> bytes:
    """A TIFF of one directory with its numbers, not its compressed pixels, in the other byte order."""
    turned = bytearray(content)
    turned[:2] = b"MM"
    places = [(2, "H"), (4, "I")]
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    places += [(start, "H"), (start + 2 + 12 * count, "I")]
    for place in range(start + 2, start + 2 + 12 * count, 12):
        kind, number = struct.unpack_from("<HI", content, place + 2)
        places += [(place, "H"), (place + 2, "H"), (place + 4, "I")]
        places.append((place + 8, "H" if kind == 3 and number == 1 else "I"))
    for place, letter in places:
        struct.pack_into(">" + letter, turned, place, *struct.unpack_from("<" + letter, content, place))
    return bytes(turned)


@pytest.mark.parametrize("transparent", [False, True])
def test_outside_of_a_gifs_first_frame_there_is_nothing(transparent: bool) -> None:
    """Pillow fills what the frame leaves free with the palette's first colour."""
    whole = stored(Image.new("P", (4, 4), 0), "GIF")
    colours = bytes([255, 0, 0, 0, 255, 0])
    frame = whole[whole.rindex(b",\0\0\0\0") + 9 : -1]
    control = b"!\xf9\x04\x01\0\0\x01\0" if transparent else b""
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + colours
    content = screen + control + b"," + struct.pack("<HHHH", 2, 2, 4, 4) + frame + b";"
    picture = decode_picture({"bytes": content}, "p", 8, 3, "exact", "#102030").transpose(1, 2, 0)
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    np.testing.assert_array_equal(picture[inside], np.tile([255, 0, 0], (16, 1)))
    np.testing.assert_array_equal(picture[~inside], np.tile([16, 32, 48], (48, 1)))


def test_mixing_with_the_background_is_pillows_own() -> None:
    """Of large pictures fewer copies are made; the pixels are those of Image.composite."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    whole = Image.fromarray(pixels)
    expected = Image.composite(whole.convert("RGB"), Image.new("RGB", whole.size, (10, 200, 30)), whole.getchannel("A"))
    found = decode_picture({"bytes": stored(whole, "PNG")}, "p", 64, 3, "exact", "rgb(10,200,30)")
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(expected))


def test_a_background_is_opaque() -> None:
    with pytest.raises(UserError, match=r"data\.background='#10203040' is itself transparent"):
        check_colour("#10203040", "data.background")


def test_looking_names_what_is_missing_or_no_picture(tmp_path: Path) -> None:
    """A first look at a set says of a broken picture what decoding says."""
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"empty\.png does not decode \(its bytes are no picture of a kind that is read\)"
    ):
        look_at_pictures(DataSettings(images=str(tmp_path)))
    (tmp_path / "empty.png").unlink()
    (tmp_path / "link.png").symlink_to("nothing.png")
    with pytest.raises(UserError, match=r"link\.png is missing: there is no such file"):
        look_at_pictures(DataSettings(images=str(tmp_path)))
    empty: dict[str, None] = {"bytes": None, "path": None}
    with pytest.raises(UserError, match="row 3 is missing: its row has neither"), open_picture(empty, "row 3"):
        pass
