"""The command line. Every command imports what it needs itself, so that `--help` answers at once."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep import __version__
from fewstep.errors import UserError


class Interrupted(BaseException):
    """Ctrl-C inside a command, under a name that the argument parser does not swallow."""


class Commands(TyperGroup):
    """The command group, which lets `main` say what an interrupted user can do."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Distil a diffusion model into a generator that needs one to four steps.",
)  # fmt: skip
prepare = typer.Typer(no_args_is_help=True, help="Make what training and evaluation read.")
app.add_typer(prepare, name="prepare")

Recipe = Annotated[Path, typer.Argument(help="TOML recipe, e.g. recipes/imagenet64_dmd2_gan.toml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings as section.key=value; `fewstep settings` lists all")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved settings and a memory estimate, then stop")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16 inside the network; auto: what is fast on the device")]


def main() -> None:
    """Run the command line; bad input ends with one sentence and exit code 2."""
    try:
        app(prog_name="fewstep")
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print("fewstep: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _show_version(value: bool) -> None:
    if value:
        print(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Distil a diffusion model into a generator that needs one to four steps."""


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(help="minutes of training; measuring and the report come on top")] = 5.0,
    folder: Annotated[Path, typer.Option(help="run folder; an interrupted run in it is continued")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="every random number follows from it")] = 0,
) -> None:
    """Distil the bundled teacher on the CPU: pictures, quality and speed in one HTML report."""
    from fewstep.demos.fashion_mnist import run_quickstart

    run_quickstart(folder, minutes=minutes, seed=seed)


@app.command("text-quickstart")
def text_quickstart(
    minutes: Annotated[float, typer.Option(help="minutes of training; measuring and the report come on top")] = 5.0,
    folder: Annotated[Path, typer.Option(help="run folder; an interrupted run in it is continued")] = Path(
        "runs/text-quickstart"
    ),
    seed: Annotated[int, typer.Option(help="every random number follows from it")] = 0,
) -> None:
    """The same for text: the bundled emoji teacher becomes a four-step LoRA, prompts beside pictures in one HTML report."""
    from fewstep.models.model import need_text_libraries

    need_text_libraries()
    from fewstep.demos.emoji import run_text_quickstart

    run_text_quickstart(folder, minutes=minutes, seed=seed)


@app.command()
def pretrain(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a teacher on a folder of pictures. The same command continues an interrupted run."""
    from fewstep.settings import PretrainSettings, load_settings

    settings = load_settings(PretrainSettings, recipe, overrides, _say)
    settings = _with_folder(settings, recipe)
    if dry_run:
        from fewstep.estimate.describe import describe_pretraining

        settings = _settled(settings)
        _print_dry_run(settings, describe_pretraining(settings))
        return
    from fewstep.training.run import pretrain as run

    print(run(settings))


@app.command()
def train(
    recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False,
    suggest_gan_weight: Annotated[bool, typer.Option("--suggest-gan-weight", help="measure gradient norms for a few updates in memory, print a GAN weight, then stop")] = False,
) -> None:  # fmt: skip
    """Distil a teacher into a generator. The same command continues an interrupted run."""
    from fewstep.settings import TrainSettings, load_settings

    settings = load_settings(TrainSettings, recipe, overrides, _say)
    settings = _with_folder(settings, recipe)
    if dry_run:
        from fewstep.estimate.describe import describe_distillation

        settings = _settled(settings)
        _print_dry_run(settings, describe_distillation(settings, lambda text: print(text, file=sys.stderr, flush=True)))
        return
    if suggest_gan_weight:
        from fewstep.training.run import print_gan_weight

        print_gan_weight(settings)
        return
    from fewstep.training.run import train as run

    print(run(settings))


@app.command()
def settings(
    command: Annotated[str, typer.Argument(help="train or pretrain")] = "train",
) -> None:
    """List every setting of a command with its default and meaning."""
    from rich.console import Console
    from rich.table import Table

    from fewstep.settings import PretrainSettings, TrainSettings, Tree, describe_settings

    kinds: dict[str, type[Tree]] = {"train": TrainSettings, "pretrain": PretrainSettings}
    if command not in kinds:
        raise UserError(f"settings of {command!r}? choose train or pretrain")
    table = Table()
    table.add_column("setting", no_wrap=True)
    table.add_column("default")
    table.add_column("meaning")
    for key, _, default, meaning in describe_settings(kinds[command]):
        table.add_row(key, default, meaning)
    Console().print(table)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="generator or teacher: model folder, run folder, .pkl or bundled:NAME")],
    prompt: Annotated[list[str] | None, typer.Option(help="text-to-image models: what to show; may be given several times")] = None,
    prompts: Annotated[str, typer.Option(help="file of prompts: .txt (one a line), .parquet, .jsonl, .csv, .pkl list")] = "",
    labels: Annotated[str, typer.Option(help="class-conditional models: class numbers, e.g. 0,3,5-8, or a file of them; default: all in turn")] = "",
    num_images: Annotated[int | None, typer.Option(min=1, help="number of pictures, prompts or labels taking turns  [default: one a prompt or label, else 16]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="picture i depends on the seed, i and its prompt or label only  [default: 0]")] = None,
    seeds: Annotated[str, typer.Option(help="several seeds, e.g. 1,2,5-8: each prompt or label once with each; the picture that --seed makes first")] = "",
    first: Annotated[int, typer.Option(min=0, help="number of the first picture: 16 makes pictures 16, 17, ... of the seed")] = 0,
    size: Annotated[str, typer.Option(help="text-to-image models: HEIGHTxWIDTH in pixels, or the side of a square; a generator is at its best at the size it was trained for, the default")] = "",
    negative_prompt: Annotated[str | None, typer.Option(help="for text-to-image teachers: what guidance leads away from")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures made at once; does not change them  [default: 64, text-to-image 4]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for one PNG a picture, which says how it was made")] = None,
    grid: Annotated[Path | None, typer.Option(help="one PNG with all pictures; with --seeds a row for each prompt or label")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="for teachers: 18 Heun steps (35 evaluations), text-to-image 50 DDIM steps, unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: uncond + w (cond - uncond); 1 is off; text-to-image: 7.5 unless set")] = None,
    tiny_vae: Annotated[str, typer.Option("--tiny-vae", help="decode with a TAESD: diffusers folder or hub id, e.g. madebyollin/taesdxl")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network: a slow first batch, then faster ones")] = False,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 inside the network (auto: what is fast on the device); the VAE stays in fp32")] = "auto",
) -> None:  # fmt: skip
    """Make pictures with a generator (in its own few steps) or a teacher."""
    from fewstep.cli.sample import SampleOptions, sample_pictures

    options = SampleOptions(
        prompts=tuple(_read_prompts(prompt or [], prompts)), labels=labels, num_images=num_images, seed=seed,
        seeds=seeds, first=first, size=size, negative_prompt=negative_prompt, batch_size=batch_size, out=out, grid=grid,
        teacher_steps=teacher_steps, guidance_scale=guidance_scale, tiny_vae=tiny_vae, compile=compiled, device=device,
        precision=precision,
    )  # fmt: skip
    sample_pictures(model, options)


