"""What `fewstep sample` was asked for, as a list of pictures: each with its seed, its number and its prompt or label."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import UserError

_MOST = 1_000_000  # a range longer than this is a slip of the finger


@dataclass(frozen=True)
class Picture:
    """One picture: everything random in it follows from (seed, number).

    Attributes:
        seed: its seed.
        number: which picture of that seed it is.
        label: its class, None for text-to-image and unconditional models.
        prompt: what it shows, None for all but text-to-image models.
    """

    seed: int
    number: int
    label: int | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class PictureList:
    """Pictures in the order they are made and written.

    Attributes:
        seeds: one seed whose pictures first, first + 1, ... these are; or given ones, of each of which it is picture 0.
        columns: of a grid.
    """

    pictures: tuple[Picture, ...]
    seeds: tuple[int, ...]
    columns: int


def list_pictures(
    *, labels: Sequence[int], prompts: Sequence[str], num_classes: int, num_images: int | None, seed: int | None,
    seeds: Sequence[int], first: int,
) -> PictureList:  # fmt: skip
    """Labels or prompts times seeds, or labels or prompts in turn over the pictures of one seed.

    Args:
        labels: given ones; none: all classes in turn.
        prompts: given ones; none: a class-conditional (or unconditional) model.
        num_classes: of the model, 0 without classes.
        num_images: None: one a prompt or label, 16 without.
        seed: of a series of pictures; None with `seeds`, else 0.
        seeds: every prompt or label once with each of these.
        first: number of the first picture of `seed`.

    Raises:
        UserError: options that exclude each other; names them.
    """
    wanted: list[tuple[int | None, str | None]] = [(None, prompt) for prompt in prompts]
    wanted = wanted or [(label, None) for label in labels]
    if seeds:
        if seed is not None or num_images is not None or first:
            raise UserError(
                "--seeds makes one picture a seed and prompt or label: leave out --seed, --num-images, --first"
            )
        if not wanted and num_classes > 1:
            raise UserError(f"--seeds makes one picture a seed and label: give --labels, e.g. 0-{num_classes - 1}")
        pictures = [Picture(one, 0, *what) for what in wanted or [(None, None)] for one in seeds]
        return PictureList(tuple(pictures), tuple(seeds), len(seeds))
    wanted = wanted or [(label, None) for label in range(num_classes)] or [(None, None)]
    count = num_images or (len(prompts) or len(labels) or 16)
    if count > _MOST:
        raise UserError(f"--num-images {count}: at most {_MOST} at once; --first goes on where a command ended")
    numbers = range(first, first + count)
    pictures = [Picture(seed or 0, number, *wanted[number % len(wanted)]) for number in numbers]
    return PictureList(tuple(pictures), (seed or 0,), max(1, round(count**0.5)))


def wishes_of(pictures: Sequence[Picture]) -> list[str] | list[int] | None:
    """The prompts or labels of pictures as `Model.sample` takes them; None for unconditional models."""
    prompts = [picture.prompt for picture in pictures if picture.prompt is not None]
    labels = [picture.label for picture in pictures if picture.label is not None]
    return prompts or labels or None


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers and ranges, "1,2,5-8" to [1, 2, 5, 6, 7, 8]; empty text is an empty list.

    Raises:
        UserError: anything else; names the option.
    """
    numbers: list[int] = []
    for part in text.split(",") if text else []:
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, flags=re.ASCII)
        if not found:
            raise UserError(f"{option} {text}: give numbers or ranges separated by commas, e.g. 0,3,5-8")
        low, high = int(found[1]), int(found[2] or found[1])
        if high < low or high - low >= _MOST:
            raise UserError(f"{option} {text}: the range {part.strip()} runs backwards or is longer than {_MOST}")
        numbers.extend(range(low, high + 1))
    return numbers


def read_labels(text: str) -> list[int]:
    """Labels from the line ("0,3,5-8") or from a text file of them, separated by commas or line ends.

    Raises:
        UserError: neither; names the file and line.
    """
    path = Path(text).expanduser()
    if not text or not os.path.isfile(path):  # pathlib's own raises for a list longer than a file name may be
        try:
            return parse_numbers(text, "--labels")
        except UserError as error:
            raise UserError(f"{error}, or a file of them") from None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path} cannot be read as text ({error})") from error
    labels = []
    for number, line in enumerate(lines, start=1):
        labels += parse_numbers(line.strip().rstrip(","), f"--labels {path}, line {number}:") if line.strip() else []
    if not labels:
        raise UserError(f"--labels {path} holds no labels; write one class number a line")
    return labels


def read_seeds(text: str) -> list[int]:
    """Seeds from "1,2,5-8"; each below 2^64."""
    seeds = parse_numbers(text, "--seeds")
    if any(seed >= 2**64 for seed in seeds):
        raise UserError(f"--seeds {text}: a seed must be below 2^64")
    return seeds


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of "768x512" or of "512", the side of a square; None of empty text."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip(), flags=re.ASCII)
    if not found:
        raise UserError(f"--size {text}: give height x width in pixels, e.g. 768x512, or one number for a square")
    return int(found[1]), int(found[2] or found[1])
