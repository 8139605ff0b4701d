"""Write a generator in every form it can have: diffusers pipeline, network, LoRA, kohya LoRA, single file, EDM pickle.

python examples/export_generator.py runs/my_run exported --dtype fp16
"""

import argparse
from pathlib import Path

import fewstep
from fewstep.errors import UserError
from fewstep.export.export import KINDS


def main(arguments: list[str] | None = None) -> None:
    """One folder a form; what a generator cannot be is said, with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", help="run folder or generator folder")
    parser.add_argument("out", type=Path, help="folder of the exports")
    parser.add_argument("--dtype", default="", help="fp16, bf16 or fp32")
    parser.add_argument("--samples", type=int, default=4, help="sample pictures in each model card")
    args = parser.parse_args(arguments)
    for kind in KINDS:
        options = fewstep.ExportOptions(kind=kind, precision=args.dtype, num_samples=args.samples)
        try:
            print(fewstep.export_generator(args.generator, args.out / kind, options))
        except UserError as reason:
            print(f"not as {kind}: {reason}")


if __name__ == "__main__":
    main()
