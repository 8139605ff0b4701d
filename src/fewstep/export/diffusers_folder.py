"""Exported generators as diffusers components: `FewstepPipeline.from_pretrained(folder)(num_images=4)`.

The classes here wrap the library's own network and sampler, so the pixels are those of `load_generator`. diffusers is
an optional dependency (the extra `diffusers`); nothing else in the library imports this module.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, DenoiserOutput
from fewstep.errors import UserError
from fewstep.families.registry import build_denoiser
from fewstep.formats.diffusers_index import refuse_foreign_code
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.pixels import to_pictures
from fewstep.formats.source import Source
from fewstep.formats.text_generator_folder import is_generator_folder
from fewstep.models.model import build_model

if TYPE_CHECKING:
    from fewstep.export.text_pipeline import TextPipeline


class EDMUNetModel(ModelMixin, ConfigMixin):
    """A network and what turns its output into an x0 estimate, under diffusers' loading and saving.

    Args:
        description: as `Denoiser.describe` gives it; stored in `config.json`.
    """

    @register_to_config
    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self._denoiser = [build_denoiser(description)]  # in a list: its parts are registered under their own names
        for name, part in self._denoiser[0].named_children():
            self.add_module(name, part)

    @property
    def denoiser(self) -> Denoiser:
        """The same network behind the library's own contract."""
        return self._denoiser[0]

    def forward(self, sample: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """x0 estimate (B, C, H, W) of noisy images at noise levels sigma (B,), with one-hot class labels."""
        condition = Condition(len(sample)) if class_labels is None else Condition.from_one_hot(class_labels)
        output: DenoiserOutput = self.denoiser(sample, sigma, condition)
        assert output.x0 is not None
        return output.x0


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """Carries the generator's step indices in its config; the pipeline reads them, users never type them."""

    order = 1

    @register_to_config
    def __init__(self, step_indices: tuple[int, ...] = (999,), num_levels: int = 1000) -> None:
        self.step_indices = tuple(step_indices)
        self.num_levels = num_levels


@dataclass
class FewstepPipelineOutput(BaseOutput):
    """Images: a list of PIL images, or a tensor (N, C, H, W) in [-1, 1]."""

    images: Any


class FewstepPipeline(DiffusionPipeline):
    """Class-conditional generator in the number of steps it was trained for."""

    model_cpu_offload_seq = "unet"
    unet: EDMUNetModel
    scheduler: FewstepScheduler

    def __init__(self, unet: EDMUNetModel, scheduler: FewstepScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(
        self, num_images: int = 1, class_labels: list[int] | None = None, seed: int = 0, output_type: str = "pil"
    ) -> FewstepPipelineOutput:
        """Make images; image i depends on (seed, i, class_labels[i]) only.

        Args:
            num_images: how many.
            class_labels: one an image; None takes all classes in turn.
            seed: as in `Model.sample`.
            output_type: "pil" or "pt".
        """
        card = ModelCard("generator", self.scheduler.step_indices, self.scheduler.num_levels)
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type={output_type!r}: choose 'pil' or 'pt'")
        model = build_model(self.unet.denoiser, card)
        images = model.sample(num_images, labels=class_labels, seed=seed, output="tensor", progress=False)
        return FewstepPipelineOutput(images if output_type == "pt" else to_pictures(images))


def load_pipeline(folder: str | Path) -> "FewstepPipeline | TextPipeline":
    """A pipeline that needs no steps typed, from an exported generator folder or a run folder.

    Class-conditional: `pipeline(num_images=4).images`; text-to-image: `pipeline("a red cat").images`.

    Raises:
        UserError: no exported generator.
    """
    path = Source.parse(folder).of_role("generator") or Path(folder)
    if is_generator_folder(path):
        from fewstep.export.text_pipeline import load_text_pipeline

        return load_text_pipeline(path)
    if not (path / "scheduler/scheduler_config.json").is_file():
        raise UserError(f"{folder} is no exported generator: scheduler/scheduler_config.json is missing")
    refuse_foreign_code(path)
    return FewstepPipeline.from_pretrained(path, local_files_only=True)
