from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.formats.pixels import make_grid, save_side_by_side, to_uint8


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 2 * 7.4 / 255 - 1, 2 * 7.6 / 255 - 1]).reshape(1, 1, 1, -1)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255, 7, 8]


def test_grid_places_pictures_row_by_row_with_a_white_line_between() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 3, 4)
    grid = np.asarray(make_grid(images, columns=3))
    assert grid.shape == (7, 14, 3)
    assert grid[0, 0, 0] == 0
    assert grid[0, 5, 0] == 64
    assert grid[4, 5, 0] == 255
    assert (grid[3] == 255).all()
    assert (grid[:, 4] == 255).all()


def test_side_by_side_is_enlarged_and_keeps_left_and_right(tmp_path: Path) -> None:
    left, right = torch.full((24, 1, 4, 4), -1.0), torch.zeros(24, 1, 4, 4)
    save_side_by_side(tmp_path / "both.png", left, right, columns=24, scale=3)
    with Image.open(tmp_path / "both.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (4 * 3, (119 + 119 // 24 + 119) * 3, 3)
    assert (pixels[:11, :11] == 0).all()
    assert (pixels[:11, -11:] == 128).all()
