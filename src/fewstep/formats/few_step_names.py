"""What a name says of a model where it is known by nothing else: few steps and whose method they are of, prediction of v."""

import re
from collections.abc import Iterable, Mapping

OTHER_METHODS = frozenset(
    {
        "lightning", "hyper", "turbo", "lcm", "tcd", "pcm", "flash", "swiftbrush", "instaflow", "perflow", "tdd", "lightspeed",
        "sdxs",
    }
)  # fmt: skip
# Words that many an ordinary model has in its name too, as in "hyper realistic"
_AMBIGUOUS = frozenset({"hyper", "flash"})
_CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # realvisxlV40_v40LightningBakedvae
_FEW_STEPS = re.compile(r"(?<![a-z\d.])[1-8][-_ ]?steps?(?![a-z]|[-_ ]?\d)")
_V_PREDICTION = re.compile(r"((?<![A-Za-z])[vV]|(?<=[a-z])V)[-_ ]?[pP](red|RED)(iction|ICTION)?(?![a-z])")
_TITLES = ("modelspec.title", "ss_output_name")


def method_named(name: str) -> str:
    """The method other than DMD2 that a word of a name stands for; empty: none."""
    return next((word for word in re.findall("[a-z]+", name.lower()) if word in OTHER_METHODS), "")


def few_steps_named(name: str, models: Iterable[str]) -> str:
    """What in the name of a whole model says that it is distilled to few steps; empty: nothing.

    Args:
        models: what names call the models, in small letters; a word that is another thing elsewhere counts beside one of them.
    """
    words = [*re.findall("[a-z]+", name.lower()), *(word.lower() for word in _CAMEL.findall(name))]
    if "teacher" in words:  # of a distillation
        return ""
    if sure := [word for word in words if word == "dmd" or (word in OTHER_METHODS and word not in _AMBIGUOUS)]:
        return sure[0]
    kinds, methods = ("|".join(map(re.escape, sorted(group))) for group in (set(models), _AMBIGUOUS))
    beside = rf"(?:{kinds})[-_ ]?(?:{methods})(?![a-z])|(?<![a-z])(?:{methods})[-_ ]?(?:{kinds})"
    if kinds and (found := re.search(beside, name.lower())):
        return next(method for method in _AMBIGUOUS if method in found[0])
    steps = _FEW_STEPS.search(name.lower())
    return steps[0] if steps else ""


def predicts_v_by_name(name: str) -> bool:
    """Whether the name of a model says that it predicts v, as in `noobaiXL_vPred10` or `fluffyrock-e92-vpred`."""
    return _V_PREDICTION.search(name) is not None


def titles(metadata: Mapping[str, str]) -> list[str]:
    """What the header of a file calls it."""
    return [metadata[key] for key in _TITLES if key in metadata]
