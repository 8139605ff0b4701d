"""The models that a run's checkpoints hold, without the rest of its training: raw weights and their average."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.devices import prepare_denoiser
from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.roles import build_twin
from fewstep.errors import UserError
from fewstep.families.registry import build_denoiser, describe_new
from fewstep.formats.json_files import read_json_object
from fewstep.models.model import Model, build_model
from fewstep.settings import PretrainSettings, TrainSettings, parse_settings
from fewstep.training.build import build_step_schedule, lora_shape, open_teacher
from fewstep.training.checkpoint import Progress, read_checkpoint, read_progress, restore_module
from fewstep.training.generator_job import generator_card
from fewstep.training.pretrain import pictures_of, teacher_card

AVERAGE, RAW = "average", "raw"


class CheckpointModels:
    """Reads checkpoint after checkpoint of one run into one network.

    Args:
        run: folder of `fewstep train` or `pretrain`, going on or finished.
        device, precision: of the network.

    Attributes:
        role: what the run trains, "generator" or "teacher": the name of its raw weights and of its result's folder.

    Raises:
        UserError: not a run folder, or its teacher is not where it was.
    """

    def __init__(self, run: Path, *, device: str, precision: str) -> None:
        self.run = run
        values = read_json_object(run / "settings.json", "give the folder of a run")
        if "network" in values:
            self.role, self.network, self._model = _pretraining(values, run, device, precision)
        else:
            self.role, self.network, self._model = _distillation(values, run, device, precision)

    def read(self, checkpoint: Path) -> tuple[Progress, Iterator[tuple[str, Model]]]:
        """How far the run was, and its models there: RAW, and AVERAGE where the run has one. Each is gone when the next is asked for.

        Raises:
            UserError: a damaged checkpoint, or one of another network.
        """
        tensors, state = read_checkpoint(checkpoint, only=(f"{self.role}.", f"{AVERAGE}."))
        progress = read_progress(checkpoint, state)
        return progress, self._models(tensors, progress)

    def _models(self, tensors: dict[str, Tensor], progress: Progress) -> Iterator[tuple[str, Model]]:
        for weights, name in ((RAW, self.role), (AVERAGE, AVERAGE)):
            if any(key.startswith(f"{name}.") for key in tensors):
                restore_module(name, self.network, tensors)
                yield weights, self._model(progress)


# role, network to be filled, the model around it at that progress
_Made = tuple[str, Denoiser, Callable[[Progress], Model]]


def _distillation(values: dict[str, Any], run: Path, device: str, precision: str) -> _Made:
    settings = parse_settings(TrainSettings, values, str(run / "settings.json"))
    compute = settings.compute.model_copy(update={"device": device, "precision": precision})
    memory = settings.memory.model_copy(update={"base": "fp32", "teacher": "sharded"})  # as an export is loaded
    settings = settings.model_copy(update={"compute": compute, "memory": memory})
    teacher = open_teacher(settings)
    steps = build_step_schedule(settings, teacher.denoiser)
    network = _build_generator(settings, teacher.denoiser.eval()).requires_grad_(False)
    return "generator", network, lambda at: teacher.student(network, generator_card(settings, teacher, steps, at.step))


def _build_generator(settings: TrainSettings, teacher: Denoiser) -> Denoiser:
    """A generator as the run's, on a teacher that takes part in nothing else."""
    memory = settings.memory
    if memory.mode == "full":
        return build_twin(teacher, "generator").eval()
    from fewstep.networks.adapters import SharedBase

    return SharedBase(teacher, lora_shape(memory)).add_role("generator").eval()


def _pretraining(values: dict[str, Any], run: Path, device: str, precision: str) -> _Made:
    settings = parse_settings(PretrainSettings, values, str(run / "settings.json"))
    try:
        network = build_denoiser(describe_new(settings.network.name, pictures_of(settings)))
    except ValueError as error:
        raise UserError(f"{run / 'settings.json'}: {error}") from None
    prepare_denoiser(network, device, precision)
    network.eval().requires_grad_(False)
    return "teacher", network, lambda at: build_model(network, teacher_card(settings, at.class_names, at.step))
