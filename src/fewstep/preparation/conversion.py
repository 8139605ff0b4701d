"""Other tools' files become folders that everything here loads, samples and trains from; nothing in them is executed.

EDM pickles become model folders. DMD2 checkpoints, released U-Net files and LoRAs become generator folders, with the
other roles beside the generator where the source has them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fewstep import __version__
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import StepSchedule
from fewstep.errors import UserError
from fewstep.families.registry import build_denoiser, build_on_meta, describe_weights, family_of, file_words
from fewstep.families.registry import recognise as recognise_family
from fewstep.formats.dmd2_folder import DMD2Checkpoint, fit_discriminator, read_dmd2
from fewstep.formats.few_step_names import method_named, titles
from fewstep.formats.json_files import read_json_object
from fewstep.formats.lora_spellings import is_lora_key
from fewstep.formats.model_folder import CARD, ModelCard, write_model_folder
from fewstep.formats.roles_folder import write_with_roles
from fewstep.formats.source import Source, cached_id
from fewstep.formats.stated_facts import contradiction
from fewstep.formats.tensor_files import common_half_precision, header_of, tensor_names
from fewstep.formats.wrapped_names import bare_name
from fewstep.models.load import load_teacher, need_text_libraries
from fewstep.networks.discriminator import build_head
from fewstep.networks.fitting import fit_network

if TYPE_CHECKING:
    from fewstep.formats.kohya_lora import LoraWeights

Kind = Literal["edm-pickle", "dmd2", "lora", "single-file"]
LDM_UNET = "model.diffusion_model."
_LORA_FILES = (
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin",
)  # fmt: skip
# Words of the names DMD2's files are published under, beside what they call their models, and of what tools add to them
_OWN_WORDS = frozenset(
    {
        "dmd", "step", "steps", "unet", "lora", "fp", "bf", "peft", "model", "generator", "pytorch", "weights", "checkpoint",
        "safetensors", "bin", "pt", "pth", "ckpt",
    }
)  # fmt: skip
_FOUR_STEPS = (999, 749, 499, 249)


def recognise(source: Path) -> Kind:
    """What a file or folder holds, from its name and the names of its tensors.

    Raises:
        UserError: nothing there, nothing to convert, or a file that cannot be read.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; give a checkpoint folder or a weights file")
    if source.is_dir():
        if (source / CARD).is_file() or (source / "generator" / CARD).is_file():
            raise UserError(f"{source} is a fewstep model already: there is nothing to convert")
        if (source / "model_index.json").is_file():
            raise UserError(
                f"{source} is a diffusers folder: use it as a teacher directly, there is nothing to convert"
            )
        return "lora" if _lora_file(source) != source else "dmd2"
    if source.suffix.lower() == ".pkl":
        return "edm-pickle"
    if source.suffix.lower() == ".ckpt":
        return "single-file"
    names = tensor_names(source)
    if any(bare_name(name).startswith(LDM_UNET) for name in names):
        return "single-file"
    return "lora" if any(map(is_lora_key, names)) else "dmd2"


def convert_edm_pickle(source: Path, out: Path) -> str:
    """EDM pickle to model folder; says what was written."""
    teacher = load_teacher(source, device="cpu")
    card = replace(teacher.card, made_with=_origin(source, "EDM pickle"))
    write_model_folder(out, teacher.denoiser.describe(), teacher.denoiser.state_dict(), card)
    return f"{out}: teacher, {_pictures(teacher.denoiser)}"


def convert_dmd2(source: Path, out: Path, base: str = "", step_indices: tuple[int, ...] = ()) -> str:
    """DMD2 checkpoint or generator file to generator folder, with fake score and discriminator; says what was written.

    Args:
        base: the teacher: for text-to-image models a diffusers folder or hub id, needed; for EDM networks a model
            folder or .pkl that gives the network's shape, which otherwise is read from the weights.
        step_indices: grid indices; empty: EDM networks run at 999, others as their file name says.

    Raises:
        UserError: unreadable, another network than the base, no base, no steps known, or it cannot be written.
    """
    checkpoint = read_dmd2(source)
    if checkpoint.layout == "edm":
        return _convert_edm(checkpoint, source, out, base, step_indices)
    return _convert_unet(checkpoint, source, out, base, step_indices)


def convert_lora(source: Path, out: Path, base: str = "", step_indices: tuple[int, ...] = ()) -> str:
    """LoRA in kohya's or PEFT's layout to LoRA generator folder; as `convert_dmd2`."""
    from fewstep.formats.kohya_lora import read_lora
    from fewstep.formats.text_generator_folder import write_generator_folder

    description, denoiser, name = _text_base(source, base)
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    lora = read_lora(_lora_file(source), layers, partial(family_of(description).layer_aliases, description))
    _refuse_other_prediction(_lora_file(source), denoiser)
    lora = replace(lora, state={name: _as_layer(name, value, layers) for name, value in lora.state.items()})
    _check_lora(lora, layers, source)
    steps = _steps(step_indices, source, denoiser)
    shape = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    card = _generator_card(source, "LoRA", steps, base=name)
    write_generator_folder(out, {**description, "lora": shape}, lora.state, card, family_of(description).network_part)
    return (
        f"{out}: LoRA generator of rank {lora.rank} for {name}, steps {list(steps.indices)}{_by_its_name(step_indices)}"
    )


