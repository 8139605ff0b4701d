"""Noise schedules: what "level" means for a model, and the grid of levels it is trained and sampled on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.precision import has_float64


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
        """How unit noise (B, ...) enters a generator conditioned at `level` (B,)."""

    def at(self, index: Tensor) -> Tensor:
        """Levels (B,) at integer grid indices (B,)."""
        return self._grid_on(index.device)[index]

    def travelling(self, indices: tuple[int, ...]) -> tuple[float, ...]:
        """The levels at grid indices that a generator keeps beside its weights; none of a grid that is the model's for good."""
        return ()

    def expanded(self, index: int, batch_size: int, device: torch.device) -> Tensor:
        """The level at one grid index for a whole batch, (B,)."""
        return self._grid_on(device)[index].expand(batch_size)

    def _grid_on(self, device: torch.device) -> Tensor:
        """The grid, copied to a device once: a copy in every step would make the host wait."""
        if device not in self._grids:
            self._grids[device] = self.grid.to(device)
        return self._grids[device]

    @cached_property
    def _grids(self) -> dict[torch.device, Tensor]:
        return {}

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


class DiscreteSchedule(NoiseSchedule):
    """A variance-preserving schedule over integer timesteps: the level is the timestep itself.

    alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod). Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.

    Args:
        alphas_cumprod: (T,), falling, in [0, 1); kept in float64.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        cumprod = alphas_cumprod.detach().double().cpu()
        self.num_levels = len(cumprod)
        self._alphas, self._sigmas = cumprod.sqrt(), (1 - cumprod).sqrt()
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def _grid(self) -> Tensor:
        return torch.arange(self.num_levels, device="cpu")

    @property
    def grid(self) -> Tensor:
        return self._grid

    @property
    def has_signal_everywhere(self) -> bool:
        """False for zero-terminal-SNR schedules, whose last alpha is 0."""
        return bool(self._alphas[-1] > 0)

    def alpha(self, level: Tensor) -> Tensor:
        return self.alpha64(level).float()

    def sigma(self, level: Tensor) -> Tensor:
        return self.sigma64(level).float()

    def alpha64(self, level: Tensor) -> Tensor:
        """`alpha` in float64 where the device has it, for conversions that divide by it."""
        return self._table("alpha", self._alphas, level.device)[level.long()]

    def sigma64(self, level: Tensor) -> Tensor:
        """`sigma` in float64 where the device has it."""
        return self._table("sigma", self._sigmas, level.device)[level.long()]

    def initial(self, noise: Tensor, level: Tensor) -> Tensor:
        return noise

    def _table(self, name: str, values: Tensor, device: torch.device) -> Tensor:
        if (name, device) not in self._tables:
            exact = values if has_float64(device) else values.float()
            self._tables[name, device] = exact.to(device)
        return self._tables[name, device]


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Straight paths from image to noise: the level is t in (0, 1], alpha = 1 - t, sigma = t.

    The grid is t_i = s u / (1 + (s - 1) u) at u = (i + 1) / T, s the shift of the model's scheduler.
    Source: Esser et al. 2024 (arXiv:2403.03206), eq. 23.
    """

    shift: float = 1.0
    num_levels: int = 1000

    @cached_property
    def _grid(self) -> Tensor:
        u = torch.arange(1, self.num_levels + 1, dtype=torch.float64, device="cpu") / self.num_levels
        return (self.shift * u / (1 + (self.shift - 1) * u)).float()

    @property
    def grid(self) -> Tensor:
        return self._grid

    def travelling(self, indices: tuple[int, ...]) -> tuple[float, ...]:
        # the grid's numbers without its tensor, which has none where a run is rehearsed without memory
        us = [(index + 1) / self.num_levels for index in indices]
        return tuple(float(np.float32(self.shift * u / (1 + (self.shift - 1) * u))) for u in us)

    def alpha(self, level: Tensor) -> Tensor:
        return 1 - level

    def sigma(self, level: Tensor) -> Tensor:
        return level

    def initial(self, noise: Tensor, level: Tensor) -> Tensor:
        return noise


def karras_sigmas(num_levels: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """sigma_i = (sigma_min^(1/rho) + i/(N-1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, (N,), float64, ascending; N = 1 is sigma_max."""
    with torch.device("cpu"):  # numbers, also where networks are built on the meta device
        ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64) if num_levels > 1 else torch.ones(1).double()
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + ramp * (high - low)) ** rho


@dataclass(frozen=True)
class StepSchedule:
    """Grid indices in the order they are used, noisiest first: (999,) or (999, 749, 499, 249).

    The generator predicts x0 at each index; between two steps fresh noise is added down to the next level.

    Attributes:
        sigmas: of generators of flow models, their exact noise levels, one an index, as they travel with the weights: the
            grid they were taken from depends on the latents' size. Empty: the teacher's grid at the indices.
    """

    indices: tuple[int, ...]
    num_levels: int = 1000
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(int(index) for index in self.indices))
        if not self.indices:
            raise ValueError("generator.step_indices is empty: name at least one grid index, e.g. [999]")
        wrong = [index for index in self.indices if not 0 <= index < self.num_levels]
        if wrong:
            raise ValueError(f"generator.step_indices {wrong} lie outside 0..{self.num_levels - 1}")
        if list(self.indices) != sorted(set(self.indices), reverse=True):
            raise ValueError(f"generator.step_indices {list(self.indices)} must fall strictly, noisiest first")
        sigmas = list(self.sigmas)
        if sigmas and (len(sigmas) != len(self) or sigmas != sorted(set(sigmas), reverse=True)):
            raise ValueError(f"the noise levels {sigmas} are not one a step, noisiest first")
        if sigmas and not 0 < sigmas[-1] <= sigmas[0] <= 1:
            raise ValueError(f"the noise levels {sigmas} do not lie in (0, 1]")

    @classmethod
    def on(cls, schedule: NoiseSchedule, indices: tuple[int, ...]) -> "StepSchedule":
        """Steps on a teacher's grid, with what of its levels travels with a generator; raises ValueError as the class does."""
        steps = cls(indices, schedule.num_levels)
        return replace(steps, sigmas=schedule.travelling(steps.indices))

    def level(self, schedule: NoiseSchedule, number: int, batch_size: int, device: torch.device) -> Tensor:
        """The noise level of step `number` (from 0) for a whole batch, (B,)."""
        if self.sigmas:
            return torch.full((batch_size,), self.sigmas[number], device=device)
        return schedule.expanded(self.indices[number], batch_size, device)

    def levels(self, schedule: NoiseSchedule, device: torch.device) -> Tensor:
        """The noise levels of all steps, (n,)."""
        return torch.cat([self.level(schedule, number, 1, device) for number in range(len(self))])

    def __len__(self) -> int:
        return len(self.indices)
