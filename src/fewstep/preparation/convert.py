"""One function for every kind of foreign weights: recognise the file, write the folder it belongs in."""

from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import UserError
from fewstep.families.registry import file_words
from fewstep.formats.few_step_names import few_steps_named, titles
from fewstep.formats.source import Source, cached_id
from fewstep.formats.tensor_files import header_of
from fewstep.preparation.conversion import convert_dmd2, convert_edm_pickle, convert_lora, recognise


def convert_weights(source: str | Path, out: str | Path, *, base: str = "", step_indices: Sequence[int] = ()) -> str:
    """Turn other tools' weights into a folder to sample and train from; nothing in the file is executed.

    Args:
        source: EDM .pkl, DMD2 checkpoint folder, U-Net .bin or .safetensors, LoRA, or a single-file checkpoint.
        out: folder to write; appears whole or not at all.
        base: diffusers folder or hub id of the model that text-to-image weights belong to.
        step_indices: grid indices a generator runs at; empty: EDM 999, released files by their name.

    Returns:
        What was written, as one line for people.

    Raises:
        UserError: `out` exists, nothing there to convert, a damaged file, no base or another one, no steps known.
    """
    place, out, indices = Source.parse(source), Path(out).expanduser(), tuple(step_indices)
    if place.path is None:
        raise UserError(f"{source} does not exist here; download the weights and give the file or folder")
    source = place.path
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder, or remove it first")
    kind = recognise(source)
    if kind in ("edm-pickle", "single-file") and indices:
        raise UserError(f"{source} is a teacher, which has no step schedule; leave out --step-indices")
    if kind == "edm-pickle":
        return convert_edm_pickle(source, out)
    if kind == "dmd2":
        return convert_dmd2(source, out, base, indices)
    if kind == "lora":
        return convert_lora(source, out, base, indices)
    return _convert_single_file(source, out, base)


def _refuse_few_steps(source: Path) -> None:
    """Raise UserError for a distilled model, by its header or its name: it makes pictures in few steps and is no teacher."""
    header = header_of(source)
    if steps := header.get("fewstep.step_indices"):
        raise UserError(
            f"{source} is a generator of few steps that fewstep exported (fewstep.step_indices={steps[:60]} in its header), no "
            "teacher; use the run or generator it was exported from"
        )
    for name in (source.name, cached_id(source.resolve()), *titles(header)):
        if method := few_steps_named(name, file_words()):
            raise UserError(
                f"{source} is a model of few steps by its name ({method} in {name[:100]!r}), whose guidance is built in and whose "
                "scores are of few noise levels: it is no teacher; convert the model it was distilled from, or rename it if it is "
                "none"
            )


def _convert_single_file(source: Path, out: Path, base: str) -> str:
    from fewstep.preparation.single_file import single_file_to_folder

    if not base:
        raise UserError(
            f"{source} is a single-file checkpoint in the LDM layout: give a diffusers folder of the same model family "
            "as --base, which brings configs, tokenizers and scheduler"
        )
    _refuse_few_steps(source)
    notes: list[str] = []
    single_file_to_folder(source, base, out, notes.append)
    return "; ".join([f"{out}: diffusers folder", *notes])
