"""Settings as frozen, validated trees: TOML recipes plus `key=value`, every mistake named with the nearest right key."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
SettingsT = TypeVar("SettingsT", bound="Tree")


class Tree(BaseModel):
    """Base of every settings group: frozen, nothing unknown, nothing coerced between kinds, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSettings(Tree):
    """Pictures to train on."""

    images: str = Field(
        "", description="folder of pictures, parquet file, published LMDB (folder with data.mdb), or hub data set id"
    )
    split: str = Field("train", description="split of the data set, where it has several")
    label_column: str = Field("label", description="column of integer class labels; ignored without classes")
    fit: Literal["crop", "pad", "exact"] = Field(
        "crop", description="crop: resize the shorter side, centre crop; pad: centre on black; exact: refuse others"
    )
    background: str = Field("white", description="colour under transparent pixels, as CSS names it")
    flip: bool = Field(False, description="mirror half of the pictures, chosen per sample and step")
    pairs: str = Field("", description="folder written by `fewstep prepare pairs`, for the regression loss")
    prompts: str = Field(
        "",
        description="prompts of a text-to-image run: .txt, .parquet, .pkl list, folder with captions or bundled:FILE",
    )
    prompt_column: str = Field("text", description="column of the prompts, where the file has several")
    truncate_prompts: bool = Field(
        False, description="cut prompts at the encoders' length instead of refusing long ones"
    )
    text_embeddings: Literal["stored", "computed"] = Field(
        "stored", description="stored: encode each prompt once, then free the text encoders; computed: at every step"
    )
    latents: str = Field(
        "", description="folder written by `fewstep prepare latents`: real data of a text-to-image GAN"
    )


class TeacherSettings(Tree):
    """The frozen model whose distribution is distilled."""

    path: str = Field(
        "", description="folder or .pkl of the teacher, hub id, or 'bundled:fashion-mnist', 'bundled:emoji-sd', ..."
    )
    network: str = Field(
        "", description="catalog shape the teacher must have; lets --dry-run estimate memory without the teacher"
    )
    guidance_scale: float = Field(1.0, ge=0, description="uncond + w (cond - uncond); 1 is off")
    resolution: int = Field(0, ge=0, description="side of text-to-image pictures in pixels; 0: the model's own")


class GeneratorSettings(Tree):
    """The model being trained."""

    step_indices: tuple[int, ...] = Field(
        (999,), description="grid indices the generator runs at, noisiest first; they travel with its weights"
    )
    training_inputs: Literal["simulated", "noised_data"] = Field(
        "simulated",
        description="what later steps are trained on: the generator's own path, or noised real data (ablation)",
    )
    start_from: str = Field(
        "",
        description="earlier run folder, exported or converted generator (with its roles/), or DMD2 checkpoint; empty: the teacher",
    )
    ema_half_life_images: NonNegative = Field(
        0.0, description="half-life of the generator's weight average in images; 0: none"
    )


class MemorySettings(Tree):
    """How the three roles share memory."""

    mode: Literal["full", "lora_generator", "shared_base"] = Field(
        "full", description="full: three networks; lora_generator: generator is a LoRA on the frozen teacher; "
        "shared_base: generator and fake score are two LoRAs on one frozen teacher"
    )  # fmt: skip
    lora_rank: Positive = Field(64, description="rank of each LoRA")
    lora_alpha: float = Field(8.0, gt=0, description="its update is scaled by alpha / rank")
    lora_targets: tuple[str, ...] = Field((), description="layers with a LoRA; empty: the published ones of the family")
    frozen_precision: Literal["fp32", "bf16"] = Field("fp32", description="storage of weights that are never trained")
    checkpoint_activations: bool = Field(False, description="recompute activations in the backward pass")


class LossSettings(Tree):
    """Terms and their weights; a weight of 0 leaves the term out of the run."""

    distribution_matching_weight: NonNegative = Field(1.0, description="weight of distribution matching")
    min_level_index: int = Field(20, ge=0, le=999, description="lowest grid index of distribution matching")
    max_level_index: int = Field(980, ge=0, le=999, description="highest grid index, inclusive")
    gan_generator_weight: NonNegative = Field(0.0, description="weight of the generator's GAN loss")
    gan_discriminator_weight: NonNegative = Field(0.0, description="weight of the discriminator's loss")
    regression_weight: NonNegative = Field(0.0, description="weight of DMD's regression on noise-image pairs")
    regression_distance: Literal["pixel", "lpips"] = Field("pixel", description="distance of the regression")
    regression_autoencoder: str = Field(
        "", description="VAE that decodes latents for lpips, e.g. a folder of TAESD; empty: the teacher's"
    )
    vgg_weights: str = Field("", description="VGG16 state dict for lpips (vgg16-397923af.pth)")
    lpips_weights: str = Field("", description="LPIPS v0.1 linear heads (vgg.pth)")


