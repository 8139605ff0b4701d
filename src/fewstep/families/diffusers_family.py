"""What all families in diffusers' format share: components read by their configs, a VAE, text encoders, DDIM."""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.diffusion.condition import Condition, Empty
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import sample_ddim, sample_euler
from fewstep.errors import UserError, first_line
from fewstep.families.config_keys import KnownKeys, refuse_other_keys, with_defaults
from fewstep.families.diffusers_denoiser import DiffusersDenoiser, plain_config
from fewstep.families.diffusers_folder import has_guidance_built_in, is_diffusers_folder, names_of
from fewstep.families.family import Description, Family
from fewstep.formats.diffusers_index import (
    INDEX,
    read_json,
    read_model_index,
    read_scheduler,
    read_vae_config,
    vae_factor,
)
from fewstep.formats.few_step_names import few_steps_named
from fewstep.formats.json_files import read_json_object
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.stored_tensors import StoredTensors
from fewstep.networks.text_layout import TextLayout

if TYPE_CHECKING:
    from fewstep.networks.autoencoder import Autoencoder
    from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders

_RELEASED_FACTOR = 8
# parts of a safety checker, and of picture prompts, which are not given here
_OF_A_CHECKER = ("safety_checker", "feature_extractor", "image_encoder")
_OF_TRAINING = ("sample_size", "dropout")  # what a trained network computes does not depend on them
_VAE_ARITHMETIC: dict[str, Any] = {"latents_mean": None, "latents_std": None, "shift_factor": 0.0}  # and their defaults

# what its constructor builds in, and what `vae_read` and `_VAE_ARITHMETIC` settle
_VAE_KEYS = KnownKeys(
    classes=("AutoencoderKL",),
    read=(
        "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "act_fn",
        "latent_channels", "norm_num_groups", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
        "scaling_factor", "shift_factor", "latents_mean", "latents_std",
    ),
    # tiling and half precision of the stock pipeline, which runs in float32 here; code beside the config, which is never run
    elsewhere=("sample_size", "force_upcast", "auto_map"),
)  # fmt: skip


