"""Where a path leads: teachers, generators, or whichever of the two it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, first_line
from fewstep.families.diffusers_folder import resolve_model_folder
from fewstep.families.family import Family
from fewstep.families.registry import build_denoiser, build_on_meta, component_of, family_of, recognise
from fewstep.formats.compare import state_difference
from fewstep.formats.few_step_names import predicts_v_by_name
from fewstep.formats.lora_list import LoraFile
from fewstep.formats.model_folder import CARD, ModelCard
from fewstep.formats.source import Source, cached_id
from fewstep.formats.stated_facts import contradiction
from fewstep.formats.text_generator_folder import is_generator_folder, read_generator_folder
from fewstep.models.model import Model, build_model
from fewstep.progress import tell

if TYPE_CHECKING:
    from fewstep.networks.merged_loras import ReadLoras


def load_teacher(
    source: str | Path, *, device: str = "auto", precision: str = "fp32", resolution: int = 0,
    loras: Sequence[str] = (),
) -> Model:  # fmt: skip
    """Load a diffusion model, the teacher of a distillation.

    Args:
        source: a model folder, a run folder of `fewstep pretrain`, an EDM .pkl (read without executing anything in
            it), "bundled:fashion-mnist"; or a text-to-image model: a diffusers folder, hub id or "bundled:emoji-sd".
        device: "auto", "cpu", "cuda", "cuda:N", "mps".
        precision: "fp32", "bf16" or "fp16" inside the network.
        resolution: side of a text-to-image model's pictures in pixels; 0 takes its own.
        loras: "FILE" or "FILE:0.8", merged into a text-to-image model's network in their order.

    Raises:
        UserError: no such model, or a damaged one; a LoRA that is missing, damaged or another model's.
    """
    place = FoundTeacher.at(source, loras)
    denoiser = place.family.load(place.folder, resolution)
    _merge(denoiser, place.loras)
    return place.model(denoiser).to(device, precision)


@dataclass(frozen=True)
class FoundTeacher:
    """Where a teacher's path leads; nothing is read yet.

    Attributes:
        folder: or file.
        loras: to be merged into its network.
        base: what its other components are read from, as the user called it; empty where the network is everything.
    """

    folder: Path
    family: Family
    loras: list[LoraFile]
    base: str

    @classmethod
    def at(cls, source: str | Path, loras: Sequence[str]) -> "FoundTeacher":
        """Arguments and errors as `load_teacher` has them."""
        place, files = Source.parse(source), [LoraFile.parse(lora) for lora in loras]
        folder = place.of_role("teacher")
        if folder is None:
            need_text_libraries()
            folder = resolve_model_folder(place)
        _refuse_absent(folder, f"teacher {source}")
        family = recognise(folder)
        if family.takes == "prompts":
            need_text_libraries()
        _refuse_for_labels(files, family, source)
        return cls(folder, family, files, place.lasting_name if family.takes == "prompts" else "")

    def model(self, denoiser: Denoiser) -> Model:
        """The model around its network, which has its weights and LoRAs."""
        card = self.family.read_card(self.folder)
        _warn_of_other_predictions(denoiser, self.loras)
        _warn_of_its_name(denoiser, self.folder)
        card = replace(card, base_loras=tuple(map(str, self.loras)))
        folder = self.folder if self.family.takes == "prompts" else None
        return build_model(denoiser.eval(), card, folder, self.base)


def load_generator(
    source: str | Path, *, device: str = "auto", precision: str = "fp32", base: str = ""
) -> Model:  # fmt: skip
    """Load a distilled generator: an exported folder or a run folder of `fewstep train`.

    Args:
        source: the folder.
        device: "auto", "cpu", "cuda", "cuda:N", "mps".
        precision: "fp32", "bf16" or "fp16" inside the network.
        base: for text-to-image generators, where the teacher lies that text encoders and VAE are read from;
            empty: where it was during training.

    Raises:
        UserError: no such model, a damaged one, or one that is a teacher (it has no step schedule).
    """
    place = Source.parse(source)
    folder = place.of_role("generator")
    if folder is None:
        raise UserError(f"{source} does not exist; download the generator and give its folder")
    if is_generator_folder(folder):
        need_text_libraries()
        return _load_on_base(folder, base).to(device, precision)
    _refuse_absent(folder, f"generator {source}")
    family = recognise(folder)
    card = family.read_card(folder)
    if not card.step_indices:
        raise UserError(f"{source} is a {card.role} without a step schedule; load it with fewstep.load_teacher")
    return build_model(family.load(folder).eval(), card).to(device, precision)


def load_model(
    source: str | Path, *, device: str = "auto", precision: str = "fp32", loras: Sequence[str] = ()
) -> Model:
    """Load whichever the path holds, a teacher or a generator; of a run folder with both, the generator.

    Args:
        loras: as `load_teacher` takes them; a generator takes none.

    Raises:
        UserError: no such model, or a damaged one.
    """
    place = Source.parse(source)
    folder = place.of_role("generator")
    if folder is None:
        return load_teacher(source, device=device, precision=precision, loras=loras)
    is_generator = is_generator_folder(folder)
    if not is_generator:
        teacher = place.of_role("teacher")
        holds_teacher = teacher != place.path and folder == place.path
        _refuse_absent(folder, f"model {source}")
        is_generator = not holds_teacher and bool(recognise(folder).read_card(folder).step_indices)
    if not is_generator:
        return load_teacher(source, device=device, precision=precision, loras=loras)
    if loras:
        raise UserError(f"{source} is a generator: LoRAs are merged into teachers; distil with teacher.loras")
    return load_generator(source, device=device, precision=precision)


def need_text_libraries() -> None:
    """Raise UserError where what text-to-image models need is not installed."""
    missing = [name for name in ("diffusers", "transformers", "peft") if find_spec(name) is None]
    if missing:
        raise UserError(f"text-to-image models need {', '.join(missing)}: pip install {' '.join(missing)}")


def _refuse_absent(folder: Path, what: str) -> None:
    if not folder.exists():
        raise UserError(f"{what} does not exist; give a model folder, a run folder or an EDM .pkl")


def _load_on_base(folder: Path, base: str) -> Model:
    """A generator whose text encoders, VAE and perhaps network lie in its teacher's folder."""
    description, weights, card = read_generator_folder(folder, component_of)
    whole = not base and (folder / "model_index.json").is_file()  # an exported pipeline brings its own components
    source = str(folder) if whole else base or card.base
    try:
        components = resolve_model_folder(source)
    except UserError as error:
        words = f"{folder} reads its text encoders and VAE from {source}: {error}"
        if not base and not Source.parse(source).hub_id:
            words += f"; put it back, or write where it lies now as base into {folder / CARD}"
        raise UserError(words) from error
    if whole:  # its scheduler knows the generator's steps only; the description has the teacher's
        denoiser = _described_network(description, weights, folder)
    else:
        family = recognise(components)
        denoiser = family.load(components, int(description["latent_size"]) * family.pixels_per_latent(components))
    if "lora" in description:
        if not whole:
            _merge(denoiser, _base_loras(folder, card))
        denoiser = _with_adapter(denoiser, description, weights, folder, source)
    else:
        _load_network(denoiser, weights, folder)
    return build_model(denoiser.eval(), card, components, source)


