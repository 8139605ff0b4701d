"""fewstep: distil a diffusion model into a generator that needs one to four steps (DMD, DMD2).

    import fewstep

    teacher = fewstep.load_teacher("bundled:emoji-sd")
    teacher.sample("red apple, food & drink")            # 50 guided steps

    run = fewstep.train("recipes/emoji_dmd2_4step_lora.toml", training__time_limit_minutes=5)
    run.generator.sample("red apple, food & drink")      # 4 steps

Everything is imported when it is first used, so that `import fewstep` and `fewstep --help` answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.errors import UserError
    from fewstep.export.diffusers_folder import load_pipeline
    from fewstep.export.export import ExportOptions, export_generator
    from fewstep.models.load import load_generator, load_model, load_teacher
    from fewstep.models.model import Model
    from fewstep.preparation.convert import convert_weights
    from fewstep.settings import PretrainSettings, TrainSettings, load_settings
    from fewstep.training.results import Run
    from fewstep.training.run import pretrain, train

__all__ = [
    "ExportOptions", "Model", "PretrainSettings", "Run", "TrainSettings", "UserError", "__version__", "convert_weights",
    "export_generator", "load_generator", "load_model", "load_pipeline", "load_settings", "load_teacher", "pretrain",
    "train",
]  # fmt: skip

_HOMES = {
    "errors": ("UserError",),
    "export.diffusers_folder": ("load_pipeline",),
    "export.export": ("ExportOptions", "export_generator"),
    "models.load": ("load_generator", "load_model", "load_teacher"),
    "models.model": ("Model",),
    "preparation.convert": ("convert_weights",),
    "settings": ("PretrainSettings", "TrainSettings", "load_settings"),
    "training.results": ("Run",),
    "training.run": ("pretrain", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = getattr(import_module(f"fewstep.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module"})
