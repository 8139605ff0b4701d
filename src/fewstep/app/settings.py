"""What `fewstep app` can be told, checked where it is declared."""

import math
from dataclasses import dataclass

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
        if self.root_path and not self.root_path.startswith(("/", "http://", "https://")):
            raise UserError(f"--root-path {self.root_path}: give /PATH, or https://HOST/PATH")
        if not self.host:
            raise UserError("--host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in")
