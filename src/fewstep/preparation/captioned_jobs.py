"""`fewstep prepare embeddings` and `latents`, and what is imported from an LMDB, from their options on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from fewstep.data.captioned_images import open_captioned_images
from fewstep.data.latents import StoredEmbeddings, StoredLatents
from fewstep.data.pictures import Fit, check_colour
from fewstep.data.prompts import load_prompts
from fewstep.devices import choose_device
from fewstep.errors import UserError
from fewstep.families.diffusers_folder import resolve_model_folder
from fewstep.families.family import Family
from fewstep.families.registry import build_on_meta, recognise
from fewstep.formats.fingerprints import network_fingerprint, vae_fingerprint
from fewstep.models.decoder import read_autoencoder
from fewstep.parallel import joined
from fewstep.preparation.embeddings import prepare_embeddings
from fewstep.preparation.latents import Captions, import_lmdb_latents, prepare_latents
from fewstep.preparation.lmdb_pairs import import_lmdb_pairs
from fewstep.progress import Stderr, busy, working

if TYPE_CHECKING:
    from fewstep.networks.text_encoders import TextEncoders

console = Stderr()
# options of `prepare latents` that only pictures read
_OF_PICTURES = (
    "split", "caption_column", "resolution", "fit", "background", "noise_seed", "keep_spread", "num_images", "streaming", "skip_bad",
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingsOptions:
    """The options of `fewstep prepare embeddings`, as its help says."""

    column: str = "text"
    truncate: bool = False
    shard_size: int = 512
    batch_size: int = 32
    device: str = "auto"


@dataclass(frozen=True)
class LatentsOptions:
    """The options of `fewstep prepare latents`, as its help says."""

    split: str = "train"
    caption_column: str = ""
    resolution: int = 0
    fit: str = "crop"
    background: str = "white"
    noise_seed: int | None = None
    keep_spread: bool = False
    num_images: int | None = None
    streaming: bool = False
    skip_bad: bool = False
    truncate: bool = False
    shard_size: int = 512
    batch_size: int = 8
    captions: str = "embeddings"
    device: str = "auto"


def make_embeddings(teacher: str, source: str | Path, folder: Path, options: EmbeddingsOptions) -> None:
    """Store the embeddings of a prompt list, in as many processes as torchrun started.

    Raises:
        UserError: no prompts, no such teacher, a folder of other embeddings.
    """
    with joined(options.device):
        _make_embeddings(teacher, source, folder, options)


def _make_embeddings(teacher: str, source: str | Path, folder: Path, options: EmbeddingsOptions) -> None:
    """`make_embeddings` in one of its processes."""
    with busy(console, f"Reading {source}"):
        prompts = load_prompts(source, options.column)
    _, encoders = _encoders(teacher, options.device)
    with working(console, f"Embedding {len(prompts):,} prompts") as report:
        prepare_embeddings(
            encoders, prompts, folder, truncate=options.truncate, shard_size=options.shard_size,
            batch_size=options.batch_size, cut_with="--truncate-prompts",
            spare_with="train with the list itself and data.text_embeddings='computed', which stores nothing", report=report,
        )  # fmt: skip
    stored = StoredEmbeddings(folder)
    print(f"{folder}: {len(stored)} prompts, {stored.num_distinct} distinct")


def make_latents(teacher: str, images: str, folder: Path, options: LatentsOptions) -> None:
    """Store the latents of captioned pictures, in as many processes as torchrun started.

    Raises:
        UserError: no such teacher or pictures, pictures that do not fit, a folder of other latents.
    """
    with joined(options.device):
        _make_latents(teacher, images, folder, options)


def _make_latents(teacher: str, images: str, folder: Path, options: LatentsOptions) -> None:
    """`make_latents` in one of its processes."""
    if options.fit not in get_args(Fit):
        raise UserError(f"--fit {options.fit}: choose crop, pad or exact")
    _refuse_other_captions(options)
    if options.keep_spread and options.noise_seed is not None:
        raise UserError("--keep-spread draws a sample each time training reads a picture: leave out --noise-seed")
    check_colour(options.background, "--background")
    with busy(console, f"Opening {images}"):
        source = open_captioned_images(
            images, split=options.split, caption_column=options.caption_column, streaming=options.streaming
        )
    model, encoders = _encoders(teacher, options.device)
    family = recognise(model)
    with busy(console, "Loading the VAE"):
        autoencoder = read_autoencoder(family, model, _latent_channels(family, model)).to(choose_device(options.device))
        fingerprint = vae_fingerprint(model)
    with working(console, f"Encoding the pictures of {images}") as report:
        prepare_latents(
            autoencoder, encoders, source, folder, resolution=options.resolution or family.resolution(model),
            vae_fingerprint=fingerprint, fit=cast(Fit, options.fit), background=options.background, noise_seed=options.noise_seed,
            keep_spread=options.keep_spread, num_images=options.num_images, skip_bad=options.skip_bad, truncate=options.truncate,
            shard_size=options.shard_size, batch_size=options.batch_size, captions=cast(Captions, options.captions),
            report=report,
        )  # fmt: skip
    _print_latents(folder)


def import_latents(
    teacher: str, lmdb: Path, folder: Path, options: LatentsOptions, scale: float | None = None
) -> None:  # fmt: skip
    """Store the latents of a published LMDB, in as many processes as torchrun started.

    Raises:
        UserError: an option that only pictures read, no such teacher, a damaged LMDB, a folder of other latents.
    """
    _refuse_other_captions(options)
    if given := [name for name in _OF_PICTURES if getattr(options, name) != getattr(LatentsOptions, name)]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"--from-lmdb takes all of its latents as they are: leave out {names}")
    with joined(options.device):
        model, encoders = _encoders(teacher, options.device)
        with working(console, f"Importing the latents of {lmdb}") as report:
            import_lmdb_latents(
                encoders, lmdb, folder, channels=_latent_channels(recognise(model), model), vae_fingerprint=vae_fingerprint(model),
                scale=scale, truncate=options.truncate, shard_size=options.shard_size, batch_size=options.batch_size,
                captions=cast(Captions, options.captions), report=report,
            )  # fmt: skip
        _print_latents(folder)


def import_pairs(
    teacher: str, lmdb: Path, folder: Path, *, num_pairs: int | None = None, scale: float | None = None,
    device: str = "auto",
) -> None:  # fmt: skip
    """Store the noise-image pairs of a published LMDB.

    Raises:
        UserError: no such teacher, a damaged LMDB, a folder of other pairs.
    """
    model, encoders = _encoders(teacher, device)
    with working(console, f"Importing the pairs of {lmdb}") as report:
        import_lmdb_pairs(
            encoders, lmdb, folder, channels=_latent_channels(recognise(model), model), teacher=teacher,
            network_fingerprint=network_fingerprint(model), num_pairs=num_pairs, scale=scale, report=report,
        )  # fmt: skip
    print(folder)


def _refuse_other_captions(options: LatentsOptions) -> None:
    if options.captions not in get_args(Captions):
        raise UserError(f"--captions {options.captions}: choose embeddings or text")


def _encoders(teacher: str, device: str) -> tuple[Path, "TextEncoders"]:
    """The teacher's folder and its text encoders."""
    place = choose_device(device)
    with busy(console, f"Loading the text encoders of {teacher}"):
        model = resolve_model_folder(teacher)
        return model, recognise(model).text_encoders(model).to(place)


def _latent_channels(family: Family, folder: Path) -> int:
    """Of the latents that the network in a folder makes."""
    return build_on_meta(family.describe_folder(folder)).image_shape[0]


def _print_latents(folder: Path) -> None:
    stored = StoredLatents(folder)
    skipped = sum(entry["source_rows"] - entry["rows"] for entry in stored.manifest["shards"])
    empty = stored.captions.num_empty
    missing = f" ({empty} missing, which count as the empty prompt)" if empty else ""
    print(
        f"{folder}: {len(stored)} latents of shape {'x'.join(map(str, stored.latent_shape))}, "
        f"{stored.captions.num_distinct} distinct captions{missing}, {skipped} pictures skipped"
    )
