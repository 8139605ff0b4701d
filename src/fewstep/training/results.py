"""What a run leaves behind, for Python: its folder, its model, its metrics and its pictures."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import UserError
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model
from fewstep.settings import PretrainSettings, TrainSettings

if TYPE_CHECKING:
    from PIL.Image import Image


class Metrics(list[dict[str, float]]):
    """One dictionary for each logged step, with "step" in it; a name may be missing where it was not measured."""

    def column(self, name: str) -> list[float]:
        """The values of one metric, of the steps that have it.

        Raises:
            UserError: no step has it; lists what there is.
        """
        values = [row[name] for row in self if name in row]
        if not values:
            names = sorted({key for row in self for key in row})
            raise UserError(f"this run has no metric {name!r}; it has {', '.join(names)}")
        return values

    def to_pandas(self) -> Any:
        """A pandas DataFrame with one row for each step.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise UserError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self)).set_index("step")


@dataclass(frozen=True)
class Run:
    """A finished run of `fewstep.train` or `fewstep.pretrain`. Where a path is wanted, it is its folder's.

    Attributes:
        folder: with settings, metrics, sample pictures, checkpoints and the model.
        settings: everything the run was made with.
    """

    folder: Path
    settings: TrainSettings | PretrainSettings

    @property
    def model_folder(self) -> Path:
        """The finished model's own folder."""
        return self.folder / ("generator" if isinstance(self.settings, TrainSettings) else "teacher")

    @cached_property
    def generator(self) -> Model:
        """The distilled generator, read when first asked for; a run of `pretrain` has none."""
        return load_generator(self.folder, device=self.settings.compute.device)

    @cached_property
    def teacher(self) -> Model:
        """The teacher that was trained, or that a generator was distilled from."""
        if isinstance(self.settings, PretrainSettings):
            return load_teacher(self.folder, device=self.settings.compute.device)
        teacher = self.settings.teacher
        return load_teacher(
            teacher.path, device=self.settings.compute.device, resolution=teacher.resolution, loras=teacher.loras
        )

    @cached_property
    def metrics(self) -> Metrics:
        """What was logged, step by step."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return Metrics(json.loads(line) for line in lines)

    def samples(self, name: str = "generator") -> list[Path]:
        """The sample pictures of one kind in the order they were made: "generator", "teacher", "fake_score", ..."""
        return sorted((self.folder / "samples").glob(f"{name}_[0-9]*.png"))

    @property
    def last_sample(self) -> "Image":
        """The newest grid of sample pictures of the model in training.

        Raises:
            UserError: the run has written none.
        """
        from PIL import Image

        found = self.samples(self.model_folder.name)
        if not found:
            raise UserError(f"{self.folder / 'samples'} has no sample pictures")
        with Image.open(found[-1]) as picture:
            return picture.copy()

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        steps = int(self.metrics[-1]["step"]) + 1 if self.metrics else 0
        return f"<fewstep run: {self.folder}, {steps} steps, {self.model_folder.name} in {self.model_folder}>"
