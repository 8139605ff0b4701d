"""`fewstep.load_pipeline`: an exported generator as a diffusers pipeline with nothing to type, no steps, no guidance.

python examples/use_pipeline.py exported fox.png --prompt "a fox in the snow"
python examples/use_pipeline.py runs/quickstart shirt.png --label 0
"""

import argparse

import fewstep


def main(arguments: list[str] | None = None) -> None:
    """One picture of a prompt or of a class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="text-to-image: fewstep export --as diffusers; classes: that, or a run folder")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--label", type=int, default=0)
    args = parser.parse_args(arguments)
    pipe = fewstep.load_pipeline(args.folder)
    output = pipe(args.prompt) if args.prompt else pipe(num_images=1, class_labels=[args.label])
    output.images[0].save(args.picture)


if __name__ == "__main__":
    main()
