"""Folders, parquet files, hub sets (through `datasets`) and LMDBs of pictures as uint8 tensors of one size."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.data.listing import Listing, list_pictures_below
from fewstep.data.pictures import FirstAnimation, check_colour, decode_picture
from fewstep.data.tables import (
    FolderRows,
    PictureRows,
    Report,
    TableRows,
    check_labels,
    image_column,
    listed_labels,
    open_table,
    picture_tables,
    split_note,
    table_labels,
)
from fewstep.data.waiting import WAITING
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.formats.lmdb import IMAGENET, LmdbArrays
from fewstep.formats.remote import data_path
from fewstep.parallel import local_batch
from fewstep.progress import Stderr, busy, tell, working

if TYPE_CHECKING:
    from fewstep.settings import DataSettings

_NAMED = 5  # of pictures that cannot be used
_MEMORY_LIMIT_BYTES = 4 * 2**30  # sets that decode to less are held decoded


class ImageDataset:
    """Pictures of one size with optional labels, addressed by row.

    Attributes:
        labels: (N,), int64, or None.
        class_names: names of the classes where the data set has them.
    """

    def __init__(
        self, rows: PictureRows | None, labels: Tensor | None, class_names: list[str] | None, resolution: int, channels: int,
        fit: Literal["crop", "pad", "exact"], background: str = "white", *, report: Report = tell, length: int = 0,
    ) -> None:  # fmt: skip
        self._rows, self._length = rows, length if rows is None else len(rows)
        self.labels, self.class_names = labels, class_names
        self.resolution, self.channels, self.fit, self.background = resolution, channels, fit, background
        self._animation = FirstAnimation(report)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
        self._decoded: Tensor | None = None
        if len(self) * channels * resolution**2 <= _MEMORY_LIMIT_BYTES:
            self._decoded = self._decode_all()

    def __len__(self) -> int:
        return self._length

    def label_as(self, names: Sequence[str], whose: str) -> None:
        """Number the classes as these names do, where the data set names its own.

        Args:
            whose: names they are, for messages.

        Raises:
            UserError: one of its classes is not among them.
        """
        if self.labels is None or not self.class_names or not names:
            return
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := [name for name in self.class_names if name not in numbers]:
            known = ", ".join([*names[:4], "..."] if len(names) > 4 else names)
            raise UserError(f"class {unknown[0]!r} of the pictures is none of {whose} ({known})")
        self.labels = torch.tensor([numbers[name] for name in self.class_names])[self.labels]
        self.class_names = list(names)

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are held decoded."""
        return self._decoded is not None

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures at these rows, (B, C, H, W), uint8.

        Raises:
            UserError: a picture does not decode or has a wrong size; the message names it.
        """
        if self._decoded is not None:
            return self._decoded[indices]
        return self._decode(indices.tolist())

    def _decode_all(self) -> Tensor:
        """Every picture, with progress on standard error."""
        parts, done = [], 0
        with working(Stderr(), f"Decoding {len(self):,} pictures") as report:
            try:
                for part in self._pool.map(self._decode_chunk, _chunks(range(len(self)), 64)):
                    parts.append(part)
                    done += len(part)
                    report(done, len(self))
            except UserError as error:
                raise self.counted(error) from None
        return torch.from_numpy(np.concatenate(parts))

    def counted(self, first: UserError) -> UserError:
        """What is to be said of a picture that does not decode or fit: where it is not the only one, how many, and the first few."""
        with working(Stderr(), f"Counting what cannot be read of {len(self):,} pictures") as report:
            broken = []
            for number, name in enumerate(self._pool.map(self._unreadable, range(len(self)))):
                report(number + 1, len(self))
                broken += [name] * bool(name)
        if len(broken) < 2:
            return first
        more = f" and {len(broken) - _NAMED:,} more" * (len(broken) > _NAMED)
        return UserError(
            f"{first}; {len(broken):,} of {len(self):,} pictures cannot be used: {', '.join(broken[:_NAMED])}{more}"
        )

    def _unreadable(self, index: int) -> str:
        """The name of a picture that does not decode or fit; "" for one that does."""
        try:
            self._decode_chunk([index])
        except UserError:
            return f"row {index}" if self._rows is None else self._rows.name(index, self._rows.encoded([index])[0])
        return ""

    def _decode(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(self._pool.map(self._decode_chunk, _chunks(indices, 512)))))

    def _decode_chunk(self, indices: Sequence[int]) -> np.ndarray:
        assert self._rows is not None
        options = self.resolution, self.channels, self.fit, self.background, self._animation
        rows = self._rows.encoded(indices)
        names = [self._rows.name(index, row) for row, index in zip(rows, indices, strict=True)]
        return np.stack([decode_picture(row, name, *options) for row, name in zip(rows, names, strict=True)])


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class LmdbImageDataset(ImageDataset):
    """The pictures of a published LMDB (METHOD.md section 6), which are of one size already."""

    def __init__(self, arrays: LmdbArrays, labels: Tensor | None) -> None:
        self._arrays = arrays
        count, channels, resolution, _ = arrays.shapes["images"]
        super().__init__(None, labels, None, resolution, channels, "exact", length=count)
        if self.in_memory:
            arrays.close()

    def _decode_chunk(self, indices: Sequence[int]) -> np.ndarray:
        return self._arrays.rows("images", indices).numpy()


def load_images(
    settings: "DataSettings", *, resolution: int, channels: int, num_classes: int, report: Report = tell
) -> ImageDataset:
    """Open a folder of pictures, a parquet file or folder of them, a folder with data.mdb, or a hub data set.

    Every picture below a folder is taken, and what was taken and left out is reported (data/listing.py).

    Args:
        settings: where the pictures are and how they are fitted.
        resolution, channels: of the model, in pixels and 1 (grey) or 3.
        num_classes: of the model; labels are read only where it is above 0.
        report: called with a line for people.

    Raises:
        UserError: nothing there, no pictures, no labels where the model needs them, labels outside the model's
            classes, a picture that does not decode or fit.
    """
    check_colour(settings.background, "data.background")
    if settings.images and (data_path(settings.images) / "data.mdb").is_file():
        return _load_lmdb(settings, resolution, channels, num_classes)
    size = (resolution, channels, settings.fit, settings.background)
    path = data_path(settings.images)
    if settings.images and path.is_dir() and not picture_tables(path, f"data.images={settings.images}"):
        where = f"data.images={settings.images}"
        with busy(Stderr(), f"Listing the pictures of {settings.images}"):
            listing = list_pictures_below(path, settings.split, where)
            listing, labels, names = _folder_labels(listing, settings, num_classes)
        report(f"{settings.images}: {listing.sentence()}")
        return ImageDataset(FolderRows(listing.paths), labels, names, *size, report=report)
    with busy(Stderr(), f"Opening {settings.images or 'data.images'}"):
        table = open_table(settings)
    column = image_column(table.features, f"data.images={settings.images}")
    labels, names = table_labels(table, settings, num_classes) if num_classes else (None, None)
    rows = TableRows(table, column, settings.images)
    note = split_note(path, settings.split, settings.images)
    report(f"{settings.images}: {len(table):,} picture{'s' * (len(table) != 1)}{note}")
    return ImageDataset(rows, labels, names, *size, report=report)


def _folder_labels(
    listing: Listing, settings: "DataSettings", num_classes: int
) -> tuple[Listing, Tensor | None, list[str] | None]:
    """The pictures that have a label, their labels and the names of the classes; all of them without classes."""
    if not num_classes:
        return listing, None, None
    column, where = settings.label_column, f"data.images={settings.images}"
    if column in listing.columns:
        listing = listing.without(
            {name for name in listing.names if name not in listing.metadata}, "without a row in the metadata"
        )
        labels = listed_labels(listing, column, where)
        check_labels(labels, where, num_classes)
        return listing, torch.from_numpy(labels), None
    names = listing.class_names
    if not names:
        raise UserError(
            f"{where}: the model has {num_classes} classes but there is no column data.column={column!r} "
            f"among {sorted([*listing.columns, 'image'])}; sort the pictures into one folder a class, or add a metadata.jsonl"
        )
    loose = {name for name, top in zip(listing.names, listing.folders, strict=True) if not top}
    listing = listing.without(loose, "in no class folder")
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.asarray([numbers[top] for top in listing.folders], np.int64)
    check_labels(labels, where, num_classes)
    return listing, torch.from_numpy(labels), names


def _load_lmdb(settings: "DataSettings", resolution: int, channels: int, num_classes: int) -> LmdbImageDataset:
    kinds = IMAGENET if num_classes else {"images": IMAGENET["images"]}
    arrays, where = LmdbArrays(data_path(settings.images), kinds), f"data.images={settings.images}"
    shape = arrays.shapes["images"]
    if shape[1:] != (channels, resolution, resolution) or not shape[0]:
        raise UserError(
            f"{where} holds pictures of shape {shape}, the model makes {(channels, resolution, resolution)}: pictures of an "
            "LMDB are taken as they are; give the set of this size"
        )
    if not num_classes:
        return LmdbImageDataset(arrays, None)
    if arrays.shapes["labels"] not in ((shape[0], 1), (shape[0],)):
        raise UserError(f"{where}: labels of shape {arrays.shapes['labels']} do not belong to {shape[0]} pictures")
    labels = arrays.rows("labels", range(shape[0])).flatten()
    check_labels(labels.numpy(), where, num_classes)
    return LmdbImageDataset(arrays, labels)


def data_order(seed: int, position: Tensor, length: int, cache: dict[int, Tensor] | None = None) -> Tensor:
    """Rows (B,) at global sample positions (B,): a fresh permutation each pass, the same on every process.

    `cache` keeps the permutation of the last passes between calls.
    """
    cache = {} if cache is None else cache
    rows = torch.empty_like(position)
    epochs = torch.div(position, length, rounding_mode="floor")
    for epoch in epochs.unique().tolist():
        order = cache.get(epoch)
        if order is None:
            words = Draws(seed, int(epoch), torch.zeros(1, dtype=torch.int64)).integers("data_order", 0, 2**31)
            order = torch.randperm(length, generator=torch.Generator().manual_seed(int(words)))
            cache.pop(epoch - 2, None)
            cache[epoch] = order
        chosen = epochs == epoch
        rows[chosen] = order[position[chosen] % length]
    return rows


class ImageBatches:
    """Training batches of real pictures by step; where they must be decoded, the next step's are in the background."""

    def __init__(self, dataset: ImageDataset, seed: int, batch_size: int, flip: bool) -> None:
        self.dataset, self.seed, self.batch_size, self.flip = dataset, seed, batch_size, flip
        self._permutations: dict[int, Tensor] = {}
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")

    def at(self, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), float32 in [-1, 1], and labels (B,), int64 (zeros without labels), of one step."""
        pixels, labels = self._next(step)
        if not self.dataset.in_memory:
            # a thread that runs tensor operations brings its own pool of compute threads, which would fight with the
            # training step's: worth it for decoding, not for indexing
            self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        images = pixels.to(device, non_blocking=True).float() / 127.5 - 1
        return images, labels.to(device, non_blocking=True)

    @WAITING.around
    def _next(self, step: int) -> tuple[Tensor, Tensor]:
        """What was read ahead, or is read now."""
        return self._ahead[1].result() if self._ahead is not None and self._ahead[0] == step else self._read(step)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        first, size = local_batch(self.batch_size)
        position = step * self.batch_size + torch.arange(first, first + size)
        rows = data_order(self.seed, position, len(self.dataset), self._permutations)
        pixels = self.dataset.pixels(rows)
        if self.flip:
            mirrored = Draws(self.seed, step, position).uniform("data_flip") < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        labels = torch.zeros_like(rows) if self.dataset.labels is None else self.dataset.labels[rows]
        return pixels, labels
