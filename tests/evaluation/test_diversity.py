"""LPIPS diversity equals a recomputation pair by pair; beside the teacher's, as a ratio whose interval holds."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.evaluation.diversity import diversity, mean_distances, prompt_distances
from fewstep.evaluation.evaluate import EvaluateOptions, evaluate_model
from fewstep.evaluation.features import SmallClassifier
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import build_model
from tests.conftest import tiny_denoiser
from tests.evaluation.lpips_files import small_pictures_stay, write_lpips


class Squares(nn.Module):
    """A distance that one can compute by hand, in the place of LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


def by_hand(images: Tensor) -> float:
    """The mean over all pairs of 4 pictures."""
    rounded = ((images.double().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return float(sum((a - b).square().mean() for a, b in itertools.combinations(rounded, 2)) / 6)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_distances_are_between_pictures_of_one_class(batch_size: int) -> None:
    """Class after class, each from four seeds that no other has, in batches of whole classes."""
    told: list[tuple[int, int | None]] = []
    generator = build_model(tiny_denoiser(), ModelCard("generator", step_indices=(999,)))
    found = prompt_distances(
        generator, Squares(), num_prompts=5, seed=3, batch_size=batch_size, report=lambda *at: told.append(at)  # type: ignore[arg-type]
    )  # fmt: skip
    expected = [
        by_hand(
            generator.sample(
                labels=[number % 4] * 4, seed=[3 + 4 * number + place for place in range(4)], output="tensor"
            )
        )
        for number in range(5)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert told[0] == (0, 20)
    assert told[-1] == (20, 20)


def test_pairs_are_those_within_a_prompt() -> None:
    images = torch.rand(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(
        mean_distances(Squares(), images),
        torch.tensor([by_hand(one) for one in images]),  # type: ignore[arg-type]
    )
    assert float(mean_distances(Squares(), images[:1, :1].expand(1, 4, 1, 8, 8))) == 0  # type: ignore[arg-type]


def test_the_ratios_interval_is_that_of_resampled_prompts() -> None:
    random = torch.Generator().manual_seed(0)
    teachers = torch.rand(400, generator=random) + 0.5
    own = 0.6 * teachers + 0.1 * torch.rand(400, generator=random)
    found = diversity(own, teachers)
    rows = torch.randint(400, (2000, 400), generator=random)
    spread = float((own[rows].mean(1) / teachers[rows].mean(1)).std())
    ratio = found["lpips_diversity_ratio"]
    assert ratio.value == pytest.approx(float(own.mean() / teachers.mean()), rel=1e-6)
    assert ratio.interval is not None
    assert (ratio.interval[1] - ratio.interval[0]) / 4 == pytest.approx(spread, rel=0.1)
    assert found["lpips_diversity"].num_images == 1600
    assert diversity(own, None).keys() == {"lpips_diversity"}


@pytest.mark.slow
def test_a_generator_is_measured_beside_its_teacher(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights in the published files' shapes, on small pictures that are not enlarged."""
    files = write_lpips(tmp_path)
    small_pictures_stay(monkeypatch)
    SmallClassifier(1, 4, 4).eval().save(tmp_path / "features")
    build_model(tiny_denoiser(seed=1), ModelCard("generator", step_indices=(999,))).write(tmp_path / "generator")

    def options(**more: object) -> EvaluateOptions:
        return EvaluateOptions(
            str(tmp_path / "features"), images=str(pictures), num_images=9, cache=False, device="cpu", precision="fp32",
            teacher_steps=1, json_out=tmp_path / "found.json", **{"lpips": files, "diversity_prompts": 2, **more},  # type: ignore[arg-type]
        )  # fmt: skip

    evaluate_model(str(tmp_path / "generator"), options(teacher=str(teacher_folder)))
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["lpips_diversity_ratio"] == pytest.approx(found["lpips_diversity"] / found["teacher_lpips_diversity"])
    assert found["num_images_of"]["lpips_diversity"] == 8
    assert "2 prompts or classes of 4 seeds" in found["by"]["lpips_diversity"]
    with pytest.raises(UserError, match="card names no teacher; give it with --teacher"):
        evaluate_model(str(tmp_path / "generator"), options())
    with pytest.raises(UserError, match="belongs to --lpips VGG16 HEADS"):
        evaluate_model(str(tmp_path / "generator"), options(teacher="x", lpips=None))
    with pytest.raises(UserError, match="VGG16 is read from"):
        evaluate_model(str(tmp_path / "generator"), options(lpips=(tmp_path / "absent", files[1])))
