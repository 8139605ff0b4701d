"""For processes that tests start: every address but this machine's own is refused and noted, without a word to them that they are offline."""

import os
from pathlib import Path

GUARD = """
import os, socket
_connect, _resolve = socket.socket.connect, socket.getaddrinfo
_own = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", None, "")
def _note(address):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{address}\\n")
    raise OSError(101, f"refused by the test: {address}")
def connect(self, address):
    return _connect(self, address) if self.family == socket.AF_UNIX or address[0] in _own else _note(address)
def getaddrinfo(host, *arguments, **options):
    return _resolve(host, *arguments, **options) if host in _own else _note(host)
socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = getaddrinfo
"""


def guarded(folder: Path) -> dict[str, str]:
    """The environment of a process whose network is watched; notes and hub cache lie in `folder`."""
    (folder / "sitecustomize.py").write_text(GUARD)
    source = str(Path(__file__).parents[1] / "src")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GRADIO_"))}
    return environment | {
        "PYTHONPATH": f"{folder}{os.pathsep}{source}", "ASKED": str(folder / "asked"), "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def asked(folder: Path) -> list[str]:
    """The addresses that the process wanted."""
    notes = folder / "asked"
    return notes.read_text().splitlines() if notes.exists() else []
