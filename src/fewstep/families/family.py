"""The contract of a family: everything that is special about one kind of teacher, said by one object.

A new family is one folder below `families/` and one line in `registry.py`; its name stands nowhere else in src. The
module that defines the object imports diffusers and transformers inside its methods only, so that asking costs little.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import StepSchedule
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.single_file import SingleFileLayout
from fewstep.formats.stored_tensors import StoredTensors
from fewstep.formats.text_generator_folder import NetworkPart

if TYPE_CHECKING:
    from fewstep.networks.autoencoder import Autoencoder
    from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders

Description = dict[str, Any]


@dataclass(frozen=True)
class NewNetwork:
    """What a network that is trained from nothing makes.

    Attributes:
        resolution, channels: of the pictures.
        num_classes: 0 for pictures without labels.
        sigma_data: standard deviation of the data in [-1, 1].
    """

    resolution: int
    channels: int
    num_classes: int
    sigma_data: float = 0.5


class Family(ABC):
    """One kind of teacher.

    Attributes:
        name: what cards and folders call it.
        title: what people call it.
        takes: "labels" (class numbers, or nothing for unconditional models) or "prompts".
        component: the network's folder in a diffusers folder, "unet" or "transformer"; empty where there is none.
        network_class: the network's class in diffusers; empty where there is none.
        scheduler_class: of the stock scheduler that carries a few-step schedule; empty where there is none.
        sampler_name: what people call the many-step sampler, e.g. "Heun".
        pair_sampler: what people call the sampler of noise-image pairs; empty: the many-step sampler.
        default_num_steps: of the many-step sampler.
        default_guidance_scale: of the many-step sampler; 1 is off.
        default_batch_size: pictures made at once unless told otherwise.
        lora_targets: names of the layers that get a LoRA unless told otherwise; empty: none are known.
        kohya_names: whose words kohya's keys of its LoRA layers are written in: "diffusers", "original" (`layer_aliases`); empty:
            none that are read anywhere.
        comfyui_lora: as which of our LoRA exports ComfyUI knows all of its layers; empty: nothing is known.
        single_file: how its models lie in one file; None: such files are neither read nor written.
        unread_files: beginnings of keys by which files of its models in other layouts are known -> what people call them.
        file_words: what the file names of DMD2's generators call its models.
        safety_checker: "module:class" of the checker that its folders may carry; empty: none.
        shapes: released networks by name (as `teacher.network` has them), as descriptions that `build` takes.
        new_shapes: networks that `fewstep pretrain` can train, as `network.name` has them.
        one_step_indices: grid index that DMD2's published one-step generators run at.
        export_precision: of its exports unless told otherwise, "fp32", "fp16" or "bf16".
        autoencoder_config: the released models' VAE, for estimates; empty where x0 are the pictures themselves.
        generator_index: what `model_index.json` of a generator's pipeline says beside its components, where its stock pipeline
            reads there that guidance is built in.
    """

    name: str
    title: str
    takes: Literal["labels", "prompts"]
    component: str = ""
    network_class: str = ""
    scheduler_class: str = ""
    sampler_name: str
    pair_sampler: str = ""
    default_num_steps: int
    default_guidance_scale: float = 1.0
    default_batch_size: int
    lora_targets: tuple[str, ...] = ()
    kohya_names: Literal["", "diffusers", "original"] = ""
    comfyui_lora: str = ""
    single_file: SingleFileLayout | None = None
    unread_files: Mapping[str, str] = {}
    file_words: tuple[str, ...] = ()
    safety_checker: str = ""
    shapes: Mapping[str, Description] = {}
    new_shapes: tuple[str, ...] = ()
    one_step_indices: tuple[int, ...] = (999,)
    export_precision: str = "fp32"
    autoencoder_config: Mapping[str, Any] = {}
    generator_index: Mapping[str, Any] = {}

    # --- which models are of this family

    @abstractmethod
    def recognise(self, folder: Path) -> bool:
        """Whether a folder or file holds a model of this family; reads names and configs, never weights.

        Raises:
            UserError: a config that has to be read is missing or damaged.
        """

    @abstractmethod
    def describes(self, description: Description) -> bool:
        """Whether a description (see `Denoiser.describe`) is of this family; older spellings included."""

    # --- the network

    @abstractmethod
    def build(self, description: Description) -> Denoiser:
        """The untrained network of a description, on torch's current default device ("meta": shapes alone).

        Raises:
            ValueError: the description is wrong.
            UserError: a library that the family needs is not installed.
        """

    @abstractmethod
    def load(self, folder: Path, resolution: int = 0) -> Denoiser:
        """The network of a folder (or file) that `recognise` accepts, with its weights, float32, on the CPU.

        Args:
            resolution: side of the pictures in pixels; 0 takes the model's own.

        Raises:
            UserError: a component is missing, damaged or not understood whole.
        """

    def stored_weights(self, folder: Path) -> StoredTensors | None:
        """The files that `load` reads, under the names of the network's state dict; None where it makes its tensors of others.

        Raises:
            UserError: a file is missing or damaged.
        """
        return None

    @abstractmethod
    def describe_folder(self, folder: Path, resolution: int = 0) -> Description:
        """The description of the network in a folder, without reading its weights."""

    @property
    def network_part(self) -> NetworkPart:
        """What diffusers calls the network, of families that diffusers has."""
        return NetworkPart(self.component, self.network_class)

    def describe_released(self, name: str, resolution: int = 0) -> Description:
        """The description of a released network, one of `shapes`, for pictures of this side; 0 takes its own.

        Raises:
            ValueError: no x0 of this model has this resolution.
        """
        return dict(self.shapes[name])

    def describe_weights(self, weights: Mapping[str, Tensor]) -> Description | None:
        """The description of the network that a state dict alone belongs to; None where it is not this family's.

        Raises:
            ValueError: it is, but does not say the whole network.
        """
        return None

    def describe_new(self, name: str, pictures: NewNetwork) -> Description:
        """The description of a network to be trained from nothing, one of `new_shapes`."""
        raise NotImplementedError(f"{self.title} is not trained from nothing here")

    @abstractmethod
    def resolution(self, folder: Path) -> int:
        """Side of the pictures that a folder's model makes, in pixels, read from configs."""

    @abstractmethod
    def read_card(self, folder: Path) -> ModelCard:
        """What a folder says of its model beside the weights: class names, licence, whether it can be guided."""

    # --- sampling in many steps

    @abstractmethod
    def evaluations(self, num_steps: int) -> int:
        """Network evaluations a picture of the many-step sampler."""

    @abstractmethod
    def sample(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        """x0 (B, ...) by the family's default many-step sampler, from unit noise, as its users' pipeline does it."""

    def sample_pairs(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        """x0 (B, ...) of noise-image pairs, by the sampler of published pairs (`pair_sampler`)."""
        return self.sample(denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

    @abstractmethod
    def refuse_guidance(self, denoiser: Denoiser, card: ModelCard, guidance_scale: float) -> None:
        """Raise UserError where a teacher cannot be guided at this scale, as far as its card says."""

    def refuse_other_settings(self, config: Mapping[str, Any], description: Description) -> None:  # noqa: B027  our own have one
        """Raise ValueError for a network's own config that says another arithmetic than a description of its base."""

    def refuse_as_teacher(self, folder: Path) -> None:  # noqa: B027  of most families there are no such releases
        """Raise UserError where a folder's model is a release that was distilled already, as far as its names say."""

    # --- what it is conditioned on, and what becomes pictures

    def text_encoders(self, folder: Path) -> "TextEncoders":
        """The text encoders of a folder (families that take prompts), float32, on the CPU.

        Raises:
            UserError: a component is missing or damaged.
        """
        raise NotImplementedError(f"{self.title} does not take prompts")

    def condition(self, embeddings: "TextEmbeddings", empty: "TextEmbeddings", size: tuple[int, int]) -> Condition:
        """The condition of N embedded prompts (families that take prompts).

        Args:
            embeddings: of the prompts, N rows.
            empty: the one row of the unconditional branch.
            size: height and width of the pictures in pixels.
        """
        raise NotImplementedError(f"{self.title} does not take prompts")

    @abstractmethod
    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        """B = `size` conditions of the right shapes and no meaning, for estimates, on the CPU."""

    def autoencoder(self, folder: Path) -> "Autoencoder | None":
        """The VAE of a folder, float32, on the CPU; None where x0 are the pictures themselves.

        Raises:
            UserError: it is missing or damaged.
        """
        return None

    def build_autoencoder(self, config: Mapping[str, Any]) -> "Autoencoder":
        """The untrained VAE of a config as `read_autoencoder_config` and `autoencoder_config` have it.

        Raises:
            UserError: a class that is not read.
        """
        raise NotImplementedError(f"x0 of {self.title} are the pictures themselves")

    def read_autoencoder_config(self, folder: Path) -> dict[str, Any]:
        """The VAE's config in a folder; empty where x0 are the pictures themselves.

        Raises:
            UserError: it is missing or damaged.
        """
        return {}

    def pixels_per_latent(self, folder: Path) -> int:
        """Pixels a side of x0 stands for, read from configs; 1 where x0 are the pictures themselves."""
        return 1

    # --- a generator on its way to and from other programs

    def layer_aliases(self, description: Description, modules: Iterable[str]) -> Mapping[str, str | tuple[str, ...]]:
        """{another name that LoRA files have for a layer: its name among `modules`, or those it stands for, row after row}, for
        a network so described."""
        return {}

    def write_original(self, path: Path, denoiser: Denoiser, dtype: torch.dtype) -> None:
        """Write a network in the format of the code that its authors published.

        Raises:
            UserError: that format cannot hold this network.
        """
        raise NotImplementedError(f"{self.title} has no format of its own")

    def pipeline_options(self, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of its stock pipeline's call for a generator of pictures of this size (pixels): guidance off, and what else
        the pipeline would choose otherwise."""
        return {}

    def few_step_scheduler(self, denoiser: Denoiser, steps: StepSchedule) -> Any:
        """The stock diffusers scheduler whose `set_timesteps(len(steps))` gives exactly these steps.

        Raises:
            UserError: no stock scheduler can express them.
        """
        raise NotImplementedError(f"{self.title} has no stock scheduler")
