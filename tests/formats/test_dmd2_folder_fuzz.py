"""A thousand structurally mutated `.bin` files: each is read or refused in one sentence; none runs or runs away."""

import functools
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.dmd2_folder import read_dmd2

NUM_FILES, SECONDS, KIBIBYTES = 1000, 20, 200_000
Mutation = Callable[[random.Random, bytes, bytes], bytes]


class Touch:
    """Pickles as a command that leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.canary}",)


def state() -> dict[str, Tensor]:
    """The least that passes for an EDM generator."""
    torch.manual_seed(0)
    names = ("map_layer0.weight", "enc.8x8_conv.weight", "out_conv.bias", "karras_sigmas")
    return {f"model.{name}": torch.randn(4, 4) for name in names}


def rebuilt(
    content: bytes, change: Callable[[str, bytes], tuple[str, bytes]], method: int = zipfile.ZIP_STORED
) -> bytes:
    """The archive with changed entries, everything around them consistent."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
        for info in old.infolist():
            new.writestr(*change(info.filename, old.read(info)))
    return out.getvalue()


@functools.cache
def pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def with_pickle(content: bytes, program: bytes) -> bytes:
    return rebuilt(content, lambda name, data: (name, program if name.endswith("data.pkl") else data))


@functools.cache
def pieces_of(program: bytes) -> tuple[bytes, ...]:
    """One opcode with its argument each."""
    starts = [place for _, _, place in pickletools.genops(program) if place is not None]
    return tuple(program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True))


def byte(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut_or_grown(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    place = rng.randrange(len(content))
    return rng.choice(
        (content[:place], content[place:], content + content[:place], content[:place] + evil + content[place:])
    )


def length_field(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """A size, offset or count in the zip archive's own records."""
    changed = bytearray(content)
    record, fields = rng.choice(
        ((b"PK\x01\x02", ((20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4), (10, 2), (8, 2))),
         (b"PK\x03\x04", ((18, 4), (22, 4), (26, 2), (28, 2), (8, 2))),
         (b"PK\x05\x06", ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))))
    )  # fmt: skip
    places = [at for at in range(len(changed) - 4) if changed[at : at + 4] == record]
    offset, width = rng.choice(fields)
    start = rng.choice(places) + offset
    value = rng.choice((0, 1, 7, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, rng.randrange(2**32))) % 2 ** (8 * width)
    changed[start : start + width] = value.to_bytes(width, "little")
    return bytes(changed[: len(content)])


def opcode(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """Opcodes of the pickle left out, doubled, exchanged or replaced."""
    pieces = list(pieces_of(pickle_of(content)))
    for _ in range(rng.choice((1, 1, 3))):
        a, b = rng.randrange(1, len(pieces)), rng.randrange(1, len(pieces))
        action = rng.randrange(4)
        if action == 0:
            del pieces[a]
        elif action == 1:
            pieces.insert(a, pieces[b])
        elif action == 2:
            pieces[a], pieces[b] = pieces[b], pieces[a]
        else:
            code = rng.choice(pickletools.opcodes).code.encode("latin-1")
            pieces[a] = code + rng.choice((b"", b"\xff\xff\xff\xff", struct.pack("<Q", 2**60), b"os\nsystem\n"))
    return with_pickle(content, b"".join(pieces))


def number(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """A shape, stride, offset or count of the pickle replaced by another number."""
    pieces = list(pieces_of(pickle_of(content)))
    place = rng.choice([at for at, piece in enumerate(pieces) if piece[:1] in (b"K", b"M", b"J")])
    large = b"\x8a\x08" + struct.pack("<q", rng.choice((2**62, 2**40, -1, -(2**62), 10**10)))
    pieces[place] = rng.choice((b"K" + bytes([rng.randrange(256)]), large))
    return with_pickle(content, b"".join(pieces))


def hostile(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """The command itself, somewhere in the pickle, or as a file in the archive."""
    pieces = list(pieces_of(pickle_of(content)))
    inner = evil[2:-1]
    place = rng.randrange(1, len(pieces))
    return rng.choice((
        with_pickle(content, evil),
        with_pickle(content, b"".join([*pieces[:place], inner, b"0", *pieces[place:]])),
        with_pickle(content, b"".join([*pieces[:place], inner, *pieces[place:]])),
        rebuilt(content, lambda name, data: (name, evil if rng.random() < 0.3 else data)),
        evil,
    ))  # fmt: skip


def entries(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """Entries renamed, emptied, compressed or holding the archive itself."""
    action, victim = rng.randrange(4), rng.randrange(9)
    seen = iter(range(99))

    def change(name: str, data: bytes) -> tuple[str, bytes]:
        if next(seen) != victim or action == 3:
            return name, data
        return [(f"{name}x", data), (name, b""), (name, content)][action]

    return rebuilt(content, change, zipfile.ZIP_DEFLATED if action == 3 else zipfile.ZIP_STORED)


MUTATIONS: tuple[Mutation, ...] = (
    byte,
    cut_or_grown,
    length_field,
    length_field,
    opcode,
    opcode,
    number,
    hostile,
    entries,
)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    began = time.process_time()
    rng, path, canary = random.Random(0), tmp_path / "pytorch_model.bin", tmp_path / "canary"
    evil = pickle.dumps(Touch(canary), protocol=2)
    torch.save(state(), path)
    valid = path.read_bytes()
    assert read_dmd2(path).family == "edm"
    read, refusals, longest = 0, list[str](), 0.0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(NUM_FILES):
        path.write_bytes(MUTATIONS[index % len(MUTATIONS)](rng, valid, evil))
        started = time.process_time()
        try:
            found = read_dmd2(path)
        except UserError as error:
            refusals.append(str(error))
        else:  # the change hit a weight, a checksum, or what nobody reads
            read += 1
            assert all(type(tensor) is Tensor for tensor in found.generator.values())
            assert sum(tensor.nbytes for tensor in found.generator.values()) <= path.stat().st_size
        longest = max(longest, time.process_time() - started)
    assert not canary.exists()
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)
    assert len(refusals) > NUM_FILES / 2  # the mutations bite
    assert read > NUM_FILES / 50  # and are not all crude
    assert longest < SECONDS / 10
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < KIBIBYTES
    pickle.loads(evil)
    assert canary.exists()  # the same bytes do harm where they are unpickled
