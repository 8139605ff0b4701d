"""Groups that `fewstep train` and `fewstep pretrain` share."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fewstep.errors import UserError
from fewstep.settings.earlier import Earlier, entry
from fewstep.settings.tree import Fraction, NonNegative, Positive, Tree


class OptimizerSettings(Tree):
    """AdamW; its learning rates belong to each command."""

    warmup_steps: int = Field(500, ge=0, description="steps of linear warm-up, of all processes together")
    final_lr_fraction: Fraction = Field(
        1.0, description="the rate falls along a cosine to this share of itself at the end; 1: it stays"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay")
    max_grad_norm: NonNegative = Field(10.0, description="gradient norm of each optimiser is clipped at this; 0: never")

    @property
    def decay(self) -> str:
        """constant or cosine."""
        return "constant" if self.final_lr_fraction == 1 else "cosine"

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """`decay` was a setting of its own: constant (which did not read the fraction), or cosine."""
        if "decay" not in values:
            return values
        kept = {key: value for key, value in values.items() if key != "decay"}
        if values["decay"] == "constant":
            return {**kept, "final_lr_fraction": 1.0}
        if values["decay"] == "cosine":
            return {"final_lr_fraction": under.get("final_lr_fraction", 0.0), **kept}
        raise UserError(
            f"optimizer.decay={values['decay']!r}: set optimizer.final_lr_fraction, 1 for a constant rate, 0 for a cosine to 0"
        )


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
    seed: int = Field(0, ge=0, lt=2**63, description="every random number follows from it")


class ComputeSettings(Tree):
    """Where and in which precision."""

    device: str = Field("auto", description="auto (a CUDA GPU, else the CPU), cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="inside the networks; outside is fp32. auto: fp32 or bf16, what is fast on the device, measured at the start; fp16 has a "
        "loss scale",
    )
    compile: bool = Field(False, description="torch.compile the networks")

    instead: ClassVar[dict[str, str]] = {"threads": "the environment's OMP_NUM_THREADS, or torch's choice without it"}

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """`threads` was a setting of its own."""
        return {key: value for key, value in values.items() if key != "threads"}


class RunSettings(Tree):
    """The run folder and what is written there, counted in steps."""

    folder: str = Field("", description="run folder, or a URL (s3://...) it is copied to; empty: runs/<recipe name>")
    samples: tuple[Positive, Annotated[Positive, Field(le=1024)]] = Field(
        (1000, 64), description="steps between grids of sample pictures, and pictures in a grid"
    )
    checkpoint_every: Positive = Field(
        1000, description="steps between checkpoints; a minute of training without one makes one, too"
    )
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept")

    earlier: ClassVar[dict[str, Earlier]] = {
        "sample_every": Earlier("samples", entry(0, 2)), "sample_images": Earlier("samples", entry(1, 2)),
    }  # fmt: skip

    @property
    def sample_every(self) -> int:
        """Steps between grids of sample pictures."""
        return self.samples[0]

    @property
    def sample_images(self) -> int:
        """Pictures in a grid of samples."""
        return self.samples[1]

    @property
    def log_every(self) -> int:
        """Steps between metric lines on disk: each has its own, they are written together."""
        return min(50, self.sample_every, self.checkpoint_every)

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """`log_every` and `tensorboard` were settings: the metrics of every step are written in any case, in both forms."""
        return {key: value for key, value in values.items() if key not in ("log_every", "tensorboard")}
