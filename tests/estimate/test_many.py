"""What each of many processes needs: parts as `fully_shard` makes them, memory as processes measured it, time that adds up."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.errors import UserError
from fewstep.estimate.many import GPUS, Layout, describe_processes, find_gpu, own_settings, parts_gathered, share_of
from fewstep.estimate.memory import estimate_run
from fewstep.families.registry import build_on_meta, build_released
from fewstep.settings import TrainSettings, load_settings
from tests.estimate.memory_cases import case_settings, description

FAKE_GROUP = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from fewstep.distillation.sharding import build_spread, shard_network
from fewstep.families.registry import build_released

found = {}
for words in json.loads(sys.argv[1]):
    name, processes, rank = words
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    spread = build_spread(torch.device("cpu"), "sharded", 0)
    network = build_released(name)
    shard_network(network, spread.mesh)
    found[f"{name}/{processes}/{rank}"] = sum(part.to_local().numel() for part in network.parameters())
    dist.destroy_process_group()
print(json.dumps(found))
"""


def sharded(*cases: tuple[str, int, int]) -> dict[str, int]:
    """Parameters that a process has after `fully_shard` in a group that is simulated, by network/processes/rank."""
    done = subprocess.run(
        [sys.executable, "-c", FAKE_GROUP, json.dumps(cases)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@cache
def layout(processes: int, mode: str = "full", size: str = "one level", batch: int = 4, **memory: Any) -> Layout:
    settings = own_settings(case_settings(mode, batch, **memory), processes)
    network = build_on_meta(description(size))
    return Layout(settings, network, processes, estimate_run(settings, network, gpu=False, pictures=False))


@pytest.mark.slow
def test_sixty_four_processes_start_and_have_what_was_said() -> None:
    """The published ImageNet-64 network, whole, in a simulated group: the first has the largest part, the last has some or none."""
    network, cases = "imagenet64-adm", [("imagenet64-adm", 64, 0), ("imagenet64-adm", 64, 63), ("imagenet64-adm", 7, 0)]
    parameters = list(build_released(network).parameters())
    whole, found = sum(part.numel() for part in parameters), sharded(*cases)
    for _, processes, rank in cases:
        own = found[f"{network}/{processes}/{rank}"]
        if rank == 0:
            assert own == pytest.approx(share_of(parameters, processes) * whole, abs=1)
        else:
            assert own < whole / processes
    assert found["imagenet64-adm/64/0"] < 1.01 * whole / 64


@pytest.mark.long
@pytest.mark.parametrize(("network", "gib"), [("sd15", 24), ("sdxl", 80)])
def test_the_published_text_rows_start_on_64_processes(network: str, gib: float) -> None:
    parameters = list(build_released(network).parameters())
    whole = sum(part.numel() for part in parameters)
    own = sharded((network, 64, 0))[f"{network}/64/0"]
    assert own == pytest.approx(share_of(parameters, 64) * whole, abs=1)
    assert own * (3 * 4 + 2 * 8) < gib * 2**30  # three networks, two of them with moments


@pytest.mark.slow
def test_no_part_of_sdxl_is_large() -> None:
    """What is gathered at once does not shrink with the number of processes."""
    network = build_released("sdxl")
    assert max(parts_gathered(network)) < 0.02 * sum(part.numel() for part in network.parameters())


@pytest.mark.slow
def test_more_processes_need_less_each_and_one_what_one_needs() -> None:
    one, two, four = (sum(layout(number).memory().values()) for number in (1, 2, 4))
    assert four < two < one + layout(1).memory()["gathered blocks"] + 1
    assert layout(1).share == 1


@pytest.mark.slow
def test_where_the_teacher_lies_is_counted() -> None:
    sharded, replicated, offloaded = (
        layout(2, "shared_base", teacher=place).memory()["between steps"]
        for place in ("sharded", "replicated", "offloaded")
    )
    assert offloaded < sharded < replicated
    weights = 4 * layout(2).estimate.parameters["teacher"]
    assert replicated - offloaded == pytest.approx(weights)


@pytest.mark.slow
def test_what_travels() -> None:
    """LoRAs exchange gradients of their adapters only; a teacher that each has whole is not gathered; copies stay in machines."""
    full, lora, whole = layout(4), layout(4, "shared_base"), layout(4, "shared_base", teacher="replicated")
    assert whole.exchanged()[0] == 0
    assert 0 < whole.exchanged()[1] < full.exchanged()[0]
    assert lora.exchanged()[0] > 0
    assert full.exchanged()[1] == 0
    inside, between = layout(4, shard_over=2).exchanged()
    assert 0 < between < inside < full.exchanged()[0]
    parts = replace(full, settings=own_settings(case_settings("full", 4), 4))
    assert parts.exchanged() == full.exchanged()


@pytest.mark.slow
def test_the_lines_of_a_dry_run() -> None:
    said = list(describe_processes(layout(2), "h100", 2e15))
    assert said[0].startswith("each of 2 processes: 2 samples, ")
    assert "fits in h100, 80 GiB, with a tenth of it left free" in said[0]
    assert (
        "while it is read, each has its own part of the teacher, on its card, and 0.00 GiB of host memory beside it"
        in said
    )
    whole = replace(layout(2), reads_parts=False)  # as of an EDM .pkl
    line = "while it is read, each has the teacher whole: 0.0 GiB of host memory, then 0.0 GiB of its card"
    assert line in list(describe_processes(whole, "h100", 2e15))
    arithmetic = 2e15 / 2 / (0.2 * GPUS["h100"].rate)
    assert f"({arithmetic:.2g} s of arithmetic at 198 TFLOP/s" in said[2]
    assert "not measured on several GPUs" in said[2]
    assert "does NOT fit" in next(iter(describe_processes(layout(2, batch=2**14), "rtx4090", 2e15)))


@pytest.mark.slow
def test_a_teacher_too_large_to_be_read_is_named() -> None:
    """Its parts would fit: whole in float32, as each process has it first, it does not; as adapters' base in bf16 it is half of that."""
    large, count = layout(2, teacher="replicated"), 25_000_000_000
    large = replace(large, estimate=replace(large.estimate, parameters=large.estimate.parameters | {"teacher": count}))
    assert large.while_read == (4 * count, 4 * count)
    line = next(line for line in describe_processes(large, "h100", 2e15) if "while it is read" in line)
    assert line.endswith("93.1 GiB of host memory, then 93.1 GiB of its card, which does NOT fit in h100")
    shared = {"base": "bf16", "mode": "shared_base"}
    memory = large.settings.memory.model_copy(update=shared)
    halved = replace(large, settings=large.settings.model_copy(update={"memory": memory}))
    assert halved.while_read == (4 * count, 2 * count)
    for other in ({"base": "nf4"}, {"teacher": "offloaded_blocks"}):
        changed = large.settings.model_copy(update={"memory": memory.model_copy(update=other)})
        assert replace(large, settings=changed).while_read == (4 * count, 0)


@pytest.mark.slow
def test_what_a_process_reads_its_part_through() -> None:
    """Its rows of the largest tensor; where LoRAs are merged what they add to it as well, and what that is made of."""
    parts = layout(2)
    largest = max(part.numel() for part in parts.network.parameters())
    assert parts.while_read == (4 * largest / 2, 0)
    teacher = parts.settings.teacher.model_copy(update={"loras": ("style.safetensors",)})
    merged = replace(parts, settings=parts.settings.model_copy(update={"teacher": teacher}))
    assert merged.while_read == (4 * largest * 2.5, 0)
    assert replace(parts, reads_parts=False).while_read == layout(2, teacher="replicated").while_read
    offloaded = list(describe_processes(layout(2, teacher="offloaded"), "h100", 2e15))
    assert any("each has its own part of the teacher, in host memory, and " in line for line in offloaded)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-run", "--gpus", "3"], "training.batch_size=280 does not divide by 3 processes"),
        (
            ["--dry-run", "--gpus", "2", "--gpu", "tpu"],
            "--gpu tpu: its rates are not known here; choose one of rtx4090",
        ),
        (["--gpus", "2"], "--gpus belongs to --dry-run; to train on several, start the command with torchrun"),
    ],
)
def test_what_cannot_be_estimated(words: list[str], said: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes/imagenet64_dmd2.toml"
    answer = CliRunner().invoke(app, ["train", str(recipe), *words])
    assert isinstance(answer.exception, UserError)
    assert said in str(answer.exception)


def test_cards_are_known_however_they_are_written() -> None:
    assert [find_gpu(name) for name in ("H100", "nvidia-h200", "RTX 4090")] == ["h100", "h200", "rtx4090"]


def distils(recipe: Path) -> bool:
    """Whether a recipe is one of `fewstep train`, not of `fewstep pretrain`."""
    try:
        return bool(load_settings(TrainSettings, recipe))
    except UserError:
        return False


RECIPES = [path for path in sorted(Path(__file__).parents[2].glob("recipes/*.toml")) if distils(path)]


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [2, 8])
def test_every_recipe_says_what_many_processes_need(recipe: Path, processes: int) -> None:
    """A plan, or one sentence where the batch does not divide; recipes whose teacher a user brings say what is missing."""
    answer = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--gpus", str(processes)])
    batch = load_settings(TrainSettings, recipe).training.batch_size
    if batch % processes:
        assert isinstance(answer.exception, UserError)
        assert f"training.batch_size={batch} does not divide by {processes} processes" in str(answer.exception)
        return
    assert answer.exception is None, answer.exception
    if "memory: unknown; " in answer.stdout:  # a teacher that is yet to be trained
        return
    assert f"each of {processes} processes: {batch // processes} samples, " in answer.stdout
    assert "time of a step: " in answer.stdout
