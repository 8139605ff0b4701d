"""Where a few-step generator begins: what the untrained teacher draws in the steps of a student, and how far that is from real pictures.

    python benchmarks/starts.py 999 700 600 500 400 "650 400" "999 749 499 249" --picture starts.png

A teacher of classes and a small feature network, by default the quick start's. No training: a minute tells which `generator.step_indices`
leave a student the shortest way. Prints a line for each, as Markdown.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.samplers import sample_generator
from fewstep.diffusion.schedules import StepSchedule
from fewstep.evaluation.bench import load_bench
from fewstep.evaluation.measure import measure_sampler
from fewstep.formats.bundled import bundled_path
from fewstep.formats.pixels import Block, save_comparison
from fewstep.models.load import load_teacher


def main(words: list[str] | None = None) -> dict[str, float]:
    """As the module says; returns the distances by steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "steps", nargs="+", metavar="INDICES", help='grid indices of one student, noisiest first: "650 400"'
    )
    parser.add_argument("--set", default="fashion-mnist", help="a bundled set of classes")
    parser.add_argument("--num-images", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="PNG of two pictures a class for each")
    options = parser.parse_args(words)
    teacher, bench = load_teacher(f"bundled:{options.set}", device="cpu"), load_bench(bundled_path(options.set))
    network, classes = teacher.denoiser, teacher.denoiser.num_classes
    found, pictures = dict[str, float](), dict[str, Tensor]()
    print(f"| steps | noise level of the first | distance ({options.num_images:,} images) |\n| --- | --- | --- |")
    for given in options.steps:
        steps = StepSchedule.on(network.noise_schedule, tuple(int(index) for index in given.split()))

        def sample(first: int, count: int, steps: StepSchedule = steps) -> Tensor:
            condition = Condition.from_labels(torch.arange(first, first + count) % classes, classes)
            return sample_generator(network, steps, condition, seed=options.seed, first=first)

        measured = measure_sampler(
            given, sample, bench.classifier, bench.reference, num_images=options.num_images,
            evaluations_per_image=len(steps), seed=options.seed,
        )  # fmt: skip
        level = float(steps.level(network.noise_schedule, 0, 1, torch.device("cpu")))
        found[given], pictures[given] = measured.frechet_distance, sample(0, 2 * classes).clamp(-1, 1)
        print(f"| {given} | {level:.3g} | {measured.frechet_distance:.2f} |", flush=True)
    if options.picture:
        names = list(teacher.card.class_names or map(str, range(classes)))
        save_comparison(options.picture, [Block(names, pictures)])
    return found


if __name__ == "__main__":
    main()
