"""What a picture's file says of its colours where it has no ICC profile: PNG's gAMA, cHRM and cICP, and AVIF's nclx.

Each becomes an ICC profile, so that one way leads to sRGB. Sources: PNG specification, third edition (which of the
chunks goes before which: 4.3), and ITU-T H.273 for the code points.
"""

import struct
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from fewstep.errors import UserError

_SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x, y of white, red, green and blue
_PRIMARIES = {
    1: _SRGB, 2: _SRGB,  # 2: not said
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06), 6: (0.3127, 0.3290, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046), 11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}  # fmt: skip
_PRIMARIES[7] = _PRIMARIES[6]
_AS_SRGB = frozenset({1, 2, 6, 13, 14, 15})  # transfer functions that viewers show as sRGB's
_POWERS = {4: 2.2, 5: 2.8, 8: 1.0}
_HDR = {16: "PQ", 18: "HLG"}
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_HEAD_BYTES = 2**16  # of an AVIF: its boxes lie before the pixels
_SAME_GAMMA = 0.05  # as libpng, which applies no smaller difference


class CodePoints(NamedTuple):
    """Numbers of H.273."""

    primaries: int
    transfer: int
    matrix: int
    full_range: bool


def read_code_points(content: IO[bytes], kind: str | None) -> CodePoints | None:
    """What an opened PNG or AVIF says of its colours in code points; the place in the file is kept.

    Args:
        kind: as Pillow calls the format.
    """
    place = content.tell()
    try:
        content.seek(0)
        if kind == "PNG":
            return _cicp(content)
        head = content.read(_HEAD_BYTES) if kind == "AVIF" else b""
    finally:
        content.seek(place)
    start = head.find(b"colrnclx") + 8
    if start < 8 or len(head) < start + 7:
        return None
    primaries, transfer, matrix, flags = struct.unpack(">HHHB", head[start : start + 7])
    return CodePoints(primaries, transfer, matrix, bool(flags & 0x80))


def _cicp(content: IO[bytes]) -> CodePoints | None:
    """Of the chunks before a PNG's pixels."""
    content.seek(8)
    while len(head := content.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"cICP" and length == 4 and len(values := content.read(4)) == 4:
            return CodePoints(values[0], values[1], values[2], bool(values[3]))
        content.seek(length + 4, 1)
    return None


def stated_profile(file: Image.Image, mode: str, name: str) -> bytes | None:
    """The ICC profile of a picture: its own, or what the rest of its file says; None where that is sRGB or nothing.

    Args:
        file: as `open_picture` gives it.
        mode: of the pixels that the profile is for: grey ones have no primaries.
        name: of the picture, for messages.

    Raises:
        UserError: colours of high dynamic range, or code points that are not known here.
    """
    points: CodePoints | None = file.info.get("code_points")
    own: bytes | None = file.info.get("icc_profile")
    if mode not in _SPACES:
        return own
    if points is not None and (file.format == "PNG" or own is None):
        return _of_code_points(points, mode, name, file.format == "PNG")
    if own is not None or file.format != "PNG" or "srgb" in file.info:
        return own
    gamma, chromaticity = file.info.get("gamma", 0.0), file.info.get("chromaticity", ())
    power = 1 / gamma if 0.01 < gamma < 100 and abs(gamma * 2.2 - 1) > _SAME_GAMMA else 0.0
    primaries = tuple(chromaticity) if mode == "RGB" and _are_primaries(chromaticity) else _SRGB
    return _built_profile(primaries, power, mode)


def _of_code_points(points: CodePoints, mode: str, name: str, is_png: bool) -> bytes | None:
    primaries = _PRIMARIES.get(points.primaries)
    if points.transfer in _HDR:
        raise UserError(
            f"picture {name} has colours of high dynamic range ({_HDR[points.transfer]}), which have no 8-bit form of their own; "
            "save it in sRGB"
        )
    narrow = is_png and (points.matrix or not points.full_range)
    if primaries is None or points.transfer not in {*_AS_SRGB, *_POWERS} or narrow:
        raise UserError(
            f"picture {name} has colours of a kind that is not known here (code points {points.primaries}, {points.transfer}, "
            f"{points.matrix}, {'full' if points.full_range else 'narrow'} range); save it in sRGB"
        )
    return _built_profile(primaries if mode == "RGB" else _SRGB, _POWERS.get(points.transfer, 0.0), mode)


def _are_primaries(values: Any) -> bool:
    """Whether these eight numbers say of a white and three colours where they lie; broken files have zeros there."""
    if len(values) != 8 or not all(0 < value < 1 for value in values[1::2]):
        return False
    return abs(float(np.linalg.det(_colours(tuple(values))))) > 1e-4


@lru_cache(maxsize=64)
def _built_profile(primaries: tuple[float, ...], power: float, mode: str) -> bytes | None:
    """An ICC profile (4.3) of a display; None where it is sRGB's.

    Args:
        primaries: x, y of white, red, green and blue.
        power: light is the pixel to this power; 0: sRGB's curve.
    """
    if not power and max(abs(a - b) for a, b in zip(primaries, _SRGB, strict=True)) < 2e-3:
        return None
    curve = struct.pack(">4sI2H", b"para", 0, 0 if power else 3, 0)
    curve += b"".join(map(_fixed, (power,) if power else _SRGB_CURVE))
    tags = {b"wtpt": _xyz(_D50)}
    if mode == "L":
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip(b"rgb", _adapted(primaries).T, strict=True):
            tags[bytes([letter]) + b"XYZ"], tags[bytes([letter]) + b"TRC"] = _xyz(column), curve
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(value))
        body += value
    header = struct.pack(
        ">II4I",
        offset + len(body),
        0,
        0x04300000,
        *(int.from_bytes(word) for word in (b"mntr", _SPACES[mode], b"XYZ ")),
    )
    header += bytes(12) + b"acsp" + bytes(28) + b"".join(map(_fixed, _D50))
    return header.ljust(128, b"\0") + table + body


_SPACES = {"L": b"GRAY", "RGB": b"RGB "}


def _colours(primaries: tuple[float, ...]) -> np.ndarray:
    """XYZ of red, green and blue of any lightness, as columns."""
    return np.array([[x / y, 1, (1 - x - y) / y] for x, y in zip(primaries[2::2], primaries[3::2], strict=True)]).T


def _adapted(primaries: tuple[float, ...]) -> np.ndarray:
    """XYZ under D50 of red, green and blue, which together are white."""
    white = np.array([primaries[0] / primaries[1], 1, (1 - primaries[0] - primaries[1]) / primaries[1]])
    columns = _colours(primaries)
    columns = columns * np.linalg.solve(columns, white)
    scale = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    adapted: np.ndarray = np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ columns
    return adapted


def _xyz(values: Any) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _fixed(value: float) -> bytes:
    """s15Fixed16."""
    return struct.pack(">i", round(value * 65536))
