"""Models measured by as many processes as there are; one of them may die on the way.

    python -m tests.distributed.evaluating WORK TEACHER

`WORK` has a generator of prompts (`texts/run`), a CLIP, a feature network each for grey and coloured pictures, pictures and prompts.
"""

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
from fewstep.evaluation import evaluate, measure
from fewstep.evaluation.evaluate import EvaluateOptions, evaluate_model
from fewstep.evaluation.features import SmallClassifier
from fewstep.parallel import rank
from tests.conftest import write_pictures
from tests.export.text_generators import write_run

PROMPTS = ("red cat", "a dog", "blue bird")
WAYS = ("classes", "texts")


def write_parts(work: Path) -> None:
    """What models are measured with."""
    torch.manual_seed(0)
    for name, channels in (("grey", 1), ("coloured", 3)):
        SmallClassifier(channels, 4, 4, name=name).eval().save(work / name)
    write_run(work / "texts", "sd", (999,))
    write_pictures(work / "real", 11)
    write_pictures(work / "real in colour", 11, channels=3)


def options_of(work: Path, way: str, folder: Path) -> EvaluateOptions:
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
    pictures = str(work / "real in colour")
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


def measure_both(work: Path, teacher: str, folder: Path) -> None:
    """Figures of a class teacher and a text generator, as JSON in a folder."""
    folder.mkdir(exist_ok=True)
    evaluate_model(teacher, options_of(work, "classes", folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_load_clip", lambda *_: Brightness())
        evaluate_model(str(work / "texts/run"), options_of(work, "texts", folder))


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
