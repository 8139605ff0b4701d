"""Where the words a user names a model or a data set with lead: the one place that tells paths from hub ids."""

import re
from dataclasses import dataclass
from pathlib import Path

from fewstep.formats.atomic import standing
from fewstep.formats.bundled import BUNDLED, resolve_path

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_FILE = re.compile(r"\.(pkl|safetensors|ckpt|bin|pt|pth|npz|toml|parquet|tar|zip)$", re.IGNORECASE)
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/")  # of the hub's cache


@dataclass(frozen=True)
class Source:
    """A local path, something bundled, or a name on the hub.

    Attributes:
        text: as the user wrote it.
        path: where it lies on this machine; None for names on the hub.
        hub_id: "org/name" on the hub; empty for local paths.
    """

    text: str
    path: Path | None
    hub_id: str = ""

    @classmethod
    def parse(cls, text: "str | Path | Source") -> "Source":
        """Read "bundled:NAME", a path (~ is the home folder) or a hub id.

        What exists on this machine is never a hub id. Of what does not, only "org/name" is one: no absolute path, none
        that begins with a dot or "runs/", no file name of weights or data.

        Raises:
            UserError: "bundled:" and a name that does not ship.
        """
        if isinstance(text, Source):
            return text
        path = resolve_path(text)
        words = str(text)
        if path.exists() or words.startswith(BUNDLED) or not re.fullmatch(f"{_NAME}/{_NAME}", words, flags=re.ASCII):
            return cls(words, path)
        if words.startswith("runs/") or _FILE.search(words):
            return cls(words, path)
        return cls(words, None, words)

    @property
    def dataset_id(self) -> str:
        """The name of a data set on the hub, which may be a single word; empty for what exists and for other paths."""
        if self.path is None:
            return self.hub_id
        is_word = re.fullmatch(_NAME, self.text, flags=re.ASCII) and not _FILE.search(self.text)
        return self.text if is_word and not self.path.exists() else ""

    @property
    def is_file(self) -> bool:
        """Whether it is a file on this machine."""
        return self.path is not None and self.path.is_file()

    @property
    def exists(self) -> bool:
        """Whether it is on this machine."""
        return self.path is not None and self.path.exists()

    @property
    def lasting_name(self) -> str:
        """What to write into a card so that it is found again from any folder: an absolute path, or the words as they are."""
        if self.path is None or self.text.startswith(BUNDLED) or not self.path.exists():
            return self.text
        return str(self.path.resolve())

    def of_role(self, role: str) -> Path | None:
        """The folder of a run's "generator" or "teacher" where there is one, else the path itself; None on the hub."""
        if self.path is None:
            return None
        folder = standing(self.path)
        inner = standing(folder / role)
        return inner if inner.is_dir() else folder

    def __str__(self) -> str:
        return self.text


def cached_id(path: Path) -> str:
    """The hub id ("org/name") of a model that lies in the hub's cache; empty for other folders."""
    found = _SNAPSHOT.search(f"{path.as_posix()}/")
    return found[1].replace("--", "/", 1) if found else ""
