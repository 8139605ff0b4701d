"""COCO's captions file and the pictures it names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewstep.data.opening import decoding, open_picture
from fewstep.data.pictures import shown_picture
from fewstep.errors import UserError
from fewstep.formats.json_files import parse_json
from fewstep.progress import Report

T = TypeVar("T")


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures of one folder in the order of their ids, each with its caption of the lowest id."""

    root: Path
    paths: list[Path]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, number: int) -> np.ndarray:
        """One picture as a viewer shows it, (H, W, 3) uint8."""
        path = self.paths[number]
        with decoding(str(path)), open_picture({"path": str(path)}, str(path)) as file:
            return np.asarray(shown_picture(file, str(path), "RGB"))

    def check(self, report: Report = lambda done, total: None) -> None:
        """Decode every picture once.

        Raises:
            UserError: some cannot be read; the message counts them and names the first.
        """
        broken = []
        for number in range(len(self)):
            report(number, len(self))
            try:
                self.pixels(number)
            except UserError:
                broken.append(self.paths[number])
        report(len(self), len(self))
        if broken:
            names = ", ".join(path.name for path in broken[:5])
            raise UserError(
                f"{broken[0].parent}: {len(broken)} of {len(self)} pictures cannot be read ({names}); get them again"
            )


def load_coco(captions: Path, folder: Path) -> CaptionedPictures:
    """Read a captions file of COCO's layout: `images` of (id, file_name), `annotations` of (id, image_id, caption).

    Raises:
        UserError: another layout, a picture listed twice, without caption or not in the folder, fewer than 2 pictures.
    """
    try:
        whole = parse_json(captions.read_text(encoding="utf-8"))
        listed = [(_of(row, "id", int), _of(row, "file_name", str)) for row in whole["images"]]
        rows = [
            (_of(row, "id", int), _of(row, "image_id", int), _of(row, "caption", str).strip())
            for row in whole["annotations"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--captions {captions} is no captions file of COCO's layout (images with id and file_name, annotations with id, "
            f"image_id and caption): {type(error).__name__} {error}; give captions_val2014.json"
        ) from None
    names = dict(listed)
    outside = [name for name in names.values() if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(f"--captions {captions} names {outside[0]!r}, which is not below a folder of pictures")
    if len(names) != len(listed) or len(set(names.values())) != len(listed):
        raise UserError(f"--captions {captions} lists a picture twice; each may stand in `images` once")
    first = {image: caption for _, image, caption in sorted(rows, reverse=True)}
    if silent := sorted(names.keys() - first.keys()):
        raise UserError(f"--captions {captions}: {len(silent)} pictures have no caption, {names[silent[0]]} first")
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"--images {folder} lacks {len(missing)} of {len(names)} pictures of {captions}, {missing[0]} first"
        )
    if len(names) < 2:
        raise UserError(f"--captions {captions} lists {len(names)} pictures; a distance takes at least 2")
    order = sorted(names)
    return CaptionedPictures(folder, [folder / names[key] for key in order], [first[key] for key in order])


def _of(row: Any, name: str, kind: type[T]) -> T:
    """An entry of a row; raises TypeError where it is of another kind."""
    value = row[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    return value
