"""`fewstep prepare`: what training and evaluation read."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device, Precision, refuse_many, starting
from fewstep.errors import UserError

prepare = typer.Typer(
    no_args_is_help=True, help="Make what training and evaluation read.", context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: fewstep prepare features MY_FOLDER runs/features",
)  # fmt: skip


@prepare.callback()
def _root(ctx: typer.Context) -> None:
    """Make what training and evaluation read."""
    if ctx.invoked_subcommand not in ("pairs", "embeddings", "latents"):
        refuse_many(f"prepare {ctx.invoked_subcommand}")


@prepare.command("pairs")
def prepare_pairs(
    teacher: Annotated[str, typer.Argument(help="teacher: model folder, run folder, .pkl, bundled:NAME, diffusers folder or hub id")],
    folder: Annotated[Path, typer.Argument(help="where the pairs go; an interrupted job in it is continued")],
    *,
    num_pairs: Annotated[int | None, typer.Option(min=1, help="noise-image pairs to make  \\[default: 25000, of an LMDB all]")] = None,
    prompts: Annotated[str, typer.Option(help="text-to-image teachers: file of prompts, drawn uniformly")] = "",
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="cut prompts that are too long instead of refusing them")] = False,
    from_lmdb: Annotated[Path | None, typer.Option(help="text-to-image teachers: published LMDB of ODE pairs, instead of sampling")] = None,
    lmdb_scale: Annotated[float | None, typer.Option(help="multiply its images by this; default: take them as they are")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="steps of the teacher's own many-step sampler; its usual number unless set (DMD's published pairs have 256)")] = None,
    guidance_scale: Annotated[float, typer.Option(help="uncond + w (cond - uncond); 1 is off")] = 1.0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures made at once  \\[default: 100, text-to-image 4]")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="text-to-image teachers: merge FILE:0.8 into it, as teacher.loras does; may be given several times")] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:  # fmt: skip
    """Store noises with the teacher's deterministic images for DMD's regression loss."""
    if lmdb_scale is not None and from_lmdb is None:
        raise UserError(f"--lmdb-scale {lmdb_scale:g} is of --from-lmdb: give both, or neither")
    if from_lmdb is not None:
        if prompts or truncate_prompts or teacher_steps is not None:
            raise UserError(
                "--from-lmdb brings its own prompts and samples: leave out --prompts, --truncate-prompts and --teacher-steps"
            )
        if seed or guidance_scale != 1 or batch_size is not None or precision != "fp32" or lora:
            raise UserError(
                "--from-lmdb samples nothing: leave out --seed, --guidance-scale, --batch-size, --precision and --lora"
            )
        refuse_many("prepare pairs --from-lmdb")
        with starting():
            from fewstep.preparation.captioned_jobs import import_pairs
        import_pairs(teacher, from_lmdb, folder, num_pairs=num_pairs, scale=lmdb_scale, device=device)
        return
    with starting():
        from fewstep.preparation.jobs import PairsOptions, make_pairs
    options = PairsOptions(
        num_pairs=num_pairs or 25_000, prompts=prompts, truncate=truncate_prompts, seed=seed, teacher_steps=teacher_steps,
        guidance_scale=guidance_scale, batch_size=batch_size, loras=tuple(lora or ()), device=device, precision=precision,
    )  # fmt: skip
    make_pairs(teacher, folder, options)


@prepare.command("embeddings")
def prepare_embeddings(
    teacher: Annotated[str, typer.Argument(help="text-to-image teacher: diffusers folder or hub id")],
    prompts: Annotated[str, typer.Argument(help="prompts: .txt (one a line), .parquet, .jsonl, .csv, .pkl, or a folder with metadata.jsonl")],
    folder: Annotated[Path, typer.Argument(help="where the embeddings go; an interrupted job in it is continued")],
    *,
    column: Annotated[str, typer.Option(help="column of the prompts in tables")] = "text",
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="cut prompts that are too long instead of refusing them")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="prompts a file")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts encoded at once")] = 32,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Store the text embeddings of a prompt list, which text-to-image training draws its conditions from."""
    with starting():
        from fewstep.preparation.captioned_jobs import EmbeddingsOptions, make_embeddings
    options = EmbeddingsOptions(
        column=column, truncate=truncate_prompts, shard_size=shard_size, batch_size=batch_size, device=device
    )
    make_embeddings(teacher, prompts, folder, options)