def _read_prompts(given: list[str], file: str) -> list[str]:
    if not file:
        return list(given)
    from fewstep.data.prompts import load_prompts

    return [*given, *load_prompts(Path(file).expanduser())]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="generator or teacher: model folder, run folder, .pkl or bundled:NAME")],
    features: Annotated[str, typer.Option(help="bundled:NAME, folder of `prepare features`, or an Inception .pth/.safetensors")],
    reference: Annotated[Path | None, typer.Option(help=".npz with mu and sigma of real features")] = None,
    images: Annotated[str, typer.Option(help="real pictures (folder, parquet, hub id): reference, and precision and recall")] = "",
    split: Annotated[str, typer.Option(help="split of the real pictures")] = "train",
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    prompts: Annotated[str, typer.Option(help="text-to-image models: file of prompts, taken in turn")] = "",
    num_images: Annotated[int, typer.Option(min=2, help="generated pictures, labels evenly spread; ImageNet-64: 50000")] = 50_000,
    seed: Annotated[int, typer.Option(help="seed of the generated pictures")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures made at once  [default: 250, text-to-image 4]")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="for teachers: 18 Heun steps (35 evaluations), text-to-image 50 DDIM steps, unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: 1 (off), text-to-image 7.5, unless set")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the figure with all its conditions here")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:  # fmt: skip
    """Frechet distance (and precision and recall) between generated and real pictures in a named feature network."""
    from fewstep.cli.commands import evaluate_model

    evaluate_model(
        model,
        features,
        reference,
        images,
        split,
        fit,
        num_images,
        seed,
        batch_size,
        teacher_steps,
        guidance_scale,
        json_out,
        device,
        precision,
        _read_prompts([], prompts),
    )


