"""Published ways of measuring by name: what each pins, and what makes a figure only a proxy of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.coco import CaptionedPictures
from fewstep.evaluation.features import FeatureNetwork
from fewstep.evaluation.measure import Look, Rows, distance_of, joined_rows, values_of
from fewstep.evaluation.measurement import DISTANCE, Measurement, Value
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.evaluation.prompt_scores import TextScores
from fewstep.progress import Report
from fewstep.shared_work import shared_out

# the files carry the start of their hash in their name
INCEPTION, INCEPTION_SHA256 = "inception-2015-12-05", "6726825d"
INCEPTION_SIDE = 299
_BATCH = 32  # pictures that Inception sees at once
COCO_PREFIX = "A photo depicts "

Views = Mapping[str, Callable[[np.ndarray], np.ndarray]]  # value's name -> (H, W, 3) uint8 to what Inception sees


@dataclass(frozen=True)
class Protocol:
    """One published way of measuring.

    Attributes:
        resolution: height and width that the model makes.
        num_images, seed: generated pictures; classes or captions take turns.
        num_reference_images: real pictures behind the reference; published .npz do not say how many, which is 0 in a figure.
        side: COCO alone: pixels that pictures are reduced to before Inception's 299; 0 leaves pictures as they are.
        has_patches: whether centre crops of 299 pixels are compared, too.
        clip_prefix: stands before the captions that a CLIP reads.
    """

    name: str
    resolution: int
    num_images: int = 50_000
    seed: int = 0
    num_reference_images: int = 0
    side: int = 0
    has_patches: bool = False
    clip_prefix: str = ""

    def views(self) -> Views:
        """What Inception sees of a picture, by the value that is computed from it."""
        found = {DISTANCE: lambda pixels: cleanly_resized(reduced(pixels, self.side)).astype(np.uint8)}
        if self.has_patches:
            found["patch_distance"] = lambda pixels: central(reduced(pixels, self.side), INCEPTION_SIDE)
        return found

    def labelled(self, figure: Measurement, weights_sha256: str, shape: tuple[int, ...], clip: str = "") -> Measurement:
        """The figure under this protocol's name, with every reason why it is only a proxy of it.

        Args:
            weights_sha256: of the feature network's file; "" where it is none.
            shape: (channels, height, width) of the model's pictures.
            clip: how the CLIP differs from the published one; "" for not at all, or none.
        """
        reasons = []
        if shape[1:] != (self.resolution, self.resolution):
            reasons.append(f"pictures of {shape[1]}x{shape[2]}, not {self.resolution}x{self.resolution}")
        if shape[0] != 3:
            reasons.append("grey pictures, not colour")
        if figure.num_images != self.num_images:
            reasons.append(f"{figure.num_images:,} images, not {self.num_images:,}")
        if figure.seed != self.seed:
            reasons.append(f"seed {figure.seed}, not {self.seed}")
        if figure.features != INCEPTION:
            reasons.append(f"features {figure.features}, not {INCEPTION}")
        elif not weights_sha256.startswith(INCEPTION_SHA256):
            reasons.append(f"Inception weights of sha256 {weights_sha256[:8]}, not {INCEPTION_SHA256}")
        if figure.num_reference_images not in (0, self.num_reference_images):
            reasons.append(f"{figure.num_reference_images:,} real images, not {self.num_reference_images:,}")
        if clip:
            reasons.append(clip)
        return replace(figure, protocol=self.name, proxy="; ".join(reasons))


PROTOCOLS = {
    one.name: one for one in (
        Protocol("imagenet64-edm", 64, num_reference_images=1_281_167), Protocol("cifar10-50k", 32, num_reference_images=50_000),
        Protocol("coco30k-256", 512, 30_000, num_reference_images=40_504, side=256, clip_prefix=COCO_PREFIX),
        Protocol("coco10k-512", 1024, 10_000, num_reference_images=40_504, side=512, has_patches=True, clip_prefix=COCO_PREFIX),
    )
}  # fmt: skip


def protocol_named(name: str) -> Protocol | None:
    """A protocol; None for "custom", which pins nothing.

    Raises:
        UserError: no protocol has this name.
    """
    if name != "custom" and name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: choose from {', '.join(PROTOCOLS)}, custom")
    return PROTOCOLS.get(name)


def truncated(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, fractions cut off as the published evaluation does."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def reduced(pixels: np.ndarray, side: int) -> np.ndarray:
    """The largest central square, brought to `side` pixels with PIL's Lanczos filter; (H, W, 3) uint8 in and out."""
    square = central(pixels, min(pixels.shape[:2]))
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.LANCZOS))


