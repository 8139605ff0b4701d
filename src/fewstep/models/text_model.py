"""Text-to-image models: prompts in, pictures out, with the text encoders and VAE of a diffusers folder."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fewstep.devices import pictures_at_once, prepare_denoiser
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import Seed, batch_of_images, check_seeds, sample_ddim, sample_generator, sample_noise
from fewstep.diffusion.schedules import StepSchedule
from fewstep.errors import UserError
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.diffusers_folder import resolve_model_folder
from fewstep.families.registry import build_denoiser, recognise
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.text_generator_folder import read_generator_folder, write_generator_folder
from fewstep.models.prompt_table import EmbeddingSource, LiveEmbeddings, PromptTable
from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.networks.autoencoder import Autoencoder, load_autoencoder
from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders
from fewstep.networks.tiny_autoencoder import check_tiny_autoencoder, load_tiny_autoencoder


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
        return next(self.base_network.parameters()).device

    @property
    def base_network(self) -> DiffusersDenoiser:
        """The network itself, under its LoRA where it has one."""
        return cast(
            DiffusersDenoiser,
            self.denoiser.shared.base if isinstance(self.denoiser, AdapterRole) else self.denoiser,
        )

    @cached_property
    def encoders(self) -> TextEncoders:
        """Text encoders; `release_encoders` frees them."""
        return recognise(self.folder).text_encoders(self.folder).to(self.device)

    @cached_property
    def empty(self) -> TextEmbeddings:
        """One row for the unconditional branch."""
        return self.encoders.encode_empty()

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The VAE, float32 whatever the precision of the network (SDXL's overflows in half precision)."""
        return load_autoencoder(self.folder).to(self.device)

    def use_tiny_autoencoder(self, source: str | Path) -> None:
        """Decode with a TAESD (a folder or hub id) instead of the VAE, which is then not even read.

        Raises:
            UserError: no TAESD, or one for other latents.
        """
        tiny = load_tiny_autoencoder(source)
        check_tiny_autoencoder(
            tiny, source, self.denoiser.image_shape[0], recognise(self.folder).pixels_per_latent(self.folder)
        )
        self.__dict__["autoencoder"] = tiny.to(self.device)

    def release_encoders(self) -> None:
        """Free the text encoders; they are read again when next needed."""
        self.__dict__.pop("encoders", None)

    def cut_warning(self, prompts: Iterable[str]) -> list[str]:
        """A line on prompts that the text encoders do not see the whole of; none where all fit."""
        encoders = self.encoders
        cut = [(prompt, part) for prompt in prompts if (part := encoders.cut_part(prompt))]
        if not cut:
            return []
        prompt, part = cut[0]
        others = f", and parts of {len(cut) - 1} other prompt{'s' * (len(cut) > 2)}" * (len(cut) > 1)
        return [
            f"warning: the text encoders read {encoders.max_tokens} tokens of a prompt; of {prompt[:40]!r}... "
            f"({encoders.count_tokens(prompt)} tokens) the pictures will not show {part!r}{others}"
        ]

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
        """Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], at most 8 at a time and large ones one by one."""
        vae = self.autoencoder
        group = min(8, pictures_at_once(x0.shape[2] * vae.factor, x0.shape[3] * vae.factor))
        with torch.no_grad():
            return torch.cat([vae.decode(part).clamp_(-1, 1) for part in x0.split(group)])

    def table(
        self, source: EmbeddingSource, empty: TextEmbeddings | None = None, size: tuple[int, int] | None = None
    ) -> PromptTable:
        """The conditions of a prompt list for this model, for pictures of its own size unless another is given."""
        return PromptTable(source, empty or self.empty, self.family, size or self.size)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError where the network cannot make pictures of this size (pixels)."""
        self.base_network.check_latent_size(height, width, self.autoencoder.factor)

    def _in_batches(
        self, sample_chunk: Callable[[Tensor, Condition, Seed, int], Tensor], prompts: list[str], seed: Seed,
        first: int, batch_size: int, size: tuple[int, int] | None, empty: TextEmbeddings | None = None,
    ) -> Tensor:  # fmt: skip
        """Call `sample_chunk(noise, condition, its seed or seeds, number of its first image)` batch by batch, decode."""
        check_seeds(seed, len(prompts))
        if size is not None:
            self.check_size(*size)
        height, width = size or self.size
        factor = self.autoencoder.factor
        shape = (self.denoiser.image_shape[0], height // factor, width // factor)
        table = self.table(LiveEmbeddings(self.encoders, prompts), empty, (height, width))
        parts = [torch.empty(0, 3, height, width)]
        for start in range(0, len(prompts), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(prompts)), device=self.device)
            seeds, number = batch_of_images(seed, first, start, len(rows))
            noise = sample_noise(self.denoiser, seeds, number, len(rows), self.device, shape=shape)
            parts.append(self.to_images(sample_chunk(noise, table.rows(rows), seeds, number)).cpu())
        return torch.cat(parts)


class TextTeacher(TextModel):
    """A diffusion model sampled in many guided steps."""

    def sample(
        self, prompts: list[str], *, seed: Seed = 0, num_steps: int = 50, guidance_scale: float = 7.5,
        negative_prompt: str | None = None, batch_size: int = 4, first: int = 0, size: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """One picture a prompt by the DDIM sampler, (N, 3, H, W), in [-1, 1], on the CPU.

        Picture i depends on (seed, first + i, its prompt) only, not on the batch it was made in. With a tuple of seeds,
        one a prompt, each is picture `first` of its own seed.

        Args:
            negative_prompt: what guidance leads away from, instead of the empty prompt.
            size: height and width in pixels; None is the model's own.

        Raises:
            UserError: a size the model cannot make.
        """

        def sample_chunk(noise: Tensor, condition: Condition, seed: Seed, first: int) -> Tensor:
            return sample_ddim(self.denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

        empty = None if negative_prompt is None else self.encoders.encode([negative_prompt])
        return self._in_batches(sample_chunk, prompts, seed, first, batch_size, size, empty)

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

    def sample(
        self, prompts: list[str], *, seed: Seed = 0, batch_size: int = 4, first: int = 0,
        size: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """One picture a prompt in its own few evaluations, (N, 3, H, W), in [-1, 1], on the CPU.

        Picture i depends on (seed, first + i, its prompt) only, and shares its starting noise with the teacher's. With
        a tuple of seeds, one a prompt, each is picture `first` of its own seed.

        Args:
            size: height and width in pixels; None is the one it was trained for, the only one it is good at.

        Raises:
            UserError: a size the model cannot make.
        """

        def sample_chunk(noise: Tensor, condition: Condition, seed: Seed, first: int) -> Tensor:
            shape = (noise.shape[1], noise.shape[2], noise.shape[3])
            schedule = self.step_schedule
            return sample_generator(self.denoiser, schedule, condition, seed=seed, first=first, shape=shape)

        return self._in_batches(sample_chunk, prompts, seed, first, batch_size, size)


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
    family = recognise(folder)
    denoiser = family.load(folder, resolution)
    card = family.read_card(folder)
    base = str(folder.resolve()) if Path(source).expanduser().exists() else str(source)
    return TextTeacher(prepare_denoiser(denoiser, device, precision), card, folder, base, family.name)


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
        denoiser = cast(DiffusersDenoiser, _base_network(folder, int(description["latent_size"])))
    network: Denoiser = denoiser
    if "lora" in description:
        lora = description["lora"]
        shape = LoraShape(int(lora["rank"]), float(lora["alpha"]), tuple(lora["targets"]))
        role = SharedBase(denoiser, shape).add_role("generator")
        try:
            role.load_adapter_state(weights)
        except UserError as error:
            raise UserError(f"{path} is a LoRA for another base than {source}: {error}") from error
        network = role
        prepare_denoiser(denoiser, device, precision)
    else:
        _load_network(denoiser, weights, path)
        prepare_denoiser(denoiser, device, precision)
    return TextGenerator(network.eval(), card, folder, source, recognise(folder).name)


def _base_network(folder: Path, latent_size: int) -> Denoiser:
    family = recognise(folder)
    return family.load(folder, latent_size * family.pixels_per_latent(folder))


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
