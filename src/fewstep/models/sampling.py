"""`fewstep sample` from its options on: load, make pictures batch by batch, write them, say how fast."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.devices import compile_denoiser, precision_of
from fewstep.errors import UserError, first_line
from fewstep.models.load import load_model
from fewstep.models.model import Model
from fewstep.models.picture_list import (
    Picture,
    PictureList,
    list_pictures,
    parse_size,
    read_labels,
    read_seeds,
    wishes_of,
)
from fewstep.models.picture_writer import PictureWriter, Speed
from fewstep.progress import Stderr, busy, say, working

console = Stderr()


@dataclass(frozen=True)
class SampleOptions:
    """The options of `fewstep sample`, as its help says; empty text and None are "not given"."""

    prompts: tuple[str, ...] = ()
    labels: str = ""
    num_images: int | None = None
    seed: int | None = None
    seeds: str = ""
    first: int = 0
    size: str = ""
    negative_prompt: str | None = None
    batch_size: int | None = None
    out: Path | None = None
    grid: Path | None = None
    teacher_steps: int | None = None
    guidance_scale: float | None = None
    tiny_vae: str = ""
    compile: bool = False
    loras: tuple[str, ...] = ()
    device: str = "auto"
    precision: str = "auto"


def sample_pictures(source: str, options: SampleOptions) -> None:
    """`fewstep sample`: PNG files with their origin in the metadata, a grid, or both; nothing is written on bad input."""
    _check_output(options)
    precision = precision_of(options.precision, options.device, partial(say, console))
    options = replace(options, precision=precision)
    size, seeds, labels = parse_size(options.size), read_seeds(options.seeds), read_labels(options.labels)
    with busy(console, f"Loading {source}"):
        model = load_model(source, device=options.device, precision=options.precision, loras=options.loras)
    takes = model.conditioner.takes
    how = _text_options(model, options, size) if takes == "prompts" else _class_options(model, options, labels)
    how |= _steps_and_guidance(model, options)
    wanted = list_pictures(
        labels=labels, prompts=options.prompts, num_classes=model.denoiser.num_classes, num_images=options.num_images, seed=options.seed, seeds=seeds, first=options.first,
    )  # fmt: skip
    for line in model.conditioner.warnings(dict.fromkeys([*options.prompts, options.negative_prompt or ""])):
        say(console, line)
    if options.compile:
        compile_denoiser(model.denoiser, model.device)
    batch_size = options.batch_size or model.family.default_batch_size
    facts = _facts(model, source, options, how)
    writer = PictureWriter(options.out, options.grid, wanted, facts, model.card.class_names)
    speed = Speed(batch_size)
    count, done = len(wanted.pictures), 0
    with working(console, f"Making {count:,} picture{'s' * (count != 1)}") as report:
        for pictures, images in _batches(model, wanted, batch_size, how, options, speed):
            writer.write(pictures, images)
            done += len(pictures)
            report(done, count)
    writer.finish()
    if options.grid is not None:
        console.print(f"{options.grid}", highlight=False, soft_wrap=True)
    height, width = writer.size
    each = facts["evaluations"]
    console.print(
        f"{count} picture{'s' * (count != 1)}, {each} evaluation{'s' * (each != 1)} each, {height}x{width}: {speed.sentence()}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def _check_output(options: SampleOptions) -> None:
    out, grid = options.out, options.grid
    if out is None and grid is None:
        raise UserError("nothing to write: give --out FOLDER for single pictures, --grid FILE for one with all")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"cannot make {out}: it is a file; choose another --out")
    if grid is not None and (grid.is_dir() or not grid.absolute().parent.is_dir()):
        raise UserError(f"--grid {grid}: give a file in a folder that exists")
    if grid is not None and grid.suffix.lower() in _OTHER_PICTURES:
        raise UserError(
            f"--grid {grid}: pictures are written as PNG, which keeps how they were made; name it {grid.stem}.png"
        )


def _text_options(model: Model, options: SampleOptions, size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of a text-to-image model's `sample`; with --tiny-vae it decodes with that from now on."""
    if options.labels or not options.prompts:
        raise UserError("a text-to-image model takes --prompt or --prompts (and no --labels)")
    try:
        if options.tiny_vae:
            model.decoder = model.tiny_decoder(options.tiny_vae)
    except UserError as error:
        raise UserError(f"--tiny-vae: {error}") from error
    if size is None:
        return {}
    try:
        model.check_size(*size)
    except UserError as error:
        raise UserError(f"--{error}") from error
    return {"size": size}


