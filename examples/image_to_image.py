"""Repaint a picture with an exported few-step generator, in stock diffusers.

python examples/image_to_image.py exported photo.png "a fox in the snow, oil painting" painted.png --strength 0.5
"""

import argparse

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image


def main(arguments: list[str] | None = None) -> None:
    """The picture is noised to the level of one of the generator's steps and taken from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="written by fewstep export --as diffusers")
    parser.add_argument("source", help="the picture to start from")
    parser.add_argument("prompt")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--steps", type=int, default=4, help="those the generator was trained for")
    parser.add_argument("--strength", type=float, default=0.5, help="share of the steps that run: 1 is a new picture")
    args = parser.parse_args(arguments)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = AutoPipelineForImage2Image.from_pretrained(args.folder).to(device, dtype)
    with Image.open(args.source) as source:
        start = source.convert("RGB")
    options = {"strength": args.strength, "num_inference_steps": args.steps, "guidance_scale": 1}
    pipe(args.prompt, image=start, **options).images[0].save(args.picture)


if __name__ == "__main__":
    main()
