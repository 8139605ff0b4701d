"""Where networks run, in which precision, and whether they can be compiled."""

import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.progress import Stderr, busy

if TYPE_CHECKING:
    from fewstep.diffusion.denoiser import Denoiser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CLEARLY = 1.1  # a precision has to be this much faster to be chosen, or slower to be warned of
_PIXELS_AT_ONCE = 2**20  # one picture of 1024x1024: a VAE's decoder needs gigabytes for each more


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype by torch's name: "float32", "bfloat16", "float16"."""
    return str(dtype).removeprefix("torch.")


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of this size are made, or decoded, together; what they look like does not depend on it."""
    return max(1, _PIXELS_AT_ONCE // (height * width))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are; of one that lies in parts, also in host memory, this process's own device."""
    part: Any = next(module.parameters())
    if not hasattr(part, "device_mesh"):
        return cast(torch.device, part.device)
    kind = part.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def set_precision(denoiser: "Denoiser", precision: str | torch.dtype, device: torch.device) -> None:
    """Set the precision inside a network; its weights stay as they are.

    Args:
        precision: a dtype, or its short name; "auto" is what is fast on the device.

    Raises:
        UserError: another precision than fp32, bf16 and fp16.
    """
    if isinstance(precision, str):
        precision = DTYPES[choose_precision(precision, device)]
    if precision not in DTYPES.values():
        raise UserError(f"precision={precision}: choose fp32, bf16 or fp16")
    denoiser.compute_dtype = precision


def prepare_denoiser(denoiser: "Denoiser", device: str, precision: str) -> "Denoiser":
    """Eval mode, on the device, with its compute precision set ("auto" is what is fast there)."""
    place = choose_device(device)
    set_precision(denoiser, precision, place)
    return denoiser.to(place).eval()


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA's GPU where there is one; Apple's is "mps". Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"compute.device={name!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"compute.device={name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"compute.device={name!r}: this machine has no usable Apple GPU; use cpu or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"compute.device={name!r}: this machine has no usable CUDA device; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"compute.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_precision(wanted: str, device: torch.device, tell: Callable[[str], None] | None = None) -> str:
    """ "fp32", "bf16" or "fp16": as wanted, or for "auto" what is fast on the device.

    Args:
        wanted: auto, fp32, bf16 or fp16.
        tell: gets one line that says what was chosen and why, or a warning where what was asked for is slow.

    Raises:
        UserError: another name.
    """
    if wanted not in ("auto", *DTYPES):
        raise UserError(f"precision={wanted!r}: choose auto, fp32, bf16 or fp16")
    name, line = _fast_precision(device) if wanted == "auto" else (wanted, _slow_warning(wanted, device))
    if tell is not None and line:
        tell(line)
    return name


def precision_of(option: str, device: str, tell: Callable[[str], None]) -> str:
    """`choose_precision` for the options --precision and --device of a command, as they were typed.

    Raises:
        UserError: another name, or no such device.
    """
    if option not in ("auto", *DTYPES):
        raise UserError(f"--precision {option}: choose auto, fp32, bf16 or fp16")
    return choose_precision(option, choose_device(device), tell)


def _fast_precision(device: torch.device) -> tuple[str, str]:
    """(name, why) of what is fast on a device."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "precision bf16: this GPU has instructions for it"
        return "fp32", "precision fp32: this GPU has no instructions for bf16"
    if device.type != "cpu":
        return "fp32", f"precision fp32: nothing else is tried on {device.type}"
    factor = cpu_slowdown("bf16")
    if factor * _CLEARLY < 1:
        return "bf16", f"precision bf16: {1 / factor:.1f} times as fast as fp32 here"
    if factor < _CLEARLY:
        return "fp32", "precision fp32: bf16 would not be faster here"
    return "fp32", f"precision fp32: bf16 would be {_times(factor)} slower here"


def _slow_warning(name: str, device: torch.device) -> str:
    """A warning where a precision is slower than fp32 on a device, else nothing."""
    if name == "fp32":
        return ""
    if device.type == "cuda" and name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "warning: precision bf16 is slow here: this GPU has no instructions for it; fp32 or auto is faster"
    if device.type == "cpu" and (factor := cpu_slowdown(name)) >= _CLEARLY:
        return (
            f"warning: precision {name} is {_times(factor)} slower than fp32 on this processor; fp32 or auto is faster"
        )
    return ""


def _times(factor: float) -> str:
    return f"{factor:.0f} times" if factor >= 3 else f"{factor:.1f} times"


@cache
def cpu_slowdown(name: str) -> float:
    """Time of a small convolution, normalisation and product with their gradients in a precision, relative to fp32.

    Measured once in a process, in 0.2 s, in turns, as processor time of one thread: other work on the machine does
    not count. The best of two after a warm-up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: dict[str, list[float]] = {"fp32": [], name: []}
        with busy(Stderr(), "Measuring which precision is fast here"):
            for _ in range(3):
                for precision, spent in seconds.items():
                    spent.append(_probe_seconds(DTYPES[precision]))
        return min(seconds[name][1:]) / min(seconds["fp32"][1:])
    finally:
        torch.set_num_threads(threads)


def _probe_seconds(dtype: torch.dtype) -> float:
    """Processor time of what a network's layer does, forward and backward."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(0)

        def made(*shape: int) -> Tensor:
            return (torch.randn(shape) / 8).to(dtype).requires_grad_()

        pictures, kernel, matrix = made(4, 64, 16, 16), made(64, 64, 3, 3), made(64, 64)
        begun = time.thread_time()
        hidden = F.silu(F.group_norm(F.conv2d(pictures, kernel, padding=1), 8))
        (hidden.flatten(2).transpose(1, 2) @ matrix).sum().backward()
        return time.thread_time() - begun


def compile_denoiser(denoiser: "Denoiser", device: torch.device) -> None:
    """Compile the network inside, for the option --compile.

    Raises:
        UserError: no compiler, or a network that does not compile.
    """
    try:
        check_compiler(device)
        denoiser.compile_network()
    except (RuntimeError, UserError) as error:
        raise UserError(f"--compile: {error}") from error


def check_compiler(device: torch.device) -> None:
    """Raise UserError where `torch.compile` lacks what it needs: a C++ compiler, on the GPU triton and a C compiler."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("torch.compile needs the package triton on the GPU: pip install triton, or do not compile")
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "cl"] if device.type == "cpu" else []
    wanted += [os.environ.get("CC", ""), "gcc", "clang", "cc"] if device.type == "cuda" else []
    if not any(name and shutil.which(name.split()[0]) for name in wanted):
        kind = "C++" if device.type == "cpu" else "C"
        raise UserError(f"torch.compile needs a {kind} compiler and finds none: install one, or do not compile")
