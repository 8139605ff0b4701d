"""The command line. Every command imports what it needs itself, so that `--help` answers at once."""

import os
import sys
import tempfile
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fewstep import __version__
from fewstep.cli.app import web_app
from fewstep.cli.bench_inference import bench_inference
from fewstep.cli.convert import convert
from fewstep.cli.doctor import doctor
from fewstep.cli.evaluate import evaluate
from fewstep.cli.examples import add_examples
from fewstep.cli.export import export
from fewstep.cli.options import how_to_continue, refuse_many
from fewstep.cli.prepare import prepare
from fewstep.cli.pretrain import pretrain
from fewstep.cli.quickstart import quickstart, text_quickstart
from fewstep.cli.report import report
from fewstep.cli.sample import sample
from fewstep.cli.settings import settings
from fewstep.cli.train import train
from fewstep.errors import RunInterrupted, quiet_threads, stopped_by, told_to_users
from fewstep.progress import be_quiet


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
            raise Interrupted(f"{stop}. {how_to_continue()}", stop.exit_code) from None
        except KeyboardInterrupt as stop:
            name, code = stopped_by(stop)
            goes_on = any(word in CONTINUED for word in sys.argv[1:3])
            again = f"; what is finished is kept. {how_to_continue()}" * goes_on
            raise Interrupted(f"stopped by {name}{again}", code) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}, pretty_exceptions_enable=False, rich_markup_mode="rich", epilog="Example: fewstep quickstart",
    help="Distil a diffusion model into a generator that needs one to four steps.",
)  # fmt: skip
CONTINUED = {"pairs", "embeddings", "latents"}
"""Commands that go on where they stopped when they are repeated, beside runs, which say so themselves."""


def main() -> None:
    """Run the command line.

    Bad input ends with one sentence and exit code 2, Ctrl-C with 130, SIGTERM with 143. Any other exception is a fault of ours or of a
    library: one sentence with the file that has the traceback, and exit code 1; `--debug` shows the traceback.
    """
    # before a library is imported: nothing is counted or sent anywhere unless a hub id is named
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("HF_UPDATE_DOWNLOAD_COUNTS", "0"), ("DO_NOT_TRACK", "1")):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures and odd tags, which decode all the same
    debug = "--debug" in sys.argv[1:]
    be_quiet("--quiet" in sys.argv[1:])
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in ("--debug", "--quiet")]
    try:
        with quiet_threads(debug):
            app(prog_name="fewstep")
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # of many processes, which are all told to stop, one speaks
            print(f"fewstep: {stop.message}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        told = told_to_users(error)
        if told is None:
            _stop_by_fault(error, debug)
        if debug:
            traceback.print_exc()
        print(f"fewstep: {told}", file=sys.stderr)
        sys.exit(2)


def _stop_by_fault(error: Exception, debug: bool) -> NoReturn:
    """End with what went wrong and where its traceback is, or with the traceback itself."""
    if debug:
        raise error
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
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error; may stand anywhere")] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="no bars and no lines on the way, warnings and errors only; may stand anywhere"),
    ] = False,
) -> None:
    """Distil a diffusion model into a generator that needs one to four steps."""
    if ctx.invoked_subcommand not in ("train", "evaluate", "prepare", "doctor"):
        refuse_many(ctx.invoked_subcommand)


for command in (quickstart, pretrain, train, settings, sample, evaluate, report, convert, export, doctor):
    app.command()(command)
app.command("text-quickstart")(text_quickstart)
app.command("bench-inference")(bench_inference)
app.command("app")(web_app)
app.add_typer(prepare, name="prepare")
add_examples(app, prepare)
