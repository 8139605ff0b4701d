"""Pictures from a generator in its own one to four steps, by prompt or by class.

python examples/sample_generator.py runs/quickstart clothes.png --labels 0 1 2 3
python examples/sample_generator.py runs/my_sdxl_run fox.png --prompts "a fox in the snow" "a red cat"
"""

import argparse
from pathlib import Path

import fewstep
from fewstep.formats.pixels import save_grid


def main(arguments: list[str] | None = None) -> None:
    """One grid; picture i depends on the seed, i and its prompt or label, never on the batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", help="run folder or generator folder")
    parser.add_argument("grid", type=Path, help="PNG to write")
    parser.add_argument("--prompts", nargs="+", default=[], help="of a text-to-image generator")
    parser.add_argument("--labels", type=int, nargs="+", default=[0], help="of a class-conditional generator")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    generator = fewstep.load_generator(args.generator)
    images = generator.sample(args.prompts or args.labels, seed=args.seed, output="tensor")
    save_grid(args.grid, images, columns=len(images))  # images: (N, C, H, W) in [-1, 1]
    print(f"{args.grid}: {len(images)} pictures, {generator.evaluations()} evaluations each")


if __name__ == "__main__":
    main()