@prepare.command("pairs")
def prepare_pairs(
    teacher: Annotated[str, typer.Argument(help="teacher: model folder, run folder, .pkl, bundled:NAME, diffusers folder or hub id")],
    folder: Annotated[Path, typer.Argument(help="where the pairs go; an interrupted job in it is continued")],
    num_pairs: Annotated[int | None, typer.Option(min=1, help="noise-image pairs to make  [default: 25000, of an LMDB all]")] = None,
    prompts: Annotated[str, typer.Option(help="text-to-image teachers: file of prompts, drawn uniformly")] = "",
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="cut prompts that are too long instead of refusing them")] = False,
    from_lmdb: Annotated[Path | None, typer.Option(help="text-to-image teachers: published LMDB of ODE pairs, instead of sampling")] = None,
    lmdb_scale: Annotated[float | None, typer.Option(help="multiply its images by this; default: take them as they are")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="18 Heun steps (35 evaluations), text-to-image 50 DDIM steps, unless set")] = None,
    guidance_scale: Annotated[float, typer.Option(help="uncond + w (cond - uncond); 1 is off")] = 1.0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures made at once  [default: 100, text-to-image 4]")] = None,
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
        if seed or guidance_scale != 1 or batch_size is not None or precision != "fp32":
            raise UserError(
                "--from-lmdb samples nothing: leave out --seed, --guidance-scale, --batch-size and --precision"
            )
        from fewstep.cli.commands_text import import_pairs

        import_pairs(teacher, from_lmdb, folder, num_pairs, lmdb_scale, device)
        return
    from fewstep.cli.commands import make_pairs

    make_pairs(
        teacher, folder, num_pairs or 25_000, seed, teacher_steps, guidance_scale, batch_size, device, precision, prompts,
        truncate_prompts,
    )  # fmt: skip


@prepare.command("embeddings")
def prepare_embeddings(
    teacher: Annotated[str, typer.Argument(help="text-to-image teacher: diffusers folder or hub id")],
    prompts: Annotated[Path, typer.Argument(help="prompts: .txt (one a line), .parquet, .jsonl, .csv, .pkl, or a folder with metadata.jsonl")],
    folder: Annotated[Path, typer.Argument(help="where the embeddings go; an interrupted job in it is continued")],
    column: Annotated[str, typer.Option(help="column of the prompts in tables")] = "text",
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="cut prompts that are too long instead of refusing them")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="prompts a file")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts encoded at once")] = 32,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Store the text embeddings of a prompt list, which text-to-image training draws its conditions from."""
    from fewstep.cli.commands_text import make_embeddings

    make_embeddings(teacher, prompts, folder, column, truncate_prompts, shard_size, batch_size, device)