class DiffusersFamily(Family):
    """A text-to-image network, its scheduler, VAE and text encoders in a diffusers folder.

    Attributes:
        description_name: what the family's descriptions call it on disk ("family").
        text_layout: its text encoders.
        scheduler_keys: the scheduler configs that are understood.
        network_keys: the network configs that are understood.
        vae_keys: the VAE configs that are understood.
        vae_read: keys of the VAE's config, beyond its architecture, that are honoured.
        guidance_off: arguments of its pipeline's call that switch guidance off.
        distilled_releases: {name of a few-step release, in small letters with dashes: the model it was made from}.
        other_pipelines: those whose networks may have the layers of this family's, and which make pictures in another way.
    """

    description_name: str
    text_layout: TextLayout
    scheduler_keys: KnownKeys
    network_keys: KnownKeys
    vae_read: tuple[str, ...]
    vae_keys: KnownKeys = _VAE_KEYS
    guidance_off: Mapping[str, float] = {"guidance_scale": 1}
    distilled_releases: Mapping[str, str] = {}
    other_pipelines: frozenset[str] = frozenset()
    takes = "prompts"
    sampler_name = "DDIM"
    pair_sampler = "Euler, trailing"
    default_num_steps = 50
    default_guidance_scale = 7.5
    default_batch_size = 4
    export_precision = "fp16"

    @abstractmethod
    def has_network(self, config: dict[str, Any]) -> bool:
        """Whether a network's config, of class `network_class`, is of this family."""

    @abstractmethod
    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        """The family's denoiser around a diffusers network; raises ValueError for configs it does not understand."""

    def recognise(self, folder: Path) -> bool:
        if not is_diffusers_folder(folder) or self.component not in read_model_index(folder):
            return False
        config = self._network_config(folder)
        return config.get("_class_name") == self.network_class and self.has_network(config)

    def describes(self, description: Description) -> bool:
        return description.get("family") == self.description_name and self.has_network(description["network"])

    def build(self, description: Description) -> Denoiser:
        kind = _need_libraries(self.network_class)
        network = kind.from_config(_without_unread(description["network"], kind, self.network_keys))
        return self.build_around(network, description["scheduler"], int(description["latent_size"]))

    def load(self, folder: Path, resolution: int = 0) -> Denoiser:
        kind = _need_libraries(self.network_class)
        from fewstep.networks.components import load_component

        scheduler, size = self._scheduler(folder), self._latent_size(folder, resolution)
        self._refuse_other_networks(folder, kind)
        weights = load_component(kind, folder / self.component)
        with _understood(folder):
            return self.build_around(weights.float(), scheduler, size)

    def stored_weights(self, folder: Path) -> StoredTensors | None:
        from fewstep.networks.components import find_component

        return find_component(folder / self.component).prefixed("network.")

    def describe_folder(self, folder: Path, resolution: int = 0) -> Description:
        from fewstep.networks.components import describe_component

        kind, size = _need_libraries(self.network_class), self._latent_size(folder, resolution)
        scheduler = self._scheduler(folder)
        self._refuse_other_networks(folder, kind)
        untrained = describe_component(kind, folder / self.component)
        with _understood(folder):
            return self.build_around(untrained, scheduler, size).describe()

    def describe_released(self, name: str, resolution: int = 0) -> Description:
        if resolution % _RELEASED_FACTOR:
            raise ValueError(
                f"teacher.resolution={resolution} is not a multiple of the VAE's factor {_RELEASED_FACTOR}"
            )
        size = {"latent_size": resolution // _RELEASED_FACTOR} if resolution else {}
        return {**self.shapes[name], **size}

    def read_card(self, folder: Path) -> ModelCard:
        levels = int(read_scheduler(folder).get("num_train_timesteps", 1000))
        return ModelCard(role="teacher", num_levels=levels, can_be_guided=not self._guidance_built_in(folder))

    def evaluations(self, num_steps: int) -> int:
        return num_steps

    def sample(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        return sample_ddim(denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

    def sample_pairs(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        return sample_euler(denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

    def refuse_guidance(self, denoiser: Denoiser, card: ModelCard, guidance_scale: float) -> None:
        if guidance_scale != 1 and not card.can_be_guided:
            raise UserError(
                f"guidance_scale={guidance_scale}: this is a few-step model, by its scheduler or its name, its guidance is built "
                "in; use 1, or give the model it was distilled from"
            )

    def refuse_other_settings(self, config: Mapping[str, Any], description: Description) -> None:
        refuse_other_keys(config, self.network_keys, self.component, self.title)
        from fewstep.networks.components import signature_defaults

        defaults = signature_defaults(_need_libraries(self.network_class))
        own, base = {**defaults, **config}, {**defaults, **description["network"]}
        for name in self.network_keys.read:
            said, expected = own.get(name), base.get(name)
            if name not in _OF_TRAINING and _one(said) != _one(expected):
                raise ValueError(
                    f"its config.json says {name}={said}, that of the base {expected}; give the base that it was made from"
                )

    def refuse_as_teacher(self, folder: Path) -> None:
        if release := self._distilled_release(folder):
            raise UserError(
                f"{folder} is {release}, a distilled release whose guidance is built in and whose scores are of few noise levels: "
                f"it is no teacher; distil {self.distilled_releases[release]}"
            )
        if method := self._few_steps_named(folder):
            raise UserError(
                f"{folder} is a model of few steps by its name ({method}), whose guidance is built in and whose scores are of few "
                "noise levels: it is no teacher; distil the model it was made from, or rename the folder if it is none"
            )

    def text_encoders(self, folder: Path) -> "TextEncoders":
        from fewstep.networks.text_encoders import TextEncoders

        return TextEncoders(folder, self.text_layout)

    def condition(self, embeddings: "TextEmbeddings", empty: "TextEmbeddings", size: tuple[int, int]) -> Condition:
        parts, rows = {"text": embeddings.text}, dict[str, Empty](text=empty.text)
        if embeddings.pooled is not None and empty.pooled is not None:
            parts["pooled"], rows["pooled"] = embeddings.pooled, empty.pooled
        if embeddings.lengths is not None and empty.lengths is not None:
            parts["text_length"], rows["text_length"] = embeddings.lengths, empty.lengths
        return Condition(len(embeddings.text), parts, rows)

    def autoencoder(self, folder: Path) -> "Autoencoder | None":
        from fewstep.networks.autoencoder import load_autoencoder

        vae = load_autoencoder(folder, self.autoencoder_classes())
        config = read_vae_config(folder)
        self._refuse_other_class(folder, "vae", config)
        if config.get("_class_name") == self.vae_keys.classes[0]:
            try:
                refuse_other_keys(config, self.vae_keys, "vae", self.title)
            except ValueError as error:
                raise UserError(f"{folder}: {error}") from error
        for name in _VAE_ARITHMETIC:
            if name not in self.vae_read and config.get(name) not in (None, _VAE_ARITHMETIC[name]):
                raise UserError(
                    f"{folder}: its vae has {name}={config[name]!r}, which this version does not understand for {self.title}"
                )
        return vae

    def autoencoder_classes(self) -> "Mapping[str, type[Autoencoder]]":
        """Classes of diffusers that its VAE may be: how the latents of each are scaled."""
        from fewstep.networks.autoencoder import PLAIN

        return PLAIN

    def build_autoencoder(self, config: Mapping[str, Any]) -> "Autoencoder":
        classes = self.autoencoder_classes()
        name = str(config.get("_class_name") or next(iter(classes)))
        if name not in classes:
            raise UserError(f"a vae of class {name[:60]} is not read; of {self.title} {' and '.join(classes)} can be")
        kind = _need_libraries(name)
        return classes[name](kind.from_config(_without_unread(config, kind, self.vae_keys)))

    def read_autoencoder_config(self, folder: Path) -> dict[str, Any]:
        return read_vae_config(folder)

    def pixels_per_latent(self, folder: Path) -> int:
        return vae_factor(read_vae_config(folder))

    def pipeline_options(self, size: tuple[int, int]) -> dict[str, Any]:
        return dict(self.guidance_off)

    def resolution(self, folder: Path) -> int:
        return int(self._network_config(folder)["sample_size"]) * self.pixels_per_latent(folder)

    def _guidance_built_in(self, folder: Path) -> bool:
        return has_guidance_built_in(folder) or bool(self._distilled_release(folder) or self._few_steps_named(folder))

    def _few_steps_named(self, folder: Path) -> str:
        """The word by which a folder's names say that a fine-tune is distilled, as those with Lightning merged in; empty: none."""
        return next(
            (word for name in names_of(folder, self.component) if (word := few_steps_named(name, self.file_words))), ""
        )

    def _distilled_release(self, folder: Path) -> str:
        """Which of `distilled_releases` a folder's names say it is; empty: none."""
        names = " ".join(names_of(folder, self.component)).lower().replace("_", "-")
        return next((release for release in self.distilled_releases if release in names), "")

    def _scheduler(self, folder: Path) -> dict[str, Any]:
        """The scheduler's config without private entries, understood whole."""
        config, index = read_scheduler(folder), read_model_index(folder)
        if (pipeline := read_json_object(folder / INDEX).get("_class_name")) in self.other_pipelines:
            raise UserError(
                f"{folder}: {INDEX} names {pipeline}, which makes pictures in another way than {self.title} does here: it is no teacher"
            )
        known = {self.component, "vae", "scheduler", *self.text_layout.components, *_OF_A_CHECKER}
        if other := sorted(index.keys() - known):
            raise UserError(
                f"{folder}: {INDEX} names {other[0]} ({index[other[0]][1]}), which {self.title} does not have here; a model with it "
                "makes other pictures than one without"
            )
        listed = str(index["scheduler"][1]) if "scheduler" in index else config.get("_class_name", "")
        try:
            refuse_other_keys(config, self.scheduler_keys, "scheduler", self.title)
            if listed not in self.scheduler_keys.classes:
                raise ValueError(f"{INDEX} names the scheduler class {listed}, which is not one of {self.title} here")
            return plain_config(with_defaults(config, listed, self.scheduler_keys))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error

    def _refuse_other_networks(self, folder: Path, kind: Any) -> None:
        """Raise UserError for a network setting that is not understood here, or that the installed diffusers would leave out."""
        self._refuse_other_class(folder, self.component, self._network_config(folder))
        known = inspect.signature(kind.__init__).parameters
        for name, value in self._network_config(folder).items():
            if name.startswith("_") or name in self.network_keys.elsewhere:
                continue
            if name not in known and value is not None and value is not False:
                raise UserError(
                    f"{folder}: its {self.component} has {name}={value!r}, which this version of diffusers does not know; "
                    "pip install -U diffusers"
                )
        try:
            refuse_other_keys(self._network_config(folder), self.network_keys, self.component, self.title)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error

    def _refuse_other_class(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        """Raise UserError for a component whose class in the index, by which diffusers builds it, is not its config's."""
        listed, own = read_model_index(folder).get(name, ["", ""])[1], config.get("_class_name")
        if listed and own != listed:
            raise UserError(
                f"{folder}: {INDEX} names {listed} as its {name}, the component's own config.json {str(own)[:60]}; one of the two is "
                "another model's"
            )

    def _network_config(self, folder: Path) -> dict[str, Any]:
        return read_json(folder / self.component / "config.json", folder, self.component)

    def _latent_size(self, folder: Path, resolution: int) -> int:
        """Side of the latents for pictures of a side; 0: the network's own."""
        if not resolution:
            return 0
        factor = self.pixels_per_latent(folder)
        if resolution % factor:
            raise UserError(f"teacher.resolution={resolution} is not a multiple of the VAE's factor {factor}")
        return resolution // factor


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """Name the folder whose configs describe no model; raises UserError."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{folder}: its configs describe no model ({first_line(error)})") from error


def _without_unread(config: Mapping[str, Any], kind: Any, keys: KnownKeys) -> dict[str, Any]:
    """A config without what changes nothing here and a class does not know: diffusers would say so on every build."""
    known = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in config.items() if name in known or name not in keys.elsewhere}


def _one(value: Any) -> Any:
    """A setting as it counts: one value for all blocks may be written once, and none as null, false or 0."""
    found = list(value) if isinstance(value, tuple | list) else [value]
    return (found[0] if all(part == found[0] for part in found[1:]) and found else found) or None


def _need_libraries(name: str) -> Any:
    """A class of diffusers.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"text-to-image models need {error.name}: pip install {error.name}") from error
    return getattr(diffusers, name)
