"""A whole model in one file, in the layout that its family hands out: read without executing anything in it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError, first_line
from fewstep.formats.stated_facts import (
    V_MARKER,
    ZERO_SNR_MARKER,
    LdmConfig,
    skipped_layers,
    stated_alphas,
    stated_prediction,
    stated_scale,
)
from fewstep.formats.tensor_files import is_safetensors, read_safetensors
from fewstep.formats.torch_archive import read_torch_archive
from fewstep.formats.wrapped_names import bare_name

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Older merges leave this out of CLIP's keys
_OPTIONAL_PREFIX = "text_model."
# What comes in single files too and is of no family here: where it is known by
_OTHERS = {
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "lora_unet_": "a LoRA",
    "control_model.": "a ControlNet",
    "down_blocks.": "a U-Net in diffusers' own keys",
}


_AVERAGES = "model_ema."
_EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.")
# What training leaves in a file beside the model: schedules, averages and losses, which no component has
_LEFT_BEHIND = re.compile(
    r"model_ema\..*|loss\..*|denoiser\..*|conditioner\.embedders\.\d+\.logit_scale|cond_stage_model\.logit_scale|"
    r"betas|alphas_cumprod(_prev)?|(sqrt|log|sqrt_recip|sqrt_recipm1|sqrt_one_minus|log_one_minus)_\w*alphas_cumprod|"
    r"posterior_\w+|lvlb_weights|logvar|scale_factor|global_step"
)


@dataclass(frozen=True)
class SingleFileLayout:
    """How one family's models lie in a single file.

    Attributes:
        family: its name.
        title: what messages call such models.
        architecture: what the header's modelspec calls them.
        prefixes: component -> what its keys begin with, the network first.
        classes: component -> its class in diffusers or transformers.
        to_file: (component, state dict, config) -> the tensors under the file's keys; raises UserError for another
            network than the layout has.
        from_file: (component, tensors by their keys without prefix, config, shapes by diffusers' names) -> state dict;
            raises UserError for another network than the config says.
        alphas_cumprod: (T,) of a scheduler's config.
        marks: beginnings of keys that only this layout has; empty: its network's prefix is its only sign.
        foreign_marks: beginnings of keys that files with `marks` have where they are another model all the same.
        refuse_text_encoder: config of the first text encoder -> why it has no place in such a file; "": it has one.
        assumed: (component or "scheduler", its config) -> what every reader of such files takes its settings to be.
        may_skip_layers: whether files may say that their text encoder is read before its last layer (clip skip).
    """

    family: str
    title: str
    architecture: str
    prefixes: Mapping[str, str]
    classes: Mapping[str, str]
    to_file: Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
    from_file: Callable[[str, Mapping[str, Tensor], Mapping[str, Any], Mapping[str, torch.Size]], dict[str, Tensor]]
    alphas_cumprod: Callable[[dict[str, Any]], Tensor]
    marks: tuple[str, ...] = ()
    foreign_marks: tuple[str, ...] = ()
    refuse_text_encoder: Callable[[Mapping[str, Any]], str] = lambda config: ""
    assumed: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda component, config: {}
    may_skip_layers: bool = False

    @property
    def network_prefix(self) -> str:
        """What the network's keys begin with."""
        return next(iter(self.prefixes.values()))


@dataclass(frozen=True)
class SingleFile:
    """The components of a single-file checkpoint.

    Attributes:
        path: the file.
        layout: its family's.
        parts: component -> its tensors by their keys without the component's prefix; those it has, the network always.
        prediction_type: "epsilon" or "v_prediction" where a marker tensor, the header or the .yaml beside it says so, else "".
        zero_snr: whether a marker says that the noise schedule ends without signal.
        alphas_cumprod: the noise schedule, where the file has it.
        scale_factor: what latents were multiplied by in training, where the file has it.
        skipped_layers: last layers of the text encoder that the header says are not used.
        metadata: the file's header entries.
        has_averages: whether averaged weights of the network lie beside those that are read.
    """

    path: Path
    layout: SingleFileLayout
    parts: dict[str, dict[str, Tensor]]
    prediction_type: str = ""
    zero_snr: bool = False
    alphas_cumprod: Tensor | None = None
    scale_factor: float | None = None
    skipped_layers: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    has_averages: bool = False

    @property
    def absent(self) -> tuple[str, ...]:
        """Components of the family that the file has nothing of."""
        return tuple(name for name in self.layout.prefixes if name not in self.parts)

    def diffusers_state(
        self, component: str, config: Mapping[str, Any], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """One component's state dict in diffusers' names, float16, bfloat16 or float32.

        Args:
            component: one of `parts`.
            config: the component's config.
            shapes: names and shapes of the network with this config.

        Raises:
            UserError: the file holds another network, or numbers that are none; names the tensor.
        """
        try:
            state = self.layout.from_file(component, self.parts[component], config, shapes)
            return {name: _weight(name, value) for name, value in state.items()}
        except (UserError, RuntimeError) as error:
            raise UserError(f"{self.path}: {error}") from error


def read_single_file(
    path: Path, layouts: Sequence[SingleFileLayout], unread: Mapping[str, str] = MappingProxyType({})
) -> SingleFile:
    """The components of a single-file checkpoint, its tensors still under the file's keys.

    Args:
        path: a .safetensors; or a .ckpt whose pickle holds nothing but tensors.
        layouts: those it may be in.
        unread: beginnings of keys of models that are not read -> what messages call them.

    Raises:
        UserError: no such file, a damaged one, a pickle with anything but tensors, or another kind of model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; give a single-file checkpoint (.safetensors)")
    pickled = path.suffix.lower() in _PICKLES and not is_safetensors(path)
    stored, metadata = _read_pickle(path) if pickled else read_safetensors(path)
    tensors = {bare_name(key): value for key, value in stored.items()}
    if len(tensors) != len(stored):
        raise UserError(
            f"{path}: two of its tensors have one name, with and without what a training loop put before it"
        )
    layout = _layout(list(tensors), path, layouts, unread)
    prefixes = layout.prefixes
    parts: dict[str, dict[str, Tensor]] = {component: {} for component in prefixes}
    for key, value in tensors.items():
        for component, prefix in prefixes.items():
            if key.startswith(stem := prefix.removesuffix(_OPTIONAL_PREFIX)):
                short = key.removeprefix(stem)
                optional = _OPTIONAL_PREFIX if prefix != stem else ""
                parts[component][short.removeprefix(optional)] = value
    stems = tuple(prefix.removesuffix(_OPTIONAL_PREFIX) for prefix in prefixes.values())
    others = {key: value for key, value in tensors.items() if not key.startswith(stems)}
    _refuse_unknown(path, others, _titles(layouts, "and"))
    config = LdmConfig.beside(path)
    return SingleFile(
        path, layout, {component: part for component, part in parts.items() if part},
        stated_prediction(path, others, metadata, config), ZERO_SNR_MARKER in others, stated_alphas(path, others, config),
        stated_scale(path, others, config), skipped_layers(path, metadata) if layout.may_skip_layers else 0, metadata,
        any(key.startswith(_AVERAGES) for key in others),
    )  # fmt: skip


def _refuse_unknown(path: Path, others: Mapping[str, Tensor], titles: str) -> None:
    """Raise UserError for tensors that belong to no component and that might change what the model computes."""
    if edm := [key for key in others if key.startswith(_EDM_MARKERS)]:
        raise UserError(
            f"{path} holds {edm[0][:60]!r}: its U-Net takes EDM's noise levels, which {titles} here do not; "
            "give a model that predicts epsilon or v"
        )
    known = (V_MARKER, ZERO_SNR_MARKER)
    if unknown := [key for key in others if key not in known and not _LEFT_BEHIND.fullmatch(key)]:
        raise UserError(
            f"{path}: {len(unknown)} of its tensors belong to no part of such a model, e.g. {unknown[0][:100]!r}; what they "
            "change is not known here: save the model again without them"
        )


def _layout(
    keys: list[str], path: Path, layouts: Sequence[SingleFileLayout], unread: Mapping[str, str]
) -> SingleFileLayout:
    """The one that a file with these keys is in."""

    def has(beginnings: tuple[str, ...]) -> bool:
        return any(key.startswith(beginnings) for key in keys)

    for layout in layouts:
        if layout.marks and has(layout.marks) and not (layout.foreign_marks and has(layout.foreign_marks)):
            return layout
    for prefix, name in {**unread, **_OTHERS}.items():
        if has((prefix,)):
            raise UserError(f"{path} is {name}; single files of {_titles(layouts, 'and')} are read")
    for layout in layouts:
        if not layout.marks and has((layout.network_prefix,)):
            return layout
    raise UserError(
        f"{path} is no {_titles(layouts, 'or')} checkpoint: it has {len(keys)} tensors, e.g. {sorted(keys)[:3]}, "
        f"and none that begins with {' or '.join(dict.fromkeys(layout.network_prefix for layout in layouts))}"
    )


def _titles(layouts: Sequence[SingleFileLayout], joined: str) -> str:
    return f" {joined} ".join(layout.title for layout in layouts)


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a pickle that holds nothing else, as a state dict or under `state_dict`."""
    try:
        return read_torch_archive(path), {}
    except UserError as error:
        raise UserError(
            f"{path} is a pickle with more than tensors in it, or a damaged one; convert it to .safetensors "
            f"({first_line(error)})"
        ) from error


def _weight(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise UserError(f"its tensor {name} holds {value.dtype}, no weights")
    kept = value if value.dtype in (torch.float16, torch.bfloat16, torch.float32) else value.float()
    if not bool(torch.isfinite(kept).all()):
        raise UserError(f"its tensor {name} has numbers that are infinite or none; this is no usable model")
    return kept.contiguous()
