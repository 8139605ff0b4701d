"""The roles beside a generator, `roles/*.safetensors` in its folder, so that training continues from all of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.tensor_files import write_tensor_file

ROLES = "roles"
_NAMES = ("fake_score", "discriminator")


def write_with_roles(folder: Path, write: Callable[[Path], None], roles: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a generator folder and its `roles/`; both appear, or nothing does.

    Args:
        folder: target; must not exist.
        write: writes the generator folder to the path it is given.
        roles: state dicts by role ("fake_score", "discriminator"), in their own precision; empty ones are left out.

    Raises:
        UserError: it cannot be written.
    """
    with written_aside(folder) as aside:
        inner = aside / "model"
        try:
            write(inner)
        except UserError as error:
            raise UserError(str(error).replace(str(inner), str(folder))) from error
        for part in inner.iterdir():
            part.rename(aside / part.name)
        inner.rmdir()
        for role, tensors in roles.items():
            if tensors:
                (aside / ROLES).mkdir(exist_ok=True)
                copies = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
                write_tensor_file(aside / ROLES / f"{role}.safetensors", copies, {"format": "pt", "role": role})


def read_roles(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts beside a generator, by role; empty where there are none.

    Raises:
        UserError: a damaged file.
    """
    files = {role: folder / ROLES / f"{role}.safetensors" for role in _NAMES}
    try:
        return {role: load_file(path) for role, path in files.items() if path.is_file()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ROLES} cannot be read ({error}); convert the checkpoint again") from error
