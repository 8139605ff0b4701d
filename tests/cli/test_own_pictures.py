"""A feature network of own pictures as a newcomer types it: without sizes, colours and numbers of classes."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fewstep.cli.examples import EXAMPLES
from fewstep.cli.main import app, prepare
from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.metrics import FeatureStatistics
from tests.conftest import write_pictures


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_features_and_statistics_are_of_the_size_that_a_teacher_of_the_same_pictures_has(tmp_path: Path) -> None:
    """28 pixels, as digits have: the network takes 24, and so do both commands; 32 would have to enlarge them."""
    images = write_pictures(tmp_path / "digits", size=28, classes=3)
    told = run("prepare", "features", images, tmp_path / "features", "--num-passes", 1, "--device", "cpu")
    assert "3 classes, 24x24x1" in told
    network = SmallClassifier.load(tmp_path / "features")
    assert (network.resolution, network.channels, network.arguments["num_classes"]) == (24, 1, 3)
    reference = tmp_path / "reference.npz"
    told = run("prepare", "statistics", images, reference, "--features", tmp_path / "features", "--device", "cpu")
    assert "24 images of 24x24x1" in told
    assert FeatureStatistics.load(reference).num_images == 24


def test_statistics_of_other_features_of_the_same_number_are_refused(tmp_path: Path) -> None:
    """Features that were trained anew are others, and a distance to the old ones' statistics would be a number all the same."""
    images = write_pictures(tmp_path / "digits", size=32, classes=3)
    for name, seed in (("one", 0), ("two", 1)):
        words = ["prepare", "features", images, tmp_path / name, "--num-passes", 1, "--seed", seed, "--device", "cpu"]
        run(*words)
    reference = tmp_path / "reference.npz"
    run("prepare", "statistics", images, reference, "--features", tmp_path / "one", "--device", "cpu")
    (tmp_path / "one").rename(tmp_path / "moved")
    evaluate = ["evaluate", "bundled:fashion-mnist", "--reference", reference, "--num-images", 4, "--teacher-steps", 1]
    evaluate += ["--device", "cpu", "--precision", "fp32"]
    run(*evaluate, "--features", tmp_path / "moved")
    with pytest.raises(UserError, match=r"--reference .*reference\.npz was made with another feature network"):
        run(*evaluate, "--features", tmp_path / "two")


def test_pictures_without_classes_make_no_features(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "loose", classes=1)
    with pytest.raises(UserError, match="needs pictures of two classes or more, one folder a class"):
        run("prepare", "features", images, tmp_path / "features", "--device", "cpu")


@pytest.mark.parametrize("shape", [(1, 3, 24, 24), (1, 1, 32, 32), (1, 1, 24, 32)])
def test_features_do_not_look_at_pictures_of_another_kind(shape: tuple[int, ...]) -> None:
    """Another size would give a distance that says nothing, other channels a traceback."""
    network = SmallClassifier(1, 3, width=4, resolution=24).eval()
    told = "were trained on 24x24x1 and these pictures are .*: train a feature network of this size with `fewstep prepare features"
    with pytest.raises(UserError, match=told):
        network(torch.zeros(shape))
    assert network(torch.zeros(1, 1, 24, 24)).shape == (1, 16)


def test_a_network_that_did_not_note_its_size_takes_any_of_its_channels() -> None:
    network = SmallClassifier(3, 3, width=4).eval()
    assert network(torch.zeros(1, 3, 40, 40)).shape == (1, 16)
    with pytest.raises(UserError, match="trained on pictures of channels 3 and these pictures are 40x40x1"):
        network(torch.zeros(1, 1, 40, 40))


def test_every_default_that_help_knows_is_shown() -> None:
    """Square brackets are markup to the help's writer, which would leave out such a default without a word."""
    shown = " ".join(run("sample", "--help").replace("│", " ").split())
    assert "[default: 64, text-to-image 4]" in shown
    assert "[default: one a prompt or label, else 16]" in shown


def test_every_help_has_an_example() -> None:
    groups: dict[tuple[str, ...], object] = {(): app, ("prepare",): prepare}
    for name in EXAMPLES:
        parent = ("prepare",) * any(name == _name(command) for command in prepare.registered_commands)
        groups[(*parent, name)] = None
    for words in groups:
        assert "Example: fewstep" in run(*words, "--help"), words


def _name(command: object) -> str:
    return str(getattr(command, "name", ""))
