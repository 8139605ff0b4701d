"""Named tensors in one or several safetensors files, read row by row: who wants a part of one never has it whole."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.json_files import read_json_object
from fewstep.formats.tensor_files import naming_damage, open_safetensors

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # all become float32

Rows = slice | None  # of the first axis; None: everything


class ReadRows(Protocol):
    """Reads rows of a tensor by its name."""

    def __call__(self, name: str, rows: Rows) -> Tensor:
        """The rows, as they lie somewhere: to be copied, not to be written to."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: a file, its name in it, its shape, and its type in the header's words."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class StoredTensors:
    """Tensors by their names, none of which is read yet."""

    places: dict[str, Place]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return {name: place.shape for name, place in self.places.items()}

    @property
    def are_floats(self) -> bool:
        """Whether all of them are numbers that float32 stands for."""
        return all(place.kind in _FLOATS for place in self.places.values())

    def prefixed(self, prefix: str) -> "StoredTensors":
        """The same with something before each name."""
        return replace(self, places={f"{prefix}{name}": place for name, place in self.places.items()})

    @contextmanager
    def opened(self) -> Iterator[ReadRows]:
        """Gives rows in the type that the file has, views of it.

        Raises:
            UserError: a file is missing or damaged; names it.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for path in {place.path for place in self.places.values()}:
                files[path] = stack.enter_context(open_safetensors(path))

            def read(name: str, rows: Rows) -> Tensor:
                place = self.places[name]
                file = files[place.path]
                with naming_damage(place.path):  # and not another file that is open
                    found: Tensor = file.get_tensor(place.name) if rows is None else file.get_slice(place.name)[rows]
                return found

            yield read


def find_tensors(paths: Sequence[Path]) -> StoredTensors:
    """What safetensors files hold, from their headers alone.

    Raises:
        UserError: a file is missing or damaged, or two have a tensor of one name.
    """
    places: dict[str, Place] = {}
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in places:
                    raise UserError(f"{path} and {places[name].path} both have {name[:100]}; download them again")
                part = file.get_slice(name)
                places[name] = Place(path, name, tuple(part.get_shape()), part.get_dtype())
    return StoredTensors(places)


def find_indexed(index: Path) -> StoredTensors:
    """What the files beside a `.safetensors.index.json` hold, which it names all of.

    Raises:
        UserError: it, or a file that it names, is missing or damaged, or holds other tensors than it says.
    """
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(part, str) and Path(part).name == part for part in names.values()
    ):
        raise UserError(f"{index} is damaged: its weight_map does not say the file of each tensor; download it again")
    found = find_tensors([index.parent / name for name in sorted(set(names.values()))])
    if {name: place.path.name for name, place in found.places.items()} != names:
        raise UserError(f"{index}: its files hold other tensors than it says; download them again")
    return found