@prepare.command("latents")
def prepare_latents(
    teacher: Annotated[str, typer.Argument(help="text-to-image teacher: diffusers folder or hub id")],
    folder: Annotated[Path, typer.Argument(help="where the latents go; an interrupted job in it is continued")],
    images: Annotated[str, typer.Option(help="pictures with captions: folder with metadata.jsonl, parquet, .tar or folder of them, hub id")] = "",
    from_lmdb: Annotated[Path | None, typer.Option(help="published LMDB of latents and prompts, instead of --images")] = None,
    lmdb_scale: Annotated[float | None, typer.Option(help="multiply its latents by this; default: take them as they are")] = None,
    split: Annotated[str, typer.Option(help="split of the pictures, where they have several")] = "train",
    caption_column: Annotated[str, typer.Option(help="where the captions are; default: txt in tars, text elsewhere")] = "",
    resolution: Annotated[int, typer.Option(min=0, help="side in pixels; 0 is the teacher's own")] = 0,
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    noise_seed: Annotated[int | None, typer.Option(help="sample the VAE's distribution with this seed; default: its mean")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="take only the first pictures; default: all")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="read a hub set while it is downloaded, keeping nothing")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out pictures and captions that cannot be used")] = False,
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="cut captions that are too long instead of refusing them")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures a file")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures encoded at once")] = 8,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Store the latents of real pictures with their captions' embeddings, which the GAN loss reads."""
    from fewstep.cli.commands_text import import_latents, make_latents

    if (from_lmdb is None) == (not images):
        raise UserError("prepare latents reads --images SOURCE or --from-lmdb PATH: give one of them")
    if from_lmdb is not None:
        import_latents(teacher, from_lmdb, folder, lmdb_scale, truncate_prompts, shard_size, batch_size, device)
        return
    make_latents(
        teacher, images, folder, split, caption_column, resolution, fit, noise_seed, num_images, streaming, skip_bad,
        truncate_prompts, shard_size, batch_size, device,
    )  # fmt: skip


@prepare.command("features")
def prepare_features(
    images: Annotated[str, typer.Argument(help="labelled pictures: folder, parquet or hub id")],
    folder: Annotated[Path, typer.Argument(help="where the feature network goes")],
    num_classes: Annotated[int, typer.Option(min=2)],
    resolution: Annotated[int, typer.Option(min=8, help="side in pixels, as the model has it")] = 32,
    channels: Annotated[int, typer.Option(help="1 grey, 3 colour")] = 3,
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    num_passes: Annotated[int, typer.Option(min=1, help="passes over the training split")] = 6,
    flip: Annotated[bool, typer.Option(help="mirror half of the pictures")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    name: Annotated[str, typer.Option(help="what reports call these features")] = "classifier",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Train a small classifier of your data set; its features then measure quality on it."""
    from fewstep.cli.commands import make_features

    make_features(images, folder, num_classes, resolution, channels, fit, num_passes, flip, seed, name, device)


@prepare.command("statistics")
def prepare_statistics(
    images: Annotated[str, typer.Argument(help="real pictures: folder, parquet or hub id")],
    out: Annotated[Path, typer.Argument(help=".npz to write (mu, sigma)")],
    features: Annotated[str, typer.Option(help="bundled:NAME, folder of `prepare features`, or an Inception file")],
    split: Annotated[str, typer.Option()] = "train",
    resolution: Annotated[int, typer.Option(min=8)] = 32,
    channels: Annotated[int, typer.Option(help="1 grey, 3 colour")] = 3,
    fit: Annotated[str, typer.Option(help="crop, pad or exact, as in training")] = "crop",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write the feature statistics of real pictures, once, for `evaluate --reference`."""
    from fewstep.cli.commands import make_statistics

    make_statistics(images, out, features, split, resolution, channels, fit, device)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders of `fewstep train` or `pretrain`, finished or not", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; run_report.html in the first run, unless set")] = None,
) -> None:  # fmt: skip
    """One page of a run: losses, sample history, measured figures, settings; of several runs beside each other."""
    from fewstep.errors import UserError
    from fewstep.evaluation.report.run_report import write_run_report

    path = out or runs[0] / "run_report.html"
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; make it first")
    print(write_run_report(runs, path))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="EDM .pkl, DMD2 checkpoint folder, U-Net .bin, LoRA or single-file .safetensors")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    base: Annotated[str, typer.Option(help="the model it belongs to: diffusers folder or hub id, needed for text-to-image weights; for EDM networks a teacher, where their shape cannot be read from the weights")] = "",
    step_indices: Annotated[str, typer.Option(help="grid indices a generator runs at, e.g. 999,749,499,249; default: EDM 999, released files by their name")] = "",
) -> None:  # fmt: skip
    """Turn other tools' weights into a folder to sample and train from; nothing in the file is executed."""
    from fewstep.cli.convert import convert_model

    convert_model(source, out, base, step_indices)


