"""Making noise-image pairs with a teacher: shard by shard, so that an interrupted job continues."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.noise_image_pairs import PAIRS, PROMPT_EMBEDDINGS, write_shard
from fewstep.devices import dtype_name
from fewstep.diffusion.condition import ConditionTable
from fewstep.diffusion.draws import Draws
from fewstep.models.model import Model
from fewstep.parallel import world_size
from fewstep.preparation.shards import begun, fill
from fewstep.progress import Report


def prepare_pairs(
    teacher: Model, teacher_name: str, folder: Path, *, num_pairs: int, seed: int = 0, num_steps: int | None = None,
    guidance_scale: float = 1.0, shard_size: int = 1000, batch_size: int = 100,
    conditions: ConditionTable | None = None, report: Report = lambda done, total: None,
) -> Path:  # fmt: skip
    """Sample the teacher deterministically from stored noise with uniformly drawn conditions.

    Of several processes each makes its own shards; the files are the same for any number of them.

    The noise is rounded to float16 before it is used, so that the stored noise is exactly what made the image.
    Source: Yin et al. 2023 (arXiv:2311.18828), section 3.3.

    Args:
        folder: new, or one that an interrupted call with the same arguments left unfinished.
        conditions: what to draw from; None: all classes. A teacher that takes prompts needs them here.
        num_steps: of the teacher's sampler; None: its family's usual number.
        report: called with (finished pairs, all pairs) after each batch.

    Raises:
        UserError: the folder holds other pairs, guidance the teacher lacks, the disk is full.
    """
    teacher.check_guidance(guidance_scale)
    num_steps = teacher.family.default_num_steps if num_steps is None else num_steps
    job = {
        "teacher": teacher_name, "num_pairs": num_pairs, "seed": seed, "num_steps": num_steps,
        "guidance_scale": guidance_scale, "shard_size": shard_size, "image_shape": list(teacher.denoiser.image_shape),
        "precision": dtype_name(teacher.denoiser.compute_dtype),
    }  # fmt: skip
    if teacher.family.pair_sampler:
        job["sampler"] = teacher.family.pair_sampler
    conditions = teacher.conditioner.every if conditions is None else conditions
    if conditions is None:
        raise ValueError("pairs of a text-to-image teacher need conditions (its prompts)")
    job["network"] = teacher.fingerprint
    num_shards = -(-num_pairs // shard_size)

    def make(number: int) -> dict[str, Any] | None:
        """One shard's entry, None behind the last."""
        first, parts = number * shard_size, []
        for start in range(first, min(first + shard_size, num_pairs), batch_size):
            size = min(batch_size, first + shard_size - start, num_pairs - start)
            draws = Draws.of_batch(seed, 0, size, teacher.device, start)
            parts.append(_some_pairs(teacher, conditions, draws, num_steps, guidance_scale))
            report(min(first + (start + size - first) * world_size(), num_pairs), num_pairs)  # others make as many
        if not parts:
            return None
        return write_shard(folder, number, *(torch.cat(column) for column in zip(*parts, strict=True)))

    with begun(folder, job, PAIRS, ignore=(PROMPT_EMBEDDINGS,)) as manifest:
        fill(folder, manifest, num_shards, make)
    return folder


def _some_pairs(
    teacher: Model, conditions: ConditionTable, draws: Draws, num_steps: int, guidance_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    denoiser = teacher.denoiser
    labels = draws.integers("pair_label", 0, conditions.num_rows)
    noise = draws.normal("pair_noise", denoiser.image_shape).half()  # not the noise that evaluation starts from
    x0 = teacher.family.sample_pairs(
        denoiser, noise.float(), conditions.rows(labels), num_steps=num_steps, guidance_scale=guidance_scale
    )
    return noise.cpu(), teacher.decoder.stored(x0), labels.cpu()
