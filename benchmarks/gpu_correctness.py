"""Golden steps on a device in several precisions, and keyed draws on it against the CPU's."""

import copy
import json
import time
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.diffusion.condition import Condition, Empty
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws, Purpose
from fewstep.distillation.inputs import GeneratorInput, RealBatch
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
)
from fewstep.networks.discriminator import Discriminator

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TOLERANCES = {"generated": 1e-5, "dm loss": 1e-5, "dm gradient": 1e-4, "gan loss": 1e-5, "gan gradient": 1e-4, "fake loss": 1e-5, "disc loss": 1e-5}  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "fp32, TF32 convolutions": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fmt: skip


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|, the measure of the golden tolerances."""
    return float((actual.detach().cpu().double() - expected.double()).abs().max() / expected.double().abs().max())


class GoldenStep:
    """The networks and tensors of one golden step on a device."""

    def __init__(self, name: str, device: str) -> None:
        file = "dmd2_step" if name == "edm" else f"dmd2_step_{name}"
        self.tensors = load_file(GOLDEN / f"{file}.safetensors")
        self.on_device = {key: value.to(device) for key, value in self.tensors.items()}
        self.name, self.level_name = name, "level" if name == "edm" else "timestep"
        self.teacher = self._teacher().eval().to(device)
        self.generator, self.fake_score = copy.deepcopy(self.teacher), copy.deepcopy(self.teacher)
        with torch.no_grad():
            for network, factor in ((self.fake_score, 1 + 1 / 16), (self.generator, 1 - 1 / 16)):
                torch._foreach_mul_(list(network.parameters()), factor)
        self.head = Discriminator(self.teacher.feature_shapes[0]).to(device)
        self.head.load_state_dict({k: v.float() for k, v in self._part("discriminator.").items()})

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def _teacher(self) -> Denoiser:
        if self.name == "edm":
            from fewstep.families.edm.denoiser import EDMDenoiser
            from fewstep.families.edm.unet import EDMUNetConfig

            values = json.loads((GOLDEN / "edm_networks.json").read_text())["adm"]
            sigma_data = values.pop("sigma_data")
            for name in ("model_type", "decoder_type"):
                values.pop(name, None)
            denoiser = EDMDenoiser(EDMUNetConfig(family="adm", **values), sigma_data)
            weights = load_file(GOLDEN / "edm_adm.safetensors").items()
            denoiser.load_state_dict(
                {k.removeprefix("weights."): v.float() for k, v in weights if k.startswith("weights.")}
            )
            return denoiser
        from diffusers import UNet2DConditionModel

        from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser

        described = json.loads((GOLDEN / "text_networks.json").read_text())[self.name]
        self.timestep = described["conditioning_timestep"]
        unet = UNet2DConditionModel(**described["unet"])
        unet.load_state_dict({k: v.float() for k, v in self._part("teacher.").items()})
        return DiffusersUNetDenoiser(unet, described["scheduler"])

    def condition(self, real: bool) -> Condition:
        """Of the generated or of the real images."""
        values = self.on_device
        if self.name == "edm":
            return Condition.from_one_hot(values["real_class_labels" if real else "class_labels"])
        text, pooled = ("real_text_embedding", "real_pooled") if real else ("text_embedding", "pooled")
        empty = values.get("uncond_embedding", torch.zeros_like(values[text][:1]))
        rows: dict[str, Empty] = {"text": empty.reshape(1, *values[text].shape[1:]) if empty.ndim == 2 else empty[:1]}
        parts = {"text": values[text]}
        if pooled in values:
            parts["pooled"], rows["pooled"] = values[pooled], torch.zeros_like(values[pooled][:1])
        if "time_ids" in values:
            parts["time_ids"], rows["time_ids"] = values["time_ids"], "same"
        return Condition(3, parts, rows)

    def batch(self) -> GeneratorInput:
        """The generator's input."""
        noise, condition = self.on_device["noise"], self.condition(real=False)
        if self.name == "edm":
            return GeneratorInput(80 * noise, torch.full((4,), 80.0, device=noise.device), condition, 4)
        level = self.teacher.noise_schedule.expanded(self.timestep, 3, noise.device)
        return GeneratorInput(noise, level, condition, 3)

    def errors(self, precision: torch.dtype) -> dict[str, float]:
        """Relative error of every quantity of the step; `all_finite` is 1 or 0."""
        for network in (self.teacher, self.generator, self.fake_score):
            network.compute_dtype = precision
        here, batch, level = self.on_device, self.batch(), self.level_name
        x0, prefix, guidance = (
            here["generated"],
            "dm." if self.name == "edm" else "dm_8.",
            1.0 if self.name == "edm" else 8.0,
        )
        with torch.no_grad():
            generated = self.generator.denoise(batch.noisy, batch.level, batch.condition)
        matching = DistributionMatching(self.teacher, self.fake_score, guidance, 20, 980)
        dm = matching.at(x0, batch, here[f"{prefix}{level}"], here[f"{prefix}noise"])
        gan = GeneratorAdversarial(self.fake_score, self.head, 1.0).at(
            x0, batch, here[f"gan_gen.{level}"], here["gan_gen.noise"]
        )
        fake = FakeScoreDenoising(self.fake_score).at(x0, batch.condition, here[f"fake.{level}"], here["fake.noise"])
        real = RealBatch(here["real_images" if self.name == "edm" else "real_latents"], self.condition(real=True))
        disc = DiscriminatorAdversarial(self.fake_score, self.head, 0.01).at(
            x0, batch.condition, real, here[f"gan_disc.{level}_real"], here["gan_disc.noise_real"],
            here[f"gan_disc.{level}_generated"], here["gan_disc.noise_generated"],
        )  # fmt: skip
        found = {
            "generated": (generated, "generated"), "dm loss": (dm.loss, f"{prefix}loss"),
            "dm gradient": (dm.gradient, f"{prefix}grad_at_generated"), "gan loss": (gan.loss, "gan_gen.loss"),
            "gan gradient": (gan.gradient, "gan_gen.grad_at_generated"), "fake loss": (fake, "fake.loss"),
            "disc loss": (disc, "gan_disc.loss"),
        }  # fmt: skip
        return {name: relative_error(value, self.tensors[key]) for name, (value, key) in found.items()}


