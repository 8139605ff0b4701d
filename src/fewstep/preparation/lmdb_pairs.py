"""Published ODE pairs (METHOD.md section 6): from an LMDB to the folder that `fewstep prepare pairs` makes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.latents import EMBEDDINGS, pack_texts
from fewstep.data.noise_image_pairs import PAIRS, PROMPT_EMBEDDINGS, write_shard
from fewstep.data.shard_folder import write_manifest, write_tensors, writing
from fewstep.errors import UserError
from fewstep.formats.fingerprints import text_fingerprint
from fewstep.formats.lmdb import ODE_PAIRS, LmdbArrays
from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders
from fewstep.preparation.latents import check_channels, check_scale
from fewstep.progress import Report

NOISE, IMAGES, TEXT, POOLED = ODE_PAIRS
_NOISE_STD = 0.8, 1.25  # of unit noise, in as few values as a small set has


def import_lmdb_pairs(
    encoders: TextEncoders, path: Path, folder: Path, *, channels: int, teacher: str, network_fingerprint: str,
    num_pairs: int | None = None, scale: float | None = None, shard_size: int = 1000,
    report: Report = lambda done, total: None,
) -> Path:  # fmt: skip
    """Store noises, latents and prompt embeddings of an LMDB; it holds no texts, so row i is called by its number.

    The LMDB does not say which teacher and encoders made it: both are taken at your word.

    Args:
        folder: new, or one that an interrupted call with the same arguments left unfinished.
        channels: of the latents that the teacher makes.
        num_pairs: take only the first; None: all.
        scale: the images are multiplied by it; None takes them as they are, and refuses ones that look unscaled.

    Raises:
        UserError: the LMDB is damaged, its arrays do not belong together, to these encoders or this teacher, its noise is not unit
            noise; the folder holds other pairs, the disk is full.
    """
    empty = encoders.encode_empty().to("cpu")
    kinds = {name: kind for name, kind in ODE_PAIRS.items() if name != POOLED or empty.pooled is not None}
    with LmdbArrays(path, kinds) as arrays:
        _check(path, arrays, empty)
        check_channels(path, arrays.shapes[NOISE], channels)
        if scale is None:
            check_scale(path, arrays.rows(IMAGES, range(min(64, arrays.shapes[IMAGES][0]))))
        total = min(arrays.shapes[NOISE][0], num_pairs or arrays.shapes[NOISE][0])
        source: dict[str, Any] = {
            "lmdb": str(path), "lmdb_content": arrays.fingerprint(), "lmdb_shape": list(arrays.shapes[NOISE]),
            "shard_size": shard_size,
        }  # fmt: skip
        job = {
            **source, "teacher": teacher, "network": network_fingerprint, "num_pairs": total, "scale": scale,
            "image_shape": list(arrays.shapes[NOISE][1:]),
        }  # fmt: skip
        with writing(folder, job, PAIRS, ignore=(PROMPT_EMBEDDINGS,)) as manifest:
            _import_embeddings(encoders, arrays, empty, folder / PROMPT_EMBEDDINGS, source, total)
            for number in range(len(manifest["shards"]), -(-total // shard_size)):
                rows = range(number * shard_size, min((number + 1) * shard_size, total))
                images = arrays.rows(IMAGES, rows)
                images = images if scale is None else (images.float() * scale).half()
                entry = write_shard(
                    folder, number, _finite(path, arrays.rows(NOISE, rows)), _finite(path, images), torch.tensor(rows)
                )
                manifest["shards"].append(entry)
                manifest["complete"] = rows.stop == total
                write_manifest(folder, manifest)
                report(rows.stop, total)
    return folder


def _import_embeddings(
    encoders: TextEncoders, arrays: LmdbArrays, empty: TextEmbeddings, folder: Path, source: dict[str, Any], total: int
) -> None:
    """Embeddings as `prepare embeddings` stores them, a row a pair."""
    facts = {"family": encoders.family, "text_encoders": text_fingerprint(encoders.folder), "num_prompts": total}
    size = source["shard_size"]
    with writing(folder, {**source, **facts}, EMBEDDINGS) as manifest:
        for number in range(len(manifest["shards"]), -(-total // size)):
            rows = range(number * size, min((number + 1) * size, total))
            tensors = {"row": torch.tensor(rows), **pack_texts([f"pair {row} of {arrays.path.name}" for row in rows])}
            tensors["text"] = _finite(arrays.path, arrays.rows(TEXT, rows)).reshape(len(rows), *empty.text.shape[1:])
            if empty.pooled is not None:
                tensors["pooled"] = _finite(arrays.path, arrays.rows(POOLED, rows)).reshape(len(rows), -1)
            if number == 0:
                tensors["empty_text"] = empty.text.half().contiguous()
                if empty.pooled is not None:
                    tensors["empty_pooled"] = empty.pooled.half().contiguous()
            manifest["shards"].append(write_tensors(folder, number, tensors, len(rows), EMBEDDINGS))
            manifest["complete"] = rows.stop == total
            write_manifest(folder, manifest)


def _check(path: Path, arrays: LmdbArrays, empty: TextEmbeddings) -> None:
    """Raise UserError where shapes or noise are not those of pairs for these encoders."""
    shapes = arrays.shapes
    if shapes[NOISE] != shapes[IMAGES] or len(shapes[NOISE]) != 4 or not shapes[NOISE][0]:
        raise UserError(
            f"{path}: latents of shape {shapes[NOISE]} and images of shape {shapes[IMAGES]} are no pairs of noise and latent"
        )
    wanted = {TEXT: tuple(empty.text.shape[1:])}
    if empty.pooled is not None:
        wanted[POOLED] = tuple(empty.pooled.shape[1:])
    for name, shape in wanted.items():
        found = shapes[name][1:]
        while len(found) > len(shape) and found[0] == 1:  # stored as a batch of one
            found = found[1:]
        if found != shape or shapes[name][0] != shapes[NOISE][0]:
            raise UserError(
                f"{path}: {name} has shape {shapes[name]}, {shapes[NOISE][0]} pairs of this teacher need rows of shape "
                f"{shape}; give the teacher that made them"
            )
    spread = float(arrays.rows(NOISE, range(min(64, shapes[NOISE][0]))).float().std())
    if not _NOISE_STD[0] < spread < _NOISE_STD[1]:
        raise UserError(f"{path}: its latents have a standard deviation of {spread:.2f}, the unit noise of pairs has 1")


def _finite(path: Path, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise UserError(f"{path}: a value is not finite; the data set is damaged: download or make it again")
    return values
