"""Tensors in [-1, 1] as 8-bit pictures and tiled grids."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fewstep.formats.atomic import replaced_file


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats to 0..255, rounded, (N, C, H, W) uint8 on the CPU."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


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


def save_side_by_side(path: Path, left: Tensor, right: Tensor, columns: int, scale: int = 2) -> None:
    """Two grids next to each other, enlarged `scale` times without smoothing, as one PNG."""
    grids = [make_grid(images, columns) for images in (left, right)]
    gap = grids[0].width // 24
    canvas = Image.new("RGB", (grids[0].width + gap + grids[1].width, max(grid.height for grid in grids)), "white")
    canvas.paste(grids[0], (0, 0))
    canvas.paste(grids[1], (grids[0].width + gap, 0))
    enlarged = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.NEAREST)
    with replaced_file(path) as aside:
        enlarged.save(aside, format="PNG")
