"""`fewstep.train` and `fewstep.pretrain`: settings in, a run folder with a finished model out."""

import ctypes
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewstep.errors import UserError
from fewstep.parallel import agreed, is_first, joined, local_batch, world_size
from fewstep.progress import Stderr, busy, say
from fewstep.settings import PretrainSettings, TrainSettings, flatten_settings, refuse_unread
from fewstep.settings.python import gather_settings
from fewstep.shared_work import by_the_first, refuse_differences, refuse_unshared
from fewstep.training.build import open_teacher, schedule_warning
from fewstep.training.distill import DistillationJob
from fewstep.training.generator_job import GeneratorJob
from fewstep.training.inferred import settle_data, settle_network
from fewstep.training.inputs import check_pairs
from fewstep.training.interruption import naming_checkpoint
from fewstep.training.outlook import Outlook
from fewstep.training.precision import SettingsT, settle_precision
from fewstep.training.pretrain import Pretraining
from fewstep.training.remote_run import remote_run
from fewstep.training.results import Run
from fewstep.training.run_data import read_contents
from fewstep.training.run_folder import claim_run_folder, refuse_other_data, run_folder
from fewstep.training.run_log import say_in_run
from fewstep.training.trainer import Observer, run_job
from fewstep.training.warmup import WarmupJob, is_warmup
from fewstep.training.watch import tell_best, watch_for_best

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def pretrain(
    settings: PretrainSettings | Mapping[str, Any] | str | PathLike[str], *, observers: tuple[Observer, ...] = (),
    console: Console | None = None, data_changed: bool = False, **overrides: Any,
) -> Run:  # fmt: skip
    """Train a teacher on pictures; continues an interrupted run of the same folder.

        run = fewstep.pretrain("recipes/my_pictures.toml", data__images="photos", run__folder="runs/teacher")
        run.teacher.sample(16)

    Args:
        settings: a recipe's path, a dictionary of settings, or `PretrainSettings`.
        observers: called with (finished steps, training seconds) after every step.
        console: where progress goes; standard error by default.
        data_changed: go on with other data than an interrupted run began with, which is refused otherwise.
        overrides: settings to change, as section__name=value; `**{"section.name": value}` says the same.

    Returns:
        The finished run: its folder, teacher, metrics and sample pictures.

    Raises:
        UserError: bad input, other settings than the folder's, a full disk, a non-finite metric.
    """
    console = console or Stderr()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("pretrain trains in one process: start it without torchrun")
    settings = gather_settings(PretrainSettings, settings, overrides)
    folder = run_folder(settings)
    remote = remote_run(settings.run.folder, folder)
    if remote is not None:
        remote.bring()
    settings = prepare_run(settings, folder, console)
    with naming_checkpoint(folder):
        with busy(console, f"Looking at the pictures of {settings.data.images}"):
            settings = settle_network(settings, folder, partial(say, console))
        job = Pretraining(settings)
        with busy(console, "Looking through the data"):
            claim_run_folder(settings, folder, data_changed=data_changed)
        outlook = Outlook(settings, len(job.batches.dataset), partial(say_in_run, folder, console))
        run_job(job, settings, folder, observers=(outlook, *observers), console=console, remote=remote)
    return Run(folder, settings)


def train(
    settings: TrainSettings | Mapping[str, Any] | str | PathLike[str], *, observers: tuple[Observer, ...] = (),
    console: Console | None = None, data_changed: bool = False, **overrides: Any,
) -> Run:  # fmt: skip
    """Distil a generator; continues an interrupted run of the same folder.

        run = fewstep.train("recipes/emoji_dmd2_4step_lora.toml", training__num_steps=200)
        run.generator.sample("red apple")

    Args:
        settings: a recipe's path, a dictionary of settings, or `TrainSettings`.
        observers: called with (finished steps, training seconds) after every step.
        console: where progress goes; standard error by default.
        data_changed: go on with other data than an interrupted run began with, which is refused otherwise.
        overrides: settings to change, as section__name=value; `**{"section.name": value}` says the same.

    Returns:
        The finished run: its folder, generator, metrics and sample pictures.

    Raises:
        UserError: bad input, other settings than the folder's, a full disk, a non-finite metric.
    """
    console = console or Stderr()
    settings = gather_settings(TrainSettings, settings, overrides)
    with joined(settings.compute.device):
        return _train(settings, console, observers, data_changed)