def golden_rows(name: str, device: str) -> list[dict[str, Any]]:
    """One row a precision: errors of a golden step, and whether float32 is within the tolerances."""
    step, rows, allowed = GoldenStep(name, device), [], torch.backends.cudnn.allow_tf32
    for precision, dtype in PRECISIONS.items():
        torch.backends.cudnn.allow_tf32 = "TF32" in precision
        errors = step.errors(dtype)
        within = all(error < TOLERANCES[quantity] for quantity, error in errors.items())
        rows.append({"step": name, "precision": precision, **errors, "within golden tolerances": within})
    torch.backends.cudnn.allow_tf32 = allowed
    return rows


def draw_rows(device: str) -> list[dict[str, Any]]:
    """Draws of every purpose on the device against the CPU's, and what one costs there."""
    here, there = Draws.of_batch(2**40 + 5, 12, 40), Draws.of_batch(2**40 + 5, 12, 40, device)
    integers, different, count, largest = 0, 0, 0, 0.0
    for purpose in get_args(Purpose):
        integers += int((here.integers(purpose, 0, 2**31) != there.integers(purpose, 0, 2**31).cpu()).sum())
        ours, theirs = here.normal(purpose, (3, 64, 64)), there.normal(purpose, (3, 64, 64)).cpu()
        different, count = different + int((ours != theirs).sum()), count + ours.numel()
        largest = max(largest, float((ours - theirs).abs().max()))
    started = time.perf_counter()
    for step in range(20):
        Draws.of_batch(1, step, 40, device).normal("dm_noise", (3, 64, 64)).sum().item()
    each = 1e3 * (time.perf_counter() - started) / 20
    return [{
        "integers that differ": integers, "normals that differ": different, "of": count, "largest difference": largest,
        "milliseconds a draw of 40 x 3 x 64 x 64, read back": each,
    }]  # fmt: skip
