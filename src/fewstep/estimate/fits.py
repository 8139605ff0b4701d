"""Which batch fits a card: memory grows with the samples at once, so two rehearsals tell it for every number of them."""

from collections.abc import Callable

CARDS_GIB = (24, 40, 80)
FREE_SHARE = 0.1  # for kernels' workspaces, the allocator's rounding and the CUDA context, which no rehearsal sees
_GIB = 2**30


def largest_batch(limit: float, one: int, whole: int, batch_size: int) -> int:
    """The most samples at once whose peak stays below `limit` bytes; 0 where not even one does.

    A peak is the largest of many moments, each of which grows linearly with the batch. So the line from one sample to
    the whole batch lies nowhere below it, and what this answers fits.

    Args:
        one: peak with one sample, in bytes.
        whole: peak with `batch_size` samples.
    """
    if whole <= limit:
        return batch_size
    if one > limit:
        return 0
    return 1 + int((limit - one) * (batch_size - 1) / (whole - one))


def describe_fits(peak: Callable[[int], int], batch_size: int, setting: str) -> str:
    """A line that names, for each usual card, how many samples at once fit it.

    Args:
        peak: rehearses a step of so many samples and gives its peak in bytes.
        setting: what limits the samples at once.
    """
    whole = peak(batch_size)
    one = whole if batch_size == 1 else peak(1)
    parts = []
    for card in CARDS_GIB:
        fitting = largest_batch(card * (1 - FREE_SHARE) * _GIB, one, whole, batch_size)
        many = {0: "none", batch_size: f"{batch_size} (the whole batch)"}.get(fitting, str(fitting))
        parts.append(f"{many} in {card} GiB")
    return f"{setting} that fits: {', '.join(parts)} (a tenth of the card left free)"
