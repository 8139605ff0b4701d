"""What the README.md of an export says: the facts, and which template tells how it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.formats.lora_list import split_strength
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.source import Source, cached_id

_TEMPLATES = {
    "unet": "network.md.jinja", "lora": "lora.md.jinja", "kohya-lora": "lora.md.jinja",
    "single-file": "single_file.md.jinja", "edm": "edm.md.jinja",
}  # fmt: skip
_FILES = {"lora": "pytorch_lora_weights.safetensors", "edm": "{name}.pkl"}


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        name: of the export's folder.
        kind: as `fewstep export --as` has it.
        source: what users load: the folder, or its name on the hub.
        base: the teacher's folder or hub id; empty for class-conditional generators.
        component: "unet" or "transformer".
        network_class: what diffusers calls the network.
        comfyui_lora: as which kind of LoRA ComfyUI knows all layers of this model; empty: nothing is known.
        original_names: whether kohya's keys of its layers are in the words of the original code.
        scheduler_class: the stock scheduler that carries few-step schedules.
        has_scheduler: whether `scheduler/` lies beside the weights.
        has_workflow: whether `comfyui_workflow.json` does.
        prompts: of the sample pictures.
        call_options: what the pipeline's call is told beside prompt and steps.
        pipeline_dtype: what torch calls the precision that its pipeline is opened in on a GPU.
        absent: components that the base has no weights for and diffusers wants to be told of.
        unassumed: what a single file has no place for and its readers take otherwise, in words.
        figures: (what was measured, value), ready to print.
    """

    name: str
    kind: str
    source: str
    card: ModelCard
    precision: str
    pushed: bool = False
    base: str = ""
    component: str = "unet"
    network_class: str = ""
    comfyui_lora: str = ""
    original_names: bool = False
    scheduler_class: str = ""
    has_scheduler: bool = True
    has_workflow: bool = False
    num_samples: int = 0
    prompts: tuple[str, ...] = ()
    call_options: Mapping[str, Any] = field(default_factory=dict)
    pipeline_dtype: str = "float16"
    absent: tuple[str, ...] = ()
    unassumed: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def template(self) -> str:
        """The template of the section on use."""
        if self.kind == "diffusers":
            return "pipeline.md.jinja" if self.base else "classes.md.jinja"
        return _TEMPLATES[self.kind]

    @property
    def weights_file(self) -> str:
        """Name of the one file of weights, for kinds that have one."""
        return _FILES.get(self.kind, "{name}.safetensors").format(name=self.name)

    @property
    def base_loras(self) -> list[tuple[str, str, float]]:
        """(file, its name without ending, strength) of the LoRAs that a LoRA's base was merged with, in their order."""
        found = [split_strength(lora) for lora in self.card.base_loras] if "lora" in self.kind else []
        return [(name, Path(name).stem, strength) for name, strength in found]

    @property
    def weights_path(self) -> str:
        """Where it lies."""
        return str(Path(self.source) / self.weights_file)

    @property
    def simple(self) -> bool:
        """Whether the scheduler that ComfyUI and stable-diffusion.cpp call `simple` gives the generator's own steps."""
        steps, levels = self.card.step_indices, self.card.num_levels
        return list(steps) == [levels - 1 - number * levels // len(steps) for number in range(len(steps))]


def hub_name(base: str) -> str:
    """The hub id ("org/name") that a base is or was downloaded from; empty for other local folders."""
    return (cached_id(Path(base)) or Source.parse(base).hub_id) if base else ""
