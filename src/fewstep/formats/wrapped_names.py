"""Names of tensors without what training loops, compilers and savers put around a network."""

import re
from collections.abc import Iterable

_AT_THE_START = ("module.", "state_dict.")  # of data-parallel modules; of a training framework's file, flattened
# of compiled, sharded and recomputed parts, which stand in the middle of names too
_ANYWHERE = re.compile(r"(^|(?<=[._]))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")
# what other networks than the one that makes pictures are called
_OTHER_ROLE = re.compile(r"fake|real|teacher|critic|guidance|discriminator|reference", re.IGNORECASE)


def bare_name(name: str, prefixes: tuple[str, ...] = ()) -> str:
    """A tensor's name without wrappers, and without any of these prefixes, in whichever order they stand."""
    name, before = _ANYWHERE.sub("", name), ""
    while name != before:
        before = name
        for prefix in (*_AT_THE_START, *prefixes):
            name = name.removeprefix(prefix)
    return name


def networks_in(names: Iterable[str], first: str) -> list[str]:
    """What stands before each tensor called `first`, one for each network of a file; empty text where nothing does."""
    return sorted({name.removesuffix(first) for name in names if name.endswith(f".{first}") or name == first})


def prefix_of_one_network(names: Iterable[str], first: str) -> str:
    """What every name begins with where a file holds one network and nothing else, under a name such as `unet.`; else empty.

    A network by whose name it is another than the one that makes pictures (`fake_unet.`) keeps it.

    Args:
        first: a tensor that every such network has.
    """
    known = list(names)
    found = networks_in(known, first)
    if len(found) != 1 or _OTHER_ROLE.search(found[0]):
        return ""
    return found[0] if all(name.startswith(found[0]) for name in known) else ""
