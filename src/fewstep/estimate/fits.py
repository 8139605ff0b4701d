"""Which micro-batch fits a card: memory grows with the samples at once, so two rehearsals bound every number of them."""

from collections.abc import Callable

CARDS_GIB = (24, 40, 80)
FREE_SHARE = 0.1  # for kernels' workspaces, the allocator's rounding and the CUDA context, which no rehearsal sees
_GIB = 2**30


def largest_microbatch(limit: float, one: int, whole: int, gradients: int, batch_size: int) -> int:
    """The most samples at once whose peak stays below `limit` bytes; 0 where not even one does.

    A peak is the largest of many moments, each of which grows linearly with the samples at once. So no peak lies above
    the line from one sample to all of them, the gradients of earlier micro-batches included; and what this answers fits.

    Args:
        one: peak with micro-batches of one sample, in bytes.
        whole: peak with all samples in one.
        gradients: bytes of the trained weights' gradients, which wait from one micro-batch to the next.
        batch_size: samples of a step.
    """
    if whole <= limit:
        return batch_size
    if one > limit:
        return 0
    slope = (whole + gradients - one) / (batch_size - 1)
    return min(batch_size - 1, 1 + int((limit - one) / slope)) if slope > 0 else batch_size - 1


def describe_fits(peak: Callable[[int], int], gradients: int, batch_size: int) -> str:
    """A line that names, for each usual card, how many samples at once fit it.

    Args:
        peak: rehearses a step of so many samples at once and gives its peak in bytes.
        gradients: as `largest_microbatch` takes them.
    """
    whole = peak(batch_size)
    one = whole if batch_size == 1 else peak(1)
    parts = []
    for card in CARDS_GIB:
        fitting = largest_microbatch(card * (1 - FREE_SHARE) * _GIB, one, whole, gradients, batch_size)
        many = {0: "none", batch_size: f"{batch_size} (the whole batch)"}.get(fitting, str(fitting))
        parts.append(f"{many} in {card} GiB")
    return f"training.microbatch_size that fits: {', '.join(parts)} (a tenth of the card left free)"
