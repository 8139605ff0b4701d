"""Latents of captioned pictures with their captions' embeddings: shard by shard, so that an interrupted job continues."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.data.captioned_images import CaptionedImage, CaptionedImages
from fewstep.data.latents import LATENTS, read_texts
from fewstep.data.pictures import FirstAnimation, Fit, decode_picture
from fewstep.data.shard_folder import write_manifest, write_tensors
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.formats.fingerprints import text_fingerprint
from fewstep.formats.lmdb import LATENTS as LMDB_LATENTS
from fewstep.formats.lmdb import LmdbArrays
from fewstep.networks.autoencoder import Autoencoder
from fewstep.networks.text_encoders import TextEncoders
from fewstep.parallel import rank, world_size
from fewstep.preparation.embeddings import PromptTable, announce_size, check_prompt
from fewstep.preparation.shards import begun
from fewstep.progress import Report
from fewstep.shared_work import by_all, by_the_first

Captions = Literal["embeddings", "text"]
CUT_WITH = "--truncate-prompts"
_UNSCALED_STD = 3.0  # a model's own scaling gives about 1; unscaled latents of Stable Diffusion have 5, of SDXL 7


class _Part(NamedTuple):
    """A shard's worth of rows: latents (n, C, h, w), n captions, and the rows of the source they took."""

    latents: Tensor
    captions: list[str]
    source_rows: int
    spread: Tensor | None = None  # standard deviations of the latents, likewise, where training draws from them
    digest: str = ""  # of the rows' pictures and captions, where their source has one


