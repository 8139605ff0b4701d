"""The CLIP score: how near a picture lies to its text in the space of a CLIP."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from fewstep.networks.clip import Clip

_GIANT = (40, 1408, 14)  # layers, width and patches of ViT-g/14


class ClipScore:
    """The cosine between a picture's and its text's vectors, -1..1.

    Source: Hessel et al. 2021 (arXiv:2104.08718). Differs: not multiplied (by 2.5 there, by 100 in torchmetrics) and not
    cut off at 0, as text-to-image papers print it.

    Args:
        source: what the user called the CLIP.
        prefix: stands before every prompt.
    """

    name = "clip_score"

    def __init__(self, clip: Clip, source: str, prefix: str = "") -> None:
        self.clip, self.prefix = clip, prefix
        self.by = source + (f', prefix "{prefix}"' if prefix else "")

    def __call__(self, pictures: list[Image.Image], prompts: Sequence[str]) -> Tensor:
        """B pictures and their prompts -> (B,), float32 on the CPU."""
        texts = [self.prefix + prompt for prompt in prompts]
        return (self.clip.of_pictures(pictures) * self.clip.of_texts(texts)).sum(dim=1).cpu()

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Of prompts that are too long for this CLIP."""
        limit = self.clip.max_tokens
        cut = [prompt for prompt in prompts if self.clip.num_tokens(self.prefix + prompt) > limit]
        if not cut:
            return []
        return [f"warning: --clip reads {limit} tokens; the end of {len(cut)} prompts does not count ({cut[0][:60]!r})"]

    def difference(self, prefix: str) -> str:
        """What makes this score another one than the published score in ViT-g/14 with a prefix; "" for nothing that is known."""
        if self.clip.shape != _GIANT:
            layers, width, patch = self.clip.shape
            return f"CLIP of {layers} layers of {width} and patches of {patch}, not ViT-g/14"
        return "" if self.prefix == prefix else f"CLIP prefix {self.prefix!r}, not {prefix!r}"