@app.command()
def export(
    generator: Annotated[str, typer.Argument(help="generator folder, or run folder of `fewstep train`")],
    out: Annotated[Path, typer.Argument(help="new folder to write")],
    kind: Annotated[str, typer.Option("--as", help="diffusers, unet, lora, kohya-lora, single-file or edm")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32; unless set fp16, for class-conditional generators fp32")] = "",
    base: Annotated[str, typer.Option(help="text-to-image: the teacher's folder or hub id, if it has moved since training")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="text-to-image: prompt of the sample pictures; may be given several times")] = None,
    num_samples: Annotated[int, typer.Option(min=0, help="sample pictures in the model card")] = 8,
    licence: Annotated[str, typer.Option(help="of the weights, as the hub names it, e.g. apache-2.0")] = "",
    push: Annotated[str, typer.Option(help="upload to this name on the model hub (USER/NAME) afterwards; default: upload nothing")] = "",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write a generator in another tool's format, with a model card and sample pictures."""
    from fewstep.cli.export import export_model

    export_model(generator, out, kind, dtype, base, list(prompt or []), num_samples, licence, push, device)


@app.command("app")
def web_app(
    model: Annotated[str, typer.Argument(help="generator or teacher: model folder, run folder, .pkl or bundled:NAME")],
    teacher: Annotated[str, typer.Option(help="shown beside the generator, from the same noise: as `sample` takes one")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; the default is reachable from this machine only")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one from 7860 on")] = 7860,
    root_path: Annotated[str, typer.Option("--root-path", help="behind a proxy: /PATH or https://HOST/PATH that leads here")] = "",
    max_images: Annotated[int, typer.Option(help="most pictures a request")] = 8,
    max_queue: Annotated[int, typer.Option(help="most requests waiting; further ones are turned away")] = 16,
    max_prompt: Annotated[int, typer.Option(help="most characters of a prompt")] = 1000,
    history: Annotated[int, typer.Option(help="pictures in the history strip; 0: no strip")] = 24,
    teacher_steps: Annotated[int | None, typer.Option(help="for teachers: 18 Heun steps (35 evaluations), text-to-image 50 DDIM steps, unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: 1 (off), text-to-image 7.5, unless set")] = None,
    tiny_vae: Annotated[str, typer.Option("--tiny-vae", help="text-to-image: offer a TAESD beside the VAE; diffusers folder or hub id")] = "",
    safety_checker: Annotated[bool, typer.Option("--safety-checker/--no-safety-checker", help="text-to-image: withhold what the checker in the model's folder flags, where it has one")] = True,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 inside the network (auto: what is fast on the device); the VAE stays in fp32")] = "auto",
) -> None:  # fmt: skip
    """A web page on this machine: prompt or class in, pictures out, the teacher's beside them."""
    from fewstep.app.serve import launch_app
    from fewstep.app.settings import AppSettings

    launch_app(AppSettings(
        model, teacher=teacher, host=host, port=port, max_images=max_images, max_queue=max_queue, max_prompt=max_prompt,
        history=history, teacher_steps=teacher_steps, guidance_scale=guidance_scale, tiny_vae=tiny_vae,
        safety_checker=safety_checker, device=device, precision=precision, root_path=root_path,
    ))  # fmt: skip


def _say(line: str) -> None:
    from rich.console import Console

    from fewstep.progress import say

    say(Console(stderr=True), line)


def _with_folder(settings: Any, recipe: Path) -> Any:
    """Runs go to runs/<recipe name> unless the settings say otherwise."""
    if settings.run.folder:
        return settings
    return settings.model_copy(update={"run": settings.run.model_copy(update={"folder": f"runs/{recipe.stem}"})})


def _settled(settings: Any) -> Any:
    """The settings with the precision that this machine would take."""
    from functools import partial

    from rich.console import Console

    from fewstep.progress import say
    from fewstep.training.precision import settle_precision
    from fewstep.training.run import run_folder

    return settle_precision(settings, run_folder(settings), partial(say, Console(stderr=True)))


def _print_dry_run(settings: Any, lines: Iterable[str]) -> None:
    """The settings at once, then each line as it becomes known."""
    from fewstep.settings import flatten_settings

    for key, value in flatten_settings(settings).items():
        print(f"{key} = {value!r}")
    print(flush=True)
    for line in lines:
        print(line, flush=True)
