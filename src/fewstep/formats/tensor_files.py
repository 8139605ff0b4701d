"""Named tensors in a file, whichever of the two usual formats it has: safetensors, or torch.save's."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.devices import dtype_name
from fewstep.errors import UserError, first_line
from fewstep.formats.torch_archive import read_torch_archive, torch_archive_names

_QUANTISED = (torch.int8, torch.uint8, torch.bool)
_NO_WEIGHTS = ("I8", "U8", "BOOL")  # the same, in a header's words
_EIGHT_BITS = {
    torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.float16, torch.float8_e4m3fnuz: torch.float16,
    torch.float8_e5m2fnuz: torch.float32,
}  # fmt: skip
# Their names in a header, in the order that the library writes tensors of different types in
_STORED = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_GGUF = b"GGUF"
_ALIGNED = 8  # bytes; where the tensors begin
# What a damaged .safetensors ends in: a header of the wrong kind, or an element type that torch does not have
_UNREADABLE = (
    SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError,
)  # fmt: skip


def is_safetensors(path: Path) -> bool:
    """Whether a file is of this format, by its name or, under another one (.sft, or a .ckpt that is none), by how it begins.

    Raises:
        UserError: it is of a format that holds no plain weights (GGUF).
    """
    if path.suffix.lower() == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False  # whoever reads it says why
    if start.startswith(_GGUF):
        raise UserError(
            f"{path} is a GGUF file, which holds quantised weights and is not read; give the model in float16, bfloat16 or "
            "float32 (.safetensors)"
        )
    return len(start) == 9 and start[8:] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors or torch.save file, without reading them.

    Raises:
        UserError: the file cannot be read.
    """
    if not is_safetensors(path):
        return torch_archive_names(path)
    with open_safetensors(path) as file:
        return list(file.keys())


def read_tensors(path: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The (wanted) tensors of a safetensors or torch.save file.

    Raises:
        UserError: the file cannot be read.
    """
    if not is_safetensors(path):
        return read_torch_archive(path, wanted)
    return read_safetensors(path, wanted)[0]


def read_safetensors(
    path: Path, wanted: Callable[[str], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The (wanted) tensors of a `.safetensors` file, and its header's entries.

    Raises:
        UserError: the file cannot be read.
    """
    with open_safetensors(path) as file:
        names = [name for name in file.keys() if wanted is None or wanted(name)]  # noqa: SIM118
        return {name: _computable(file.get_tensor(name)) for name in names}, dict(file.metadata() or {})


def header_of(path: Path) -> dict[str, str]:
    """The entries of a safetensors file's header; none of a file of another format.

    Raises:
        UserError: the file cannot be read.
    """
    if not is_safetensors(path):
        return {}
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def _computable(tensor: Tensor) -> Tensor:
    """Eight-bit floats in a precision that arithmetic knows and that holds each of their values."""
    return tensor if tensor.dtype not in _EIGHT_BITS else tensor.to(_EIGHT_BITS[tensor.dtype])


def itself(tensor: Tensor) -> Tensor:
    """What is written of a tensor that is whole."""
    return tensor


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *,
    dtype: torch.dtype | None = None, whole: Callable[[Tensor], Tensor] = itself,
) -> None:  # fmt: skip
    """Write a `.safetensors` file, the header first and then one tensor after the other: the same bytes for the same content.

    Bytes are those of `safetensors.torch.save_file`, which wants all tensors at once, writes the header's entries in an order of
    its own for each run, and files that only their owner reads.

    Args:
        tensors: of any device and strides.
        dtype: that all are stored in; None: each in its own.
        whole: called with each tensor when its turn comes, gives it with all its numbers; the result is dropped before the next.

    Raises:
        OSError: the disk is full.
        ValueError: the format has no such type.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    kinds, known = {name: dtype or tensor.dtype for name, tensor in tensors.items()}, list(_STORED)
    names, place = sorted(tensors, key=lambda name: (known.index(kinds[name]), name.encode())), 0
    for name in names:
        end = place + tensors[name].numel() * kinds[name].itemsize
        header[name] = {
            "dtype": _STORED[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [place, end],
        }  # fmt: skip
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNED) * _ALIGNED)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            found = whole(tensors[name]).detach().to(device="cpu", dtype=kinds[name]).contiguous().view(-1)
            if found.stride(0) != 1:  # one value, or none, that an expanded tensor left: contiguous, yet no bytes
                found = found.clone(memory_format=torch.contiguous_format)
            file.write(found.view(torch.uint8).numpy().data)
            del found  # before the next one is put together


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a `.safetensors` file from its header alone.

    Raises:
        UserError: the file cannot be read.
    """
    with open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def refuse_no_weights(path: Path) -> None:
    """Raise UserError where a `.safetensors` file has whole numbers in the place of weights, by its header alone.

    Counters and position numbers, which are of int64, may be there.
    """
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            if part.get_dtype() in _NO_WEIGHTS and part.get_shape() not in ([], [1]):
                raise _quantised(str(path), name, part.get_dtype())


def _quantised(where: str, name: str, kind: str) -> UserError:
    return UserError(
        f"{where}: {name} is stored as {kind}, as quantised files have it; give the file in float16, bfloat16 or float32"
    )


def refuse_infinities(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError naming the first tensor that no network can use: infinities, NaN, whole numbers of quantised files."""
    for name, value in tensors.items():
        if value.dtype in _QUANTISED and value.numel() > 1:
            raise _quantised(where, name, dtype_name(value.dtype))
        if not _is_finite(value):
            count = int((~torch.isfinite(value)).sum())
            raise UserError(
                f"{where}: {count} of the {value.numel()} numbers in {name} are infinite or NaN, as half precision "
                "makes them when it overflows and a training that diverged; save the weights again in float32 or bfloat16, or take an "
                "earlier checkpoint's"
            )


def _is_finite(value: Tensor) -> bool:
    """Whether no number is infinite or NaN; of the usual precisions without a tensor beside it, for networks are large."""
    if not value.is_floating_point() or not value.numel():
        return True
    if value.dtype in _EIGHT_BITS:
        return bool(torch.isfinite(value).all())
    return all(math.isfinite(end) for end in torch.stack(torch.aminmax(value.detach())).tolist())


def common_half_precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """float16 or bfloat16 where all tensors are in it, so that storing them so loses nothing; float32 otherwise."""
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16} else torch.float32


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, of which nothing is read yet.

    Raises:
        UserError: it is missing, may not be read, or is damaged; also what is read of it, as far as that is found out then.
    """
    if path.is_file() and not os.access(path, os.R_OK):  # the library says that it is not there
        raise UserError(f"{path} cannot be read (permission denied); allow it with chmod")
    with naming_damage(path), safe_open(path, framework="pt", device="cpu") as file:
        yield file


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """What the library says of a damaged safetensors file becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({first_line(error)}); it is damaged, incomplete or of another "
            "format: download it again"
        ) from error
