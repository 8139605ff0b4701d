"""The public face of a model: load a teacher or a generator, sample from it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fewstep.devices import prepare_denoiser
from fewstep.diffusion.condition import ClassTable, Condition, ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import (
    Seed,
    batch_of_images,
    check_seeds,
    heun_evaluations,
    sample_generator,
    sample_heun,
    sample_noise,
)
from fewstep.diffusion.schedules import StepSchedule
from fewstep.errors import UserError
from fewstep.families.registry import build_denoiser
from fewstep.formats.atomic import standing
from fewstep.formats.bundled import BUNDLED, resolve_path
from fewstep.formats.edm_pickle import read_edm_pickle
from fewstep.formats.model_folder import ModelCard, read_model_folder, write_model_folder
from fewstep.formats.text_generator_folder import is_generator_folder

if TYPE_CHECKING:
    from fewstep.models.text_model import TextGenerator, TextTeacher

AnyTeacher: TypeAlias = "Teacher | TextTeacher"
AnyGenerator: TypeAlias = "Generator | TextGenerator"
AnyModel: TypeAlias = "Teacher | TextTeacher | Generator | TextGenerator"


@dataclass
class Model:
    """A loaded network with its card.

    Attributes:
        denoiser: in eval mode, on the device it was loaded to.
        card: role, step schedule, class names.
    """

    denoiser: Denoiser
    card: ModelCard

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.parameters()).device

    @property
    def conditions(self) -> ConditionTable:
        """Everything the model can be conditioned on, by number."""
        return ClassTable(self.denoiser.num_classes)

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the pictures."""
        return self.denoiser.image_shape

    def to_images(self, x0: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] from the model's own x0."""
        return x0.clamp(-1, 1)

    def _in_batches(
        self, sample_chunk: Callable[[Tensor, Condition, Seed, int], Tensor], num_images: int,
        labels: list[int] | None, seed: Seed, first: int, batch_size: int,
    ) -> Tensor:  # fmt: skip
        """Call `sample_chunk(noise, condition, its seed or seeds, number of its first image)` batch by batch."""
        check_seeds(seed, num_images)
        all_labels = self._labels(num_images, labels, first)
        parts = [torch.empty(0, *self.denoiser.image_shape)]
        for start in range(0, num_images, batch_size):
            chunk = all_labels[start : start + batch_size]
            condition = Condition.from_labels(chunk.to(self.device), self.denoiser.num_classes)
            seeds, number = batch_of_images(seed, first, start, len(chunk))
            noise = sample_noise(self.denoiser, seeds, number, len(chunk), self.device)
            parts.append(sample_chunk(noise, condition, seeds, number).cpu())
        return torch.cat(parts)

    def _labels(self, num_images: int, labels: list[int] | None, first: int) -> Tensor:
        """Given labels, or all classes in turn."""
        classes = max(1, self.denoiser.num_classes)
        if labels is None:
            return torch.arange(first, first + num_images) % classes
        if len(labels) != num_images:
            raise UserError(f"{len(labels)} labels for {num_images} images: give one label an image")
        if labels and not all(0 <= label < classes for label in labels):
            raise UserError(f"labels {sorted(set(labels))} do not fit the model's {self.denoiser.num_classes} classes")
        return torch.tensor(labels)


