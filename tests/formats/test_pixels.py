from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.formats.pixels import Block, make_grid, save_comparison, to_uint8


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


def test_rows_of_other_sizes_keep_their_columns(tmp_path: Path) -> None:
    """Real pictures of 28 above made ones of 32: the last column is whole, and white begins beside it."""
    rows = {"real": torch.ones(5, 1, 28, 28), "made": torch.ones(5, 1, 32, 32)}
    save_comparison(tmp_path / "one.png", [Block(["a"] * 5, rows)], scale=1)
    same = {name: torch.ones(5, 1, 32, 32) for name in rows}
    save_comparison(tmp_path / "same.png", [Block(["a"] * 5, same)], scale=1)
    one, two = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "same.png"))
    assert one.shape == two.shape
    assert (one[-40:] == two[-40:]).all()


def test_a_comparison_has_captions_above_names_beside_and_enlarged_grids(tmp_path: Path) -> None:
    red, blue = (torch.full((count, 3, 20, 20), -1.0) for count in (4, 2))
    red[:, 0], blue[:, 2] = 1.0, 1.0
    rows = {"teacher": red, "generator": blue}
    save_comparison(tmp_path / "one.png", [Block(["a shoe", "a caption of many long words"], rows)], scale=3)
    save_comparison(tmp_path / "two.png", [Block(["a"] * 2, rows), Block(["b"] * 2, {"x": blue})], scale=3)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        pixels, more = np.asarray(one), np.asarray(two)
    is_red, is_blue = ((pixels == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert (is_red.sum(), is_blue.sum()) == (4 * 60 * 60, 2 * 60 * 60)
    down, across = np.nonzero(is_red)
    assert (np.ptp(down) + 1, np.ptp(across) + 1) == (
        123,
        123,
    )  # two rows of two, one pixel between, three times as large
    assert np.nonzero(is_blue)[0].min() > down.max()
    assert (pixels[: down.min(), across.min() :] < 100).any()  # captions
    assert (pixels[down.min() :, : across.min()] < 100).any()  # names
    assert more.shape[1] == pixels.shape[1]
    assert (more == (0, 0, 255)).all(axis=2).sum() == 2 * is_blue.sum()
