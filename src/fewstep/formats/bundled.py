"""Files that ship with the package: `bundled:NAME` names a model, `bundled:path/of/file` anything else below assets/."""

from importlib import resources
from pathlib import Path

from fewstep.errors import UserError
from fewstep.formats.atomic import standing

BUNDLED = "bundled:"
ASSETS = Path(str(resources.files("fewstep"))) / "assets"


def bundled_models() -> dict[str, Path]:
    """The folder of every shipped model by its name: "fashion-mnist" is a set of one model, "emoji-sd" is emoji/sd."""
    found: dict[str, Path] = {}
    for folder in sorted(path for path in ASSETS.iterdir() if path.is_dir()):
        if (folder / "teacher").is_dir():
            found[folder.name] = folder
        for index in sorted(folder.glob("*/model_index.json")):
            found[f"{folder.name}-{index.parent.name}"] = index.parent
    return found


def bundled_path(name: str) -> Path:
    """Where a shipped model ("emoji-sd"), the folder of a set ("emoji") or a file ("emoji/prompts_train.txt") lies.

    Raises:
        UserError: nothing of this name ships.
    """
    models = bundled_models()
    path = models.get(name, ASSETS / name)
    if not name or ".." in Path(name).parts or not path.is_relative_to(ASSETS) or not path.exists():
        shipped = ", ".join(f"{BUNDLED}{model}" for model in models)
        raise UserError(
            f"{BUNDLED}{name} does not ship with this version; {shipped} {'does' if len(models) == 1 else 'do'}"
        )
    return path


def resolve_path(source: str | Path) -> Path:
    """A path as a user writes it: below assets/ where it begins with "bundled:", with ~ for the home folder otherwise.

    Raises:
        UserError: "bundled:" and a name that does not ship.
    """
    if str(source).startswith(BUNDLED):
        return bundled_path(str(source).removeprefix(BUNDLED))
    return standing(Path(source).expanduser())
