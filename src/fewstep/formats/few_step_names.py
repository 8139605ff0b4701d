"""What a name says of few steps: whose method a file or folder is of, where it is known by nothing else."""

import re
from collections.abc import Mapping
from pathlib import Path

OTHER_METHODS = frozenset(
    {
        "lightning", "hyper", "turbo", "lcm", "tcd", "pcm", "flash", "swiftbrush", "instaflow", "perflow", "tdd", "lightspeed",
        "sdxs",
    }
)  # fmt: skip
# Words that many an ordinary model has in its name too, as in "hyper realistic"
_AMBIGUOUS = frozenset({"hyper", "flash"})
_CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # realvisxlV40_v40LightningBakedvae
_FEW_STEPS = re.compile(
    r"(?<![a-z])hyper[-_ ]?(?=sd|flux)|(?<![a-z])flash[-_ ]?(?=sd|pixart)|(?<=sd|xl)[-_ ]?(?:hyper|flash)(?![a-z])|"
    r"(?<![a-z\d.])[1-8][-_ ]?steps?(?![a-z]|[-_ ]?\d)"
)
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/")  # of the hub's cache
_TITLES = ("modelspec.title", "ss_output_name")


def method_named(name: str) -> str:
    """The method other than DMD2 that a word of a name stands for; empty: none."""
    return next((word for word in re.findall("[a-z]+", name.lower()) if word in OTHER_METHODS), "")


def few_steps_named(name: str) -> str:
    """What in the name of a whole model says that it is distilled to few steps; empty: nothing."""
    words = [*re.findall("[a-z]+", name.lower()), *(word.lower() for word in _CAMEL.findall(name))]
    if sure := [word for word in words if word == "dmd" or (word in OTHER_METHODS and word not in _AMBIGUOUS)]:
        return sure[0]
    found = _FEW_STEPS.search(name.lower())
    return found[0].strip("-_ ") if found else ""


def hub_name(path: Path) -> str:
    """A model's name on the hub, where a path lies in the hub's cache; else empty."""
    found = _SNAPSHOT.search(path.as_posix())
    return found[1] if found else ""


def titles(metadata: Mapping[str, str]) -> list[str]:
    """What the header of a file calls it."""
    return [metadata[key] for key in _TITLES if key in metadata]
