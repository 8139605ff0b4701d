"""Runs under torchrun that are killed: one process or all of them, at any moment, also while they save."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.processes import ROOT, environment


def torchrun(*words: str, processes: int = 2, restarts: int = 0) -> list[str]:
    """A command line of `fewstep train` under torchrun."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "fewstep", "train", *words,
    ]  # fmt: skip


def run(command: list[str], **more: str) -> str:
    """What a command says, which ends well."""
    done = subprocess.run(
        command,
        env=environment(**more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == pid and words[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@dataclass
class Kills:
    """How often processes of a run were killed: in all, all of them at once, and in the middle of a save."""

    hits: int = 0
    of_all: int = 0
    in_saves: int = 0

    def kill(self, started: int, everyone: bool, chance: random.Random, checkpoints: Path) -> None:
        """Kill one or all of the workers that a torchrun started."""
        workers = children(started)
        for pid in workers if everyone else workers and [chance.choice(workers)]:
            os.kill(pid, signal.SIGKILL)
        self.hits += bool(workers)
        self.of_all += bool(workers) and everyone
        self.in_saves += bool(workers) and any(checkpoints.glob(".*.writing"))


def run_with_kills(command: list[str], folder: Path, kills: int, seed: int, log: Path) -> Kills:
    """Start a command and kill some or all of its workers `kills` times.

    A kill comes after the next checkpoint began to be written, at once (in the middle of it) or a little later.
    """
    chance, done, checkpoints = random.Random(seed), Kills(), folder / "checkpoints"
    with log.open("w") as said:
        started = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            seen: set[str] = set()
            while started.poll() is None:
                names = {path.name for path in checkpoints.glob("*step_*")} if folder.is_dir() else set()
                if done.hits < kills and names - seen:
                    seen |= names
                    time.sleep(chance.choice([0, 0, chance.random() * 0.3]))
                    done.kill(started.pid, chance.random() < 0.3, chance, checkpoints)
                time.sleep(0.005)
        finally:
            started.kill()
    assert started.returncode == 0, log.read_text()[-4000:]
    return done
