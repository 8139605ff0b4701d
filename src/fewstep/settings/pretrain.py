"""Everything `fewstep pretrain` reads."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from fewstep.settings.common import ComputeSettings, OptimizerSettings, RunSettings, TrainingSettings
from fewstep.settings.data import DataSettings
from fewstep.settings.earlier import Earlier
from fewstep.settings.tree import Fraction, NonNegative, Positive, Tree, note, without_unread


class PretrainDataSettings(DataSettings):
    """Pictures to train on."""

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """Earlier run folders hold settings of `fewstep train` that were never read."""
        unread = {"pairs": "", "prompts": "", "truncate_prompts": False, "text_embeddings": "stored", "latents": ""}
        return super().renewed(without_unread(values, unread), under)


class PretrainOptimizerSettings(OptimizerSettings):
    """AdamW of a teacher."""

    lr: float = Field(1e-3, gt=0, description="learning rate")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay")

    earlier: ClassVar[dict[str, Earlier]] = {"generator_lr": Earlier("lr")}

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """Earlier run folders hold the rate of a fake score."""
        return super().renewed(without_unread(values, {"fake_score_lr": 2e-6}), under)


class PretrainTrainingSettings(TrainingSettings):
    """How long and how much at once."""

    batch_size: Positive = Field(128, description="samples a step over all processes")

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """Earlier run folders hold the generator's turns."""
        return super().renewed(without_unread(values, {"generator_every": 5}), under)


class PretrainNoiseSettings(Tree):
    """Noise levels a teacher is trained at: ln(sigma) ~ N(mean, std)."""

    log_sigma_mean: float = Field(-1.2, description="mean of ln(sigma)")
    log_sigma_std: float = Field(1.2, gt=0, description="standard deviation of ln(sigma)")


class NetworkSettings(Tree):
    """The teacher to train."""

    name: str = Field("small", description="shape from the catalog, e.g. small, cifar10-ddpmpp, imagenet64-adm")
    img_resolution: int = Field(
        0, ge=0, description="side of the square pictures in pixels; 0: that of the smallest, at most 32"
    )
    img_channels: Literal[0, 1, 3] = Field(0, description="1 grey, 3 colour; 0: as the pictures are")
    label_dim: int = Field(
        -1, ge=-1, description="number of classes, 0 without labels; -1: as many as folders or labels of the pictures"
    )
    label_dropout: Fraction = Field(
        0.0, description="share of samples trained without label; above 0 the teacher can be guided"
    )
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data in [-1, 1]")


class PretrainSettings(Tree):
    """Everything `fewstep pretrain` needs."""

    command = "pretrain"

    expected: str = note("published result of the recipe, for the reader")
    network: NetworkSettings = NetworkSettings()
    noise: PretrainNoiseSettings = PretrainNoiseSettings()
    data: PretrainDataSettings = PretrainDataSettings()
    optimizer: PretrainOptimizerSettings = PretrainOptimizerSettings()
    training: PretrainTrainingSettings = PretrainTrainingSettings()
    ema_half_life_images: float = Field(500_000.0, gt=0, description="half-life of the weight average")
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()
