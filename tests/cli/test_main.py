"""The command line as a user types it: every command end to end on tiny models, in this process."""

import contextlib
import io
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import __version__, progress
from fewstep.cli import main as cli
from fewstep.data.noise_image_pairs import NoiseImagePairs
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.formats.pixels import make_grid, to_uint8
from fewstep.models import sampling as commands_sample
from fewstep.models.load import load_generator, load_teacher
from fewstep.settings import PretrainSettings, TrainSettings, Tree, describe_settings
from tests.conftest import tiny_denoiser

PRETRAIN_RECIPE = """
[network]
name = "tiny"
img_resolution = 16
img_channels = 1
label_dim = 4

[training]
num_steps = 3
batch_size = 4

[compute]
device = "cpu"
precision = "fp32"

[run]
sample_images = 4
checkpoint_every = 2
"""

TRAIN_RECIPE = """
[losses]
gan_generator_weight = 3e-3
gan_discriminator_weight = 1e-2

[training]
num_steps = 3
batch_size = 4
generator_every = 2

[compute]
device = "cpu"
precision = "fp32"

[run]
sample_images = 4
checkpoint_every = 2
"""


class Answer(NamedTuple):
    """What a command left behind."""

    code: Any
    out: str
    err: str


def fewstep(*arguments: object) -> Answer:
    """Run the command line in this process; anything but a normal end or an exit code is an error of the test.

    Lines about work that takes long are left out: what a command says does not depend on the machine.
    """
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    argv = ["fewstep", *map(str, arguments)]
    patient = mock.patch.object(progress, "PATIENCE_SECONDS", 3600.0)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patient,
        mock.patch.object(sys, "argv", argv),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return Answer(code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "generator"
    denoiser = tiny_denoiser(seed=3)
    card = ModelCard(role="generator", step_indices=(999, 499))
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def features_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features") / "net"
    SmallClassifier(channels=1, num_classes=4, width=4, name="four classes").eval().save(folder)
    return folder


# --- Help


def test_help_is_fast_and_leaves_torch_alone() -> None:
    """Under 2 seconds of this machine's time, whatever else it is doing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = "import sys; from fewstep.cli.main import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("quickstart", "pretrain", "train", "settings", "sample", "evaluate", "prepare"):
        assert re.search(rf"\b{command}\b", done.stdout), command


@pytest.mark.parametrize(
    "command",
    [
        "quickstart",
        "pretrain",
        "train",
        "settings",
        "sample",
        "evaluate",
        "prepare pairs",
        "prepare features",
        "prepare statistics",
    ],
)
def test_every_command_has_help(command: str) -> None:
    answer = fewstep(*command.split(), "--help")
    assert answer.code == 0
    assert f"Usage: fewstep {command}" in answer.out


def test_version() -> None:
    from fewstep import __version__

    assert fewstep("--version") == Answer(0, f"fewstep {__version__}\n", "")


def test_no_command_is_no_success() -> None:
    assert fewstep().code == 2
    assert fewstep("distill").code == 2


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands_sample, "sample_pictures", interrupt)
    assert fewstep("sample", "model").code == 130


def test_ctrl_c_prints_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands_sample, "sample_pictures", interrupt)
    assert (
        fewstep("sample", "model").err.splitlines()[-1] == "fewstep: stopped by Ctrl-C"
    )  # there is nothing to continue


# --- Settings


@pytest.mark.parametrize(("command", "kind"), [("train", TrainSettings), ("pretrain", PretrainSettings)])
def test_settings_lists_every_key(monkeypatch: pytest.MonkeyPatch, command: str, kind: type[Tree]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = fewstep("settings", command)
    assert answer.code == 0
    for key, _, default, meaning in describe_settings(kind):
        (line,) = [line for line in answer.out.splitlines() if re.search(rf"[ │]{re.escape(key)} ", line)]
        assert default in line, key
        assert meaning.split()[0] in line, key


def test_keys_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = fewstep("settings", "train").out
    assert [key for key, *_ in describe_settings(TrainSettings) if key not in listed] == []


def test_settings_of_nothing() -> None:
    answer = fewstep("settings", "sample")
    assert answer.code == 2
    assert answer.err == "fewstep: settings of 'sample'? choose train or pretrain\n"


# --- Two commands from pictures to a generator


@pytest.mark.slow
def test_pretrain_then_train(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to runs/<recipe name>, overrides win over the recipe, and the same command goes on where it ended."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(PRETRAIN_RECIPE)
    Path("mine_dmd2.toml").write_text(TRAIN_RECIPE)

    answer = fewstep("pretrain", "mine.toml", f"data.images={pictures}", "training.batch_size=2")
    assert (answer.code, answer.out) == (0, "runs/mine/teacher\n")
    assert json.loads(Path("runs/mine/settings.json").read_text())["training"]["batch_size"] == 2

    overrides = [f"data.images={pictures}", "teacher.path=runs/mine"]
    answer = fewstep("train", "mine_dmd2.toml", *overrides)
    assert (answer.code, answer.out) == (0, "runs/mine_dmd2/generator\n")
    generator = load_generator("runs/mine_dmd2")
    assert generator.evaluations() == 1
    assert generator.card.class_names == ("class0", "class1", "class2", "class3")
    assert generator.card.made_with["num_steps"] == 3

    answer = fewstep("train", "mine_dmd2.toml", *overrides, "training.num_steps=4")
    assert answer.code == 0
    assert load_generator("runs/mine_dmd2").card.made_with["num_steps"] == 4
    lines = [json.loads(line) for line in Path("runs/mine_dmd2/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "seconds" in line] == [0, 1, 2, 3]


# --- sample


def test_sample_a_generator(generator_folder: Path, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.png", tmp_path / "new/pictures"
    answer = fewstep(
        "sample", generator_folder, "--num-images", 5, "--labels", "3,1", "--seed", 4, "--batch-size", 2,
        "--grid", grid, "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0
    assert "5 pictures, 2 evaluations each" in answer.err
    images = load_generator(generator_folder, device="cpu").sample(5, labels=[3, 1, 3, 1, 3], seed=4, output="tensor")
    with Image.open(grid) as picture:
        assert picture.tobytes() == make_grid(images, columns=2).tobytes()
    assert sorted(path.name for path in out.iterdir()) == [f"{number:05d}.png" for number in range(5)]
    for number, pixels in enumerate(to_uint8(images)[:, 0].numpy()):
        with Image.open(out / f"{number:05d}.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels)
            facts = picture.text  # type: ignore[attr-defined]
        assert facts == {
            "fewstep:model": str(generator_folder), "fewstep:seed": "4", "fewstep:image": str(number),
            "fewstep:evaluations": "2", "fewstep:label": "31313"[number], "fewstep:schedule": "999,499 of 1000",
            "fewstep:precision": "fp32", "fewstep:version": __version__, "fewstep:size": "16x16",
        }  # fmt: skip


def test_sample_a_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    answer = fewstep(
        "sample", teacher_folder, "--num-images", 3, "--teacher-steps", 4, "--guidance-scale", 2,
        "--grid", tmp_path / "grid.png", "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0
    assert "3 pictures, 7 evaluations each" in answer.err
    images = load_teacher(teacher_folder, device="cpu").sample(
        3, num_inference_steps=4, guidance_scale=2.0, output="tensor"
    )
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.tobytes() == make_grid(images, columns=2).tobytes()


def test_sample_in_colour(tmp_path: Path) -> None:
    denoiser = tiny_denoiser(num_classes=0, channels=3)
    card = ModelCard(role="generator", step_indices=(999,))
    write_model_folder(tmp_path / "model", denoiser.describe(), denoiser.state_dict(), card)
    answer = fewstep("sample", tmp_path / "model", "--num-images", 1, "--out", tmp_path / "out", "--device", "cpu")
    assert answer.code == 0
    expected = (
        to_uint8(load_generator(tmp_path / "model", device="cpu").sample(1, output="tensor"))[0]
        .permute(1, 2, 0)
        .numpy()
    )
    with Image.open(tmp_path / "out/00000.png") as picture:
        assert np.array_equal(np.asarray(picture), expected)


# --- evaluate and prepare


def evaluate(*arguments: object) -> Answer:
    return fewstep("evaluate", *arguments, "--device", "cpu")


@pytest.mark.slow
def test_evaluate_against_statistics(
    generator_folder: Path, features_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """`prepare statistics` once, then one figure with everything beside it."""
    reference, figure = tmp_path / "reference.npz", tmp_path / "figure.json"
    answer = fewstep(
        "prepare", "statistics", pictures, reference, "--features", features_folder, "--resolution", 16,
        "--channels", 1, "--device", "cpu",
    )  # fmt: skip
    assert (answer.code, answer.out) == (0, f"{reference}: 24 images of 16x16x1, features four classes\n")
    assert FeatureStatistics.load(reference).num_images == 24

    answer = evaluate(
        generator_folder, "--features", features_folder, "--reference", reference, "--num-images", 10, "--seed", 5,
        "--batch-size", 3, "--json", figure,
    )  # fmt: skip
    assert answer.code == 0
    found = json.loads(figure.read_text())
    assert (found["num_images"], found["num_reference_images"], found["seed"]) == (10, 24, 5)
    assert (found["features"], found["evaluations_per_image"]) == ("four classes", 2)
    assert "precision" not in found  # needs real pictures
    assert re.search(r"Frechet distance \d\.\d+ ± \d\.\d+ \(10 images against 24 real ones", answer.out)
    assert "features four classes, 2 evaluations per image, seed 5, float32; " in answer.out
    assert found["dtype"] == "float32"
    evaluate(
        generator_folder, "--features", features_folder, "--reference", reference, "--num-images", 10, "--seed", 6,
        "--json", figure,
    )  # fmt: skip
    other = json.loads(figure.read_text())
    assert other["seed"] == 6
    assert other["frechet_distance"] != pytest.approx(found["frechet_distance"], rel=1e-4)


@pytest.mark.slow
def test_evaluate_against_pictures(teacher_folder: Path, features_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Real pictures give the reference, and precision and recall with it."""
    figure = tmp_path / "figure.json"
    answer = evaluate(
        teacher_folder, "--features", features_folder, "--images", pictures, "--num-images", 8, "--teacher-steps", 2,
        "--json", figure,
    )  # fmt: skip
    assert answer.code == 0
    found = json.loads(figure.read_text())
    assert (found["evaluations_per_image"], found["num_reference_images"]) == (3, 24)
    assert 0 <= found["precision"] <= 1
    assert re.search(
        r", precision \d\.\d{3} ± \d\.\d+, recall [^,]+ ± [^,]+, density [^,]+ ± [^,]+, coverage [^,]+ ± \d\.\d+ \(8 images against 24 real ones",
        answer.out,
    )


def test_prepare_pairs(teacher_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    arguments = (
        "prepare", "pairs", teacher_folder, folder, "--num-pairs", 5, "--teacher-steps", 2, "--seed", 3,
        "--batch-size", 2, "--device", "cpu",
    )  # fmt: skip
    answer = fewstep(*arguments)
    assert (answer.code, answer.out) == (0, f"{folder}\n")
    pairs = NoiseImagePairs(folder)
    assert len(pairs) == 5
    assert pairs.manifest["job"]["num_steps"] == 2
    assert fewstep(*arguments).code == 0  # nothing left to do


@pytest.mark.slow
def test_prepare_features(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    answer = fewstep(
        "prepare", "features", pictures, folder, "--num-classes", 4, "--resolution", 16, "--channels", 1,
        "--num-passes", 22, "--name", "mine", "--device", "cpu",
    )  # fmt: skip
    assert (answer.code, answer.out) == (0, f"{folder}\n")
    assert "no split `test`" in answer.err
    assert SmallClassifier.load(folder).name == "mine"


@pytest.mark.slow
def test_prepare_features_reports_the_accuracy_on_unseen_pictures(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(2):
            place = tmp_path / "data" / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(3):
                Image.new("L", (16, 16), 200 * label).save(place / f"{number}.png")
    answer = fewstep(
        "prepare", "features", tmp_path / "data", tmp_path / "features", "--num-classes", 2, "--resolution", 16,
        "--channels", 1, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0
    assert re.search(r"accuracy on the 6 pictures of split test: [01]\.\d{4}", answer.err)


def test_quickstart_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fewstep.demos import fashion_mnist as quickstart

    run: Callable[..., Any] = mock.Mock()
    monkeypatch.setattr(quickstart, "run_quickstart", run)
    assert fewstep("quickstart", "--minutes", 0.5, "--folder", tmp_path, "--seed", 3).code == 0
    assert fewstep("quickstart").code == 0
    assert run.call_args_list == [  # type: ignore[attr-defined]
        mock.call(tmp_path, minutes=0.5, seed=3), mock.call(Path("runs/quickstart"), minutes=5.0, seed=0),
    ]  # fmt: skip


def test_nothing_is_said_in_pillows_words(tmp_path: Path) -> None:
    """A picture of 100 million pixels is no bomb, and no warning with a line of code."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "x.png")
    assert fewstep("--version").code == 0
    Image.open(tmp_path / "x.png").close()  # warnings are errors in tests
