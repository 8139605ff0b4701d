"""Whole runs under torchrun: killed and restarted by itself, continued by another number of processes, refused in one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from tests.distributed.kills import run, run_with_kills, torchrun
from tests.distributed.processes import ROOT, environment, run_processes
from tests.distributed.test_together import same

pytestmark = pytest.mark.long

RECIPE = """
[teacher]
path = "{teacher}"
[generator]
ema_half_life_images = 100
step_indices = [999, 749, 499, 249]
[data]
images = "{pictures}"
[losses]
gan_generator_weight = 3e-3
gan_discriminator_weight = 1e-2
[optimizer]
generator_lr = 1e-3
fake_score_lr = 1e-3
warmup_steps = 2
[training]
num_steps = {steps}
batch_size = 4
generator_every = 2
seed = 3
[compute]
device = "cpu"
precision = "fp32"
[run]
sample_every = 1000
checkpoint_every = 2
keep_checkpoints = 1
sample_images = 1
"""


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: Path, pictures: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(teacher=teacher_folder, pictures=pictures, steps=6), encoding="utf-8")
    return path


def train(recipe: Path, folder: Path, processes: int, *words: str) -> list[tuple[int, str]]:
    words = (str(recipe), f"run.folder={folder}", *words)
    return run_processes(processes, "-m", "fewstep", "train", *words, timeout=300)


def test_only_the_first_process_speaks(recipe: Path, tmp_path: Path) -> None:
    ended = train(recipe, tmp_path / "run", 2, "training.num_steps=2")
    assert [code for code, _ in ended] == [0, 0], ended
    assert "step 2, done" in ended[0][1]
    assert ended[1][1] == ""


def test_killed_runs_go_on_by_themselves(recipe: Path, tmp_path: Path) -> None:
    """20 kills of one process or of both, in and between saves, end bit-identically to an undisturbed run."""
    words = (str(recipe), "training.num_steps=60")
    run(torchrun(*words, f"run.folder={tmp_path / 'calm'}"))
    wild = torchrun(*words, f"run.folder={tmp_path / 'wild'}", restarts=40)
    kills = run_with_kills(wild, tmp_path / "wild", 20, 0, tmp_path / "log")
    print(kills)
    assert kills.hits == 20
    assert kills.of_all > 0
    assert kills.in_saves > 0
    same(tmp_path / "calm", tmp_path / "wild")


def test_the_emoji_recipe_is_killed_goes_on_and_is_resumed_by_one(tmp_path: Path) -> None:
    """The bundled text recipe, a LoRA on a sharded base: 12 steps on two processes, killed twice, 2 more on one."""
    words = [
        str(ROOT / "recipes/emoji_dmd2_4step_lora.toml"), f"run.folder={tmp_path / 'run'}", "training.batch_size=8",
        "training.time_limit_minutes=0", "run.checkpoint_every=4", "run.sample_images=2", "compute.device=cpu", "best.num_images=50",
    ]  # fmt: skip
    started = time.monotonic()
    kills = run_with_kills(
        torchrun(*words, "training.num_steps=12", restarts=3), tmp_path / "run", 2, 1, tmp_path / "log"
    )
    print(kills, f"{time.monotonic() - started:.0f} s", (tmp_path / "log").read_text(), sep="\n")
    assert kills.hits == 2
    said = run([sys.executable, "-m", "fewstep", "train", *words, "training.num_steps=14"])
    print(said)
    assert "goes on after step 12" in said
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "fake_score_grad_norm" in line]
    assert steps == list(range(14))  # each once


def test_sigterm_to_torchrun_saves_the_run(recipe: Path, tmp_path: Path) -> None:
    """As a scheduler sends it: the step ends, all processes save it, one says where."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as said:
        started = subprocess.Popen(
            torchrun(str(recipe), "training.num_steps=5000", f"run.folder={folder}", restarts=1), env=environment(),
            cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            until = time.monotonic() + 240
            while not list_checkpoints(folder / "checkpoints") and time.monotonic() < until:
                time.sleep(0.05)
            started.terminate()
            started.wait(120)
        finally:
            started.kill()
    (saved,) = re.findall(
        r"fewstep: stopped by SIGTERM after (\d+) steps; everything is saved in (\S+)\. Continue with the same torchrun",
        log.read_text(),
    )
    (path,) = list_checkpoints(folder / "checkpoints")
    assert (int(saved[0]), saved[1]) == (read_checkpoint(path)[1]["step"], str(path))


def test_two_machines_under_slurm(recipe: Path, tmp_path: Path) -> None:
    """The sbatch file with stand-ins for Slurm: `srun` starts its command once for each of two machines, both this one."""
    twice = 'shift 2; "$@" & other=$!; "$@"; wait $other'
    for name, does in (("scontrol", "printf 'localhost\\nlocalhost\\n'"), ("srun", twice)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    said = run(
        ["bash", str(ROOT / "recipes/several_nodes.sbatch"), str(recipe), f"run.folder={tmp_path / 'two'}"],
        PATH=os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        SLURM_JOB_NODELIST="any", SLURM_CPUS_PER_TASK="1", SLURM_JOB_NUM_NODES="2", PROCESSES_PER_NODE="1",
        SLURM_JOB_ID=str(os.getpid()),
    )  # fmt: skip
    assert said.count("distill: step 6, done") == 1
    assert [code for code, _ in train(recipe, tmp_path / "one", 2)] == [0, 0]
    same(tmp_path / "two", tmp_path / "one")


def refused(ended: list[tuple[int, str]], words: str) -> None:
    """All end with exit code 2, and one of them says why."""
    assert [code for code, _ in ended] == [2] * len(ended), ended
    sentences = [line for _, said in ended for line in said.splitlines() if line.startswith("fewstep:")]
    assert len(sentences) == 1, ended
    assert words in sentences[0], sentences


def test_a_batch_that_does_not_divide(recipe: Path, tmp_path: Path) -> None:
    refused(
        train(recipe, tmp_path / "run", 2, "training.batch_size=5"),
        "training.batch_size=5 does not divide by 2 processes",
    )
    assert not (tmp_path / "run").exists()


def test_other_settings_somewhere(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "second" / recipe.name
    other.parent.mkdir()
    other.write_text(recipe.read_text(encoding="utf-8").replace("seed = 3", "seed = 4"), encoding="utf-8")
    script = "import os, sys; sys.argv[2] = sys.argv[2 + int(os.environ['RANK'])]; del sys.argv[3]; import fewstep.cli.main as m; m.main()"
    words = ("-c", script, "train", str(recipe), str(other), f"run.folder={tmp_path / 'run'}")
    refused(run_processes(2, *words), "process 1 has other settings than process 0")


def test_a_checkpoint_of_other_settings_and_a_shard_that_is_missing(recipe: Path, tmp_path: Path) -> None:
    assert [code for code, _ in train(recipe, tmp_path / "run", 2, "training.num_steps=2")] == [0, 0]
    told = "run holds a run of other settings: training.seed was 3, is 4; set them back or choose another run.folder"
    refused(train(recipe, tmp_path / "run", 2, "training.seed=4"), told)
    next(list_checkpoints(tmp_path / "run/checkpoints")[-1].glob("shard-00002-*")).unlink()
    words = "is damaged (shard-00002-model-00001-of-00001.safetensors is missing)"
    refused(train(recipe, tmp_path / "run", 2), words)
    refused(train(recipe, tmp_path / "run", 1), words)


def test_a_process_that_does_not_come(recipe: Path, tmp_path: Path) -> None:
    """Under torchrun, which has a store of its own, and where the first process has it."""
    words = ("-m", "fewstep", "train", str(recipe), f"run.folder={tmp_path / 'run'}")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    for more, told in (
        (of_torchrun, "process 0 waited 10 s in vain for process 1 to start"),
        ({}, "process 0 of 2 cannot reach the others"),
    ):
        ((code, said),) = run_processes(1, *words, each={0: {"WORLD_SIZE": "2", "FEWSTEP_WAIT_SECONDS": "10", **more}})
        assert code == 2
        assert told in said


def in_step(recipe: Path, tmp_path: Path, does: str) -> tuple[int, str]:
    """What the first process ends with where the second one does something instead of its third step."""
    script = (
        "import os, sys, time, fewstep.cli.main, fewstep.training.distill as distill\nstep = distill.DistillationJob.step\n"
        f"def odd(job, number, progress):\n    if number == 2 and os.environ['RANK'] == '1': {does}\n    return step(job, number, progress)\n"
        "distill.DistillationJob.step = odd\nfewstep.cli.main.main()"
    )
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # torchrun's, which outlives processes
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port), "FEWSTEP_WAIT_SECONDS": "60"}
    words = ("-c", script, "train", str(recipe), f"run.folder={tmp_path / 'run'}")
    return run_processes(2, *words, each={0: more, 1: more})[0]


@pytest.mark.parametrize("does", ["os._exit(1)", "time.sleep(90)"])
def test_a_process_that_is_waited_for_in_vain(does: str, recipe: Path, tmp_path: Path) -> None:
    code, said = in_step(recipe, tmp_path, does)
    assert code == 2, said
    assert "fewstep: the processes lost each other (process 1 does not answer: " in said
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} <= {"step_00000002"}  # nothing half-written


def test_other_data_and_other_folders_somewhere(recipe: Path, tmp_path: Path, pictures: Path) -> None:
    """The same words in other folders."""
    for number in range(2):
        shutil.copytree(pictures, tmp_path / f"{number}/pictures")
    next(path for path in (tmp_path / "1/pictures").rglob("*") if path.is_file()).unlink()
    script = f"import os, fewstep.cli.main as m; os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK']); m.main()"
    words = ("-c", script, "train", str(recipe))
    run = f"run.folder={tmp_path / 'run'}"
    refused(run_processes(2, *words, run, "data.images=pictures"), "process 1 has other data than process 0")
    refused(run_processes(2, *words, "run.folder=run"), "process 1 does not see what process 0 writes in run")


def test_more_processes_than_gpus(recipe: Path, tmp_path: Path) -> None:
    ended = train(recipe, tmp_path / "run", 2, "compute.device=cuda")
    assert [code for code, _ in ended] == [2, 2]
    assert "GPUs that CUDA can use" in ended[0][1]
