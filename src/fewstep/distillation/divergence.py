"""Other divergences than the reverse KL: weights of distribution matching that the discriminator's ratio decides.

The ratio r of data and generator density at a noised image is the exponential of the discriminator's logit there. Each
sample's distribution-matching gradient is multiplied by h(r), which `losses.divergence_weight` has for each divergence.
"""

import math

import torch
from torch import Tensor, nn

from fewstep.losses import divergence_weight
from fewstep.parallel import mean, world_size

NUM_BINS = 10  # of noise levels, each with a mean ratio of its own
RATE = 0.5  # of a turn's mean ratio in the running one
LARGEST_RATIO = 10.0  # and its inverse the smallest


class DivergenceWeights(nn.Module):
    """h(r) of each sample, with r relative to its running mean at such noise levels and h to its mean over the global batch.

    Source: f-distill (arXiv:2502.15681). Differs: 10 bins of levels and a ratio of at most 10 (or a tenth) are ours.

    The mean over the batch is one over all micro-batches and processes: where there are several micro-batches, all are
    looked at first (`see`, then `settle`), and weighed afterwards. The running means change once a turn, in `finish`, so
    that every sample of a batch is weighed with the same ones.

    Attributes:
        mean_ratio: (NUM_BINS,), running; it belongs into checkpoints.

    Args:
        name: of the divergence, as `losses.divergence_weight` knows it.
        num_levels: of the grid.
    """

    mean_ratio: Tensor

    def __init__(self, name: str, num_levels: int) -> None:
        super().__init__()
        self.name, self.num_levels = name, num_levels
        self.register_buffer("mean_ratio", torch.ones(NUM_BINS))
        self._seen: list[
            Tensor
        ] = []  # of each micro-batch: sums of ratios and numbers in each bin, sum of h and number
        self._settled: Tensor | None = None

    def see(self, logits: Tensor, index: Tensor) -> None:
        """Take these samples into the means of the batch. logits, index (grid indices): (B,)."""
        ratio = _ratio(logits)
        bins = nn.functional.one_hot(self._bins(index), NUM_BINS).to(ratio.dtype)
        weights = self._unscaled(ratio, index)
        total = torch.stack([weights.sum(), torch.ones_like(weights).sum()])
        self._seen.append(torch.cat([ratio @ bins, bins.sum(0), total]))

    def settle(self) -> None:
        """All samples of the batch have been seen, on all processes."""
        total = torch.stack(self._seen).sum(0)
        self._settled = mean(total) if world_size() > 1 else total
        self._seen = []

    def forward(self, logits: Tensor, index: Tensor) -> Tensor:
        """Weights (B,), mean 1 over the batch that was settled; of these samples where none was."""
        if self._settled is None:
            self.see(logits, index)
            self.settle()
        assert self._settled is not None
        weights, count = self._settled[-2:]
        return self._unscaled(_ratio(logits), index) * (count / weights)

    def finish(self) -> None:
        """The turn is over: its ratios enter the running means."""
        if self._settled is None:
            return
        sums, counts = self._settled[:NUM_BINS], self._settled[NUM_BINS : 2 * NUM_BINS]
        found = sums / counts.clamp_min(1e-9)
        found = torch.where(counts > 0, found, self.mean_ratio)
        self.mean_ratio.copy_((1 - RATE) * self.mean_ratio + RATE * found)
        self._settled = None

    def _bins(self, index: Tensor) -> Tensor:
        return index * NUM_BINS // self.num_levels

    def _unscaled(self, ratio: Tensor, index: Tensor) -> Tensor:
        return divergence_weight(ratio / self.mean_ratio[self._bins(index)], self.name)


def _ratio(logits: Tensor) -> Tensor:
    """Densities' ratio, in float32 at least."""
    bound = math.log(LARGEST_RATIO)
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).clamp(-bound, bound).exp()
