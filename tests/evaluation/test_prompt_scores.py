"""Text metrics: the CLIP score equals a recomputation by hand, and a preference score enters without touching anything else."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from fewstep.errors import UserError
from fewstep.evaluation.clip_score import ClipScore
from fewstep.evaluation.measure import Clocked, measure_model, measure_sampler
from fewstep.evaluation.measurement import Measurement, Value, mean_of
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.evaluation.prompt_scores import TextMetric, TextScores, repeated_prompts
from fewstep.evaluation.protocols import PROTOCOLS, coco_figure, coco_look
from fewstep.models.load import load_generator
from fewstep.networks.clip import load_clip
from tests.cli.test_main import fewstep
from tests.export.text_generators import write_run
from tests.networks.test_clip import by_hand
from tests.tiny_models import MAX_TOKENS, tiny_clip_folder

PROMPTS = ["red cat", "a dog", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_folder(tmp_path_factory.mktemp("models") / "clip")


def sample(first: int, count: int) -> Tensor:
    parts = [torch.randn(3, 30, 40, generator=torch.Generator().manual_seed(n)) for n in range(first, first + count)]
    return torch.stack(parts) * 0.5


class Means:
    """Features: the means of the colours."""

    name = "means"

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def measured(metrics: list[TextMetric], count: int = 7, batch_size: int = 3) -> Measurement:
    reference = FeatureStatistics(torch.zeros(3).double(), torch.eye(3).double(), 10)
    return measure_sampler(
        "g", sample, Means(), reference, num_images=count, evaluations_per_image=4, seed=0, batch_size=batch_size,
        scores=TextScores(metrics, PROMPTS),
    )  # fmt: skip


def cosines(folder: Path, pictures: np.ndarray, prefix: str) -> list[float]:
    """(N, H, W, 3) uint8 against the prompts in turn, one by one in float64."""
    model, clip = CLIPModel.from_pretrained(folder).double().eval(), load_clip(folder)
    found = []
    for number, one in enumerate(pictures):
        pixels = torch.from_numpy(by_hand(Image.fromarray(one)))[None]
        row = clip.tokenizer(prefix + PROMPTS[number % 3], verbose=False).input_ids
        tokens = torch.tensor([row if len(row) <= MAX_TOKENS else [*row[: MAX_TOKENS - 1], row[-1]]])
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            b = model.text_projection(model.text_model(tokens).pooler_output)[0]
        found.append(float(a @ b / (a.norm() * b.norm())))
    return found


def test_clip_score_equals_a_recomputation(folder: Path) -> None:
    found = measured([ClipScore(load_clip(folder), "tiny", "red ")])
    pixels = ((sample(0, 7).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = cosines(folder, pixels, "red ")
    assert found["clip_score"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert np.std(expected) > 1e-3
    error = np.std(expected) / 7**0.5
    assert found.values["clip_score"].interval == pytest.approx(
        (np.mean(expected) - 2 * error, np.mean(expected) + 2 * error), abs=1e-6
    )
    assert f'CLIP score {found.values["clip_score"]} (tiny, prefix "red ")' in found.sentence()
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_score_of_a_coco_protocol_is_of_truncated_pictures(folder: Path) -> None:
    metric = ClipScore(load_clip(folder), "tiny", "A photo depicts ")
    scores = TextScores([metric], PROMPTS)
    rows = Clocked(sample, 5, 2).seen(coco_look(PROTOCOLS["coco30k-256"], Means(), scores))
    found = coco_figure(
        PROTOCOLS["coco30k-256"], "g", rows, {"frechet_distance": torch.rand(9, 3)}, Means(), Value(1, 5),
        evaluations_per_image=4, seed=0, scores=scores,
    )  # fmt: skip
    pixels = np.floor((sample(0, 5).clamp(-1, 1).numpy() + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    expected = cosines(folder, pixels.transpose(0, 2, 3, 1), "A photo depicts ")
    assert found["clip_score"] == pytest.approx(np.mean(expected), abs=1e-6)


class Preference:
    """A stand-in for a preference model: likes bright pictures of short prompts."""

    name, by = "preference_score", "a toy"

    def __call__(self, pictures: list[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([np.asarray(one).mean() / len(p) for one, p in zip(pictures, prompts, strict=True)])

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        return []


def test_a_preference_score_enters_without_touching_the_rest() -> None:
    found = measured([Preference()])
    levels = ((sample(0, 7).clamp(-1, 1) + 1) * 127.5).round().mean((1, 2, 3)).tolist()
    expected = np.mean([level / len(PROMPTS[n % 3]) for n, level in enumerate(levels)])
    assert found["preference_score"] == pytest.approx(expected, rel=1e-5)
    assert found.values["preference_score"].num_images == 7
    assert "preference score" in found.sentence()
    assert "(a toy)" in found.sentence()
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.slow
def test_a_models_pictures_meet_their_own_prompts(tmp_path: Path) -> None:
    generator = load_generator(write_run(tmp_path, "sd", (999,)), device="cpu")
    seen: list[tuple[int, str]] = []

    class Spy(Preference):
        def __call__(self, pictures: list[Image.Image], prompts: Sequence[str]) -> Tensor:
            seen.extend(
                (int(np.asarray(one).astype(int).sum()), prompt) for one, prompt in zip(pictures, prompts, strict=True)
            )
            return super().__call__(pictures, prompts)

    reference = FeatureStatistics(torch.zeros(3).double(), torch.eye(3).double(), 10)
    measure_model(
        generator, "g", Means(), reference, num_images=3, seed=0, batch_size=2, prompts=["red cat", "a dog"],
        text_metrics=[Spy()],
    )  # fmt: skip
    expected = generator.sample(["red cat", "a dog", "red cat"], num_images=3, seed=0)
    sums = [int(np.asarray(one).astype(int).sum()) for one in expected]
    assert [prompt for _, prompt in seen] == ["red cat", "a dog", "red cat"]
    assert [total for total, _ in seen] == pytest.approx(sums, abs=30)


def test_prompts_that_stand_more_than_once_are_counted_and_named() -> None:
    assert repeated_prompts(PROMPTS) == []
    assert repeated_prompts(["cat", "a dog", "cat", "red", "a dog", "cat"]) == [
        "warning: 2 of 3 prompts stand more than once ('cat' 3 times, 'a dog' 2 times); each counts as often as it stands"
    ]


def test_prompts_beyond_the_limit_are_told(folder: Path) -> None:
    metric = ClipScore(load_clip(folder), "tiny")
    assert metric.warnings(PROMPTS) == []
    told = metric.warnings(["cat " * 50, "cat"])
    assert len(told) == 1
    assert "the end of 1 prompts does not count ('cat cat" in told[0]


def test_other_clips_make_a_proxy(folder: Path) -> None:
    metric = ClipScore(load_clip(folder), "tiny", "A photo depicts ")
    assert metric.difference("A photo depicts ") == "CLIP of 2 layers of 32 and patches of 8, not ViT-g/14"
    vision = metric.clip.network.config.vision_config
    vision.num_hidden_layers, vision.hidden_size, vision.patch_size = 40, 1408, 14
    assert metric.difference("A photo depicts ") == ""
    assert metric.difference("") == "CLIP prefix 'A photo depicts ', not ''"


def test_the_error_of_a_mean_is_that_of_resampled_pictures() -> None:
    each = torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 3
    rows = torch.randint(200, (4000, 200), generator=torch.Generator().manual_seed(1))
    low, high = mean_of(each).interval or (0, 0)
    assert (high - low) / 4 == pytest.approx(float(each[rows].mean(1).std()), rel=0.05)
    assert (high + low) / 2 == pytest.approx(float(each.mean()))


@pytest.mark.slow
def test_evaluate_with_clip(folder: Path, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", "sd", (999,)), tmp_path / "figure.json"
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")
    answer = fewstep(
        "evaluate", run, "--features", "bundled:emoji", "--reference", "bundled:emoji/reference_train.npz", "--prompts",
        tmp_path / "prompts.txt", "--num-images", 3, "--clip", folder, "--clip-prefix", "red ", "--json", out,
        "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "CLIP score" in answer.out
    found = json.loads(out.read_text())
    assert -1 <= found["clip_score"] <= 1
    assert found["by"] == {"clip_score": f'{folder}, prefix "red "'}


def test_clip_needs_prompts(tmp_path: Path) -> None:
    common = ("evaluate", "bundled:fashion-mnist", "--features", "bundled:fashion-mnist", "--device", "cpu")
    common = (*common, "--reference", "bundled:fashion-mnist/reference_test.npz")
    answer = fewstep(*common, "--clip", tmp_path)
    assert (answer.code, answer.out) == (2, "")
    assert "bundled:fashion-mnist has no prompts that a CLIP could compare pictures with" in answer.err
    answer = fewstep(*common, "--clip-prefix", "x")
    assert "--clip-prefix 'x' belongs to --clip MODEL" in answer.err


def test_a_clip_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        load_clip("nowhere/at/all")


def test_empty_and_repeated_prompts_are_said() -> None:
    assert repeated_prompts(["a", "b"]) == []
    assert repeated_prompts(["a", " ", "b", ""]) == [
        "warning: 2 of 4 prompts are empty: their pictures are of nothing in particular"
    ]
    assert [line[:33] for line in repeated_prompts(["", ""])] == [
        "warning: 2 of 2 prompts are empty",
        "warning: 1 of 1 prompts stand mor",
    ]
