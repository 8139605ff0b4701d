"""A run reads the same from a URL as from a disk, and goes on from either."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.latents import LATENTS, StoredLatents
from fewstep.data.shard_folder import MANIFEST
from fewstep.errors import UserError
from fewstep.formats.remote import data_path, local_copy
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.run import train
from tests.data.test_latents import write_folder
from tests.formats.test_remote import again, storage
from tests.training.helpers import tiny_train_settings

__all__ = ["storage"]


@pytest.mark.slow
def test_a_run_goes_on_from_a_url(storage: Any, teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    storage.put(str(pictures), "/bucket/set", recursive=True)
    for name, places in (("disk", [str(pictures)] * 2), ("both", ["memory://bucket/set", str(pictures)])):
        for steps, place in zip((2, 4), places, strict=True):
            changes: dict[str, Any] = {"data": {"images": place}, "training": {"num_steps": steps}}
            train(tiny_train_settings(teacher_folder, pictures, tmp_path / name, **changes))
    (one, _), (other, _) = (
        read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("disk", "both")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    picture = next(name for name in storage.find("/bucket/set") if name.endswith(".png"))
    storage.pipe(picture.replace(".png", "-more.png"), storage.cat(picture))
    local_copy.cache_clear()
    changes = {"data": {"images": "memory://bucket/set"}, "training": {"num_steps": 6}}
    with pytest.raises(UserError, match=r"data\.images=memory://bucket/set holds other files than this run began with"):
        train(tiny_train_settings(teacher_folder, pictures, tmp_path / "both", **changes))


def test_shards_from_a_url(storage: Any, tmp_path: Path) -> None:
    """A folder that is still being written there is refused, and read when it is whole."""
    local = write_folder(tmp_path / "latents", LATENTS)
    whole = (local / MANIFEST).read_bytes()
    storage.put(str(local), "/bucket/latents", recursive=True)
    storage.pipe(f"/bucket/latents/{MANIFEST}", whole.replace(b'"complete": true', b'"complete": false'))
    with pytest.raises(UserError, match="is unfinished: run the same `fewstep prepare latents` command again"):
        StoredLatents(data_path("memory://bucket/latents"))
    storage.pipe(f"/bucket/latents/{MANIFEST}", whole)
    index = torch.arange(9)
    found = StoredLatents(again("memory://bucket/latents")).rows(index)
    expected = StoredLatents(local).rows(index)
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))  # type: ignore[arg-type]
