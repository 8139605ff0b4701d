"""Making noise-image pairs with a teacher: shard by shard, so that an interrupted job continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.data.noise_image_pairs import MANIFEST, is_intact, read_manifest, write_manifest, write_shard
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.samplers import sample_heun
from fewstep.errors import UserError
from fewstep.formats.pixels import to_uint8
from fewstep.generator import Teacher, check_guidance


def prepare_pairs(
    teacher: Teacher, teacher_name: str, folder: Path, *, num_pairs: int, seed: int = 0, num_steps: int = 18,
    guidance_scale: float = 1.0, shard_size: int = 1000, batch_size: int = 100,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Sample the teacher deterministically from stored noise with uniform labels.

    The noise is rounded to float16 before it is used, so that the stored noise is exactly what made the image.
    Source: Yin et al. 2023 (arXiv:2311.18828), section 3.3.

    Args:
        folder: new, or one that an interrupted call with the same arguments left unfinished.
        report: called with (finished pairs, all pairs) after each shard.

    Raises:
        UserError: the folder holds other pairs, guidance the teacher lacks, the disk is full.
    """
    check_guidance(teacher, guidance_scale)
    job = {
        "teacher": teacher_name, "num_pairs": num_pairs, "seed": seed, "num_steps": num_steps,
        "guidance_scale": guidance_scale, "shard_size": shard_size, "image_shape": list(teacher.denoiser.image_shape),
        "precision": str(teacher.denoiser.compute_dtype).removeprefix("torch."),
    }  # fmt: skip
    manifest = _start_or_continue(folder, job)
    for number in range(len(manifest["shards"]), -(-num_pairs // shard_size)):
        first = number * shard_size
        size = min(shard_size, num_pairs - first)
        parts = [_some_pairs(teacher, seed, first + start, min(batch_size, size - start), num_steps, guidance_scale)
                 for start in range(0, size, batch_size)]  # fmt: skip
        noise, images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        manifest["shards"].append(write_shard(folder, number, noise, images, labels))
        manifest["complete"] = first + size == num_pairs
        write_manifest(folder, manifest)
        report(first + size, num_pairs)
    return folder


def _start_or_continue(folder: Path, job: dict[str, object]) -> dict[str, Any]:
    if folder.is_file():
        raise UserError(f"{folder} is a file; choose a folder for the pairs")
    if not (folder / MANIFEST).exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no pairs; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error}; choose another folder") from error
        manifest: dict[str, Any] = {"job": job, "shards": [], "complete": False}
        write_manifest(folder, manifest)  # before the first shard, so that a kill at any moment can be continued
        return manifest
    manifest = read_manifest(folder)
    if manifest["job"] != job:
        changed = [
            f"{key} was {manifest['job'].get(key)!r}, is {job[key]!r}"
            for key in job
            if manifest["job"].get(key) != job[key]
        ]
        raise UserError(f"{folder} holds other pairs: {', '.join(changed)}; choose another folder")
    intact = 0  # shards are made in order: keep those before the first that is missing or changed
    while intact < len(manifest["shards"]) and is_intact(folder, manifest["shards"][intact]):
        intact += 1
    done = manifest["complete"] and intact == len(manifest["shards"])
    return {**manifest, "shards": manifest["shards"][:intact], "complete": done}


def _some_pairs(
    teacher: Teacher, seed: int, first: int, size: int, num_steps: int, guidance_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    denoiser = teacher.denoiser
    draws = Draws.of_batch(seed, 0, size, teacher.device, first)
    labels = draws.integers("pair_label", 0, max(1, denoiser.num_classes))
    noise = draws.normal("pair_noise", denoiser.image_shape).half()  # not the noise that evaluation starts from
    condition = Condition.from_labels(labels, denoiser.num_classes)
    images = sample_heun(denoiser, noise.float(), condition, num_steps=num_steps, guidance_scale=guidance_scale)
    return noise.cpu(), to_uint8(images), labels.cpu()
