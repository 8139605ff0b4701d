"""An exported text-to-image generator in stock diffusers; fewstep is not imported.

fewstep export runs/my_sdxl_run exported --as diffusers
python examples/use_in_diffusers.py exported "a fox in the snow" fox.png --steps 4
"""

import argparse

import torch
from diffusers import DiffusionPipeline


def main(arguments: list[str] | None = None) -> None:
    """One picture; the timesteps come from the scheduler's config, only their number is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="written by fewstep export --as diffusers, or a hub id")
    parser.add_argument("prompt")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--steps", type=int, default=4, help="those the generator was trained for")
    args = parser.parse_args(arguments)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(args.folder).to(device, dtype)
    # guidance_scale=1: the teacher's guidance is in the weights already
    pipe(args.prompt, num_inference_steps=args.steps, guidance_scale=1).images[0].save(args.picture)


if __name__ == "__main__":
    main()
