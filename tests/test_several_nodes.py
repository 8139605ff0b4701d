"""The sbatch file: its shell is valid, its options are Slurm's, and what it starts is a torchrun that torch understands."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "recipes/several_nodes.sbatch"
OPTIONS = {  # `man sbatch`
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue", "open-mode",
    "output",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines; `scontrol` and `srun` are stand-ins, and srun's says what it would start."""
    for name, does in (("scontrol", "printf 'one\\ntwo\\n'"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "[one-two]",
        "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456",
    }  # fmt: skip


def test_the_shell_and_the_options_are_valid() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text(encoding="utf-8")
    options = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert len(options) == len(set(options)) == text.count("#SBATCH")
    assert set(options) == OPTIONS
    assert text.index("#SBATCH --output") < text.index("set -euo")  # Slurm stops reading at the first command


def test_it_starts_a_torchrun_that_torch_understands(slurm: dict[str, str]) -> None:
    words = ["recipes/sdxl_dmd2_4step.toml", "run.folder=/shared/my runs"]
    said = subprocess.run(["bash", str(SBATCH), *words], env=slurm, check=True, capture_output=True, text=True).stdout
    *of_srun, rest = said.partition("torchrun\n")
    assert of_srun[0].split() == ["--cpus-per-task", "64"]
    found = get_args_parser().parse_args(rest.splitlines())
    assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("2", "gpu", 10)
    assert (found.rdzv_backend, found.rdzv_id, found.rdzv_endpoint) == ("c10d", "123456", "one:23456")
    assert (found.module, found.training_script, found.training_script_args) == (True, "fewstep", ["train", *words])


def test_without_a_recipe_it_says_how(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SBATCH)], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")
