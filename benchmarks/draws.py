"""What the keyed draws of a training step take, and where: the words, torch's float64 functions, all of a draw, all of a step.

    OMP_NUM_THREADS=1 python benchmarks/draws.py
    OMP_NUM_THREADS=1 python benchmarks/draws.py --batch 8 --shape 3 64 64

Prints a line for each, as Markdown.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from fewstep.diffusion.draws import Draws, Purpose

# of the quick start's recipe; a draw of levels or labels goes with each
CRITICS: tuple[Purpose, ...] = ("generator_noise", "fake_noise", "disc_noise_real", "disc_noise_generated")
GENERATOR: tuple[Purpose, ...] = ("dm_noise", "gan_noise")
LEVELS: dict[Purpose, Purpose] = {
    "generator_noise": "generator_label", "fake_noise": "fake_level", "disc_noise_real": "disc_level_real",
    "disc_noise_generated": "disc_level_generated", "dm_noise": "dm_level", "gan_noise": "gan_level",
}  # fmt: skip


def main(words: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """As the module says; returns (least, median) milliseconds by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 32, 32])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(words)
    batch, shape = options.batch, tuple(options.shape)
    numbers = torch.rand(batch, *shape, dtype=torch.float64)  # half are radii, half angles
    radii, angles = numbers.flatten()[::2].contiguous(), numbers.flatten()[1::2].contiguous()

    def step(purposes: tuple[Purpose, ...]) -> None:
        draws = Draws.of_batch(0, 1, batch)
        for purpose in purposes:
            draws.normal(purpose, shape)
            draws.uniform(LEVELS[purpose])

    one = Draws.of_batch(0, 1, batch)
    blocks = -(-numbers[0].numel() // 4)
    work: dict[str, Callable[[], object]] = {
        "words of a draw": lambda: one._words(1, blocks),
        "log, root, sine and cosine of a draw": lambda: (radii.log(), radii.sqrt(), angles.sin(), angles.cos()),
        "a draw": lambda: one.normal("fake_noise", shape),
        "a step of the critics alone": lambda: step(CRITICS),
        "a step with the generator's": lambda: step(CRITICS + GENERATOR),
    }
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.repeats):  # in turns, so that other work on the machine meets all alike
        for name, do in work.items():
            began = time.perf_counter()
            do()
            found[name].append((time.perf_counter() - began) * 1e3)
    result = {name: (min(times), median(times)) for name, times in found.items()}
    print(f"| {batch} x {' x '.join(map(str, shape))}, ms | least | median of {options.repeats} |\n| --- | --- | --- |")
    for name, (least, middle) in result.items():
        print(f"| {name} | {least:.2f} | {middle:.2f} |")
    return result


if __name__ == "__main__":
    main()
