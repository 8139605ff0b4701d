"""What users do with an export in stock diffusers pipelines: the pictures of `fewstep sample` from the same noises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from safetensors import safe_open

import fewstep
from fewstep.export.export import ExportOptions, export_generator
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape
from tests.export.text_generators import FOUR, PROMPTS, load, render, write_run

LONG, ONE = pytest.mark.long, (399,)
SHAPE = LoraShape(4, 1.0)  # a wrong scale would be a factor of 4
LORA_FILES = {"lora": "pytorch_lora_weights.safetensors", "kohya-lora": "out.safetensors"}
ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (StableDiffusionAdapterPipeline, {"adapter_type": "full_adapter", "downscale_factor": 2}),
    "sdxl": (StableDiffusionXLAdapterPipeline, {"adapter_type": "full_adapter_xl", "downscale_factor": 4}),
}


def exported(tmp_path: Path, kind: str, family: str, steps: tuple[int, ...], **card: Any) -> tuple[Path, Model]:
    run = write_run(tmp_path, family, steps, SHAPE if "lora" in kind else None, **card)
    options = ExportOptions(kind=kind, precision="fp32", num_samples=0, device="cpu")
    return export_generator(run, tmp_path / "out", options), load(run)


def plain_lcm(pipe: Any) -> Any:
    """As every tutorial does it, and our card where no scheduler lies beside the weights: nothing of ours in it."""
    return LCMScheduler.from_config(pipe.scheduler.config)


@pytest.mark.parametrize(("kind", "family", "steps"), [  # each value once; the other triples in the long run
    ("lora", "sd", FOUR), ("kohya-lora", "sdxl", ONE),
    *(pytest.param(*triple, marks=LONG) for triple in [
        ("lora", "sd", ONE), ("lora", "sdxl", FOUR), ("lora", "sdxl", ONE),
        ("kohya-lora", "sd", FOUR), ("kohya-lora", "sd", ONE), ("kohya-lora", "sdxl", FOUR),
    ]),
])  # fmt: skip
def test_a_lora_in_a_stock_pipeline(tmp_path: Path, kind: str, family: str, steps: tuple[int, ...]) -> None:
    """Loaded, then fused; with the export's scheduler, then with a plain one and typed timesteps; and taken out again."""
    out, generator = exported(tmp_path, kind, family, steps)
    expected = generator.sample(PROMPTS, seed=3, output="tensor")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    plain = plain_lcm(pipe)
    options: dict[str, Any] = {"num_inference_steps": len(steps), "guidance_scale": 1}
    pipe.scheduler = plain
    without = render(pipe, generator, 3, **options, timesteps=list(steps))
    assert (without - expected).abs().max() > 0.02
    pipe.load_lora_weights(out, weight_name=LORA_FILES[kind])
    for fused in (False, True):
        if fused:
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        pipe.scheduler = plain
        typed = render(pipe, generator, 3, **options, timesteps=list(steps))
        assert (typed - expected).abs().max() < 1e-3
        pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
        assert (render(pipe, generator, 3, **options) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("family", "steps"), [
    ("sd", ONE), ("sdxl", FOUR),
    *(pytest.param(*pair, marks=LONG) for pair in [
        ("sd", FOUR), ("sd", (999,)), ("sdxl", ONE), ("sdxl", (999,)),
    ]),
])  # fmt: skip
def test_a_unet_under_a_plain_scheduler_with_typed_timesteps(
    tmp_path: Path, family: str, steps: tuple[int, ...]
) -> None:
    out, generator = exported(tmp_path, "unet", family, steps)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "teacher", unet=unet)
    pipe.scheduler = plain_lcm(pipe)
    made = render(pipe, generator, 3, num_inference_steps=len(steps), guidance_scale=1, timesteps=list(steps))
    assert (made - generator.sample(PROMPTS, seed=3, output="tensor")).abs().max() < 1e-3


def as_tensor(pictures: Any) -> torch.Tensor:
    """(N, 3, H, W): the older adapter pipeline gives arrays (N, H, W, 3) whatever it is asked for."""
    return pictures if isinstance(pictures, torch.Tensor) else torch.as_tensor(pictures).permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated")  # the pipeline's own
@pytest.mark.parametrize(
    ("family", "steps"),
    [("sd", FOUR), ("sdxl", ONE), *(pytest.param(*pair, marks=LONG) for pair in [("sd", ONE), ("sdxl", FOUR)])],
)
def test_a_t2i_adapter(tmp_path: Path, family: str, steps: tuple[int, ...]) -> None:
    """The exported components in an adapter pipeline: our pixels while the adapter is off, others while it is on."""
    out, generator = exported(tmp_path, "diffusers", family, steps)
    pipe: Any = DiffusionPipeline.from_pretrained(out)
    torch.manual_seed(0)
    kind, shape = ADAPTERS[family]
    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, **shape)
    parts = {name: part for name, part in pipe.components.items() if family == "sdxl" or name != "image_encoder"}
    steered = kind(**parts, adapter=adapter, **({"requires_safety_checker": False} if family == "sd" else {}))
    options: dict[str, Any] = {
        "image": torch.rand(2, 3, 16, 16), "num_inference_steps": len(steps), "guidance_scale": 1,
    }  # fmt: skip
    expected = generator.sample(PROMPTS, seed=3, output="tensor")
    off = as_tensor(render(steered, generator, 3, **options, adapter_conditioning_scale=0.0))
    assert (off - expected).abs().max() < 1e-3
    on = as_tensor(render(steered, generator, 3, **options))
    assert (on - expected).abs().max() > 1e-2
    assert torch.equal(on, as_tensor(render(steered, generator, 3, **options, timesteps=list(steps))))
    assert steered.scheduler.timesteps.tolist() == list(steps)


@pytest.mark.parametrize("steps", [FOUR, (399,)], ids=["four", "one"])
@pytest.mark.parametrize("kind", LORA_FILES)
def test_the_header_of_a_lora_says_what_it_is(tmp_path: Path, kind: str, steps: tuple[int, ...]) -> None:
    """Schedule, base model, recipe, length of the run, library version and licence."""
    settings = {"run": {"name": "x"}, "memory": {"lora_rank": 4}}
    made_with = {"settings": settings, "num_steps": 7}
    out, _ = exported(tmp_path, kind, "sd", steps, made_with=made_with, licence="openrail++")
    with safe_open(out / LORA_FILES[kind], "pt") as file:
        header = file.metadata()
    assert json.loads(header["step_indices"]) == list(steps)
    assert (header["num_levels"], header["role"]) == ("1000", "generator")
    assert header["base_model"] == str(tmp_path / "teacher")
    assert json.loads(header["recipe"]) == settings
    assert (header["num_steps"], header["fewstep"], header["licence"]) == ("7", fewstep.__version__, "openrail++")
    if kind == "kohya-lora":
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "1.0")
        assert header["ss_network_module"] == "networks.lora"
