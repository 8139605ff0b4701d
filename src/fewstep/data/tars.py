"""WebDataset tars, read member by member: files of one key are one row, whatever kind of picture each row has."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
                    if _only_zeros(file):
                        return
                    raise UserError(
                        f"{path} has members behind the end mark at byte {place}, as tars that were joined by cat have, and they "
                        "would not be read: name the tars themselves, or join them with tar --concatenate"
                    )
                content = _content_bytes(header)
                if content < 0 or not _is_intact(header):
                    raise ValueError("a member of negative size, or another header than was written")
                place += _BLOCK + -(-content // _BLOCK) * _BLOCK
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    except ValueError:
        raise UserError(f"{path} is no tar file, or damaged at byte {place}; {remedy}") from None
    raise UserError(f"{path} is cut short: it ends at byte {size} without the end mark of a tar; {remedy}")


def _only_zeros(file: IO[bytes]) -> bool:
    """Whether nothing else follows up to the end of the file; tars are padded."""
    while chunk := file.read(2**20):
        if chunk.count(0) != len(chunk):
            return False
    return True


def _content_bytes(header: bytes) -> int:
    """The size field of a header."""
    field = header[124:136]
    if field[0] & 0x80:  # the way of members above 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _is_intact(header: bytes) -> bool:
    """Whether a header has the sum that it states, of its bytes with spaces in place of the sum; some tars count them as signed."""
    plain = header[:148] + b" " * 8 + header[156:]
    stated = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    return stated in (sum(plain), sum(plain) - 256 * sum(byte > 127 for byte in plain))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a member holds, or the one that it is a link to.

    Raises:
        ValueError: a link to nothing in this tar.
    """
    try:
        opened = tar.extractfile(member)
        if opened is not None:
            return opened.read()
    except (KeyError, RecursionError):
        pass
    raise ValueError(f"its member {member.name} is a link to {member.linkname}, which is no file of this tar")


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

        A row that cannot be used (no picture, no caption, one that is not UTF-8, a member twice) has "fault", which names the tar
        and the row, in place of the rest.

        Raises:
            UserError: the tar cannot be read further.
        """
        number = 0
        for path in self._tars:
            for key, members in self._groups(path):
                if number >= first:
                    try:
                        yield self._row(path, key, members)
                    except UserError as error:
                        yield {"__key__": key, "fault": error}
                number += 1

    def _groups(self, path: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        """(key, [(suffix, content)]) of members that follow each other under one key, as WebDataset writes them.

        A link is the file of the same tar that it leads to.
        """
        key, members = "", list[tuple[str, bytes]]()
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    place = PurePosixPath(member.name)
                    is_link = member.islnk() or member.issym()
                    if not (member.isfile() or is_link) or place.name.startswith(".") or "." not in place.name:
                        continue
                    stem, _, suffix = place.name.partition(".")
                    own = str(place.parent / stem)
                    if members and own != key:
                        yield key, members
                        members = []
                    key = own
                    members.append((suffix.lower(), _content(tar, member)))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); download or write it again") from error
        if members:
            yield key, members

    def _row(self, path: Path, key: str, parts: list[tuple[str, bytes]]) -> dict[str, Any]:
        members = dict(parts)
        if len(members) < len(parts):
            names = [suffix for suffix, _ in parts]
            twice = next(suffix for suffix in names if names.count(suffix) > 1)
            raise UserError(
                f"{path}: row {key} has {twice} more than once among its members, and only one can be meant; give each row a key of "
                "its own"
            )
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
            try:
                return members[column.lower()].decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: the .{column} of row {key} is not UTF-8 text ({error}); write the tar again"
                ) from None
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
