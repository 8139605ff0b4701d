"""Perceptual distances, because a squared error between pixels does not say how alike two pictures look.

`LPIPS` is the learned distance of Zhang et al. 2018 on VGG16, loaded offline from the files torchvision and
its authors publish; `pixel_distance` is the plain stand-in for when those files are not at hand.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.compare import state_difference
from fewstep.formats.tensor_files import read_tensors

# VGG16's five stages as (convolutions, channels); LPIPS reads the last ReLU of each.
_VGG16_STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# Four poolings halve the image between the stages; below this side the last stage would be empty.
_SMALLEST_SIDE = 16

_VGG16_DOWNLOAD = "vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth)"
_HEADS_DOWNLOAD = "lpips/weights/v0.1/vgg.pth of https://github.com/richzhang/PerceptualSimilarity"


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16, version 0.1, with average pooling in the place of VGG16's max pooling.

    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1. Differs: the average pooling is that of DMD's regression and of
    SDXL's warm-up (with max pooling the gradient is another: a cosine of 0.91 to 0.94 and 0.83 of the norm); images
    smaller than `resize_to` are enlarged, which the published module leaves to its caller (EDM and DMD enlarge
    ImageNet's 64-pixel images to 224).

    A new instance has random weights; `load_lpips` gives it the published ones. The weights are frozen;
    gradients flow to both images, are finite and can be differentiated again. That includes identical images
    (distance and gradient 0) and positions where all features are 0.

    Args:
        resize_to: side in pixels to which the smaller image side is enlarged (bilinear, aspect ratio kept)
            where it is below; larger images are left as they are. None never resizes.

    Raises:
        ValueError: `resize_to` is below 16 pixels, where VGG16's four poolings leave nothing.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, resize_to: int | None = 224) -> None:
        super().__init__()
        if resize_to is not None and resize_to < _SMALLEST_SIDE:
            raise ValueError(f"resize_to={resize_to} must be at least {_SMALLEST_SIDE} pixels, or None")
        self.resize_to = resize_to
        layers: list[nn.Module] = []
        taps: list[int] = []
        channels = 3
        for num_convs, width in _VGG16_STAGES:
            if layers:
                layers.append(nn.AvgPool2d(2))
            for _ in range(num_convs):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.rand(1, width, 1, 1) / width for _, width in _VGG16_STAGES)
        self._taps = frozenset(taps)
        # ImageNet's mean and deviation per channel, carried over to the [-1, 1] range.
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair of images.

        Args:
            a, b: images in [-1, 1], (B, C, H, W) with C = 3, or C = 1 (grey, repeated to 3), same shape.

        Returns:
            (B,) in the dtype of the weights (float32 unless the module was cast), at least 0.

        Raises:
            ValueError: the shapes differ or are not as above, or `resize_to` is None and a side is below 16.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        total = a.new_zeros(a.shape[0], dtype=self.shift.dtype)
        for head, of_a, of_b in zip(self.heads, self._features(a), self._features(b), strict=True):
            # The 1 x 1 head is linear, so it may follow the spatial mean, where it costs nothing.
            total = total + ((of_a - of_b).square().mean((2, 3)) * head.flatten()).sum(1)
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features, (B, channels, H / 2^k, W / 2^k), after the last ReLU of stage k = 0..4."""
        x = (self._resize(as_rgb(images).to(self.shift.dtype)) - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                found.append(_unit_channels(x.to(self.shift.dtype)))
        return found

    def _resize(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        smaller = min(height, width)
        if self.resize_to is not None and smaller < self.resize_to:
            size = [round(side * self.resize_to / smaller) for side in (height, width)]
            return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        if smaller < _SMALLEST_SIDE:
            raise ValueError(f"LPIPS needs at least {_SMALLEST_SIDE} pixels a side, got {height} x {width}")
        return images


def load_lpips(vgg_path: str | Path, heads_path: str | Path, resize_to: int | None = 224) -> LPIPS:
    """Read the published LPIPS from two local files, without unpickling code.

    Args:
        vgg_path: torchvision's ImageNet VGG16, `vgg16-397923af.pth`; its `classifier.*` entries are ignored.
        heads_path: the linear heads, `weights/v0.1/vgg.pth` of the LPIPS repository.
        resize_to: see `LPIPS`.

    Returns:
        LPIPS on the CPU, float32, frozen.

    Raises:
        ValueError: a file is missing (the message says what to download), unreadable, or another model's.
    """
    # Construction draws random weights: a caller's random numbers must not depend on which loss was loaded.
    with torch.random.fork_rng(devices=[]):
        model = LPIPS(resize_to)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    vgg_shapes = {key: shape for key, shape in own.items() if key.startswith("features.")}
    weights = read_published_weights(
        vgg_path, vgg_shapes, model="VGG16", download=_VGG16_DOWNLOAD, ignored=("classifier.",)
    )
    head_names = {f"lin{i}.model.1.weight": f"heads.{i}" for i in range(len(_VGG16_STAGES))}
    head_shapes = {published: own[ours] for published, ours in head_names.items()}
    heads = read_published_weights(heads_path, head_shapes, model="the LPIPS heads for VGG16", download=_HEADS_DOWNLOAD)
    model.load_state_dict(weights | {head_names[key]: value for key, value in heads.items()})
    return model


def pixel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error at three scales: a plain distance that needs no weights. This is not LPIPS.

    The average of the mean squared errors at full, half and quarter size, halved by 2 x 2 means (a last odd
    row or column falls away). A halved scale with a side below 4 pixels is left out; full size always counts.

    Args:
        a, b: (B, C, H, W), same shape, any range and number of channels.

    Returns:
        (B,) in the squared unit of the input, at least float32.

    Raises:
        ValueError: the shapes differ or are not four-dimensional.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"pixel_distance compares (B, C, H, W) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    dtype = torch.promote_types(a.dtype, torch.float32)
    difference = a.to(dtype) - b.to(dtype)
    scales = [difference.square().mean((1, 2, 3))]
    while len(scales) < 3 and min(difference.shape[-2:]) >= 8:
        difference = F.avg_pool2d(difference, 2)
        scales.append(difference.square().mean((1, 2, 3)))
    return torch.stack(scales).mean(0)


def as_rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W), floating point, as (B, 3, H, W): grey is repeated.

    Raises:
        ValueError: another shape, or an integer dtype (those are not in [-1, 1]).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            "expected floating-point images in [-1, 1] of shape (B, 1 or 3, H, W), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    return images.expand(-1, 3, -1, -1)


def read_published_weights(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model: str,
    download: str,
    ignored: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Read a flat state dict from a .safetensors or torch file, and check that it is the expected model's.

    Args:
        path: local file; those that torch saved are read as inert data.
        shapes: every expected key with its tensor's shape.
        model, download: for messages: what the file should hold, and the file to download if it is missing.
        ignored: entries whose key contains one of these are dropped.

    Returns:
        Key -> float32 CPU tensor, exactly the keys of `shapes`.

    Raises:
        UserError: no such file, not a flat state dict, or keys or shapes other than expected.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {model} is read from {download}")
    try:
        kept = read_tensors(path, lambda name: not any(part in name for part in ignored))
    except UserError as error:
        raise UserError(f"{error}; {model} is read from {download}") from error
    if fault := state_difference(kept, shapes):
        raise UserError(f"{path} does not hold {model} ({fault}); it is read from {download}")
    return {key: value.float() for key, value in kept.items()}


def _unit_channels(features: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over channels, as LPIPS has it, with a finite gradient where all channels are 0."""
    square = features.square().sum(1, keepdim=True)
    positive = square > 0
    # d sqrt(0) is infinite, and infinity times the zero gradient around it is NaN: keep sqrt away from 0.
    norm = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    return features / (norm + 1e-10)
