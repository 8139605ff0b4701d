"""Checks an LMDB file's pages before the C library maps it, because one wrong page number in it ends the process.

liblmdb follows page numbers, offsets and lengths as it finds them: a garbled file is read outside its mapping
(a bus error or a segmentation fault), or aborts. So everything a reader follows is checked here first: both head
pages, and from the newer one every branch and leaf page, each node on it and the extent of each large value. The
values themselves are not read. About a second a million rows.

Layout: LMDB data version 1 of 64-bit little-endian machines, which every release since 2011 writes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = np.dtype([("number", "<u8"), ("pad", "<u2"), ("flags", "<u2"), ("lower", "<u2"), ("upper", "<u2")])
_TREE = np.dtype([
    ("pad", "<u4"), ("flags", "<u2"), ("depth", "<u2"), ("branches", "<u8"), ("leaves", "<u8"), ("large", "<u8"),
    ("entries", "<u8"), ("root", "<u8"),
])  # fmt: skip
_META = np.dtype([
    ("page", _HEADER), ("magic", "<u4"), ("version", "<u4"), ("address", "<u8"), ("map_size", "<u8"), ("free", _TREE),
    ("main", _TREE), ("last_page", "<u8"), ("transaction", "<u8"),
])  # fmt: skip
_BRANCH, _LEAF, _HEAD = 1, 2, 8  # kinds of pages
_KINDS = 0x6F  # the flags that say what a page is
_BIG, _NAMED = 1, 2  # nodes: the value lies on pages of its own; the value is a database
_FIXED_ADDRESS = 1
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
_NO_PAGE = 2**64 - 1
_MAX_DEPTH = 32


class _Tree(NamedTuple):
    """The file's pages, and how far the newest state reaches."""

    data: Bytes
    page_size: int
    num_pages: int


def check_lmdb_file(path: Path) -> None:
    """Raise ValueError, saying what is wrong, for a file that liblmdb cannot be trusted with; OSError: unreadable."""
    _check(np.asarray(np.memmap(path, np.uint8, mode="r")))


def _check(data: Bytes) -> None:
    first = _meta(data, 0)
    page_size = int(first["free"]["pad"])
    if page_size not in (512 << power for power in range(7)):
        raise ValueError(f"its pages have {page_size} bytes")
    second = _meta(data, page_size)
    if second["free"]["pad"] != first["free"]["pad"]:
        raise ValueError("its two head pages differ in the size of a page")
    newest = second if second["transaction"] > first["transaction"] else first
    main, last_page = newest["main"], int(newest["last_page"])
    if len(data) < (last_page + 1) * page_size:
        raise ValueError(f"it is cut short: {len(data)} bytes of {(last_page + 1) * page_size}")
    if newest["free"]["flags"] & _FIXED_ADDRESS or main["flags"]:
        raise ValueError("it asks for a fixed address, or for several values a key")
    if main["depth"] > _MAX_DEPTH or (main["root"] == _NO_PAGE) != (main["depth"] == 0):
        raise ValueError(f"its tree of pages is {int(main['depth'])} deep")
    if main["depth"]:
        _check_tree(_Tree(data, page_size, last_page + 1), int(main["root"]), int(main["depth"]))


def _meta(data: Bytes, start: int) -> np.void:
    if len(data) < start + _META.itemsize:
        raise ValueError("it has no two head pages")
    meta: np.void = data[start : start + _META.itemsize].view(_META)[0]
    if (meta["magic"], meta["version"]) != (_MAGIC, _VERSION) or not meta["page"]["flags"] & _HEAD:
        raise ValueError("it does not start with an LMDB head page of data version 1")
    return meta


def _check_tree(tree: _Tree, root: int, depth: int) -> None:
    """Level by level: every page once, all leaves equally deep."""
    seen: set[int] = set()
    level = [root]
    for left in range(depth, 0, -1):
        children: list[int] = []
        for number in level:
            if number in seen or not 2 <= number < tree.num_pages:
                raise ValueError(f"its tree names page {number} twice, or has no such page")
            seen.add(number)
            children += _check_page(tree, number, _BRANCH if left > 1 else _LEAF)
        level = children


def _check_page(tree: _Tree, number: int, kind: int) -> list[int]:
    """Every node of one page; returns the pages that a branch names."""
    page = tree.data[number * tree.page_size : (number + 1) * tree.page_size]
    head = page[: _HEADER.itemsize].view(_HEADER)[0]
    lower, upper = int(head["lower"]), int(head["upper"])
    count = (lower - _HEADER.itemsize) // 2
    fits = _HEADER.itemsize < lower <= upper <= tree.page_size and lower % 2 == 0
    if head["number"] != number or head["flags"] & _KINDS != kind or not fits or (kind == _BRANCH and count < 2):
        raise ValueError(f"its page {number} is garbled")
    starts = page[_HEADER.itemsize : lower].view("<u2").astype(np.int64)
    if starts.min() < upper or starts.max() > tree.page_size - 8 or (starts % 2).any():
        raise ValueError(f"a node of its page {number} lies outside the page")
    words = page.view("<u2")
    low, high, flags, key = (words[starts // 2 + place].astype(np.int64) for place in range(4))
    ends = starts + 8 + key
    if kind == _BRANCH:
        if ends.max() > tree.page_size:
            raise ValueError(f"a node of its page {number} lies outside the page")
        return [int(child) for child in low | high << 16 | flags << 32]
    if (flags & ~(_BIG | _NAMED)).any() or not key.all():
        raise ValueError(f"a node of its page {number} holds several values, or no key")
    sizes, big = low | high << 16, (flags & _BIG) == _BIG
    if (ends + np.where(big, 8, sizes)).max() > tree.page_size:
        raise ValueError(f"a node of its page {number} lies outside the page")
    if big.any():
        firsts = page[ends[big][:, None] + np.arange(8)].copy().view("<u8")[:, 0]
        spans = (sizes[big] + _HEADER.itemsize + tree.page_size - 1) // tree.page_size
        if (
            (firsts < 2).any()
            or (firsts > tree.num_pages - spans.astype(np.uint64)).any()
            or spans.max() >= tree.num_pages
        ):
            raise ValueError(f"a value that its page {number} names lies outside the file")
    return []
