"""The bench of recipes on a tiny set: equal work for every variant, rows that are kept, a table over seeds."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality
from quality_sets import PAIRS, SETS, VARIANTS, Contest, images_per_step

from fewstep.data.images import load_images
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.evaluation.bench import HOLD_OUT_REFERENCE, REFERENCE
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.measure import dataset_features
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.families.edm.family import EDMFamily
from fewstep.settings import DataSettings
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from tests.training.helpers import tiny_train_settings


@pytest.fixture
def tiny(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Contest:  # fmt: skip
    """A set of 24 pictures, known as "tiny"."""
    monkeypatch.setattr(EDMFamily, "default_num_steps", 2)
    torch.manual_seed(0)
    judge = tmp_path / "judge"
    classifier = SmallClassifier(1, 4, width=4).eval()
    classifier.save(judge / "features")
    real = load_images(DataSettings(images=str(pictures)), resolution=16, channels=1, num_classes=4)
    statistics = FeatureStatistics.of(dataset_features(classifier, real))
    for name in (REFERENCE, HOLD_OUT_REFERENCE):
        statistics.save(judge / name)
    recipe = tmp_path / "recipe.toml"
    values = tiny_train_settings(teacher_folder, pictures, tmp_path).model_dump(mode="json", exclude_unset=True)
    lines = [f"[{section}]" + "".join(f"\n{key} = {json.dumps(value)}" for key, value in own.items())
             for section, own in values.items()]  # fmt: skip
    recipe.write_text("\n".join(lines), encoding="utf-8")
    contest = Contest("tiny", recipe, {"run.sample_images": 1}, judge, 1.5, tmp_path / "runs", num_images=8, curve_images=8,
                      num_real=8, shown=4, batch_size=8, num_pairs=4)  # fmt: skip
    monkeypatch.setitem(SETS, "tiny", lambda folder: contest)
    return contest


def call(contest: Contest, *words: str) -> list[quality.Row]:
    folder = contest.folder
    return quality.main(
        ["tiny", *words, "--images", "90", "--folder", str(folder), "--results", str(folder / "results")]
    )


def test_variants_do_equal_work_and_rows_are_kept(
    tiny: Contest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tiny, "shipped", "--seeds", "2")
    rows = call(tiny, "slow", "--set", "training.generator_every=1", "--seeds", "1")
    assert [(row.variant, row.seed, row.steps) for row in rows] == [
        ("shipped", 0, 4),
        ("shipped", 1, 4),
        ("slow", 0, 3),
    ]
    assert rows[0].frechet_distance != rows[1].frechet_distance
    assert rows[2].changes == {"training.generator_every": "1"}
    assert all(row.recall is not None and row.diversity > 0 and len(row.curve) >= 2 for row in rows)
    assert all(rows[0].machine[name] for name in ("instructions", "commit", "torch"))
    shown = capsys.readouterr().out
    assert "| shipped | 2 | 4 |" in shown
    assert f"{rows[2].frechet_distance:.3f} |" in shown
    assert "± is the standard deviation over seeds." in (tiny.folder / "tiny-90.html").read_text(encoding="utf-8")
    monkeypatch.setattr(quality, "run_variant", None)  # nothing is made twice
    assert call(tiny, "shipped", "--seeds", "2") == rows


@pytest.mark.parametrize("changes", [
    {}, {"losses.gan_generator_weight": 0, "losses.gan_discriminator_weight": 0}, {"training.generator_every": 1},
    {"losses.regression_weight": 0.25, "data.pairs": PAIRS}, {"generator.step_indices": [999, 749, 499]},
    {"generator.step_indices": [999, 749, 499], "generator.training_inputs": "noised_data"},
])  # fmt: skip
def test_images_through_the_networks_are_counted(
    tiny: Contest, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every forward there is in twelve steps, which simulate each step of a generator equally often."""
    settings = tiny.settings(tiny.filled(changes))
    job = DistillationJob(settings, open_teacher(settings))
    seen = Counter[str]()
    roles, kinds = job.run.roles, set()
    for role in (roles.teacher, roles.generator, roles.fake_score):
        kinds.add(type(role))
    assert len(kinds) == 1
    forward = kinds.pop().forward

    def counted(self: Denoiser, noisy: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen["images"] += len(noisy)
        return forward(self, noisy, *rest, **more)

    monkeypatch.setattr(type(roles.teacher), "forward", counted)
    for step in range(12):
        job.step(step, 0.0)
    assert seen["images"] / 12 == pytest.approx(
        images_per_step(settings), rel=0.2 if "generator.step_indices" in changes else 1e-9
    )


def test_what_is_no_variant(tiny: Contest) -> None:
    with pytest.raises(UserError, match="nonsense is no known variant"):
        call(tiny, "nonsense")
    with pytest.raises(UserError, match="no-gan is a known variant; give the changes of --set a name of their own"):
        call(tiny, "no-gan", "--set", "training.generator_every=1")
    with pytest.raises(UserError, match="has no row of 90 images; name a variant: shipped"):
        call(tiny)


def test_variants_are_settings_of_the_shipped_set(tmp_path: Path) -> None:
    contest = SETS["fashion-mnist"](tmp_path)
    for changes in VARIANTS.values():
        contest.settings({key: "" if value == PAIRS else value for key, value in changes.items()})
    assert [SETS[name](tmp_path).settings({}).generator.step_indices for name in ("emoji", "emoji-one-step")] == [
        (999, 749, 499, 249), (599,)
    ]  # fmt: skip


def test_a_mean_of_what_is_known() -> None:
    assert quality.spread([1.0, 2.0]) == "1.500 ± 0.707"
    assert quality.spread([None, 1.0]) == "1.000"
    assert quality.spread([None]) == "-"


@pytest.mark.parametrize(("name", "images"), [("fashion-mnist", 70_000), ("emoji", 34_000), ("emoji-one-step", 34_000)])
def test_the_record_is_what_the_command_prints(name: str, images: int) -> None:
    """Tables of docs/quality.md are those of the stored rows; a row that is called shipped changes nothing of its recipe."""
    rows = [row for row in quality.read_rows(quality.RESULTS / f"quality_{name}.json") if row.images == images]
    record = (Path(__file__).parents[2] / "docs/quality.md").read_text(encoding="utf-8")
    assert quality.as_markdown(rows) in record
    assert not any(row.changes for row in rows if row.variant == "shipped")
