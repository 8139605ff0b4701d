"""The contract of a family: everything that is special about one kind of teacher, said by one object.

A new family is one folder below `families/` and one line in `registry.py`; its name stands nowhere else in src.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser

Description = dict[str, Any]


class Family(ABC):
    """One kind of teacher.

    Attributes:
        name: what cards and folders call it, e.g. "sdxl".
        title: what people call it.
        takes: "labels" (class numbers, or nothing for unconditional models) or "prompts".
        component: the network's folder in a diffusers folder, "unet" or "transformer"; empty where there is none.
        sampler_name: what people call the many-step sampler, e.g. "Heun".
        default_num_steps: of the many-step sampler.
        default_guidance_scale: of the many-step sampler; 1 is off.
        default_batch_size: pictures made at once unless told otherwise.
        lora_targets: names of the layers that get a LoRA unless told otherwise; empty: none are known.
        shapes: released networks by name (as `teacher.network` has them), as descriptions that `build` takes.
    """

    name: str
    title: str
    takes: str
    component: str = ""
    sampler_name: str
    default_num_steps: int
    default_guidance_scale: float = 1.0
    default_batch_size: int
    lora_targets: tuple[str, ...] = ()
    shapes: Mapping[str, Description] = {}

    @abstractmethod
    def recognise(self, folder: Path) -> bool:
        """Whether a folder or file holds a teacher of this family; reads names and configs, never weights."""

    @abstractmethod
    def describes(self, description: Description) -> bool:
        """Whether a description (see `Denoiser.describe`) is of this family; older spellings included."""

    @abstractmethod
    def build(self, description: Description) -> Denoiser:
        """The untrained network of a description, on torch's current default device.

        Raises:
            ValueError: the description is wrong.
        """

    @abstractmethod
    def load(self, folder: Path, resolution: int = 0) -> Denoiser:
        """The network of a folder (or file) that `recognise` accepts, with its weights, float32, on the CPU.

        Args:
            resolution: side of the pictures in pixels; 0 takes the model's own.

        Raises:
            UserError: a component is missing, damaged or not understood whole.
        """

    @abstractmethod
    def describe_folder(self, folder: Path, resolution: int = 0) -> Description:
        """The description of the network in a folder, without reading its weights."""

    @abstractmethod
    def evaluations(self, num_steps: int) -> int:
        """Network evaluations a picture of the many-step sampler."""

    @abstractmethod
    def sample(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        """x0 (B, ...) by the family's default many-step sampler, from unit noise, as its users' pipeline does it."""