def check_loras(denoiser: Denoiser, loras: Sequence[str], source: str) -> None:
    """Refuse LoRAs that `load_teacher` would, before there are weights to merge them into, and warn as it does.

    Args:
        denoiser: the network of `source`, perhaps on the meta device.

    Raises:
        UserError: a LoRA that is missing, damaged or another model's; a teacher that takes none.
    """
    if files := [LoraFile.parse(lora) for lora in loras]:
        _refuse_for_labels(files, family_of(denoiser.describe()), source)
        loras_for(denoiser, files)
        _warn_of_other_predictions(denoiser, files)


def _refuse_for_labels(loras: Sequence[LoraFile], family: Family, source: str | Path) -> None:
    if loras and family.takes == "labels":
        raise UserError(f"{source} is a class-conditional teacher: LoRAs are merged into text-to-image models")


def _merge(denoiser: Denoiser, loras: Sequence[LoraFile]) -> None:
    """Add LoRAs to a teacher's or base's own weights."""
    if loras:
        from fewstep.networks.merged_loras import merge_loras

        merge_loras(denoiser, loras_for(denoiser, loras))


def loras_for(denoiser: Denoiser, loras: Sequence[LoraFile]) -> "ReadLoras":
    """LoRAs, read and compared with a network, which may lie on the meta device."""
    if not loras:
        return []
    from fewstep.networks.merged_loras import read_loras

    description = denoiser.describe()
    return read_loras(denoiser, loras, partial(family_of(description).layer_aliases, description))


