"""Every random number of a run, computed from (seed, step, purpose, global sample index) and nothing else.

A sample therefore does not depend on the batch, device or number of processes it is drawn in, and a resumed run
needs no generator state. The counter-based generator is Philox4x32-10, vectorised over the whole draw.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Purpose = Literal[
    "generator_noise", "generator_label", "pair_order", "pair_noise", "pair_label", "data_order", "data_flip", "label_dropout",
    "dm_level", "dm_noise", "gan_level", "gan_noise", "fake_level", "fake_noise",
    "disc_level_real", "disc_noise_real", "disc_level_generated", "disc_noise_generated",
    "simulated_step", "simulation_noise",
    "pretrain_level", "pretrain_noise", "encoder_noise", "sample_noise", "sample_label", "diagnostic_noise", "global_state",
]  # fmt: skip

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Draws:
    """The draws of one step for the samples at `positions`.

    Attributes:
        seed: the run's seed, 0 <= seed < 2**64; or one a sample, B of them.
        step: training step, or any other 32-bit number that separates draws.
        positions: global sample indices of this batch, (B,), int64, on the device to draw on.
    """

    seed: int | tuple[int, ...]
    step: int
    positions: Tensor

    @classmethod
    def of_batch(
        cls, seed: int, step: int, batch_size: int, device: torch.device | str = "cpu", first: int = 0
    ) -> "Draws":
        """Draws of the samples first..first + batch_size - 1."""
        return cls(seed, step, torch.arange(first, first + batch_size, dtype=torch.int64, device=device))

    def normal(self, purpose: Purpose, shape: tuple[int, ...], number: int = 0) -> Tensor:
        """Unit Gaussian, (B, *shape), float32; `number` tells several of one purpose apart."""
        count = math.prod(shape)
        blocks = -(-count // 4)
        words = self._words(purpose, blocks, number).double()
        uniform = (words + 0.5) / 2**32
        radius = torch.sqrt(-2 * torch.log(uniform[0:2]))
        angle = 2 * math.pi * uniform[2:4]
        values = torch.stack([radius * angle.cos(), radius * angle.sin()]).flatten(0, 1)  # (4, B, blocks)
        values = values.permute(1, 2, 0).reshape(len(self.positions), blocks * 4)[:, :count]
        return values.float().reshape(-1, *shape)

    def uniform(self, purpose: Purpose) -> Tensor:
        """Uniform in (0, 1), (B,), float32."""
        return ((self._words(purpose, 1)[0, :, 0] >> 9).float() + 0.5) / 2**23

    def integers(self, purpose: Purpose, low: int, high: int) -> Tensor:
        """Uniform over low..high - 1, (B,), int64 (bias below 2^-32 (high - low))."""
        words = self._words(purpose, 1)[0, :, 0]
        return low + ((words * (high - low)) >> 32)

    def shared_integer(self, purpose: Purpose, high: int) -> int:
        """One number in 0..high - 1 that is the same for every sample and every process."""
        if not isinstance(self.seed, int):
            raise ValueError("a number that all samples share needs one seed for all")
        one = Draws(self.seed, self.step, torch.zeros(1, dtype=torch.int64))
        return int(one.integers(purpose, 0, high))

    def _words(self, purpose: Purpose, blocks: int, number: int = 0) -> Tensor:
        """32-bit words, int64 (4, B, blocks), for counter (block, position, step, purpose and number) and key = seed."""
        if purpose not in get_args(Purpose):
            raise ValueError(f"unknown purpose {purpose!r}: add it to draws.Purpose")
        name = f"{purpose}_{number}" if number else purpose
        device = self.positions.device
        block = torch.arange(blocks, dtype=torch.int64, device=device)[None, :]
        position = self.positions[:, None]
        shape = (len(self.positions), blocks)
        counter = [
            (block | (position >> 32) << 20).expand(shape),  # a sample has under 2^20 blocks, a run under 2^44 samples
            (position & _MASK).expand(shape),
            torch.full(shape, self.step & _MASK, dtype=torch.int64, device=device),
            torch.full(shape, zlib.crc32(name.encode()), dtype=torch.int64, device=device),
        ]
        return torch.stack(_philox(counter, self._key(0), self._key(32)))

    def _key(self, shift: int) -> int | Tensor:
        """32 bits of the seed, from bit `shift` on; with one seed a sample a column (B, 1)."""
        if isinstance(self.seed, int):
            return self.seed >> shift & _MASK
        words = [seed >> shift & _MASK for seed in self.seed]
        return torch.tensor(words, dtype=torch.int64, device=self.positions.device)[:, None]


def _philox(counter: list[Tensor], key0: int | Tensor, key1: int | Tensor) -> list[Tensor]:
    """Philox4x32 with 10 rounds on int64 tensors holding 32-bit words.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; split so that no int64 overflows."""
    low_half = word * (constant & 0xFFFF)  # < 2^48
    high_half = word * (constant >> 16)  # < 2^48
    middle = high_half + (low_half >> 16)  # < 2^49
    low = ((middle & 0xFFFF) << 16) | (low_half & 0xFFFF)
    return middle >> 16, low
