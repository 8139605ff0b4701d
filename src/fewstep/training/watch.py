"""Keep the best generator of a run by a measured figure, beside its newest checkpoints."""

import json
from pathlib import Path

from rich.console import Console

from fewstep.errors import UserError
from fewstep.evaluation.features import load_features
from fewstep.evaluation.measure import measure_sampler
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.atomic import replaced_file
from fewstep.settings import TrainSettings
from fewstep.training.generator_job import GeneratorJob

BEST = "best"


class BestGenerator:
    """An observer of the loop: measures the generator at every checkpoint and keeps the best one in `best/`.

    `best.json` lists every measurement, so that a resumed run goes on comparing with the earlier ones.

    Raises:
        UserError: features or reference are missing, or do not belong together.
    """

    def __init__(
        self, job: GeneratorJob, settings: TrainSettings, folder: Path, console: Console | None = None
    ) -> None:
        best = settings.best
        if not best.features or not best.reference:
            raise UserError(
                "best.metric='frechet_distance' needs best.features (a folder of `fewstep prepare features` or an Inception "
                "file) and best.reference (an .npz of `fewstep prepare statistics`)"
            )
        self.job, self.settings, self.folder, self.console = job, settings, folder, console or Console(stderr=True)
        self.network = load_features(best.features, job.device)
        self.reference = FeatureStatistics.load(best.reference)
        self.measured: list[dict[str, float]] = []

    def resume(self, step: int) -> None:
        """Take up the measurements of an interrupted run up to `step`."""
        path = self.folder / "best.json"
        if path.is_file():
            self.measured = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["step"] <= step]

    def __call__(self, step: int, seconds: float) -> None:
        """Measure when a checkpoint is due; `seconds` is training time."""
        if step % self.settings.run.checkpoint_every:
            return
        if not self.measured:
            self.resume(step - 1)
        found = measure_sampler(
            "generator", self.job.sample_images, self.network, self.reference, num_images=self.settings.best.num_images,
            evaluations_per_image=len(self.job.steps), seed=1, batch_size=50, device=self.job.device,
        ).frechet_distance  # fmt: skip
        earlier = min((row["frechet_distance"] for row in self.measured), default=float("inf"))
        self.measured.append({"step": step, "frechet_distance": found})
        if found < earlier:
            self.job.save_result(self.folder / BEST, step)
        with replaced_file(self.folder / "best.json") as aside:
            aside.write_text(json.dumps(self.measured, indent=1), encoding="utf-8")
        kept = "kept as the best" if found < earlier else f"best so far {earlier:.3f}"
        self.console.print(
            f"step {step}: Frechet distance {found:.3f} ({self.settings.best.num_images} images), {kept}"
        )
