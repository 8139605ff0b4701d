"""`fewstep export`: a generator in the format of another tool, with a model card, whole or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.devices import DTYPES, dtype_name
from fewstep.errors import UserError
from fewstep.export.card_usage import CardFacts
from fewstep.export.hub import check_repo_name
from fewstep.export.model_card import SAMPLES, file_header, render_card, run_figures
from fewstep.export.shareable import without_local_paths
from fewstep.formats.atomic import written_aside
from fewstep.formats.pixels import make_grid
from fewstep.formats.source import Source
from fewstep.formats.text_generator_folder import is_generator_folder
from fewstep.models.load import load_generator
from fewstep.models.model import Model

# what each kind of conditioner's generators export as: kind -> (module below export, function)
_WRITERS = {
    "prompts": {
        "diffusers": ("text_pipeline", "export_text_pipeline"), "unet": ("text_pipeline", "export_network"),
        "lora": ("lora", "export_lora"), "kohya-lora": ("lora", "export_kohya_lora"),
        "single-file": ("export", "_write_single_file"),
    },
    "labels": {"diffusers": ("class_folder", "export_class_folder"), "edm": ("class_folder", "export_edm_pickle")},
}  # fmt: skip
KINDS = tuple(dict.fromkeys(kind for kinds in _WRITERS.values() for kind in kinds))
PROMPTS = (
    "a red cat on a green sofa", "a lighthouse in a storm at night", "a bowl of fruit, oil painting",
    "an old man reading a newspaper in a cafe", "a blue bicycle against a yellow wall", "a mountain lake in autumn",
    "a dog in a spacesuit on the moon", "a street in a rainy city, neon signs",
)  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """How `export_generator` writes.

    Attributes:
        kind: one of `KINDS`.
        precision: "fp16", "bf16" or "fp32"; empty: its family's (`Family.export_precision`).
        base: where the teacher of a text-to-image generator lies, where it is not where it was during training.
        prompts: of the sample pictures; empty: `PROMPTS`.
        num_samples: pictures in the model card.
        licence: of the weights, as the hub names it; empty: the generator's own card.
        repo: name on the hub, where the export goes there afterwards.
        device: makes the sample pictures.
        tell: is told what a format has no place for, in words.
    """

    kind: str = "diffusers"
    precision: str = ""
    base: str = ""
    prompts: tuple[str, ...] = ()
    num_samples: int = 8
    licence: str = ""
    repo: str = ""
    device: str = "auto"
    tell: Callable[[str], None] = lambda line: None


def export_generator(source: str | Path, out: str | Path, options: ExportOptions | None = None) -> Path:
    """Write a generator in another tool's format, with README.md and sample pictures, into the new folder `out`.

    Raises:
        UserError: bad options, no such generator, `out` exists, a format that cannot hold it, a full disk; nothing is
            left half-written.
    """
    options, target = options or ExportOptions(), Path(out).expanduser()
    _check(options, source, target)
    generator = load_generator(source, device=options.device, base=options.base)
    takes = generator.conditioner.takes
    if options.kind not in _WRITERS[takes]:
        what = {"prompts": "text-to-image", "labels": "class-conditional"}[takes]
        kinds = ", ".join(_WRITERS[takes])
        raise UserError(f"--as {options.kind}: {source} is a {what} generator, which exports as {kinds}")
    precision = options.precision or generator.family.export_precision
    card = generator.card
    base = options.base or card.base or generator.base
    card = replace(card, licence=options.licence or card.licence, base=base)
    generator.card = card = without_local_paths(card, keep_base=not options.repo)
    write, family = _writer(options.kind, takes), generator.family
    with written_aside(target) as aside:
        write(aside, generator, target.name, DTYPES[precision], file_header(card))
        has_scheduler = (aside / "scheduler").is_dir() or _write_scheduler(aside, generator, options.kind)
        has_workflow = _write_workflow(aside, generator, target.name, options.kind)
        unassumed = _unassumed(generator, options)
        images = _samples(generator, options)
        if len(images):
            make_grid(images, columns=min(4, len(images))).save(aside / SAMPLES, format="PNG")
        facts = CardFacts(
            target.name, options.kind, options.repo or str(target), card, precision, pushed=bool(options.repo),
            base=card.base, component=family.component, network_class=family.network_class,
            comfyui_lora=family.comfyui_lora, original_names=family.kohya_names == "original", pipeline_dtype=dtype_name(DTYPES[family.export_precision]), scheduler_class=family.scheduler_class, has_scheduler=has_scheduler, has_workflow=has_workflow,
            num_samples=len(images), prompts=_prompts(options) if takes == "prompts" else (),
            call_options=family.pipeline_options(generator.size), absent=_absent(generator), unassumed=unassumed, figures=run_figures(_folder(source), card),
        )  # fmt: skip
        (aside / "README.md").write_text(render_card(facts), encoding="utf-8")
    return target


def _check(options: ExportOptions, source: str | Path, target: Path) -> None:
    """Everything that can be refused before weights are read."""
    if options.kind not in KINDS:
        raise UserError(f"--as {options.kind}: choose one of {', '.join(KINDS)}")
    if options.precision not in ("", *DTYPES):
        raise UserError(f"--dtype {options.precision}: choose fp16, bf16 or fp32")
    if target.exists():
        raise UserError(f"{target} exists already; give a new folder, or remove it first")
    if target.suffix.lower() in (".safetensors", ".pkl", ".ckpt"):
        raise UserError(
            f"{target}: an export is a folder with a model card beside the weights; leave out {target.suffix}"
        )
    if options.repo:
        check_repo_name(options.repo)
    folder = _folder(source)
    if is_generator_folder(folder):
        return
    is_teacher = (folder / "teacher").is_dir()  # a run of `fewstep pretrain`, or a bundled one
    if (folder / "model_index.json").is_file():
        from fewstep.families.diffusers_folder import is_diffusers_folder

        is_teacher = is_diffusers_folder(folder)
    if is_teacher:
        raise UserError(f"{source} is a teacher, not a generator: distil it with fewstep train, then export the run")


def _folder(source: str | Path) -> Path:
    """The generator's own folder, of a run or of itself."""
    return Source.parse(source).of_role("generator") or Path(source)


