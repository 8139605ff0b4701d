"""What `fewstep prepare embeddings` and `fewstep prepare latents` do once their arguments are read."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from rich.console import Console

from fewstep.data.captioned_images import open_captioned_images
from fewstep.data.latents import StoredEmbeddings, StoredLatents
from fewstep.data.noise_image_pairs import PROMPT_EMBEDDINGS
from fewstep.data.prompts import load_prompts
from fewstep.devices import choose_device
from fewstep.errors import UserError
from fewstep.formats.fingerprints import network_fingerprint, vae_fingerprint

if TYPE_CHECKING:
    from fewstep.diffusion.condition import ConditionTable
    from fewstep.models.model import Model

console = Console(stderr=True)
Fit = Literal["crop", "pad", "exact"]
Captions = Literal["embeddings", "text"]


def make_embeddings(
    teacher: str, prompts: Path, folder: Path, column: str, truncate: bool, shard_size: int, batch_size: int,
    device: str,
) -> None:  # fmt: skip
    """`fewstep prepare embeddings`."""
    from fewstep.families.diffusers_folder import resolve_model_folder
    from fewstep.families.registry import recognise
    from fewstep.preparation.embeddings import prepare_embeddings

    place, texts = choose_device(device), load_prompts(prompts, column)
    model = resolve_model_folder(teacher)
    encoders = recognise(model).text_encoders(model).to(place)
    prepare_embeddings(
        encoders, texts, folder, truncate=truncate, shard_size=shard_size, batch_size=batch_size,
        cut_with="--truncate-prompts", report=_progress("prompts"),
        spare_with="train with the list itself and data.text_embeddings='computed', which stores nothing",
    )  # fmt: skip
    stored = StoredEmbeddings(folder)
    print(f"{folder}: {len(stored)} prompts, {stored.num_distinct} distinct")


def make_latents(
    teacher: str, images: str, folder: Path, split: str, caption_column: str, resolution: int, fit: str,
    noise_seed: int | None, num_images: int | None, streaming: bool, skip_bad: bool, truncate: bool, shard_size: int,
    batch_size: int, captions: str, device: str,
) -> None:  # fmt: skip
    """`fewstep prepare latents --images`."""
    from fewstep.families.diffusers_folder import resolve_model_folder
    from fewstep.families.registry import recognise
    from fewstep.preparation.latents import prepare_latents

    if fit not in get_args(Fit):
        raise UserError(f"--fit {fit}: choose crop, pad or exact")
    place, model = choose_device(device), resolve_model_folder(teacher)
    source = open_captioned_images(images, split=split, caption_column=caption_column, streaming=streaming)
    family = recognise(model)
    autoencoder, encoders = family.autoencoder(model), family.text_encoders(model).to(place)
    assert autoencoder is not None, "a family that takes prompts works on latents"
    autoencoder.to(place)
    resolution = resolution or family.resolution(model)
    prepare_latents(
        autoencoder, encoders, source, folder, resolution=resolution, vae_fingerprint=vae_fingerprint(model),
        fit=cast(Fit, fit), noise_seed=noise_seed, num_images=num_images, skip_bad=skip_bad, truncate=truncate,
        shard_size=shard_size, batch_size=batch_size, captions=cast(Captions, captions), report=_progress("pictures"),
    )  # fmt: skip
    _print_latents(folder)


def import_latents(
    teacher: str, lmdb: Path, folder: Path, scale: float | None, truncate: bool, shard_size: int, batch_size: int,
    captions: str, device: str,
) -> None:  # fmt: skip
    """`fewstep prepare latents --from-lmdb`."""
    from fewstep.families.diffusers_folder import resolve_model_folder
    from fewstep.families.registry import recognise
    from fewstep.preparation.latents import import_lmdb_latents

    place, model = choose_device(device), resolve_model_folder(teacher)
    encoders = recognise(model).text_encoders(model).to(place)
    import_lmdb_latents(
        encoders, lmdb, folder, vae_fingerprint=vae_fingerprint(model), scale=scale, truncate=truncate,
        shard_size=shard_size, batch_size=batch_size, captions=cast(Captions, captions), report=_progress("latents"),
    )  # fmt: skip
    _print_latents(folder)


def import_pairs(
    teacher: str, lmdb: Path, folder: Path, num_pairs: int | None, scale: float | None, device: str
) -> None:
    """`fewstep prepare pairs --from-lmdb`."""
    from fewstep.families.diffusers_folder import resolve_model_folder
    from fewstep.families.registry import recognise
    from fewstep.preparation.lmdb_pairs import import_lmdb_pairs

    place, model = choose_device(device), resolve_model_folder(teacher)
    print(import_lmdb_pairs(
        recognise(model).text_encoders(model).to(place), lmdb, folder, teacher=teacher, network_fingerprint=network_fingerprint(model),
        num_pairs=num_pairs, scale=scale, report=_progress("pairs"),
    ))  # fmt: skip


def pair_prompts(teacher: "Model", prompts: str, folder: Path, truncate: bool) -> "ConditionTable":
    """The prompts that pairs are made of; their embeddings are stored beside the pairs."""
    from fewstep.preparation.embeddings import prepare_embeddings
    from fewstep.training.text_data import stored_prompts

    if not prompts:
        raise UserError("pairs of a text-to-image teacher need --prompts FILE")
    target = folder / PROMPT_EMBEDDINGS
    prepare_embeddings(
        teacher.conditioner.encoders, load_prompts(prompts), target, truncate=truncate, cut_with="--truncate-prompts",
        spare_with="give a shorter list: pairs draw their prompts from it", report=_progress("prompts"),
    )  # fmt: skip
    return stored_prompts(teacher, target)


def _print_latents(folder: Path) -> None:
    stored = StoredLatents(folder)
    skipped = sum(entry["source_rows"] - entry["rows"] for entry in stored.manifest["shards"])
    print(
        f"{folder}: {len(stored)} latents of shape {'x'.join(map(str, stored.latent_shape))}, "
        f"{stored.captions.num_distinct} distinct captions"
        + (
            f" ({stored.captions.num_empty} missing, which count as the empty prompt)"
            if stored.captions.num_empty
            else ""
        )
        + f", {skipped} pictures skipped"
    )


def _progress(what: str) -> Callable[[int, int | None], None]:
    started = time.perf_counter()

    def report(done: int, total: int | None) -> None:
        of = "" if total is None else f" of {total}"
        console.print(f"{done}{of} {what}, {time.perf_counter() - started:.0f} s")

    return report