def _convert_edm(checkpoint: DMD2Checkpoint, source: Path, out: Path, base: str, indices: tuple[int, ...]) -> str:
    class_names: tuple[str, ...] = ()
    if base:
        teacher = load_teacher(base, device="cpu")
        if teacher.base:
            raise UserError(f"{base} is a text-to-image model; {source} is a checkpoint of a class-conditional one")
        description, class_names = teacher.denoiser.describe(), teacher.card.class_names
    else:
        description = _describe_edm(checkpoint, source)
    denoiser = build_denoiser(description)
    steps = _steps(indices or family_of(description).one_step_indices, source, denoiser)
    weights = fit_network(checkpoint.generator, denoiser, "generator", str(source))
    roles = _fitted_roles(checkpoint, denoiser, str(source))
    card = replace(_generator_card(source, "DMD2 checkpoint", steps), class_names=class_names)
    dtype = common_half_precision(checkpoint.generator)
    write_with_roles(out, lambda folder: write_model_folder(folder, description, weights, card, dtype), roles)
    return f"{out}: generator, {_pictures(denoiser)}, steps {list(steps.indices)}{_with(roles)}"


def _describe_edm(checkpoint: DMD2Checkpoint, source: Path) -> dict[str, Any]:
    """The network's description from its weights; compared on the meta device before anything large is built."""
    try:
        description = describe_weights(checkpoint.generator)
        untrained = build_on_meta(description)
    except ValueError as error:
        raise UserError(f"{source}: {error}; give the teacher it was trained from as --base") from error
    fit_network(checkpoint.generator, untrained, "generator", str(source))
    return description


def _convert_unet(checkpoint: DMD2Checkpoint, source: Path, out: Path, base: str, indices: tuple[int, ...]) -> str:
    from fewstep.formats.text_generator_folder import write_generator_folder

    description, denoiser, name = _text_base(source, base)
    _refuse_other_settings(source, description)
    steps = _steps(indices, source, denoiser)
    weights = _bare(fit_network(checkpoint.generator, denoiser, "generator", str(source)))
    roles = {role: _bare(part) for role, part in _fitted_roles(checkpoint, denoiser, str(source)).items()}
    card = _generator_card(source, "DMD2 checkpoint", steps, base=name)
    dtype = common_half_precision(checkpoint.generator)
    part = family_of(description).network_part
    write_with_roles(out, lambda folder: write_generator_folder(folder, description, weights, card, part, dtype), roles)
    return f"{out}: generator of {name}, steps {list(steps.indices)}{_by_its_name(indices)}{_with(roles)}"


def _text_base(source: Path, base: str) -> tuple[dict[str, Any], Denoiser, str]:
    """(description, network on the meta device, what the user calls it) of a text-to-image base."""
    need_text_libraries()
    from fewstep.families.diffusers_folder import resolve_model_folder

    if not base:
        raise UserError(
            f"{source} has only the weights of a text-to-image network: give its base model (diffusers folder or hub "
            "id) as --base, which brings text encoders and VAE"
        )
    folder = resolve_model_folder(base)
    description = recognise_family(folder).describe_folder(folder)
    return description, build_on_meta(description), Source.parse(base).lasting_name


def _fitted_roles(checkpoint: DMD2Checkpoint, denoiser: Denoiser, where: str) -> dict[str, dict[str, Tensor]]:
    """Fake score and discriminator, where there are any, under our networks' names."""
    roles: dict[str, dict[str, Tensor]] = {}
    if checkpoint.fake_score:
        roles["fake_score"] = fit_network(checkpoint.fake_score, denoiser, "fake score", where)
    if checkpoint.discriminator:
        with torch.device("meta"):
            head = build_head(denoiser.feature_shapes).state_dict()
        roles["discriminator"] = fit_discriminator(checkpoint.discriminator, head, where)
    return roles


def _bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers network's own keys."""
    return {name.removeprefix("network."): value for name, value in weights.items()}


def _as_layer(name: str, matrix: Tensor, layers: Mapping[str, nn.Module]) -> Tensor:
    """A matrix of a LoRA as its layer has them: some tools write linear layers as 1x1 convolutions, or the other way round."""
    layer: Any = layers[name.rpartition(".lora_")[0]]
    ndim = layer.weight.ndim
    if matrix.ndim > ndim and matrix.shape[2:].numel() == 1:
        return matrix.flatten(1)
    return matrix[..., None, None] if matrix.ndim < ndim else matrix


