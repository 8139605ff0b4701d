"""The web page from Python, with limits of your own.

python examples/app.py runs/quickstart --teacher bundled:fashion-mnist
"""

import argparse
from typing import Any

from fewstep.app.serve import launch_app
from fewstep.app.settings import AppSettings


def main(arguments: list[str] | None = None, *, wait: bool = True) -> Any:
    """Serve the page until Ctrl-C; with `wait=False` return it: `.local_url` is its address, `.close()` its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="generator or teacher")
    parser.add_argument("--teacher", default="", help="shown beside the generator")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(arguments)
    settings = AppSettings(args.model, teacher=args.teacher, port=args.port, max_images=4, max_queue=2)
    return launch_app(settings, wait=wait)


if __name__ == "__main__":
    main()
