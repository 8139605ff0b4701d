"""`fewstep bench-inference` on tiny models: both are timed in their own steps, compared, and what cannot be is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.errors import UserError
from fewstep.evaluation import speed
from fewstep.evaluation.speed import SpeedOptions, bench_inference
from fewstep.export.export import ExportOptions, export_generator
from fewstep.families.edm.family import EDMFamily
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape
from fewstep.training.run import train
from tests.conftest import golden_denoiser, tiny_denoiser
from tests.export.text_generators import write_run
from tests.training.helpers import tiny_train_settings


@pytest.fixture(scope="module")
def trained(teacher_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDMFamily, "default_num_steps", 3)
        return train(tiny_train_settings(teacher_folder, pictures, folder, training={"num_steps": 1})).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run of one step."""
    monkeypatch.setattr(EDMFamily, "default_num_steps", 3)
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.slow
def test_a_generator_beside_the_teacher_its_card_names(
    run: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[bool, int]] = []
    sample = Model.sample

    def noted(self: Model, *what: Any, **how: Any) -> Any:
        made.append((self.is_generator, how["num_images"]))
        return sample(self, *what, **how)

    monkeypatch.setattr(Model, "sample", noted)
    words = ["bench-inference", str(run), "--batch-sizes", "1, 4,1", "--seconds", "0.01", "--device", "cpu"]
    answer = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "speed.json")])
    assert answer.exit_code == 0, answer.output
    found = json.loads((tmp_path / "speed.json").read_text())
    rows = [(one["model"], one["batch_size"], one["evaluations"]) for one in found["timings"]]
    assert rows == [("teacher", 1, 5), ("generator", 1, 1), ("teacher", 4, 5), ("generator", 4, 1)]
    assert found["teacher"] == str(teacher_folder)
    assert {"size": "16x16", "precision": "fp32"}.items() <= found.items()
    for slow, fast in zip(found["timings"][::2], found["timings"][1::2], strict=True):
        assert slow["ratio"] == 1
        assert fast["ratio"] == pytest.approx(slow["seconds"] / fast["seconds"])
        assert fast["images_per_second"] == pytest.approx(fast["batch_size"] / fast["seconds"])
        assert fast["decoding"] == 0
        assert fast["rounds"] >= 2
    for kind in (False, True):  # the first round warms up and is not counted
        counted = [one["rounds"] for one in found["timings"] if (one["model"] == "generator") == kind]
        assert sum(1 for one in made if one == (kind, 4)) == counted[1] + 1
    shown = [line for line in answer.output.splitlines() if "generator" in line]
    assert len(shown) == 2
    assert f"{found['timings'][3]['ratio']:.3g}" in shown[1]


def test_the_clock_counts_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 100, 100, 101, 101, 104, 104, 106, 106, 107])  # rounds of 100, 1, 3, 2 seconds
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    assert speed._median(lambda: None, 5.0) == (2, 3)
    clock = iter([0, 1, 1, 100])
    assert speed._median(lambda: None, 5.0) == (99, 1)


@pytest.mark.slow
def test_a_text_model_decodes_and_may_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_teacher_steps: None
) -> None:
    generator, compiled = write_run(tmp_path, "sd"), []
    monkeypatch.setattr(speed, "compile_denoiser", lambda denoiser, device: compiled.append(True))
    options = SpeedOptions(
        str(tmp_path / "teacher"), "1", "red cat", 0.01, compile=True, device="cpu", precision="fp32"
    )
    found = bench_inference(str(generator), options)
    assert [one.model for one in found] == ["teacher", "generator", "generator, compiled"]
    assert compiled == [True]
    assert all(0 < one.decoding < one.seconds for one in found)
    assert found[1].evaluations == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusers", "unet", "lora", "kohya-lora", "single-file"])