def central(pixels: np.ndarray, side: int) -> np.ndarray:
    """The central square of (H, W, 3); an odd pixel left over stays at the bottom and right."""
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def cleanly_resized(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to Inception's 299 pixels, each channel by PIL's bicubic filter; float32 in 0..255, not rounded.

    Source: Parmar et al. 2022, arXiv:2104.11222; equals the mode "clean" of clean-fid to the last bit.
    """
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    channels = [
        Image.fromarray(pixels[..., number].astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        for number in range(3)
    ]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=2)


def coco_features(
    protocol: Protocol, real: CaptionedPictures, network: FeatureNetwork, device: torch.device | str = "cpu",
    report: Report = lambda done, total: None, processes: int = 1,
) -> Rows:  # fmt: skip
    """Features (N, F) of real pictures, float32 on the CPU, by the value that is computed from them.

    Args:
        processes: that share them out, as `shared_out` has it; others than the first get none.
    """

    def work(number: int) -> Rows:
        rows = range(number * _BATCH, min((number + 1) * _BATCH, len(real)))
        return _seen([real.pixels(row) for row in rows], network, protocol.views(), device)

    found = shared_out(work, -(-len(real) // _BATCH), processes, lambda number: report(number * _BATCH, len(real)))
    report(len(real), len(real))
    return joined_rows(found)


def coco_look(
    protocol: Protocol, network: FeatureNetwork, scores: TextScores | None = None, device: torch.device | str = "cpu"
) -> Look:
    """Keeps the features (B, F) of every view of made pictures, and the scores (B,) of them as they are, not reduced."""

    def of(first: int, images: Tensor) -> Rows:
        pictures = list(truncated(images))
        found = {} if scores is None else scores.of(first, [Image.fromarray(one) for one in pictures])
        parts = (pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH))
        return joined_rows(_seen(part, network, protocol.views(), device) for part in parts) | found

    return of


def coco_figure(
    protocol: Protocol, name: str, rows: Rows, real: Rows, network: FeatureNetwork, images_per_second: Value, *,
    evaluations_per_image: int, seed: int, scores: TextScores | None = None,
) -> Measurement:  # fmt: skip
    """Distances of made pictures to real ones under a COCO protocol, from what `coco_look` and `coco_features` kept."""
    values = {key: distance_of(rows[key], FeatureStatistics.of(real[key]), 20) for key in protocol.views()}
    values |= values_of(rows, scores)
    values["images_per_second"] = images_per_second
    num_images, width = rows[DISTANCE].shape
    return Measurement(name, values, num_images, network.name, width, len(real[DISTANCE]), evaluations_per_image, seed)


@torch.no_grad()
def _seen(pictures: list[np.ndarray], network: FeatureNetwork, views: Views, device: torch.device | str) -> Rows:
    """Features (N, F), float32 on the CPU, of every view of pictures (H, W, 3) uint8 that the network sees at once."""
    found = {}
    for key, view in views.items():
        levels = torch.from_numpy(np.stack([view(pixels) for pixels in pictures])).permute(0, 3, 1, 2).to(device)
        found[key] = network(levels.float() / 127.5 - 1).float().cpu()
    return found
