"""Pictures with captions in a fixed order: folders, WebDataset tars, and (through `datasets`) parquet files and hub sets."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.data.listing import Listing, is_picture, list_pictures_below, walk_files
from fewstep.data.prompts import check_column
from fewstep.data.tables import (
    be_quiet,
    image_column,
    load_parquet,
    note_of_split,
    of_split,
    on_hub,
    picture_tables,
    placed,
    refuse_other_files,
    shortened,
    split_files,
    split_note,
    table_root,
    unreadable,
)
from fewstep.data.tars import TarRows, check_tar
from fewstep.errors import UserError
from fewstep.formats.remote import data_path
from fewstep.progress import tell

_CHUNK = 64
_ENDS_BYTES = 2**16  # of a tar or table: rows are added at its end, and tables say there what they have


class CaptionedImage(NamedTuple):
    """One row of a source."""

    name: str  # for messages
    picture: dict[str, Any]  # "bytes" or "path", as `datasets.Image(decode=False)` gives it
    caption: str
    fault: UserError | None = None  # why it cannot be used, where that is known before it is decoded


class CaptionedImages:
    """Rows of a source from any place on.

    Attributes:
        source: as it was given.
        num_rows: None where only reading to the end tells.
        facts: what says that two sources are the same, wherever they lie: names of pictures; of other files names, sizes and ends.
    """

    def __init__(
        self, source: str, split: str, rows: Any, image_column: str, caption_column: str, num_rows: int | None,
        content: str = "", root: Path | None = None,
    ) -> None:  # fmt: skip
        self.source, self.num_rows = source, num_rows
        what = {"content": content} if content else {"source": source}
        self.facts = {**what, "split": split, "caption_column": caption_column, "num_rows": num_rows}
        self._rows, self._image, self._caption, self._root = rows, image_column, caption_column, root

    def rows(self, first: int) -> Iterator[CaptionedImage]:
        """Rows from `first` on, in the source's order.

        Raises:
            UserError: the source cannot be read further.
        """
        try:
            for number, row in enumerate(self._raw(first), start=first):
                picture = row.get(self._image) or {}
                name = row.get("__key__") or picture.get("path") or f"row {number}"
                place = "" if str(name).startswith(self.source) else f" of {self.source}"
                named = f"{shortened(str(name))} (row {number}{place})"
                try:
                    if fault := row.get("fault"):
                        raise fault
                    found = CaptionedImage(named, placed(picture, self._root), _text(row[self._caption], named))
                except UserError as error:
                    found = CaptionedImage(named, picture, "", error)
                yield found
        except UserError:
            raise
        except Exception as error:  # tarfile, pyarrow, the hub: each becomes one sentence with its own words
            raise unreadable(self.source, error) from error

    def digest_of(self, first: int, count: int) -> str:
        """Of the sizes and captions of some rows; empty for sources whose rows cannot be looked at without reading them."""
        return self._rows.digest_of(first, count) if isinstance(self._rows, FolderOfCaptions) else ""

    def _raw(self, first: int) -> Iterator[dict[str, Any]]:
        if self.num_rows is None:
            yield from self._rows.skip(first) if first else self._rows
            return
        for start in range(first, self.num_rows, _CHUNK):
            yield from self._rows.select(range(start, min(start + _CHUNK, self.num_rows)))


class FolderOfCaptions:
    """Pictures of a folder with the captions of its metadata, or of text files of the same name beside them.

    The second is kohya's layout: NAME.png and NAME.txt.
    """

    def __init__(self, listing: Listing, captions: Sequence[str | UserError | None]) -> None:
        self._listing, self._captions = listing, captions

    def __len__(self) -> int:
        return len(self._listing.names)

    def select(self, numbers: range) -> Iterator[dict[str, Any]]:
        """Rows by number."""
        for number in numbers:
            caption, fault = self._captions[number], {}
            if isinstance(caption, UserError):
                caption, fault = None, {"fault": caption}
            yield {"image": {"path": str(self._listing.paths[number]), "bytes": None}, "text": caption, **fault}

    def digest_of(self, first: int, count: int) -> str:
        """Of the pictures' sizes and the captions of some rows."""
        digest = hashlib.sha256()
        for number in range(first, min(first + count, len(self))):
            path, caption = self._listing.paths[number], self._captions[number] or ""
            caption = "\0" if isinstance(caption, UserError) else caption
            size = path.stat().st_size if path.exists() else -1
            digest.update(f"{size}\0{caption}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    def skip(self, first: int) -> Iterator[dict[str, Any]]:
        """Rows from one on."""
        return self.select(range(first, len(self)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.skip(0)


def open_captioned_images(
    source: str, *, split: str = "train", caption_column: str = "", streaming: bool = False
) -> CaptionedImages:
    """Open pictures with captions.

    Args:
        source: a folder of pictures with a metadata.jsonl (file_name, text) or with text files beside them, a parquet
            file or folder of them, a WebDataset .tar or folder of them, or a hub data set.
        caption_column: where the captions are; "" is "txt" for tars and "text" for all others.
        streaming: read a hub set while it is downloaded, keeping nothing on disk. Local tars are always read so.

    Raises:
        UserError: nothing there, no such split, no pictures, no captions, a tar that is cut short.
    """
    path = data_path(source)
    tars = [path] if path.suffix.lower() == ".tar" else []
    if path.is_dir():
        files = list(walk_files(path))
        tars = sorted(path / name for name in files if name.lower().endswith(".tar"))
        pictures = [name for name in files if is_picture(name)]
        if tars and pictures:
            raise UserError(
                f"{source} has pictures ({pictures[0]}, ...) and tars ({tars[0].name}, ...), and only one of them can be the "
                "set; name the file or folder that is"
            )
    if tars:
        if path.is_dir():
            found, tars = tars, of_split(tars, path, split, source)
            if note := note_of_split(found, path, split):
                tell(f"{source}: {len(tars):,} tar{'s' * (len(tars) != 1)}{note}")
        for tar in tars:
            check_tar(tar)
        column = caption_column or "txt"
        return CaptionedImages(source, split, TarRows(tars, column), "image", column, None, _content(path, tars))
    if path.is_dir() and not picture_tables(path, source):
        return _open_folder(source, path, split, caption_column, streaming)
    return _open_table(source, path, split, caption_column, streaming)


def _open_folder(source: str, path: Path, split: str, caption_column: str, streaming: bool) -> CaptionedImages:
    listing = list_pictures_below(path, split, source)
    column = caption_column or "text"
    if column in listing.columns:
        missing = {name for name in listing.names if name not in listing.metadata}
        listing = listing.without(missing, "without a row in the metadata")
        captions = [listing.metadata[name].get(column) for name in listing.names]
    else:
        beside = captions_beside(listing)
        without = set(listing.names) - beside.keys()
        if caption_column or len(without) == len(listing.names):
            hint = " (captions of a folder belong into its metadata.jsonl, or into NAME.txt beside NAME.png)"
            check_column([*listing.columns, "image"], column, f"{source}{hint}", "--caption-column")
        texts = {beside[name].relative_to(listing.root).as_posix() for name in beside}
        listing = listing.without(without, "without a text file beside it").beside(texts)
        captions = [_read_caption(beside[name]) for name in listing.names]
    tell(f"{source}: {listing.sentence()}")
    rows, names = FolderOfCaptions(listing, captions), "\0".join(listing.names).encode("utf-8", "surrogateescape")
    content = f"{len(rows):,} pictures, {hashlib.sha256(names).hexdigest()[:32]}"  # what is in them: `digest_of`
    return CaptionedImages(source, split, rows, "image", "text", None if streaming else len(rows), content)


def captions_beside(listing: Listing) -> dict[str, Path]:
    """{picture: the text file of the same name beside it}, for the pictures that have one."""
    texts = {name.rpartition(".")[0]: name for name in walk_files(listing.root) if name.lower().endswith(".txt")}
    stems = {name: name.rpartition(".")[0] for name in listing.names}
    return {name: listing.root / texts[stem] for name, stem in stems.items() if stem in texts}


def _read_caption(path: Path) -> str | UserError:
    """The text of a file, or why it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        return UserError(f"caption {path} cannot be read as UTF-8 text ({error}); save it again")


def _open_table(source: str, path: Path, split: str, caption_column: str, streaming: bool) -> CaptionedImages:
    import datasets

    be_quiet()
    try:
        rows = _load_table(source, path, split, streaming)
        if rows.features is None:
            rows = rows._resolve_features()
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds
        raise unreadable(f"{source}{on_hub(path)}", error) from error
    pictures = image_column(rows.features, source)
    column = caption_column or "text"
    check_column(list(rows.features), column, source, "--caption-column")
    try:
        rows = rows.cast_column(pictures, datasets.Image(decode=False))
    except Exception as error:  # as above
        raise unreadable(f"column {pictures!r} of {source}", error) from error
    if not streaming:
        tell(f"{source}: {len(rows):,} picture{'s' * (len(rows) != 1)}{split_note(path, split, source)}")
    files = [path] if path.is_file() else split_files(path, split, source) if path.is_dir() else []
    number = None if streaming else len(rows)
    return CaptionedImages(source, split, rows, pictures, column, number, _content(path, files), table_root(source))


def _content(path: Path, files: list[Path]) -> str:
    """How many files, and a digest of their names below `path`, sizes, beginnings and ends; empty for a set of the hub."""
    digest = hashlib.sha256()
    for place in files:
        size = place.stat().st_size
        name = "" if place == path else place.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        with place.open("rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            digest.update(file.read(_ENDS_BYTES))
    return f"{len(files):,} files, {digest.hexdigest()[:32]}" if files else ""


def _load_table(source: str, path: Path, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    if path.is_file() and path.suffix.lower() == ".parquet":
        return load_parquet([path], streaming=streaming)
    if path.is_dir():
        return load_parquet(split_files(path, split, source), streaming=streaming)
    refuse_other_files(source, source, "folder, parquet file or tar")
    return load_dataset(source, split=split, streaming=streaming)


def _text(caption: Any, where: str) -> str:
    """A caption as text; one that is missing or of spaces alone is empty, which the caller refuses or skips."""
    if isinstance(caption, bytes):
        try:
            return caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: the caption is not UTF-8 text ({error}); mend it") from None
    if caption is not None and not isinstance(caption, str):
        raise UserError(
            f"{where}: the caption is {type(caption).__name__}, not text; mend it, or name another column with --caption-column"
        )
    found: str = (caption or "") if caption is None or caption.strip() else ""
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: the caption holds half a character ({found[:60]!r}); mend it") from None
    return found
