"""Whose a run folder is: one run's settings, and one process at a time."""

import shutil
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.formats.atomic import is_leftover, remove_leftovers, replaced_file
from fewstep.formats.folder_lock import LOCK, FolderLock, is_locked
from fewstep.formats.json_files import read_json_object
from fewstep.formats.remote import is_url
from fewstep.parallel import is_first
from fewstep.settings import PretrainSettings, TrainSettings, flatten_settings, parse_settings
from fewstep.training.remote_run import staging_folder
from fewstep.training.run_data import Content, has_changed, note_data, read_contents, same_data

SETTINGS = "settings.json"
EMBEDDINGS = "embeddings"  # folder of stored text embeddings, made before the run claims its folder
# what may change between the sessions of one run
_FREE = (
    "run.", "best.", "optimizer.", "compute.", "training.num_steps", "training.time_limit_minutes",
    "training.microbatch_size", "expected", "memory.teacher", "memory.shard_over",
)  # fmt: skip
_held: dict[Path, FolderLock] = {}  # locks of this process, until its runs end


def run_folder(settings: TrainSettings | PretrainSettings) -> Path:
    """The run folder a run of these settings uses; of a URL the folder in which it works."""
    if is_url(settings.run.folder):
        return staging_folder(settings.run.folder)
    return Path(settings.run.folder or "runs/unnamed").expanduser()


def stored_settings(folder: Path, group: str) -> dict[str, Any]:
    """A group of the settings that a run began with; nothing where they are not there or not whole, which `claim_run_folder` says."""
    try:
        stored = read_json_object(folder / SETTINGS).get(group)
    except UserError:
        return {}
    return stored if isinstance(stored, dict) else {}


def claim_run_folder(
    settings: TrainSettings | PretrainSettings, folder: Path, *, data_changed: bool = False,
    contents: dict[str, Content] | None = None,
) -> None:  # fmt: skip
    """Lock a run folder for this process, and write the resolved settings, or check that it has the same.

    The number of steps, the time limit, `optimizer.*`, `compute.*`, `run.*` and where weights lie may change between sessions of one run;
    bit-identical continuation is promised when they do not. Data and teacher are compared by content, wherever they lie
    (training/run_data.py); with `data_changed` other data than before are taken. What a killed process left half-written is removed.

    Args:
        contents: what the settings that name data lead to, where that is known from `refuse_other_data`.

    Raises:
        UserError: another process trains there, the folder holds a run of other settings (they are named), or it
            cannot be written.
    """
    path = folder / SETTINGS
    if not path.exists() and folder.exists():
        foreign = not folder.is_dir() or any(
            entry.name not in (EMBEDDINGS, LOCK) and not is_leftover(entry) for entry in folder.iterdir()
        )
        if foreign:
            raise UserError(f"{folder} is not empty and no run of fewstep; choose another run.folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make run folder {folder}: {error}; choose another run.folder") from error
    hold(folder)
    try:
        contents = contents or read_contents(flatten_settings(settings))
        if path.exists():
            _refuse_other_settings(settings, folder, path, contents, data_changed)
        remove_leftovers(folder)
        with replaced_file(path) as aside:
            aside.write_text(settings.model_dump_json(indent=1), encoding="utf-8")
        note_data(folder, contents)
    except BaseException:
        release(folder)
        raise


def refuse_other_data(
    settings: TrainSettings, folder: Path, *, data_changed: bool = False
) -> dict[str, Content] | None:
    """Before a continued run builds anything: its data are those it began with, or may be others, whose prompts are then encoded anew.

    Returns:
        What the settings that name data lead to; None for a run that begins.

    Raises:
        UserError: another process trains there; other settings or data than before.
    """
    path = folder / SETTINGS
    if not path.exists():
        return None
    was_held = folder.resolve() in _held
    hold(folder)
    try:
        contents = read_contents(flatten_settings(settings))
        _refuse_other_settings(settings, folder, path, contents, data_changed)
        if has_changed(folder, contents, "data.prompts"):
            shutil.rmtree(folder / EMBEDDINGS, ignore_errors=True)
        return contents
    finally:
        if not was_held:
            release(folder)


def hold(folder: Path) -> None:
    """Lock a run folder until `release` or this process's end, however it ends.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    key = folder.resolve()
    if key not in _held and is_first():  # one process holds it for all of its run
        refusal = f"another process trains in {folder}; wait for it, end it, or choose another run.folder"
        _held[key] = FolderLock(folder, refusal)


def is_held(folder: Path) -> bool:
    """Whether a process trains in a run folder, as far as its file system tells."""
    return folder.resolve() in _held or is_locked(folder)


def release(folder: Path) -> None:
    """Let other processes train in a folder that this one held."""
    if lock := _held.pop(folder.resolve(), None):
        lock.release()


def _refuse_other_settings(
    settings: TrainSettings | PretrainSettings,
    folder: Path,
    path: Path,
    contents: dict[str, Content],
    data_changed: bool,
) -> None:
    try:
        earlier = parse_settings(type(settings), read_json_object(path, "choose another run.folder"), str(path))
    except UserError as error:
        raise UserError(
            f"{folder} holds a run of another kind or version ({error}); choose another run.folder"
        ) from None
    before, now = flatten_settings(earlier), flatten_settings(settings)
    free = (*_FREE, *same_data(folder, contents, now, before, data_changed=data_changed))
    changed = [key for key in now if before[key] != now[key] and not key.startswith(free)]
    if changed:
        pairs = ", ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in changed[:5])
        raise UserError(f"{folder} holds a run of other settings: {pairs}; set them back or choose another run.folder")
