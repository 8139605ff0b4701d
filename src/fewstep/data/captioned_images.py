"""Pictures with captions in a fixed order: folders, parquet files, WebDataset tars and hub sets, through `datasets`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.data.prompts import check_column
from fewstep.errors import UserError

_BLOCK = 512  # bytes of a tar's header, and what its members are padded to
_CHUNK = 64


class CaptionedImage(NamedTuple):
    """One row of a source."""

    name: str  # for messages
    picture: dict[str, Any]  # "bytes" or "path", as `datasets.Image(decode=False)` gives it
    caption: str


class CaptionedImages:
    """Rows of a source from any place on.

    Attributes:
        source: as it was given.
        num_rows: None where only reading to the end tells.
        facts: what says that two sources are the same.
    """

    def __init__(
        self, source: str, split: str, rows: Any, image_column: str, caption_column: str, num_rows: int | None
    ) -> None:
        self.source, self.num_rows = source, num_rows
        self.facts = {"source": source, "split": split, "caption_column": caption_column, "num_rows": num_rows}
        self._rows, self._image, self._caption = rows, image_column, caption_column

    def rows(self, first: int) -> Iterator[CaptionedImage]:
        """Rows from `first` on, in the source's order.

        Raises:
            UserError: the source cannot be read further.
        """
        try:
            for number, row in enumerate(self._raw(first), start=first):
                picture = row[self._image] or {}
                name = row.get("__key__") or picture.get("path") or f"row {number}"
                yield CaptionedImage(f"{name} (row {number})", picture, _text(row[self._caption]))
        except UserError:
            raise
        except Exception as error:  # tarfile, pyarrow, the hub: each becomes one sentence with its own words
            raise _unreadable(self.source, error) from error

    def _raw(self, first: int) -> Iterator[dict[str, Any]]:
        if self.num_rows is None:
            yield from self._rows.skip(first) if first else self._rows
            return
        for start in range(first, self.num_rows, _CHUNK):
            yield from self._rows.select(range(start, min(start + _CHUNK, self.num_rows)))


def open_captioned_images(
    source: str, *, split: str = "train", caption_column: str = "", streaming: bool = False
) -> CaptionedImages:
    """Open pictures with captions.

    Args:
        source: a folder of pictures with a metadata.jsonl (file_name, text), a parquet file or folder of them, a
            WebDataset .tar or folder of them, or a hub data set.
        caption_column: where the captions are; "" is "txt" for tars and "text" for all others.
        streaming: read a hub set while it is downloaded, keeping nothing on disk. Local tars are always read so.

    Raises:
        UserError: nothing there, no pictures, no captions, a tar that is cut short.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" else []
    for tar in tars:
        check_tar(tar)
    try:
        rows = _open(source, path, tars, split, streaming)
        if rows.features is None:
            rows = rows._resolve_features()
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds
        raise _unreadable(source, error) from error
    image_column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image_column is None:
        raise UserError(f"{source}: no column of pictures among {sorted(rows.features)}")
    column = caption_column or ("txt" if tars else "text")
    hint = "" if tars or not path.is_dir() else " (captions of a folder belong into its metadata.jsonl)"
    check_column(list(rows.features), column, f"{source}{hint}", "--caption-column")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    num_rows = None if tars or streaming else len(rows)
    return CaptionedImages(source, split, rows, image_column, column, num_rows)


def check_tar(path: Path) -> None:
    """Walk the headers of a tar up to its end mark, which readers that stop at the end of the file do not miss.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    remedy = "download or write it again"
    try:
        with path.open("rb") as file:
            size, place = path.stat().st_size, 0
            while place + _BLOCK <= size:
                file.seek(place)
                header = file.read(_BLOCK)
                if header == bytes(_BLOCK):
                    return
                field = header[124:136]
                large = field[0] & 0x80  # the way of members above 8 GiB
                content = int.from_bytes(field[1:], "big") if large else int(field.split(b"\0")[0].strip() or b"0", 8)
                place += _BLOCK + -(-content // _BLOCK) * _BLOCK
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    except ValueError:
        raise UserError(f"{path} is no tar file, or damaged at byte {place}; {remedy}") from None
    raise UserError(f"{path} is cut short: it ends at byte {size} without the end mark of a tar; {remedy}")


def _open(source: str, path: Path, tars: list[Path], split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    if tars:
        files = {split: [str(tar) for tar in tars]}
        return load_dataset("webdataset", data_files=files, split=split, streaming=True)
    if path.is_file() and path.suffix == ".parquet":
        return load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=streaming)
    if path.is_dir():
        kind = "parquet" if any(path.glob("*.parquet")) and not (path / "metadata.parquet").exists() else "imagefolder"
        return load_dataset(kind, data_dir=str(path), split=split, streaming=streaming)
    if path.exists() or path.is_absolute() or source.count("/") > 1 or source.startswith("."):
        raise UserError(f"{source}: no such folder, parquet file or tar")
    return load_dataset(source, split=split, streaming=streaming)


def _text(caption: Any) -> str:
    """A caption as text; a missing one is empty, which the caller refuses or skips."""
    if isinstance(caption, bytes):
        return caption.decode("utf-8", errors="replace")
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"captions are {type(caption).__name__}, not text; name another column with --caption-column")
    return caption or ""


def _unreadable(source: str, error: Exception) -> UserError:
    words = str(error).splitlines()[0] if str(error) else ""
    return UserError(f"{source} cannot be read: {type(error).__name__}: {words}")
