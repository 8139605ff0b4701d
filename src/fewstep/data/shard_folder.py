"""Folders of safetensors shards with a manifest, written shard by shard so that an interrupted job continues."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import is_leftover, remove_leftovers, replaced_file
from fewstep.formats.fingerprints import file_digest
from fewstep.formats.folder_lock import LOCK, FolderLock
from fewstep.formats.json_files import entry, kind_name, read_json_object
from fewstep.formats.tensor_files import write_tensor_file

MANIFEST = "manifest.json"
# what a job names, and what knows it by its content wherever it lies; where an earlier version noted no content, the names are compared
_PROVEN_BY = {"teacher": "network", "lmdb": "lmdb_content"}


@dataclass(frozen=True)
class ShardKind:
    """What messages call the content of a folder.

    Attributes:
        name: what it holds, "noise-image pairs".
        short: the same in a word, "pairs"; also the shards' file name.
        command: the command that makes it.
    """

    name: str
    short: str
    command: str


def is_shard_folder(folder: Path) -> bool:
    """Whether a path is a folder of shards, finished or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, kind: ShardKind) -> dict[str, Any]:
    """The manifest (job, shards, complete) of a folder; raises UserError when there is none or it is damaged."""
    path, remedy = folder / MANIFEST, f"delete the folder and prepare the {kind.short} again"
    if not path.exists():
        raise UserError(f"{folder} holds no {kind.name}; make them with `{kind.command}`")
    manifest = read_json_object(path, remedy)
    for name, wanted in (("job", dict), ("shards", list), ("complete", bool)):
        if name in manifest or name != "job":  # which earlier versions did not note
            entry(manifest, name, wanted, path, remedy)
    for shard in manifest["shards"]:
        if not isinstance(shard, dict):
            raise UserError(f"{path} is damaged: one of its shards is {kind_name(shard)}; {remedy}")
        numbers = [name for name in ("rows", "source_rows") if name in shard or name == "rows"]
        for name in ("file", "sha256"):
            entry(shard, name, str, path, remedy)
        if any(entry(shard, name, int, path, remedy) < 0 for name in numbers):
            raise UserError(f"{path} is damaged: a shard of less than no rows; {remedy}")
        if not shard["file"] or Path(shard["file"]).name != shard["file"]:
            raise UserError(f"{path} is damaged: {shard['file'][:60]!r} is not a file of this folder; {remedy}")
    return manifest


def read_complete_manifest(folder: Path, kind: ShardKind) -> dict[str, Any]:
    """The manifest of a finished job; raises UserError also when it is unfinished."""
    manifest = read_manifest(folder, kind)
    if manifest["complete"] and not manifest["shards"]:
        raise UserError(
            f"{folder / MANIFEST} is damaged: it is complete without a shard; delete the folder and prepare again"
        )
    if not manifest["complete"]:
        raise UserError(f"{folder} is unfinished: run the same `{kind.command}` command again to complete it")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    with replaced_file(folder / MANIFEST) as aside:
        aside.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def write_tensors(folder: Path, number: int, tensors: dict[str, Tensor], rows: int, kind: ShardKind) -> dict[str, Any]:
    """Write one shard and return its manifest entry (file, rows, sha256)."""
    path = folder / f"{kind.short}_{number:05d}.safetensors"
    with replaced_file(path) as aside:
        write_tensor_file(aside, tensors)
    return {"file": path.name, "rows": rows, "sha256": file_digest(path)}


def is_intact(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard of the manifest is there, byte for byte."""
    try:
        return bool(file_digest(folder / shard["file"]) == shard["sha256"])
    except OSError:
        return False


def check_shard(folder: Path, shard: dict[str, Any], kind: ShardKind) -> Path:
    """Path of a shard that is byte for byte the one written; raises UserError otherwise."""
    path = folder / shard["file"]
    try:
        same = file_digest(path) == shard["sha256"]
    except OSError as error:
        raise unreadable(path, error, kind) from None
    if not same:
        raise UserError(f"{path} is not the file that was written (checksum differs); {_again(kind)}")
    return path


def unreadable(path: Path, error: Exception, kind: ShardKind) -> UserError:
    """The error to raise for a shard that does not open."""
    return UserError(f"{path} cannot be read ({error}); {_again(kind)}")


@contextmanager
def writing(
    folder: Path, job: dict[str, Any], kind: ShardKind, ignore: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """The manifest to go on with: of a new folder, or of an unfinished one up to its first damaged shard; no other process writes there meanwhile.

    What a killed process left half-written is removed.

    Args:
        ignore: names that may already lie in a new folder.

    Raises:
        UserError: the folder holds something else, or another job of this kind; another process writes into it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder for the {kind.short}")
    is_new = not (folder / MANIFEST).exists()
    if (
        is_new
        and folder.exists()
        and any(entry.name not in (*ignore, LOCK) and not is_leftover(entry) for entry in folder.iterdir())
    ):
        raise UserError(f"{folder} is not empty and holds no {kind.short}; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error}; choose another folder") from error
    refusal = f"another process writes {kind.short} into {folder}; wait for it, or choose another folder"
    with FolderLock(folder, refusal):
        remove_leftovers(folder)
        yield _begin(folder, job) if not (folder / MANIFEST).exists() else _go_on(folder, job, kind)


def _begin(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    manifest: dict[str, Any] = {"job": job, "shards": [], "complete": False}
    write_manifest(folder, manifest)  # before the first shard, so that a kill at any moment can be continued
    return manifest


def _go_on(folder: Path, job: dict[str, Any], kind: ShardKind) -> dict[str, Any]:
    """The manifest of the same job up to its first damaged shard; raises UserError where the job is another one."""
    manifest = read_manifest(folder, kind)
    before = manifest.get("job", {})
    same = {name if proof in before else proof for name, proof in _PROVEN_BY.items() if name in job}
    keys = [key for key in [*job, *(key for key in before if key not in job)] if key not in same]
    if changed := [
        f"{key} was {before.get(key)!r}, is {job.get(key)!r}" for key in keys if before.get(key) != job.get(key)
    ]:
        raise UserError(f"{folder} holds other {kind.short}: {', '.join(changed)}; choose another folder")
    intact = 0  # shards are made in order: keep those before the first that is missing or changed
    while intact < len(manifest["shards"]) and is_intact(folder, manifest["shards"][intact]):
        intact += 1
    done = manifest["complete"] and intact == len(manifest["shards"])
    return {**manifest, "shards": manifest["shards"][:intact], "complete": done}


def _again(kind: ShardKind) -> str:
    return f"run the same `{kind.command}` command again, which remakes it"