def test_exports_of_a_text_model(tmp_path: Path, few_teacher_steps: None, kind: str) -> None:
    """Those for other tools are refused with what computes the same."""
    generator, out = write_run(tmp_path, "sd", lora=LoraShape(4, 4.0)), tmp_path / "out"
    export_generator(str(generator), out, ExportOptions(kind=kind, num_samples=0, device="cpu"))
    options = SpeedOptions(str(tmp_path / "teacher"), "1", seconds=0.01, device="cpu", precision="fp32")
    if kind in ("diffusers", "unet", "lora"):
        assert [one.evaluations for one in bench_inference(str(out), options)][1:] == [4]
        return
    with pytest.raises(
        UserError,
        match=r"has weights for other tools, out\.safetensors: .* or the generator's folder, that it came from",
    ):
        bench_inference(str(out), options)
    with pytest.raises(
        UserError, match=r"out\.safetensors is neither a model folder nor an EDM \.pkl; `fewstep convert` makes"
    ):
        bench_inference(str(out / "out.safetensors"), options)


@pytest.mark.slow
def test_exports_of_a_class_model(run: Path, tmp_path: Path, teacher_folder: Path) -> None:
    """EDM's .pkl has no place for a step schedule, so it is read as a teacher's."""
    options = SpeedOptions(str(teacher_folder), "1", seconds=0.01, device="cpu", precision="fp32")
    export_generator(str(run), tmp_path / "out", ExportOptions(num_samples=0, device="cpu"))
    assert [one.evaluations for one in bench_inference(str(tmp_path / "out"), options)] == [5, 1]
    plain = golden_denoiser("adm")[0]
    write_model_folder(
        tmp_path / "plain", plain.describe(), plain.state_dict(), ModelCard("generator", step_indices=(999,))
    )
    export_generator(str(tmp_path / "plain"), tmp_path / "edm", ExportOptions(kind="edm", num_samples=0, device="cpu"))
    for place, words in (
        (tmp_path / "edm", "has weights for other tools, edm.pkl"),
        (tmp_path / "edm/edm.pkl", "is a teacher; give the generator"),
    ):
        with pytest.raises(UserError, match=words):
            bench_inference(str(place), options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SpeedOptions(batch_sizes="0"), "--batch-sizes 0: give numbers of pictures made at once"),
        (SpeedOptions(batch_sizes=","), "--batch-sizes ,: give numbers of pictures made at once"),
        (SpeedOptions(seconds=0), "--seconds 0: measuring takes more than 0 seconds"),
        (SpeedOptions(prompt="cat"), "--prompt cat: this model takes classes, and all take turns"),
        (SpeedOptions(teacher="RUN"), "is no teacher of pictures of this generator's shape"),
        (SpeedOptions(teacher="OTHER"), "is no teacher of pictures of this generator's shape"),
    ],
)
def test_what_cannot_be_timed(run: Path, tmp_path: Path, options: SpeedOptions, said: str) -> None:
    from dataclasses import replace

    other = tiny_denoiser(resolution=8)
    write_model_folder(tmp_path / "other", other.describe(), other.state_dict(), ModelCard(role="teacher"))
    places = {"RUN": str(run), "OTHER": str(tmp_path / "other"), "": ""}
    with pytest.raises(UserError) as error:
        bench_inference(str(run), replace(options, teacher=places[options.teacher], device="cpu", precision="fp32"))
    assert said in str(error.value)


def test_a_teacher_is_no_generator_and_some_cards_name_none(teacher_folder: Path, run: Path) -> None:
    options = SpeedOptions(device="cpu", precision="fp32")
    with pytest.raises(UserError, match="is a teacher; give the generator"):
        bench_inference(str(teacher_folder), options)
    card = run / "generator" / "fewstep.json"
    values = json.loads(card.read_text())
    values["made_with"] = {}
    card.write_text(json.dumps(values))
    with pytest.raises(UserError, match="card names no teacher; give it with --teacher"):
        bench_inference(str(run / "generator"), options)
