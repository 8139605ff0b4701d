"""Every mutant of a file: its bytes in bad ways, and for what has keys each key's value in every wrong type."""

import json
import random
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import mutations

DEEP = object()
GONE = object()
VALUES: dict[str, Any] = {
    "gone": GONE, "null": None, "list": [], "object": {}, "text": "x", "no text": "", "negative": -1, "zero": 0,
    "huge": 10**12, "beyond": 10**400, "NaN": float("nan"), "true": True, "list of lists": [[None]], "fraction": 0.5, "deep": DEEP,
}  # fmt: skip
DEPTH = 100_000
MOST_KEYS = 80  # of one object; a vocabulary's entries are data, of which the first and last stand for all


@dataclass(frozen=True)
class Mutant:
    """One damaged file: where it lies in its folder, what was done, and its bytes (None: it is gone)."""

    file: str
    what: str
    make: Callable[[], bytes | None]


def mutants(root: Path, file: str) -> Iterator[Mutant]:
    """All mutants of one file, by its suffix."""
    path = root / file
    content, suffix = path.read_bytes(), path.suffix.lower()
    for what, make in _of_bytes(content).items():
        yield Mutant(file, what, make)
    if suffix == ".json":
        for what, make in _of_json(json.loads(content)):
            yield Mutant(file, what, make)
    elif suffix == ".jsonl":
        for what, make in _of_json_lines(content.decode()):
            yield Mutant(file, what, make)
    elif suffix == ".toml":
        for what, make in _of_toml(content.decode()):
            yield Mutant(file, what, make)
    elif suffix == ".parquet":
        for what, make in _of_parquet(path):
            yield Mutant(file, what, make)
    elif suffix == ".npz":
        for what, make in _of_npz(path):
            yield Mutant(file, what, make)
    for what, make in _structural(suffix, content):
        yield Mutant(file, what, make)


def keys_of(found: Any, depth: int = 4) -> Iterator[tuple[Any, ...]]:
    """Paths to every key, and to the first and last element of every list."""
    if isinstance(found, dict):
        names: list[Any] = list(found)
        names = names if len(names) <= MOST_KEYS else [*names[:3], *names[-3:]]
    elif isinstance(found, list):
        names = sorted({0, len(found) - 1}) if found else []
    else:
        return
    for name in names:
        yield (name,)
        if depth > 1:
            yield from ((name, *rest) for rest in keys_of(found[name], depth - 1))


def num_keys(path: Path) -> int:
    """Keys that are walked in one file."""
    readers: dict[str, Callable[[str], Any]] = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix == ".jsonl":
        return sum(1 for _ in keys_of(json.loads(path.read_text().splitlines()[0])))
    return sum(1 for _ in keys_of(readers[path.suffix](path.read_text()))) if path.suffix in readers else 0


