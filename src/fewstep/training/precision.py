"""`compute.precision = "auto"` becomes the precision a run is made in, once, before anything is built."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fewstep.devices import DTYPES, choose_device, choose_precision
from fewstep.settings import PretrainSettings, TrainSettings
from fewstep.training.run_folder import stored_settings

SettingsT = TypeVar("SettingsT", TrainSettings, PretrainSettings)


def settle_precision(settings: SettingsT, folder: Path, tell: Callable[[str], None]) -> SettingsT:
    """The settings with a precision that has a name.

    A run that goes on keeps the one it began with, unless another is asked for. Weights that are stored in bf16 are
    computed with in bf16.

    Args:
        folder: the run folder, which may not be there yet.
        tell: gets one line on what was chosen and why, or a warning where what is asked for is slow here.
    """
    wanted: str = settings.compute.precision
    device = choose_device(settings.compute.device)
    if wanted == "auto" and (earlier := _stored_precision(folder)):
        tell(f"precision {earlier}: as this run began")
        wanted = earlier
    elif wanted == "auto" and isinstance(settings, TrainSettings) and settings.memory.base == "bf16":
        wanted = "bf16"
    precision = choose_precision(wanted, device, tell)
    return settings.model_copy(update={"compute": settings.compute.model_copy(update={"precision": precision})})


def _stored_precision(folder: Path) -> str:
    """The one a run began with, or nothing."""
    stored = stored_settings(folder, "compute").get("precision")
    return stored if isinstance(stored, str) and stored in DTYPES else ""
