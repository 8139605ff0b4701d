"""Text-to-image models: prompts in, pictures out, with the text encoders and VAE of a diffusers folder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from fewstep.backbones.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.backbones.autoencoder import Autoencoder, load_autoencoder
from fewstep.backbones.catalog import build_denoiser
from fewstep.backbones.diffusers_denoiser import DiffusersDenoiser
from fewstep.backbones.diffusers_models import load_diffusers_denoiser, model_family, resolve_model_folder
from fewstep.backbones.text_encoders import TextEmbeddings, TextEncoders, text_condition
from fewstep.devices import prepare_denoiser
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import sample_ddim, sample_generator, sample_noise
from fewstep.diffusion.step_schedule import StepSchedule
from fewstep.errors import UserError
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.text_generator_folder import read_generator_folder, write_generator_folder


class EmbeddingSource(Protocol):
    """Embeddings of a list of prompts, by row."""

    def __len__(self) -> int:
        """Number of prompts."""

    def rows(self, index: Tensor) -> TextEmbeddings:
        """Embeddings of the prompts at these rows (B,)."""

    def texts(self, index: Tensor) -> list[str]:
        """The prompts at these rows (B,)."""


@dataclass(frozen=True)
class LiveEmbeddings:
    """Encodes prompts whenever they are asked for; the encoders stay in memory."""

    encoders: TextEncoders
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> TextEmbeddings:
        return self.encoders.encode(self.texts(index))

    def texts(self, index: Tensor) -> list[str]:
        return [self.prompts[number] for number in index.tolist()]


@dataclass(frozen=True)
class PromptTable:
    """The conditions of a prompt list: condition i is prompt i.

    Attributes:
        source: embeddings by row.
        empty: one row for the unconditional branch.
        family: "sd", "sdxl" or "sd3".
        size: height and width of the pictures in pixels.
    """

    source: EmbeddingSource
    empty: TextEmbeddings
    family: str
    size: tuple[int, int]

    @property
    def num_rows(self) -> int:
        """Number of prompts."""
        return len(self.source)

    def rows(self, index: Tensor) -> Condition:
        embeddings = self.source.rows(index.cpu()).to(index.device)
        return text_condition(embeddings, self.empty.to(index.device), self.family, *self.size)

    def texts(self, index: Tensor) -> list[str]:
        """The prompts at these numbers."""
        return self.source.texts(index.cpu())


@dataclass
class TextModel:
    """A text-to-image network with what turns prompts into its conditions and its latents into pictures.

    Attributes:
        denoiser: in eval mode, on the device it was loaded to.
        card: role, step schedule, licence.
        folder: the diffusers folder that text encoders and VAE are read from, when first needed.
        base: what the user called that folder (a path or hub id).
        family: "sd", "sdxl" or "sd3".
    """

    denoiser: Denoiser
    card: ModelCard
    folder: Path
    base: str
    family: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        network = self.denoiser.shared.base if isinstance(self.denoiser, AdapterRole) else self.denoiser
        return next(network.parameters()).device

    @cached_property
    def encoders(self) -> TextEncoders:
        """Text encoders; `release_encoders` frees them."""
        return TextEncoders(self.folder, self.family).to(self.device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The VAE."""
        return load_autoencoder(self.folder).to(self.device)

    def release_encoders(self) -> None:
        """Free the text encoders; they are read again when next needed."""
        self.__dict__.pop("encoders", None)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        _, height, width = self.denoiser.image_shape
        return height * self.autoencoder.factor, width * self.autoencoder.factor

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures."""
        return (3, *self.size)

    def to_images(self, x0: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], a few at a time."""
        with torch.no_grad():
            return torch.cat([self.autoencoder.decode(part) for part in x0.split(8)]).clamp(-1, 1)

    def table(self, source: EmbeddingSource, empty: TextEmbeddings | None = None) -> PromptTable:
        """The conditions of a prompt list for this model."""
        return PromptTable(source, empty or self.encoders.encode_empty(), self.family, self.size)

    def _in_batches(
        self, sample_chunk: Callable[[Tensor, Condition, int], Tensor], prompts: list[str], seed: int, first: int,
        batch_size: int,
    ) -> Tensor:  # fmt: skip
        """Call `sample_chunk(noise, condition, number of its first image)` batch by batch and decode."""
        table = self.table(LiveEmbeddings(self.encoders, prompts))
        parts = [torch.empty(0, 3, *self.size)]
        for start in range(0, len(prompts), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(prompts)), device=self.device)
            noise = sample_noise(self.denoiser, seed, first + start, len(rows), self.device)
            parts.append(self.to_images(sample_chunk(noise, table.rows(rows), first + start)).cpu())
        return torch.cat(parts)


