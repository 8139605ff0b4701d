"""Weights in 8 or 4 bits and back. Blocks of 64 weights share a scale, which is a bf16 number.

    int8: W = scale q, q whole in -127..127, scale = max |block| / 127        8.25 bits a weight
    nf4:  W = scale table[code], 16 levels, scale = max |block|               4.25 bits a weight

Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3 and appendix E, for NF4. Differs: scales are not quantised again; codes
are the nearest ones under the rounded scale, so that nothing is lost by its rounding.
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["int8", "nf4"]
BLOCK = 64  # weights with one scale

# Quantiles of the normal distribution, the largest scaled to 1, and 0 among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantise(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight of any shape: int8 (blocks, 64) or uint8 (blocks, 32), and bf16 (blocks, 1)."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    if kind == "int8":
        scale = _scale(largest / 127)
        return (blocks / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale
    scale, table = _scale(largest), torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / scale.float(), (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2], scale


def dequantise(codes: Tensor, scale: Tensor, kind: Kind, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of a shape that `quantise` was given, in a floating-point type."""
    work = torch.float32 if dtype == torch.float16 else dtype  # many scales are below fp16's smallest normal number
    if kind == "int8":
        blocks = codes.to(work)
    else:
        table = _pairs if torch.compiler.is_compiling() else _kept_pairs  # the compiler warns of caches
        blocks = table(codes.device, work).index_select(0, codes.flatten().int()).view(-1, BLOCK)
    return blocks.mul_(scale.to(work)).flatten()[: shape.numel()].view(shape).to(dtype)


def _scale(largest: Tensor) -> Tensor:
    """bf16, and not 0 where all weights are."""
    return largest.clamp(min=torch.finfo(torch.float32).tiny).bfloat16()


def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256, 2): both weights of each byte, before their scale."""
    table, byte = torch.tensor(NF4, dtype=dtype, device=device), torch.arange(256, device=device)
    return torch.stack([table[byte // 16], table[byte % 16]], 1)


_kept_pairs = cache(_pairs)
