"""Bad input at the command line: one sentence that names the file or the setting, exit code 2, nothing half-written."""

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.evaluation.features import SmallClassifier
from fewstep.formats.model_folder import WEIGHTS, ModelCard, write_model_folder
from fewstep.models.load import load_teacher
from fewstep.preparation.pairs import prepare_pairs
from tests.cli.test_main import PRETRAIN_RECIPE, TRAIN_RECIPE, Answer, fewstep
from tests.conftest import tiny_denoiser, write_pictures
from tests.training.test_checkpoint import small_disk


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two recipes; runs go below `runs/`."""
    monkeypatch.chdir(tmp_path)
    Path("teacher.toml").write_text(PRETRAIN_RECIPE)
    Path("student.toml").write_text(TRAIN_RECIPE)
    return tmp_path


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@contextlib.contextmanager
def nothing_written() -> Iterator[None]:
    """No file or folder appears, disappears or changes below the working folder."""
    before, folders = files(), {str(path) for path in Path().rglob("*")}
    yield
    assert files() == before
    assert {str(path) for path in Path().rglob("*")} == folders


def assert_refused(answer: Answer, *told: str) -> None:
    """Exit code 2 and a last line, which says all of `told`."""
    assert answer.code == 2, answer.err
    assert answer.out == ""
    *before, line = answer.err.splitlines()
    assert line.startswith("fewstep: ")
    assert len(line) < 700
    assert not [other for other in before if other.startswith("fewstep: ") or "Traceback" in other], answer.err
    for part in told:
        assert part in line


@pytest.fixture
def train(teacher_folder: Path, pictures: Path) -> Callable[..., Answer]:
    """`fewstep train` on the tiny teacher and pictures, with overrides."""
    return lambda *overrides: fewstep(
        "train", "student.toml", f"teacher.path={teacher_folder}", f"data.images={pictures}", *overrides
    )


def copy_teacher(teacher_folder: Path) -> Path:
    return Path(shutil.copytree(teacher_folder, "damaged"))


def write_teacher(name: str, card: ModelCard | None = None, **options: Any) -> Path:
    denoiser = tiny_denoiser(**options)
    folder = Path(name)
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card or ModelCard("teacher"))
    return folder


# --- The teacher


def test_missing_teacher(train: Any) -> None:
    with nothing_written():
        assert_refused(
            train("teacher.path=teachers/edm.pkl"), "teachers/edm.pkl", "does not exist; give a model folder"
        )


def test_no_teacher(train: Any) -> None:
    with nothing_written():
        assert_refused(train("teacher.path=''"), "teacher.path is not set", "bundled:fashion-mnist")


def test_truncated_teacher(train: Any, teacher_folder: Path) -> None:
    path = copy_teacher(teacher_folder) / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with nothing_written():
        assert_refused(
            train("teacher.path=damaged"), f"damaged/{WEIGHTS} cannot be read", "copy or export the model again"
        )


def test_teacher_with_another_networks_weights(train: Any, teacher_folder: Path) -> None:
    save_file(tiny_denoiser(channels=3).state_dict(), copy_teacher(teacher_folder) / WEIGHTS)
    with nothing_written():
        assert_refused(train("teacher.path=damaged"), "damaged holds another network than it describes")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04garbage.", b"PK\x03\x04"])
def test_teacher_pickle_of_garbage(train: Any, content: bytes) -> None:
    Path("edm.pkl").write_bytes(content)
    with nothing_written():
        assert_refused(train("teacher.path=edm.pkl"), "edm.pkl: not a readable EDM checkpoint", "give another file")


def test_teacher_that_is_another_file(train: Any) -> None:
    Path("notes.txt").write_text("mine")
    Path("empty").mkdir()
    with nothing_written():
        assert_refused(train("teacher.path=notes.txt"), "notes.txt is neither a model folder nor an EDM .pkl")
        assert_refused(train("teacher.path=empty"), "empty is not a fewstep model", "is missing")


def test_teacher_of_another_shape_than_the_recipe(train: Any) -> None:
    with nothing_written():
        assert_refused(train("teacher.network=imagenet64-adm"), "teacher.path=", "teacher.network=''")


@pytest.mark.parametrize("source", ["teachers/edm.pkl", "empty", "notes.txt", "bundled:cifar10"])
def test_missing_model_for_the_other_commands(source: str) -> None:
    Path("notes.txt").write_text("mine")
    Path("empty").mkdir()
    commands = (
        ("sample", source, "--grid", "grid.png"),
        ("evaluate", source, "--features", "bundled:fashion-mnist", "--reference", "reference.npz"),
        ("prepare", "pairs", source, "pairs"),
    )
    with nothing_written():
        for command in commands:
            assert_refused(fewstep(*command), source)


# --- The pictures


def test_picture_that_does_not_decode(train: Any) -> None:
    path = write_pictures(Path("pictures"), count=8) / "train/class1/001.png"
    path.write_bytes(path.read_bytes()[:40])
    told = ("001.png does not decode", "replace or remove it")
    with nothing_written():
        assert_refused(train("data.images=pictures"), *told)
        assert_refused(fewstep("pretrain", "teacher.toml", "data.images=pictures"), *told)


def test_file_that_is_no_picture(train: Any) -> None:
    (write_pictures(Path("pictures"), count=8) / "train/class1/001.png").write_text("hello")
    with nothing_written():
        assert_refused(train("data.images=pictures"), "001.png does not decode")


def test_folder_without_pictures(train: Any) -> None:
    Path("pictures").mkdir()
    Path("pictures/readme.txt").write_text("soon")
    with nothing_written():
        assert_refused(train("data.images=pictures"), "data.images=pictures: no picture in this folder")
        assert_refused(
            fewstep("prepare", "features", "pictures", "net", "--num-classes", 2), "data.images=pictures: no picture"
        )


@pytest.mark.parametrize(
    "name", ["./pictures", "/nowhere/pictures", "a/b/pictures", "missing.parquet", "no-such-pictures"]
)
def test_missing_pictures(train: Any, name: str) -> None:
    with nothing_written():
        assert_refused(train(f"data.images={name}"), f"data.images={name}")


def test_no_pictures(train: Any) -> None:
    with nothing_written():
        assert_refused(train("data.images=''"), "data.images is not set")
        assert_refused(fewstep("pretrain", "teacher.toml"), "data.images is not set")


def test_missing_split(train: Any) -> None:
    with nothing_written():
        assert_refused(train("data.split=validation"), "split 'validation'")


# --- Labels


def test_classes_with_other_names_than_the_teachers(train: Any) -> None:
    write_pictures(Path("pictures"), count=8)
    for label in range(4):
        Path(f"pictures/train/class{label}").rename(f"pictures/train/animal{label}")
    with nothing_written():
        assert_refused(
            train("data.images=pictures"),
            "the classes of data.images (animal0, animal1",
            "are not the teacher's (class0, class1",
        )


def test_fewer_classes_than_a_teacher_without_names_has(train: Any) -> None:
    """Folders are numbered in their order: of a subset, each would be taken for another class, without a word."""
    plain, images = write_teacher("plain"), write_pictures(Path("pictures"), count=8, classes=2)
    with nothing_written():
        assert_refused(
            train(f"data.images={images}", f"teacher.path={plain}"),
            "data.images has 2 classes (class0, class1, ...) and the teacher 4 without names",
        )


def test_classes_that_change_their_numbers_in_the_middle_of_a_run() -> None:
    images = write_pictures(Path("pictures"), count=8)
    assert fewstep("pretrain", "teacher.toml", f"data.images={images}", "run.folder=runs/one").code == 0
    Path("pictures/train/class0").rename("pictures/train/last")
    go_on = ("training.num_steps=100", "run.folder=runs/one", "--data-changed")
    told = "began with the classes class0, class1, class2, class3 in this order, the pictures now have class1"
    assert_refused(fewstep("pretrain", "teacher.toml", f"data.images={images}", *go_on), told)


def test_more_classes_than_the_teacher_has(train: Any) -> None:
    write_pictures(Path("pictures"), count=12, classes=6)
    with nothing_written():
        assert_refused(
            train("data.images=pictures"),
            "data.images=pictures: labels run from 0 to 5, the model has 4 classes (0..3)",
        )


def test_pictures_without_labels(train: Any) -> None:
    Path("pictures").mkdir()
    for number in range(4):
        Image.new("L", (16, 16)).save(f"pictures/{number}.png")
    told = ("data.images=pictures: the model has 4 classes", "data.column='label'", "one folder a class")
    with nothing_written():
        assert_refused(train("data.images=pictures"), *told)
        assert_refused(fewstep("pretrain", "teacher.toml", "data.images=pictures"), *told)


def test_labels_out_of_range_when_sampling(teacher_folder: Path) -> None:
    with nothing_written():
        for labels in ("4", "0,7"):
            answer = fewstep("sample", teacher_folder, f"--labels={labels}", "--grid", "grid.png", "--device", "cpu")
            assert_refused(answer, "labels [", "do not fit the model's 4 classes")
        for labels in ("cat,dog", "-1"):
            answer = fewstep("sample", teacher_folder, f"--labels={labels}", "--grid", "grid.png")
            assert_refused(answer, f"--labels {labels}: give numbers or ranges separated by commas, e.g. 0,3,5-8")


# --- Resolution


def test_wrong_resolution(train: Any) -> None:
    write_pictures(Path("large"), count=8, size=20)
    write_pictures(Path("small"), count=8, size=8)
    with nothing_written():
        assert_refused(
            train("data.images=large", "data.fit=exact"), ".png has 20x20 pixels, the model 16x16", "data.fit='crop'"
        )
        assert_refused(train("data.images=large", "data.fit=pad"), "20x20", "data.fit='pad' cannot shrink it")
        assert_refused(train("data.images=small"), ".png has 8x8 pixels, the model 16x16", "use larger pictures")


def test_resolution_the_network_cannot_have(pictures: Path) -> None:
    with nothing_written():
        answer = fewstep("pretrain", "teacher.toml", f"data.images={pictures}", "network.img_resolution=18")
        assert_refused(answer, "network.img_resolution=18 must be a multiple of 4")


def test_unknown_network(pictures: Path) -> None:
    with nothing_written():
        answer = fewstep("pretrain", "teacher.toml", f"data.images={pictures}", "network.name=unet")
        assert_refused(answer, "network.name='unet' is unknown; choose one of", "small")


# --- Guidance


@pytest.mark.parametrize("classes", [0, 4])
def test_impossible_guidance(train: Any, classes: int) -> None:
    """A teacher without classes, and one that never saw an unconditional picture."""
    write_teacher("unguided", num_classes=classes)
    reason = "no condition to guide" if not classes else "trained without label dropout"
    pictures_free = "losses.gan_generator_weight=0", "losses.gan_discriminator_weight=0", "data.images=''"
    with nothing_written():
        assert_refused(
            train("teacher.path=unguided", "teacher.guidance_scale=1.5", *pictures_free),
            "guidance_scale=1.5",
            reason,
            "use 1",
        )
        assert_refused(
            fewstep("sample", "unguided", "--guidance-scale", 2, "--grid", "grid.png", "--device", "cpu"),
            "guidance_scale=2.0", reason,
        )  # fmt: skip
        assert_refused(
            fewstep("prepare", "pairs", "unguided", "pairs", "--guidance-scale", 2, "--device", "cpu"),
            "guidance_scale=2.0", reason,
        )  # fmt: skip


def test_guidance_below_zero(train: Any) -> None:
    with nothing_written():
        assert_refused(train("teacher.guidance_scale=-1"), "teacher.guidance_scale.0=-1", "greater than or equal to 0")


def test_guidance_of_a_generator() -> None:
    write_teacher("generator", ModelCard("generator", (999,)))
    with nothing_written():
        answer = fewstep("sample", "generator", "--guidance-scale", 2, "--grid", "grid.png", "--device", "cpu")
        assert_refused(answer, "--guidance-scale 2.0: a generator has its guidance built in")


# --- A full disk


def half_written() -> list[str]:
    """What a write that failed might leave."""
    return [str(path) for path in Path().rglob(".*") if "writing" in path.name]


def test_full_disk_at_a_checkpoint(train: Any) -> None:
    """The first checkpoint does not fit: no checkpoint, no generator, and the same command works once it does."""
    with small_disk(100_000):
        answer = train()
    assert answer.code == 2
    (line,) = [line for line in answer.err.splitlines() if line.startswith("fewstep: ")]
    assert "cannot write runs/student/checkpoints/step_00000002: " in line
    assert "nothing was left half-written. Free some space" in line
    assert list(Path("runs/student/checkpoints").iterdir()) == []
    assert not Path("runs/student/generator").exists()
    assert not half_written()
    assert train().code == 0


def test_full_disk_at_the_result(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later session cannot export: the generator of the session before stays."""
    assert train().code == 0
    before = {path: path.read_bytes() for path in Path("runs/student/generator").rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.formats.model_folder.write_tensor_file", full)
        answer = train("training.num_steps=4")
    assert answer.code == 2
    assert "fewstep: cannot write runs/student/generator: " in answer.err
    assert {path: path.read_bytes() for path in Path("runs/student/generator").rglob("*") if path.is_file()} == before
    assert not half_written()


def test_full_disk_at_the_metrics(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing a full disk refuses may be a line of metrics."""
    import builtins

    original = builtins.open

    def full(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("metrics.jsonl") and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return original(file, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        answer = train()
    assert answer.code == 2
    assert re.search(r"^fewstep: .*metrics\.jsonl", answer.err, re.MULTILINE)


def test_full_disk_at_pairs_features_statistics_and_pictures(
    teacher_folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallClassifier(1, 4).eval().save(Path("net"))
    size = ("--resolution", 16, "--channels", 1, "--device", "cpu")
    commands = {
        "pairs/pairs_00000.safetensors": (
            "prepare",
            "pairs",
            teacher_folder,
            "pairs",
            "--num-pairs",
            30,
            "--teacher-steps",
            1,
            "--device",
            "cpu",
        ),
        "new": ("prepare", "features", pictures, "new", "--num-classes", 4, *size),
        "reference.npz": ("prepare", "statistics", pictures, "reference.npz", "--features", "net", *size),
        "grid.png": (
            "sample",
            teacher_folder,
            "--num-images",
            100,
            "--teacher-steps",
            1,
            "--grid",
            "grid.png",
            "--device",
            "cpu",
        ),
    }
    for target, command in commands.items():
        with small_disk(2_000):
            answer = fewstep(*command)
        assert answer.code == 2, answer.err
        (line,) = [line for line in answer.err.splitlines() if line.startswith("fewstep: ")]
        assert f"cannot write {target}: " in line
        assert "ree some space" in line
        assert not Path(target).exists()
        assert not half_written()


# --- The run folder


def test_run_folder_of_other_settings(train: Any) -> None:
    assert train("training.num_steps=1").code == 0
    with nothing_written():
        answer = train("training.num_steps=2", "training.seed=5", "losses.gan_generator_weight=1e-3")
        assert_refused(
            answer, "runs/student holds a run of other settings", "training.seed was 0, is 5",
            "losses.gan_weights was [0.003, 0.01], is [0.001, 0.01]", "choose another run.folder",
        )  # fmt: skip


def test_run_folder_of_another_command(train: Any, pictures: Path) -> None:
    assert fewstep("pretrain", "teacher.toml", f"data.images={pictures}", "training.num_steps=1").code == 0
    with nothing_written():
        assert_refused(
            train("run.folder=runs/teacher"), "runs/teacher holds a run of another kind", "choose another run.folder"
        )


def test_run_folder_that_is_something_else(train: Any) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("...")
    with nothing_written():
        assert_refused(
            train("run.folder=thesis"), "thesis is not empty and no run of fewstep; choose another run.folder"
        )


def test_run_folder_that_is_a_file(train: Any) -> None:
    Path("notes.txt").write_text("mine")
    with nothing_written():
        assert_refused(train("run.folder=notes.txt"), "notes.txt", "choose another run.folder")


def test_run_folder_below_a_file(train: Any) -> None:
    Path("notes.txt").write_text("mine")
    with nothing_written():
        assert_refused(
            train("run.folder=notes.txt/run"), "cannot make run folder notes.txt/run", "choose another run.folder"
        )


# --- Recipes and settings


def test_missing_recipe() -> None:
    with nothing_written():
        for command in ("train", "pretrain"):
            assert_refused(fewstep(command, "recipes/mine.toml"), "recipe recipes/mine.toml does not exist")


def test_recipe_that_is_no_toml() -> None:
    Path("broken.toml").write_text("[teacher\npath = 3")
    with nothing_written():
        assert_refused(fewstep("train", "broken.toml"), "recipe broken.toml is not valid TOML")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.batchsize=4", "unknown setting training.batchsize; did you mean training.batch_size?"),
        ("batch_size=4", "unknown setting batch_size; did you mean training.batch_size?"),
        ("trainer.batch_size=4", "unknown setting trainer; did you mean training?"),
        ("training.batch_size=many", "training.batch_size='many'"),
        ("training.batch_size=0", "training.batch_size=0: Input should be greater than 0"),
        ("training.batch_size", "'training.batch_size' is not a setting: write section.key=value"),
        ("training=4", "training is a section, not a value"),
        ("compute.precision=fp8", "compute.precision='fp8'"),
        (
            "losses.gan_discriminator_weight=0",
            "losses.gan_weights=[0.003, 0.0]: the generator's is set but the discriminator's is 0",
        ),
        ("generator.step_indices=[1000]", "generator.step_indices [1000] lie outside 0..999"),
    ],
)
def test_settings_that_do_not_exist_or_cannot_be(train: Any, override: str, told: str) -> None:
    with nothing_written():
        assert_refused(train(override), told)


def test_start_from_nothing(train: Any) -> None:
    with nothing_written():
        assert_refused(train("generator.start_from=runs/earlier"), "runs/earlier does not exist")


def test_start_from_another_network(train: Any) -> None:
    write_teacher("narrow", ModelCard("generator", (999,)), num_classes=0)
    with nothing_written():
        assert_refused(
            train("generator.start_from=narrow"), "generator.start_from=narrow is another network than the teacher"
        )


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda", "cuda:3"])
def test_devices_that_are_not_there(
    train: Any, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with nothing_written():
        assert_refused(train(f"compute.device={device}"), f"compute.device='{device}'", "use")
        assert_refused(fewstep("sample", teacher_folder, "--grid", "g.png", "--device", device), f"'{device}'", "use")


# --- Regression pairs


REGRESSION = ("losses.regression_weight=0.25", "training.generator_every=1")


def test_regression_without_pairs(train: Any) -> None:
    with nothing_written():
        assert_refused(train(*REGRESSION), "losses.regression_weight needs data.pairs", "fewstep prepare pairs")
        assert_refused(
            train(*REGRESSION, "data.pairs=pairs"), "pairs holds no noise-image pairs", "fewstep prepare pairs"
        )


def test_pairs_of_another_shape(train: Any) -> None:
    prepare_pairs(
        load_teacher(write_teacher("large", resolution=32), device="cpu"),
        "large",
        Path("pairs"),
        num_pairs=2,
        num_steps=1,
    )
    with nothing_written():
        assert_refused(
            train(*REGRESSION, "data.pairs=pairs"),
            "data.pairs=pairs was made by another network than the teacher's (large)",
            "prepare pairs with this teacher",
        )  # fmt: skip


def test_unfinished_and_damaged_pairs(train: Any, teacher_folder: Path) -> None:
    prepare_pairs(load_teacher(teacher_folder, device="cpu"), "t", Path("pairs"), num_pairs=2, num_steps=1)
    shard = Path("pairs/pairs_00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with nothing_written():
        assert_refused(
            train(*REGRESSION, "data.pairs=pairs"), "pairs_00000.safetensors is not the file that was written"
        )
    manifest = json.loads(Path("pairs/manifest.json").read_text())
    Path("pairs/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with nothing_written():
        assert_refused(
            train(*REGRESSION, "data.pairs=pairs"), "pairs is unfinished: run the same `fewstep prepare pairs`"
        )


def test_pairs_of_other_settings(teacher_folder: Path) -> None:
    command = ("prepare", "pairs", teacher_folder, "pairs", "--teacher-steps", 1, "--device", "cpu", "--num-pairs", 2)
    assert fewstep(*command).code == 0
    with nothing_written():
        assert_refused(
            fewstep(*command, "--seed", 7), "pairs holds other pairs: seed was 0, is 7; choose another folder"
        )


@pytest.mark.parametrize("missing", ["vgg_weights", "lpips_weights"])
def test_lpips_without_its_files(train: Any, missing: str) -> None:
    given = {"vgg_weights": "vgg.pth", "lpips_weights": "heads.pth"}
    del given[missing]
    overrides = [f"losses.{name}={value}" for name, value in given.items()]
    with nothing_written():
        answer = train(*REGRESSION, "data.pairs=pairs", "losses.regression_distance=lpips", *overrides)
        assert_refused(answer, f"losses.regression_distance='lpips' needs losses.{missing}", "'pixel' needs no file")


def test_lpips_files_that_are_not_there(train: Any, teacher_folder: Path) -> None:
    prepare_pairs(load_teacher(teacher_folder, device="cpu"), "t", Path("pairs"), num_pairs=2, num_steps=1)
    files_of_lpips = ("losses.vgg_weights=vgg.pth", "losses.lpips_weights=heads.pth")
    with nothing_written():
        answer = train(*REGRESSION, "data.pairs=pairs", "losses.regression_distance=lpips", *files_of_lpips)
        assert_refused(answer, "vgg.pth: no such file", "vgg16-397923af.pth")


# --- Sampling and evaluating


def test_sample_without_outputs(teacher_folder: Path) -> None:
    with nothing_written():
        assert_refused(fewstep("sample", teacher_folder), "nothing to write", "--out FOLDER", "--grid FILE")


def test_outputs_that_cannot_be_written(teacher_folder: Path) -> None:
    Path("notes.txt").write_text("mine")
    sample = ("sample", teacher_folder, "--num-images", 1, "--teacher-steps", 1, "--device", "cpu")
    assert_refused(fewstep(*sample, "--out", "notes.txt"), "cannot make notes.txt: it is a file; choose another --out")
    words = "--grid missing/grid.png: give a file in a folder that exists"
    assert_refused(fewstep(*sample, "--grid", "missing/grid.png"), words)
    words = "--grid grid.JPG: pictures are written as PNG, which keeps how they were made; name it grid.png"
    assert_refused(fewstep(*sample, "--grid", "grid.JPG"), words)
    assert not half_written()
    assert not Path("missing").exists()


def test_unknown_precision(teacher_folder: Path) -> None:
    with nothing_written():
        answer = fewstep("sample", teacher_folder, "--grid", "grid.png", "--precision", "fp8")
        assert_refused(answer, "--precision fp8: choose auto, fp32, bf16 or fp16")


@pytest.fixture
def evaluate(teacher_folder: Path) -> Callable[..., Answer]:
    """`fewstep evaluate` of the tiny teacher."""
    options = ("--num-images", 8, "--teacher-steps", 1, "--device", "cpu")
    return lambda *arguments: fewstep("evaluate", teacher_folder, *arguments, *options)


def test_evaluate_without_reference(evaluate: Any) -> None:
    SmallClassifier(1, 4).eval().save(Path("net"))
    with nothing_written():
        assert_refused(evaluate("--features", "net"), "give --reference FILE.npz, --images FOLDER, or both")


@pytest.mark.parametrize("kind", ["missing", "garbage", "pickle"])
def test_features_that_are_none(evaluate: Any, pictures: Path, kind: str) -> None:
    if kind == "garbage":
        Path("net.pth").write_bytes(b"junk")
    elif kind == "pickle":
        torch.save({"fc.weight": torch.ones(2)}, "net.pth")
    with nothing_written():
        assert_refused(evaluate("--features", "net.pth", "--images", pictures), "net.pth")


def test_features_that_are_an_empty_folder(evaluate: Any, pictures: Path) -> None:
    Path("net").mkdir()
    with nothing_written():
        answer = evaluate("--features", "net", "--images", pictures)
        assert_refused(answer, "net holds no feature network", "fewstep prepare features")


@pytest.mark.parametrize("kind", ["missing", "text", "other"])
def test_reference_that_is_none(evaluate: Any, kind: str) -> None:
    SmallClassifier(1, 4).eval().save(Path("net"))
    path = Path("reference.npz")
    if kind == "text":
        path.write_text("mu, sigma")
    elif kind == "other":
        np.savez(path, weights=np.ones(3))
    with nothing_written():
        assert_refused(evaluate("--features", "net", "--reference", path), "reference.npz is no feature reference")


def test_reference_of_another_feature_network(evaluate: Any) -> None:
    SmallClassifier(1, 4).eval().save(Path("net"))
    np.savez("reference.npz", mu=np.zeros(5), sigma=np.eye(5))
    with nothing_written():
        assert_refused(
            evaluate("--features", "net", "--reference", "reference.npz"),
            "--reference reference.npz has 5 features",
            "classifier has 128",
        )


def test_features_of_unlabelled_pictures() -> None:
    Path("pictures").mkdir()
    Image.new("L", (16, 16)).save("pictures/a.png")
    with nothing_written():
        answer = fewstep(
            "prepare", "features", "pictures", "net", "--num-classes", 2, "--resolution", 16, "--channels", 1
        )
        assert_refused(answer, "data.images=pictures", "no column data.column='label'", "one folder a class")


def test_quickstart_without_time() -> None:
    with nothing_written():
        assert_refused(fewstep("quickstart", "--minutes", 0), "--minutes 0: the quick start needs more than 0 minutes")


# settings that the run would not read


def test_settings_of_text_runs_are_refused_in_class_runs(train: Callable[..., Answer]) -> None:
    answer = train("data.prompts=prompts.txt", "data.truncate_prompts=true")
    assert_refused(answer, "data.prompts, data.truncate_prompts are set but never read: teacher.path=", "leave out")
