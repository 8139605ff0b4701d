"""The loop: how many steps, what is on the clock, what is written, and what stops it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fewstep.data import waiting
from fewstep.data.waiting import WAITING
from fewstep.distillation import terms
from fewstep.errors import UserError
from fewstep.models.load import load_generator, load_teacher
from fewstep.settings import PretrainSettings, TrainSettings, parse_settings
from fewstep.training import run_log
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.run import pretrain, train
from fewstep.training.run_folder import claim_run_folder
from fewstep.training.run_log import Clock, NonFiniteError, RunLog, say_in_run
from fewstep.training.saving import Saver
from fewstep.training.trainer import Bar, run_job
from fewstep.training.update import Update
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings


class Time:
    """A clock that only moves when something is said to take time."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(run_log, "time", clock)
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(Counting, "clock", clock)
    return clock


class Counting:
    """A job whose only state is the number of its steps."""

    clock = Time()

    phase = "distill"
    first_step_shows = True
    class_names = ()

    def __init__(
        self, seconds: float = 0.0, picture_seconds: float = 0.0, values: dict[int, float] | None = None
    ) -> None:
        self.seconds, self.picture_seconds, self.values = seconds, picture_seconds, values or {}
        self.done = torch.zeros(1)
        self.steps: list[int] = []
        self.progress: list[float] = []
        self.pictured: list[int] = []

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        self.clock.sleep(self.seconds)
        self.steps.append(step)
        self.progress.append(progress)
        self.done += 1
        return {"loss": torch.tensor(self.values.get(step, 1.0)), "grad_norm": torch.tensor(2.0)}

    def tensors(self) -> dict[str, Tensor]:
        return {"done": self.done.clone()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.done = tensors["done"]

    def pictures(self, log: RunLog, step: int) -> None:
        self.clock.sleep(self.picture_seconds)
        self.pictured.append(step)

    def save_result(self, folder: Path, num_steps: int) -> Path:
        (folder / "result.txt").write_text(str(num_steps))
        return folder / "result.txt"


def counting_settings(
    folder: Path, training: dict[str, Any] | None = None, run: dict[str, Any] | None = None
) -> TrainSettings:
    values = {
        "training": {"num_steps": 5, "batch_size": 10, **(training or {})},
        "run": {"folder": str(folder), "log_every": 100, "sample_every": 100, "checkpoint_every": 100,
                **(run or {})},
    }  # fmt: skip
    return parse_settings(TrainSettings, values, "test")


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in lines_of(folder) if "images_per_second" in line]


def checkpoint_steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder / "checkpoints")]


# --- How many steps


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_exactly_n_steps_are_made(tmp_path: Path, num_steps: int) -> None:
    job = Counting()
    result = run_job(job, counting_settings(tmp_path, {"num_steps": num_steps}), tmp_path)
    assert job.steps == list(range(num_steps))
    assert job.progress == pytest.approx([step / num_steps for step in range(num_steps)])
    assert checkpoint_steps(tmp_path) == [num_steps]
    assert result.read_text() == str(num_steps)


def test_a_finished_run_makes_no_further_step(tmp_path: Path) -> None:
    run_job(Counting(), counting_settings(tmp_path), tmp_path)
    again = Counting()
    assert run_job(again, counting_settings(tmp_path), tmp_path).read_text() == "5"
    assert (again.steps, again.pictured) == ([], [])
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4]


