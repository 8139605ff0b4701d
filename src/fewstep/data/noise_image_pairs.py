"""Stored pairs of noise and the teacher's deterministic image for it, which DMD's regression loss reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import replaced_file

MANIFEST = "manifest.json"


class NoiseImagePairs:
    """All pairs of a folder, verified and held in memory: noise as float16, images as uint8.

    Raises:
        UserError: no manifest, a shard missing, changed or cut short, or an unfinished folder.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise UserError(
                f"{folder} is unfinished: run the same `fewstep prepare pairs` command again to complete it"
            )
        shards = [_read_shard(folder, shard) for shard in manifest["shards"]]
        self.manifest = manifest
        self.noise = torch.cat([shard["noise"] for shard in shards])
        self.images = torch.cat([shard["images"] for shard in shards])
        self.labels = torch.cat([shard["labels"] for shard in shards])

    def __len__(self) -> int:
        return len(self.noise)

    def rows(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, C, H, W) float32, images (B, C, H, W) float32 in [-1, 1], labels (B,) int64."""
        index = index.to(self.noise.device)
        images = self.images[index].to(device).float() / 127.5 - 1
        return self.noise[index].to(device).float(), images, self.labels[index].to(device)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of pairs; raises UserError when there is none or it is damaged."""
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        complete = [{"file", "rows", "sha256"} <= set(shard) for shard in manifest["shards"]]
        if not all(complete) or not isinstance(manifest["complete"], bool):
            raise ValueError("an entry is incomplete")
        return manifest
    except FileNotFoundError:
        raise UserError(f"{folder} holds no noise-image pairs; make them with `fewstep prepare pairs`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({error}); delete the folder and prepare the pairs again"
        ) from None


def write_shard(folder: Path, number: int, noise: Tensor, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Write one shard and return its manifest entry (file, rows, sha256)."""
    path = folder / f"pairs_{number:05d}.safetensors"
    with replaced_file(path) as aside:
        save_file({"noise": noise.half(), "images": images, "labels": labels}, aside)
    return {"file": path.name, "rows": len(noise), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    with replaced_file(folder / MANIFEST) as aside:
        aside.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_intact(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a shard of the manifest is there, byte for byte."""
    try:
        return hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    except OSError:
        return False


def _read_shard(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / entry["file"]
    advice = "run the same `fewstep prepare pairs` command again, which remakes it"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); {advice}") from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is not the file that was written (checksum differs); {advice}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); {advice}") from None