def _warn_of_other_predictions(denoiser: Denoiser, loras: Sequence[LoraFile]) -> None:
    """Say which LoRAs were made on a model of another prediction than this one, as their headers say; a style may carry over or not."""
    own = getattr(denoiser, "prediction", "")
    if own not in ("epsilon", "v_prediction"):  # headers know no others
        return
    for lora in loras:
        if told := contradiction(lora.path, own):
            tell(
                f"warning: LoRA {lora.path} was made on a model of {told}: look at the teacher's pictures before you distil it"
            )


def _warn_of_its_name(denoiser: Denoiser, folder: Path) -> None:
    """Say that a teacher predicts v by its name and epsilon by its scheduler."""
    named = next((name for name in (folder.name, cached_id(folder)) if predicts_v_by_name(name)), "")
    if named and getattr(denoiser, "prediction", "") == "epsilon":
        tell(
            f"warning: {folder} predicts v by its name, its scheduler says epsilon (prediction_type): look at the teacher's pictures "
            "before you distil it"
        )


def _base_loras(folder: Path, card: ModelCard) -> list[LoraFile]:
    """What a LoRA generator's base was merged with; the files may lie beside it."""
    try:
        return [LoraFile.parse(lora, beside=folder) for lora in card.base_loras]
    except UserError as error:
        raise UserError(
            f"{folder} was distilled from its base with LoRAs merged into it, {', '.join(card.base_loras)}: put the files back, or "
            "into this folder"
        ) from error


def _described_network(description: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> Denoiser:
    """The untrained network of a card's description, compared with the weights before anything is allocated."""
    try:
        untrained = build_on_meta(description)
    except UserError:
        raise
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{folder}: the description of the network is wrong ({first_line(error)})") from error
    if "lora" not in description and (fault := state_difference(weights, untrained.own_weights())):
        raise UserError(f"{folder} holds another network than it describes: {fault}")
    return build_denoiser(description)


def _with_adapter(
    denoiser: Denoiser, description: dict[str, object], weights: dict[str, Tensor], folder: Path, source: str
) -> Denoiser:
    from fewstep.networks.adapters import LoraShape, SharedBase

    lora = description["lora"]
    assert isinstance(lora, dict)
    shape = LoraShape(int(lora["rank"]), float(lora["alpha"]), tuple(lora["targets"]))
    role = SharedBase(denoiser, shape).add_role("generator")
    try:
        role.load_adapter_state(weights)
    except UserError as error:
        raise UserError(f"{folder} is a LoRA for another base than {source}: {error}") from error
    denoiser.eval()
    return role


def _load_network(denoiser: Denoiser, weights: dict[str, Tensor], folder: Path) -> None:
    if fault := state_difference(weights, denoiser.own_weights()):
        raise UserError(f"{folder} holds another network than its base: {fault}")
    denoiser.load_own_weights(weights)
