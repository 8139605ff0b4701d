"""Stored text embeddings, and latents with the embeddings of their captions; large sets stay on disk.

Both folders hold shards of n rows. A shard holds `row` (n,), each row's number among the distinct texts of the folder,
and the texts that no earlier shard has: `text` (m, T, D), `pooled` (m, P), `prompt_bytes` and `prompt_ends`. The first
shard also holds the unconditional `empty_text` (1, T, D) and `empty_pooled` (1, P); those of latents hold `latents`. Latents whose
captions are kept as text alone have no embeddings. `latent_std` beside latents are the deviations of the VAE's distribution.
Of encoders whose texts differ in length, `length` (m,) and `empty_length` (1,) say how many tokens count, and T is the longest
of each shard.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.shard_folder import ShardKind, check_shard, read_complete_manifest, unreadable
from fewstep.data.stored_rows import StoredRows, map_tensor, read_header
from fewstep.data.waiting import WAITING
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError

EMBEDDINGS = ShardKind("text embeddings", "embeddings", "fewstep prepare embeddings")
LATENTS = ShardKind("latents", "latents", "fewstep prepare latents")
_HASH_LIMIT_BYTES = 4 * 2**30  # smaller folders are verified byte for byte on opening


class StoredTexts:
    """The texts of a list, addressed by their place in it.

    Opening reads the headers of all shards, which shows one that is cut short, and up to 4 GiB also their checksums.

    Attributes:
        folder: where they are.
        manifest: the job that made them.
        text_fingerprint: of the text encoders.

    Raises:
        UserError: no manifest, an unfinished folder, a shard missing, changed or cut short.
    """

    def __init__(self, folder: Path, kind: ShardKind = EMBEDDINGS) -> None:
        self.folder, self.manifest = folder, read_complete_manifest(folder, kind)
        self.text_fingerprint = str(self.manifest.get("job", {}).get("text_encoders"))
        self._paths = _checked_paths(folder, self.manifest["shards"], kind)
        try:
            self._row = torch.from_numpy(np.concatenate([map_tensor(path, "row") for path in self._paths]))
            self.num_distinct = sum(len(map_tensor(path, "prompt_ends")) for path in self._paths)
            if len(self._row) == 0 or not 0 <= int(self._row.min()) <= int(self._row.max()) < self.num_distinct:
                raise ValueError("rows point at no text")
        except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
            raise unreadable(folder, error, kind) from None

    def __len__(self) -> int:
        """Prompts in the list, repeated ones included."""
        return len(self._row)

    def prompts(self, index: Tensor | None = None) -> list[str]:
        """The prompts at these places; all of them without."""
        texts = self._texts()
        rows = self._row if index is None else self._row[index.cpu()]
        return [texts[row] for row in rows.tolist()]

    @property
    def num_empty(self) -> int:
        """Empty prompts in the list."""
        return sum(int((self._row == row).sum()) for row, text in enumerate(self._texts()) if not text)

    def _texts(self) -> list[str]:
        if not hasattr(self, "_decoded"):
            self._decoded = [text for path in self._paths for text in read_texts(path)]
        return self._decoded


class StoredEmbeddings(StoredTexts):
    """The embeddings of a prompt list, addressed by the prompt's place in the list; read from disk row by row.

    Attributes:
        empty: text (1, T, D) and pooled (1, P) in float16, and tokens (1,); None for what there is none of. The
            unconditional branch.

    Raises:
        UserError: as `StoredTexts`.
    """

    def __init__(self, folder: Path, kind: ShardKind = EMBEDDINGS) -> None:
        super().__init__(folder, kind)
        try:
            self._columns: list[StoredRows | None] = []
            self.empty: tuple[Tensor, Tensor | None, Tensor | None] = self._open_columns()
            if any(len(column) != self.num_distinct for column in self._columns if column is not None):
                raise ValueError("texts and embeddings differ in number")
        except (OSError, KeyError, ValueError) as error:
            raise unreadable(folder, error, kind) from None

    def _open_columns(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map what there is of text, pooled embeddings and tokens; returns the unconditional row."""
        names, rows = read_header(self._paths[0]), list[Tensor | None]()
        for name in ("text", "pooled", "length"):
            if name not in names and name != "text":
                self._columns.append(None)
                rows.append(None)
                continue
            parts = [map_tensor(path, name) for path in self._paths]
            self._columns.append(StoredRows(parts, padded=name == "text" and "length" in names))
            rows.append(torch.from_numpy(map_tensor(self._paths[0], f"empty_{name}").copy()))
        text, pooled, lengths = rows
        assert text is not None
        return text, pooled, lengths

    @WAITING.around
    def rows(self, index: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings at these places (B,): text (B, T, D), pooled (B, P) or None, tokens (B,) or None; float16, on the CPU."""
        row = self._row[index.cpu()]
        text, pooled, lengths = (None if column is None else column.rows(row) for column in self._columns)
        assert text is not None
        return text, pooled, lengths


class StoredLatents:
    """Latents of real pictures with their captions, read from disk row by row.

    Attributes:
        captions: the captions' embeddings (or their texts alone, as they were stored), addressed by the picture's row.
        vae_fingerprint: of the VAE that made the latents.

    Raises:
        UserError: as `StoredEmbeddings`.
    """

    def __init__(self, folder: Path) -> None:
        text_alone = read_complete_manifest(folder, LATENTS).get("job", {}).get("captions") == "text"
        self.captions = StoredTexts(folder, LATENTS) if text_alone else StoredEmbeddings(folder, LATENTS)
        self.folder, self.manifest = folder, self.captions.manifest
        self.vae_fingerprint = str(self.manifest.get("job", {}).get("vae"))
        try:
            parts = [map_tensor(folder / entry["file"], "latents") for entry in self.manifest["shards"]]
            self._latents, self._spread = StoredRows(parts), None
            if self.manifest.get("job", {}).get("spread"):
                entries = self.manifest["shards"]
                self._spread = StoredRows([map_tensor(folder / entry["file"], "latent_std") for entry in entries])
                if self._spread.row_shape != self._latents.row_shape or len(self._spread) != len(self._latents):
                    raise ValueError("latents and their deviations differ in shape")
            if len(self._latents) != len(self.captions):
                raise ValueError("latents and captions differ in number")
        except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
            raise unreadable(folder, error, LATENTS) from None

    def __len__(self) -> int:
        return len(self._latents)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return self._latents.row_shape

    def latents(self, index: Tensor) -> Tensor:
        """Latents (B, C, h, w) of these rows (B,), float16, on the CPU; the means where a distribution is stored."""
        return self._latents.rows(index)

    def drawn(self, index: Tensor, draws: Draws) -> Tensor:
        """Latents (B, C, h, w) of these rows (B,), float32, on the CPU; where their distribution is stored a sample of it."""
        latents = self.latents(index).float()
        if self._spread is None:
            return latents
        return latents + self._spread.rows(index).float() * draws.normal("encoder_noise", self.latent_shape)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Rows (B,): latents (B, C, h, w), and text, pooled and tokens as `StoredEmbeddings.rows`; float16, on the CPU."""
        assert isinstance(self.captions, StoredEmbeddings), "these captions are kept as text"
        return self.latents(index), *self.captions.rows(index)


def check_embeddings_fit(stored: StoredTexts, *, text_fingerprint: str) -> None:
    """Raise UserError when the embeddings are not of these text encoders."""
    if stored.text_fingerprint != text_fingerprint:
        raise UserError(
            f"{stored.folder} holds embeddings of another encoder than the teacher's "
            f"({stored.text_fingerprint[:12]} against {text_fingerprint[:12]}); prepare them with this teacher"
        )


def check_latents_fit(
    stored: StoredLatents, *, vae_fingerprint: str, text_fingerprint: str, latent_shape: tuple[int, ...]
) -> None:
    """Raise UserError when latents or embeddings are not the teacher's.

    Args:
        vae_fingerprint, text_fingerprint: of the teacher's folder (formats/fingerprints.py).
        latent_shape: (C, h, w) of the teacher.
    """
    if stored.latent_shape != tuple(latent_shape):
        raise UserError(
            f"{stored.folder} holds latents of another VAE or resolution than the teacher's: their shape is "
            f"{stored.latent_shape}, the teacher's {tuple(latent_shape)}; prepare them with this teacher"
        )
    if stored.vae_fingerprint != vae_fingerprint:
        raise UserError(
            f"{stored.folder} holds latents of another VAE or resolution than the teacher's "
            f"(VAE {stored.vae_fingerprint[:12]} against {vae_fingerprint[:12]}); prepare them with this teacher"
        )
    check_embeddings_fit(stored.captions, text_fingerprint=text_fingerprint)


def pack_texts(texts: list[str]) -> dict[str, Tensor]:
    """Texts as tensors: their UTF-8 bytes one after the other, and where each ends."""
    parts = [text.encode("utf-8") for text in texts]
    whole = np.frombuffer(b"".join(parts), dtype=np.uint8).copy()
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {"prompt_bytes": torch.from_numpy(whole), "prompt_ends": torch.from_numpy(ends)}


def read_texts(path: Path) -> list[str]:
    """The new texts of one shard, as `pack_texts` packed them; raises UserError when they cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            whole = file.get_tensor("prompt_bytes").numpy().tobytes()
            ends = file.get_tensor("prompt_ends").tolist()
        return [whole[start:end].decode("utf-8") for start, end in zip([0, *ends], ends, strict=False)]
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the command that made it again") from None


def _checked_paths(folder: Path, entries: list[dict[str, object]], kind: ShardKind) -> list[Path]:
    paths = [folder / str(entry["file"]) for entry in entries]
    try:
        small = sum(path.stat().st_size for path in paths) <= _HASH_LIMIT_BYTES
    except OSError as error:
        raise unreadable(Path(str(error.filename)), error, kind) from None
    for path, entry in zip(paths, entries, strict=True):
        if small:
            check_shard(folder, entry, kind)
        try:
            with safe_open(path, framework="np"):  # refuses a file whose size is not the one its header says
                pass
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error, kind) from None
    return paths
