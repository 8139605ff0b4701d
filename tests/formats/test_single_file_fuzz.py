"""A thousand damaged safetensors files: each is read or refused in one sentence, in bounded time and memory."""

import json
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fewstep.errors import UserError
from fewstep.formats.single_file import read_single_file

NUM_FILES = 1000
SECONDS = 15.0
MORE_MEMORY_MIB = 200
DTYPES = [
    "F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I16", "U64", "C64", "Q4", "",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2**31, 2**32, 2**63, 2**64 - 1, 10**30, 1.5, "1", None, [], True]


def valid_file() -> bytes:
    """Two tensors of every component; as a whole it is read."""
    keys = [
        "model.diffusion_model.out.2.weight", "model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight",
        "first_stage_model.quant_conv.bias", "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ]  # fmt: skip
    return save({key: torch.full((3, 4), float(n)) for n, key in enumerate(keys)}, {"modelspec.prediction_type": "v"})


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def change_entry(entry: dict[str, Any], chance: random.Random) -> None:
    field = chance.choice(["dtype", "shape", "data_offsets", "drop", "extra"])
    if field == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif field == "shape":
        entry["shape"] = [chance.choice(NUMBERS) for _ in range(chance.choice([0, 1, 2, 3, 500]))]
    elif field == "data_offsets":
        entry["data_offsets"] = [
            chance.choice([*NUMBERS, 48, 96, 144]) for _ in range(chance.choice([0, 1, 2, 2, 2, 3]))
        ]
    elif field == "drop":
        entry.pop(chance.choice(list(entry)))
    else:
        entry["surprise"] = chance.choice(NUMBERS)


def mutated(content: bytes, chance: random.Random) -> bytes:
    header, data = split(content)
    tensors = [key for key in header if key != "__metadata__"]
    kind = chance.choice(["entry", "entry", "entry", "length", "cut", "bytes", "json", "metadata", "keys", "nesting"])
    if kind == "entry":
        for _ in range(chance.choice([1, 1, 2, 4])):
            change_entry(header[chance.choice(tensors)], chance)
    elif kind == "length":
        text = json.dumps(header).encode()
        lengths = [0, 1, 7, len(text) - 1, len(text) + 1, len(text) + len(data) + 1, 2**27, 2**32, 2**63, 2**64 - 1]
        return join(text, data, chance.choice(lengths))
    elif kind == "cut":
        cut = content[: chance.randrange(len(content))]
        return cut if chance.random() < 0.7 else content + bytes(chance.randrange(1, 100))
    elif kind == "bytes":
        changed = bytearray(content)
        for _ in range(chance.choice([1, 3, 30])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    elif kind == "json":
        text = json.dumps(header).encode()
        position = chance.randrange(len(text))
        inserted = chance.choice([b"", b"{", b"]", b'"', b"\xff\xfe", b"\\ud800", b"NaN", b" " * 5000, b"1e999"])
        return join(text[:position] + inserted + text[position + chance.randrange(3) :], data)
    elif kind == "metadata":
        header["__metadata__"] = chance.choice([*NUMBERS, {"a": 1}, {"a": None}, {"a": "b" * 100_000}, [1], "x"])
    elif kind == "keys":
        name = chance.choice(
            ["", "a" * 50_000, "\u0000", "model.diffusion_model.", "😀", "conditioner.embedders.1.model.x"]
        )
        header[name] = header.pop(chance.choice(tensors))
    else:
        depth = chance.choice([10, 200, 100_000])
        return join(b'{"a":' * depth + b"1" + b"}" * depth, data)
    return join(json.dumps(header).encode(), data)


def refusal_of(path: Path) -> str:
    """The one sentence, or nothing where the file is read; any other error is the test's."""
    try:
        read_single_file(path)
    except UserError as error:
        return str(error)
    return ""


def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    content = valid_file()
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert read_single_file(path).prediction_type == "v_prediction"
    memory, started, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0
    slowest = 0.0
    for number in range(NUM_FILES):
        path = tmp_path / f"{number}.safetensors"  # a mapped file must not change under its reader
        path.write_bytes(mutated(content, random.Random(number)))
        began = time.process_time()
        refusal = refusal_of(path)
        refused += bool(refusal)
        assert "\n" not in refusal
        assert len(refusal) < 1000
        slowest = max(slowest, time.process_time() - began)
        path.unlink()
    assert refused > NUM_FILES // 2
    assert refused < NUM_FILES
    assert slowest < 1
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MORE_MEMORY_MIB * 1024


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F64", "I64"])
def test_unusual_dtypes_are_read_or_named(dtype: str, tmp_path: Path) -> None:
    """The reader takes them; whether a network can is seen with its config."""
    header, data = split(valid_file())
    size = {"F8_E4M3": 1, "F64": 8, "I64": 8}[dtype]
    for entry in header.values():
        if "dtype" in entry:
            entry["dtype"], entry["shape"] = dtype, [48 // size]
    path = tmp_path / "model.safetensors"
    path.write_bytes(join(json.dumps(header).encode(), data))
    single = read_single_file(path)
    config: dict[str, Any] = {}
    shapes = {"final_layer_norm.weight": torch.Size([48 // size]), "final_layer_norm.bias": torch.Size([48 // size])}
    if dtype == "I64":
        with pytest.raises(UserError, match=r"holds torch\.int64, no weights"):
            single.diffusers_state("text_encoder", config, shapes)
    else:
        state = single.diffusers_state("text_encoder", config, shapes)
        assert all(value.dtype == torch.float32 for value in state.values())