class OptimizerSettings(Tree):
    """AdamW, one for the generator and one for fake score and discriminator."""

    generator_lr: float = Field(2e-6, gt=0, description="learning rate of the generator (or of pre-training)")
    fake_score_lr: float = Field(2e-6, gt=0, description="learning rate of fake score and discriminator")
    warmup_steps: int = Field(500, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine"] = Field("constant", description="shape of the rate after warm-up")
    final_lr_fraction: Fraction = Field(0.0, description="rate at the end of a cosine, relative to its start")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay")
    max_grad_norm: float = Field(10.0, gt=0, description="gradient norm of each optimiser is clipped at this")


class TrainingSettings(Tree):
    """How long and how much at once."""

    num_steps: Positive = Field(100_000, description="number of training steps")
    time_limit_minutes: NonNegative = Field(
        0.0, description="stop after this much training time; rate decay then follows the clock. 0: none"
    )
    batch_size: Positive = Field(280, description="samples a step over all processes")
    microbatch_size: int = Field(
        0,
        ge=0,
        description="samples that go through the networks at once, their gradients added up; 0: the whole batch",
    )
    generator_every: Positive = Field(5, description="fake-score steps per generator update")
    seed: int = Field(0, ge=0, lt=2**63, description="every random number follows from it")


class PretrainNoiseSettings(Tree):
    """Noise levels a teacher is trained at: ln(sigma) ~ N(mean, std)."""

    log_sigma_mean: float = Field(-1.2, description="mean of ln(sigma)")
    log_sigma_std: float = Field(1.2, gt=0, description="standard deviation of ln(sigma)")


class NetworkSettings(Tree):
    """The teacher to train."""

    name: str = Field("small", description="shape from the catalog, e.g. small, cifar10-ddpmpp, imagenet64-adm")
    img_resolution: Positive = Field(32, description="side of the square pictures in pixels")
    img_channels: Literal[1, 3] = Field(3, description="1 grey, 3 colour")
    label_dim: int = Field(0, ge=0, description="number of classes, 0 for pictures without labels")
    label_dropout: Fraction = Field(
        0.0, description="share of samples trained without label; above 0 the teacher can be guided"
    )
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data in [-1, 1]")


class ComputeSettings(Tree):
    """Where and in which precision."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="inside the networks; outside is fp32. auto: what is fast on the device, measured at the start",
    )
    compile: bool = Field(False, description="torch.compile the networks")
    threads: int = Field(0, ge=0, description="CPU threads; 0 leaves torch's choice")


class RunSettings(Tree):
    """The run folder and what is written there, counted in steps."""

    folder: str = Field("", description="run folder; empty: runs/<recipe name>")
    log_every: Positive = Field(50, description="steps between metric lines on disk")
    sample_every: Positive = Field(1000, description="steps between sample pictures")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept")
    sample_images: Positive = Field(64, le=1024, description="pictures in a sample grid")
    tensorboard: bool = Field(True, description="write TensorBoard event files too")


class BestSettings(Tree):
    """The best generator of a run, kept beside the newest checkpoints; measured at every checkpoint."""

    metric: Literal["", "frechet_distance"] = Field("", description="what decides; empty: nothing is measured or kept")
    features: str = Field(
        "", description="feature network: folder of `fewstep prepare features`, bundled:NAME or Inception"
    )
    reference: str = Field("", description=".npz of `fewstep prepare statistics`")
    num_images: int = Field(1000, ge=50, description="generated pictures a measurement")


class TrainSettings(Tree):
    """Everything `fewstep train` needs."""

    expected: str = Field("", description="published result of the recipe, for the reader")
    teacher: TeacherSettings = TeacherSettings()
    generator: GeneratorSettings = GeneratorSettings()
    data: DataSettings = DataSettings()
    memory: MemorySettings = MemorySettings()
    losses: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()
    best: BestSettings = BestSettings()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        losses, steps = self.losses, self.generator.step_indices
        falling = list(steps) == sorted(set(steps), reverse=True)
        if not steps or not falling or not all(0 <= index <= 999 for index in steps):
            raise ValueError(
                f"generator.step_indices={list(steps)} must be grid indices between 999 and 0, falling, "
                "at least one, e.g. [999] or [999, 749, 499, 249]"
            )
        if not (losses.distribution_matching_weight or losses.gan_generator_weight or losses.regression_weight):
            raise ValueError(
                "losses.distribution_matching_weight, losses.gan_generator_weight and losses.regression_weight "
                "are all 0: the generator has nothing to learn from"
            )
        if losses.gan_generator_weight and not losses.gan_discriminator_weight:
            raise ValueError(
                "losses.gan_generator_weight is set but losses.gan_discriminator_weight is 0: "
                "an untrained discriminator teaches nothing; set both (published: 3e-3 and 1e-2)"
            )
        if losses.min_level_index > losses.max_level_index:
            raise ValueError(
                f"losses.min_level_index={losses.min_level_index} lies above "
                f"losses.max_level_index={losses.max_level_index}"
            )
        if losses.regression_weight and losses.regression_distance == "lpips":
            for name in ("vgg_weights", "lpips_weights"):
                if not getattr(losses, name):
                    raise ValueError(
                        f"losses.regression_distance='lpips' needs losses.{name}; "
                        "losses.regression_distance='pixel' needs no file"
                    )
        memory = self.memory
        if memory.frozen_precision == "bf16" and (memory.mode == "full" or self.compute.precision == "fp32"):
            raise ValueError(
                "memory.frozen_precision='bf16' needs a frozen base (memory.mode='lora_generator' or 'shared_base') "
                "and compute.precision='bf16'"
            )
        if memory.mode != "full" and self.compute.compile:
            raise ValueError("compute.compile=true does not go with LoRA (memory.mode); set it to false")
        if self.generator.training_inputs == "noised_data" and not losses.gan_discriminator_weight:
            raise ValueError(
                "generator.training_inputs='noised_data' reads the real batch of the GAN: set "
                "losses.gan_discriminator_weight too"
            )
        if len(self.generator.step_indices) != 1 and losses.regression_weight:
            raise ValueError(
                "losses.regression_weight needs a one-step generator: generator.step_indices has "
                f"{len(self.generator.step_indices)} entries"
            )
        return self


class PretrainSettings(Tree):
    """Everything `fewstep pretrain` needs."""

    expected: str = Field("", description="published result of the recipe, for the reader")
    network: NetworkSettings = NetworkSettings()
    noise: PretrainNoiseSettings = PretrainNoiseSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings(generator_lr=1e-3, weight_decay=0.0)
    training: TrainingSettings = TrainingSettings(batch_size=128)
    ema_half_life_images: float = Field(500_000.0, gt=0, description="half-life of the weight average")
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()


def parse_settings(kind: type[SettingsT], values: dict[str, Any], source: str) -> SettingsT:
    """Validate a nested dict.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type or an impossible combination; the
            message names `source` and the dotted key.
    """
    _refuse_unknown(kind, values, source)
    try:
        # JSON mode: lists become tuples and integers floats, which TOML and key=value cannot spell otherwise
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None


def load_settings(kind: type[SettingsT], recipe: str | Path, overrides: list[str] | None = None) -> SettingsT:
    """Read a TOML recipe, apply `section.key=value` overrides, validate.

    A recipe may name another with a top-level `extends = "other.toml"` (relative to itself) and then states only
    its differences.

    Raises:
        UserError: the file is missing or not TOML, an override is not key=value, or validation fails.
    """
    values = _read_recipe(Path(recipe), seen=())
    for override in overrides or []:
        _apply_override(values, override)
    return parse_settings(kind, values, str(recipe))


def describe_settings(kind: type[Tree], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows (dotted key, type, default, meaning) of every setting, for `--help` and the docs."""
    rows: list[tuple[str, str, str, str]] = []
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Tree):
            defaults = field.default
            for key, type_name, _, meaning in describe_settings(annotation, f"{prefix}{name}."):
                rows.append((key, type_name, repr(getattr(defaults, key.rsplit(".", 1)[1])), meaning))
        else:
            type_name = getattr(annotation, "__name__", str(annotation)).replace("typing.", "")
            rows.append((prefix + name, type_name, repr(field.default), field.description or ""))
    return rows


