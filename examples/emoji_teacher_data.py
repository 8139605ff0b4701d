"""The emoji pictures, their split by text, their captions and the tokenizer, for train_emoji_teacher.py."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from fewstep.errors import UserError

RESOLUTION = 64
MAX_TOKENS = 24  # the longest of the emoji captions has 20, start and end included
SPLIT_SEED, HELD_OUT_SHARE = 0, 0.08
START, END = "<|startoftext|>", "<|endoftext|>"

# How often training sees: nothing (for guidance), "name, category", the name alone, the category alone.
CAPTION_SHARES = (0.10, 0.75, 0.10, 0.05)

Split = dict[str, dict[str, str]]  # "train" and "held_out", each {text: group}


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, 3, 64, 64) uint8 with one text each, and the group of every text."""

    pixels: Tensor
    texts: list[str]
    groups: dict[str, str]

    def of(self, texts: list[str]) -> "Pictures":
        """The pictures with one of these texts, in the order of the file."""
        wanted = set(texts)
        rows = [number for number, text in enumerate(self.texts) if text in wanted]
        return Pictures(self.pixels[rows], [self.texts[row] for row in rows], self.groups)

    def batch(self, rows: Tensor) -> Tensor:
        """Float pictures in [-1, 1]."""
        return self.pixels[rows].float() / 127.5 - 1


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The lines of metadata.jsonl.

    Raises:
        UserError: the folder or the file is missing, empty or not in the expected form.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder with the emoji pictures and their metadata.jsonl")
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no metadata.jsonl, one line a picture with file_name, text and group")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            rows.append({key: str(entry[key]) for key in ("file_name", "text", "group")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: expected JSON with file_name, text and group") from error
    if not rows:
        raise UserError(f"{path} is empty: there is no picture to train on")
    return rows


def read_pictures(folder: Path) -> Pictures:
    """All pictures of a folder with their texts.

    Raises:
        UserError: a picture is missing, unreadable or not 64x64, or metadata.jsonl is unusable.
    """
    rows = read_rows(folder)
    pixels = np.empty((len(rows), RESOLUTION, RESOLUTION, 3), np.uint8)
    for number, row in enumerate(rows):
        path = folder / row["file_name"]
        try:
            picture = Image.open(path).convert("RGB")
        except OSError as error:
            raise UserError(f"{path} is named in metadata.jsonl but cannot be read as a picture") from error
        if picture.size != (RESOLUTION, RESOLUTION):
            raise UserError(f"{path} is {picture.width}x{picture.height}; pictures of 64x64 are expected")
        pixels[number] = np.asarray(picture)
    groups = {row["text"]: row["group"] for row in rows}
    return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [row["text"] for row in rows], groups)


def split_texts(groups: dict[str, str]) -> Split:
    """Which texts are trained on. It depends on the texts alone, not on a run's seed.

    Raises:
        UserError: there are fewer than two texts.
    """
    texts = sorted(groups)
    if len(texts) < 2:
        raise UserError("all pictures have the same text: holding texts out needs at least two")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    held_out = {texts[number] for number in order[: max(1, round(HELD_OUT_SHARE * len(texts)))]}
    return {
        "train": {text: groups[text] for text in texts if text not in held_out},
        "held_out": {text: groups[text] for text in texts if text in held_out},
    }


def caption_variants(text: str) -> tuple[str, str, str, str]:
    """What CAPTION_SHARES counts: nothing, the text, its name, its category (the text itself where it has no comma)."""
    name, _, category = text.rpartition(", ")
    return "", text, name or text, category


def build_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from these texts and whose base are the 256 bytes, so any text has tokens.

    Writes vocab.json, merges.txt and tokenizer_config.json into `folder` and reads them back.
    """
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # the pattern of CLIP without English contractions
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, show_progress=False, end_of_word_suffix="</w>")
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    base = sorted(pre_tokenizers.ByteLevel.alphabet())
    # dict.fromkeys: two merges can make the same token
    tokens = dict.fromkeys([*base, *(f"{byte}</w>" for byte in base), *("".join(pair) for pair in merges), START, END])
    vocabulary = {token: number for number, token in enumerate(tokens)}

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids as both pipelines make them, padded and cut to 24 tokens, (len(captions), 24)."""
    found = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return found.input_ids


class Captions:
    """Token ids of every variant of every picture's caption, and draws among them.

    Attributes:
        ids: (number of distinct texts, 4, 24), the variants in the order of CAPTION_SHARES.
        text_of_row: the text of each picture, an index into ids.
        weights: how often each picture is drawn, 1 / sqrt(number of pictures with its text): the many skin tones of
            one text count less, so that the other texts are seen more.
    """

    def __init__(self, tokenizer: CLIPTokenizer, texts: list[str]) -> None:
        distinct = sorted(set(texts))
        flat = [variant for text in distinct for variant in caption_variants(text)]
        self.encode(tokenizer, flat)
        number_of = {text: number for number, text in enumerate(distinct)}
        self.text_of_row = torch.tensor([number_of[text] for text in texts])
        self.weights = torch.bincount(self.text_of_row)[self.text_of_row].double() ** -0.5

    def encode(self, tokenizer: CLIPTokenizer, flat: list[str]) -> None:
        """Set `ids` from all variants of all texts, those of one text after one another."""
        self.ids = token_ids(tokenizer, flat).view(-1, len(CAPTION_SHARES), MAX_TOKENS)

    def choose(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of pictures (B,) and a variant of each one's caption (B,)."""
        rows = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        return rows, torch.multinomial(torch.tensor(CAPTION_SHARES), batch, replacement=True, generator=generator)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of pictures (B,), the ids of their captions (B, 24) and which captions are empty, bool (B,)."""
        rows, variants = self.choose(batch, generator)
        return rows, self.ids[self.text_of_row[rows], variants], variants == 0
