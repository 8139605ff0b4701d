"""Decoded pixels are what a viewer shows."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fewstep.data.pictures import decode_picture
from fewstep.errors import UserError


def decoded(picture: Image.Image, kind: str = "PNG", channels: int = 3, **options: Any) -> np.ndarray:
    """A picture after a file of this kind, (H, W, C)."""
    background = options.pop("background", "white")
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    row = {"bytes": buffer.getvalue()}
    return decode_picture(row, "p", picture.size[0], channels, "pad", background).transpose(1, 2, 0)


def corners(size: int = 8) -> Image.Image:
    """Red at the top left, blue at the top right, else grey."""
    pixels = np.full((size, size, 3), 128, np.uint8)
    pixels[: size // 2, : size // 2], pixels[: size // 2, size // 2 :] = [255, 0, 0], [0, 0, 255]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_applied(orientation: int) -> None:
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    upright = corners()
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(stored, exif=exif), np.asarray(upright))


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0), ("#0a0a0a", 10)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_pixels_show_the_background(mode: str, background: str, colour: int) -> None:
    """What lies under them, left over by an editor, is shown by no viewer."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., :3], pixels[:2, :, 3] = 77, 255
    whole = Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if mode in ("RGB", "L"):  # a colour that counts as transparent
        pixels[2:, :, :3] = 30
        whole = Image.fromarray(pixels[..., :3]).convert(mode)
        options["transparency"] = (30, 30, 30) if mode == "RGB" else 30
    elif mode == "P":
        whole = Image.fromarray(np.repeat([[0], [0], [1], [1]], 4, 1).astype(np.uint8), "P")
        whole.putpalette([77, 77, 77, 0, 255, 0])
        options["transparency"] = 1
    elif mode == "LA":
        whole = whole.convert("LA")
    found = decoded(whole, background=background, **options)
    assert (found[:2] == 77).all()
    assert (found[2:] == colour).all()
    grey = decoded(whole, channels=1, background=background, **options)
    assert (grey[2:] == colour).all()


def test_half_transparent_pixels_are_mixed() -> None:
    pixels = np.full((2, 2, 4), [100, 100, 100, 128], np.uint8)
    assert abs(int(decoded(Image.fromarray(pixels))[0, 0, 0]) - (100 * 128 + 255 * 127) / 255) <= 1


def test_other_colour_spaces_become_srgb() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decoded(cmyk, "JPEG", quality=100)[4, 4]
    assert red[0] > 200
    assert red[1:].max() < 60
    plain = Image.new("RGB", (4, 4), (100, 150, 200))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(decoded(plain, icc_profile=srgb), np.asarray(plain))
    assert (decoded(plain, icc_profile=b"no profile") == np.asarray(plain)).all()  # as viewers do
    swapped = srgb.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    assert np.abs(decoded(plain, icc_profile=swapped)[0, 0].astype(int) - [200, 150, 100]).max() <= 2


