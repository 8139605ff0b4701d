"""Philox4x32-10, the counter-based generator behind `draws`: the same words from numpy, from torch, and fused on CUDA.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Any, Any, Any, Any], key0: Any, key1: Any) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for every counter, in int64.

    Parts of the counter may have size 1 along an axis: what does not depend on it is computed once, until the rounds
    have mixed everything (the third). A product of two words wraps around in int64 with all its bits right, and low
    words keep their high bits until these would matter: four operations a word and round.

    Args:
        counter: four int64 arrays (all of numpy or all of torch) that broadcast, each in 0..2**32 - 1.
        key0, key1: integers, or arrays as the parts of the counter.
    """
    c0, c1, c2, c3 = counter
    for round_number in range(10):
        if round_number:  # the words are ours now
            c0 *= _MULTIPLIERS[0]
            c2 *= _MULTIPLIERS[1]
        else:
            c0, c2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _mixed(c2, c1, key0), c2, _mixed(c0, c3, key1), c0
        key0, key1 = (key0 + _KEY_STEPS[0]) & MASK, (key1 + _KEY_STEPS[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def _mixed(product: Any, low: Any, key: Any) -> Any:
    """High word of a product, xor the low word of the other one, xor the key."""
    word = product >> 32
    for part in (low, key):
        if isinstance(part, int) or part.shape == word.shape:
            word ^= part
        else:
            word = word ^ part
    word &= MASK
    return word


_CUDA_ROUNDS = """
    unsigned int c0 = (unsigned int)block | (unsigned int)((position >> 32) << 20), c1 = (unsigned int)position;
    unsigned int c2 = (unsigned int)step, c3 = (unsigned int)code, k0 = (unsigned int)key0, k1 = (unsigned int)key1;
    for (int i = 0; i < 10; ++i) {
        unsigned long long first = c0 * 0xD2511F53ull, second = c2 * 0xCD9E8D57ull;
        c0 = (unsigned int)(second >> 32) ^ c1 ^ k0;
        c2 = (unsigned int)(first >> 32) ^ c3 ^ k1;
        c1 = (unsigned int)second;
        c3 = (unsigned int)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
"""
_CUDA_WORD = f"""
template <typename T> T keyed_word(T position, T code, T block, T step, T key0, T key1) {{
    {_CUDA_ROUNDS}
    return (T)c0;
}}
"""
_CUDA_NORMALS = f"""
template <typename T> T keyed_normals(T position, T half, T code, T step, T key0, T key1) {{
    T block = half >> 1;
    {_CUDA_ROUNDS}
    double radius0 = sqrt(-2.0 * log((c0 + 0.5) / 4294967296.0)), radius1 = sqrt(-2.0 * log((c1 + 0.5) / 4294967296.0));
    double angle0 = 6.283185307179586 * ((c2 + 0.5) / 4294967296.0), angle1 = 6.283185307179586 * ((c3 + 0.5) / 4294967296.0);
    union {{ float values[2]; long long both; }} packed;
    packed.values[0] = (float)(radius0 * ((half & 1) ? sin(angle0) : cos(angle0)));
    packed.values[1] = (float)(radius1 * ((half & 1) ? sin(angle1) : cos(angle1)));
    return (T)packed.both;
}}
"""


class FusedDraws:
    """The same words and normals on CUDA, each draw in one kernel that torch compiles on first use."""

    def __init__(self) -> None:
        from torch.cuda.jiterator import _create_jit_fn

        self._word: Callable[..., Tensor] = _create_jit_fn(_CUDA_WORD, block=0, step=0, key0=0, key1=0)
        self._normals: Callable[..., Tensor] = _create_jit_fn(_CUDA_NORMALS, code=0, step=0, key0=0, key1=0)

    def first_words(self, positions: Tensor, codes: Tensor, step: int, seed: int) -> Tensor:
        """Word 0 of block 0, int64 (number of codes, B), for positions (1, B) and codes (number of codes, 1)."""
        return self._word(positions, codes, block=0, step=step, key0=seed & MASK, key1=seed >> 32 & MASK)

    def normals(self, positions: Tensor, blocks: int, code: int, step: int, seed: int) -> Tensor:
        """Four unit Gaussians a block, float32 (B, 4 blocks)."""
        halves = torch.arange(2 * blocks, dtype=torch.int64, device=positions.device)[None, :]
        options = {"code": code, "step": step, "key0": seed & MASK, "key1": seed >> 32 & MASK}
        return self._normals(positions[:, None], halves, **options).contiguous().view(torch.float32)


@functools.cache
def fused_draws(device: torch.device) -> FusedDraws | None:
    """Fused draws for a CUDA device; None where its kernels cannot be compiled or would give other words.

    Whoever gets None draws the same numbers with a hundred kernels instead of one.
    """
    row = torch.tensor([[0, 5, 2**31 + 1, 2**40 + 3]], device=device)
    codes, step, seed = torch.tensor([[7], [MASK]], device=device), 3, 2**64 - 5
    try:
        fused = FusedDraws()
        words, normals = fused.first_words(row, codes, step, seed), fused.normals(row[0], 2, 7, step, seed)
    except (RuntimeError, AssertionError, ImportError):  # no compiler for kernels, or a torch without them
        return None
    counter = (row >> 32 << 20, row & MASK, torch.full_like(row[:, :1], step), codes)
    expected = philox(counter, seed & MASK, seed >> 32)[0]
    return fused if torch.equal(words, expected) and bool(normals.isfinite().all()) else None
