"""fewstep: distil a diffusion model into a generator that needs one to four steps (DMD, DMD2)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.export.diffusers_folder import load_pipeline
    from fewstep.export.export import ExportOptions, export_generator
    from fewstep.models.model import load_generator, load_teacher
    from fewstep.preparation.convert import convert_weights
    from fewstep.training.run import pretrain, train

__all__ = [
    "ExportOptions", "__version__", "convert_weights", "export_generator", "load_generator", "load_pipeline",
    "load_teacher", "pretrain", "train",
]  # fmt: skip

_HOMES = {
    "load_generator": "models.model", "load_teacher": "models.model", "pretrain": "training.run", "train": "training.run",
    "load_pipeline": "export.diffusers_folder", "export_generator": "export.export", "ExportOptions": "export.export",
    "convert_weights": "preparation.convert",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # torch is imported when something is used, so that `fewstep --help` answers at once
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(f"fewstep.{_HOMES[name]}"), name)
