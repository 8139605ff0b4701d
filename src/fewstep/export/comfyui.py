"""ComfyUI workflows that run a generator at its own noise levels: one-step, few-step, and as a LoRA on its base.

The graph uses stock nodes only, in ComfyUI's API format (node number -> class_type and inputs), which its server takes
and its page loads. ComfyUI keeps alpha at 1: its noise levels are sigma / alpha, and it finds the timestep whose level
is nearest. The levels are given as numbers (ManualSigmas), because no stock scheduler promises a model's own steps.

Differs: ComfyUI starts from noise of the first level's strength, except at the model's own last level, where it starts
from pure noise as the generator does. So a generator conditioned at an earlier level (SDXL in one step: 399) gets its
starting noise from an AddNoise node, at the strength sqrt(1 + sigma^2) that pure noise has on ComfyUI's scale.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.export.lora import base_denoiser
from fewstep.export.single_file import generator_sigmas
from fewstep.formats.atomic import replaced_file
from fewstep.models.model import Model

Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class WorkflowPlan:
    """What a workflow says about a generator.

    Attributes:
        sigmas: noise levels on ComfyUI's scale (sigma / alpha), noisiest first.
        starts_from_pure_noise: whether the first level is the model's last, where ComfyUI starts from pure noise itself.
        prediction: "epsilon" or "v_prediction".
        size: height and width in pixels.
    """

    sigmas: tuple[float, ...]
    starts_from_pure_noise: bool
    prediction: str
    size: tuple[int, int]


def plan_workflow(generator: Model) -> WorkflowPlan:
    """The plan of a generator whose noise levels ComfyUI counts as sigma / alpha.

    Raises:
        UserError: another family, or a first level without any signal, which no number can give.
    """
    sigmas = tuple(generator_sigmas(generator))
    if not all(math.isfinite(sigma) for sigma in sigmas):
        raise UserError(
            "the first step's noise level is infinite (zero terminal signal-to-noise), which a ComfyUI workflow with "
            "explicit levels cannot give; export as a diffusers folder"
        )
    steps = generator.step_schedule
    first_is_last = steps.indices[0] == steps.num_levels - 1
    return WorkflowPlan(sigmas, first_is_last, base_denoiser(generator).prediction, generator.size)


def build_workflow(plan: WorkflowPlan, checkpoint: str, *, lora: str = "", prompt: str = "", seed: int = 0) -> Graph:
    """The graph: checkpoint (and LoRA), prompt, levels, LCM sampler without guidance, decoder, saved picture.

    Args:
        plan: of the generator.
        checkpoint: file name in ComfyUI's models/checkpoints; with a LoRA, the base's.
        lora: file name in ComfyUI's models/loras; empty: none.
        prompt: what to show.
        seed: of starting noise and fresh noise.
    """
    graph = _Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model = [loader, 0]
    if lora:
        model = [graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0), 0]
    if plan.prediction == "v_prediction":
        model = [graph.add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False), 0]
    text = [graph.add("CLIPTextEncode", clip=[loader, 1], text=prompt), 0]
    height, width = plan.size
    latent = [graph.add("EmptyLatentImage", width=width, height=height, batch_size=1), 0]
    if not plan.starts_from_pure_noise:
        strength = [graph.add("ManualSigmas", sigmas=_numbers(math.hypot(1, plan.sigmas[0]))), 0]
        noise = [graph.add("RandomNoise", noise_seed=seed), 0]
        latent = [graph.add("AddNoise", model=model, noise=noise, sigmas=strength, latent_image=latent), 0]
    sampled = graph.add(
        "SamplerCustom", model=model, add_noise=plan.starts_from_pure_noise, noise_seed=seed, cfg=1.0, positive=text,
        negative=text,  # cfg 1: the picture does not depend on it
        sampler=[graph.add("KSamplerSelect", sampler_name="lcm"), 0],
        sigmas=[graph.add("ManualSigmas", sigmas=_numbers(*plan.sigmas, 0.0)), 0], latent_image=latent,
    )  # fmt: skip
    pictures = [graph.add("VAEDecode", samples=[sampled, 0], vae=[loader, 2]), 0]
    graph.add("SaveImage", images=pictures, filename_prefix="fewstep")
    return graph.nodes


def write_workflow(
    generator: Model, out: Path, checkpoint: str, *, lora: str = "", prompt: str = "", seed: int = 0
) -> Path:
    """Write `build_workflow`'s graph of a generator as JSON; `out` must not exist.

    Raises:
        UserError: `out` exists, a model without a workflow, writing fails.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists already; choose another file")
    graph = build_workflow(plan_workflow(generator), checkpoint, lora=lora, prompt=prompt, seed=seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; choose another folder") from error
    with replaced_file(out) as aside:
        aside.write_text(json.dumps(graph, indent=1), encoding="utf-8")
    return out


class _Graph:
    """Nodes by number, in the order they were added."""

    def __init__(self) -> None:
        self.nodes: Graph = {}

    def add(self, kind: str, **inputs: Any) -> Any:
        """Add a node; returns its number, as links name it."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": _TITLES.get(kind, kind)}}
        return number


_TITLES = {
    "CheckpointLoaderSimple": "Load Checkpoint", "CLIPTextEncode": "Prompt", "ManualSigmas": "Noise levels",
    "KSamplerSelect": "Sampler", "SamplerCustom": "Sample without guidance", "AddNoise": "Pure noise on the sampler's scale",
}  # fmt: skip


def _numbers(*values: float) -> str:
    """Decimals without exponents, nine digits after the point: ComfyUI's levels are float32."""
    return ", ".join(f"{value:.9f}" for value in values)
