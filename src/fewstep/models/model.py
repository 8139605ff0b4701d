"""The public face of a model: one class for classes and text, teachers and generators."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from fewstep.devices import choose_device, device_of, dtype_name, pictures_at_once, set_precision
from fewstep.diffusion.condition import ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import Seed, batch_of_images, check_seeds, sample_generator, sample_noise
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.sharding import whole, written_by_the_first
from fewstep.errors import UserError
from fewstep.families.family import Family
from fewstep.families.registry import family_of
from fewstep.formats.fingerprints import network_fingerprint, tensors_digest
from fewstep.formats.lora_list import loras_fingerprint
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.formats.pixels import to_pictures
from fewstep.formats.text_generator_folder import write_generator_folder
from fewstep.models.conditioner import (
    Conditioner,
    LabelConditioner,
    PromptConditioner,
    is_count,
    refuse_no_counts,
    whole_number,
)
from fewstep.models.decoder import Decoder, LatentDecoder, PixelDecoder, read_autoencoder
from fewstep.models.progress import counted_evaluations

if TYPE_CHECKING:
    from PIL.Image import Image


Wishes: TypeAlias = "str | int | Sequence[str] | Sequence[int] | None"


@dataclass(eq=False, repr=False)
class Model:
    """A teacher or a generator, ready to make pictures; `fewstep.load_model` and its siblings give one.

    Attributes:
        denoiser: the network, in eval mode.
        card: role, step schedule, class names, licence.
        family: what is special about this kind of model.
        conditioner: turns labels or prompts into conditions.
        decoder: turns x0 into pictures.
        folder: where its other components are read from; None where the network is everything.
        base: what the user called that folder (a path or hub id); empty where the network is everything.
    """

    denoiser: Denoiser
    card: ModelCard
    family: Family
    conditioner: Conditioner
    decoder: Decoder
    folder: Path | None = None
    base: str = ""

    @overload
    def sample(
        self, what: Wishes = None, *, labels: Sequence[int] | None = None, num_images: int | None = None,
        seed: int | Sequence[int] = 0, first: int = 0, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, negative_prompt: str | None = None, size: tuple[int, int] | None = None,
        batch_size: int | None = None, output: Literal["pil"] = "pil", progress: bool = True,
    ) -> "list[Image]": ...  # fmt: skip

    @overload
    def sample(
        self, what: Wishes = None, *, labels: Sequence[int] | None = None, num_images: int | None = None,
        seed: int | Sequence[int] = 0, first: int = 0, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, negative_prompt: str | None = None, size: tuple[int, int] | None = None,
        batch_size: int | None = None, output: Literal["tensor"], progress: bool = True,
    ) -> Tensor: ...  # fmt: skip

    def sample(
        self, what: Wishes = None, *, labels: Sequence[int] | None = None, num_images: int | None = None,
        seed: int | Sequence[int] = 0, first: int = 0, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, negative_prompt: str | None = None, size: tuple[int, int] | None = None,
        batch_size: int | None = None, output: Literal["pil", "tensor"] = "pil", progress: bool = True,
    ) -> "list[Image] | Tensor":  # fmt: skip
        """Make pictures.

            model.sample("red apple")              # one picture
            model.sample(["red apple", "a dog"])   # one for each prompt
            model.sample(16)                       # 16 pictures, all classes in turn
            model.sample(labels=[3, 3, 7])         # one for each label

        Picture i depends on (seed, first + i, its label or prompt) and on nothing else: not on the batch it was made
        in, and it shares its starting noise with the same picture of a generator's teacher.

        Args:
            what: a prompt or a list of them, a list of labels, or a number of pictures; nothing is one picture.
            labels: class numbers; without any, all classes take turns.
            num_images: how many; prompts or classes take turns.
            seed: a whole number, or one for each picture, which is then picture `first` of its own seed.
            first: number of the first picture of the seed.
            num_inference_steps: of a teacher's sampler; None is its family's usual number. A generator has its own.
            guidance_scale: of a teacher, 1 is off; None is its family's usual one. A generator has it built in.
            negative_prompt: what guidance leads away from, instead of the empty prompt.
            size: height and width in pixels; None is the model's own, the only one a generator is good at.
            batch_size: pictures made at once; None is the family's usual number.
            output: "pil" gives a list of PIL images, "tensor" (N, C, H, W) in [-1, 1], float32, on the CPU.
            progress: show a bar, where there is a terminal or notebook to show it in.

        Raises:
            UserError: something the model does not have or cannot do, named in one sentence.
        """
        if output not in ("pil", "tensor"):
            raise UserError(f"output={output!r}: choose 'pil' or 'tensor'")
        num_steps, scale = self._steps_and_guidance(num_inference_steps, guidance_scale)
        empty = self._negative(negative_prompt, scale)
        refuse_no_counts(num_images=num_images, first=first)
        wishes = self.conditioner.wishes(what, labels, num_images, first)
        seed = whole_number(seed)
        seeds: Seed = tuple(map(whole_number, seed)) if isinstance(seed, Iterable) else seed
        check_seeds(seeds, len(wishes))
        if size is not None:
            self.check_size(*size)
        size = size or self.size
        batch_size = self.family.default_batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: make at least one picture at once")
        parts = [torch.empty(0, *self._picture_shape(size))]
        total = self.evaluations(num_inference_steps) * -(-len(wishes) // batch_size)
        with counted_evaluations(self.denoiser, total, shown=progress):
            table = self.conditioner.table(wishes, size, empty)
            for start in range(0, len(wishes), batch_size):
                rows = torch.arange(start, min(start + batch_size, len(wishes)), device=self.device)
                place = batch_of_images(seeds, first, start, len(rows))
                x0 = self._x0(table, rows, place, self._latent_shape(size), num_steps, scale)
                parts.append(self.decoder.images(x0).cpu())
        images = torch.cat(parts)
        return images if output == "tensor" else to_pictures(images)

    def _x0(
        self, table: ConditionTable, rows: Tensor, place: tuple[Seed, int], shape: tuple[int, ...], num_steps: int,
        guidance_scale: float,
    ) -> Tensor:  # fmt: skip
        """x0 (B, ...) of some rows; `place` is their seed or seeds and the number of the first."""
        (seed, first), condition = place, table.rows(rows)
        if self.is_generator:
            return sample_generator(self.denoiser, self.step_schedule, condition, seed=seed, first=first, shape=shape)
        noise = sample_noise(self.denoiser, seed, first, len(rows), self.device, shape=shape)
        return self.family.sample(
            self.denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale
        )  # fmt: skip

    def _steps_and_guidance(self, num_steps: int | None, scale: float | None) -> tuple[int, float]:
        """The steps and guidance a call asks for, refused where the model cannot have them."""
        if not self.is_generator:
            scale = self.default_guidance if scale is None else scale
            self.check_guidance(scale)
            if num_steps is not None and not (is_count(num_steps) and num_steps <= self.max_num_steps):
                raise UserError(f"num_inference_steps={num_steps}: give a whole number from 1 to {self.max_num_steps}")
            self.evaluations(num_steps)
            return self.family.default_num_steps if num_steps is None else num_steps, scale
        own = len(self.card.step_indices)
        if num_steps not in (None, own):
            steps = f"{own} step{'s' * (own != 1)}"
            raise UserError(
                f"num_inference_steps={num_steps}: this generator makes a picture in {steps}, which travel with its "
                "weights; leave it out"
            )
        if scale not in (None, 1):
            raise UserError(f"guidance_scale={scale}: a generator has its guidance built in; leave it out")
        return own, 1.0

    def _negative(self, prompt: str | None, scale: float) -> Any:
        """The unconditional row of a negative prompt, None without one."""
        if prompt is None:
            return None
        if self.is_generator:
            raise UserError(
                "negative_prompt: a generator runs without guidance (its teacher's was distilled in), so there is no "
                "negative branch that could use it; leave it out"
            )
        if scale == 1 and self.conditioner.takes == "prompts":
            raise UserError("negative_prompt acts through guidance, which guidance_scale=1 switches off")
        return self.conditioner.negative(prompt)

    @property
    def is_generator(self) -> bool:
        """Whether it is distilled: a generator brings the few steps it runs in, a teacher does not."""
        return bool(self.card.step_indices)

    @property
    def step_schedule(self) -> StepSchedule:
        """The grid indices a generator runs at.

        Raises:
            UserError: it is a teacher.
        """
        if not self.is_generator:
            raise UserError("a teacher has no step schedule; distil it with fewstep.train, or load a generator")
        return StepSchedule(self.card.step_indices, self.card.num_levels, self.card.step_sigmas)

    def evaluations(self, num_inference_steps: int | None = None) -> int:
        """Network evaluations a picture takes; guidance makes each one of a teacher's twice as large."""
        if self.is_generator:
            return len(self.card.step_indices)
        num_steps = self.family.default_num_steps if num_inference_steps is None else num_inference_steps
        if num_steps < 1:
            raise UserError(f"num_inference_steps={num_steps}: a sampler needs at least 1 step")
        return self.family.evaluations(num_steps)

    @property
    def default_guidance(self) -> float:
        """The guidance scale unless told otherwise: the family's, or 1 (off) where the model cannot be guided."""
        can = self.card.can_be_guided and not self.is_generator
        return self.family.default_guidance_scale if can else 1.0

    @property
    def max_num_steps(self) -> int:
        """Most steps of a teacher's sampler: each needs a noise level of its own."""
        return self.denoiser.noise_schedule.num_levels

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise UserError for no finite number, and where the model has no unconditional branch, as far as its card says so."""
        try:
            finite = math.isfinite(guidance_scale)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise UserError(f"guidance_scale={guidance_scale!r}: give a finite number; 1 is off")
        if guidance_scale != 1:
            self.family.refuse_guidance(self.denoiser, self.card, guidance_scale)

    def limit_guidance(self, norm_cap: float) -> None:
        """Limit the norm of guided predictions (`Denoiser.guidance_norm_cap`); raises UserError where the network cannot."""
        network = self.denoiser.base_network
        if norm_cap and not network.has_guidance_norm:
            raise UserError(
                f"teacher.guidance_scale=[..., {norm_cap:g}]: the norm of guided predictions is limited for text-to-image models; "
                f"of {self.family.title} give the scale alone"
            )
        network.guidance_norm_cap = norm_cap

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.denoiser.base_network)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None) -> "Model":
        """Move the model, and set the precision inside its network; weights and pictures stay float32.

        Args:
            device: "auto", "cpu", "cuda", "cuda:N", "mps".
            dtype: torch.float32, torch.bfloat16 or torch.float16, or "auto" (what is fast there), "fp32", "bf16", "fp16".

        Returns:
            The model itself.

        Raises:
            UserError: no such device or precision.
        """
        network = self.denoiser.base_network
        place = self.device if device is None else choose_device(str(device))
        if dtype is not None:
            set_precision(network, dtype, place)
        if device is not None:
            network.to(place)
            self.denoiser.to(place)
            self.conditioner.to(place)
            self.decoder.to(place)
        return self

    @property
    def fingerprint(self) -> str:
        """Of the network in its folder and the LoRAs merged into it; of the weights where the network is everything.

        Raises:
            UserError: a file is not there any more.
        """
        merged = self.card.base_loras
        if self.folder is None:
            return tensors_digest(self.denoiser.state_dict(), whole)
        return network_fingerprint(self.folder, loras_fingerprint(merged) if merged else "")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        height, width = self.picture_shape[-2:]
        return height, width

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the pictures."""
        return self.decoder.picture_shape(self.denoiser.image_shape)

    @property
    def components(self) -> Path:
        """The folder that text encoders and VAE are read from; raises UserError where the network is everything."""
        if self.folder is None:
            raise UserError("this model has no text encoders and no VAE: its network makes pixels")
        return self.folder

    def read_components(self) -> None:
        """Read text encoders and VAE now, where there are any, so that nothing is missing later.

        Raises:
            UserError: one is missing or damaged.
        """
        self.conditioner.read()
        self.decoder.read()

    def tiny_decoder(self, source: str | Path) -> Decoder:
        """A decoder that uses a TAESD (a folder or hub id) instead of the VAE; assign it to `decoder` to use it.

        Raises:
            UserError: no TAESD, one for other latents, or a model without latents.
        """
        return self.decoder.with_tiny(source, self.denoiser.image_shape[0])

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError where the network cannot make pictures of this size (pixels)."""
        self.denoiser.base_network.check_size(height, width, self.decoder.factor)

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of x0 for pictures of a size."""
        channels, factor = self.denoiser.image_shape[0], self.decoder.factor
        return (channels, size[0] // factor, size[1] // factor)

    def _picture_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return (self.picture_shape[0], *size)

    @property
    def pictures_at_once(self) -> int:
        """How many pictures of its size are made, or decoded, together without much memory."""
        return pictures_at_once(*self.size)

    def student(self, network: Denoiser, card: ModelCard) -> "Model":
        """A generator trained from this teacher; it shares conditioner and decoder."""
        return replace(self, denoiser=network, card=replace(card, role="generator", base=self.base))

    def write(self, folder: Path) -> None:
        """Write the model's own weights with its card; of one with a base, the rest is read from there again."""
        description = self.denoiser.describe()
        weights = self.denoiser.own_weights()

        def write(whole: Callable[[Tensor], Tensor]) -> None:
            if not self.base:
                write_model_folder(folder, description, weights, self.card, whole=whole)
                return
            write_generator_folder(folder, description, weights, self.card, self.family.network_part, whole=whole)

        written_by_the_first(write, weights.values())

    def __repr__(self) -> str:
        channels, height, width = self.picture_shape
        count = sum(parameter.numel() for parameter in self.denoiser.base_network.parameters()) / 1e6
        steps, sampler = self.evaluations(), f"{self.family.default_num_steps} {self.family.sampler_name} steps"
        if self.is_generator:
            indices = ", ".join(map(str, self.card.step_indices))
            sampler = f"{steps} step{'s' * (steps != 1)} ({indices} of {self.card.num_levels})"
        takes = {"prompts": "prompts", "labels": f"{self.denoiser.num_classes} classes"}[self.conditioner.takes]
        precision = dtype_name(self.denoiser.compute_dtype)
        return (
            f"<fewstep {'generator' if self.is_generator else 'teacher'}: {self.family.title}, {takes}, "
            f"{height}x{width}x{channels} pictures, {sampler},\n {count:,.1f} M parameters, {precision} on {self.device}>"
        )


def build_model(denoiser: Denoiser, card: ModelCard, folder: Path | None = None, base: str = "") -> Model:
    """A model around a network: conditioner and decoder are its family's.

    Args:
        folder: of a text-to-image model, the diffusers folder with text encoders and VAE.
        base: what the user called that folder.
    """
    family = family_of(denoiser.base_network.describe())
    device = device_of(denoiser.base_network)
    conditioner: Conditioner = LabelConditioner(denoiser.num_classes, card.class_names)
    decoder: Decoder = PixelDecoder()
    if folder is not None:
        conditioner = PromptConditioner(family, folder, family.example_condition(denoiser.base_network, 1))
        decoder = LatentDecoder(
            family.pixels_per_latent(folder), partial(read_autoencoder, family, folder, denoiser.image_shape[0])
        )
    return Model(denoiser, card, family, conditioner.to(device), decoder.to(device), folder, base)
