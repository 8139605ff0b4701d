"""A run folder on object storage: the run works in a folder of the user's cache, which is copied to its URL after each complete
checkpoint and at the end; where the URL is ahead, the run goes on from there.

A checkpoint's `state.json`, which has the digests of its other files, is written last and removed first: a checkpoint is complete
there or it is none.
"""

import hashlib
import re
import time
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, disk_error
from fewstep.formats.atomic import is_leftover, written_aside
from fewstep.formats.remote import is_url, open_storage, user_cache
from fewstep.progress import Stderr, tell, working
from fewstep.training.checkpoint import checkpoint_path, checkpoint_step, list_checkpoints

_PROOF = "state.json"
_STEP = re.compile(r"checkpoints/step_(\d{8,})/([^/]+)")
_NOT_COPIED = ("embeddings/",)  # of prompts, which are made again
_PAUSES = (1.0, 5.0, 20.0)  # seconds before a file is tried again


def staging_folder(url: str) -> Path:
    """Where the run of a URL works."""
    name = url.rstrip("/").rpartition("/")[2]
    return user_cache("runs") / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"[:120]


class RemoteRun:
    """The copy of a run folder at a URL.

    Args:
        url: of the run.
        folder: where it works.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._storage, self._root = open_storage(url)
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of change, by name

    def bring(self) -> None:
        """Fetch the run where the URL has a newer checkpoint than the folder.

        Raises:
            UserError: it cannot be read, or not be written here.
        """
        there, steps = self._there()
        own = [checkpoint_step(path) for path in list_checkpoints(self.folder / "checkpoints")]
        tell(f"run.folder={self.url}: the run works in {self.folder} and is copied after each checkpoint")
        if not steps or (own and max(own) >= max(steps)):
            return
        step = max(steps)
        names = [name for name in there if not name.startswith("checkpoints/")]
        try:
            with working(Stderr(), f"Fetching step {step} of {self.url}") as report:
                for number, name in enumerate(names, start=1):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    self._fetch(name, self.folder / name)
                    report(number, len(names) + 1)
                with written_aside(checkpoint_path(self.folder / "checkpoints", step)) as aside:
                    for name in steps[step]:
                        self._fetch(name, aside / name.rpartition("/")[2])
        except OSError as error:
            raise disk_error(error, self.folder) or error from error

    def push(self) -> None:
        """Copy what changed since the last time.

        Raises:
            UserError: it cannot be written there; what stood there before is whole.
        """
        there, steps = self._there()
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in self._here().items()}
        changed = [name for name, facts in files.items() if self._copied.get(name) != facts]
        if not self._copied:  # of a session before: complete checkpoints never change
            changed = [name for name in changed if not (found := _STEP.fullmatch(name)) or int(found[1]) not in steps]
        for name in sorted(changed, key=lambda name: (_is_proof(name), name)):
            self._send(name)
        self._copied = files
        gone = [name for name in there if _STEP.fullmatch(name) and name not in files]
        for name in sorted(gone, key=lambda name: (not _is_proof(name), name)):
            self._try(self._storage.rm_file, f"{self._root}/{name}")

    def _here(self) -> dict[str, Any]:
        """What a disk says of each file that is copied, by name."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            hidden = any(part.startswith(".") for part in name.split("/")) or is_leftover(path)
            if path.is_file() and not hidden and not name.startswith(_NOT_COPIED):
                found[name] = path.stat()
        return found

    def _there(self) -> tuple[list[str], dict[int, list[str]]]:
        """Names of all files at the URL, and those of each complete checkpoint by its step."""
        self._storage.invalidate_cache()
        paths = self._try(self._storage.find, self._root) if self._try(self._storage.exists, self._root) else []
        names = [path.removeprefix(self._root).strip("/") for path in paths]
        names = [name for name in names if ".." not in name.split("/")]
        steps: dict[int, list[str]] = {}
        for name in names:
            if found := _STEP.fullmatch(name):
                steps.setdefault(int(found[1]), []).append(name)
        return names, {step: own for step, own in steps.items() if any(_is_proof(name) for name in own)}

    def _send(self, name: str) -> None:
        if (self.folder / name).is_file():  # a log may have been replaced, a checkpoint dropped meanwhile
            self._try(self._storage.put_file, str(self.folder / name), f"{self._root}/{name}")

    def _fetch(self, name: str, target: Path) -> None:
        self._try(self._storage.get_file, f"{self._root}/{name}", str(target))

    def _try(self, work: Any, *arguments: str) -> Any:
        """Do something there, several times if need be.

        Raises:
            UserError: it never goes well.
        """
        for pause in (*_PAUSES, None):
            try:
                return work(*arguments)
            except Exception as error:  # each storage raises its own
                if pause is None or isinstance(error, PermissionError):
                    raise UserError(
                        f"run.folder={self.url}: {work.__name__} of {arguments[-1]} failed ({type(error).__name__}: {error}); the run is "
                        f"whole in {self.folder}, and the same command goes on"
                    ) from error
                time.sleep(pause)
        raise AssertionError


def remote_run(url: str, folder: Path) -> RemoteRun | None:
    """The copy of a run whose `run.folder` is a URL; None for one on a disk."""
    return RemoteRun(url, folder) if is_url(url) else None


def _is_proof(name: str) -> bool:
    return _STEP.fullmatch(name) is not None and name.endswith(f"/{_PROOF}")
