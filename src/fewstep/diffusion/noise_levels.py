"""Noise schedules: what "level" means for a model, and the grid of levels it is trained and sampled on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it broadcasts over the trailing dimensions of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class NoiseSchedule(ABC):
    """alpha(level) and sigma(level) of `noisy = alpha x0 + sigma noise`, and a grid of `num_levels` levels."""

    num_levels: int

    @abstractmethod
    def alpha(self, level: Tensor) -> Tensor:
        """Signal scale, (B,), float32."""

    @abstractmethod
    def sigma(self, level: Tensor) -> Tensor:
        """Noise standard deviation, (B,), float32."""

    @property
    @abstractmethod
    def grid(self) -> Tensor:
        """The levels, (num_levels,), from the least noisy (index 0) to the noisiest."""

    @abstractmethod
    def initial(self, noise: Tensor, level: Tensor) -> Tensor:
        """How unit noise (B, C, H, W) enters a generator conditioned at `level` (B,)."""

    def at(self, index: Tensor) -> Tensor:
        """Levels (B,) at integer grid indices (B,)."""
        return self._grid_on(index.device)[index]

    def expanded(self, index: int, batch_size: int, device: torch.device) -> Tensor:
        """The level at one grid index for a whole batch, (B,)."""
        return self._grid_on(device)[index].expand(batch_size)

    def _grid_on(self, device: torch.device) -> Tensor:
        """The grid, copied to a device once: a copy in every step would make the host wait."""
        grids: dict[torch.device, Tensor] = self.__dict__.setdefault("_grids", {})
        if device not in grids:
            grids[device] = self.grid.to(device)
        return grids[device]

    def add_noise(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """alpha(level) x0 + sigma(level) noise."""
        return per_sample(self.alpha(level), x0) * x0 + per_sample(self.sigma(level), x0) * noise


@dataclass(frozen=True)
class KarrasSchedule(NoiseSchedule):
    """EDM's variance-exploding schedule: the level is sigma itself and alpha is 1.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 5; the grid runs from small to large sigma.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    num_levels: int = 1000

    @cached_property
    def _grid(self) -> Tensor:
        return karras_sigmas(self.num_levels, self.sigma_min, self.sigma_max, self.rho).float()

    @property
    def grid(self) -> Tensor:
        return self._grid

    def alpha(self, level: Tensor) -> Tensor:
        return torch.ones_like(level)

    def sigma(self, level: Tensor) -> Tensor:
        return level

    def initial(self, noise: Tensor, level: Tensor) -> Tensor:
        return per_sample(level, noise) * noise


def karras_sigmas(num_levels: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """sigma_i = (sigma_min^(1/rho) + i/(N-1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, (N,), float64, ascending; N = 1 is sigma_max."""
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64) if num_levels > 1 else torch.ones(1).double()
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + ramp * (high - low)) ** rho