def _check_lora(lora: "LoraWeights", layers: Mapping[str, nn.Module], source: Path) -> None:
    """Refuse matrices of other sizes than the base's layers."""
    wrong = []
    for target in lora.targets:
        outputs, *inputs = layers[target].weight.shape  # type: ignore[misc]
        down, up = lora.state[f"{target}.lora_A.weight"], lora.state[f"{target}.lora_B.weight"]
        ones = [1] * (down.ndim - 2)
        if [*down.shape] != [lora.rank, *inputs] or [*up.shape] != [outputs, lora.rank, *ones]:
            wrong.append(target.removeprefix("network."))
    if wrong:
        raise UserError(
            f"{source} is a LoRA for another base: {len(wrong)} of its {len(lora.targets)} layers have another size "
            f"there, e.g. {wrong[:2]}"
        )


def _refuse_other_prediction(file: Path, denoiser: Denoiser) -> None:
    """Raise UserError for a LoRA whose header says that it was made for another prediction than the base's."""
    if told := contradiction(file, getattr(denoiser, "prediction", "")):
        raise UserError(f"{file} was made for a model of {told}: give the model that it belongs to as --base")


def _refuse_other_settings(source: Path, description: dict[str, Any]) -> None:
    """Raise UserError where the config.json that a network of diffusers lies beside is not its base's."""
    path, family = (source if source.is_dir() else source.parent) / "config.json", family_of(description)
    if not path.is_file():
        return
    config = read_json_object(path)
    if source.is_dir() or config.get("_class_name") == family.network_class:
        try:
            family.refuse_other_settings(config, description)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error


def _steps(indices: tuple[int, ...], source: Path, denoiser: Denoiser) -> StepSchedule:
    """Given indices; or those of the published file of this name.

    Raises:
        UserError: none are given, and the name is not one of DMD2's; or a file that predicts x0 itself.
    """
    name = source.name.lower()
    if re.search(r"(?<![a-z0-9])x0(?![a-z0-9])", name):
        raise UserError(
            f"{source} predicts x0 itself, as its name says; networks that predict epsilon or v are read: give the file "
            "of more steps, or another method's"
        )
    if not indices:
        one_step = family_of(denoiser.describe()).one_step_indices
        other = _other_method(source)
        indices = () if other else _published_steps(name, one_step)
        if not indices:
            of = f"; by its name it is a {other} file, trained for steps and a sampler of its own" if other else ""
            raise UserError(
                f"{source} does not say which steps it was trained for{of}: give --step-indices, {_listed(_FOUR_STEPS)} "
                f"for DMD2's four steps, {_listed(one_step)} for its one step of this model"
            )
    try:
        return StepSchedule.on(denoiser.noise_schedule, indices)
    except ValueError as error:
        raise UserError(f"--step-indices {_listed(indices)}: {error}") from None


def _other_method(source: Path) -> str:
    """The method that a source is of by its name, by its folder's or repository's, or by its header's; empty: not another's."""
    place = source.resolve()
    file = _lora_file(source)
    names = [source.name, place.parent.name, cached_id(place), *(titles(header_of(file)) if file.is_file() else ())]
    return next((method for name in names if (method := method_named(name))), "")


def _by_its_name(given: tuple[int, ...]) -> str:
    """Says where the steps are from, unless they were given."""
    return "" if given else " (by its name; --step-indices gives others)"


def _published_steps(name: str, one_step: tuple[int, ...]) -> tuple[int, ...]:
    """The steps of DMD2's file of this name; none where any word of it is not one of theirs, for other methods count too."""
    words = set(re.findall("[a-z]{2,}", name))
    if not words <= _OWN_WORDS | file_words():
        return ()
    if re.search(r"(?<!\d)4.?step", name):
        return _FOUR_STEPS
    return one_step if re.search(r"(?<!\d)1.?step", name) else ()


def _generator_card(source: Path, what: str, steps: StepSchedule, base: str = "") -> ModelCard:
    return ModelCard(
        "generator",
        steps.indices,
        steps.num_levels,
        made_with=_origin(source, what),
        base=base,
        step_sigmas=steps.sigmas,
    )


def _origin(source: Path, what: str) -> dict[str, Any]:
    return {"fewstep": __version__, "converted_from": source.resolve().name, "format": what}


def _lora_file(source: Path) -> Path:
    """The LoRA file in a folder of diffusers or PEFT; anything else as it is."""
    return next((source / name for name in _LORA_FILES if (source / name).is_file()), source)


def _pictures(denoiser: Denoiser) -> str:
    channels, height, width = denoiser.image_shape
    classes = f"{denoiser.num_classes} classes" if denoiser.num_classes else "unconditional"
    return f"{channels}x{height}x{width} pictures, {classes}"


def _with(roles: Mapping[str, Any]) -> str:
    """What lies beside the generator, for people."""
    names = " and ".join(role.replace("_", " ") for role in roles)
    return f", with {names} to continue training from" if names else ""


def _listed(indices: tuple[int, ...]) -> str:
    return ",".join(str(index) for index in indices)
