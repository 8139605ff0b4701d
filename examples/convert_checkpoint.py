"""Other tools' weights become a folder to sample, train and export from; nothing in the file is executed.

python examples/convert_checkpoint.py edm-imagenet-64x64-cond-adm.pkl teachers/imagenet64
python examples/convert_checkpoint.py lora.safetensors runs/theirs --base BASE --steps 999 749 499 249
"""

import argparse

import fewstep


def main(arguments: list[str] | None = None) -> None:
    """Convert one file or folder and say what it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="EDM .pkl, DMD2 folder, U-Net file, LoRA or single-file checkpoint")
    parser.add_argument("out", help="new folder")
    parser.add_argument(
        "--base", default="", help="text-to-image: diffusers folder or hub id of the model it belongs to"
    )
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="grid indices a generator runs at")
    args = parser.parse_args(arguments)
    print(fewstep.convert_weights(args.source, args.out, base=args.base, step_indices=args.steps))


if __name__ == "__main__":
    main()
