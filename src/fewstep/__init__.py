"""fewstep: distil a diffusion model into a generator that needs one to four steps (DMD, DMD2)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.export.diffusers_folder import load_pipeline
    from fewstep.generator import load_generator, load_teacher
    from fewstep.training.run import pretrain, train

__all__ = ["__version__", "load_generator", "load_pipeline", "load_teacher", "pretrain", "train"]


def __getattr__(name: str) -> Any:
    # torch is imported when something is used, so that `fewstep --help` answers at once
    if name in ("load_generator", "load_teacher"):
        from fewstep import generator

        return getattr(generator, name)
    if name in ("pretrain", "train"):
        from fewstep.training import run

        return getattr(run, name)
    if name == "load_pipeline":
        from fewstep.export import diffusers_folder

        return diffusers_folder.load_pipeline
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