def _class_options(model: Model, options: SampleOptions, labels: list[int]) -> dict[str, Any]:
    """Refuse what only text-to-image models have, and labels that are not there."""
    _, height, width = model.picture_shape
    reasons = {
        "--prompt and --prompts are for text-to-image models; this one takes --labels": options.prompts,
        f"--size is for text-to-image models; this network was built for {height}x{width} alone": options.size,
        "--negative-prompt is for text-to-image teachers; this model has classes": options.negative_prompt is not None,
        "--tiny-vae is for text-to-image models; this one makes pixels, not latents": options.tiny_vae,
    }
    for reason, given in reasons.items():
        if given:
            raise UserError(reason)
    wrong = sorted({label for label in labels if label >= max(1, model.denoiser.num_classes)})
    if wrong:
        raise UserError(f"--labels {wrong[:5]} do not fit the model's {model.denoiser.num_classes} classes")
    return {}


def _steps_and_guidance(model: Model, options: SampleOptions) -> dict[str, Any]:
    """A teacher's steps and guidance; a generator has its own of both."""
    if model.is_generator:
        if options.guidance_scale not in (None, 1):
            raise UserError(
                f"--guidance-scale {options.guidance_scale}: a generator has its guidance built in; leave it out"
            )
        if options.negative_prompt is not None:
            raise UserError(
                "--negative-prompt: a generator runs without guidance (its teacher's was distilled in), so there is "
                "no negative branch that could use it; leave it out"
            )
        if options.teacher_steps is not None:
            raise UserError(
                "--teacher-steps is for teachers; a generator's steps travel with its weights; leave it out"
            )
        return {}
    scale = model.default_guidance if options.guidance_scale is None else options.guidance_scale
    if not math.isfinite(scale):
        raise UserError(f"--guidance-scale {scale}: give a finite number, e.g. 5")
    try:
        model.check_guidance(scale)
    except UserError as error:
        raise UserError(f"--guidance-scale: {error}") from error
    num_steps = options.teacher_steps or model.family.default_num_steps
    if num_steps > model.max_num_steps:
        raise UserError(
            f"--teacher-steps {num_steps}: the model has {model.max_num_steps} noise levels, so at most as many steps"
        )
    how: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": scale}
    if options.negative_prompt is not None:
        if scale == 1:
            raise UserError("--negative-prompt acts through guidance, which --guidance-scale 1 switches off")
        how["negative_prompt"] = options.negative_prompt
    return how


def _batches(
    model: Model, wanted: PictureList, batch_size: int, how: dict[str, Any], options: SampleOptions, speed: Speed
) -> Iterator[tuple[tuple[Picture, ...], Tensor]]:
    """Pictures with their images (B, C, H, W) in [-1, 1], in order."""
    for start in range(0, len(wanted.pictures), batch_size):
        pictures = wanted.pictures[start : start + batch_size]
        first = pictures[0]
        one_each = all(picture.number == first.number for picture in pictures)  # else a seed's pictures in a row
        seed = tuple(picture.seed for picture in pictures) if one_each else first.seed
        place: dict[str, Any] = {"seed": seed, "first": first.number, "num_images": len(pictures)}
        place["batch_size"] = len(pictures)
        started = time.perf_counter()
        try:
            images = model.sample(wishes_of(pictures), **place, **how, output="tensor", progress=False)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch-size {batch_size}: the GPU's memory is full; take fewer pictures at once"
            ) from error
        except RuntimeError as error:
            if start or not options.compile:
                raise
            raise UserError(f"--compile failed ({first_line(error)}); leave it out") from error
        speed.add(len(pictures), time.perf_counter() - started)
        if not torch.isfinite(images).all():
            advice = "take bf16 or fp32" if options.precision == "fp16" else "are the model's weights intact?"
            raise UserError(f"--precision {options.precision}: pictures came out as NaN; {advice}")
        yield pictures, images


def _facts(model: Model, source: str, options: SampleOptions, how: dict[str, Any]) -> dict[str, object]:
    """What every picture of this call has in common."""
    card = model.card
    num_steps = how.get("num_inference_steps")
    if model.is_generator:
        schedule = ",".join(map(str, card.step_indices)) + f" of {card.num_levels}"
    else:
        schedule = f"{num_steps} {model.family.sampler_name} steps"
    facts: dict[str, object] = {
        "model": source, "schedule": schedule, "evaluations": model.evaluations(num_steps), "precision": options.precision,
        "version": __version__,
    }  # fmt: skip
    facts |= {name: how[name] for name in ("guidance_scale", "negative_prompt") if name in how}
    if options.tiny_vae:
        facts["tiny_vae"] = options.tiny_vae
    if options.loras:
        facts["loras"] = ", ".join(options.loras)
    return facts