def _of_bytes(content: bytes) -> dict[str, Callable[[], bytes | None]]:
    def flipped(seed: int) -> bytes:
        return mutations.byte(random.Random(seed), content, b"") if content else b"\x00"

    return {
        "removed": lambda: None, "empty": lambda: b"", "half": lambda: content[: len(content) // 2],
        "one byte short": lambda: content[:-1], "not UTF-8": lambda: b"\xff\xfe\x00" + content,
        "zeros": lambda: bytes(1000), "a picture": lambda: b"\x89PNG\r\n\x1a\n" + content,
        "flip 1": lambda: flipped(1), "flip 2": lambda: flipped(2), "flip 3": lambda: flipped(3),
        "grown": lambda: mutations.cut_or_grown(random.Random(4), content, b"x") if content else b"x",
    }  # fmt: skip


def _changed(found: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value changed or gone."""
    copy = json.loads(json.dumps(found))
    around = copy
    for name in place[:-1]:
        around = around[name]
    if value is GONE:
        del around[place[-1]]
    else:
        around[place[-1]] = "@deep@" if value is DEEP else value
    return copy


def _text(found: Any) -> bytes:
    nested = "[" * DEPTH + "]" * DEPTH
    return json.dumps(found, indent=1).replace('"@deep@"', nested).encode()


def _of_json(found: Any) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    for name, value in VALUES.items():
        if value is not GONE:
            yield f"the whole: {name}", lambda value=value: _text("@deep@" if value is DEEP else value)  # type: ignore[misc]
    for place in keys_of(found):
        for name, value in VALUES.items():
            yield (
                f"{'.'.join(map(str, place))}: {name}",
                lambda place=place, value=value: _text(_changed(found, place, value)),  # type: ignore[misc]
            )


def _of_json_lines(text: str) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    lines = text.splitlines()
    for number in sorted({0, len(lines) - 1}):
        for what, make in _of_json(json.loads(lines[number])):

            def whole(number: int = number, make: Callable[[], bytes | None] = make) -> bytes:
                line = (make() or b"").decode().replace("\n", "")
                return "\n".join([*lines[:number], line, *lines[number + 1 :], ""]).encode()

            yield f"line {number + 1}, {what}", whole


def _of_toml(text: str) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    """Each line's value replaced."""
    values = {
        "list": "[]", "object": "{}", "text": '"x"', "negative": "-1", "huge": "1000000000000", "NaN": "nan",
        "true": "true", "date": "2020-01-01", "deep": "[" * 20_000 + "]" * 20_000, "none": "",
        "beyond": "1" + "0" * 400, "infinity": "inf", "fraction": "0.5", "zero": "0",
    }  # fmt: skip
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key, equals, _ = line.partition(" = ")
        for name, value in values.items() if equals else ():
            changed = "\n".join([*lines[:number], f"{key} = {value}", *lines[number + 1 :]])
            yield f"{key}: {name}", lambda changed=changed: changed.encode()  # type: ignore[misc]
        yield f"doubled line {number}", lambda number=number: "\n".join([*lines, lines[number]]).encode()  # type: ignore[misc]


def _of_parquet(path: Path) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    import io

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    rows = table.num_rows
    columns: dict[str, Any] = {
        "numbers": pyarrow.array(range(rows)), "texts": pyarrow.array(["x"] * rows), "bytes": pyarrow.array([b"x"] * rows),
        "nothing": pyarrow.nulls(rows), "lists": pyarrow.array([[1, 2]] * rows), "flags": pyarrow.array([True] * rows),
        "objects": pyarrow.array([{"a": 1}] * rows), "fractions": pyarrow.array([float("nan")] * rows),
        "no bytes": pyarrow.array([{"bytes": None, "path": None}] * rows, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
        "another file": pyarrow.array([{"bytes": None, "path": "/etc/passwd"}] * rows, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
        "bad bytes": pyarrow.array([{"bytes": b"x", "path": "x.png"}] * rows),
        "times": pyarrow.array(range(rows), pyarrow.timestamp("s")),
        "categories": pyarrow.array(["x"] * rows).dictionary_encode(),
        "huge": pyarrow.array([10**12] * rows), "negative": pyarrow.array([-1] * rows),
        "one null": pyarrow.array([None, *["x"] * (rows - 1)]),
    }  # fmt: skip

    def written(changed: Any) -> bytes:
        out = io.BytesIO()
        pyarrow.parquet.write_table(changed, out)
        return out.getvalue()

    yield "no rows", lambda: written(table.slice(0, 0))
    yield "no columns", lambda: written(pyarrow.table({}))
    for number, name in enumerate(table.column_names):
        yield f"{name}: gone", lambda name=name: written(table.drop_columns([name]))  # type: ignore[misc]
        yield f"{name}: twice", lambda name=name: written(table.append_column(name, table[name]))  # type: ignore[misc]
        for kind, column in columns.items():
            yield (
                f"{name}: {kind}",
                lambda number=number, name=name, column=column: written(table.set_column(number, name, column)),  # type: ignore[misc]
            )


def _of_npz(path: Path) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    import io

    import numpy as np

    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    values: dict[str, Any] = {
        "text": np.array("x"), "texts": np.array(["x", "y"]), "objects": np.array([{"a": 1}, None], dtype=object),
        "empty": np.zeros(0), "number": np.array(3.0), "whole": np.arange(4), "complex": np.zeros(4, complex),
        "half": np.zeros(4, np.float16), "long": np.zeros(4, np.longdouble), "swapped": np.zeros(4, ">f8"),
        "structure": np.zeros(4, [("a", "f4"), ("b", "i4")]), "times": np.zeros(4, "M8[s]"), "flags": np.zeros(4, bool),
        "unsigned": np.zeros(4, np.uint16), "NaN": np.full(4, np.nan), "four axes": np.zeros((2, 2, 2, 2)),
        "negative": np.array(-5), "huge": np.array(10**18), "infinite": np.array(np.inf),
    }  # fmt: skip

    def written(changed: dict[str, Any]) -> bytes:
        out = io.BytesIO()
        np.savez(out, **changed)
        return out.getvalue()

    def claimed(name: str, shape: str) -> bytes:
        """A header that claims another shape than there are numbers."""
        out = io.BytesIO()
        import zipfile

        with (
            zipfile.ZipFile(io.BytesIO(written(arrays))) as old,
            zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for info in old.infolist():
                data = old.read(info)
                if info.filename == f"{name}.npy":
                    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
                    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)
                new.writestr(info.filename, data)
        return out.getvalue()

    for name in arrays:
        yield f"{name}: gone", lambda name=name: written({k: v for k, v in arrays.items() if k != name})  # type: ignore[misc]
        for kind, value in values.items():
            yield f"{name}: {kind}", lambda name=name, value=value: written({**arrays, name: value})  # type: ignore[misc]
            shaped = arrays[name]
            yield (
                f"{name}: {kind} of its shape",
                lambda name=name, value=value, shaped=shaped: written(  # type: ignore[misc]
                    {**arrays, name: np.resize(value, shaped.shape) if value.size else value}
                ),
            )
        for shape in ("(1000000, 1000000)", "(10000000000,)", "(-1,)", "(0, 5)", "'x'", "(1,)*200"):
            yield f"{name}: claims {shape}", lambda name=name, shape=shape: claimed(name, shape)  # type: ignore[misc]


def _structural(suffix: str, content: bytes, each: int = 6) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    """The mutations of tests/mutations.py that know a format."""
    import pickle

    evil = pickle.dumps(mutations.Touch(Path("/nonexistent/canary")), protocol=2)
    kinds: tuple[mutations.Mutation, ...] = ()
    if suffix == ".safetensors":
        kinds = (*[mutations.safetensors_header] * 6, mutations.safetensors_swap)
    elif suffix in (".bin", ".pth", ".pt", ".ckpt") and content[:2] == b"PK":
        kinds = mutations.ARCHIVE_MUTATIONS
    elif suffix == ".pkl":
        kinds = mutations.PICKLE_MUTATIONS
    elif suffix == ".mdb":
        kinds = (mutations.lmdb_field, mutations.lmdb_pages, mutations.lmdb_values)
    elif suffix == ".tar":
        kinds = (tar_field,) * 4
    for number, kind in enumerate(kinds):
        for seed in range(each):
            yield (
                f"{kind.__name__} {number}.{seed}",
                lambda kind=kind, seed=seed, number=number: kind(random.Random(100 * number + seed), content, evil),  # type: ignore[misc]
            )


def tar_field(rng: random.Random, content: bytes, evil: bytes) -> bytes:
    """A number or name in one of a tar's headers, with its checksum made right or not."""
    changed = bytearray(content)
    heads = [at for at in range(0, len(content) - 511, 512) if content[at + 257 : at + 262] == b"ustar"]
    head = rng.choice(heads)
    start, width, values = rng.choice((
        (124, 12, (b"-0000001000", b"77777777777", b"99999999999", b"\x80" + b"\xff" * 11, b"00000000001", b"\xff" * 12)),
        (156, 1, (b"1", b"2", b"5", b"x", b"L", b"S", b"g")),
        (0, 100, (b"", b"../../x.png", b"/etc/passwd", b"\xff\xfe.png", b"a" * 100, b"000.png\x00")),
        (148, 8, (b"0000000", b"\xff" * 8)),
    ))  # fmt: skip
    changed[head + start : head + start + width] = rng.choice(values).ljust(width, b"\0")
    if start != 148 and rng.random() < 0.8:
        total = sum(changed[head : head + 148]) + 8 * 32 + sum(changed[head + 156 : head + 512])
        changed[head + 148 : head + 156] = f"{total:06o}\0 ".encode()
    return bytes(changed)
