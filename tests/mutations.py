"""Structural mutations of pickles, torch.save's archives, safetensors and LMDB files, and the promises readers keep.

A mutation takes (rng, valid file, hostile pickle) and gives a file: opcodes, lengths, offsets, headers and nested
archives changed with everything around them consistent, not only flipped bytes.
"""

import functools
import io
import itertools
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

NUM_FILES = int(os.environ.get("FUZZ_FILES", "200"))
"""Damaged files for each test; `make test-long` sets 1,000."""
Mutation = Callable[[random.Random, bytes, bytes], bytes]


class Touch:
    """Pickles as a command that leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.canary}",)


def assert_read_or_refused(
    folder: Path, name: str, valid: bytes, mutations: Sequence[Mutation], read: Callable[[Path], Any], *,
    check: Callable[[Any, Path], None] = lambda found, path: None, seconds: float = 20, mebibytes: int = 200,
) -> None:  # fmt: skip
    """NUM_FILES mutated files: each is read, or refused in one sentence; none runs, or runs away.

    Time is this process's own, so that other work on the machine does not count.

    Args:
        folder: empty.
        name: of the file; each gets a folder of its own, because a mapped file must not change under its reader.
        valid: a file that is read.
        read: raises UserError for what it refuses.
        check: what else must hold of what was read.
        seconds: processor time that a thousand files may take, and ten times what one may.
    """
    canary = folder / "canary"
    evil = pickle.dumps(Touch(canary), protocol=2)
    began, resident = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_read, refusals, longest = 0, list[tuple[Path, str]](), 0.0
    for index in range(NUM_FILES):
        path = folder / str(index) / name
        path.parent.mkdir()
        path.write_bytes(mutations[index % len(mutations)](random.Random(index), valid, evil))
        started = time.process_time()
        try:
            found = read(path)
        except UserError as error:
            refusals.append((path, str(error)))
        else:  # the change hit a number, a name, or what nobody reads
            num_read += 1
            check(found, path)
        longest = max(longest, time.process_time() - started)
        path.unlink()
    assert not canary.exists()
    assert not [told for path, told in refusals if str(path) not in told or "\n" in told or len(told) > 1000]
    assert len(refusals) > NUM_FILES / 2  # the mutations bite
    assert num_read > NUM_FILES / 50  # and are not all crude
    assert longest < seconds / 10
    assert time.process_time() - began < seconds * max(NUM_FILES, 500) / 1000  # some of it is the first file's
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < mebibytes * 1024
    pickle.loads(evil)
    assert canary.exists()  # the same bytes do harm where they are unpickled


# --- Any file


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


# --- Pickles


@functools.cache
def pieces_of(program: bytes) -> tuple[bytes, ...]:
    """One opcode with its argument each."""
    starts = [place for _, _, place in pickletools.genops(program) if place is not None]
    return tuple(program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True))


def opcode(rng: random.Random, program: bytes, evil: bytes) -> bytes:
    """Opcodes left out, doubled, exchanged or replaced."""
    pieces = list(pieces_of(program))
    for _ in range(min(rng.choice((1, 1, 3)), len(pieces) - 1)):
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
    return b"".join(pieces)


def number(rng: random.Random, program: bytes, evil: bytes) -> bytes:
    """A shape, stride, offset, count or memo's number replaced by another one."""
    pieces = list(pieces_of(program))
    place = rng.choice([at for at, piece in enumerate(pieces) if piece[:1] in (b"K", b"M", b"J", b"h", b"q", b"\x95")])
    large = b"\x8a\x08" + struct.pack("<q", rng.choice((2**62, 2**40, -1, -(2**62), 10**10)))
    small = (b"h" if pieces[place][:1] == b"h" else b"K") + bytes([rng.randrange(256)])
    pieces[place] = rng.choice((small, large))
    return b"".join(pieces)


