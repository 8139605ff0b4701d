"""`fewstep sample`: pictures of a generator or a teacher."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import AnyPrecision, Device, read_prompts, starting


def sample(
    model: Annotated[str, typer.Argument(help="generator or teacher: model folder, run folder, .pkl or bundled:NAME")],
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="text-to-image models: what to show; may be given several times")] = None,
    prompts: Annotated[str, typer.Option(help="file of prompts: .txt (one a line), .parquet, .jsonl, .csv, .pkl list")] = "",
    labels: Annotated[str, typer.Option(help="class-conditional models: class numbers, e.g. 0,3,5-8, or a file of them; default: all in turn")] = "",
    num_images: Annotated[int | None, typer.Option(min=1, help="number of pictures, prompts or labels taking turns  \\[default: one a prompt or label, else 16]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="picture i depends on the seed, i and its prompt or label only  \\[default: 0]")] = None,
    seeds: Annotated[str, typer.Option(help="several seeds, e.g. 1,2,5-8: each prompt or label once with each; the picture that --seed makes first")] = "",
    first: Annotated[int, typer.Option(min=0, help="number of the first picture: 16 makes pictures 16, 17, ... of the seed")] = 0,
    size: Annotated[str, typer.Option(help="text-to-image models: HEIGHTxWIDTH in pixels, or the side of a square; a generator is at its best at the size it was trained for, the default")] = "",
    negative_prompt: Annotated[str | None, typer.Option(help="for text-to-image teachers: what guidance leads away from")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures made at once; does not change them  \\[default: 64, text-to-image 4]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for one PNG a picture, which says how it was made")] = None,
    grid: Annotated[Path | None, typer.Option(help="one PNG with all pictures; with --seeds a row for each prompt or label")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="for teachers: steps of the model's own many-step sampler; its usual number unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: uncond + w (cond - uncond); 1 is off; the model's usual scale unless set")] = None,
    tiny_vae: Annotated[str, typer.Option("--tiny-vae", help="decode with a TAESD: diffusers folder or hub id, e.g. madebyollin/taesdxl")] = "",
    lora: Annotated[list[str] | None, typer.Option(help="text-to-image teachers: merge FILE:0.8 into it, as teacher.loras does; may be given several times")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network: a slow first batch, then faster ones")] = False,
    device: Device = "auto",
    precision: AnyPrecision = "auto",
) -> None:  # fmt: skip
    """Make pictures with a generator (in its own few steps) or a teacher."""
    with starting():
        from fewstep.models.sampling import SampleOptions, sample_pictures
    options = SampleOptions(
        prompts=tuple(read_prompts(prompt or [], prompts)), labels=labels, num_images=num_images, seed=seed,
        seeds=seeds, first=first, size=size, negative_prompt=negative_prompt, batch_size=batch_size, out=out, grid=grid,
        teacher_steps=teacher_steps, guidance_scale=guidance_scale, tiny_vae=tiny_vae, compile=compiled, loras=tuple(lora or ()),
        device=device,
        precision=precision,
    )  # fmt: skip
    sample_pictures(model, options)
