"""Folders, parquet files, hub sets (through `datasets`) and LMDBs of pictures as uint8 tensors of one size."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.data.pictures import decode_picture
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.formats.lmdb import IMAGENET, LmdbArrays

if TYPE_CHECKING:
    from fewstep.settings import DataSettings

_MEMORY_LIMIT_BYTES = 4 * 2**30  # sets that decode to less are held decoded
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class ImageDataset:
    """Pictures of one size with optional labels, addressed by row.

    Attributes:
        labels: (N,), int64, or None.
        class_names: names of the classes where the data set has them.
    """

    def __init__(
        self, rows: Any, image_column: str, labels: Tensor | None, class_names: list[str] | None,
        resolution: int, channels: int, fit: Literal["crop", "pad", "exact"],
    ) -> None:  # fmt: skip
        self._rows, self._column = rows, image_column
        self.labels, self.class_names = labels, class_names
        self.resolution, self.channels, self.fit = resolution, channels, fit
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
        self._decoded: Tensor | None = None
        if len(self) * channels * resolution**2 <= _MEMORY_LIMIT_BYTES:
            self._decoded = self._decode(range(len(self)))

    def __len__(self) -> int:
        return len(self._rows)

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

    def _decode(self, indices: Sequence[int]) -> Tensor:
        chunks = [indices[start : start + 512] for start in range(0, len(indices), 512)]
        parts = list(self._pool.map(self._decode_chunk, chunks))
        return torch.from_numpy(np.concatenate(parts))

    def _decode_chunk(self, indices: Sequence[int]) -> np.ndarray:
        rows = self._rows[list(indices)][self._column]
        names = [row.get("path") or f"row {index}" for row, index in zip(rows, indices, strict=True)]
        options = self.resolution, self.channels, self.fit
        return np.stack([decode_picture(row, name, *options) for row, name in zip(rows, names, strict=True)])


class LmdbImageDataset(ImageDataset):
    """The pictures of a published LMDB (METHOD.md section 6), which are of one size already."""

    def __init__(self, arrays: LmdbArrays, labels: Tensor | None) -> None:
        self._arrays = arrays
        count, channels, resolution, _ = arrays.shapes["images"]
        super().__init__(range(count), "images", labels, None, resolution, channels, "exact")
        if self.in_memory:
            arrays.close()

    def _decode_chunk(self, indices: Sequence[int]) -> np.ndarray:
        return self._arrays.rows("images", indices).numpy()


def load_images(settings: "DataSettings", *, resolution: int, channels: int, num_classes: int) -> ImageDataset:
    """Open a folder (imagefolder layout), a parquet file or folder of them, a folder with data.mdb, or a hub data set.

    Args:
        settings: where the pictures are and how they are fitted.
        resolution, channels: of the model, in pixels and 1 (grey) or 3.
        num_classes: of the model; labels are read only where it is above 0.

    Raises:
        UserError: nothing there, no pictures, no labels where the model needs them, labels outside the model's
            classes, a picture that does not decode or fit.
    """
    if settings.images and (Path(settings.images).expanduser() / "data.mdb").is_file():
        return _load_lmdb(settings, resolution, channels, num_classes)
    rows = _open_rows(settings)
    column = _image_column(rows, settings)
    labels, names = _labels(rows, settings, num_classes) if num_classes else (None, None)
    import datasets

    rows = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    return ImageDataset(rows, column, labels, names, resolution, channels, settings.fit)


def _load_lmdb(settings: "DataSettings", resolution: int, channels: int, num_classes: int) -> LmdbImageDataset:
    kinds = IMAGENET if num_classes else {"images": IMAGENET["images"]}
    arrays, where = LmdbArrays(Path(settings.images).expanduser(), kinds), f"data.images={settings.images}"
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
    _check_labels(labels.numpy(), where, num_classes)
    return LmdbImageDataset(arrays, labels)


def _open_rows(settings: "DataSettings") -> Any:
    import datasets

    if not settings.images:
        raise UserError("data.images is not set: name a folder of pictures, a parquet file or a hub data set")
    path = Path(settings.images).expanduser()
    datasets.disable_progress_bars()
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if path.is_dir():
            if any(path.glob("*.parquet")):
                return datasets.load_dataset("parquet", data_dir=str(path), split=settings.split)
            if not any(file.suffix.lower() in _SUFFIXES for file in path.rglob("*")):
                raise UserError(
                    f"data.images={settings.images}: no picture in this folder ({', '.join(sorted(_SUFFIXES))})"
                )
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=settings.split)
        if path.exists() or path.is_absolute() or settings.images.count("/") > 1 or settings.images.startswith("."):
            raise UserError(f"data.images={settings.images}: no such folder or parquet file")
        return datasets.load_dataset(settings.images, split=settings.split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; each becomes one sentence with its own words
        raise UserError(
            f"data.images={settings.images} (split {settings.split!r}) cannot be read: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _image_column(rows: Any, settings: "DataSettings") -> str:
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            return str(name)
    if "image" in rows.features:
        return "image"
    raise UserError(f"data.images={settings.images}: no column of pictures among {sorted(rows.features)}")


def _labels(rows: Any, settings: "DataSettings", num_classes: int) -> tuple[Tensor, list[str] | None]:
    column = settings.label_column
    where = f"data.images={settings.images}"
    if column not in rows.features:
        raise UserError(
            f"{where}: the model has {num_classes} classes but there is no column data.label_column={column!r} "
            f"among {sorted(rows.features)}; sort the pictures into one folder a class, or add a metadata.jsonl"
        )
    values = np.asarray(rows[column])
    if not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{where}: column {column!r} holds {values.dtype}, not integer class labels")
    values = values.reshape(len(values), -1)[:, 0]
    _check_labels(values, where, num_classes)
    names = getattr(rows.features[column], "names", None)
    return torch.from_numpy(values.astype(np.int64)), names


def _check_labels(values: np.ndarray, where: str, num_classes: int) -> None:
    if values.min() < 0 or values.max() >= num_classes:
        raise UserError(
            f"{where}: labels run from {values.min()} to {values.max()}, the model has {num_classes} classes "
            f"(0..{num_classes - 1})"
        )


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
        if self._ahead is not None and self._ahead[0] == step:
            pixels, labels = self._ahead[1].result()
        else:
            pixels, labels = self._read(step)
        if not self.dataset.in_memory:
            # a thread that runs tensor operations brings its own pool of compute threads, which would fight with the
            # training step's: worth it for decoding, not for indexing
            self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        images = pixels.to(device, non_blocking=True).float() / 127.5 - 1
        return images, labels.to(device, non_blocking=True)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        first = step * self.batch_size
        position = torch.arange(first, first + self.batch_size)
        rows = data_order(self.seed, position, len(self.dataset), self._permutations)
        pixels = self.dataset.pixels(rows)
        if self.flip:
            mirrored = Draws(self.seed, step, position).uniform("data_flip") < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        labels = torch.zeros_like(rows) if self.dataset.labels is None else self.dataset.labels[rows]
        return pixels, labels
