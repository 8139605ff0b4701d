"""LPIPS diversity: how far pictures of one prompt, or one class, from several seeds lie apart, beside the teacher's."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.devices import pictures_at_once
from fewstep.errors import UserError
from fewstep.evaluation.measurement import Value, known_to, mean_of
from fewstep.evaluation.speed import teacher_named_by
from fewstep.formats.pixels import as_eight_bits
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.networks.perceptual import LPIPS, load_lpips
from fewstep.parallel import world_size
from fewstep.progress import Report, busy, working
from fewstep.shared_work import by_the_first, shared_out

SEEDS = 4  # pictures of each prompt
OWN, TEACHERS, RATIO = "lpips_diversity", "teacher_lpips_diversity", "lpips_diversity_ratio"


class DiversityJudge:
    """Measures models that have one teacher, whose pictures are made once.

    Args:
        files: VGG16 and the LPIPS heads.
        teacher: stands beside a generator; empty: the one that its card names.
        how: `prompt_distances` of every model, but for `batch_size`, `report` and `processes`.
        batch_size: None is the family's.

    Raises:
        UserError: files that are not there, or hold something else.
    """

    def __init__(
        self, files: tuple[Path, Path], teacher: str, batch_size: int | None, console: Console, **how: Any
    ) -> None:
        self.lpips, self.teacher = load_lpips(*files), teacher
        self.batch_size, self.console, self.how = batch_size, console, how
        self._teachers: Tensor | None = None

    def values(self, model: Model) -> dict[str, Value]:
        """The figures of a model, made by all processes together; none on others than the first.

        Raises:
            UserError: a teacher that is not there, or of other pictures.
        """
        if self._teachers is None and (model.is_generator or self.teacher):
            name = self.teacher or teacher_named_by(model)
            with busy(self.console, f"Loading the teacher {name}"):
                teacher = load_teacher(name).to(model.device, model.denoiser.base_network.compute_dtype)
            if (
                teacher.denoiser.image_shape != model.denoiser.image_shape
                or teacher.conditioner.takes != model.conditioner.takes
            ):
                raise UserError(f"--teacher {name} is no teacher of this model's pictures")
            self._teachers = self._distances(teacher, "its teacher's pictures")
        own = self._distances(model, "pictures")
        return by_the_first(partial(diversity, own, self._teachers)) or {}

    def _distances(self, model: Model, what: str) -> Tensor:
        self.lpips.to(model.device)
        with working(self.console, f"Diversity of {what}") as report:
            return prompt_distances(
                model, self.lpips, batch_size=self.batch_size or model.family.default_batch_size, report=report,
                processes=world_size(), **self.how,
            )  # fmt: skip


def prompt_distances(
    model: Model, lpips: LPIPS, *, num_prompts: int, seed: int, prompts: Sequence[str] = (), num_steps: int | None = None,
    guidance_scale: float | None = None, batch_size: int = 4, report: Report = lambda done, total: None,
    processes: int = 1,
) -> Tensor:  # fmt: skip
    """The mean LPIPS distance between two of the pictures of each prompt, (num_prompts,), float32 on the CPU.

    Picture k of prompt p is the first of seed `seed` + 4 p + k, in 8 bits: a generator and its teacher begin from the same noises.

    Args:
        prompts: in turn; empty: all classes in turn.
        num_steps, guidance_scale: of a teacher; None is its family's.
        batch_size: pictures made at once, whole prompts.
        report: told before every batch, in pictures.
        processes: that share the batches out, as `shared_out` has it; others than the first get nothing.
    """
    asked = [prompts[number % len(prompts)] for number in range(num_prompts)] if prompts else None
    wishes = model.conditioner.wishes(asked, None, None if asked else num_prompts, 0)
    at_once = max(1, batch_size // SEEDS)
    if model.is_generator:
        num_steps = guidance_scale = None

    def work(number: int) -> Tensor:
        first = number * at_once
        own = [wish for wish in wishes[first : first + at_once] for _ in range(SEEDS)]
        images = model.sample(
            own, seed=[seed + SEEDS * first + place for place in range(len(own))], num_inference_steps=num_steps,
            guidance_scale=guidance_scale, batch_size=len(own), output="tensor", progress=False,
        )  # fmt: skip
        return mean_distances(lpips, images.unflatten(0, (-1, SEEDS)))

    count = num_prompts * SEEDS
    found = shared_out(work, -(-num_prompts // at_once), processes, lambda n: report(n * at_once * SEEDS, count))
    report(count, count)
    return torch.cat(found) if found else torch.empty(0)


@torch.no_grad()
def mean_distances(lpips: LPIPS, images: Tensor) -> Tensor:
    """The mean distance over all pairs within each of P sets of K pictures (P, K, C, H, W) in [-1, 1], rounded to 8 bits; (P,)."""
    rounded = as_eight_bits(images)
    pairs = list(itertools.combinations(range(images.shape[1]), 2))
    both = [rounded[:, [pair[side] for pair in pairs]].flatten(0, 1) for side in (0, 1)]
    at_once = pictures_at_once(*images.shape[-2:])
    parts = (part.split(at_once) for part in both)
    found = [lpips(a.to(lpips.shift.device), b.to(lpips.shift.device)).cpu() for a, b in zip(*parts, strict=True)]
    return torch.cat(found).unflatten(0, (len(images), -1)).mean(1)


def diversity(own: Tensor, teachers: Tensor | None) -> dict[str, Value]:
    """The figures of `prompt_distances` (P,) of a model, beside those of its teacher for the same prompts and seeds.

    The ratio's error is that of resampling prompts with repetition, to first order: both sides of a prompt go together.
    """
    by = f"VGG16 with average pooling, {len(own)} prompts or classes of {SEEDS} seeds"
    values = {OWN: _told(mean_of(own), by)}
    if teachers is None:
        return values
    a, b = own.double(), teachers.double()
    ratio = float(a.mean() / b.mean().clamp_min(1e-12))
    error = float((a - ratio * b).std(correction=0) / b.mean().clamp_min(1e-12)) / len(a) ** 0.5
    return values | {TEACHERS: _told(mean_of(teachers), by), RATIO: _told(known_to(ratio, error, len(a)), "")}


def _told(value: Value, by: str) -> Value:
    return Value(value.value, value.num_images * SEEDS, value.interval, by)
