"""Everything `fewstep train` reads."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from fewstep.errors import UserError
from fewstep.settings.common import ComputeSettings, OptimizerSettings, RunSettings, TrainingSettings
from fewstep.settings.data import TrainDataSettings
from fewstep.settings.earlier import Earlier, entry
from fewstep.settings.losses import LossSettings
from fewstep.settings.memory import MemorySettings, impossible_memory
from fewstep.settings.tree import Above0, NonNegative, Positive, Tree, flatten_settings, note


def _one_for_both(value: Any) -> Any:
    """A single learning rate as that of every network."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value, value)


class TrainOptimizerSettings(OptimizerSettings):
    """AdamW, one for the generator and one for fake score and discriminator."""

    lr: Annotated[tuple[Above0, Above0], BeforeValidator(_one_for_both)] = Field(
        (2e-6, 2e-6),
        description="learning rates of the generator, and of fake score and discriminator; one number is both",
    )

    earlier: ClassVar[dict[str, Earlier]] = {
        "generator_lr": Earlier("lr", entry(0, 2)), "fake_score_lr": Earlier("lr", entry(1, 2)),
    }  # fmt: skip

    @property
    def generator_lr(self) -> float:
        """Of the generator."""
        return self.lr[0]

    @property
    def fake_score_lr(self) -> float:
        """Of fake score and discriminator."""
        return self.lr[1]


class TrainTrainingSettings(TrainingSettings):
    """How long, how much at once, and how often the generator's turn comes."""

    generator_every: Positive = Field(5, description="fake-score steps per generator update")


def _uncapped(value: Any) -> Any:
    """A guidance scale alone as one without a limit."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value, 0.0)


def _short(value: tuple[float, float]) -> float | list[float]:
    """As recipes have it: the limit only where there is one."""
    return list(value) if value[1] else value[0]


Guidance = Annotated[tuple[NonNegative, NonNegative], BeforeValidator(_uncapped), PlainSerializer(_short)]


class TeacherSettings(Tree):
    """The frozen model whose distribution is distilled."""

    path: str = Field(
        "", description="folder or .pkl of the teacher, hub id, or 'bundled:fashion-mnist', 'bundled:emoji-sd', ..."
    )
    loras: tuple[str, ...] = Field(
        (),
        description="your LoRAs, merged into a text-to-image teacher: ['FILE:0.8', ...], in kohya's, diffusers' or PEFT's keys",
    )
    network: str = Field(
        "", description="catalog shape the teacher must have; lets --dry-run estimate memory without the teacher"
    )
    guidance_scale: Guidance = Field(
        (1.0, 0.0),
        description="w of uncond + w (cond - uncond), 1 is off; [w, c] keeps the norm of the guided prediction of text-to-image models at or "
        "below c times the conditional one's, each picture as a whole: 1 against burnt colours, 0 is no limit",
    )
    resolution: int = Field(0, ge=0, description="side of text-to-image pictures in pixels; 0: the model's own")

    @property
    def guidance(self) -> float:
        """w; 1 is off."""
        return self.guidance_scale[0]

    @property
    def guidance_norm_cap(self) -> float:
        """Limit of the guided prediction's norm, in norms of the conditional one; 0: none."""
        return self.guidance_scale[1]

    def impossible(self) -> str:
        """What does not go together, or nothing."""
        if self.guidance_norm_cap and self.guidance == 1:
            return f"teacher.guidance_scale={list(self.guidance_scale)}: a scale of 1 is no guidance, and there is no norm to limit"
        return ""


class GeneratorSettings(Tree):
    """The model being trained."""

    step_indices: tuple[int, ...] = Field(
        (999,), description="grid indices the generator runs at, noisiest first; they travel with its weights"
    )
    training_inputs: Literal["simulated", "simulated_per_sample", "noised_data"] = Field(
        "simulated",
        description="what later steps are trained on: the generator's own path, one step a batch (published) or all steps in "
        "each batch, or noised real data (ablation)",
    )
    start_from: str = Field(
        "",
        description="earlier run folder, exported or converted generator (with its roles/), or DMD2 checkpoint; empty: the teacher",
    )
    ema_half_life_images: NonNegative = Field(
        0.0, description="half-life of the generator's weight average in images; 0: none"
    )


_NONE = ["", ""]


def _of_features(files: Any, features: Any) -> Any:
    """`features` was a setting of its own, without which nothing was measured."""
    return _NONE if features == "" else entry(0, 2)(files or _NONE, features)


def _of_reference(files: Any, reference: Any) -> Any:
    """`reference` was a setting of its own."""
    return files if files == _NONE else entry(1, 2)(files or _NONE, reference)


