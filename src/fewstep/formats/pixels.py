"""Tensors in [-1, 1] as 8-bit pictures and tiled grids."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional

from fewstep.formats.atomic import replaced_file

_FONT, _LETTER, _LINE, _GAP, _NAMES_LETTERS = 12, 7, 17, 8, 16  # pixels; letters of the names at the left


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats to 0..255, rounded, (N, C, H, W) uint8 on the CPU."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def as_eight_bits(images: Tensor) -> Tensor:
    """Floats in [-1, 1] as a picture file of 8 bits would give them back; of their shape and device."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (N, C, H, W) in [-1, 1] as N pictures: grey ones of one channel, RGB of three."""
    pixels = to_uint8(images).numpy()
    return [
        Image.fromarray(one[0] if len(one) == 1 else np.ascontiguousarray(one.transpose(1, 2, 0))) for one in pixels
    ]


def make_grid(images: Tensor, columns: int) -> Image.Image:
    """Tile images (N, C, H, W) in [-1, 1] into one RGB picture with one pixel between them."""
    pixels = to_uint8(images)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for number, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def save_grid(path: Path, images: Tensor, columns: int, facts: dict[str, object] | None = None) -> None:
    """Save a grid as PNG, written aside and renamed, with facts about it in its metadata."""
    with replaced_file(path) as aside:
        make_grid(images, columns).save(aside, format="PNG", pnginfo=_metadata(facts or {}))


def save_picture(path: Path, image: Tensor, facts: dict[str, object]) -> None:
    """Save one image (C, H, W) in [-1, 1] as PNG; each fact becomes a text entry "fewstep:<name>"."""
    pixels = to_uint8(image).numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    with replaced_file(path) as aside:
        picture.save(aside, format="PNG", pnginfo=_metadata(facts))


def _metadata(facts: dict[str, object]) -> PngInfo:
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(f"fewstep:{name}", str(value))
    return info


@dataclass(frozen=True)
class Block:
    """Rows of pictures above one another that answer the same wishes.

    Attributes:
        captions: what each column shows.
        rows: by what made them, the pictures in the order of the captions, (N, C, H, W) in [-1, 1]; where there are
            several of each, N is a multiple of the captions' number.
    """

    captions: Sequence[str]
    rows: Mapping[str, Tensor]


def save_comparison(path: Path, blocks: Sequence[Block], scale: int = 2) -> None:
    """Blocks below one another as one PNG, enlarged `scale` times without smoothing: captions above, makers at the left."""
    drawn = [_drawn_block(block, scale) for block in blocks]
    canvas = Image.new("RGB", (max(one.width for one in drawn), sum(one.height for one in drawn)), "white")
    top = 0
    for one in drawn:
        canvas.paste(one, (0, top))
        top += one.height
    with replaced_file(path) as aside:
        canvas.save(aside, format="PNG")


def _drawn_block(block: Block, scale: int) -> Image.Image:
    """Captions, then a grid for each row's name."""
    columns = len(block.captions)
    side = max(max(images.shape[2:]) for images in block.rows.values())
    grids = [make_grid(_padded(images, side), columns) for images in block.rows.values()]
    wide = scale * (grids[0].width + 1) // columns
    captions = [_wrapped(caption, wide // _LETTER) for caption in block.captions]
    names = [_wrapped(name, _NAMES_LETTERS) for name in block.rows]
    head = _LINE * max(caption.count("\n") + 1 for caption in captions) + _GAP
    left = _NAMES_LETTERS * _LETTER + _GAP
    height = head + sum(scale * grid.height + _GAP for grid in grids)
    canvas = Image.new("RGB", (left + scale * grids[0].width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    for column, caption in enumerate(captions):
        draw.multiline_text((left + column * wide, 0), caption, fill="black", font=font, spacing=2)
    top = head
    for name, grid in zip(names, grids, strict=True):
        draw.multiline_text((0, top), name, fill="black", font=font, spacing=2)
        size = (grid.width * scale, grid.height * scale)
        canvas.paste(grid.resize(size, Image.Resampling.NEAREST), (left, top))
        top += size[1] + _GAP
    return canvas


def _padded(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) in the middle of black squares, so that rows of other sizes keep their columns."""
    high, wide = side - images.shape[2], side - images.shape[3]
    return functional.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=-1.0)


def _wrapped(text: str, letters: int) -> str:
    """Lines of at most so many letters; what is longer than four lines is cut."""
    return "\n".join(textwrap.wrap(text, max(letters, 4), max_lines=4, placeholder=" ..."))
