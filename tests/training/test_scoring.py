"""`fewstep evaluate --watch`: each checkpoint of a run once, beside its training."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import RunInterrupted, UserError
from fewstep.evaluation.evaluate import EvaluateOptions, Judge
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.measurement import Measurement, Value
from fewstep.evaluation.scores import Score
from fewstep.formats.fingerprints import tensors_digest
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model
from fewstep.training import scoring
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.checkpoint_models import CheckpointModels
from fewstep.training.run import pretrain, train
from fewstep.training.run_folder import hold, is_held, release
from fewstep.training.scoring import Figures, watch_run
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings


@pytest.fixture(scope="module")
def finished(teacher_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after 2, 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(tiny_train_settings(teacher_folder, pictures, folder, run={"keep_checkpoints": 3})).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "Run"))


@pytest.fixture
def features(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    SmallClassifier(1, 4, 4).eval().save(tmp_path / "features")
    return tmp_path / "features"


@pytest.fixture
def options(pictures: Path, features: Path) -> EvaluateOptions:
    return EvaluateOptions(
        str(features), images=str(pictures), num_images=8, cache=False, device="cpu", precision="fp32"
    )


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(scoring, "PATIENCE_SECONDS", 0.2)


def rows(path: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["weights"]) for row in json.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_every_checkpoint_is_scored_once_raw_and_average(
    run: Path, options: EvaluateOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    watch_run(run, options)
    path = run / "evaluation.json"
    assert rows(path) == [(step, weights) for step in (2, 4, 6) for weights in ("raw", "average")]
    said = capsys.readouterr()
    assert f"{run} has ended; 6 figures in {path}" in said.err.replace("\n", " ")
    assert said.out.count("Frechet distance") == 6
    found = json.loads(path.read_text(encoding="utf-8"))
    best = min(found, key=lambda row: row["frechet_distance"])
    kept = load_generator(run / "evaluation_best", device="cpu")
    assert kept.card.made_with["num_steps"] == best["step"]
    assert said.err.count("24 pictures in 4 folders") == 1  # the real side is made once for all checkpoints
    before = path.read_bytes()
    watch_run(run, options)  # nothing is measured twice
    assert path.read_bytes() == before
    assert "Frechet distance" not in capsys.readouterr().out


@pytest.mark.slow
def test_models_of_a_checkpoint_are_the_runs(run: Path) -> None:
    """The average of the last checkpoint is the run's result; raw weights are the generator's in the checkpoint."""
    models = CheckpointModels(run, device="cpu", precision="fp32")
    last = list_checkpoints(run / "checkpoints")[-1]
    progress, found = models.read(last)
    pictures = {weights: model.sample(4, output="tensor", progress=False) for weights, model in found}
    assert progress.step == 6
    assert torch.equal(
        pictures["average"], load_generator(run, device="cpu").sample(4, output="tensor", progress=False)
    )
    assert not torch.equal(pictures["average"], pictures["raw"])
    tensors, _ = read_checkpoint(last)
    raw = models.network.state_dict()
    _, again = models.read(last)
    next(again)
    assert all(torch.equal(models.network.state_dict()[name], tensors[f"generator.{name}"]) for name in raw)


@pytest.mark.slow
def test_run_that_goes_on_is_followed_to_its_end(
    teacher_folder: Path, pictures: Path, tmp_path: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PATIENCE_SECONDS", 60.0)
    changes = {"keep_checkpoints": 9}
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", training={"num_steps": 2}, run=changes))
    shutil.rmtree(tmp_path / "run" / "generator")  # as it was before the end
    watching = threading.Thread(target=watch_run, args=(tmp_path / "run", options))
    watching.start()
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", run=changes))
    watching.join(60)
    assert not watching.is_alive()
    assert {step for step, _ in rows(tmp_path / "run" / "evaluation.json")} == {2, 4, 6}


@pytest.mark.slow
def test_teacher_in_pretraining_is_scored(pictures: Path, tmp_path: Path, options: EvaluateOptions) -> None:
    run = pretrain(tiny_pretrain_settings(pictures, tmp_path / "run")).folder
    watch_run(run, options)
    assert rows(run / "evaluation.json") == [(step, weights) for step in (2, 4) for weights in ("raw", "average")]
    card = load_teacher(run / "evaluation_best", device="cpu").card
    assert (card.role, card.class_names) == ("teacher", ("class0", "class1", "class2", "class3"))


@pytest.mark.slow
def test_dead_run_is_said_with_what_to_do(run: Path, options: EvaluateOptions) -> None:
    shutil.rmtree(run / "generator")
    with pytest.raises(UserError, match=r"is not finished and nobody trains there.*watch again. 6 figures") as stop:
        watch_run(run, options)
    assert f"6 figures in {run / 'evaluation.json'}, the best" in str(stop.value)
    assert len(rows(run / "evaluation.json")) == 6


@pytest.mark.slow
def test_dropped_and_damaged_checkpoints_are_left_out(
    run: Path, options: EvaluateOptions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = list_checkpoints(run / "checkpoints")
    tensors = second / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    read = CheckpointModels.read

    def dropping(self: CheckpointModels, path: Path) -> object:
        if path == first:
            shutil.rmtree(path)
        return read(self, path)

    monkeypatch.setattr(CheckpointModels, "read", dropping)
    watch_run(run, options)
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{first.name} is left out: the run dropped it" in said
    assert f"{second.name} is left out: checkpoint {second} is damaged" in said
    assert {step for step, _ in rows(run / "evaluation.json")} == {6}


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_how_far_it_is_is_left_out(
    run: Path, options: EvaluateOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    state = list_checkpoints(run / "checkpoints")[0] / "state.json"
    values = json.loads(state.read_text(encoding="utf-8"))
    del values["elapsed_seconds"], values["state"]  # as an earlier version without proof would have it
    state.write_text(json.dumps(values), encoding="utf-8")
    watch_run(run, options)
    assert "state.json has another shape" in capsys.readouterr().err.replace("\n", " ")
    assert {step for step, _ in rows(run / "evaluation.json")} == {4, 6}


@pytest.mark.slow
def test_figures_of_other_conditions_are_not_mixed(run: Path, options: EvaluateOptions, tmp_path: Path) -> None:
    other = EvaluateOptions(**{**vars(options), "num_images": 6})
    watch_run(run, options)
    (run / "evaluation.json").write_text(
        json.dumps(json.loads((run / "evaluation.json").read_text())[:1]), encoding="utf-8"
    )
    with pytest.raises(UserError, match="num images 8, not 6; watch with the same options, or give another --json"):
        watch_run(run, other)
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match="has no figures of"):
        watch_run(run, EvaluateOptions(**{**vars(options), "json_out": tmp_path / "list.json"}))


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder.*start the run first"):
        watch_run(tmp_path, EvaluateOptions("bundled:fashion-mnist"))


def test_lock_tells_whether_somebody_trains(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    hold(tmp_path)
    assert is_held(tmp_path)
    release(tmp_path)
    assert not is_held(tmp_path)
    assert not is_held(tmp_path)  # trying takes nothing
    hold(tmp_path)
    release(tmp_path)


def test_a_url_is_not_watched(options: EvaluateOptions) -> None:
    with pytest.raises(UserError, match="evaluate s3://bucket/run --watch: a run is watched in a folder on a disk"):
        watch_run("s3://bucket/run", options)


def test_figures_of_two_precisions_are_not_mixed(tmp_path: Path) -> None:
    """What an earlier version did not note is not held against what is noted now."""
    values = {"frechet_distance": Value(2.0, 8), "images_per_second": Value(1.0, 8)}
    old, full, half = (
        Score(step, 0.0, "raw", Measurement("run", values, 8, dtype=dtype))
        for step, dtype in enumerate(["", "float32", "bfloat16"])
    )
    scores = Figures(tmp_path / "evaluation.json")
    scores.add(old)
    scores.add(full)
    with pytest.raises(UserError, match="figures with dtype 'float32', not 'bfloat16'"):
        scores.add(half)
    assert [score.found.dtype for score in Figures(tmp_path / "evaluation.json").scores] == ["", "float32"]


# --- Runs that end, move or break while they are watched


def scored(path: Path, step: int, weights: str, distance: float, **changes: Any) -> Score:
    values = {"frechet_distance": Value(distance, 8), "images_per_second": Value(1.0, 8)}
    return Score(step, 0.0, weights, Measurement(str(path), values, 8, **changes), "a" * 16)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_moves_away_is_said(
    run: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Also in the middle of a measurement, and where another run begins in its place: nothing is written there."""
    figure = Judge.figure

    def moving(self: Judge, name: str, model: Model) -> Measurement | None:
        found = figure(self, name, model)
        if "step 4" in name:
            run.rename(run.with_name("moved"))
            if again:
                shutil.copytree(run.with_name("moved"), run)
        return found

    monkeypatch.setattr(Judge, "figure", moving)
    words = "is another folder than when the watch began" if again else "is gone: it was moved or deleted"
    with pytest.raises(UserError, match=f"{words}; watch the run where it is now"):
        watch_run(run, options)
    assert len(rows(run.with_name("moved") / "evaluation.json")) == 2
    assert run.exists() == again


