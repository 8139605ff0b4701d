"""Text-to-image generators as complete diffusers pipelines, and as one that needs a prompt and nothing else."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fewstep.errors import UserError, first_line
from fewstep.export.lora import base_denoiser, component_name, fused_weights
from fewstep.export.shareable import copy_shareable
from fewstep.families.registry import family_of
from fewstep.formats.casting import cast_weights
from fewstep.formats.diffusers_index import read_model_index, refuse_foreign_code
from fewstep.formats.json_files import parse_json
from fewstep.formats.model_folder import CARD, ModelCard
from fewstep.formats.model_links import refuse_foreign_links
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.formats.text_generator_folder import CONFIG, NETWORK
from fewstep.models.model import Model
from fewstep.networks.components import published_names

_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")  # no variants (.fp16.)
_OTHER_WEIGHTS = (".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".pt", ".ckpt", ".xml", ".safetensors")


def export_text_pipeline(
    folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]
) -> None:
    """The teacher's pipeline with the generator as its network and a scheduler that knows the generator's steps.

    Raises:
        UserError: steps that no stock scheduler expresses, values that do not fit `dtype`, a component without
            safetensors.
    """
    base = base_denoiser(generator)
    scheduler = family_of(base.describe()).few_step_scheduler(base, generator.step_schedule)
    network = component_name(generator)
    index = json.loads((generator.components / "model_index.json").read_text(encoding="utf-8"))
    for part, (_, kind) in read_model_index(generator.components).items():
        if part in (network, "scheduler"):
            continue
        if (generator.components / part).is_dir():
            _copy_component(generator.components / part, folder / part, dtype, kind)
        else:
            index[part] = [None, None]
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_diffusers_version"] = diffusers.__version__
    index.pop("_name_or_path", None)
    index |= family_of(base.describe()).generator_index
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    export_network(folder, generator, name, dtype, header)


def export_network(folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]) -> None:
    """`unet/` (or `transformer/`) as diffusers reads it, and `fewstep.json`, so that `load_generator` reads it too."""
    base, part = base_denoiser(generator), component_name(generator)
    (folder / part).mkdir()
    write_tensor_file(folder / part / NETWORK, cast_weights(fused_weights(generator), dtype, part), header)
    description = base.describe()
    kind = type(base.network).__name__
    # the side of a picture, where a pipeline is not told one, is the one the generator was trained for
    side = {"sample_size": description["latent_size"]} if "sample_size" in description["network"] else {}
    config = {"_class_name": kind, **description["network"], **side}
    (folder / part / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    values = {**asdict(generator.card), "description": description}
    (folder / CARD).write_text(json.dumps(values, indent=1), encoding="utf-8")


def _copy_component(source: Path, target: Path, dtype: torch.dtype, architecture: str) -> None:
    """Configs (without local folders) and vocabularies, safetensors in another precision; other weight files stay behind."""
    for path in (source, *source.iterdir()):
        refuse_foreign_links(path, source.parent)
    target.mkdir()
    weights = [path for path in sorted(source.iterdir()) if _WEIGHTS.fullmatch(path.name)]
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS) and not path.name.startswith("."):
            copy_shareable(path, target / path.name)
    if not weights and any(path.name.endswith(_OTHER_WEIGHTS) for path in source.iterdir()):
        raise UserError(f"{source} holds no weights as safetensors; download the model again with them")
    for path in weights:
        tensors = published_names(load_file(path), architecture) if len(weights) == 1 else load_file(path)
        write_tensor_file(target / path.name, cast_weights(tensors, dtype, source.name), {"format": "pt"})


def absent_components(folder: Path) -> tuple[str, ...]:
    """Text encoders that a pipeline has a place for and this folder does not hold (SD 3 without T5).

    diffusers loads such a folder only when they are given as None.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return tuple(
        name
        for name, value in index.items()
        if value == [None, None] and name.startswith(("text_encoder", "tokenizer"))
    )


class TextPipeline:
    """An exported pipeline that chooses steps and guidance itself: `pipeline("a red cat").images`.

    Everything else is the diffusers pipeline's own: `pipeline.to("cuda")`, `pipeline.vae`, `pipeline.pipe`.

    Attributes:
        pipe: the diffusers pipeline.
        card: the generator's steps and origin.
        fixed: arguments of the pipeline's call that are the generator's: guidance off, its size.
    """

    def __init__(self, pipe: Any, card: ModelCard, fixed: Mapping[str, Any]) -> None:
        self.pipe, self.card, self.fixed = pipe, card, fixed

    def __call__(self, prompt: str | list[str], **options: Any) -> Any:
        """As the diffusers pipeline, in the generator's own number of steps and without guidance.

        Raises:
            UserError: another number of steps, or guidance, which the generator has built in.
        """
        steps = len(self.card.step_indices)
        if options.setdefault("num_inference_steps", steps) != steps:
            raise UserError(
                f"num_inference_steps={options['num_inference_steps']}: this generator makes a picture in {steps}; leave it out"
            )
        own = {name: value for name, value in self.fixed.items() if name not in ("height", "width")}
        if any(options.get(name, value) != value for name, value in own.items()) or options.get("negative_prompt"):
            raise UserError(f"a generator has its guidance built in: leave out {', '.join(own)} and negative_prompt")
        # a list of its own: some pipelines write into the one they are given
        return self.pipe(prompt=prompt if isinstance(prompt, str) else list(prompt), **{**self.fixed, **options})

    def to(self, *arguments: Any, **options: Any) -> "TextPipeline":
        """Move the pipeline to a device or precision."""
        self.pipe.to(*arguments, **options)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("pipe", "card", "fixed"):  # not there while unpickling or copying
            raise AttributeError(name)
        return getattr(self.pipe, name)


def load_text_pipeline(folder: Path, **options: Any) -> TextPipeline:
    """A `TextPipeline` from a folder written by `export_text_pipeline`; options go to `from_pretrained`.

    Raises:
        UserError: a generator that was not exported as a pipeline, or a damaged folder.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no pipeline yet: make one with fewstep export {folder} OUT --as diffusers")
    refuse_foreign_code(folder)
    try:
        values = parse_json((folder / CARD).read_text(encoding="utf-8"))
        card = ModelCard(role="generator", step_indices=tuple(values["step_indices"]))
        card = replace(card, base=str(values.get("base", "")), licence=str(values.get("licence", "")))
        family, side = family_of(values["description"]), int(values["description"]["latent_size"])
        side *= family.pixels_per_latent(folder)
        absent = dict.fromkeys(absent_components(folder))
        pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is missing files or damaged ({first_line(error)}); export it again") from error
    return TextPipeline(pipe, card, family.pipeline_options((side, side)))
