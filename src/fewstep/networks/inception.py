"""The Inception network that FID, KID and precision/recall are measured with, read from its published files.

It is the TensorFlow graph of 2015-12-05 that Heusel et al. 2017 (arXiv:1706.08500) compute FID with, not
torchvision's Inception v3: weights, pooling and input scaling differ, and so do the numbers.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.perceptual import as_rgb, read_published_weights

_DOWNLOAD = (
    "pt_inception-2015-12-05-6726825d.pth (https://github.com/mseitzer/pytorch-fid, release fid_weights) "
    "or weights-inception-2015-12-05-6726825d.pth (https://github.com/toshas/torch-fidelity, release v0.2.0)"
)


class _Conv(NamedTuple):
    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1


_Pair = tuple[int, int]
_Pool = nn.AvgPool2d | nn.MaxPool2d
# A path is walked left to right; a list is a fork, whose outputs are concatenated.
_Path = tuple[_Conv | list[_Conv] | _Pool, ...]

# As in TensorFlow, an average does not count the padding.
_AVERAGE_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
_MAX_POOL = nn.MaxPool2d(3, stride=1, padding=1)
_DOWNSAMPLE = nn.MaxPool2d(3, stride=2)


def _chain(name: str, *rows: tuple[int, ...]) -> _Path:
    """Convolutions name_1, name_2, ... (just name if alone) from rows (channels, height, width, stride)."""
    return tuple(_Conv(f"{name}_{i}" if len(rows) > 1 else name, *row) for i, row in enumerate(rows, 1))


def _fork(name: str, channels: int) -> list[_Conv]:
    return [_Conv(f"{name}a", channels, 1, 3), _Conv(f"{name}b", channels, 3, 1)]


_PATHS_35_TO_17: tuple[_Path, ...] = (  # Mixed_6a
    _chain("branch3x3", (384, 3, 3, 2)),
    _chain("branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3, 2)),
    (_DOWNSAMPLE,),
)
_PATHS_17_TO_8: tuple[_Path, ...] = (  # Mixed_7a
    _chain("branch3x3", (192,), (320, 3, 3, 2)),
    _chain("branch7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
    (_DOWNSAMPLE,),
)


def _paths_35(pool_channels: int) -> tuple[_Path, ...]:
    """Mixed_5b, 5c, 5d, on 35 x 35 positions."""
    return (
        _chain("branch1x1", (64,)),
        _chain("branch5x5", (48,), (64, 5, 5)),
        _chain("branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
        (_AVERAGE_POOL, _Conv("branch_pool", pool_channels)),
    )


def _paths_17(inner: int) -> tuple[_Path, ...]:
    """Mixed_6b to 6e, on 17 x 17 positions; `inner` channels between the factorised 7 x 7 convolutions."""
    return (
        _chain("branch1x1", (192,)),
        _chain("branch7x7", (inner,), (inner, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (inner,), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
        (_AVERAGE_POOL, _Conv("branch_pool", 192)),
    )


def _paths_8(pool: _Pool) -> tuple[_Path, ...]:
    """Mixed_7b and 7c, on 8 x 8 positions."""
    return (
        _chain("branch1x1", (320,)),
        (_Conv("branch3x3_1", 384), _fork("branch3x3_2", 384)),
        (*_chain("branch3x3dbl", (448,), (384, 3, 3)), _fork("branch3x3dbl_3", 384)),
        (pool, _Conv("branch_pool", 192)),
    )


class _ConvNormReLU(nn.Module):
    """Convolution, batch normalisation, ReLU, under the published key names."""

    def __init__(
        self, channels_in: int, channels: int, kernel: _Pair, stride: int = 1, padding: _Pair = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """An Inception block: parallel paths over one input (B, C, H, W), their outputs concatenated in order."""

    def __init__(self, channels_in: int, paths: tuple[_Path, ...]) -> None:
        super().__init__()
        self.paths = paths
        for path in paths:
            channels = channels_in
            for step in path:
                if isinstance(step, nn.Module):
                    continue
                convs = step if isinstance(step, list) else [step]
                for name, out, height, width, stride in convs:
                    # In a block, the convolutions that keep the size are the padded ones.
                    padding = (height // 2, width // 2) if stride == 1 else (0, 0)
                    self.add_module(name, _ConvNormReLU(channels, out, (height, width), stride, padding))
                channels = sum(conv.channels for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._walk(path, x) for path in self.paths], 1)

    def _walk(self, path: _Path, x: Tensor) -> Tensor:
        for step in path:
            if isinstance(step, nn.Module):
                x = step(x)
            elif isinstance(step, list):
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], 1)
            else:
                x = self.get_submodule(step.name)(x)
        return x


class InceptionV3Features(nn.Module):
    """FID's Inception v3: images to the 2048 pooled features before the classifier.

    Source: Szegedy et al. 2015, arXiv:1512.00567, as frozen in TensorFlow's inception-2015-12-05 graph;
    parameter names are those of the published PyTorch ports. Differs from torchvision's network as that graph
    does: average pools do not count padding, the pool of Mixed_7c takes the maximum, and `fc` (in the files,
    unused here) has 1008 classes.

    A new instance has random weights; `load_inception` gives it the published ones. Frozen, in eval mode.
    """

    # Read by torchmetrics (feature=...), which otherwise probes the network with uint8 images.
    num_features: int = 2048
    name: str = "inception-2015-12-05"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNormReLU(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _ConvNormReLU(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _ConvNormReLU(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = _ConvNormReLU(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _ConvNormReLU(80, 192, (3, 3))
        self.Mixed_5b = _Mixed(192, _paths_35(pool_channels=32))
        self.Mixed_5c = _Mixed(256, _paths_35(pool_channels=64))
        self.Mixed_5d = _Mixed(288, _paths_35(pool_channels=64))
        self.Mixed_6a = _Mixed(288, _PATHS_35_TO_17)
        self.Mixed_6b = _Mixed(768, _paths_17(inner=128))
        self.Mixed_6c = _Mixed(768, _paths_17(inner=160))
        self.Mixed_6d = _Mixed(768, _paths_17(inner=160))
        self.Mixed_6e = _Mixed(768, _paths_17(inner=192))
        self.Mixed_7a = _Mixed(768, _PATHS_17_TO_8)
        self.Mixed_7b = _Mixed(1280, _paths_8(_AVERAGE_POOL))
        self.Mixed_7c = _Mixed(2048, _paths_8(_MAX_POOL))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch of images.

        The images are brought to 8 bits, `v = round((x + 1) * 127.5)` clamped to 0..255, because published
        FIDs are of stored 8-bit images; resized to 299 x 299 with `resize_bilinear_tf1`; and scaled by
        `(v - 128) / 128`, as torch-fidelity and the Inception of StyleGAN and EDM do. (pytorch-fid scales by
        `v / 127.5 - 1` and resizes with half-pixel centres: its FID differs slightly.) The gradient at the
        images is 0, because of the rounding.

        Args:
            images: floating point in [-1, 1], (B, C, H, W) with C = 3, or C = 1 (grey, repeated to 3).

        Returns:
            (B, 2048) float32, non-negative.

        Raises:
            ValueError: another shape, or an integer dtype.
        """
        levels = as_rgb(images).to(self.fc.weight.dtype).add(1).mul(127.5).round().clamp(0, 255)
        x = (resize_bilinear_tf1(levels, 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_DOWNSAMPLE(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_DOWNSAMPLE(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled: Tensor = x.mean((2, 3)).float()
        return pooled


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize to a square as TensorFlow 1 did by default: no half-pixel centres, no antialiasing.

    Output position i reads input position i * length / size, so the last rows repeat the border. Source:
    `tf.image.resize_bilinear(align_corners=False)`, which the FID graph, torch-fidelity and the Inception of
    StyleGAN and EDM follow. Differs from pytorch-fid, which uses
    `F.interpolate(mode="bilinear", align_corners=False)` (half-pixel centres).

    Args:
        images: floating point, (B, C, H, W), any range.
        size: output height and width in pixels, at least 1.

    Returns:
        (B, C, size, size), dtype and range of the input.

    Raises:
        ValueError: not four-dimensional, not floating point, or `size` below 1.
    """
    if images.ndim != 4 or not images.is_floating_point() or size < 1:
        raise ValueError(
            "resize_bilinear_tf1 takes floating-point (B, C, H, W) and a size of at least 1, "
            f"got {images.dtype} of shape {tuple(images.shape)} and size {size}"
        )
    for dim in (3, 2):
        length = images.shape[dim]
        # In integers, the neighbours and their weights are exact.
        source = torch.arange(size, device=images.device) * length
        lower = source // size
        upper = (lower + 1).clamp(max=length - 1)
        weight = ((source % size).to(images.dtype) / size).view(size, *(1,) * (3 - dim))
        below = images.index_select(dim, lower)
        images = below + (images.index_select(dim, upper) - below) * weight
    return images


def inception_state_dict_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of the published state dicts that the network needs, with its shape; builds no weights.

    `num_batches_tracked` is left out: the files may have it or not, and inference does not use it.
    """
    with torch.device("meta"):
        entries = InceptionV3Features().state_dict()
    return {k: tuple(v.shape) for k, v in entries.items() if not k.endswith("num_batches_tracked")}


def load_inception(path: str | Path) -> InceptionV3Features:
    """Read FID's Inception from a local file, without unpickling code.

    Args:
        path: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, torch-fidelity's (and torchmetrics')
            `weights-inception-2015-12-05-6726825d.pth`, or the same tensors as `.safetensors`.
            `AuxLogits.*` and `num_batches_tracked` entries are ignored.

    Returns:
        The network on the CPU, float32, frozen, in eval mode.

    Raises:
        ValueError: the file is missing (the message says what to download), unreadable, or another model's.
    """
    weights = read_published_weights(
        path,
        inception_state_dict_shapes(),
        model="FID's Inception",
        download=_DOWNLOAD,
        ignored=("AuxLogits.", "num_batches_tracked"),
    )
    # Built without weights: no time and no random numbers go into values that the file replaces.
    with torch.device("meta"):
        model = InceptionV3Features()
    model.load_state_dict(weights, assign=True)
    return model
