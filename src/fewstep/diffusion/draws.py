"""Every random number of a run, computed from (seed, step, purpose, global sample index) and nothing else.

A sample therefore does not depend on the batch, device or number of processes it is drawn in, and a resumed run
needs no generator state. The counter-based generator is Philox4x32-10, vectorised over the whole draw: in numpy on the
CPU, in torch elsewhere, in one fused kernel on CUDA. All give the same words.
"""

import math
import zlib
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.philox import MASK, FusedDraws, fused_draws, philox
from fewstep.diffusion.precision import has_float64

Purpose = Literal[
    "generator_noise", "generator_label", "pair_order", "pair_noise", "pair_label", "data_order", "data_flip", "label_dropout",
    "dm_level", "dm_noise", "gan_level", "gan_noise", "fake_level", "fake_noise",
    "disc_level_real", "disc_noise_real", "disc_level_generated", "disc_noise_generated",
    "simulated_step", "simulation_noise",
    "pretrain_level", "pretrain_noise", "encoder_noise", "sample_noise", "sample_label", "diagnostic_noise", "global_state",
]  # fmt: skip

_MANY = 1024  # samples; above it one purpose's first words are drawn alone


@dataclass(frozen=True)
class Draws:
    """The draws of one step for the samples at `positions`.

    Attributes:
        seed: the run's seed, 0 <= seed < 2**64; or one a sample, B of them.
        step: training step, or any other 32-bit number that separates draws.
        positions: global sample indices of this batch, (B,), int64, on the device to draw on.
        host: the same in host memory, where that is another device and they are known there.
    """

    seed: int | tuple[int, ...]
    step: int
    positions: Tensor
    host: Tensor | None = None

    @classmethod
    def of_batch(
        cls, seed: int, step: int, batch_size: int, device: torch.device | str = "cpu", first: int = 0
    ) -> "Draws":
        """Draws of the samples first..first + batch_size - 1."""
        host = torch.arange(first, first + batch_size, dtype=torch.int64)
        if torch.device(device).type == "cpu":
            return cls(seed, step, host)
        return cls(seed, step, torch.arange(first, first + batch_size, dtype=torch.int64, device=device), host)

    def part(self, rows: slice | Tensor) -> "Draws":
        """The draws of some of the samples: a range, or indices int64 (n,) in host memory."""
        chosen = rows if isinstance(rows, slice) else rows.to(self.positions.device, non_blocking=True)
        return replace(self, positions=self.positions[chosen], host=None if self.host is None else self.host[rows])

    def on_host(self) -> "Draws":
        """The same draws in host memory; nothing waits for the device where `of_batch` made these."""
        if self.positions.device.type == "cpu":
            return self
        return replace(self, positions=self.positions.cpu() if self.host is None else self.host, host=None)

    def normal(self, purpose: Purpose, shape: tuple[int, ...], number: int = 0) -> Tensor:
        """Unit Gaussian, (B, *shape), float32; `number` tells several of one purpose apart."""
        if not has_float64(self.positions.device):
            return self.on_host().normal(purpose, shape, number).to(self.positions.device)
        count, code = math.prod(shape), _code(purpose, number)
        blocks, fused = -(-count // 4), self._fused()
        if fused is not None and isinstance(self.seed, int):
            values = fused.normals(self.positions, blocks, code, self.step & MASK, self.seed)
        else:
            values = _box_muller(self._words(code, blocks))
        return values.reshape(len(self.positions), blocks * 4)[:, :count].reshape(-1, *shape)

    def uniform(self, purpose: Purpose) -> Tensor:
        """Uniform in (0, 1), (B,), float32."""
        return ((self._first_word(purpose) >> 9).float() + 0.5) / 2**23

    def integers(self, purpose: Purpose, low: int, high: int) -> Tensor:
        """Uniform over low..high - 1, (B,), int64 (bias below 2^-32 (high - low))."""
        return low + ((self._first_word(purpose) * (high - low)) >> 32)

    def shared_integer(self, purpose: Purpose, high: int) -> int:
        """One number in 0..high - 1 that is the same for every sample and every process."""
        if not isinstance(self.seed, int):
            raise ValueError("a number that all samples share needs one seed for all")
        one = Draws(self.seed, self.step, torch.zeros(1, dtype=torch.int64))
        return int(one.integers(purpose, 0, high))

    def _first_word(self, purpose: Purpose) -> Tensor:
        """The first 32-bit word of a purpose for every sample, int64 (B,)."""
        if not has_float64(self.positions.device):
            return self.on_host()._first_word(purpose).to(self.positions.device)
        code = _code(purpose, 0)
        if len(self.positions) > _MANY:
            return self._words(code, 1)[0][:, 0]
        return self._first_words[list(_CODES.values()).index(code)]

    @cached_property
    def _first_words(self) -> Tensor:
        """The first words of all purposes, int64 (purposes, B), in one pass: for a small batch it costs what one would."""
        step, fused, codes = self.step & MASK, self._fused(), _codes_on(self.positions.device)
        if fused is not None and isinstance(self.seed, int):
            return fused.first_words(self.positions[None, :], codes, step, self.seed)
        if self._in_numpy():
            words = _philox_words(np, self.positions.numpy()[None, :], 1, codes.numpy(), step, self.seed)
            return torch.from_numpy(words[0])
        return _philox_words(torch, self.positions[None, :], 1, codes, step, self.seed)[0]

    def _words(self, code: int, blocks: int) -> tuple[Tensor, ...]:
        """Four 32-bit words, each int64 (B, blocks), for counter (block, position, step, code) and key = seed."""
        step = self.step & MASK
        if not self._in_numpy():
            return _philox_words(torch, self.positions[:, None], blocks, code, step, self.seed)
        words = _philox_words(np, self.positions.numpy()[:, None], blocks, code, step, self.seed)
        return tuple(torch.from_numpy(word) for word in words)

    def _in_numpy(self) -> bool:
        """Whether the positions are plain memory of this machine (a rehearsal has fake ones)."""
        return type(self.positions) is Tensor and self.positions.device.type == "cpu"

    def _fused(self) -> FusedDraws | None:
        plain = type(self.positions) is Tensor and self.positions.is_cuda
        return fused_draws(self.positions.device) if plain else None


_CODES: dict[str, int] = {purpose: zlib.crc32(purpose.encode()) for purpose in get_args(Purpose)}


@cache
def _codes_on(device: torch.device) -> Tensor:
    """All codes, (purposes, 1), copied to a device once: a copy in every step would make the host wait."""
    return torch.tensor(list(_CODES.values()), device=device)[:, None]


def _code(purpose: Purpose, number: int) -> int:
    """The 32 bits that stand for a purpose in the counter."""
    if purpose not in _CODES:
        raise ValueError(f"unknown purpose {purpose!r}: add it to draws.Purpose")
    return zlib.crc32(f"{purpose}_{number}".encode()) if number else _CODES[purpose]


def _philox_words(library: Any, position: Any, blocks: int, code: Any, step: int, seed: int | tuple[int, ...]) -> Any:
    """Four arrays of numpy or torch (`library`), of the shape that position, blocks in a row and code broadcast to."""
    place = {"device": position.device} if library is torch else {}

    def constant(value: int) -> Any:
        return library.full((1, 1), value, dtype=library.int64, **place)

    block = library.arange(blocks, dtype=library.int64, **place)[None, :]
    # a sample has under 2^20 blocks, a run under 2^44 samples
    high = block | position >> 32 << 20
    counter = (high, position & MASK, constant(step), constant(code) if isinstance(code, int) else code)
    if isinstance(seed, int):
        return philox(counter, seed & MASK, seed >> 32 & MASK)
    keys = ([number >> shift & MASK for number in seed] for shift in (0, 32))
    return philox(counter, *(library.asarray(key, **place).reshape(position.shape) for key in keys))


def _box_muller(words: tuple[Tensor, ...]) -> Tensor:
    """Four unit Gaussians, float32 (B, blocks, 4), from four words."""
    radius, angle = (torch.empty(2, *words[0].shape, dtype=torch.float64, device=words[0].device) for _ in range(2))
    for place, word in zip((*radius, *angle), words, strict=True):
        place.copy_(word)
    radius.add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle.add_(0.5).mul_(2 * math.pi * 2**-32)
    values = torch.empty(*words[0].shape, 4, dtype=torch.float32, device=words[0].device)
    for number, part in enumerate((*(radius * angle.cos()), *(radius * angle.sin_()))):
        values[..., number] = part
    return values
