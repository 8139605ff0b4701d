"""What a set of pictures is like before a network for it is chosen: its size, whether it is grey, how many classes it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fewstep.data.listing import Listing, list_pictures_below
from fewstep.data.opening import decoding, open_picture
from fewstep.data.tables import FolderRows, PictureRows, TableRows, image_column, open_table, picture_tables
from fewstep.formats.lmdb import IMAGENET, LmdbArrays
from fewstep.formats.remote import data_path

if TYPE_CHECKING:
    from fewstep.settings import DataSettings

_LOOKED_AT = 100  # pictures, spread over the set


@dataclass(frozen=True)
class Look:
    """What `look_at_pictures` found.

    Attributes:
        shortest_side: of the pictures looked at, in pixels.
        channels: 1 where all of them are grey, else 3.
        num_classes: 0 where nothing labels them.
        labelled_by: what does, for people; empty without classes.
    """

    shortest_side: int
    channels: int
    num_classes: int
    labelled_by: str = ""


def look_at_pictures(settings: "DataSettings") -> Look:
    """Look at a hundred pictures of a set, and at what would label all of them.

    Raises:
        UserError: nothing there, or a picture that does not decode.
    """
    path = data_path(settings.images)
    if settings.images and (path / "data.mdb").is_file():
        return _look_at_lmdb(path)
    if settings.images and path.is_dir() and not picture_tables(path, f"data.images={settings.images}"):
        listing = list_pictures_below(path, settings.split, f"data.images={settings.images}")
        rows, numbers = FolderRows(listing.paths), _spread(len(listing.names))
        return Look(*_size_and_channels(rows, numbers), *_classes_of_listing(listing, settings.label_column))
    table = open_table(settings)
    column = image_column(table.features, f"data.images={settings.images}")
    num_classes, labelled_by = _classes_of_table(table, settings.label_column)
    rows_of_table = TableRows(table, column, settings.images)
    return Look(*_size_and_channels(rows_of_table, _spread(len(table))), num_classes, labelled_by)


def _look_at_lmdb(path: Path) -> Look:
    with LmdbArrays(path, IMAGENET) as arrays:
        count, channels, side, _ = arrays.shapes["images"]
        labels = arrays.rows("labels", range(count))
    return Look(side, channels, int(labels.max()) + 1, "its labels")


def _spread(count: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _LOOKED_AT))})


def _size_and_channels(rows: PictureRows, numbers: Sequence[int]) -> tuple[int, int]:
    sides, grey = [], True
    for number, row in zip(numbers, rows.encoded(numbers), strict=True):
        name = rows.name(number, row)
        with decoding(name), open_picture(row, name) as picture:
            sides.append(min(picture.size))
            grey = grey and _is_grey(picture)
    return min(sides), 1 if grey else 3


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I"):
        return True
    pixels = np.asarray(picture.convert("RGB").resize((32, 32)), dtype=np.int16)
    return int(np.ptp(pixels, axis=2).max()) <= 8  # as JPEG leaves a grey picture


def _classes_of_listing(listing: Listing, column: str) -> tuple[int, str]:
    if column in listing.columns:
        values = [row[column] for row in listing.metadata.values() if column in row]
        whole = [int(value) for value in values if str(value).lstrip("-").isdigit()]
        return (max(whole) + 1, f"column {column}") if whole and len(whole) == len(values) else (0, "")
    names = listing.class_names
    return (len(names), "folders") if len(names) > 1 else (0, "")


def _classes_of_table(table: Any, column: str) -> tuple[int, str]:
    if column not in table.features:
        return 0, ""
    values = np.asarray(table[column])
    if not len(values) or not np.issubdtype(values.dtype, np.integer):
        return 0, ""
    names = getattr(table.features[column], "names", None)
    return (len(names) if names else int(values.max()) + 1), f"column {column}"
