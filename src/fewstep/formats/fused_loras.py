"""LoRAs on one layer that stands for several: queries, keys and values as models' original code has them, and tools by it.

Several updates with factors A_i, B_i of rank r are one of rank n r: A = [A_1; ...; A_n], B block diagonal. Such a file is taken
apart into the same updates again, as diffusers does it; any other update of the fused layer becomes n of its own rank, each with
its rows of B and the whole of A.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # "down" (rank, in), "up" (out, rank), perhaps "alpha"


def fused(layers: Sequence[Parts | None]) -> Parts:
    """One layer's parts for several of one rank, alpha and width, which stand one below the other; None: no update.

    Args:
        layers: at least one of them given, linear, all with alpha.
    """
    first = next(layer for layer in layers if layer is not None)
    nothing = {name: torch.zeros_like(first[name]) for name in ("down", "up")}
    given = [layer or nothing for layer in layers]
    return {
        "down": torch.cat([layer["down"] for layer in given]),
        "up": torch.block_diag(*(layer["up"] for layer in given)),
        "alpha": first["alpha"] * len(layers),
    }


def parts_of(layer: Parts, count: int) -> list[Parts | None]:
    """The parts of `count` layers of one width that a fused one stands for; None where there is no update at all.

    Raises:
        ValueError: its rows cannot be theirs.
    """
    down, up = layer["down"], layer["up"]
    if down.ndim != 2 or len(up) % count:
        raise ValueError(f"{len(up)} rows for {count} layers")
    alpha = {"alpha": layer["alpha"]} if "alpha" in layer else {}
    rows = up.chunk(count)
    if alpha and _is_block_diagonal(rows, count):
        downs, rows = down.chunk(count), tuple(part.chunk(count, 1)[n] for n, part in enumerate(rows))
        alpha["alpha"] = alpha["alpha"] / count
        made: list[Parts] = [{"down": a, "up": b.contiguous(), **alpha} for a, b in zip(downs, rows, strict=True)]
        filled = [bool(part["down"].any() or part["up"].any()) for part in made]
        return [part if full or not any(filled) else None for part, full in zip(made, filled, strict=True)]
    return [{"down": down, "up": part, **alpha} for part in rows]


def _is_block_diagonal(rows: Sequence[Tensor], count: int) -> bool:
    """Whether the n-th rows have something in the n-th columns alone."""
    if rows[0].shape[1] % count:
        return False
    blocks = [part.chunk(count, 1) for part in rows]
    return not any(block.any() for n, row in enumerate(blocks) for m, block in enumerate(row) if n != m)


def by_original_name(
    modules: Sequence[str], aliases: Mapping[str, str | tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """{what the original code calls a layer: the modules it stands for}, of layers with an update; others keep their names."""
    wanted, named = set(modules), {}
    for words, names in aliases.items():
        stands_for = (names,) if isinstance(names, str) else names
        if wanted & set(stands_for):
            named[words] = stands_for
    covered = {name for names in named.values() for name in names}
    return {**named, **{name: (name,) for name in modules if name not in covered}}