def prepare_latents(
    autoencoder: Autoencoder, encoders: TextEncoders, source: CaptionedImages, folder: Path, *, resolution: int,
    vae_fingerprint: str, fit: Fit = "crop", background: str = "white", noise_seed: int | None = None,
    keep_spread: bool = False, num_images: int | None = None, skip_bad: bool = False, truncate: bool = False, shard_size: int = 512,
    batch_size: int = 8, captions: Captions = "embeddings", report: Report = lambda done, total: None,
) -> Path:  # fmt: skip
    """Store latents and caption embeddings as float16, each distinct caption's once. A missing caption is the empty prompt.

    Of several processes each makes its own shards; the files are the same for any number of them.

    Args:
        source: pictures with captions (data/captioned_images.py).
        folder: new, or one that an interrupted call with the same arguments left unfinished.
        resolution: side of the pictures in pixels, a multiple of the VAE's factor.
        vae_fingerprint: of the autoencoder's folder (formats/fingerprints.py).
        background: the colour under transparent pixels.
        noise_seed: None stores the mean of the VAE's distribution; a number a sample of it, drawn with this seed.
        keep_spread: store the deviations too; training then draws a new sample each time it reads a picture.
        num_images: rows of the source to take, from its beginning; None takes all.
        skip_bad: leave out pictures that do not decode or fit, and too long captions; otherwise they end the job with their
            name.
        truncate: cut captions at the encoders' length, as the model's own pipeline does.
        shard_size: rows of the source a file.
        captions: "text" stores no embeddings: training then encodes captions when it needs them.
        report: called after each batch with (finished rows of the source, all of them or None where that is not known).

    Raises:
        UserError: a picture or caption cannot be used, the source cannot be read, the folder holds other latents, the
            resolution does not fit, the disk is full.
    """
    if resolution % autoencoder.factor:
        raise UserError(f"--resolution {resolution} is no multiple of the VAE's factor {autoencoder.factor}")
    job = {
        "images": source.facts, "num_images": num_images, "resolution": resolution, "fit": fit,
        "noise_seed": noise_seed, "skip_bad": skip_bad, "vae": vae_fingerprint,
        **({"background": background} if background != "white" else {}), **({"spread": True} if keep_spread else {}),
        **_text_job(encoders, truncate, shard_size, captions),
    }  # fmt: skip
    known = [number for number in (num_images, source.num_rows) if number is not None]
    total = min(known) if known else None
    reader = _Reader(
        autoencoder, encoders, source, resolution, fit, background, noise_seed, keep_spread, skip_bad, truncate, batch_size,
        lambda taken: report(taken if total is None else min(taken, total), total),
    )  # fmt: skip
    table = PromptTable(encoders, batch_size)

    def latent_bytes() -> int:
        return 2 * (1 + keep_spread) * autoencoder.latent_channels * (resolution // autoencoder.factor) ** 2

    return _write_parts(
        folder, job, table, reader.read_part, total, shard_size, report, latent_bytes=latent_bytes, source=source.source,
        digest_of=source.digest_of,
    )  # fmt: skip


@dataclass
class _Reader:
    """Reads a source once from some row on and encodes its pictures; arguments as of `prepare_latents`."""

    autoencoder: Autoencoder
    encoders: TextEncoders
    source: CaptionedImages
    resolution: int
    fit: Literal["crop", "pad", "exact"]
    background: str
    noise_seed: int | None
    keep_spread: bool
    skip_bad: bool
    truncate: bool
    batch_size: int
    report: Callable[[int], None]

    def __post_init__(self) -> None:
        self._rows: Iterator[CaptionedImage] | None = None
        self._next = 0  # the row that is read next
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
        self._animation = FirstAnimation()

    def read_part(self, first: int, size: int) -> _Part:
        """Rows first..first + size - 1 of the source, fewer at its end; parts are read in order, with gaps."""
        rows = self._rows_from(first)
        side = self.resolution // self.autoencoder.factor
        nothing = torch.empty(0, self.autoencoder.latent_channels, side, side)
        latents, spreads = [nothing], [nothing]
        captions: list[str] = []
        taken = 0
        while taken < size and (batch := list(islice(rows, min(self.batch_size, size - taken)))):
            decoded = self._pool.map(self._decode, batch)
            found = [self._usable(row, picture) for row, picture in zip(batch, decoded, strict=True)]
            kept = [number for number, picture in enumerate(found) if picture is not None]
            if kept:
                pixels = np.stack([picture for picture in found if picture is not None])
                found_latents, spread = self._encode(pixels, [first + taken + number for number in kept])
                latents.append(found_latents)
                spreads.append(spread)
            captions += [batch[number].caption if batch[number].caption.strip() else "" for number in kept]
            taken += len(batch)
            self._next += len(batch)
            self.report(first + taken * world_size())  # others make as many
        kept_spread = torch.cat(spreads) if self.keep_spread else None
        return _Part(torch.cat(latents), captions, taken, kept_spread, self.source.digest_of(first, taken))

    def _rows_from(self, first: int) -> Iterator[CaptionedImage]:
        """The source from a row on; what lies between is passed, where only reading to it leads there."""
        if self._rows is None or (first != self._next and self.source.num_rows is not None):
            self._rows = self.source.rows(first)
        else:
            next(islice(self._rows, first - self._next, first - self._next), None)
        self._next = first
        return self._rows

    def _decode(self, row: CaptionedImage) -> np.ndarray | UserError:
        if row.fault is not None:
            return row.fault
        try:
            return decode_picture(row.picture, row.name, self.resolution, 3, self.fit, self.background, self._animation)
        except UserError as error:
            return error

    def _usable(self, row: CaptionedImage, picture: np.ndarray | UserError) -> np.ndarray | None:
        try:
            if row.fault is not None:
                raise row.fault
            place = f"{self.source.source}: the caption of {row.name}"
            check_prompt(self.encoders, row.caption, place, self.truncate, CUT_WITH)
            if isinstance(picture, UserError):
                raise picture
        except UserError:
            if not self.skip_bad:
                raise
            return None
        return picture

    def _encode(self, pixels: np.ndarray, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Latents to store, and the deviations of their distribution."""
        device = self.autoencoder.device
        images = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
        if self.noise_seed is None:
            mean, spread = self.autoencoder.distribution(images)
            return mean.cpu(), spread.cpu()
        draws = Draws(self.noise_seed, 0, torch.tensor(positions, dtype=torch.int64, device=device))
        latents = self.autoencoder.encode(images, draws).cpu()
        return latents, torch.zeros_like(latents)


def import_lmdb_latents(
    encoders: TextEncoders, path: Path, folder: Path, *, channels: int, vae_fingerprint: str, scale: float | None = None,
    truncate: bool = False, shard_size: int = 512, batch_size: int = 32, captions: Captions = "embeddings",
    report: Report = lambda done, total: None,
) -> Path:  # fmt: skip
    """Store the latents of a published LMDB (METHOD.md section 6) with the embeddings of its prompts.

    The LMDB does not say which VAE made its latents: `vae_fingerprint` is taken at your word.

    Args:
        channels: of the latents that the model's network makes.
        scale: the latents are multiplied by it; None takes them as they are, and refuses latents that look unscaled.

    Raises:
        UserError: the LMDB is damaged, its latents are unscaled or another model's, a prompt is too long; and as `prepare_latents`.
    """
    with LmdbArrays(path, LMDB_LATENTS) as arrays:
        shape, num_prompts = arrays.shapes["latents"], arrays.shapes["prompts"][0]
        if len(shape) != 4 or shape[0] != num_prompts or not num_prompts:
            raise UserError(f"{path}: latents of shape {shape} and {num_prompts} prompts do not belong together")
        check_channels(path, shape, channels)
        if scale is None:
            check_scale(path, arrays.rows("latents", range(min(64, shape[0]))))
        job = {"lmdb": str(path), "lmdb_content": arrays.fingerprint(), "lmdb_shape": list(shape), "scale": scale,
               "vae": vae_fingerprint, **_text_job(encoders, truncate, shard_size, captions)}  # fmt: skip

        def read_part(first: int, size: int) -> _Part:
            numbers = range(first, min(first + size, num_prompts))
            prompts = arrays.texts("prompts", numbers)
            for number, prompt in zip(numbers, prompts, strict=True):
                check_prompt(encoders, prompt, f"{path}: prompts_{number}_data", truncate, CUT_WITH)
            latents = arrays.rows("latents", numbers).float() * (1.0 if scale is None else scale)
            return _Part(latents, prompts, len(numbers))

        table = PromptTable(encoders, batch_size)
        return _write_parts(
            folder, job, table, read_part, num_prompts, shard_size, report, source=str(path),
            latent_bytes=lambda: 2 * math.prod(shape[1:]),
        )  # fmt: skip


def _write_parts(
    folder: Path, job: dict[str, Any], table: PromptTable, read_part: Callable[[int, int], _Part], total: int | None,
    shard_size: int, report: Report, *, latent_bytes: Callable[[], int], source: str,
    digest_of: Callable[[int, int], str] = lambda first, count: "",
) -> Path:  # fmt: skip
    """Shard by shard from where the folder stands to the source's end; each shard keeps the source rows it took.

    Each process makes the next shard; between reading and writing they tell each other their captions, because a shard says
    which of its texts are in an earlier one.
    """
    as_text = job.get("captions") == "text"
    row_bytes = partial(int) if as_text else table.row_bytes
    with begun(folder, job, LATENTS, lambda: _announce(folder, total, latent_bytes(), row_bytes())) as manifest:
        taken = _taken_before(folder, manifest, table, source, digest_of)
        own = _OwnShard(folder, table, read_part, as_text)
        while not manifest["complete"]:
            sizes = [shard_size if total is None else max(0, min(shard_size, total - taken - shard_size * number))
                     for number in range(world_size())]  # fmt: skip
            found = by_all(partial(own.read, taken + shard_size * rank(), sizes[rank()]))
            captions, rows = [one for one, _ in found], [count for _, count in found]
            entries = by_all(partial(own.write, len(manifest["shards"]) + rank(), captions))
            manifest["shards"] += [entry for entry in entries if entry is not None]
            taken += sum(rows)
            manifest["complete"] = rows != sizes or taken == total
            if manifest["complete"] and not any(entry["rows"] for entry in manifest["shards"]):
                raise UserError(f"{source} has no usable picture with a caption; look at it, or at --skip-bad")
            by_the_first(partial(write_manifest, folder, manifest))
            report(taken, total)
    return folder


def _taken_before(
    folder: Path, manifest: dict[str, Any], table: PromptTable, source: str, digest_of: Callable[[int, int], str]
) -> int:
    """Rows of the source that stored shards took; their texts are told to the table.

    Raises:
        UserError: some of them are others now.
    """
    taken = 0
    for entry in manifest["shards"]:
        table.add_known(read_texts(folder / entry["file"]))
        count = entry.get("source_rows", entry["rows"])
        if "source_digest" in entry and entry["source_digest"] != digest_of(taken, count):
            raise UserError(
                f"{folder}: pictures or captions among those of rows {taken:,} to {taken + count - 1:,} of {source} were changed "
                f"after their latents were stored ({entry['file']}); put them back, or choose another folder"
            )
        taken += count
    return taken


@dataclass
class _OwnShard:
    """The shard that this process makes beside those of the others."""

    folder: Path
    table: PromptTable
    read_part: Callable[[int, int], _Part]
    as_text: bool
    part: _Part | None = None

    def read(self, first: int, size: int) -> tuple[list[str], int]:
        """Captions of the part from a row on, and the rows of the source it took; nothing behind the last."""
        self.part = self.read_part(first, size) if size else None
        return ([], 0) if self.part is None else (self.part.captions, self.part.source_rows)

    def write(self, number: int, captions: list[list[str]]) -> dict[str, Any] | None:
        """The shard's entry, None where nothing is left; `captions` are every process's, in their order."""
        part, entry = self.part, None
        for before in captions[: rank()]:
            self.table.add_known(before)
        if part is not None and part.source_rows:
            texts = (
                self.table.text_tensors(part.captions)[0] if self.as_text else self.table.shard_tensors(part.captions)
            )
            tensors = {"latents": _half(part.latents), **texts}
            if part.spread is not None:
                tensors["latent_std"] = _half(part.spread)
            written = write_tensors(self.folder, number, tensors, len(part.captions), LATENTS)
            seen = {"source_digest": part.digest} if part.digest else {}
            entry = {**written, "source_rows": part.source_rows, **seen}
        for behind in captions[rank() + 1 :]:
            self.table.add_known(behind)
        return entry


def _announce(folder: Path, total: int | None, latent_bytes: int, caption_bytes: int) -> None:
    """Say how much will be stored, at most; refuse what does not fit."""
    count = 1000 if total is None else total
    every = "every 1,000" if total is None else f"{count:,}"
    if not caption_bytes:
        spare = "take fewer with --num-images, or another disk"
        announce_size(folder, f"latents of {every} pictures", count * latent_bytes, spare, share=1.0)
        return
    captions = f"their captions' embeddings (up to {count * caption_bytes / 1e9:,.3g} GB)"
    announce_size(
        folder, f"latents of {every} pictures and {captions}", count * (latent_bytes + caption_bytes),
        "--captions text stores no embeddings, and training encodes captions at each step (data.text_embeddings='computed')",
    )  # fmt: skip


def _half(latents: Tensor) -> Tensor:
    half = latents.half().contiguous()
    if not half.isfinite().all():
        raise UserError("a latent is not finite as float16; the VAE or the stored latents are damaged")
    return half


def check_channels(path: Path, shape: tuple[int, ...], channels: int) -> None:
    """Raise UserError for latents of an LMDB, (N, C, H, W), that are another model's."""
    if shape[1] != channels:
        raise UserError(f"{path} holds latents of {shape[1]} channels, this model's have {channels}")


def check_scale(path: Path, latents: Tensor) -> None:
    """Raise UserError where stored latents do not look scaled as a model has them."""
    spread = float(latents.float().std())
    if not spread <= _UNSCALED_STD:
        raise UserError(
            f"{path}: its latents have a standard deviation of {spread:.2f}, a model's own scaling gives about 1; give "
            "--lmdb-scale (the scaling_factor of vae/config.json, or 1 to take them as they are)"
        )


def _text_job(encoders: TextEncoders, truncate: bool, shard_size: int, captions: Captions) -> dict[str, Any]:
    return {
        "family": encoders.family, "text_encoders": text_fingerprint(encoders.folder), "truncate_prompts": truncate,
        "shard_size": shard_size, **({"captions": "text"} if captions == "text" else {}),
    }  # fmt: skip
