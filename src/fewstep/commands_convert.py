"""What `fewstep convert` does once its arguments are read."""

from pathlib import Path

from fewstep.conversion import convert_dmd2, convert_edm_pickle, convert_lora, recognise
from fewstep.errors import UserError


def convert_model(source: Path, out: Path, base: str, step_indices: str) -> None:
    """`fewstep convert`: recognise the source, write the folder, print what it holds."""
    source, out, indices = source.expanduser(), out.expanduser(), _parse_indices(step_indices)
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder, or remove it first")
    kind = recognise(source)
    if kind in ("edm-pickle", "single-file") and indices:
        raise UserError(f"{source} is a teacher, which has no step schedule; leave out --step-indices")
    if kind == "edm-pickle":
        print(convert_edm_pickle(source, out))
    elif kind == "dmd2":
        print(convert_dmd2(source, out, base, indices))
    elif kind == "lora":
        print(convert_lora(source, out, base, indices))
    else:
        print(_convert_single_file(source, out, base))


def _convert_single_file(source: Path, out: Path, base: str) -> str:
    from fewstep.preparation.single_file import single_file_to_folder

    if not base:
        raise UserError(
            f"{source} is a single-file checkpoint in the LDM layout: give a diffusers folder of the same model family "
            "as --base, which brings configs, tokenizers and scheduler"
        )
    single_file_to_folder(source, base, out)
    return f"{out}: diffusers folder"


def _parse_indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise UserError(
            f"--step-indices {text}: give whole numbers separated by commas, e.g. 999,749,499,249"
        ) from None
