"""The levels a generator is run at: grid indices that travel with its weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSchedule:
    """Grid indices in the order they are used, noisiest first: (999,) or (999, 749, 499, 249).

    The generator predicts x0 at each index; between two steps fresh noise is added down to the next level.
    """

    indices: tuple[int, ...]
    num_levels: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(int(index) for index in self.indices))
        if not self.indices:
            raise ValueError("generator.step_indices is empty: name at least one grid index, e.g. [999]")
        wrong = [index for index in self.indices if not 0 <= index < self.num_levels]
        if wrong:
            raise ValueError(f"generator.step_indices {wrong} lie outside 0..{self.num_levels - 1}")
        if list(self.indices) != sorted(set(self.indices), reverse=True):
            raise ValueError(f"generator.step_indices {list(self.indices)} must fall strictly, noisiest first")

    def __len__(self) -> int:
        return len(self.indices)
