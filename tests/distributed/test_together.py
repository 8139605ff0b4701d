"""Two processes, started once, asked everything that the quick suite wants to know of them: starting costs more than asking."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewstep
from fewstep.preparation.pairs import prepare_pairs
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.run import train
from tests.distributed.evaluating import WAYS, measure_all, write_parts
from tests.distributed.preparing import files_of, prepare, write_sources
from tests.distributed.processes import run_processes
from tests.distributed.test_equality import CI, equal_to_one
from tests.distributed.together import go_back
from tests.tiny_models import tiny_sd_folder
from tests.training.helpers import tiny_train_settings

PROMPTS = ["red cat", "a dog", "blue bird", "dog"]


def last(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Tensors, whole, and the step of a run's last checkpoint, as one process reads them."""
    tensors, state = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return tensors, state["step"]


def same(one: Path, two: Path, bound: float = 0.0) -> None:
    """The last checkpoints of two runs are equal, to a bound where the order of sums was another."""
    (mine, step), (theirs, other) = last(one), last(two)
    assert (step, mine.keys()) == (other, theirs.keys())
    for name, value in mine.items():
        if bound and value.is_floating_point():
            assert float((value - theirs[name]).abs().max()) < bound, name
        else:
            assert torch.equal(value, theirs[name]), name


