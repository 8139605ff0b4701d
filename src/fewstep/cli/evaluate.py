"""`fewstep evaluate`: one figure with everything beside it."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device, Precision, read_prompts, refuse_many, starting


def evaluate(
    model: Annotated[str, typer.Argument(help="generator or teacher: model folder, run folder, .pkl or bundled:NAME")],
    *,
    features: Annotated[str, typer.Option(help="bundled:NAME, folder of `prepare features`, folder of a DINOv2 of transformers, or an Inception .pth/.safetensors")],
    protocol: Annotated[str, typer.Option(help="imagenet64-edm, coco30k-256, coco10k-512, cifar10-50k, or custom, which pins nothing")] = "custom",
    reference: Annotated[Path | None, typer.Option(help=".npz with mu and sigma of real features")] = None,
    images: Annotated[str, typer.Option(help="real pictures (folder, parquet, hub id): reference, and KID, precision, recall, density and coverage")] = "",
    split: Annotated[str, typer.Option(help="split of the real pictures")] = "train",
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    background: Annotated[str, typer.Option(help="colour under transparent pixels, as CSS names it")] = "white",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="compute the features of real pictures anew, and keep none in ~/.cache/fewstep")] = False,
    prompts: Annotated[str, typer.Option(help="text-to-image models: file of prompts, taken in turn")] = "",
    clip: Annotated[str, typer.Option(help="text-to-image models: CLIP score by this CLIP (folder with safetensors, or hub id)")] = "",
    clip_prefix: Annotated[str | None, typer.Option(help='before every prompt that --clip reads  \\[default: the protocol\'s, COCO "A photo depicts "; else none]')] = None,
    lpips: Annotated[tuple[Path, Path] | None, typer.Option(help="LPIPS diversity over 4 seeds of each prompt or class, beside the teacher's: files of VGG16 and of the LPIPS heads")] = None,
    diversity_prompts: Annotated[int, typer.Option(min=2, help="with --lpips: prompts, or classes, in turn")] = 100,
    teacher: Annotated[str, typer.Option(help="with --lpips: the teacher beside a generator  \\[default: the one its card names]")] = "",
    captions: Annotated[Path | None, typer.Option(help="COCO protocols: captions_val2014.json; its pictures are in --images")] = None,
    num_images: Annotated[int | None, typer.Option(min=2, help="generated pictures, labels evenly spread  \\[default: the protocol's, else 50000]")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="seed of the generated pictures")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures made at once  \\[default: 64, text-to-image 4]")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="for teachers: steps of the model's own many-step sampler; its usual number unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: 1 is off; the model's usual scale unless set")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the figure with all its conditions here")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="MODEL is a run folder: score each new checkpoint once, average and raw weights, until the run ends; --json then names the file of all figures  \\[default: RUN/evaluation.json]")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:  # fmt: skip
    """Frechet distance between generated and real pictures in a named feature network; with --images KID, precision, recall, density, coverage, too; with --clip the CLIP score."""
    if watch:
        refuse_many("evaluate --watch")
    with starting():
        from fewstep.evaluation.evaluate import EvaluateOptions, evaluate_model
    options = EvaluateOptions(
        features=features, protocol=protocol, captions=captions, reference=reference, images=images, split=split, fit=fit, background=background, cache=not no_cache,
        prompts=tuple(read_prompts([], prompts)), clip=clip, clip_prefix=clip_prefix, lpips=lpips, diversity_prompts=diversity_prompts, teacher=teacher,
        num_images=num_images, seed=seed, batch_size=batch_size,
        teacher_steps=teacher_steps, guidance_scale=guidance_scale, json_out=json_out, device=device, precision=precision,
    )  # fmt: skip
    if not watch:
        evaluate_model(model, options)
        return
    with starting():
        from fewstep.training.scoring import watch_run
    watch_run(model, options)