class TextTeacher(TextModel):
    """A diffusion model sampled in many guided steps."""

    def sample(
        self, prompts: list[str], *, seed: int = 0, num_steps: int = 50, guidance_scale: float = 7.5,
        batch_size: int = 4, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """One picture a prompt by the DDIM sampler, (N, 3, H, W), in [-1, 1], on the CPU.

        Picture i depends on (seed, first + i, its prompt) only, not on the batch it was made in.
        """

        def sample_chunk(noise: Tensor, condition: Condition, start: int) -> Tensor:
            return sample_ddim(self.denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

        return self._in_batches(sample_chunk, prompts, seed, first, batch_size)

    def evaluations(self, num_steps: int = 50) -> int:
        """Network evaluations a picture; guidance makes each one twice as large."""
        return num_steps

    def student(self, network: Denoiser, card: ModelCard) -> "TextGenerator":
        """A generator with this model's encoders and VAE, sharing them."""
        generator = TextGenerator(network, card, self.folder, self.base, self.family)
        generator.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("encoders", "autoencoder")})
        return generator

    def write_generator(self, folder: Path, network: Denoiser, card: ModelCard) -> None:
        """Write a generator trained from this teacher: its own weights, and where the rest is read from."""
        write_generator_folder(
            folder, network.describe(), _own_weights(network), replace(card, base=self.base, role="generator")
        )


class TextGenerator(TextModel):
    """A distilled model sampled in the few steps that travel with its weights; its guidance is built in."""

    @property
    def step_schedule(self) -> StepSchedule:
        """The grid indices the generator runs at."""
        return StepSchedule(self.card.step_indices, self.card.num_levels)

    def evaluations(self) -> int:
        """Network evaluations a picture."""
        return len(self.card.step_indices)

    def sample(self, prompts: list[str], *, seed: int = 0, batch_size: int = 4, first: int = 0) -> Tensor:
        """One picture a prompt in one to four evaluations, (N, 3, H, W), in [-1, 1], on the CPU.

        Picture i depends on (seed, first + i, its prompt) only, and shares its starting noise with the teacher's.
        """

        def sample_chunk(noise: Tensor, condition: Condition, start: int) -> Tensor:
            return sample_generator(self.denoiser, self.step_schedule, condition, seed=seed, first=start)

        return self._in_batches(sample_chunk, prompts, seed, first, batch_size)


def load_text_teacher(
    source: str | Path, *, device: str = "auto", precision: str = "fp32", resolution: int = 0
) -> TextTeacher:
    """A text-to-image diffusion model from a diffusers folder or hub id.

    Args:
        resolution: side of the pictures in pixels; 0 takes the model's own.

    Raises:
        UserError: no such model, a missing component, an unsupported family.
    """
    folder = resolve_model_folder(source)
    denoiser = load_diffusers_denoiser(folder, resolution)
    card = ModelCard(role="teacher", num_levels=denoiser.noise_schedule.num_levels, can_be_guided=True)
    base = str(folder.resolve()) if Path(source).expanduser().exists() else str(source)
    return TextTeacher(prepare_denoiser(denoiser, device, precision), card, folder, base, model_family(folder))


def load_text_generator(path: Path, *, device: str = "auto", precision: str = "fp32", base: str = "") -> TextGenerator:
    """A generator written by `fewstep train` from a text-to-image teacher.

    Args:
        base: the teacher's folder or hub id, where it is not where it was during training.

    Raises:
        UserError: a damaged folder, or a base that is not there.
    """
    description, weights, card = read_generator_folder(path)
    whole = not base and (path / "model_index.json").is_file()  # an exported pipeline brings its own encoders and VAE
    source = str(path) if whole else base or card.base
    try:
        folder = resolve_model_folder(source)
    except UserError as error:
        raise UserError(f"{path} reads its text encoders and VAE from {source}: {error}") from error
    if whole:  # its scheduler knows the generator's steps only; the description has the teacher's
        denoiser = cast(DiffusersDenoiser, build_denoiser(description))
    else:
        denoiser = load_diffusers_denoiser(folder, int(description["latent_size"]) * load_autoencoder(folder).factor)
    network: Denoiser = denoiser
    if "lora" in description:
        lora = description["lora"]
        shape = LoraShape(int(lora["rank"]), float(lora["alpha"]), tuple(lora["targets"]))
        role = SharedBase(denoiser, shape).add_role("generator")
        role.load_adapter_state(weights)
        network = role
        prepare_denoiser(denoiser, device, precision)
    else:
        _load_network(denoiser, weights, path)
        prepare_denoiser(denoiser, device, precision)
    return TextGenerator(network.eval(), card, folder, source, model_family(folder))


def _load_network(denoiser: DiffusersDenoiser, weights: dict[str, Tensor], path: Path) -> None:
    own = denoiser.network.state_dict()
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong += [name for name in weights if name not in own]
    if wrong:
        raise UserError(f"{path} holds another network than its base: {len(wrong)} tensors differ, e.g. {wrong[:2]}")
    denoiser.network.load_state_dict(weights)


def _own_weights(network: Denoiser) -> dict[str, Tensor]:
    if isinstance(network, AdapterRole):
        return network.adapter_state()
    assert isinstance(network, DiffusersDenoiser)
    return dict(network.network.state_dict())
