"""What `fewstep app` can be told, checked where it is declared."""

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from fewstep.errors import UserError

MAX_SEED = 2**64 - 1  # what `fewstep sample --seed` takes


@dataclass(frozen=True)
class AppSettings:
    """The options of `fewstep app`, as its help says.

    Attributes:
        model: generator or teacher, as `fewstep sample` takes it.
        teacher: shown beside the generator; empty: none.
        host: address to listen on; the default is reachable from this machine only.
        root_path: where the page is behind a proxy, "/demo" or "https://example.org/demo"; empty: at the root.
        port: 0 takes a free one from 7860 on.
        max_images: most pictures a request.
        max_queue: most requests waiting; further ones are turned away with a message.
        max_prompt: most characters of a prompt.
        history: pictures in the history strip of a browser session.
        teacher_steps: None: the sampler's own, as in `fewstep sample`.
        guidance_scale: of the teacher; None: its own, as in `fewstep sample`.
        tiny_vae: TAESD offered beside the VAE; empty: none.
        safety_checker: withhold what the checker in the model's folder flags.
        device, precision: as `fewstep sample` has them.
    """

    model: str
    teacher: str = ""
    host: str = "127.0.0.1"
    port: int = 7860
    max_images: int = 8
    max_queue: int = 16
    max_prompt: int = 1000
    history: int = 24
    teacher_steps: int | None = None
    guidance_scale: float | None = None
    tiny_vae: str = ""
    safety_checker: bool = True
    device: str = "auto"
    precision: str = "auto"
    root_path: str = ""

    def __post_init__(self) -> None:
        limits = {
            "port": (0, 65535), "max_images": (1, 64), "max_queue": (1, 1000), "max_prompt": (1, 10_000),
            "history": (0, 200),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)}: must lie between {low} and {high}")
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise UserError(f"--teacher-steps {self.teacher_steps}: must be 1 or more")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UserError(f"--guidance-scale {self.guidance_scale}: give a finite number, e.g. 5")
        check_root_path(self.root_path, "--root-path ")
        if not self.host:
            raise UserError("--host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in")


def check_root_path(text: str, setting: str) -> None:
    """Raise UserError where a text is no place of a page behind a proxy; an empty one is the root.

    Args:
        setting: where the text is from, with what stands between the two.
    """
    if not text:
        return
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no address, or none that has such a port
        is_url = False
    is_path = text.startswith("/") and not text.startswith("//")
    plain = all(32 < ord(letter) < 127 and letter not in "?#@\\" for letter in text)
    if not (is_url or is_path) or not plain or ".." in text.split("/"):
        raise UserError(f"{setting}{text}: give /PATH, or https://HOST/PATH")