def length(rng: random.Random, program: bytes, evil: bytes) -> bytes:
    """A text or a run of bytes that claims another length than it has."""
    widths = {b"X": 4, b"B": 4, b"\x8c": 1, b"C": 1, b"\x8d": 8, b"\x8e": 8, b"\x95": 8}
    pieces = list(pieces_of(program))
    place = rng.choice([at for at, piece in enumerate(pieces) if piece[:1] in widths])
    code, width = pieces[place][:1], widths[pieces[place][:1]]
    value = rng.choice((0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**60, rng.randrange(300))) % 2 ** (8 * width)
    pieces[place] = code + value.to_bytes(width, "little") + pieces[place][1 + width :]
    return b"".join(pieces)


def hostile(rng: random.Random, program: bytes, evil: bytes) -> bytes:
    """The command itself, in the place of the pickle or somewhere in it."""
    pieces, inner = list(pieces_of(program)), evil[2:-1]
    place = rng.randrange(1, len(pieces))
    left_out = b"".join([*pieces[:place], inner, b"0", *pieces[place:]])
    return rng.choice((evil, left_out, b"".join([*pieces[:place], inner, *pieces[place:]])))


def nested(rng: random.Random, program: bytes, evil: bytes) -> bytes:
    """The same to what a pickle keeps as bytes: EDM's files hold an archive of pickles for each tensor."""
    pieces = list(pieces_of(program))
    place = rng.choice([at for at, piece in enumerate(pieces) if piece[:1] in (b"B", b"C", b"\x8e")])
    start = {b"B": 5, b"C": 2, b"\x8e": 9}[pieces[place][:1]]
    inner = rng.choice((byte, cut_or_grown, _one_of_many))(rng, pieces[place][start:], evil)
    pieces[place] = b"B" + struct.pack("<I", len(inner)) + inner
    return b"".join(pieces)


