"""What a single file says of itself beside its weights: how it predicts, its noise schedule, what was left out of it.

The words are those of the header (modelspec and what trainers add), of marker tensors, of the schedule's own tensors, and of
the .yaml beside the file by which the LDM code and the programs after it know how a model was trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.tensor_files import header_of

# Empty tensors by which ComfyUI, stable-diffusion.cpp and others know how a model predicts
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
_ENCODER_LAYER = "modelspec.encoder_layer"  # of the text encoder, from its end; a way to say clip skip
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # of sd-scripts; of ComfyUI
_V_KEY = "ss_v_parameterization"
_ALPHAS, _BETAS, _SQUARE_ROOTS, _SCALE = "alphas_cumprod", "betas", "sqrt_alphas_cumprod", "scale_factor"
_MAX_CONFIG = 2**20  # bytes of a .yaml
_MAX_LEVELS = 100_000


@dataclass(frozen=True)
class LdmConfig:
    """What the .yaml beside a single file says, of what changes the arithmetic.

    Attributes:
        path: of the .yaml.
        values: the entries found, as texts.
    """

    path: Path
    values: Mapping[str, str]

    @classmethod
    def beside(cls, file: Path) -> "LdmConfig | None":
        """That of a single file; None where there is none.

        Raises:
            UserError: it is too large, or no text.
        """
        path = file.with_suffix(".yaml")
        if not path.is_file():
            return None
        try:
            with path.open("rb") as opened:
                content = opened.read(_MAX_CONFIG + 1)
            if len(content) > _MAX_CONFIG:
                raise ValueError("it is larger than any model's config")
            text = content.decode("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}, which says how {file.name} was trained, cannot be read ({error}); move it away"
            ) from error
        wanted = "parameterization|linear_start|linear_end|timesteps|scale_factor"
        found = re.findall(rf"^[ \t]*({wanted})[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
        return cls(path, dict(reversed(found)))

    def number(self, name: str) -> float | None:
        """An entry's number, where there is one; raises UserError for anything else."""
        if (text := self.values.get(name)) is None:
            return None
        try:
            return float(text)
        except ValueError:
            raise UserError(f"{self.path} has {name}: {text[:40]}, not a number; move it away") from None


def stated_prediction(
    path: Path, others: Mapping[str, Tensor], metadata: Mapping[str, str], config: LdmConfig | None
) -> str:
    """ "epsilon" or "v_prediction", as marker, header and config say; "" where none does.

    Raises:
        UserError: they contradict each other, or say another prediction.
    """
    stated = {f"{key} in its header": metadata[key] for key in _PREDICTION_KEYS if metadata.get(key)}
    if metadata.get(_V_KEY, "").lower() == "true":
        stated[f"{_V_KEY} in its header"] = "v"
    if config is not None and "parameterization" in config.values:
        stated[f"parameterization in {config.path.name}"] = config.values["parameterization"]
    for where, word in stated.items():
        if word.lower() not in _PREDICTIONS:
            name, _, place = where.partition(" in ")
            raise UserError(f"{path}: {place} says {name}={word[:40]!r}; epsilon and v are known here")
    found = {where: _PREDICTIONS[word.lower()] for where, word in stated.items()}
    if V_MARKER in others:
        found = {f"its tensor {V_MARKER}": "v_prediction", **found}
    if len(set(found.values())) > 1:
        one = next(iter(found))
        other = next(where for where in found if found[where] != found[one])
        raise UserError(
            f"{path} contradicts itself: {one} says {_named(found[one])}, {other} says {_named(found[other])}; remove the wrong one"
        )
    return next(iter(found.values()), "")


def contradiction(lora: Path, own: str) -> str:
    """What a LoRA's header says of the model it was made for, beside a network's own prediction, in words; "" where they agree or it says nothing.

    Raises:
        UserError: the header contradicts itself, or says a prediction that is not known.
    """
    stated = stated_prediction(lora, {}, header_of(lora), None)
    if not stated or stated == own:
        return ""
    return f"{_named(stated)}, as its header says, and the scheduler here says {_named(own) or 'nothing'}"


def _named(prediction: str) -> str:
    return prediction.replace("_", "-")


def stated_alphas(path: Path, others: Mapping[str, Tensor], config: LdmConfig | None) -> Tensor | None:
    """The noise schedule (T,) that the file's tensors or its config have, as alphas_cumprod; None where none does."""
    for name in (_ALPHAS, _BETAS, _SQUARE_ROOTS):
        if name in others and (others[name].ndim != 1 or not others[name].is_floating_point()):
            raise UserError(f"{path}: its tensor {name} is no list of numbers; it is damaged")
    if _ALPHAS in others:
        return others[_ALPHAS]
    if _BETAS in others:
        return (1 - others[_BETAS].double()).cumprod(0)
    if _SQUARE_ROOTS in others:
        return others[_SQUARE_ROOTS].double() ** 2
    start, end = (None if config is None else config.number(f"linear_{side}") for side in ("start", "end"))
    if config is None or start is None or end is None or ZERO_SNR_MARKER in others:  # which rescales it
        return None
    levels = config.number("timesteps") or 1000
    if not (0 < levels <= _MAX_LEVELS and 0 < start <= end < 1):
        raise UserError(f"{config.path}: linear_start, linear_end and timesteps give no noise schedule; move it away")
    return (1 - torch.linspace(start**0.5, end**0.5, int(levels), dtype=torch.float64) ** 2).cumprod(0)


def stated_scale(path: Path, others: Mapping[str, Tensor], config: LdmConfig | None) -> float | None:
    """What latents were multiplied by in training; None where nothing says it."""
    if _SCALE not in others:
        return None if config is None else config.number(_SCALE)
    if others[_SCALE].numel() != 1:
        raise UserError(f"{path}: its tensor {_SCALE} has {others[_SCALE].numel()} numbers, not one; it is damaged")
    return float(others[_SCALE])


def skipped_layers(path: Path, metadata: Mapping[str, str]) -> int:
    """Layers at the end of the text encoder that a header says are left out: 1 (or -1) is the last one."""
    stated = metadata.get(_ENCODER_LAYER, "1")
    if not re.fullmatch(r"-?[1-9]", stated):
        raise UserError(
            f"{path}: its header says {_ENCODER_LAYER}={stated[:40]!r}; a layer counted from the end is known here"
        )
    return abs(int(stated)) - 1
