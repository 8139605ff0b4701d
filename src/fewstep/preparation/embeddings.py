"""Embedding a prompt list with a teacher's text encoders: shard by shard, so that an interrupted job continues."""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.latents import EMBEDDINGS, pack_texts
from fewstep.data.shard_folder import write_tensors
from fewstep.errors import UserError
from fewstep.formats.fingerprints import text_fingerprint
from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders
from fewstep.parallel import rank, world_size
from fewstep.preparation.shards import begun, fill
from fewstep.progress import Report, tell
from fewstep.shared_work import by_the_first

_WORTH_SAYING = 0.1  # gigabytes


def prepare_embeddings(
    encoders: TextEncoders, prompts: list[str], folder: Path, *, truncate: bool = False, shard_size: int = 512,
    batch_size: int = 32, cut_with: str = "truncate=True", spare_with: str = "encode them when they are needed",
    max_gigabytes: float = math.inf, report: Report = lambda done, total: None,
) -> Path:  # fmt: skip
    """Store the embeddings of prompts as float16, each distinct prompt's once, and the unconditional row.

    Of several processes each makes its own shards; the files are the same for any number of them.

    Args:
        folder: new, or one that an interrupted call with the same arguments left unfinished.
        truncate: cut prompts at the encoders' length, as the model's own pipeline does; otherwise they are refused.
        shard_size: prompts a file; half-made files are made again after an interruption.
        cut_with: what the caller's user says to cut long prompts, for the message that refuses one.
        spare_with, max_gigabytes: as `announce_size` has them.
        report: called with (finished prompts, all prompts) after each batch and each shard.

    Raises:
        UserError: a prompt is too long, there is no room for so many, the folder holds other embeddings, the disk is full.
    """
    if not prompts:
        raise UserError("there are no prompts to embed; give a list with at least one")
    check_prompts(encoders, prompts, truncate, cut_with)
    job = {
        "family": encoders.family, "text_encoders": text_fingerprint(encoders.folder), "num_prompts": len(prompts),
        "prompts": _hash_of(prompts), "truncate_prompts": truncate, "shard_size": shard_size,
    }  # fmt: skip
    table = PromptTable(encoders, batch_size)
    announce = partial(_announce, folder, table, prompts, spare_with, max_gigabytes)
    num_shards, known = -(-len(prompts) // shard_size), 0

    def make(number: int) -> dict[str, Any] | None:
        """One shard's entry, None behind the last."""
        nonlocal known
        if number >= num_shards:
            return None
        first, before = number * shard_size, (number - rank()) * shard_size
        part = prompts[first : first + shard_size]
        table.add_known(prompts[known:first])
        known = first + len(part)
        tensors = table.shard_tensors(
            part, lambda encoded: report(min(before + encoded * world_size(), len(prompts)), len(prompts))
        )
        return write_tensors(folder, number, tensors, len(part), EMBEDDINGS)

    with begun(folder, job, EMBEDDINGS, announce) as manifest:
        known = len(manifest["shards"]) * shard_size
        table.add_known(prompts[:known])
        if manifest["shards"] and not manifest["complete"]:
            by_the_first(announce)
        fill(
            folder, manifest, num_shards, make, lambda done: report(min(done * shard_size, len(prompts)), len(prompts))
        )  # fmt: skip
    return folder


def check_prompts(encoders: TextEncoders, prompts: list[str], truncate: bool, cut_with: str) -> None:
    """`check_prompt` of a list; the place is the number of the prompt, blank lines not counted."""
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(encoders, prompt, f"prompt {number} of the list", truncate, cut_with)


def check_prompt(encoders: TextEncoders, prompt: str, place: str, truncate: bool, cut_with: str) -> None:
    """Raise UserError, naming the place, when a prompt is too long, unless it may be truncated.

    Args:
        cut_with: the option or setting that cuts long prompts where this one comes from.
    """
    if truncate:
        return
    tokens = encoders.count_tokens(prompt)
    if tokens > encoders.max_tokens:
        raise UserError(
            f"{place} has {tokens} tokens, the text encoder takes {encoders.max_tokens} ({prompt[:60]!r}...); "
            f"shorten it, or cut all long ones with {cut_with}"
        )


def _announce(
    folder: Path, table: "PromptTable", prompts: list[str], spare_with: str, max_gigabytes: float
) -> None:  # fmt: skip
    left = table.num_new(prompts)
    what = f"embeddings of {left:,} prompts"
    announce_size(folder, what, left * table.row_bytes(prompts), spare_with, max_gigabytes=max_gigabytes)


def announce_size(
    folder: Path, what: str, num_bytes: int, spare_with: str, *, max_gigabytes: float = math.inf, share: float = 0.5
) -> None:
    """Say how many gigabytes will be stored, from a tenth on; refuse more than fits.

    Args:
        folder: where, whether it is there yet or not.
        spare_with: what a user does to store less.
        max_gigabytes: the most that is stored without being asked for.
        share: of the free disk that may be filled.

    Raises:
        UserError: more than `max_gigabytes`, or than this share of the free disk.
    """
    place = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    free, size = shutil.disk_usage(place).free / 1e9, num_bytes / 1e9
    if size > max_gigabytes:
        limit = f"more than {max_gigabytes:g} GB are not stored unasked"
    elif size > share * free:
        limit = f"the disk has {free:,.3g} GB free" + (", of which half may be filled" if share < 1 else "")
    else:
        if size >= _WORTH_SAYING:
            tell(f"{folder}: {what} will take {size:,.3g} GB, {free:,.0f} GB are free")
        return
    raise UserError(f"{folder}: {what} would take {size:,.3g} GB, and {limit}; {spare_with}")


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

    def num_new(self, prompts: list[str]) -> int:
        """Distinct prompts among these that no earlier shard holds."""
        return len(set(prompts) - self._rows.keys())

    def row_bytes(self, prompts: Sequence[str] = ()) -> int:
        """What one prompt's embeddings take on disk; at most, where they differ in length (all prompts, if known, say by how much)."""
        text, pooled, lengths = self._encoded_empty()
        tokens = text.shape[1]
        if lengths is not None:
            longest = max((self._encoders.count_tokens(prompt) for prompt in set(prompts)), default=math.inf)
            tokens = int(min(self._encoders.max_tokens, longest))
        return 2 * (tokens * text.shape[2] + (0 if pooled is None else pooled[0].numel()))

    def _encoded_empty(self) -> TextEmbeddings:
        if self._empty is None:
            self._empty = self._encoders.encode_empty().to("cpu")
        return self._empty

    def shard_tensors(
        self, prompts: list[str], report: Callable[[int], None] = lambda encoded: None
    ) -> dict[str, Tensor]:
        """What a shard of these prompts (n) holds, as `data/latents.py` says: rows, new texts, their embeddings.

        `report` is called with the number of encoded prompts after each batch.

        Raises:
            UserError: an embedding does not fit float16.
        """
        first, empty = not self._rows, self._encoded_empty()
        tensors, new = self.text_tensors(prompts)
        encoded = [empty.rows(slice(0, 0))]
        for start in range(0, len(new), self._batch_size):
            encoded.append(self._encoders.encode(new[start : start + self._batch_size]).to("cpu"))
            report(min(start + self._batch_size, len(new)))
        tensors |= _columns(TextEmbeddings.cat(encoded))
        return tensors | _columns(empty, "empty_") if first else tensors

    def text_tensors(self, prompts: list[str]) -> tuple[dict[str, Tensor], list[str]]:
        """Rows and new texts of a shard of these prompts (n), without embeddings; and the new texts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        self.add_known(new)
        rows = torch.tensor([self._rows[prompt] for prompt in prompts], dtype=torch.int64)
        return {"row": rows, **pack_texts(new)}, new


def _columns(embeddings: TextEmbeddings, prefix: str = "") -> dict[str, Tensor]:
    """What there is of embeddings, as shards name it."""
    columns = {"text": _half(embeddings.text)}
    if embeddings.pooled is not None:
        columns["pooled"] = _half(embeddings.pooled)
    if embeddings.lengths is not None:
        columns["length"] = embeddings.lengths.clone()
    return {prefix + name: value for name, value in columns.items()}


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