def _one_of_many(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """A change in one of the five pickles that an archive in torch's old format begins with."""
    stream, ends = io.BytesIO(content), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    start, end = rng.choice(list(itertools.pairwise(ends)))
    mutation = rng.choice((opcode, opcode, hostile)) if start else opcode
    if ends.index(start) in (2, 3):  # the ones with numbers
        mutation = rng.choice((opcode, number, length, hostile))
    return content[:start] + mutation(rng, content[start:end], evil) + content[end:]


PICKLE_MUTATIONS: tuple[Mutation, ...] = (byte, cut_or_grown, opcode, opcode, number, length, hostile)


# --- torch.save's archives


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


def in_archive(mutation: Mutation) -> Mutation:
    """A mutation of the archive's pickle."""

    def mutate(rng: random.Random, content: bytes, evil: bytes) -> bytes:
        program = mutation(rng, pickle_of(content), evil)
        return rebuilt(content, lambda name, data: (name, program if name.endswith("data.pkl") else data))

    return mutate


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


def hostile_entries(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """The command as the whole file, or as files in the archive."""
    return rng.choice((evil, rebuilt(content, lambda name, data: (name, evil if rng.random() < 0.3 else data))))


def entries(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """Entries renamed, emptied, compressed or holding the archive itself."""
    action, victim = rng.randrange(4), rng.randrange(9)
    seen = iter(range(99))

    def change(name: str, data: bytes) -> tuple[str, bytes]:
        if next(seen) != victim or action == 3:
            return name, data
        return [(f"{name}x", data), (name, b""), (name, content)][action]

    return rebuilt(content, change, zipfile.ZIP_DEFLATED if action == 3 else zipfile.ZIP_STORED)


ARCHIVE_MUTATIONS: tuple[Mutation, ...] = (
    byte, cut_or_grown, length_field, length_field, in_archive(opcode), in_archive(opcode), in_archive(number),
    in_archive(hostile), hostile_entries, entries,
)  # fmt: skip


# --- safetensors

_DTYPES = [
    "F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I16", "U64", "C64", "Q4", "",
]  # fmt: skip
_NUMBERS = [0, 1, -1, 2**31, 2**32, 2**63, 2**64 - 1, 10**30, 1.5, "1", None, [], True]
_NAMES = [
    "", "a" * 50_000, "\u0000", "model.diffusion_model.", "😀", "conditioner.embedders.1.model.x", "lora_unet_x.alpha",
    "unet.x\ny.lora_A.weight", "lora_te1_x.lora_up.weight", "lora_unet_" + "a" * 50_000 + ".lora_up.weight",
]  # fmt: skip


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_safetensors(header: bytes, data: bytes, size: int | None = None) -> bytes:
    """A file; `size` is what it claims of its header."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def _change_entry(entry: dict[str, Any], rng: random.Random, num_bytes: int) -> None:
    field = rng.choice(["dtype", "shape", "reshape", "data_offsets", "drop", "extra"])
    if field == "dtype":
        entry["dtype"] = rng.choice(_DTYPES)
    elif field == "shape":
        entry["shape"] = [rng.choice(_NUMBERS) for _ in range(rng.choice([0, 1, 2, 3, 500]))]
    elif field == "reshape":  # as many elements as before
        flat = [number for number in entry.get("shape", []) if isinstance(number, int)]
        entry["shape"] = rng.choice([[1, *flat], flat[::-1], [*flat, 1, 1], [*flat, *[1] * 30]])
    elif field == "data_offsets":
        places = [*_NUMBERS, num_bytes // 2, num_bytes - 4, num_bytes]
        entry["data_offsets"] = [rng.choice(places) for _ in range(rng.choice([0, 1, 2, 2, 2, 3]))]
    elif field == "drop":
        entry.pop(rng.choice(list(entry)))
    else:
        entry["surprise"] = rng.choice(_NUMBERS)


def safetensors_header(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """An entry, the header's length, its JSON, its metadata, names or nesting; the data, cut or changed."""
    header, data = split_safetensors(content)
    tensors = [key for key in header if key != "__metadata__"]
    kind = rng.choice([*["entry"] * 3, "length", "cut", "bytes", "json", "metadata", "keys", "nesting"])
    if kind == "entry":
        for _ in range(rng.choice([1, 1, 2, 4])):
            _change_entry(header[rng.choice(tensors)], rng, len(data))
    elif kind == "length":
        text = json.dumps(header).encode()
        sizes = [0, 1, 7, len(text) - 1, len(text) + 1, len(text) + len(data) + 1, 2**27, 2**32, 2**63, 2**64 - 1]
        return join_safetensors(text, data, rng.choice(sizes))
    elif kind == "cut":
        cut = content[: rng.randrange(len(content))]
        return cut if rng.random() < 0.7 else content + bytes(rng.randrange(1, 100))
    elif kind == "bytes":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    elif kind == "json":
        text = json.dumps(header).encode()
        place = rng.randrange(len(text))
        inserted = rng.choice([b"", b"{", b"]", b'"', b"\xff\xfe", b"\\ud800", b"NaN", b" " * 5000, b"1e999"])
        return join_safetensors(text[:place] + inserted + text[place + rng.randrange(3) :], data)
    elif kind == "metadata":
        values = [*_NUMBERS, {"a": 1}, {"a": None}, {"a": "b" * 100_000}, [1], "x"]
        texts = ["{", "[" * 50_000, '{"alpha": 1e999}', '{"alpha": NaN}', '{"alpha": 0}', '{"alpha": "\\n"}', "[]"]
        header["__metadata__"] = rng.choice(
            [*values, *({name: text} for name in ("lora", "lora_adapter_metadata") for text in texts)]
        )
    elif kind == "keys":
        header[rng.choice(_NAMES)] = header.pop(rng.choice(tensors))
    else:
        depth = rng.choice([10, 200, 100_000])
        return join_safetensors(b'{"a":' * depth + b"1" + b"}" * depth, data)
    return join_safetensors(json.dumps(header).encode(), data)


def safetensors_swap(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """Two tensors' places exchanged, or several names for one place: the header itself stays valid or nearly so."""
    header, data = split_safetensors(content)
    a, b = rng.sample([key for key in header if key != "__metadata__"], 2)
    if rng.random() < 0.5:
        header[a], header[b] = header[b], header[a]
    else:
        header[a] = header[b]
    return join_safetensors(json.dumps(header).encode(), data)


# --- LMDB: 4096-byte pages, two head pages first


def lmdb_field(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """One number of a head page, of a page's header, of its list of nodes, or of a node."""
    changed = bytearray(content)
    where = rng.choice(("head", "page", "list", "node", "node"))
    if where == "head":
        # number, flags, magic, version, address, map size, page size, flags, depth, root of both trees, last page, transaction
        offset, width = rng.choice((
            (0, 8), (10, 2), (16, 4), (20, 4), (24, 8), (32, 8), (40, 4), (44, 2), (80, 8), (92, 2), (94, 2), (128, 8),
            (136, 8), (144, 8),
        ))  # fmt: skip
        places = [offset + page * 4096 for page in rng.choice(((0,), (1,), (0, 1)))]
    else:
        page = 4096 * rng.randrange(2, len(content) // 4096)
        lower = min(4096, struct.unpack_from("<H", content, page + 12)[0])
        entries = list(range(page + 16, page + max(18, lower), 2))
        if where == "page":
            offset, width = rng.choice(((0, 8), (10, 2), (12, 2), (14, 2)))
            places = [page + offset]
        elif where == "list":
            width, places = 2, [rng.choice(entries)]
        else:  # two halves of a length or page number, flags, the key's length, or the number of a large value's page
            start = page + struct.unpack_from("<H", content, rng.choice(entries))[0] % 4080
            key = struct.unpack_from("<H", content, start + 6)[0] % 512
            offset, width = rng.choice(((0, 2), (2, 2), (4, 2), (6, 2), (8 + key, 8)))
            places = [start + offset]
    for place in places:
        near = int.from_bytes(content[place : place + width], "little") + rng.choice((-1, 1, 2))
        values = (0, 1, 2, 16, 4095, 4096, len(content) // 4096, 2**15, 2**16 - 1, 2**32 - 1, 2**40, 2**64 - 1, near)
        changed[place : place + width] = (rng.choice(values) % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(changed[: len(content)])


def lmdb_pages(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """Whole pages exchanged, doubled, emptied or garbled."""
    pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    a, b = rng.randrange(len(pages)), rng.randrange(len(pages))
    renumbered = struct.pack("<Q", a) + pages[b][8:]
    pages[a] = rng.choice((pages[b], renumbered, bytes(4096), rng.randbytes(4096), pages[a][:16] + rng.randbytes(4080)))
    return b"".join(pages)


def lmdb_values(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """A sound file with other values: shapes that are none, rows of another length, missing and foreign keys."""
    import lmdb

    shapes = [
        b"", b"5", b"0", b"-1 4", b"9 " * 5000, b"999999999999999 4", b"60 4 4", b"60 0 4 4", b"60 0", b"\xff\xfe", b"6e1",
        "٦٠".encode(), b"60 4 4 4\n", b"60 99999999999999999999", b"60 999999999999999 999999999999999",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data.mdb").write_bytes(content)
        with lmdb.open(folder, lock=False, map_size=2**24) as env, env.begin(write=True) as transaction:
            keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
            for _ in range(rng.choice((1, 1, 3))):
                key = rng.choice([*keys, *[key for key in keys if key.endswith(b"_shape")] * 20])
                if rng.random() < 0.2:
                    transaction.delete(key)
                elif key.endswith(b"_shape"):
                    transaction.put(rng.choice((key, b"x\ny_shape", b"a" * 400 + b"_shape")), rng.choice(shapes))
                else:
                    transaction.put(key, rng.randbytes(rng.choice((0, 1, 127, 128, 129, 9000))))
        return (Path(folder) / "data.mdb").read_bytes()
