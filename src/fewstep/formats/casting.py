"""Weights in the precision they are stored in; a value that does not fit is refused, not stored as infinity."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.errors import UserError


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype, where: str = "") -> dict[str, Tensor]:
    """Contiguous copies on the CPU, floating-point tensors as `dtype`, others as they are.

    Args:
        where: said before a tensor's name in the error, e.g. "unet".

    Raises:
        UserError: a tensor has a value that is not finite in `dtype`; names the tensor.
    """
    stored = {}
    for name, weight in weights.items():
        tensor = weight.detach().cpu()
        if tensor.is_floating_point():
            cast = tensor.to(dtype)
            if not torch.isfinite(cast).all():
                full = f"{where}.{name}" if where else name
                if not torch.isfinite(tensor).all():
                    raise UserError(
                        f"the tensor {full} holds infinities or NaNs; train again from an earlier checkpoint"
                    )
                raise UserError(
                    f"the tensor {full} reaches {float(tensor.abs().max()):.3g} and becomes infinite in fp16; "
                    "choose --dtype bf16 or fp32"
                )
            tensor = cast
        stored[name] = tensor.contiguous()
    return stored
