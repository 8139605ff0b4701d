"""The command `fewstep`, also as `python -m fewstep`. It imports nothing before it can be stopped in good order."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from fewstep.errors import Terminated, stopped_by


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with one sentence, also while libraries are imported."""
    try:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends a process that waits for another one by force
            signal.signal(signal.SIGTERM, _terminate)
        from fewstep.cli.main import main as command

        command()
    except KeyboardInterrupt as stop:
        name, code = stopped_by(stop)
        print(f"fewstep: stopped by {name}", file=sys.stderr)
        sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    main()
