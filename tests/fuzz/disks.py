"""Full disks and read-only file systems under every command that writes: one sentence, nothing half-written.

    python -m tests.fuzz.disks [--only NAME] [--sizes 6]        needs root, to mount small file systems

After each failure the same command on the same folder, given room, must succeed: so nothing that was left stands in its way.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from tests.fuzz.children import Outcome, preload, run_command
from tests.fuzz.walk import make_world
from tests.fuzz.world import SAMPLE

Arguments = Callable[[Path], list[object]]


def writing_commands(static: Path) -> dict[str, Arguments]:
    """Every command that writes, to a folder that is there."""
    subjects = static.parent / "subjects"
    cpu = ("--device", "cpu")
    class_run, text_run = static / "class-run.toml", static / "text-run.toml"
    return {
        "sample grid": lambda to: ["sample", static / "generator", "--num-images", 4, "--grid", to / "g.png", *SAMPLE],
        "sample pictures": lambda to: ["sample", static / "generator", "--num-images", 4, "--out", to / "p", *SAMPLE],
        "evaluate": lambda to: ["evaluate", static / "generator", "--features", static / "features", "--reference",
                                static / "reference.npz", "--num-images", 4, "--json", to / "e.json", *SAMPLE],
        "report": lambda to: ["report", subjects / "class-run", "--out", to / "r.html"],
        "convert pickle": lambda to: ["convert", subjects / "edm-pickle/net.pkl", to / "m"],
        "convert lora": lambda to: ["convert", subjects / "kohya-lora/lora.safetensors", to / "m", "--base", static / "sd",
                                    "--step-indices", "999,749,499,249"],
        "convert single file": lambda to: ["convert", subjects / "single-file/model.safetensors", to / "m", "--base", static / "sd"],
        "export diffusers": lambda to: ["export", static / "generator", to / "m", "--num-samples", 1, *cpu],
        "export lora": lambda to: ["export", subjects / "text-run", to / "m", "--as", "lora", "--num-samples", 1, *cpu],
        "prepare pairs": lambda to: ["prepare", "pairs", static / "teacher", to / "p", "--num-pairs", 4, "--teacher-steps", 1, *cpu],
        "prepare latents": lambda to: ["prepare", "latents", static / "sd", to / "l", "--images", subjects / "captions-jsonl",
                                       "--resolution", 16, *cpu],
        "prepare embeddings": lambda to: ["prepare", "embeddings", static / "sd", static / "prompts.txt", to / "e", *cpu],
        "prepare statistics": lambda to: ["prepare", "statistics", static / "pictures", to / "s.npz", "--features",
                                          static / "features", "--resolution", 16, "--channels", 1, *cpu],
        "train classes": lambda to: ["train", class_run, f"run.folder={to}/run", "run.tensorboard=true"],
        "train text": lambda to: ["train", text_run, f"run.folder={to}/run"],
    }  # fmt: skip


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Change a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def used_bytes(folder: Path) -> int:
    """Blocks that a tree takes."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def fault_of(outcome: Outcome) -> str:
    """What is wrong with how a command ended on such a disk; empty where nothing is."""
    if outcome.code == 0:
        return ""
    told = [line for line in outcome.said.splitlines() if line.startswith("fewstep: ")]
    return "" if outcome.code == 2 and len(told) == 1 else f"exit code {outcome.code}, {len(told)} sentences"


def leftovers(folder: Path) -> list[str]:
    """What only a killed process may leave."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.name.startswith(".") and path.suffix in (".writing", ".replaced")
    ]


def try_disks(name: str, arguments: Arguments, scratch: Path, num_sizes: int) -> tuple[int, list[str]]:
    """(disks tried, failures) of one command: some sizes below what it needs, then a read-only one."""
    roomy = scratch / "roomy"
    roomy.mkdir()
    whole = run_command(arguments(roomy), scratch / "log")
    assert whole.code == 0, whole.said
    needed, failures, refused = used_bytes(roomy), [], 0
    for number in range(num_sizes + 1):
        read_only = number == num_sizes
        size = 2**26 if read_only else max(4096, 4096 * int(needed / 4096 * (number + 0.3) / num_sizes))
        with small_disk(scratch / f"disk{number}", size) as disk:
            if read_only:
                remount(disk, "ro")
            outcome = run_command(arguments(disk), scratch / "log")
            what = f"{name}, {'read-only' if read_only else f'{size} of {needed} bytes'}"
            refused += outcome.code != 0
            if fault := fault_of(outcome):
                failures.append(f"{what}: {fault}: {outcome.said[-1500:]}")
            if left := leftovers(disk):
                failures.append(f"{what}: left {left}")
            remount(disk, f"rw,size={2**27}")
            again = run_command(arguments(disk), scratch / "log")
            if again.code != 0 and outcome.code != 0:
                failures.append(f"{what}, repeated with room: exit code {again.code}: {again.said[-1500:]}")
    shutil.rmtree(roomy)
    if not refused:
        failures.append(f"{name}: no disk was too small")
    return num_sizes + 1, failures


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--sizes", type=int, default=6)
    parser.add_argument("--world", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    preload()
    world = options.world or Path(tempfile.mkdtemp()) / "world"
    if not world.exists():
        make_world(world)
    tried, failures = 0, []
    for name, arguments in writing_commands(world / "static").items():
        if options.only and name not in options.only:
            continue
        scratch = Path(tempfile.mkdtemp(dir=world))
        os.environ["HF_HOME"] = str(scratch / "hf")
        disks, wrong = try_disks(name, arguments, scratch, options.sizes)
        tried, failures = tried + disks, [*failures, *wrong]
        print(f"{name}: {disks} disks, {len(wrong)} failures", *wrong, sep="\n  ", file=sys.stderr, flush=True)
        shutil.rmtree(scratch, ignore_errors=True)
    if options.out:
        options.out.write_text(json.dumps({"disks": tried, "failures": failures}, indent=1))
    print(f"{tried} disks, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