def _writer(kind: str, takes: str) -> Callable[..., None]:
    """The function that writes one kind; its libraries are imported only here."""
    module, name = _WRITERS[takes][kind]
    writer: Callable[..., None] = getattr(import_module(f"fewstep.export.{module}"), name)
    return writer


def _write_single_file(
    folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]
) -> None:
    try:
        export: Any = import_module("fewstep.export.single_file").export_single_file
    except ImportError as error:
        raise UserError("--as single-file is not in this version of fewstep; choose --as diffusers") from error
    export(generator, folder / f"{name}.safetensors", dtype)


def _unassumed(generator: Model, options: ExportOptions) -> str:
    """Facts of a single file's model that programs take otherwise, told to whoever exports it; "" for none, and for other kinds."""
    if options.kind != "single-file":
        return ""
    facts: str = import_module("fewstep.export.assumed_facts").unassumed_facts(generator)
    if facts:
        options.tell(
            f"warning: a single file has no place for {facts}: programs that read such files (ComfyUI, stable-diffusion.cpp) make other "
            "pictures of it; --as diffusers keeps everything"
        )
    return facts


def _write_workflow(folder: Path, generator: Model, name: str, kind: str) -> bool:
    """Beside files that ComfyUI loads, a workflow for it; False where none can say this generator's noise levels, or its base."""
    if kind not in ("single-file", "kohya-lora") or (kind == "kohya-lora" and generator.card.base_loras):
        return False
    workflow: Any = import_module("fewstep.export.comfyui").write_workflow
    file, base = f"{name}.safetensors", f"{Path(generator.card.base).name or 'base'}.safetensors"
    checkpoint, lora = (file, "") if kind == "single-file" else (base, file)
    try:
        workflow(generator, folder / "comfyui_workflow.json", checkpoint, lora=lora, prompt=PROMPTS[0])
    except UserError:
        return False
    return True


def _write_scheduler(folder: Path, generator: Model, kind: str) -> bool:
    """Beside a network or a LoRA, the scheduler that knows the steps; False where no stock scheduler can."""
    if not generator.family.scheduler_class or kind == "single-file":
        return False
    try:
        scheduler = generator.family.few_step_scheduler(generator.denoiser.base_network, generator.step_schedule)
    except UserError:
        return False
    scheduler.save_pretrained(folder / "scheduler")
    return True


def _absent(generator: Model) -> tuple[str, ...]:
    if generator.folder is None:
        return ()
    from fewstep.export.text_pipeline import absent_components

    return absent_components(generator.folder)


def _prompts(options: ExportOptions) -> tuple[str, ...]:
    given = options.prompts or PROMPTS
    return tuple(given[number % len(given)] for number in range(options.num_samples))


def _samples(generator: Model, options: ExportOptions) -> Tensor:
    """Sample pictures of seed 0, (N, C, H, W) in [-1, 1]."""
    if not options.num_samples:
        return torch.empty(0)
    prompts = list(_prompts(options)) if generator.conditioner.takes == "prompts" else None
    return generator.sample(prompts, num_images=options.num_samples, output="tensor")