def flatten_settings(settings: Tree) -> dict[str, Any]:
    """{dotted key: value} of a whole tree, in JSON types."""
    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(settings.model_dump(mode="json"), "")
    return flat


def _read_recipe(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist; the shipped ones lie in recipes/")
    if path.resolve() in seen:
        raise UserError(f"recipe {path} extends itself")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"recipe {path}: extends must name a recipe file")
    return _merge(_read_recipe(path.parent / parent, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"{override!r} is not a setting: write section.key=value, e.g. training.batch_size=64")
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{override!r}: {section} is a value, not a section")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, as a shell user writes it
    values[name] = value if isinstance(value, str | int | float | list | dict) else text  # dates are text too


def _refuse_unknown(kind: type["Tree"], values: dict[str, Any], source: str) -> None:
    known = {row[0] for row in describe_settings(kind)}

    def walk(group: type[Tree], values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if key not in group.model_fields:
                raise UserError(f"{source}: unknown setting {prefix}{key}{_hint(kind, group, prefix, key, known)}")
            annotation: Any = group.model_fields[key].annotation
            if isinstance(annotation, type) and issubclass(annotation, Tree):
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {prefix}{key} is a section, not a value: set {prefix}{key}.<name>")
                walk(annotation, value, f"{prefix}{key}.")
            elif type(value) not in (str, int, float, bool, list, dict):
                raise UserError(f"{source}: {prefix}{key}={value} has a type no setting has; put it in quotes")

    walk(kind, values, "")


def _hint(kind: type["Tree"], group: type["Tree"], prefix: str, key: str, known: set[str]) -> str:
    """The nearest right key: the same name in another section, then a similar one here, then the other command's."""
    same_name = [dotted for dotted in sorted(known) if dotted.rsplit(".", 1)[-1] == key]
    if same_name:
        return f"; did you mean {same_name[0]}?"
    near = difflib.get_close_matches(key, list(group.model_fields), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    for other, command in ((TrainSettings, "train"), (PretrainSettings, "pretrain")):
        if other is not kind and f"{prefix}{key}" in {row[0].rsplit(".", 1)[0] for row in describe_settings(other)}:
            return f"; it belongs to recipes of `fewstep {command}`"
    return ""


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}={item['input']!r}: {message}" if key else message
