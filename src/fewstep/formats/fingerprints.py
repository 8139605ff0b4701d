"""Which text encoders, VAE and network a diffusers folder has, as short strings to compare."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.json_files import parse_json
from fewstep.formats.tensor_files import itself

_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")  # no variants (.fp16.)
_NOT_THE_MODEL = {"transformers_version", "torch_dtype", "dtype"}
_NUM_BLOCKS, _BLOCK_BYTES = 256, 2**16


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: object) -> str:
    """SHA-256 of what JSON keeps of a value, whatever its order and layout."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def text_fingerprint(folder: Path) -> str:
    """Fingerprint of all text encoders of a diffusers folder.

    A sha256 over each encoder's config and its safetensors weights: whole files up to 16 MiB, of larger ones the size
    and 256 evenly spaced blocks of 64 KiB. Tokenizers are not covered.

    Raises:
        UserError: no diffusers folder with text encoders, or a component without config or weights.
    """
    try:
        index = dict(parse_json((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'model_index.json'} cannot be read ({error}); give a diffusers folder") from None
    names = [name for name, value in sorted(index.items()) if name.startswith("text_encoder") and value != [None, None]]
    if not names:
        raise UserError(f"{folder} has no text encoders; give a text-to-image model")
    digest = hashlib.sha256()
    for name in names:
        _add_component(digest, folder / name)
    return digest.hexdigest()


def vae_fingerprint(folder: Path) -> str:
    """Fingerprint of the VAE of a diffusers folder (its `vae` component, or the folder itself), made the same way.

    Raises:
        UserError: no config or weights there.
    """
    digest = hashlib.sha256()
    _add_component(digest, folder / "vae" if (folder / "vae").is_dir() else folder)
    return digest.hexdigest()


def network_fingerprint(folder: Path, merged: str = "") -> str:
    """Fingerprint of the U-Net or transformer of a diffusers folder, made the same way: two fine-tunes differ in it.

    Args:
        merged: fingerprint of what was merged into it; empty: nothing.

    Raises:
        UserError: no config or weights there.
    """
    digest = hashlib.sha256()
    _add_component(digest, folder / ("transformer" if (folder / "transformer").is_dir() else "unet"))
    digest.update(merged.encode())
    return digest.hexdigest()


def _add_component(digest: "hashlib._Hash", folder: Path) -> None:
    try:
        config = dict(parse_json((folder / "config.json").read_text(encoding="utf-8")))
        # what differs between two saved copies of one model is left out
        facts = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_THE_MODEL}
        digest.update(json.dumps(facts, sort_keys=True).encode())
        files = sorted(path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))
        for path in files:
            with path.open("rb") as file:
                add_content(digest, file, path.stat().st_size)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({error}); download the model again") from None
    if not files:
        raise UserError(f"{folder} holds no weights as safetensors; download the model again")


def add_content(digest: "hashlib._Hash", file: BinaryIO, size: int) -> None:
    """Add a file's size and content to a digest: whole up to 16 MiB, 256 evenly spaced blocks of 64 KiB above."""
    digest.update(str(size).encode())
    if size <= _NUM_BLOCKS * _BLOCK_BYTES:
        digest.update(file.read())
        return
    for number in range(_NUM_BLOCKS):  # the first block begins the file, the last one ends it
        file.seek(number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))


def tensors_digest(tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = itself) -> str:
    """SHA-256 over tensors with their names, kinds and shapes, in the order of the names.

    Args:
        whole: called with each tensor when its turn comes, gives it with all its numbers.
    """
    digest = hashlib.sha256()
    add_tensors(digest, tensors, whole)
    return digest.hexdigest()


def add_tensors(
    digest: "hashlib._Hash", tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = itself
) -> None:
    """Add tensors with their names, kinds and shapes to a digest, in the order of the names; `whole` as `tensors_digest` has it."""
    for name, value in ((name, whole(value)) for name, value in sorted(tensors.items())):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
