"""An exported LoRA on its base model in stock diffusers (SD and SDXL); fewstep is not imported.

fewstep export runs/my_lora_run exported --as lora
python examples/use_lora_in_diffusers.py stabilityai/stable-diffusion-xl-base-1.0 exported "a fox" fox.png
"""

import argparse

import torch
from diffusers import DiffusionPipeline, LCMScheduler


def main(arguments: list[str] | None = None) -> None:
    """One picture: base, LoRA, and the scheduler beside the LoRA, which knows its steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the teacher: diffusers folder or hub id")
    parser.add_argument("lora", help="folder written by fewstep export --as lora")
    parser.add_argument("prompt")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--steps", type=int, default=4, help="those the generator was trained for")
    args = parser.parse_args(arguments)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(args.base).to(device, dtype)
    pipe.load_lora_weights(args.lora, weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = LCMScheduler.from_pretrained(args.lora, subfolder="scheduler")  # SD 3: FlowMatchLCMScheduler
    pipe(args.prompt, num_inference_steps=args.steps, guidance_scale=1).images[0].save(args.picture)


if __name__ == "__main__":
    main()
