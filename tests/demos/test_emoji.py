"""The text quick start for a few seconds: on a stand-in for what ships, and on what ships."""

import ast
import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fewstep
from fewstep.demos import emoji, runner
from fewstep.demos.emoji import run_text_quickstart
from fewstep.errors import UserError
from fewstep.evaluation.bench import load_bench
from fewstep.evaluation.measurement import Measurement
from fewstep.evaluation.text_following import group_of, measure_text_following
from fewstep.formats import bundled
from fewstep.formats.bundled import bundled_models, bundled_path
from fewstep.models.load import load_model
from tests.cli.test_main import fewstep as run
from tests.emoji_assets import HELD_OUT, TEACHER_STEPS, TRAIN, made_once

ASSETS = bundled.ASSETS
FEW = dataclasses.replace(emoji.FACTS, measured=8, curve_images=8, fewest=8, batch_size=8, sampled=4)


MINUTES = 0.02


def refuse(*args: object) -> None:
    raise AssertionError("the quick start opened a network connection")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory) / "assets"


@pytest.fixture
def shipped(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is what ships."""
    monkeypatch.setattr(bundled, "ASSETS", assets)
    return assets


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text quick start of one second with networking off."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "ASSETS", assets)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(emoji, "FACTS", FEW)
        patch.setattr(runner, "TIMING_SECONDS", 0.0)
        run_text_quickstart(folder, minutes=MINUTES, console=Console(quiet=True))
    return folder


def test_report_is_one_self_contained_page(finished: Path) -> None:
    """One prompt of each group known and unseen: pairs with the teacher, and the real picture of the unseen ones."""
    page = (finished / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2 * 2 + 2 * 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert [text.rpartition(", ")[2] for text in captions] == ["flags", "food"] * 2
    assert set(captions[:2]) <= set(TRAIN)
    assert set(captions[2:]) <= set(HELD_OUT)
    assert "<polyline" in page
    assert (finished / "side_by_side.png").is_file()


def test_figures_stand_in_the_report(finished: Path, assets: Path) -> None:
    page, figures = (finished / "report.html").read_text(), json.loads((finished / "report.json").read_text())
    for role in ("teacher", "generator"):
        found = Measurement.from_dict(figures[role])
        assert f"{found.values['frechet_distance']} ({found.num_images})" in page
        assert f"{found['held_out_distance']:.3f} (4)" in page
    assert figures["teacher"]["evaluations_per_image"] == TEACHER_STEPS
    assert figures["generator"]["evaluations_per_image"] == 4
    assert "frechet_distance" not in figures["real"]
    assert f"{figures['real']['held_out_distance']:.3f} (4)" in page
    assert figures["curve"]
    assert all(distance > 0 and count == 8 for _, distance, count in figures["curve"])
    assert "8 pictures behind each point, 6 behind the teacher&#39;s line" in page
    assert page.count("fewer than a Frechet distance") == 6  # 8, 6 and 4 pictures, and 10 real ones, for 128 features
    on_curve = json.loads((assets / "emoji/teacher_measurement.json").read_text())["emoji-sd"]["on_curve"]
    assert re.search(rf"teacher {on_curve['frechet_distance']:.2f}|teacher {on_curve['frechet_distance']:.3g}", page)
    speeds = [figures[role]["images_per_second"] for role in ("generator", "teacher")]
    assert figures["speedup"] == pytest.approx(speeds[0] / speeds[1])


def test_the_result_is_a_lora_that_finds_its_base(finished: Path, shipped: Path) -> None:
    generator = fewstep.load_generator(finished, device="cpu")
    assert generator.is_generator
    assert generator.base == "bundled:emoji-sd"
    assert (finished / "generator/adapter.safetensors").is_file()
    assert generator.sample(["red cat, food"], seed=3, output="tensor").shape == (1, 3, 64, 64)
    assert (finished / "samples/prompts.txt").read_text().splitlines()[0] in TRAIN


def test_the_same_command_goes_on(finished: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is spent: nothing is trained, the report is written again; another seed is another run."""
    monkeypatch.setattr(emoji, "FACTS", FEW)
    monkeypatch.setattr(runner, "TIMING_SECONDS", 0.0)
    before = (finished / "metrics.jsonl").read_text()
    (finished / "report.html").unlink()
    run_text_quickstart(finished, minutes=MINUTES, console=Console(quiet=True))
    assert (finished / "report.html").is_file()
    assert (finished / "metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match=r"training\.seed was 0, is 1"):
        run_text_quickstart(finished, minutes=MINUTES, seed=1, console=Console(quiet=True))


def test_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than 0 minutes"):
        run_text_quickstart(tmp_path / "run", minutes=0)


# --- What ships, by name


def test_names_of_what_ships(shipped: Path) -> None:
    assert bundled_models() == {"emoji-sd": shipped / "emoji/sd", "emoji-sdxl": shipped / "emoji/sdxl"}
    assert bundled_path("emoji-sd") == bundled_path("emoji/sd") == shipped / "emoji/sd"
    assert bundled_path("emoji/prompts_train.txt").is_file()
    for name in ("nothing", "emoji/nothing.txt", "../emoji/sd", "emoji/../emoji", "", "/etc"):
        sentence = f"bundled:{name} does not ship with this version; bundled:emoji-sd, bundled:emoji-sdxl do"
        with pytest.raises(UserError, match=re.escape(sentence)):
            bundled_path(name)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_bundled_teacher_is_a_text_teacher_everywhere(shipped: Path, tmp_path: Path, name: str) -> None:
    for load in (fewstep.load_teacher, load_model):
        teacher = load(f"bundled:emoji-{name}", device="cpu")
        assert not teacher.is_generator
        assert (teacher.family.name, teacher.base) == (name, f"bundled:emoji-{name}")
    prompts = shipped / "emoji/prompts_train.txt"
    answer = run("prepare", "embeddings", f"bundled:emoji-{name}", prompts, tmp_path / "embeddings", "--device", "cpu")
    assert answer.code == 0, answer.err
    answer = run(
        "sample", f"bundled:emoji-{name}", "--prompts", "bundled:emoji/held_out.parquet", "--teacher-steps", 2,
        "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert len(list((tmp_path / "out").iterdir())) == len(HELD_OUT)
    answer = run(
        "evaluate", f"bundled:emoji-{name}", "--features", "bundled:emoji", "--prompts", "bundled:emoji/prompts_train.txt",
        "--reference", "bundled:emoji/reference_train.npz", "--num-images", 4, "--teacher-steps", 2, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "emoji-classifier" in answer.out


RECIPES = {
    "emoji_dmd2_4step_lora": (999, 749, 499, 249), "emoji_dmd2_4step": (999, 749, 499, 249), "emoji_dmd2_1step": (599,),
    "emoji_sdxl_dmd2_4step_lora": (999, 749, 499, 249), "emoji_sdxl_dmd2_1step": (399,),
}  # fmt: skip
RECIPE_FOLDER = Path(__file__).parents[2] / "recipes"


def test_every_emoji_recipe_is_run_and_told_of() -> None:
    """That of a teacher which does not ship is run by tests/examples/test_train_emoji_z_image.py."""
    assert {path.stem for path in RECIPE_FOLDER.glob("emoji_*.toml")} == {*RECIPES, "emoji_z_image_dmd2_4step_lora"}
    page = (RECIPE_FOLDER.parent / "docs/text-quickstart.md").read_text()
    assert [name for name in RECIPES if f"| `recipes/{name}.toml` |" not in page] == []


# the others in the long run
SOME = ("emoji_sdxl_dmd2_4step_lora",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in SOME else pytest.mark.long) for name in RECIPES]
)
def test_recipes_need_nothing_else(shipped: Path, tmp_path: Path, recipe: str) -> None:
    file = RECIPE_FOLDER / f"{recipe}.toml"
    answer = run(
        "train", file, "training.num_steps=2", "training.batch_size=2", "run.sample_images=2", "compute.device=cpu",
        f"run.folder={tmp_path / 'run'}", "best.num_images=50",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    generator = load_model(tmp_path / "run", device="cpu")
    assert generator.is_generator
    assert generator.card.step_indices == RECIPES[recipe]
    assert generator.base == f"bundled:emoji-{'sdxl' if 'sdxl' in recipe else 'sd'}"
    assert (tmp_path / "run/generator/adapter.safetensors").is_file() == recipe.endswith("lora")


def test_an_unknown_teacher_lists_what_exists(shipped: Path, tmp_path: Path) -> None:
    answer = run("sample", "bundled:emoji-sd3", "--prompt", "cat", "--out", tmp_path / "out")
    assert answer.code == 2
    assert answer.err == (
        "fewstep: bundled:emoji-sd3 does not ship with this version; bundled:emoji-sd, bundled:emoji-sdxl do\n"
    )


# --- The real files


def test_the_set_ships_whole() -> None:
    """What PROVENANCE.md lists is there; without it every test below would fail, none is skipped."""
    page = (ASSETS / "emoji/PROVENANCE.md").read_text()
    named = re.findall(
        r"`([\w./]+)`", " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    )
    assert "teacher_measurement.json" in named
    assert [name for name in named if not (ASSETS / "emoji" / name).exists()] == []
    measured = json.loads((ASSETS / "emoji/teacher_measurement.json").read_text())
    assert measured.keys() == {"emoji-sd", "emoji-sdxl"}


def test_making_the_set_again_takes_what_ships_took() -> None:
    source = (RECIPE_FOLDER.parent / "examples/train_emoji_teacher.py").read_text()
    defaults = ast.literal_eval(re.search(r"MINUTES = (\{.*?\})", source)[1])  # type: ignore[index]
    cards = [(ASSETS / f"emoji/{name}/README.md").read_text() for name in ("sd", "sdxl")]
    took = {
        stage: float(minutes) for card in cards for stage, minutes in re.findall(r"--stage (\w+) --minutes (\d+)", card)
    }
    assert defaults == took
    told = dict(re.findall(r"--stage (\w+) +# (\d+) minutes", source))
    assert {stage: float(minutes) for stage, minutes in told.items()} == took


@pytest.mark.long
def test_on_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", refuse)
    few = dataclasses.replace(emoji.FACTS, measured=140, curve_images=130, fewest=130, shown=6, sampled=4)
    monkeypatch.setattr(emoji, "FACTS", few)
    run_text_quickstart(tmp_path / "run", minutes=0.1, console=Console(quiet=True))
    figures = json.loads((tmp_path / "run/report.json").read_text())
    assert figures["speedup"] > 3
    assert figures["real"]["agreement"] > 2 * figures["real"]["shuffled"]
    generator = fewstep.load_generator(tmp_path / "run", device="cpu")
    assert generator.is_generator
    assert generator.sample(["red apple, food & drink"], output="tensor").shape == (1, 3, 64, 64)


def test_shipped_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in (ASSETS / "emoji").rglob("*") if path.is_file()) < 30e6


@pytest.mark.long
def test_shipped_figures_can_be_repeated() -> None:
    bench = load_bench(ASSETS / "emoji")
    features = json.loads((ASSETS / "emoji/feature_measurement.json").read_text())
    real = bench.real()
    assert real["agreement"] == pytest.approx(features["held_out"]["agreement"], abs=0.02)
    assert real["held_out_distance"] == pytest.approx(features["floor"], rel=0.02)
    shipped = json.loads((ASSETS / "emoji/teacher_measurement.json").read_text())["emoji-sd"]
    teacher = fewstep.load_teacher("bundled:emoji-sd", device="cpu", precision="fp32")
    assert not teacher.is_generator
    part = bench.held_out[:48]  # all 153 would take minutes
    images = teacher.sample(
        part, num_inference_steps=50, guidance_scale=shipped["guidance_scale"], batch_size=16, output="tensor"
    )
    found = measure_text_following(bench.classifier, images, [group_of(text) for text in part])
    assert found["agreement"].value == pytest.approx(shipped["following"]["agreement"], abs=0.15)
    assert found["agreement"].value > 2 * found["shuffled"].value
    assert torch.isfinite(images).all()
