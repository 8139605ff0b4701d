"""Starts tests' processes that join over gloo, as torchrun would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "FEWSTEP_WAIT_SECONDS": "120", **more,
    }  # fmt: skip


def run_processes(
    count: int, *arguments: str, timeout: float = 300, each: dict[int, dict[str, str]] | None = None
) -> list[tuple[int, str]]:
    """(exit code, what it said) of `count` processes of `python ARGUMENTS`; `each`: more of some processes' environment."""
    port = str(free_port())
    started = []
    for rank in range(count):
        group = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments], env=environment(**{**group, **(each or {}).get(rank, {})}), cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    found = []
    try:
        for process in started:
            said, _ = process.communicate(timeout=timeout)
            found.append((process.returncode, said))
    finally:
        for process in started:
            process.kill()
    return found
