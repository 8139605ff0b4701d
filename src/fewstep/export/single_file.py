"""A text-to-image generator as one .safetensors in its family's layout, as ComfyUI and others load whole models."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep import __version__
from fewstep.devices import DTYPES
from fewstep.diffusion.schedules import DiscreteSchedule
from fewstep.errors import UserError
from fewstep.export.lora import base_denoiser, fused_weights
from fewstep.export.shareable import shareable_base, without_local_paths
from fewstep.families.registry import single_file_layouts
from fewstep.formats.atomic import flush_to_disk, replaced_file
from fewstep.formats.casting import cast_weights
from fewstep.formats.single_file import SingleFileLayout
from fewstep.formats.stated_facts import V_MARKER, ZERO_SNR_MARKER
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.models.model import Model


def export_single_file(generator: Model, out: Path, dtype: torch.dtype) -> Path:
    """Write U-Net (a LoRA fused into its base), VAE and text encoders into one file; it appears whole or not at all.

    Args:
        generator: of a teacher whose family has such files.
        out: a new file that ends in .safetensors.
        dtype: torch.float16, bfloat16 or float32.

    Returns:
        `out`.

    Raises:
        UserError: `out` exists or has another ending, a model without such a layout, a number that `dtype` cannot
            hold (names the tensor), writing fails.
        ValueError: another dtype.
    """
    out = Path(out).expanduser()
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype}: choose torch.float16, bfloat16 or float32")
    if out.exists():
        raise UserError(f"{out} exists already; choose another file")
    if out.suffix.lower() != ".safetensors":
        raise UserError(f"{out} must end in .safetensors: that is what programs know these files by")
    tensors = cast_weights(single_file_tensors(generator), dtype) | marker_tensors(generator)
    header = single_file_metadata(generator)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; choose another folder") from error
    with replaced_file(out) as aside:
        write_tensor_file(aside, tensors, header)
        flush_to_disk(aside)
    return out


def layout_of(generator: Model) -> SingleFileLayout:
    """How the generator's family lies in a single file; raises UserError for models that have no such file, with the reason."""
    layout, known = generator.family.single_file, " or ".join(layout.title for layout in single_file_layouts())
    if layout is None:
        raise UserError(
            f"a single file holds {known}: {generator.family.name} keeps its {generator.family.component} under other keys, "
            "which this library does not write; export it as a diffusers folder"
        )
    if not isinstance(generator.decoder.autoencoder.vae, AutoencoderKL):
        raise UserError("a single file holds a whole VAE; this model's is a tiny one: export it as a diffusers folder")
    text_config = cast(Any, generator.conditioner.encoders.modules[0].config)
    if reason := layout.refuse_text_encoder(text_config.to_dict()):
        raise UserError(f"a single file holds {known}: {reason}")
    return layout


def single_file_tensors(generator: Model) -> dict[str, Tensor]:
    """Every tensor of the file under its key there, in the precision it has in memory."""
    layout = layout_of(generator)
    network, vae = cast(Any, base_denoiser(generator).network), generator.decoder.autoencoder.vae
    tensors = layout.to_file(generator.family.component, fused_weights(generator), dict(network.config))
    tensors |= layout.to_file("vae", vae.state_dict(), dict(vae.config))
    for name, encoder in zip(("text_encoder", "text_encoder_2"), generator.conditioner.encoders.modules, strict=False):
        tensors |= layout.to_file(name, encoder.state_dict(), {})
    return tensors


def marker_tensors(generator: Model) -> dict[str, Tensor]:
    """Empty tensors by whose names ComfyUI and stable-diffusion.cpp know v-prediction and a schedule without signal."""
    base = base_denoiser(generator)
    if base.prediction != "v_prediction":
        return {}
    zero_snr = isinstance(base.noise_schedule, DiscreteSchedule) and not base.noise_schedule.has_signal_everywhere
    names = (V_MARKER, ZERO_SNR_MARKER) if zero_snr else (V_MARKER,)
    return {name: torch.empty(0) for name in names}


def generator_sigmas(generator: Model) -> list[float]:
    """sigma / alpha at the generator's steps, noisiest first: the noise levels of programs that keep alpha at 1."""
    schedule = generator.denoiser.noise_schedule
    if not isinstance(schedule, DiscreteSchedule):
        raise UserError(f"{generator.family.title} has no levels of this kind: models with a schedule of betas do")
    steps = torch.tensor(generator.step_schedule.indices)
    return (schedule.sigma64(steps) / schedule.alpha64(steps)).tolist()


def single_file_metadata(generator: Model) -> dict[str, str]:
    """The header's entries: modelspec's, and what running the generator takes; none names a folder of this machine."""
    card, (height, width) = generator.card, generator.size
    prediction = base_denoiser(generator).prediction
    base = shareable_base(card.base or generator.base)
    name = base.rpartition("/")[2]
    steps = f"{len(card.step_indices)} step" + "s" * (len(card.step_indices) > 1)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": layout_of(generator).architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{name} in {steps}",
        "modelspec.description": (
            f"{name} distilled with fewstep {__version__}: {steps} at timesteps {list(card.step_indices)}, without "
            "guidance (scale 1), fresh noise between steps (the LCM sampler)."
        ),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "modelspec.license": card.licence,
        "fewstep.version": __version__,
        "fewstep.base": base,
        "fewstep.licence": card.licence,
        "fewstep.step_indices": json.dumps(list(card.step_indices)),
        "fewstep.num_levels": str(card.num_levels),
        "fewstep.sigmas": json.dumps(generator_sigmas(generator)),
        "fewstep.prediction_type": prediction,
        "fewstep.guidance_scale": "1",
        "fewstep.recipe": json.dumps(without_local_paths(card, keep_base=False).made_with, default=str),
    }
