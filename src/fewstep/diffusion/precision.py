"""The widest floating point a device has: Apple's GPUs have no float64."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def has_float64(device: torch.device) -> bool:
    """Whether a device calculates in float64."""
    return device.type not in WITHOUT_FLOAT64


def wide(tensor: Tensor) -> Tensor:
    """float64 where the tensor's device has it, else float32."""
    return tensor.double() if has_float64(tensor.device) else tensor.float()
