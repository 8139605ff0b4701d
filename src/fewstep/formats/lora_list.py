"""LoRA files with their strengths as users write them, "FILE:0.8"."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import UserError
from fewstep.formats.fingerprints import add_content


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and how strongly it counts.

    Attributes:
        path: a file that exists.
        strength: its update is multiplied by this.
    """

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str, beside: Path | None = None) -> "LoraFile":
        """Read "FILE:0.8" or "FILE", which counts whole.

        Args:
            beside: a folder where the file may lie too, by its last name.

        Raises:
            UserError: no such file, or a strength of 0 or without end.
        """
        name, strength = split_strength(text)
        path = Path(name).expanduser()
        if beside is not None and not path.is_file():
            path = beside / path.name
        if not path.is_file():
            raise UserError(f"LoRA {text}: {name} is no file; give FILE or FILE:STRENGTH, e.g. style.safetensors:0.8")
        if not strength or not math.isfinite(strength):
            raise UserError(
                f"LoRA {text}: a strength of {strength:g} is none; give a number such as 0.8, or leave it out"
            )
        return cls(path, strength)

    def __str__(self) -> str:
        """As `parse` reads it, from any folder."""
        return f"{self.path.resolve()}:{self.strength!r}"


def split_strength(text: str) -> tuple[str, float]:
    """(file, strength) of "FILE:0.8"; 1 where none is named."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon and name else (text, 1.0)
    except ValueError:  # a colon of the file's name
        return text, 1.0


def loras_fingerprint(loras: Sequence[str]) -> str:
    """Short string of the contents and strengths of LoRA files, in their order, wherever they lie.

    Raises:
        UserError: one is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for lora in map(LoraFile.parse, loras):
        try:
            with lora.path.open("rb") as file:
                add_content(digest, file, lora.path.stat().st_size)
        except OSError as error:
            raise UserError(f"LoRA {lora.path} cannot be read ({error})") from None
        digest.update(f":{lora.strength!r}\0".encode())
    return digest.hexdigest()
