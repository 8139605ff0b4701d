"""Latents and embeddings made by as many processes as there are; one of them may be killed on the way.

    python -m tests.distributed.preparing WORK FOLDER

`WORK` has a tiny Stable Diffusion (`sd`), pictures with captions (`captioned`) and `prompts.txt`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fewstep.parallel import rank
from fewstep.preparation import latents
from fewstep.preparation.captioned_jobs import EmbeddingsOptions, LatentsOptions, make_embeddings, make_latents
from fewstep.shared_work import by_the_first
from tests.data.test_captioned_images import write_folder
from tests.tiny_models import tiny_sd_folder

# repeated within a shard, from one process's shard to the other's, and from a pair of shards to the next
CAPTIONS = [
    "a cat",
    "a dog",
    "a cat",
    "red",
    "big cat",
    "a dog",
    "the end",
    "a cat",
    "red",
    "two",
    "one",
    "two",
    "three",
]
FOLDERS = ("latents", "streamed", "embeddings")


def write_sources(work: Path) -> None:
    """A model, pictures of which two do not decode, and prompts."""
    tiny_sd_folder(work / "sd")
    pictures = write_folder(work / "captioned", CAPTIONS)
    for number in (1, 4):
        (pictures / f"{number:03d}.png").write_bytes(b"no picture")
    (work / "prompts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")


def prepare(work: Path, folder: Path) -> None:
    """Latents of a source whose end is known and of one whose end is not, and embeddings: five shards each, the last one short."""
    sizes: dict[str, Any] = {"shard_size": 3, "batch_size": 2, "device": "cpu"}
    for name, more in (("latents", {}), ("streamed", {"streaming": True, "captions": "text", "noise_seed": 2})):
        options = LatentsOptions(resolution=16, skip_bad=True, **sizes, **more)
        make_latents(str(work / "sd"), str(work / "captioned"), folder / name, options)
    make_embeddings(str(work / "sd"), work / "prompts.txt", folder / "embeddings", EmbeddingsOptions(**sizes))


def prepare_twice(work: Path, folder: Path) -> None:
    """The second time the last shards but one are gone."""
    prepare(work, folder)
    for name in FOLDERS:
        by_the_first((folder / name / f"{name.replace('streamed', 'latents')}_00003.safetensors").unlink)
    prepare(work, folder)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of the three jobs."""
    return {f"{name}/{path.name}": path.read_bytes() for name in FOLDERS for path in (folder / name).iterdir()}


def die_once(sign: Path) -> None:
    """SIGKILL to the second process when it has written its second shard of latents, which nobody has noted yet."""
    write = latents.write_tensors

    def written(folder: Path, number: int, *more: Any) -> dict[str, Any]:
        entry = write(folder, number, *more)
        if rank() == 1 and number == 3 and not sign.exists():
            sign.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    latents.write_tensors = written


if __name__ == "__main__":
    die_once(Path(sys.argv[1]) / "died")
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
