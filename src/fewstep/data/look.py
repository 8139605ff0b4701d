"""What a set of pictures is like before a network for it is chosen: its size, whether it is grey, how many classes it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fewstep.data.listing import Listing, list_pictures_below
from fewstep.data.opening import decoding, open_picture
from fewstep.data.tables import (
    FolderRows,
    PictureRows,
    TableRows,
    image_column,
    labels_in,
    listed_labels,
    open_table,
    picture_tables,
)
from fewstep.errors import UserError
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
        unlabelled: why the column that would label them does not, for people.
    """

    shortest_side: int
    channels: int
    num_classes: int
    labelled_by: str = ""
    unlabelled: str = ""


@dataclass(frozen=True)
class _Classes:
    """The part of a look that is of labels."""

    num_classes: int = 0
    labelled_by: str = ""
    unlabelled: str = ""


def look_at_pictures(settings: "DataSettings") -> Look:
    """Look at a hundred pictures of a set, and at what would label all of them.

    Raises:
        UserError: nothing there, or a picture that does not decode.
    """
    path, where = data_path(settings.images), f"data.images={settings.images}"
    if settings.images and (path / "data.mdb").is_file():
        return _look_at_lmdb(path)
    if settings.images and path.is_dir() and not picture_tables(path, where):
        listing = list_pictures_below(path, settings.split, where)
        rows, numbers = FolderRows(listing.paths), _spread(len(listing.names))
        return _look(rows, numbers, _classes_of_listing(listing, settings.label_column, where))
    table = open_table(settings)
    column = image_column(table.features, where)
    classes = _classes_of_table(table, settings.label_column, where)
    rows_of_table = TableRows(table, column, settings.images)
    return _look(rows_of_table, _spread(len(table)), classes)


def _look_at_lmdb(path: Path) -> Look:
    with LmdbArrays(path, IMAGENET) as arrays:
        count, channels, side, _ = arrays.shapes["images"]
        labels = arrays.rows("labels", range(count))
    return Look(side, channels, int(labels.max()) + 1, "its labels")


def _spread(count: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _LOOKED_AT))})


def _look(rows: PictureRows, numbers: Sequence[int], classes: _Classes) -> Look:
    """What these of the pictures are like, and these classes."""
    sides, grey = [], True
    for number, row in zip(numbers, rows.encoded(numbers), strict=True):
        name = rows.name(number, row)
        with decoding(name), open_picture(row, name) as picture:
            sides.append(min(picture.size))
            grey = grey and _is_grey(picture)
    return Look(min(sides), 1 if grey else 3, classes.num_classes, classes.labelled_by, classes.unlabelled)


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I"):
        return True
    pixels = np.asarray(picture.convert("RGB").resize((32, 32)), dtype=np.int16)
    return int(np.ptp(pixels, axis=2).max()) <= 8  # as JPEG leaves a grey picture


def _classes_of_listing(listing: Listing, column: str, where: str) -> _Classes:
    if column in listing.columns:
        return _classes_of_labels(lambda: listed_labels(listing, column, where), column)
    names = listing.class_names
    return _Classes(len(names), "folders") if len(names) > 1 else _Classes()


def _classes_of_table(table: Any, column: str, where: str) -> _Classes:
    if column not in table.features:
        return _Classes()
    found = _classes_of_labels(lambda: labels_in(table, column, where), column)
    names = getattr(table.features[column], "names", None)
    return replace(found, num_classes=len(names)) if names and found.num_classes else found


def _classes_of_labels(labels: Callable[[], np.ndarray], column: str) -> _Classes:
    """How many a column numbers; none, and why, where it holds something else."""
    try:
        values = labels()
    except UserError as error:
        return _Classes(unlabelled=str(error).partition(": ")[2].partition(";")[0])
    return _Classes(int(values.max(initial=-1)) + 1, f"column {column}")
