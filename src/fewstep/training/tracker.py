"""A copy of a run's metrics and pictures for Weights & Biases or trackio, where the environment asks for one.

`FEWSTEP_TRACKER=wandb` or `FEWSTEP_TRACKER=trackio`; no setting, since it changes nothing of a run. Nothing is asked for: without
`WANDB_API_KEY` or `WANDB_MODE` the files of Weights & Biases stay on this machine (`wandb sync` sends them). `WANDB_PROJECT` and
`TRACKIO_PROJECT` are the project, "fewstep" without.
"""

import os
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.errors import UserError
from fewstep.formats.json_files import read_json_object

VARIABLE, KNOWN = "FEWSTEP_TRACKER", ("wandb", "trackio")


class Tracker:
    """One run of a tracker, which has this interface in common with the other one.

    Args:
        name: wandb or trackio.
        folder: the run folder; an interrupted run goes on in the same place of the tracker.

    Raises:
        UserError: another name, or a package that is not installed.
    """

    def __init__(self, name: str, folder: Path) -> None:
        if name not in KNOWN:
            raise UserError(f"{VARIABLE}={name!r}: choose {' or '.join(KNOWN)}, or leave it unset")
        try:
            self.library: Any = import_module(name)
        except ImportError:
            raise UserError(f"{VARIABLE}={name} needs the package: pip install {name}") from None
        project = os.environ.get(f"{name.upper()}_PROJECT", "fewstep")
        told: dict[str, Any] = {"project": project, "name": folder.name, "config": _settings(folder), "resume": "allow"}
        if name == "wandb":
            told |= {
                "dir": str(folder),
                "id": sha256(str(folder.absolute()).encode()).hexdigest()[:16],
                "mode": _mode(),
            }
        self.run = self.library.init(**told)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """One step's metrics."""
        self.library.log(dict(values), step=step)

    def picture(self, name: str, step: int, path: Path) -> None:
        """A grid of sample pictures, as it lies in the run folder."""
        with Image.open(path) as picture:
            self.library.log({name: self.library.Image(picture.convert("RGB"))}, step=step)

    def close(self) -> None:
        """The end of a session."""
        self.library.finish()


def _mode() -> str:
    """Of Weights & Biases, which would ask for a key in the middle of a command."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _settings(folder: Path) -> dict[str, Any]:
    """The run's resolved settings, which the tracker shows beside its curves."""
    path = folder / "settings.json"
    return read_json_object(path, "remove the run folder") if path.is_file() else {}


def tracker_of(folder: Path) -> Tracker | None:
    """The tracker that the environment asks for, or none."""
    name = os.environ.get(VARIABLE, "")
    return Tracker(name, folder) if name else None
