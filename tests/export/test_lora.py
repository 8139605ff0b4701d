"""LoRA generators as files that diffusers loads with our pixels, and as networks with the LoRA added."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler

from fewstep.errors import UserError
from fewstep.export.export import ExportOptions, export_generator
from fewstep.export.lora import base_denoiser, fused_weights, lora_weights
from fewstep.formats.kohya_lora import read_lora
from fewstep.models.load import load_teacher
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.export.text_generators import PROMPTS, load, render, write_run
from tests.tiny_models import tiny_sd_folder

SHAPE = LoraShape(4, 1.0)  # a wrong scale would be a factor of 4


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.long)])
def test_loras_make_our_pixels_in_diffusers_and_come_back(tmp_path: Path, family: str) -> None:
    run = write_run(tmp_path, family, (999, 499), SHAPE)
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=3, output="tensor")
    without = load_teacher(tmp_path / "teacher", device="cpu").student(base_denoiser(generator), generator.card)  # type: ignore[union-attr, arg-type]
    assert (without.sample(PROMPTS, seed=3, output="tensor") - expected).abs().max() > 0.05  # type: ignore[arg-type]
    for kind, file in (("lora", "pytorch_lora_weights.safetensors"), ("kohya-lora", "kohya-lora.safetensors")):
        out = export_generator(run, tmp_path / kind, ExportOptions(kind=kind, precision="fp32", num_samples=0))
        pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
        pipe.load_lora_weights(out, weight_name=file)
        pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
        made = render(pipe, generator, 3, num_inference_steps=2, guidance_scale=1)
        assert (made - expected).abs().max() < 1e-3
        base: Any = load_teacher(tmp_path / "teacher", device="cpu").denoiser
        lora = read_lora(out / file, [name for name, _ in base.named_modules()])
        role = SharedBase(base, LoraShape(lora.rank, lora.alpha, lora.targets)).add_role("generator")
        role.load_adapter_state(lora.state)
        generator.denoiser = role.eval()
        assert (generator.sample(PROMPTS, seed=3, output="tensor") - expected).abs().max() < 1e-4
        if kind == "lora":
            assert (load(out).sample(PROMPTS, seed=3, output="tensor") - expected).abs().max() < 1e-4


def test_sd3_lora(tmp_path: Path) -> None:
    from diffusers import FlowMatchLCMScheduler

    run = write_run(tmp_path, "sd3", (999, 499), SHAPE)
    generator = load(run)
    out = export_generator(run, tmp_path / "lora", ExportOptions(kind="lora", precision="fp32", num_samples=0))
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "teacher", text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")  # older diffusers ask for it offline
    pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(out, subfolder="scheduler")
    made = render(pipe, generator, 3, num_inference_steps=2, guidance_scale=1)
    assert (made - generator.sample(PROMPTS, seed=3, output="tensor")).abs().max() < 1e-3
    with pytest.raises(UserError, match="kohya keys are not written for Stable Diffusion 3"):
        export_generator(run, tmp_path / "kohya", ExportOptions(kind="kohya-lora", num_samples=0))


def test_a_whole_network_is_no_lora(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for kind in ("lora", "kohya-lora"):
        with pytest.raises(UserError, match="a whole network, not a LoRA on its base"):
            export_generator(run, tmp_path / "out", ExportOptions(kind=kind, num_samples=0))
    assert not (tmp_path / "out").exists()
    network = load(run).denoiser
    assert fused_weights(load(run)).keys() == network.network.state_dict().keys()  # type: ignore[union-attr, operator]


def test_a_lora_does_not_fit_another_shape(tmp_path: Path) -> None:
    generator = load(write_run(tmp_path, "sd", (999,), SHAPE))
    base: Any = load_teacher(tiny_sd_folder(tmp_path / "other"), device="cpu").denoiser
    role = SharedBase(base, LoraShape(2, 1.0)).add_role("generator")
    with pytest.raises(UserError, match="the LoRA does not fit this base, rank and targets"):
        role.load_adapter_state(lora_weights(generator).state)


@torch.no_grad()
def test_fusing_adds_the_update(tmp_path: Path) -> None:
    generator = load(write_run(tmp_path, "sd", (999,), SHAPE))
    fused, lora = fused_weights(generator), lora_weights(generator)
    base = load_teacher(tmp_path / "teacher", device="cpu").denoiser.network.state_dict()  # type: ignore[union-attr, operator]
    assert fused.keys() == base.keys()
    name = next(target for target in lora.targets if target.endswith("to_q"))
    update = lora.state[f"{name}.lora_B.weight"] @ lora.state[f"{name}.lora_A.weight"] / 4
    weight = f"{name.removeprefix('network.')}.weight"
    torch.testing.assert_close(fused[weight], base[weight] + update)
    assert torch.equal(fused["conv_in.weight"], base["conv_in.weight"])
