"""Where networks run and in which precision."""

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError


def prepare_denoiser(denoiser: Denoiser, device: str, precision: str) -> Denoiser:
    """Eval mode, on the device, with its compute precision set."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise UserError(f"precision={precision!r}: choose fp32 or bf16")
    denoiser.compute_dtype = dtypes[precision]
    return denoiser.to(choose_device(device)).eval()


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"compute.device={name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"compute.device={name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"compute.device={name!r}: this machine has no usable CUDA device; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"compute.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