@prepare.command("latents")
def prepare_latents(
    teacher: Annotated[str, typer.Argument(help="text-to-image teacher: diffusers folder or hub id")],
    folder: Annotated[Path, typer.Argument(help="where the latents go; an interrupted job in it is continued")],
    *,
    images: Annotated[str, typer.Option(help="pictures with captions: folder with metadata.jsonl, parquet, .tar or folder of them, hub id")] = "",
    from_lmdb: Annotated[Path | None, typer.Option(help="published LMDB of latents and prompts, instead of --images")] = None,
    lmdb_scale: Annotated[float | None, typer.Option(help="multiply its latents by this; default: take them as they are")] = None,
    split: Annotated[str, typer.Option(help="split of the pictures, where they have several")] = "train",
    caption_column: Annotated[str, typer.Option(help="where the captions are; default: txt in tars, text elsewhere")] = "",
    resolution: Annotated[int, typer.Option(min=0, help="side in pixels; 0 is the teacher's own")] = 0,
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    background: Annotated[str, typer.Option(help="colour under transparent pixels, as CSS names it")] = "white",
    noise_seed: Annotated[int | None, typer.Option(help="sample the VAE's distribution with this seed, as published; default: its mean")] = None,
    keep_spread: Annotated[bool, typer.Option("--keep-spread", help="store the VAE's whole distribution (twice the bytes): training draws a new sample of it each pass, as published")] = False,
    captions: Annotated[str, typer.Option(help="embeddings, or text: nothing but the words, which training then encodes at each step")] = "embeddings",
    num_images: Annotated[int | None, typer.Option(min=1, help="take only the first pictures; default: all")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="read a hub set while it is downloaded, keeping nothing")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out pictures and captions that cannot be used (a missing caption is the empty prompt)")] = False,
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="cut captions that are too long instead of refusing them")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures a file")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures encoded at once")] = 8,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Store the latents of real pictures with their captions' embeddings, which the GAN loss reads."""
    if (from_lmdb is None) == (not images):
        raise UserError("prepare latents reads --images SOURCE or --from-lmdb PATH: give one of them")
    if lmdb_scale is not None and from_lmdb is None:
        raise UserError(f"--lmdb-scale {lmdb_scale:g} is of --from-lmdb: leave it out")
    with starting():
        from fewstep.preparation.captioned_jobs import LatentsOptions, import_latents, make_latents
    options = LatentsOptions(
        split=split, caption_column=caption_column, resolution=resolution, fit=fit, background=background, noise_seed=noise_seed, keep_spread=keep_spread,
        num_images=num_images, streaming=streaming, skip_bad=skip_bad, truncate=truncate_prompts, shard_size=shard_size,
        batch_size=batch_size, captions=captions, device=device,
    )  # fmt: skip
    if from_lmdb is not None:
        import_latents(teacher, from_lmdb, folder, options, lmdb_scale)
    else:
        make_latents(teacher, images, folder, options)


@prepare.command("features")
def prepare_features(
    images: Annotated[str, typer.Argument(help="labelled pictures: folder, parquet or hub id")],
    folder: Annotated[Path, typer.Argument(help="where the feature network goes")],
    *,
    num_classes: Annotated[int | None, typer.Option(min=2, help="as many as there are folders or labels, unless set")] = None,
    resolution: Annotated[int | None, typer.Option(min=8, help="side in pixels, as the model has it; that of `fewstep pretrain` unless set")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="1 grey, 3 colour; grey where all pictures are, unless set")] = None,
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    background: Annotated[str, typer.Option(help="colour under transparent pixels, as CSS names it")] = "white",
    num_passes: Annotated[int, typer.Option(min=1, help="passes over the training split")] = 6,
    flip: Annotated[bool, typer.Option(help="mirror half of the pictures")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    name: Annotated[str, typer.Option(help="what reports call these features")] = "classifier",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Train a small classifier of your data set; its features then measure quality on it."""
    with starting():
        from fewstep.preparation.jobs import FeaturesOptions, PicturesOptions, make_features
    options = FeaturesOptions(
        PicturesOptions(images, resolution=resolution or 0, channels=channels or 0, fit=fit, background=background), num_classes=num_classes or 0,
        num_passes=num_passes, flip=flip, seed=seed, name=name, device=device,
    )  # fmt: skip
    make_features(folder, options)


@prepare.command("statistics")
def prepare_statistics(
    images: Annotated[str, typer.Argument(help="real pictures: folder, parquet or hub id")],
    out: Annotated[Path, typer.Argument(help=".npz to write (mu, sigma)")],
    *,
    features: Annotated[str, typer.Option(help="bundled:NAME, folder of `prepare features`, or an Inception file")],
    split: Annotated[str, typer.Option()] = "train",
    resolution: Annotated[int | None, typer.Option(min=8, help="side in pixels; the features' own unless set, 32 where they look at any")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="1 grey, 3 colour; the features' own unless set, 3 where they look at any")] = None,
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    background: Annotated[str, typer.Option(help="colour under transparent pixels, as CSS names it")] = "white",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write the feature statistics of real pictures, once, for `evaluate --reference`."""
    with starting():
        from fewstep.preparation.jobs import PicturesOptions, make_statistics
    pictures = PicturesOptions(
        images, split=split, resolution=resolution or 0, channels=channels or 0, fit=fit, background=background
    )
    make_statistics(out, features, pictures, device)
