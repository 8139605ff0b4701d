"""Where networks run, in which precision, and whether they can be compiled."""

import os
import shutil
from importlib.util import find_spec

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError

_PIXELS_AT_ONCE = 2**20  # one picture of 1024x1024: a VAE's decoder needs gigabytes for each more


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of this size are made, or decoded, together; what they look like does not depend on it."""
    return max(1, _PIXELS_AT_ONCE // (height * width))


def prepare_denoiser(denoiser: Denoiser, device: str, precision: str) -> Denoiser:
    """Eval mode, on the device, with its compute precision set."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise UserError(f"precision={precision!r}: choose fp32, bf16 or fp16")
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


def check_compiler(device: torch.device) -> None:
    """Raise UserError where `torch.compile` lacks what it needs: a C++ compiler, on the GPU triton and a C compiler."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("torch.compile needs the package triton on the GPU: pip install triton, or do not compile")
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "cl"] if device.type == "cpu" else []
    wanted += [os.environ.get("CC", ""), "gcc", "clang", "cc"] if device.type == "cuda" else []
    if not any(name and shutil.which(name.split()[0]) for name in wanted):
        kind = "C++" if device.type == "cpu" else "C"
        raise UserError(f"torch.compile needs a {kind} compiler and finds none: install one, or do not compile")
