"""The command line. Every command imports what it needs itself, so that `--help` answers at once."""

import os
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep import __version__
from fewstep.cli.examples import add_examples
from fewstep.cli.options import Device, Precision, read_prompts
from fewstep.cli.prepare import prepare
from fewstep.cli.pretrain import pretrain
from fewstep.cli.settings import settings
from fewstep.cli.train import train
from fewstep.errors import RunInterrupted, UserError


class Interrupted(BaseException):
    """Ctrl-C inside a command, under a name that the argument parser does not swallow."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message, self.exit_code = message, exit_code


class Commands(TyperGroup):
    """The command group, which lets `main` say what an interrupted user can do."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except RunInterrupted as stop:
            again = shlex.join(["fewstep", *sys.argv[1:]])
            raise Interrupted(f"{stop}. Continue with: {again}", stop.exit_code) from None
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in CONTINUED
            told = "interrupted; the same command continues from the last checkpoint" if goes_on else "interrupted"
            raise Interrupted(told, 130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Distil a diffusion model into a generator that needs one to four steps.",
)  # fmt: skip
app.add_typer(prepare, name="prepare")
for command in (train, pretrain, settings):
    app.command()(command)


CONTINUED = {"train", "pretrain", "quickstart", "text-quickstart", "prepare"}
"""Commands that go on where they stopped when they are repeated."""


def main() -> None:
    """Run the command line.

    Bad input ends with one sentence and exit code 2, Ctrl-C with 130. Any other exception is a fault of ours or of a
    library: one sentence with the file that has the traceback, and exit code 1; `--debug` shows the traceback.
    """
    # before a library is imported: nothing is counted or sent anywhere unless a hub id is named
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("HF_UPDATE_DOWNLOAD_COUNTS", "0"), ("DO_NOT_TRACK", "1")):
        os.environ.setdefault(name, value)
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app(prog_name="fewstep")
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"fewstep: {stop.message}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        if debug:
            raise
        words = str(error).splitlines()[0][:300] if str(error) else "no further words"
        print(
            f"fewstep: stopped by a fault ({type(error).__name__}: {words}); {_log_of_fault()}, --debug shows it",
            file=sys.stderr,
        )
        sys.exit(1)


def _log_of_fault() -> str:
    """Where the traceback of the exception being handled was written, as half a sentence."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fewstep-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(f"fewstep {__version__}, {' '.join(sys.argv)}\n{traceback.format_exc()}")
    except OSError:
        return "its traceback could not be written"
    return f"its traceback is in {file.name}"


def _show_version(value: bool) -> None:
    if value:
        print(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error; may stand anywhere")] = False,
) -> None:
    """Distil a diffusion model into a generator that needs one to four steps."""


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(help="minutes of training; measuring and the report come on top")] = 5.0,
    folder: Annotated[Path, typer.Option(help="run folder; an interrupted run in it is continued")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="every random number follows from it")] = 0,
    text: Annotated[
        bool, typer.Option("--text", help="the text-to-image teacher instead, as `text-quickstart`")
    ] = False,
) -> None:
    """Distil the bundled teacher on the CPU: pictures, quality and speed in one HTML report."""
    if text:
        text_quickstart(minutes, Path("runs/text-quickstart") if folder == Path("runs/quickstart") else folder, seed)
        return
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
    from fewstep.models.load import need_text_libraries

    need_text_libraries()
    from fewstep.demos.emoji import run_text_quickstart

    run_text_quickstart(folder, minutes=minutes, seed=seed)


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
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="for teachers: steps of the model's own many-step sampler; its usual number unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: uncond + w (cond - uncond); 1 is off; the model's usual scale unless set")] = None,
    tiny_vae: Annotated[str, typer.Option("--tiny-vae", help="decode with a TAESD: diffusers folder or hub id, e.g. madebyollin/taesdxl")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network: a slow first batch, then faster ones")] = False,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 inside the network (auto: what is fast on the device); the VAE stays in fp32")] = "auto",
) -> None:  # fmt: skip
    """Make pictures with a generator (in its own few steps) or a teacher."""
    from fewstep.cli.sample import SampleOptions, sample_pictures

    options = SampleOptions(
        prompts=tuple(read_prompts(prompt or [], prompts)), labels=labels, num_images=num_images, seed=seed,
        seeds=seeds, first=first, size=size, negative_prompt=negative_prompt, batch_size=batch_size, out=out, grid=grid,
        teacher_steps=teacher_steps, guidance_scale=guidance_scale, tiny_vae=tiny_vae, compile=compiled, device=device,
        precision=precision,
    )  # fmt: skip
    sample_pictures(model, options)


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
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="for teachers: steps of the model's own many-step sampler; its usual number unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: 1 is off; the model's usual scale unless set")] = None,
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
        read_prompts([], prompts),
    )


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
    teacher_steps: Annotated[int | None, typer.Option(help="for teachers: steps of the model's own many-step sampler; its usual number unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: 1 is off; the model's usual scale unless set")] = None,
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


add_examples(app, prepare)