def _train(settings: TrainSettings, console: Console, observers: tuple[Observer, ...], data_changed: bool) -> Run:
    """`train` in one of its processes."""
    folder = run_folder(settings)
    refuse_strangers(settings, folder)
    remote = remote_run(settings.run.folder, folder)
    if remote is not None:
        by_the_first(remote.bring)
    settings = agreed(prepare_run(settings, folder, console))
    kind = WarmupJob if is_warmup(settings) else DistillationJob
    with naming_checkpoint(folder):
        with busy(console, f"Loading the teacher {settings.teacher.path}"):
            teacher = open_teacher(settings)
        settings = settle_data(settings, teacher, folder, partial(say, console))
        refuse_unread(settings, takes_prompts=teacher.conditioner.takes == "prompts")
        for line in schedule_warning(settings, teacher.denoiser) + check_pairs(settings, teacher):
            say(console, line)
        with busy(console, "Looking through the data"):
            contents = by_the_first(lambda: refuse_other_data(settings, folder, data_changed=data_changed))
        job: GeneratorJob = kind(settings, teacher)
        watches = watch_for_best(job, settings, folder, console)
        with busy(console, "Looking through the data"):
            by_the_first(lambda: claim_run_folder(settings, folder, data_changed=data_changed, contents=contents))
        if is_first():
            observers = (Outlook(settings, 0, partial(say_in_run, folder, console)), *observers)
        run_job(job, settings, folder, watches=watches, observers=observers, console=console, remote=remote)
        if is_first():
            tell_best(watches, folder, console)
    return Run(folder, settings)


def refuse_strangers(settings: TrainSettings, folder: Path) -> None:
    """Refuse processes that would not train together, before any loads a network.

    Raises:
        UserError: the batch does not divide, a base that cannot lie in parts, other settings or other data somewhere, or a run folder
            that is not shared.
    """
    if world_size() == 1:
        return
    settings.memory.refuse_parts(world_size())
    local_batch(settings.training.batch_size)
    refuse_differences(settings.model_dump_json(), "settings")
    refuse_differences(
        json.dumps({key: found.fingerprint for key, found in read_contents(flatten_settings(settings)).items()}), "data"
    )
    refuse_unshared(folder, "run.folder")


def print_gan_weight(settings: TrainSettings) -> None:
    """`fewstep train --suggest-gan-weight`."""
    from fewstep.training.gan_weight import suggest_gan_weight

    settings = prepare_run(settings, run_folder(settings), Stderr())
    found = suggest_gan_weight(settings)
    print(
        f"losses.gan_weights=[{found.equal_weight:.2g}, {found.discriminator_weight:g}] makes the GAN's gradient at the generator's output as strong as "
        f"distribution matching's ({found.distribution_matching_norm:.3g} against {found.gan_norm:.3g} at weight 1; mean of "
        f"{found.num_updates} generator updates)."
    )


def prepare_run(settings: SettingsT, folder: Path, console: Console) -> SettingsT:
    """What comes before anything is built: the process as training needs it, and a precision that has a name."""
    prepare_process()
    return settle_precision(settings, folder, partial(say, console))


def prepare_process() -> None:
    """Let the C library keep freed memory instead of returning it every step.

    On Linux a CPU step otherwise spends a tenth of its time on page faults for activations of the same sizes as in
    the step before. Where the C library is not glibc nothing changes.
    """
    if sys.platform == "linux" and not torch.cuda.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