def ask(work: Path, processes: int, **questions: Any) -> None:
    """Start processes of tests.distributed.together; all end well."""
    (work / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    ended = run_processes(processes, "-m", "tests.distributed.together", str(work), timeout=600)
    assert [code for code, _ in ended] == [0] * processes, "\n".join(said for _, said in ended)


class Runs:
    """Runs that differ in folder and length only; a text LoRA, whose base is sharded and whose adapters are not, and classes."""

    def __init__(self, work: Path, teacher: Path, pictures: Path) -> None:
        (work / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
        text: dict[str, dict[str, Any]] = {
            "generator": {"step_indices": [999, 749, 499, 249], "ema_half_life_images": 0},
            "data": {"images": "", "prompts": str(work / "prompts.txt")},
            "memory": {"mode": "lora_generator", "lora_rank": 2},
            "losses": {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0},
        }
        self.work, self._pictures = work, pictures
        self._kinds: dict[str, tuple[Path, dict[str, dict[str, Any]]]] = {
            "classes": (teacher, {}), "text": (work / "sd", text)
        }  # fmt: skip

    def of(self, kind: str, name: str, steps: int, **training: Any) -> dict[str, Any]:
        """A run's settings, as `fewstep.train` takes them."""
        teacher, changes = self._kinds[kind]
        changes = {**changes, "training": {"num_steps": steps, **training}, "run": {"sample_images": 1}}
        settings = tiny_train_settings(teacher, self._pictures, self.work / name, **changes)
        return settings.model_dump(mode="json", exclude_unset=True)


@pytest.mark.slow
def test_two_processes(tmp_path: Path, teacher_folder: Path, pictures: Path) -> None:
    runs = Runs(tmp_path, teacher_folder, pictures)
    train(runs.of("classes", "classes 1", 4))
    write_sources(tmp_path)
    write_parts(tmp_path)
    two = [
        (runs.of("classes", "classes 2", 4), ""),
        (runs.of("classes", "classes 2-2", 4), "classes 2"),
        (runs.of("classes", "classes 1-2", 4), "classes 1"),
    ]
    refused = [runs.of("classes", "odd batch", 2, batch_size=5)]
    ask(tmp_path, 2, equality=CI, saving=True, runs=two, refused=refused, pairs=str(teacher_folder))
    equal_to_one(tmp_path / "equality.safetensors", CI)
    a_checkpoint_is_of_its_step_and_whole_for_one(tmp_path)
    an_export_takes_one_tensor_beside_the_parts(tmp_path)
    a_full_disk_of_one_is_told_by_all(tmp_path)
    an_overflow_of_one_is_all_processes(tmp_path)
    pairs_are_those_of_one(tmp_path, teacher_folder)
    figures_are_those_of_one(tmp_path, teacher_folder)
    the_doctor_sees_both(tmp_path)
    prepare(tmp_path, tmp_path / "one")
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    an_odd_batch_is_refused_by_all(tmp_path)
    same(tmp_path / "classes 2-2", tmp_path / "classes 2")  # interrupted or not: bit for bit
    go_back(tmp_path / "classes 2", tmp_path / "classes 2-1")
    train(runs.of("classes", "classes 2-1", 4))
    for name in ("classes 2-1", "classes 1-2"):
        same(tmp_path / name, tmp_path / "classes 1", 1e-3)  # but for float32's rounding
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert len([line for line in lines if "grad_norm" in line]) == 4  # each step once
    one_process_exports_the_same_bytes(tmp_path, runs.of("classes", "classes 2", 4))


def an_odd_batch_is_refused_by_all(work: Path) -> None:
    words = "training.batch_size=5 does not divide by 2 processes"
    assert all(words in (work / f"refused-0-{number}.txt").read_text(encoding="utf-8") for number in range(2))
    assert not (work / "odd batch").exists()


def a_checkpoint_is_of_its_step_and_whole_for_one(work: Path) -> None:
    """Each process wrote its parts as they were when it began, though training went on; one process puts them together."""
    expected, (path,) = load_file(work / "odd.safetensors"), list_checkpoints(work / "odd")
    tensors, state = read_checkpoint(path)
    assert [(one.name, one.read_text(encoding="utf-8")) for one in work.glob("copied-*.txt")] == [
        ("copied-0.txt", "step_00000007")  # by one process, when the others had written their parts
    ]
    assert state == {"phase": "test", "step": 7}
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(tensors[name], value), name
    sizes = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    assert sizes.keys() == {f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)}


def an_export_takes_one_tensor_beside_the_parts(work: Path) -> None:
    """In the first process, and none in the others; the file is the one that is written of all tensors at once."""
    largest = 4 * 256 * 256
    first, second = (int((work / f"beside-{number}.txt").read_text(encoding="utf-8")) for number in range(2))
    assert largest <= first < 1.1 * largest
    assert second < 0.1 * largest
    assert (work / "put-together.safetensors").read_bytes() == (work / "at-once.safetensors").read_bytes()
    said = [(work / f"no-export-{number}.txt").read_text(encoding="utf-8") for number in range(2)]
    assert said[0] == said[1]
    assert "No space left on device" in said[0]


def one_process_exports_the_same_bytes(work: Path, settings: dict[str, Any]) -> None:
    """A run of two that has ended, asked for again."""
    path = work / "classes 2/generator/unet/diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    path.write_bytes(b"")
    train(settings)
    assert path.read_bytes() == before


def a_full_disk_of_one_is_told_by_all(work: Path) -> None:
    said = [(work / f"full-{number}.txt").read_text(encoding="utf-8") for number in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith(f"process 1 cannot write {work}")
    assert "No space left on device" in said[0]
    assert [path.name for path in (work / "odd").iterdir()] == ["step_00000007"]  # complete, and nothing half-written


def pairs_are_those_of_one(work: Path, teacher: Path) -> None:
    """Byte for byte, manifest included; nobody waits for a process that has no room."""
    model = fewstep.load_teacher(teacher, device="cpu", precision="fp32")
    alone = prepare_pairs(model, "teacher", work / "alone", num_pairs=7, shard_size=2, batch_size=2, num_steps=1)
    names = sorted(path.name for path in alone.iterdir())
    assert names == ["manifest.json", *(f"pairs_0000{number}.safetensors" for number in range(4))]
    assert sorted(path.name for path in (work / "pairs").iterdir()) == names
    assert all((work / "pairs" / name).read_bytes() == (alone / name).read_bytes() for name in names)
    said = [(work / f"no-room-{number}.txt").read_text(encoding="utf-8") for number in range(2)]
    assert said[0] == said[1]
    assert "No space left on device" in said[0]
    assert json.loads((work / "no room/manifest.json").read_text(encoding="utf-8"))["shards"] == []


def figures_are_those_of_one(work: Path, teacher: Path) -> None:
    """To the last digit; nobody measures where options differ, and what one meets all say."""
    measure_all(work, str(teacher), work / "figures of 1")
    for way, figures in WAYS.items():
        one, two = (json.loads((work / f"figures of {n}/{way}.json").read_text(encoding="utf-8")) for n in (1, 2))
        assert figures <= one.keys()
        assert one.pop("images_per_second") > 0
        assert two.pop("images_per_second") > 0
        assert one == two, way
    words = "process 1 has other options than process 0; start the same command with the same files everywhere"
    for name, expected in (("options", words), ("fault", "a picture that does not decode")):
        assert [(work / f"{name}-{n}.txt").read_text(encoding="utf-8") for n in range(2)] == [expected] * 2
    assert not (work / "refused.json").exists()


def the_doctor_sees_both(work: Path) -> None:
    lines = (work / "doctor-0.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["process", "0", "1"]
    assert lines[3].startswith("all 2 reach each other over gloo: a sum of 64 MB takes 0.")
    assert lines[4:] == ["a run of these processes would start here"]


def an_overflow_of_one_is_all_processes(work: Path) -> None:
    """In fp16 nobody makes the step, every scale is halved, and the next step is made by all; networks in parts or whole."""
    told = [json.loads((work / f"overflow-{number}.json").read_text(encoding="utf-8")) for number in range(2)]
    assert told[0] == told[1]
    for (kept, no_norm, scale), (moved, norm, same) in (told[0][:2], told[0][2:]):
        assert (kept, no_norm, scale) == (4, 0, 2.0**15)
        assert moved < 4
        assert norm == pytest.approx(2)
        assert same == scale


@pytest.mark.long
@pytest.mark.usefixtures("few_teacher_steps")
@pytest.mark.parametrize(
    "memory",
    [
        *({"memory.mode": mode} for mode in ("full", "lora_generator", "shared_base")),
        {"memory.mode": "shared_base", "memory.base": "nf4", "memory.teacher": "replicated"},
    ],
    ids=lambda memory: " ".join(memory.values()),
)
def test_four_begin_and_two_go_on(memory: dict[str, str], tmp_path: Path, teacher_folder: Path, pictures: Path) -> None:
    """Text runs of every memory mode, as one alone."""
    tiny_sd_folder(tmp_path / "sd")
    runs = Runs(tmp_path, teacher_folder, pictures)
    train({**runs.of("text", "one", 4), **memory})
    for processes, steps in ((4, 2), (2, 4)):
        ask(tmp_path, processes, runs=[({**runs.of("text", "many", steps), **memory}, "")])
    same(tmp_path / "many", tmp_path / "one", 1e-3)