class Teacher(Model):
    """A diffusion model sampled in many steps."""

    def sample(
        self, num_images: int, *, labels: list[int] | None = None, seed: Seed = 0, num_steps: int = 18,
        guidance_scale: float = 1.0, batch_size: int = 64, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Images first..first + N - 1 of a seed by the deterministic Heun sampler, (N, C, H, W), in [-1, 1], on the CPU.

        Image i depends on (seed, i, its label) only, not on the batch it was made in. Without `labels` all
        classes take turns. 18 steps are 35 network evaluations. With a tuple of seeds, one an image, each is
        image `first` of its own seed.

        Raises:
            UserError: labels or guidance the model does not have.
        """
        check_guidance(self, guidance_scale)

        def sample_chunk(noise: Tensor, condition: Condition, seed: Seed, first: int) -> Tensor:
            return self.to_images(
                sample_heun(self.denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)
            )

        return self._in_batches(sample_chunk, num_images, labels, seed, first, batch_size)

    def evaluations(self, num_steps: int = 18) -> int:
        """Network evaluations an image."""
        return heun_evaluations(num_steps)

    def student(self, network: Denoiser, card: ModelCard) -> "Generator":
        """A generator trained from this teacher."""
        return Generator(network, card)

    def write_generator(self, folder: Path, network: Denoiser, card: ModelCard) -> None:
        """Write a generator trained from this teacher as a model folder."""
        write_model_folder(folder, network.describe(), network.state_dict(), card)


class Generator(Model):
    """A distilled model sampled in the few steps that travel with its weights."""

    @property
    def step_schedule(self) -> StepSchedule:
        """The grid indices the generator runs at."""
        return StepSchedule(self.card.step_indices, self.card.num_levels)

    def evaluations(self) -> int:
        """Network evaluations an image."""
        return len(self.card.step_indices)

    def sample(
        self, num_images: int, *, labels: list[int] | None = None, seed: Seed = 0, batch_size: int = 64,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Images first..first + N - 1 of a seed in its own few evaluations, (N, C, H, W), in [-1, 1], on the CPU.

        Image i depends on (seed, i, its label) only, not on the batch it was made in, and shares its starting
        noise with the teacher's image i of the same seed. Without `labels` all classes take turns. With a tuple of
        seeds, one an image, each is image `first` of its own seed.

        Raises:
            UserError: labels the model does not have.
        """

        def sample_chunk(noise: Tensor, condition: Condition, seed: Seed, first: int) -> Tensor:
            return self.to_images(
                sample_generator(self.denoiser, self.step_schedule, condition, seed=seed, first=first)
            )

        return self._in_batches(sample_chunk, num_images, labels, seed, first, batch_size)


def default_guidance(model: "AnyModel") -> float:
    """7.5 for text-to-image models, 1 (off) for classes and for models that cannot be guided."""
    return 1.0 if isinstance(model, Teacher) or not model.card.can_be_guided else 7.5


def check_guidance(model: "AnyModel", guidance_scale: float) -> None:
    """Refuse guidance for a model without an unconditional branch, as far as the model says so."""
    if guidance_scale == 1:
        return
    if not isinstance(model, Teacher):
        if not model.card.can_be_guided:
            raise UserError(
                f"guidance_scale={guidance_scale}: the scheduler of this model is one for few steps, its guidance is built in; "
                "use 1, or give the model it was distilled from"
            )
        return
    if not model.denoiser.num_classes:
        raise UserError(f"guidance_scale={guidance_scale}: this teacher has no condition to guide; use 1")
    if not model.card.can_be_guided:
        raise UserError(
            f"guidance_scale={guidance_scale}: this teacher was trained without label dropout and has no "
            "unconditional branch; use 1, or train one with network.label_dropout=0.1"
        )


def load_teacher(path: str | Path, *, device: str = "auto", precision: str = "fp32", resolution: int = 0) -> AnyTeacher:
    """Load a diffusion model.

    Args:
        path: a model folder, a run folder of `fewstep pretrain`, an EDM .pkl (read without executing anything in
            it), "bundled:fashion-mnist"; or a text-to-image model: a diffusers folder, hub id or "bundled:emoji-sd".
        device: "auto", "cpu", "cuda", "cuda:N".
        precision: "fp32", "bf16" or "fp16" inside the network.
        resolution: side of a text-to-image model's pictures in pixels; 0 takes its own.

    Raises:
        UserError: no such model, or a damaged one.
    """
    if _names_text_model(path):
        from fewstep.models.text_model import load_text_teacher

        return load_text_teacher(path, device=device, precision=precision, resolution=resolution)
    return load_class_teacher(path, device=device, precision=precision)


def load_class_teacher(path: str | Path, *, device: str = "auto", precision: str = "fp32") -> Teacher:
    """As `load_teacher`, for models conditioned on class labels or on nothing."""
    if _names_text_model(path):
        raise UserError(f"{path} is a text-to-image model; this command works on class-conditional models")
    denoiser, card = _load(path, "teacher")
    return Teacher(prepare_denoiser(denoiser, device, precision), card)


def load_generator(path: str | Path, *, device: str = "auto", precision: str = "fp32", base: str = "") -> AnyGenerator:
    """Load a distilled generator: an exported folder or a run folder of `fewstep train`.

    Args:
        base: for text-to-image generators, where the teacher lies that text encoders and VAE are read from;
            empty: where it was during training.

    Raises:
        UserError: no such model, a damaged one, or one that is a teacher (it has no step schedule).
    """
    folder = _generator_folder(path)
    if is_generator_folder(folder):
        need_text_libraries()
        from fewstep.models.text_model import load_text_generator

        return load_text_generator(folder, device=device, precision=precision, base=base)
    return load_class_generator(path, device=device, precision=precision)


def load_class_generator(path: str | Path, *, device: str = "auto", precision: str = "fp32") -> Generator:
    """As `load_generator`, for models conditioned on class labels or on nothing."""
    denoiser, card = _load(path, "generator")
    if not card.step_indices:
        raise UserError(f"{path} is a {card.role} without a step schedule; load it with fewstep.load_teacher")
    return Generator(prepare_denoiser(denoiser, device, precision), card)


def load_model(path: str | Path, *, device: str = "auto", precision: str = "fp32") -> AnyModel:
    """Load whichever the path holds; of a run folder with both, the generator.

    Raises:
        UserError: no such model, or a damaged one.
    """
    folder = Path(path).expanduser()
    if is_generator_folder(_generator_folder(path)):
        return load_generator(path, device=device, precision=precision)
    if _names_text_model(path):
        return load_teacher(path, device=device, precision=precision)
    is_teacher = str(path).startswith(BUNDLED) or folder.is_file() or (folder / "teacher").is_dir()
    if is_teacher and not (folder / "generator").is_dir():
        return load_class_teacher(path, device=device, precision=precision)
    denoiser, card = _load(path, "generator")
    kind = Generator if card.step_indices else Teacher
    return kind(prepare_denoiser(denoiser, device, precision), card)


def _generator_folder(path: str | Path) -> Path:
    folder = standing(Path(path).expanduser())
    inner = standing(folder / "generator")
    return inner if inner.is_dir() else folder


def _names_text_model(path: str | Path) -> bool:
    """Whether a path is a diffusers text-to-image folder (bundled ones too), or a hub id that is no local path."""
    folder, name = resolve_path(path), str(path)
    if folder.exists():
        if not _has_text_encoder(folder / "model_index.json"):
            return False
    elif name.startswith((".", "/", "~", "runs/")) or name.count("/") != 1 or name.endswith(".pkl"):
        return False
    need_text_libraries()
    return True


def _has_text_encoder(index: Path) -> bool:
    if not index.is_file():
        return False
    try:
        return any(name.startswith("text_encoder") for name in json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{index} is damaged ({error}); download or export the model again") from error


def need_text_libraries() -> None:
    """Raise UserError where what text-to-image models need is not installed."""
    missing = [name for name in ("diffusers", "transformers", "peft") if find_spec(name) is None]
    if missing:
        raise UserError(f"text-to-image models need {', '.join(missing)}: pip install 'fewstep[text]'")


def _load(path: str | Path, role: str) -> tuple[Denoiser, ModelCard]:
    folder = resolve_path(path)
    if not folder.exists():
        raise UserError(f"{role} {path} does not exist; give a model folder, a run folder or an EDM .pkl")
    if folder.is_file():
        return _load_pickle(folder)
    if standing(folder / role).is_dir():
        folder = standing(folder / role)
    description, weights, card = read_model_folder(folder)
    return _with_weights(description, weights, str(folder)), card


def _load_pickle(path: Path) -> tuple[Denoiser, ModelCard]:
    if path.suffix != ".pkl":
        raise UserError(f"{path} is neither a model folder nor an EDM .pkl")
    pickle = read_edm_pickle(path)
    if pickle.class_name != "EDMPrecond":
        raise UserError(f"{path} holds a {pickle.class_name}; only EDM's own preconditioning (EDMPrecond) is supported")
    description = describe_edm_arguments(pickle.init_kwargs)
    return _with_weights(description, pickle.state_dict, str(path)), ModelCard(role="teacher")


def describe_edm_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Our description of an EDM preconditioning module from its constructor arguments.

    Raises:
        UserError: a network family this library does not have.
    """
    families = {"DhariwalUNet": "adm", "SongUNet": "song"}
    model_type = arguments.get("model_type", "DhariwalUNet")
    if model_type not in families or arguments.get("encoder_type") == "skip":
        raise UserError(f"EDM network {model_type!r} with encoder {arguments.get('encoder_type')!r} is not supported")
    names = {
        "img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "channel_mult_emb",
        "num_blocks", "attn_resolutions", "dropout", "augment_dim", "embedding_type", "encoder_type",
        "channel_mult_noise", "resample_filter",
    }  # fmt: skip
    network = {name: value for name, value in arguments.items() if name in names}
    defaults: dict[str, Any] = {"channel_mult": (1, 2, 3, 4), "model_channels": 192, "num_blocks": 3}
    if families[model_type] == "adm":
        network = {**defaults, "attn_resolutions": (32, 16, 8), "dropout": 0.1, **network}
    return {
        "family": "edm", "sigma_data": arguments.get("sigma_data", 0.5),
        "network": {"family": families[model_type], **network},
    }  # fmt: skip


def _with_weights(description: dict[str, Any], weights: dict[str, Tensor], where: str) -> Denoiser:
    try:
        denoiser = build_denoiser(description)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: the description of the network is wrong: {error}") from error
    weights = {name: value.float() for name, value in weights.items()}
    own = denoiser.state_dict()
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"{where} holds another network than it describes: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"of another shape {shapes[:3]}"
        )
    denoiser.load_state_dict(weights)
    return denoiser