class BestSettings(Tree):
    """The best generator of a run by Frechet distance, kept beside the newest checkpoints; measured at every checkpoint, and in each tenth of a time limit."""

    files: tuple[str, ...] = Field(
        (),
        description="feature network that decides (folder of `fewstep prepare features`, bundled:NAME or Inception) and .npz of `fewstep "
        "prepare statistics` made with it, or ['trained']: the run trains one of its own pictures; empty: nothing is measured or kept",
    )
    num_images: int = Field(1000, ge=50, description="generated pictures a measurement")

    earlier: ClassVar[dict[str, Earlier]] = {
        "features": Earlier("files", _of_features), "reference": Earlier("files", _of_reference),
    }  # fmt: skip

    def impossible(self) -> str:
        """What does not go together, or nothing."""
        if self.files and not self.is_trained and (len(self.files) != 2 or not all(self.files)):
            return (
                f"best.files={list(self.files)} must name two files, a feature network (folder of `fewstep prepare features`, bundled:NAME or "
                "Inception) and the .npz of `fewstep prepare statistics`, or be ['trained']; empty measures nothing"
            )
        return ""

    @property
    def is_trained(self) -> bool:
        """Whether the run trains its feature network itself."""
        return self.files == ("trained",)

    @property
    def features(self) -> str:
        """The feature network, or nothing."""
        return self.files[0] if self.files else ""

    @property
    def reference(self) -> str:
        """The .npz of the pictures to come near to, or nothing."""
        return self.files[1] if len(self.files) > 1 else ""

    @property
    def metric(self) -> str:
        """What decides: frechet_distance, or nothing."""
        return "frechet_distance" if self.files else ""

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """`metric` was a setting of its own; without features nothing was measured, whatever the reference."""
        kept = {key: value for key, value in values.items() if key != "metric"}
        if values.get("metric") == "" or kept.get("files") == _NONE:
            kept = {**kept, "files": []} if under.get("files") else {k: v for k, v in kept.items() if k != "files"}
        elif values.get("metric", "frechet_distance") != "frechet_distance":
            raise UserError(f"best.metric={values['metric']!r}: the Frechet distance is the one there is; leave it out")
        elif "metric" in values and not (under | kept).get("files"):
            raise UserError(
                "best.metric='frechet_distance' needs best.files, a feature network and an .npz, and is then left out: best.files alone says it"
            )
        return kept


class TrainSettings(Tree):
    """Everything `fewstep train` needs."""

    command = "train"

    expected: str = note("published result of the recipe, for the reader")
    teacher: TeacherSettings = TeacherSettings()
    generator: GeneratorSettings = GeneratorSettings()
    data: TrainDataSettings = TrainDataSettings()
    memory: MemorySettings = MemorySettings()
    losses: LossSettings = LossSettings()
    optimizer: TrainOptimizerSettings = TrainOptimizerSettings()
    training: TrainTrainingSettings = TrainTrainingSettings()
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()
    best: BestSettings = BestSettings()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        reason = (
            self.teacher.impossible()
            or self.losses.impossible()
            or impossible_memory(self.memory, self.compute)
            or _impossible_steps(self)
            or self.best.impossible()
        )
        if reason:
            raise ValueError(reason)
        return self


def _impossible_steps(settings: TrainSettings) -> str:
    """What no teacher's grid would allow; how long the grid is, the teacher knows (`diffusion.schedules.StepSchedule`)."""
    generator, losses, indices = settings.generator, settings.losses, settings.generator.step_indices
    if not indices or list(indices) != sorted(set(indices), reverse=True) or indices[-1] < 0:
        return (
            f"generator.step_indices={list(indices)} must be grid indices of 0 or more, falling, at least one, "
            "e.g. [999] or [999, 749, 499, 249]"
        )
    if generator.training_inputs == "noised_data" and not losses.gan_discriminator_weight:
        return "generator.training_inputs='noised_data' reads the real batch of the GAN: set losses.gan_weights too"
    if (
        len(indices) != 1
        and losses.regression_weight
        and (losses.distribution_matching_weight or losses.gan_generator_weight)
    ):
        return (
            "losses.regression_weight beside other losses needs a one-step generator: generator.step_indices has "
            f"{len(indices)} entries; the regression alone warms up any number of steps"
        )
    return ""


_OF_PROMPTS = (
    "teacher.resolution", "data.prompts", "data.truncate_prompts", "data.text_embeddings",
)  # fmt: skip
_OF_CLASSES = ("data.split", "data.fit", "data.background", "data.flip")


def refuse_unread(settings: TrainSettings, takes_prompts: bool) -> None:
    """What can be said once the teacher is known: no setting is set that its kind of run never reads.

    Raises:
        UserError: names the settings.
    """
    names = _OF_CLASSES if takes_prompts else _OF_PROMPTS
    values, defaults = flatten_settings(settings), flatten_settings(TrainSettings())
    unread = [name for name in names if values[name] != defaults[name]]
    if unread:
        kinds = ("text-to-image", "class-conditional") if takes_prompts else ("class-conditional", "text-to-image")
        raise UserError(
            f"{', '.join(unread)} {'is' if len(unread) == 1 else 'are'} set but never read: teacher.path="
            f"{settings.teacher.path} is {kinds[0]}, and only {kinds[1]} runs read {'it' if len(unread) == 1 else 'them'}; "
            "leave out what does not belong"
        )
