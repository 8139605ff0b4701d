"""Models measured by as many processes as there are; one of them may die on the way.

    python -m tests.distributed.evaluating WORK TEACHER

`WORK` has a generator of prompts (`texts/run`) and one of classes, a feature network each for grey and coloured pictures, a VGG16 with
LPIPS heads, pictures, and pictures with captions in COCO's layout.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation import evaluate, measure, protocols
from fewstep.evaluation.evaluate import EvaluateOptions, evaluate_model
from fewstep.evaluation.features import SmallClassifier
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import build_model
from fewstep.parallel import rank
from tests.conftest import tiny_denoiser, write_pictures
from tests.evaluation.lpips_files import lpips_files, small_pictures_stay, write_lpips
from tests.export.text_generators import write_run

PROMPTS = ("red cat", "a dog", "blue bird")
# each way of measuring, and figures that it gives
WAYS = {
    "classes": {"frechet_distance", "kid", "coverage"},
    "texts": {"frechet_distance", "kid", "coverage", "brightness"},
    "coco": {"frechet_distance", "patch_distance"},
    "diversity": {"lpips_diversity", "teacher_lpips_diversity", "lpips_diversity_ratio"},
}


def write_parts(work: Path) -> None:
    """What models are measured with, and models."""
    torch.manual_seed(0)
    for name, channels in (("grey", 1), ("coloured", 3)):
        SmallClassifier(channels, 4, 4, name=name).eval().save(work / name)
    write_run(work / "texts", "sd", (999,))
    write_pictures(work / "real", 11)
    write_pictures(work / "real in colour", 11, channels=3)
    build_model(tiny_denoiser(seed=1), ModelCard("generator", step_indices=(999,))).write(work / "one step")
    write_lpips(work)
    write_captions(work / "captions.json", work / "real in colour")


def write_captions(path: Path, folder: Path) -> None:
    """COCO's layout: the pictures below a folder, each with a caption of its own."""
    names = sorted(str(picture.relative_to(folder)) for picture in folder.rglob("*.png"))
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    captions = [
        {"id": number, "image_id": number, "caption": f"{PROMPTS[number % 3]} {number}"} for number in range(len(names))
    ]
    path.write_text(json.dumps({"images": images, "annotations": captions}), encoding="utf-8")


def options_of(work: Path, way: str, teacher: str, folder: Path) -> EvaluateOptions:
    """Batches that do not divide by the processes, the last one smaller."""
    how: dict[str, Any] = {
        "device": "cpu",
        "cache": False,
        "json_out": folder / f"{way}.json",
        "seed": 3,
        "precision": "fp32",
    }
    if way == "classes":
        return EvaluateOptions(
            str(work / "grey"), images=str(work / "real"), num_images=22, batch_size=3, teacher_steps=2, **how
        )
    if way == "diversity":
        return EvaluateOptions(
            str(work / "grey"), images=str(work / "real"), num_images=7, batch_size=4, teacher_steps=2,
            lpips=lpips_files(work), diversity_prompts=5, teacher=teacher, **how,
        )  # fmt: skip
    pictures = str(work / "real in colour")
    if way == "coco":
        return EvaluateOptions(
            str(work / "coloured"), "coco10k-512", captions=work / "captions.json", images=pictures, num_images=7,
            batch_size=2, **how,
        )  # fmt: skip
    return EvaluateOptions(
        str(work / "coloured"), images=pictures, prompts=PROMPTS, num_images=7, batch_size=2, clip="stands in", **how
    )


class Brightness:
    """A score of pictures and prompts in the place of a CLIP's."""

    name, by = "brightness", "a stand-in"

    def __call__(self, pictures: list[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [sum(one.convert("L").tobytes()) / len(p) for one, p in zip(pictures, prompts, strict=True)]
        )

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        return []


def measure_all(work: Path, teacher: str, folder: Path) -> None:
    """Figures of a class teacher, a text generator and a class generator, as JSON in a folder."""
    folder.mkdir(exist_ok=True)
    models = {
        "classes": teacher,
        "texts": work / "texts/run",
        "coco": work / "texts/run",
        "diversity": work / "one step",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_load_clip", lambda options, *_: Brightness() if options.clip else None)
        patch.setattr(protocols, "_BATCH", 2)  # more batches of real pictures than processes
        small_pictures_stay(patch)
        for way, model in models.items():
            evaluate_model(str(model), options_of(work, way, teacher, folder))


def refuse(work: Path, teacher: str, folder: Path) -> None:
    """Where the second process has another seed, and where it meets a fault; notes what each says."""
    for name, seed, fault in (("options", rank(), False), ("fault", 0, rank() == 1)):

        def faulty(*_: Any) -> Tensor:
            raise UserError("a picture that does not decode")

        options = EvaluateOptions(
            str(work / "grey"), images=str(work / "real"), num_images=8, batch_size=2, teacher_steps=1, device="cpu",
            cache=False, seed=seed, precision="fp32", json_out=folder / "refused.json",
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            if fault:
                patch.setattr(measure, "features_of", faulty)
            try:
                evaluate_model(teacher, options)
            except UserError as error:
                (folder / f"{name}-{rank()}.txt").write_text(str(error), encoding="utf-8")


def die_in_the_second_round() -> None:
    """The second process ends without a word before its second batch."""
    batch = measure.Clocked.batch

    def made(self: measure.Clocked, number: int) -> tuple[Tensor, float]:
        if rank() == 1 and number == 3:
            os._exit(1)
        return batch(self, number)

    measure.Clocked.batch = made  # type: ignore[method-assign]


if __name__ == "__main__":
    from fewstep.cli.main import main

    torch.set_num_threads(1)
    die_in_the_second_round()
    folder, teacher = Path(sys.argv[1]), sys.argv[2]
    sys.argv[1:] = [
        "evaluate", teacher, "--features", str(folder / "grey"), "--images", str(folder / "real"), "--num-images", "22",
        "--batch-size", "3", "--teacher-steps", "2", "--device", "cpu", "--no-cache", "--precision", "fp32",
    ]  # fmt: skip
    main()