@pytest.mark.slow
def test_figures_of_another_run_are_not_taken_for_this_ones(run: Path, options: EvaluateOptions) -> None:
    watch_run(run, options)
    path = run / "evaluation.json"
    found = json.loads(path.read_text())
    assert len({row["weights_sha256"] for row in found}) == 5  # the average begins as the raw weights
    found[2]["weights_sha256"] = "0" * 16
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="a figure of other raw weights after 4 steps than the run has now"):
        watch_run(run, options)
    for row in found:
        del row["weights_sha256"]  # as earlier versions wrote them
    path.write_text(json.dumps(found))
    watch_run(run, options)


@pytest.mark.slow
def test_weights_that_make_no_pictures_are_left_out(
    run: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Judge.figure

    def breaking(self: Judge, name: str, model: Model) -> Measurement | None:
        if "step 4, raw" in name:
            for weights in model.denoiser.parameters():
                weights.fill_(torch.nan)
        return figure(self, name, model)

    monkeypatch.setattr(Judge, "figure", breaking)
    watch_run(run, options)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "step 4, raw weights: left out, 8 of the 8 pictures from number 0 on contain NaN" in said
    assert rows(run / "evaluation.json") == [(2, "raw"), (2, "average"), (4, "average"), (6, "raw"), (6, "average")]


@pytest.mark.slow
def test_a_run_that_trains_on_has_not_ended(run: Path, options: EvaluateOptions) -> None:
    """Its earlier result lies there until it is done."""
    scoring_ = scoring.Scoring(
        run, CheckpointModels(run, device="cpu", precision="fp32"), Judge(options), Figures(run / "x")
    )
    assert scoring_.has_ended()
    hold(run)
    try:
        assert not scoring_.has_ended()
    finally:
        release(run)


def test_two_watches_do_not_write_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    one, other = Figures(path), Figures(path)
    one.add(scored(path, 2, "raw", 5.0))
    with pytest.raises(UserError, match="was written by something else while the run was watched: end the other watch"):
        other.add(scored(path, 4, "raw", 4.0))
    one.add(scored(path, 4, "raw", 4.0))
    assert rows(path) == [(2, "raw"), (4, "raw")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"reference_sha256": "b", "guidance_scale": 4.0}}, "reference sha256 'a', not 'b'"),
        ({"settings": {"reference_sha256": "a", "guidance_scale": 1.0}}, "guidance scale 4.0, not 1.0"),
        ({"evaluations_per_image": 9}, "evaluations per image 0, not 9"),
        ({"settings": {"reference_sha256": "a", "guidance_scale": 4.0, "device": "cuda", "reference": "x"}}, ""),
        ({"settings": {}}, ""),
    ],
)
def test_figures_of_other_references_or_guidance_are_not_mixed(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """Where files lie, and the machine, may differ."""
    path = tmp_path / "evaluation.json"
    before: dict[str, Any] = {"settings": {"reference_sha256": "a", "guidance_scale": 4.0, "device": "cpu"}}
    Figures(path).add(scored(path, 2, "raw", 5.0, **before))
    figures, now = Figures(path), scored(path, 4, "raw", 4.0, **{**before, **changes})
    if not words:
        figures.check(now)
        assert figures.is_best(now)
        return
    with pytest.raises(UserError, match=words):
        figures.check(now)


@pytest.mark.slow
def test_the_best_model_is_that_of_the_best_figure_after_a_kill(
    run: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Figures.add

    def killed(self: Figures, score: Score) -> None:
        if score.step == 4:
            raise RunInterrupted("killed", 137)
        add(self, score)

    with monkeypatch.context() as patch:
        patch.setattr(Figures, "add", killed)
        with pytest.raises(RunInterrupted):
            watch_run(run, options)
    watch_run(run, options)
    found = json.loads((run / "evaluation.json").read_text())
    best = min(found, key=lambda row: row["frechet_distance"])
    kept = load_generator(run / "evaluation_best", device="cpu")
    assert kept.card.made_with["num_steps"] == best["step"]
    assert tensors_digest(kept.denoiser.own_weights())[:16] == best["weights_sha256"]


def test_the_best_of_proxies_is_called_one(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "evaluation.json")
    figures.add(scored(tmp_path, 2, "raw", 5.0, protocol="cifar10-50k", proxy="8 images, not 50,000"))
    assert figures.told().endswith("the best 5.000 after 2 steps (raw weights); each a PROXY of cifar10-50k")