def test_the_number_of_steps_may_be_raised(tmp_path: Path) -> None:
    run_job(Counting(), counting_settings(tmp_path, {"num_steps": 3}), tmp_path)
    job = Counting()
    run_job(job, counting_settings(tmp_path, {"num_steps": 5}), tmp_path)
    assert job.steps == [3, 4]
    assert job.done == 5
    assert [line["step"] for line in step_lines(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("clockwork")
def test_time_limit(tmp_path: Path) -> None:
    """Training ends with the step that reaches the limit, far from the last one, and the decay follows the clock."""
    settings = counting_settings(tmp_path, {"num_steps": 10_000, "time_limit_minutes": 0.5})
    job = Counting(seconds=4.0)
    run_job(job, settings, tmp_path)
    assert job.progress == pytest.approx([step * 4 / 30 for step in range(8)])
    _, state = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert state["elapsed_seconds"] == pytest.approx(32)
    assert checkpoint_steps(tmp_path) == [8]
    again = Counting()
    run_job(again, settings, tmp_path)  # the time is used up, over all sessions
    assert again.steps == []


@pytest.mark.usefixtures("clockwork")
def test_a_run_says_how_far_it_is_after_its_step_and_at_most_all(tmp_path: Path) -> None:
    """A step that ends beyond the time limit is 100% of it; one that was made counts."""
    settings = counting_settings(tmp_path, {"num_steps": 10_000, "time_limit_minutes": 0.5})
    run_job(Counting(seconds=12.0), settings, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert re.findall(r"distill: (.*)", log) == [
        "begins (0%)", "step 1, the first one of this session (0%) ...", "step 1, sample pictures (40%) ...",
        "last sample pictures (100%) ...", "step 3, done (100%)",
    ]  # fmt: skip


def test_a_plain_line_says_how_long_the_rest_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fewstep.training.trainer.time.monotonic", lambda: now[0])
    log = RunLog(tmp_path, 0, tensorboard=False)
    with Bar("distill", Console(quiet=True), log) as bar:
        bar.show(0.2, "goes on after step 2")
        for seconds, progress in ((2, 0.25), (40, 0.4), (80, 1.0)):
            now[0] = 100.0 + seconds
            bar.show(progress, f"after {seconds} s")
    told = re.findall(r"distill: (.*)", (tmp_path / "log.txt").read_text())
    assert told == ["goes on after step 2 (20%)", "after 40 s (40%, 2 min left)", "after 80 s (100%)"]


def test_warnings_are_in_the_log(tmp_path: Path) -> None:
    """They were on the terminal alone, which a run over night does not keep."""
    say_in_run(tmp_path, Console(quiet=True), "warning: that is little")
    assert (tmp_path / "log.txt").read_text().endswith(" warning: that is little\n")


@pytest.mark.usefixtures("clockwork")
def test_the_number_of_steps_ends_a_run_before_its_time(tmp_path: Path) -> None:
    job = Counting(seconds=1.0)
    run_job(job, counting_settings(tmp_path, {"num_steps": 3, "time_limit_minutes": 0.5}), tmp_path)
    assert job.progress == pytest.approx([0, 1 / 3, 2 / 3])  # whichever end is nearer


@pytest.mark.usefixtures("clockwork")
def test_time_limit_is_that_of_all_sessions(tmp_path: Path) -> None:
    run_job(Counting(seconds=4.0), counting_settings(tmp_path, {"num_steps": 5}), tmp_path)
    job = Counting(seconds=4.0)
    run_job(job, counting_settings(tmp_path, {"num_steps": 10_000, "time_limit_minutes": 0.5}), tmp_path)
    assert job.progress == pytest.approx([20 / 30, 24 / 30, 28 / 30])


# --- What is on the clock


def test_the_share_of_a_step_that_waits_for_data(tmp_path: Path, clockwork: Time) -> None:
    class Reading(Counting):
        def step(self, step: int, progress: float) -> dict[str, Tensor]:
            WAITING.around(clockwork.sleep)(0.5 * step)
            return super().step(step, progress)

    run_job(Reading(seconds=1.5), counting_settings(tmp_path), tmp_path)
    expected = [0.5 * step / (1.5 + 0.5 * step) for step in range(5)]
    assert [line["data_wait_share"] for line in step_lines(tmp_path)] == pytest.approx(expected)


def test_observers_pictures_and_checkpoints_are_off_the_clock(
    tmp_path: Path, clockwork: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def observer(step: int, seconds: float) -> None:
        seen.append((step, seconds))
        clockwork.sleep(70)

    original = Saver.start

    def slow_checkpoint(*arguments: Any) -> None:
        clockwork.sleep(90)
        original(*arguments)

    monkeypatch.setattr(Saver, "start", slow_checkpoint)
    job = Counting(seconds=2.0, picture_seconds=50.0)
    settings = counting_settings(tmp_path, run={"sample_every": 2, "checkpoint_every": 2})
    run_job(job, settings, tmp_path, observers=(observer,))
    assert clockwork.now == 100 + 5 * 2 + 4 * 50 + 5 * 70 + 3 * 90
    assert seen == [(number, pytest.approx(2 * number)) for number in (1, 2, 3, 4, 5)]
    assert [line["seconds"] for line in step_lines(tmp_path)] == pytest.approx([2, 4, 6, 8, 10])
    assert job.pictured == [1, 2, 4, 5]
    _, state = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert state["elapsed_seconds"] == pytest.approx(10)


@pytest.mark.usefixtures("clockwork")
@pytest.mark.parametrize(("saving", "saved"), [(0.0, [4, 8, 9]), (2.4, [7, 9])])
def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: float, saved: list[int]) -> None:
    """A minute of training is not lost; where saving takes 2.4 s, two minutes may be."""
    steps: list[int] = []
    monkeypatch.setattr(Saver, "start", lambda self, step, *_: steps.append(step))
    monkeypatch.setattr(Saver, "seconds", property(lambda self: saving, lambda self, value: None), raising=False)
    settings = counting_settings(tmp_path, {"num_steps": 9}, run={"checkpoint_every": 1000})
    run_job(Counting(seconds=20.0), settings, tmp_path)
    assert steps == saved


def test_clock(clockwork: Time) -> None:
    clock = Clock(10.0)
    clockwork.sleep(3)
    assert clock.seconds() == 13
    clock.pause()
    clockwork.sleep(5)
    assert clock.seconds() == 13
    clock.resume()
    clockwork.sleep(2)
    assert clock.seconds() == 15


@pytest.mark.usefixtures("clockwork")
def test_images_per_second(tmp_path: Path) -> None:
    run_job(Counting(seconds=0.02), counting_settings(tmp_path), tmp_path)
    assert [line["images_per_second"] for line in step_lines(tmp_path)] == pytest.approx([10 / 0.02] * 5)


@pytest.mark.usefixtures("clockwork")
def test_images_per_second_after_a_break(tmp_path: Path) -> None:
    """A long run that continues reports the speed of its new steps."""
    run_job(Counting(seconds=20.0), counting_settings(tmp_path), tmp_path)
    run_job(Counting(seconds=0.02), counting_settings(tmp_path, {"num_steps": 8}), tmp_path)
    assert [line["images_per_second"] for line in step_lines(tmp_path)[-3:]] == pytest.approx([10 / 0.02] * 3)


# --- What is written


def test_metric_lines_of_a_loop(tmp_path: Path) -> None:
    """One line a step, and the memory now and then; nothing is written twice."""
    run_job(Counting(), counting_settings(tmp_path, {"num_steps": 7}, {"sample_every": 3}), tmp_path)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(7))
    assert [line["step"] for line in lines if "peak_memory_gib" in line] == [2, 5]
    assert len(lines) == 9
    assert all(line["peak_memory_gib"] > 0.01 for line in lines if "peak_memory_gib" in line)


def test_lines_of_steps_that_are_made_again_are_cut(tmp_path: Path) -> None:
    run_job(Counting(), counting_settings(tmp_path, {"num_steps": 3}), tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "loss": 9.0}\n{"step": 5, "lo')  # killed here
    run_job(Counting(), counting_settings(tmp_path, {"num_steps": 5}), tmp_path)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4]
    assert all(line["loss"] == 1.0 for line in lines_of(tmp_path))


@pytest.mark.slow
def test_everything_a_distillation_writes(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = tiny_train_settings(teacher_folder, pictures, folder, training={"num_steps": 5}, run={"sample_every": 2})
    result = train(settings).model_folder
    assert result == folder / "generator"

    fake_score = {"fake_score_loss", "gan_discriminator_loss", "fake_score_grad_norm"}
    generator = {
        "distribution_matching_loss", "distribution_matching_norm_at_x0", "gan_generator_loss",
        "gan_generator_norm_at_x0", "gan_generator_norm_ratio", "generator_grad_norm",
    }  # fmt: skip
    lines = step_lines(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for number, line in enumerate(lines):
        expected = fake_score | (generator if number % 2 == 0 else set())
        assert line.keys() == expected | {"step", "images_per_second", "seconds", "data_wait_share"}
        assert line["images_per_second"] > 0
    assert [line["step"] for line in lines_of(folder) if "peak_memory_gib" in line] == [1, 3]

    pictured = {path.name for path in (folder / "samples").iterdir()}
    steps = (1, 2, 4, 5)
    assert pictured == {"teacher_00000001.png", "classes.txt"} | {
        f"{name}_{step:08d}.png" for name in ("generator", "teacher_score", "fake_score") for step in steps
    }
    with Image.open(folder / "samples/generator_00000005.png") as picture:
        assert picture.size == (4 * 17 - 1, 16)  # four pictures in a row with a line between them
    with Image.open(folder / "samples/fake_score_00000005.png") as picture:
        assert picture.size == (4 * 17 - 1, 5 * 17 - 1)  # and four noise levels below them

    assert_events(folder / "tensorboard", fake_score | generator | {"images_per_second", "peak_memory_gib"})
    assert load_generator(result).card.made_with["num_steps"] == 5
    stored = parse_settings(TrainSettings, json.loads((folder / "settings.json").read_text()), "settings.json")
    assert stored == settings


def assert_events(folder: Path, names: set[str]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[int]] = {}
    for path in folder.glob("events.out.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    assert names <= found.keys()
    assert found["fake_score_loss"] == [0, 1, 2, 3, 4]
    assert found["generator_grad_norm"] == [0, 2, 4]
    assert found["generator"] == [1, 2, 4, 5]  # the pictures


def test_no_events_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.training.trainer.find_spec", lambda name: None)
    run_job(Counting(), counting_settings(tmp_path), tmp_path)
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_sample_pictures_are_those_of_the_generator(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """The grid at a fixed seed is what `load_generator` makes of the exported weights."""
    from fewstep.formats.pixels import make_grid

    result = train(
        tiny_train_settings(teacher_folder, pictures, tmp_path / "run", training={"num_steps": 3})
    ).model_folder
    expected = make_grid(load_generator(result, device="cpu").sample(4, seed=0, output="tensor"), columns=4)
    with Image.open(tmp_path / "run/samples/generator_00000003.png") as picture:
        assert picture.tobytes() == expected.tobytes()
    teacher = make_grid(load_teacher(teacher_folder, device="cpu").sample(4, seed=0, output="tensor"), columns=4)
    with Image.open(tmp_path / "run/samples/teacher_00000001.png") as picture:
        assert picture.tobytes() == teacher.tobytes()


@pytest.mark.slow
def test_everything_pretraining_writes(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = tiny_pretrain_settings(pictures, folder, training={"num_steps": 3})
    result = pretrain(settings).model_folder
    assert result == folder / "teacher"
    for line in step_lines(folder):
        assert line.keys() == {"step", "loss", "grad_norm", "images_per_second", "seconds", "data_wait_share"}
    assert len(step_lines(folder)) == 3
    assert {path.name for path in (folder / "samples").iterdir()} == {
        "teacher_00000003.png"
    }  # an untrained teacher shows noise
    teacher = load_teacher(result, device="cpu")
    assert teacher.card.class_names == ("class0", "class1", "class2", "class3")
    assert teacher.card.can_be_guided
    assert parse_settings(PretrainSettings, json.loads((folder / "settings.json").read_text()), "x") == settings


# --- What stops it


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_metric_stops_the_loop(tmp_path: Path, value: float) -> None:
    """Names metric and step; the checkpoint due at that moment is not written, the one before stays."""
    settings = counting_settings(tmp_path, {"num_steps": 50}, {"checkpoint_every": 2})
    job = Counting(values={5: value})
    with pytest.raises(NonFiniteError, match=rf"^loss became {value} at step 5: ") as error:
        run_job(job, settings, tmp_path)
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert isinstance(error.value, UserError)  # the command line prints it and exits with 2
    assert checkpoint_steps(tmp_path) == [2, 4]
    assert read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])[0]["done"] == 4
    assert not (tmp_path / "result.txt").exists()
    assert [line["step"] for line in step_lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    repaired = Counting()
    run_job(repaired, settings, tmp_path)
    assert repaired.steps == list(range(4, 50))


def test_a_non_finite_metric_is_found_at_the_next_log(tmp_path: Path) -> None:
    settings = counting_settings(tmp_path, {"num_steps": 50}, {"sample_every": 4})
    job = Counting(values={5: math.nan})
    with pytest.raises(NonFiniteError, match="step 5"):
        run_job(job, settings, tmp_path)
    assert job.steps[-1] == 7
    assert checkpoint_steps(tmp_path) == []


def test_a_non_finite_metric_is_found_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 4"):
        run_job(Counting(values={4: math.nan}), counting_settings(tmp_path), tmp_path)
    assert checkpoint_steps(tmp_path) == []
    assert not (tmp_path / "result.txt").exists()


@pytest.mark.slow
def test_a_non_finite_loss_stops_a_distillation(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake score's loss is NaN in step 3; the checkpoint of step 2 is good and the run goes on from it."""
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run")
    original, calls = terms.denoising_loss, []

    def sometimes_nan(estimate: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(calls))
        return original(estimate, x0, weight) * (math.nan if calls[-1] == 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(terms, "denoising_loss", sometimes_nan)
        with pytest.raises(NonFiniteError, match=r"^fake_score_loss became nan at step 3: "):
            train(settings)
    folder = tmp_path / "run"
    assert checkpoint_steps(folder) == [2]
    assert not (folder / "generator").exists()
    tensors, _ = read_checkpoint(folder / "checkpoints/step_00000002")
    assert all(torch.isfinite(value).all() for value in tensors.values() if value.is_floating_point())
    load_generator(train(settings))
    assert checkpoint_steps(folder) == [4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "name"), [(2, "generator_grad_norm"), (1, "fake_score_grad_norm")])
def test_a_non_finite_gradient_norm_stops_a_distillation(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, name: str
) -> None:
    original = Update.step
    updates: list[Update] = []

    def overflowing(update: Update) -> dict[str, Tensor]:
        metrics = original(update)
        updates.append(update)
        if len(updates) == 4:  # step 0 has two, then one or two
            metrics[f"{update.prefix}grad_norm"] += math.inf
        return metrics

    monkeypatch.setattr(Update, "step", overflowing)
    settings = tiny_train_settings(
        teacher_folder, pictures, tmp_path / "run", training={"generator_every": every}, run={"checkpoint_every": 1}
    )
    step = 2 if every == 2 else 1
    with pytest.raises(NonFiniteError, match=rf"^{name} became inf at step {step}: "):
        train(settings)
    assert checkpoint_steps(tmp_path / "run")[-1] == step


@pytest.mark.slow
def test_what_a_non_finite_metric_advises_can_be_done(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'Lower the learning rate or the loss weights, or set compute.precision=fp32, and repeat the command.'"""
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run", optimizer={"generator_lr": 1e-3})
    with monkeypatch.context() as patch:
        patch.setattr(terms, "generator_adversarial_loss", lambda logits: logits.mean() * math.nan)
        try:
            train(settings)
        except NonFiniteError as error:
            message = str(error)
    assert "Lower the learning rate" in message
    assert "repeat the command" in message
    assert message.endswith("the weights that it starts with may be damaged, the teacher's among them")
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", optimizer={"generator_lr": 5e-4}))


# --- Whose folder it is


def test_other_settings_are_named(tmp_path: Path) -> None:
    claim_run_folder(counting_settings(tmp_path), tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    other = counting_settings(tmp_path, {"batch_size": 20, "seed": 5})
    with pytest.raises(UserError) as error:
        claim_run_folder(other, tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path} holds a run of other settings: ")
    assert "training.batch_size was 10, is 20" in message
    assert "training.seed was 0, is 5" in message
    assert "choose another run.folder" in message
    assert (tmp_path / "settings.json").read_bytes() == before


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("training", {"num_steps": 9}), ("training", {"time_limit_minutes": 2.0}), ("run", {"samples": (7, 64)}),
        ("run", {"keep_checkpoints": 5}), ("compute", {"device": "cpu"}),
        ("compute", {"precision": "fp32"}), ("optimizer", {"lr": (1e-7, 2e-6)}),
    ],
)  # fmt: skip
def test_settings_that_may_change_between_sessions(tmp_path: Path, section: str, changes: dict[str, Any]) -> None:
    settings = counting_settings(tmp_path)
    claim_run_folder(settings, tmp_path)
    group = getattr(settings, section)
    changed = settings.model_copy(update={section: group.model_copy(update=changes)})
    assert changed != settings
    claim_run_folder(changed, tmp_path)
    stored = parse_settings(TrainSettings, json.loads((tmp_path / "settings.json").read_text()), "settings.json")
    assert stored == changed


def test_where_the_base_lies_may_change_and_how_it_is_stored_may_not(tmp_path: Path) -> None:
    """A run goes on to the same bits with its blocks in host memory, and to others on another base."""

    def storing(**changes: Any) -> TrainSettings:
        settings = counting_settings(tmp_path)
        memory = {"mode": "shared_base", "checkpoint_activations": True, **changes}
        return settings.model_copy(
            update={
                "memory": settings.memory.model_copy(update=memory),
                "compute": settings.compute.model_copy(update={"device": "auto"}),
            }
        )

    claim_run_folder(storing(), tmp_path)
    claim_run_folder(storing(teacher="offloaded_blocks"), tmp_path)
    with pytest.raises(UserError, match=r"memory\.base was 'fp32', is 'nf4'"):
        claim_run_folder(storing(base="nf4"), tmp_path)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and no run of fewstep; choose another run\.folder"):
        claim_run_folder(counting_settings(tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_welcome(tmp_path: Path) -> None:
    claim_run_folder(counting_settings(tmp_path), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "data.json", ".lock"}


def test_a_folder_of_the_other_kind_of_run(pictures: Path, tmp_path: Path) -> None:
    claim_run_folder(tiny_pretrain_settings(pictures, tmp_path), tmp_path)
    with pytest.raises(UserError, match="holds a run of another kind or version"):
        claim_run_folder(counting_settings(tmp_path), tmp_path)


def test_damaged_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged .*choose another run\.folder"):
        claim_run_folder(counting_settings(tmp_path), tmp_path)


def test_a_checkpoint_of_another_phase(tmp_path: Path) -> None:
    run_job(Counting(), counting_settings(tmp_path), tmp_path)
    job = Counting()
    job.phase = "pretrain"
    with pytest.raises(
        UserError, match=r"holds a run of phase 'distill', this is 'pretrain'; choose another run\.folder"
    ):
        run_job(job, counting_settings(tmp_path), tmp_path)