def test_more_than_eight_bits(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for pixels, kind in (((values * 65535).astype(np.uint16), "PNG"), ((values * 65535).astype(np.uint16), "TIFF"), (values, "TIFF")):  # fmt: skip
        found = decoded(Image.fromarray(pixels), kind, channels=1)[..., 0]
        assert np.abs(found.astype(float) - values * 255).max() <= 1, (pixels.dtype, kind)
    for pixels, told in ((values * 300, "floating-point pixels from 0 to 300"), ((values * 9e5).astype(np.int32), "32-bit integer")):  # fmt: skip
        with pytest.raises(UserError, match=f"picture p has {told}"):
            decoded(Image.fromarray(pixels), "TIFF", channels=1)


def test_the_first_frame_of_an_animation_and_a_word(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    told: list[str] = []
    for kind in ("GIF", "WEBP", "PNG"):
        frames[0].save(
            tmp_path / f"x.{kind}",
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        found = decode_picture({"path": str(tmp_path / f"x.{kind}")}, kind, 4, 3, "pad", on_animation=told.append)
        np.testing.assert_array_equal(found[:, 0, 0], [255, 0, 0])
    assert told == ["GIF", "WEBP", "PNG"]


def test_a_row_without_a_picture() -> None:
    for row in ({}, {"bytes": None, "path": None}):
        with pytest.raises(UserError, match="picture p is missing"):
            decode_picture(row, "p", 4, 3, "pad")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "RGB", "I;16"])
def test_a_tiff_that_is_turned(mode: str, tmp_path: Path) -> None:
    """Pillow maps some of them into memory and garbles them (12.3: orientations 5 to 8, uncompressed, by path)."""
    upright = Image.fromarray(np.repeat(np.arange(24, dtype=np.uint8)[None] * 10, 16, 0))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    stored = stored if mode == "I;16" else stored.convert(mode)
    stored.save(tmp_path / "p.tif", tiffinfo={274: 6})
    found = decode_picture({"path": str(tmp_path / "p.tif")}, "p", 24, 1, "pad")
    np.testing.assert_allclose(found[0, 4:20].astype(int), np.asarray(upright).astype(int), atol=2)


def tiff(pixels: np.ndarray, tags: dict[int, int]) -> bytes:
    """An uncompressed grey TIFF of one strip with these tags."""
    content, height, width = pixels.tobytes(), *pixels.shape
    known = {256: width, 257: height, 258: pixels.itemsize * 8, 259: 1, 262: 1, 277: 1, 278: height, 279: len(content)}
    entries = sorted({**known, **tags, 273: 8 + 2 + 12 * (len({**known, **tags}) + 1) + 4}.items())
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + content


def test_what_a_tiff_says_of_its_pixels() -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    for pixels in (values, (values / 65535).astype(np.float32)):
        kind = {339: 3} if pixels.dtype == np.float32 else {}
        black_is_zero, white_is_zero = (
            decode_picture({"bytes": tiff(pixels, {**kind, 262: photometric})}, "p", 4, 1, "exact")
            for photometric in (1, 0)
        )
        np.testing.assert_array_equal(black_is_zero, 255 - white_is_zero)
        np.testing.assert_allclose(black_is_zero[0], values / 257, atol=1)
    with pytest.raises(UserError, match="picture p has signed pixels"):
        decode_picture({"bytes": tiff(np.zeros((4, 4), np.int8), {339: 2})}, "p", 4, 1, "exact")


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    pixels = np.full((4, 4), 300 * 64, np.uint16)
    pixels[0] = 1000
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    plain = buffer.getvalue()
    chunk = b"tRNS" + struct.pack(">H", 1000)
    place = plain.index(b"IDAT") - 4
    told = plain[:place] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[place:]
    found = decode_picture({"bytes": told}, "p", 4, 1, "exact")[0]
    assert (found[0] == 255).all()
    assert (found[1:] == 75).all()


def png_with(pixels: np.ndarray, *chunks: tuple[bytes, bytes], **options: Any) -> bytes:
    """A PNG with further chunks behind its header, where those about colours lie."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    content = buffer.getvalue()
    more = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return content[:33] + more + content[33:]


def shown(content: bytes, channels: int = 3) -> np.ndarray:
    return decode_picture({"bytes": content}, "p", 4, channels, "pad").transpose(1, 2, 0)


def gamma(value: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", value)


P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def chromaticities(values: tuple[int, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *values)


def from_p3(colour: list[int]) -> np.ndarray:
    """Display P3 to sRGB by the published matrix (CSS Color 4, section 18), both with sRGB's curve."""
    matrix = np.array([[1.2249401, -0.2249404, 0.0], [-0.0420569, 1.0420571, 0.0], [-0.0196376, -0.0786361, 1.0982735]])
    value = np.array(colour) / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    light = (matrix @ light).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_what_a_png_says_of_its_colours() -> None:
    """gAMA, cHRM and cICP where nothing goes before them; ImageMagick writes the first two into most files."""
    grey, colour = np.full((4, 4), 128, np.uint8), [200, 120, 90]
    rgb = np.tile(np.array(colour, np.uint8), (4, 4, 1))
    linear = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)
    assert abs(float(shown(png_with(grey, gamma(100_000)), 1)[0, 0, 0]) - linear) <= 1
    assert abs(float(shown(png_with(np.dstack([grey] * 3), gamma(100_000)))[0, 0, 1]) - linear) <= 1
    for chunks in (
        [gamma(45_455)], [gamma(0)], [chromaticities(SRGB), gamma(45_455)], [chromaticities((0,) * 8)],
        [(b"sRGB", b"\0"), gamma(100_000), chromaticities(P3)], [(b"cICP", bytes([1, 13, 0, 1])), gamma(100_000)],
    ):  # fmt: skip
        np.testing.assert_array_equal(shown(png_with(rgb, *chunks)), rgb)
    for wide in (chromaticities(P3), (b"cICP", bytes([12, 13, 0, 1]))):
        assert np.abs(shown(png_with(rgb, wide))[0, 0] - from_p3(colour)).max() <= 1.5
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(shown(png_with(rgb, gamma(100_000), icc_profile=srgb)), rgb)


