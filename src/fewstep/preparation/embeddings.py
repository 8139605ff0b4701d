"""Embedding a prompt list with a teacher's text encoders: shard by shard, so that an interrupted job continues."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.latents import EMBEDDINGS, pack_texts, read_texts
from fewstep.data.shard_folder import start_or_continue, write_manifest, write_tensors
from fewstep.errors import UserError
from fewstep.formats.fingerprints import text_fingerprint
from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders


def prepare_embeddings(
    encoders: TextEncoders, prompts: list[str], folder: Path, *, truncate: bool = False, shard_size: int = 512,
    batch_size: int = 32, cut_with: str = "truncate=True", report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Store the embeddings of prompts as float16, each distinct prompt's once, and the unconditional row.

    Args:
        folder: new, or one that an interrupted call with the same arguments left unfinished.
        truncate: cut prompts at the encoders' length, as the model's own pipeline does; otherwise they are refused.
        shard_size: prompts a file; half-made files are made again after an interruption.
        cut_with: what the caller's user says to cut long prompts, for the message that refuses one.
        report: called with (finished prompts, all prompts) after each shard.

    Raises:
        UserError: a prompt is empty or too long, the folder holds other embeddings, the disk is full.
    """
    if not prompts:
        raise UserError("there are no prompts to embed; give a list with at least one")
    check_prompts(encoders, prompts, truncate, cut_with)
    job = {
        "family": encoders.family, "text_encoders": text_fingerprint(encoders.folder), "num_prompts": len(prompts),
        "prompts": _hash_of(prompts), "truncate_prompts": truncate, "shard_size": shard_size,
    }  # fmt: skip
    manifest = start_or_continue(folder, job, EMBEDDINGS)
    table = PromptTable(encoders, batch_size)
    for entry in manifest["shards"]:
        table.add_known(read_texts(folder / entry["file"]))
    for number in range(len(manifest["shards"]), -(-len(prompts) // shard_size)):
        part = prompts[number * shard_size : (number + 1) * shard_size]
        tensors = table.shard_tensors(part)
        manifest["shards"].append(write_tensors(folder, number, tensors, len(part), EMBEDDINGS))
        done = number * shard_size + len(part)
        manifest["complete"] = done == len(prompts)
        write_manifest(folder, manifest)
        report(done, len(prompts))
    return folder


def check_prompts(encoders: TextEncoders, prompts: list[str], truncate: bool, cut_with: str) -> None:
    """`check_prompt` of a list; the place is the number of the prompt."""
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(encoders, prompt, f"the prompt on line {number}", truncate, cut_with)


def check_prompt(encoders: TextEncoders, prompt: str, place: str, truncate: bool, cut_with: str) -> None:
    """Raise UserError, naming the place, when a prompt is empty or, unless it may be truncated, too long.

    Args:
        cut_with: the option or setting that cuts long prompts where this one comes from.
    """
    if not prompt.strip():
        raise UserError(f"{place} is empty; remove it")
    if truncate:
        return
    tokens = encoders.count_tokens(prompt)
    if tokens > encoders.max_tokens:
        raise UserError(
            f"{place} has {tokens} tokens, the text encoder takes {encoders.max_tokens} ({prompt[:60]!r}...); "
            f"shorten it, or cut all long ones with {cut_with}"
        )


class PromptTable:
    """The distinct prompts of a folder in the order they first appear; encodes each when it does."""

    def __init__(self, encoders: TextEncoders, batch_size: int) -> None:
        self._encoders, self._batch_size = encoders, batch_size
        self._rows: dict[str, int] = {}
        self._empty: TextEmbeddings | None = None

    def add_known(self, prompts: list[str]) -> None:
        """Prompts that an earlier shard holds."""
        for prompt in prompts:
            self._rows.setdefault(prompt, len(self._rows))

    def shard_tensors(self, prompts: list[str]) -> dict[str, Tensor]:
        """What a shard of these prompts (n) holds, as `data/latents.py` says: rows, new texts, their embeddings.

        Raises:
            UserError: an embedding does not fit float16.
        """
        first = not self._rows
        if self._empty is None:
            self._empty = self._encoders.encode_empty().to("cpu")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        self.add_known(new)
        encoded = [self._empty.rows(slice(0, 0))]
        for start in range(0, len(new), self._batch_size):
            encoded.append(self._encoders.encode(new[start : start + self._batch_size]).to("cpu"))
        tensors = {
            "row": torch.tensor([self._rows[prompt] for prompt in prompts], dtype=torch.int64),
            **pack_texts(new),
        }
        tensors["text"] = _half(torch.cat([part.text for part in encoded]))
        if self._empty.pooled is not None:
            tensors["pooled"] = _half(torch.cat([part.pooled for part in encoded if part.pooled is not None]))
        if first:
            tensors["empty_text"] = _half(self._empty.text)
            if self._empty.pooled is not None:
                tensors["empty_pooled"] = _half(self._empty.pooled)
        return tensors


def _half(values: Tensor) -> Tensor:
    half = values.half().contiguous()
    if not half.isfinite().all():
        raise UserError("an embedding is not finite as float16; these text encoders are damaged or not supported")
    return half


def _hash_of(prompts: list[str]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        content = prompt.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
