"""`fewstep.train` and `fewstep.pretrain`: settings in, a run folder with a finished model out."""

from pathlib import Path

import torch
from rich.console import Console

from fewstep.config import ComputeSettings, PretrainSettings, TrainSettings
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.pretrain import Pretraining
from fewstep.training.trainer import Observer, claim_run_folder, run_job


def pretrain(
    settings: PretrainSettings, *, observers: tuple[Observer, ...] = (), console: Console | None = None
) -> Path:
    """Train a teacher on pictures; continues an interrupted run of the same folder.

    Returns:
        Folder of the finished teacher, for `load_teacher`.

    Raises:
        UserError: bad input, other settings than the folder's, a full disk, a non-finite metric.
    """
    _set_threads(settings.compute)
    folder = run_folder(settings)
    job = Pretraining(settings)
    claim_run_folder(settings, folder)
    return run_job(job, settings, folder, observers=observers, console=console)


def run_folder(settings: TrainSettings | PretrainSettings) -> Path:
    """The run folder a run of these settings uses."""
    return Path(settings.run.folder or "runs/unnamed").expanduser()


def _set_threads(compute: ComputeSettings) -> None:
    if compute.threads:
        torch.set_num_threads(compute.threads)


def train(settings: TrainSettings, *, observers: tuple[Observer, ...] = (), console: Console | None = None) -> Path:
    """Distil a generator; continues an interrupted run of the same folder.

    Returns:
        Folder of the finished generator, for `load_generator`.

    Raises:
        UserError: bad input, other settings than the folder's, a full disk, a non-finite metric.
    """
    _set_threads(settings.compute)
    folder = run_folder(settings)
    job = DistillationJob(settings, open_teacher(settings))
    claim_run_folder(settings, folder)
    return run_job(job, settings, folder, observers=observers, console=console)