@pytest.mark.parametrize(
    ("points", "told"),
    [((9, 16, 0, 1), r"high dynamic range \(PQ\)"), ((9, 18, 0, 1), "HLG"), ((1, 13, 0, 0), "narrow range"), ((200, 13, 0, 1), "not known here")],
)  # fmt: skip
def test_code_points_that_are_not_known(points: tuple[int, ...], told: str) -> None:
    with pytest.raises(UserError, match=f"picture p has colours of .*{told}.*; save it in sRGB"):
        shown(png_with(np.zeros((4, 4, 3), np.uint8), (b"cICP", bytes(points))))


def test_code_points_of_an_avif() -> None:
    colour, buffer = [200, 120, 90], io.BytesIO()
    Image.new("RGB", (4, 4), tuple(colour)).save(buffer, "AVIF", quality=100, subsampling="4:4:4")
    content = buffer.getvalue()
    place = content.index(b"colrnclx") + 8
    plain = shown(content)[0, 0].tolist()
    wide = content[:place] + struct.pack(">H", 12) + content[place + 2 :]
    assert np.abs(shown(wide)[0, 0] - from_p3(plain)).max() <= 1.5
    bright = content[: place + 2] + struct.pack(">H", 16) + content[place + 4 :]
    with pytest.raises(UserError, match="high dynamic range"):
        shown(bright)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(depth: int) -> None:
    """It is stored in the file's own numbers, not in those of the decoded pixels."""
    most = 2**depth - 1
    row = bytes([0, most << (8 - depth)])  # no filter; the brightest, then black
    content = png_of(8 // depth, 1, depth, 0, row, (b"tRNS", struct.pack(">H", most)))
    picture = decode_picture({"bytes": content}, "p", 8, 3, "pad", "#102030").transpose(1, 2, 0)
    line = picture[(picture == [16, 32, 48]).all(2).any(1)][0]
    pixels = line[line.any(1)]
    np.testing.assert_array_equal(pixels, [[16, 32, 48]])


def test_a_transparent_colour_of_sixteen_bits_is_refused() -> None:
    row = b"\0" + struct.pack(">3H", 0x1234, 0x1234, 0x1234)
    content = png_of(1, 1, 16, 2, row, (b"tRNS", struct.pack(">3H", 0x1234, 0x1234, 0x1234)))
    with pytest.raises(UserError, match=r"picture p has 16 bits a channel and one colour that is transparent"):
        decode_picture({"bytes": content}, "p", 1, 3, "exact")


def png_of(width: int, height: int, depth: int, colours: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these filtered rows."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def test_grey_of_other_depths_than_sixteen() -> None:
    """Microscopes write TIFFs of 12 bits, which Pillow leaves unscaled; what it scales itself is not scaled again."""
    packed = np.frombuffer(bytes([0x80, 0x0F, 0xFF]), np.uint8)[None]
    twelve = tiff(packed, {256: 2, 258: 12, 279: 3})
    np.testing.assert_array_equal(decode_picture({"bytes": twelve}, "p", 2, 1, "pad")[0].max(0), [128, 255])
    for most in (4095, 65535):
        content = b"P5 2 1 %d\n" % most + struct.pack(">2H", (most + 1) // 2, most)
        np.testing.assert_array_equal(decode_picture({"bytes": content}, "p", 2, 1, "pad")[0].max(0), [128, 255])
