"""What a base in int8 or nf4 changes: the teacher's x0 and the gradients of a LoRA on it, against the same base in bf16.

    python benchmarks/quantised_base.py            bundled emoji teachers and tiny networks of every family, a minute on one core
    python benchmarks/quantised_base.py FOLDER     a teacher of your own, float32, read twice
    python benchmarks/quantised_base.py --text     the embeddings of the same teachers' text encoders instead, against float32's

Each at four noise levels of its grid, two prompts, two noisy inputs a level, seed 0, computed in float32. The gradient is of
x0 times a fixed random direction with respect to all factors of a LoRA of rank 4 with random weights.
"""

import argparse
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, SharedBase
from fewstep.networks.frozen_layers import Base, BaseStorage
from tests.tiny_flow_models import tiny_flux2_klein_folder, tiny_z_image_folder
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder

INDICES = (250, 500, 750, 999)
PROMPTS = ["red apple", "a dog"]
BUNDLED = ("bundled:emoji-sd", "bundled:emoji-sdxl")
TINY = {
    "sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder, "z-image": tiny_z_image_folder,
    "flux2-klein": tiny_flux2_klein_folder,
}  # fmt: skip
BASES: tuple[Base, ...] = ("int8", "nf4")


@dataclass(frozen=True)
class Difference:
    """Between a quantised base and bf16's at one noise level: relative error of x0, cosine of the LoRA's gradients."""

    x0_error: float
    cosine: float


def compare(teacher: Model, base: Base) -> list[Difference]:
    """At each of `INDICES`; the teacher stays as it is."""
    condition = teacher.conditioner.table(PROMPTS, teacher.size).rows(torch.arange(len(PROMPTS)))
    plain = deepcopy(teacher.denoiser).bfloat16().float()
    small = BaseStorage(base).store(deepcopy(teacher.denoiser))
    return [
        Difference(float((x0 - x0_plain).norm() / x0_plain.norm()), float(torch.cosine_similarity(ours, theirs, 0)))
        for (x0_plain, theirs), (x0, ours) in zip(_answers(plain, condition), _answers(small, condition), strict=True)
    ]


def _answers(network: Denoiser, condition: Condition) -> Iterator[tuple[Tensor, Tensor]]:
    """(x0 of the bare base, gradient of all factors) at each level."""
    role = SharedBase(network, LoraShape(rank=4, alpha=4.0)).add_role("generator")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in role.parameters():
            part.copy_(0.02 * torch.randn(part.shape, generator=random))
    size = (len(PROMPTS), *network.image_shape)
    for index in INDICES:
        level = network.noise_schedule.at(torch.full((len(PROMPTS),), index))
        x0, noise, direction = (torch.randn(size, generator=random) for _ in range(3))
        noisy = network.add_noise(x0 / 2, noise, level)
        with torch.no_grad():
            bare = network.denoise(noisy, level, condition)
        parts = list(role.parameters())
        found = torch.autograd.grad((role.denoise(noisy, level, condition) * direction).sum(), parts, allow_unused=True)
        yield (
            bare,
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parts, found, strict=True)]),
        )


def text_error(teacher: Model, base: Base) -> float:
    """Relative error of both prompts' embeddings, by encoders whose linear layers are stored so."""
    conditioner = teacher.conditioner
    plain = conditioner.encoders.encode(PROMPTS).text
    conditioner.release()
    found = conditioner.encoders.store(base).encode(PROMPTS).text
    conditioner.release()
    return float((found - plain).norm() / plain.norm())


def print_text_rows(name: str, teacher: Model) -> None:
    """One row of the table of text encoders."""
    print(f"| {name} | " + " | ".join(f"{text_error(teacher, base):.1%}" for base in BASES) + " |", flush=True)


def print_rows(name: str, teacher: Model) -> None:
    """A row for each base."""
    for base in BASES:
        found = compare(teacher, base)
        errors = " | ".join(f"{row.x0_error:.1%}" for row in found)
        print(f"| {name} | {base} | {errors} | {min(row.cosine for row in found):.4f} |", flush=True)


def main() -> None:
    """Print the table of docs/memory.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*")
    parser.add_argument("--text", action="store_true")
    arguments = parser.parse_args()
    columns = [f"text embeddings, {base}" for base in BASES]
    if not arguments.text:
        columns = ["`memory.base`", *(f"x0 at {index}" for index in INDICES), "least cosine"]
    print(f"| teacher | {' | '.join(columns)} |\n| --- |" + " --- |" * len(columns), flush=True)
    show = print_text_rows if arguments.text else print_rows
    for name in arguments.teachers or BUNDLED:
        show(Path(name).name.removeprefix("bundled:"), load_teacher(name, device="cpu"))
    if arguments.teachers:
        return
    with tempfile.TemporaryDirectory() as place:
        for name, make in TINY.items():
            show(f"tiny {name}, random weights", load_teacher(make(Path(place) / name), device="cpu"))


if __name__ == "__main__":
    main()
