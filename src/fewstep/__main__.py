"""The command `fewstep`, also as `python -m fewstep`. It imports nothing before it can be stopped in good order."""

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

from fewstep.errors import Terminated, stopped_by


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with one sentence, also while libraries are imported."""
    _open_streams()
    try:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends a process that waits for another one by force
            signal.signal(signal.SIGTERM, _terminate)
        from fewstep.cli.main import main as command

        command()
    except KeyboardInterrupt as stop:
        name, code = stopped_by(stop)
        print(f"fewstep: stopped by {name}", file=sys.stderr)
        sys.exit(code)


def _open_streams() -> None:
    """Make what is printed harmless: streams that the caller closed go nowhere, names of any bytes and letters can be told."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # or the next file opened would take its place, and what is printed
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
        elif isinstance(stream, TextIOWrapper):
            is_unicode = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if is_unicode else "backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    main()
