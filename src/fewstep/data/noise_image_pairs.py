"""Stored pairs of noise and the teacher's deterministic image for it, which DMD's regression loss reads."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.shard_folder import ShardKind, check_shard, read_complete_manifest, unreadable, write_tensors
from fewstep.data.waiting import WAITING

PROMPT_EMBEDDINGS = "embeddings"  # subfolder with the embeddings of the prompts that the labels number
PAIRS = ShardKind("noise-image pairs", "pairs", "fewstep prepare pairs")


class NoiseImagePairs:
    """All pairs of a folder, verified and held in memory: noise as float16, images as uint8 (latents as float16).

    Raises:
        UserError: no manifest, a shard missing, changed or cut short, or an unfinished folder.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_complete_manifest(folder, PAIRS)
        shards = [_read_shard(folder, shard) for shard in self.manifest["shards"]]
        try:
            self.noise = torch.cat([shard["noise"] for shard in shards])
            self.images = torch.cat([shard["images"] for shard in shards])
            self.labels = torch.cat([shard["labels"] for shard in shards])
        except (KeyError, RuntimeError) as error:  # other tensors, or of shapes that do not follow each other
            raise unreadable(folder, error, PAIRS) from None

    def __len__(self) -> int:
        return len(self.noise)

    @WAITING.around
    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise and images (B, C, H, W) float32, images in [-1, 1], or latents as they are; condition numbers (B,) int64."""
        images = self.images[index].float()
        if self.images.dtype == torch.uint8:
            images = images / 127.5 - 1
        return self.noise[index].float(), images, self.labels[index]


def write_shard(folder: Path, number: int, noise: Tensor, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Write one shard and return its manifest entry (file, rows, sha256)."""
    return write_tensors(folder, number, {"noise": noise.half(), "images": images, "labels": labels}, len(noise), PAIRS)


def _read_shard(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = check_shard(folder, entry, PAIRS)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise unreadable(path, error, PAIRS) from None
