"""SIGKILLs at random moments of whole `fewstep train` commands: start-up, steps, grids, checkpoints, measurements, the end.

    python -m tests.fuzz.kills class-run --kills 50

The run that was killed again and again must end in the same files as one that was not, with each step once in metrics.jsonl.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from tests.fuzz.children import become_command, preload, run_command
from tests.fuzz.walk import make_world

CPU_SECONDS = 300  # of one whole run
TIMED = ("seconds", "images_per_second", "peak_memory_gib", "data_wait_share")


def lines_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [kept for line in lines if len(kept := {k: v for k, v in line.items() if k not in TIMED}) > 1]


def results_of(folder: Path) -> dict[str, bytes]:
    """What a run ends in: its newest checkpoint's and its generators' weights, and the measured points."""
    paths = [*(folder / "generator").rglob("*.safetensors"), *(folder / "best").rglob("*.safetensors")]
    paths += [sorted((folder / "checkpoints").iterdir())[-1] / "tensors.safetensors"]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if (folder / "best.json").is_file():
        points = json.loads((folder / "best.json").read_text())
        found["best.json"] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in points]).encode()
    return found


def steps_saved(folder: Path) -> int:
    """Steps of the newest checkpoint of a run."""
    places = (folder / "checkpoints").glob("step_????????") if (folder / "checkpoints").is_dir() else ()
    return max((int(place.name.removeprefix("step_")) for place in places), default=0)


def kill_once(
    arguments: list[object], folder: Path, log: Path, chance: random.Random, longest: float, most: int
) -> bool:
    """Start a command, kill it at a random moment, at the latest soon after `most` steps; False where it was faster."""
    child = os.fork()
    if child == 0:
        become_command(arguments, log, CPU_SECONDS)
    until = time.monotonic() + longest * chance.random()
    while time.monotonic() < until:
        if steps_saved(folder) >= most:
            until = min(until, time.monotonic() + 0.2 * chance.random())
            most = sys.maxsize
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_often(world: Path, name: str, kills: int, scratch: Path) -> list[str]:
    """What differs between the run that was killed and the one that was not."""
    num_steps = 8 + 2 * kills

    def arguments(folder: str) -> list[object]:
        return ["train", world / f"static/{name}.toml", f"run.folder={scratch / folder}", f"training.num_steps={num_steps}",
                "run.sample_every=3", "run.checkpoint_every=2"]  # fmt: skip

    began = time.monotonic()
    whole = run_command(arguments("whole"), scratch / "log", CPU_SECONDS)
    assert whole.code == 0, whole.said
    longest, chance, inside = (time.monotonic() - began) / 4, random.Random(0), 0
    for number in range(kills):
        most = 2 + num_steps * (number + 1) // kills
        inside += kill_once(arguments("killed"), scratch / "killed", scratch / "log", chance, longest, most)
    got = steps_saved(scratch / "killed")
    last = run_command(arguments("killed"), scratch / "log", CPU_SECONDS)
    if last.code:
        return [f"does not go on: {last.said[-2000:]}"]
    print(f"{name}: {inside} kills came before the end of {num_steps} steps, the last one after {got} of them")
    faults = [] if inside >= 0.9 * kills else [f"only {inside} of {kills} kills came before the end"]
    if lines_of(scratch / "whole") != lines_of(scratch / "killed"):
        faults.append("metrics.jsonl differs")
    before, after = results_of(scratch / "whole"), results_of(scratch / "killed")
    faults += [f"{path} differs" for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    left = [path.name for path in (scratch / "killed").rglob(".*.writing")]
    return [*faults, *(f"left behind: {name}" for name in left)]


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["class-run", "text-run"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--world", type=Path)
    options = parser.parse_args()
    preload()
    world = options.world or Path(tempfile.mkdtemp()) / "world"
    if not world.exists():
        make_world(world)
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(dir=world))
    os.environ["HF_HOME"] = str(scratch / "hf")
    faults = kill_often(world, options.name, options.kills, scratch)
    print(f"{options.name}: {options.kills} kills, {time.monotonic() - began:.0f} s", *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
