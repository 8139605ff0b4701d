"""What `fewstep convert` does once its arguments are read."""

from pathlib import Path

from fewstep.errors import UserError
from fewstep.preparation.convert import convert_weights


def convert_model(source: Path, out: Path, base: str, step_indices: str) -> None:
    """`fewstep convert`: recognise the source, write the folder, print what it holds."""
    print(convert_weights(source, out, base=base, step_indices=_parse_indices(step_indices)))


def _parse_indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise UserError(
            f"--step-indices {text}: give whole numbers separated by commas, e.g. 999,749,499,249"
        ) from None
