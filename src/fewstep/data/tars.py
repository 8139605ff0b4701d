"""WebDataset tars, read member by member: files of one key are one row, whatever kind of picture each row has."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.data.listing import is_picture
from fewstep.errors import UserError

_BLOCK = 512  # bytes of a tar's header, and what its members are padded to


def check_tar(path: Path) -> None:
    """Walk the headers of a tar up to its end mark, which readers that stop at the end of the file do not miss.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    remedy = "download or write it again"
    place = 0
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            while place + _BLOCK <= size:
                file.seek(place)
                header = file.read(_BLOCK)
                if header == bytes(_BLOCK):
                    return
                content = _content_bytes(header)
                if content < 0:
                    raise ValueError("a member of negative size")
                place += _BLOCK + -(-content // _BLOCK) * _BLOCK
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    except ValueError:
        raise UserError(f"{path} is no tar file, or damaged at byte {place}; {remedy}") from None
    raise UserError(f"{path} is cut short: it ends at byte {size} without the end mark of a tar; {remedy}")


def _content_bytes(header: bytes) -> int:
    """The size field of a header."""
    field = header[124:136]
    if field[0] & 0x80:  # the way of members above 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


class TarRows:
    """Rows {"__key__", "image": {"bytes", "path"}, caption column} of several tars, one after the other.

    Args:
        tars: in order; each has gone through `check_tar`.
        caption: suffix of the member that the caption is in ("txt"), or a field of the row's .json.
    """

    def __init__(self, tars: Sequence[Path], caption: str) -> None:
        self._tars, self._caption = tars, caption

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.skip(0)

    def skip(self, first: int) -> Iterator[dict[str, Any]]:
        """Rows from one on; those before it are passed without being decoded.

        Raises:
            UserError: a row has no picture or no caption; names the tar and the row.
        """
        number = 0
        for path in self._tars:
            for key, members in self._groups(path):
                if number >= first:
                    yield self._row(path, key, members)
                number += 1

    def _groups(self, path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, {suffix: content}) of members that follow each other under one key, as WebDataset writes them."""
        key, members = "", dict[str, bytes]()
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    place = PurePosixPath(member.name)
                    if not member.isfile() or place.name.startswith(".") or "." not in place.name:
                        continue
                    stem, _, suffix = place.name.partition(".")
                    own = str(place.parent / stem)
                    if members and own != key:
                        yield key, members
                        members = {}
                    content = tar.extractfile(member)
                    key, members[suffix.lower()] = own, b"" if content is None else content.read()
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); download or write it again") from error
        if members:
            yield key, members

    def _row(self, path: Path, key: str, members: dict[str, bytes]) -> dict[str, Any]:
        pictures = [suffix for suffix in members if is_picture(f"x.{suffix}")]
        found = [
            suffix for suffix in pictures if "." not in suffix
        ] or pictures  # "seg.png" is of something beside "jpg"
        if len(found) != 1:
            many = f"{len(found)} pictures, of which only one can be meant," if found else "no picture"
            raise UserError(f"{path}: row {key} has {many} among its members ({', '.join(sorted(members))})")
        suffix = found[0]
        picture = {"bytes": members[suffix], "path": f"{key}.{suffix}"}
        return {"__key__": key, "image": picture, self._caption: self._text(path, key, members)}

    def _text(self, path: Path, key: str, members: dict[str, bytes]) -> Any:
        column = self._caption
        if column.lower() in members and column.lower() != "json":
            return members[column.lower()]
        if "json" in members:
            try:
                values = json.loads(members["json"])
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: the .json of row {key} is damaged ({error}); write the tar again") from None
            if isinstance(values, dict) and column in values:
                return values[column]
        raise UserError(
            f"{path}: row {key} has no caption --caption-column={column!r} among its members "
            f"({', '.join(sorted(members))})"
        )
