"""Feature networks that quality is measured in: Inception from a local file, or a small classifier of the data set."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError, first_line
from fewstep.formats.atomic import written_aside
from fewstep.formats.bundled import BUNDLED, bundled_path
from fewstep.formats.json_files import read_json_object
from fewstep.formats.pixels import as_eight_bits
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.networks.inception import load_inception


class FeatureNetwork(Protocol):
    """Images to features, with the name that stands beside every figure."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, F), float32."""


class SmallClassifier(nn.Module):
    """A convolutional classifier of a data set whose last pooled layer serves as features.

    Args:
        channels: of the pictures, 1 or 3.
        num_classes: of the data set.
        width: channels of the first stage; each further one has twice as many, and so many features the last.
        name: what reports call these features.
        num_stages: 3 suits 32x32 pictures, 4 suits 64x64.
        class_names: in the order of the classes, where they have names.
        resolution: side of the pictures it was trained on, the only ones it looks at; 0 where an earlier version did not note it.
    """

    def __init__(
        self, channels: int, num_classes: int, width: int = 32, name: str = "classifier", num_stages: int = 3,
        class_names: Sequence[str] = (), resolution: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.class_names = name, tuple(class_names)
        self.channels, self.resolution = channels, resolution
        self.arguments = {
            "channels": channels, "num_classes": num_classes, "width": width, "name": name, "num_stages": num_stages,
            "class_names": list(class_names), "resolution": resolution,
        }  # fmt: skip

        def stage(cin: int, cout: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]

        layers, widths = [], [channels, *(width * 2**number for number in range(num_stages))]
        for cin, cout in itertools.pairwise(widths):
            layers += [*stage(cin, cout), *stage(cout, cout), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> features (B, width of the last stage).

        Raises:
            UserError: pictures of another size or other channels, whose features would say nothing.
        """
        channels, height, width = images.shape[1:]
        if channels != self.channels or (self.resolution and {height, width} != {self.resolution}):
            side = f"{self.resolution}x{self.resolution}x" if self.resolution else "pictures of channels "
            raise UserError(
                f"features {self.name} were trained on {side}{self.channels} and these pictures are {height}x{width}x{channels}: train a "
                f"feature network of this size with `fewstep prepare features --resolution {height} --channels {channels}`"
            )
        return self.body(images)

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> class logits (B, num_classes)."""
        return self.head(self(images))

    def save(self, folder: Path) -> None:
        """Write config.json and float16 weights; the folder appears whole or not at all."""
        with written_aside(folder) as aside:
            weights = {
                name: value.half() if value.is_floating_point() else value for name, value in self.state_dict().items()
            }
            write_tensor_file(aside / "model.safetensors", weights)
            (aside / "config.json").write_text(json.dumps(self.arguments, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "SmallClassifier":
        """Inverse of `save`, in eval mode; raises UserError when the folder holds something else."""
        try:
            model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
            weights = load_file(folder / "model.safetensors")
            model.load_state_dict({n: v.float() if v.is_floating_point() else v for n, v in weights.items()})
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no feature network ({first_line(error)}); train one with `fewstep prepare features`"
            ) from None
        return model.eval().requires_grad_(False)


def load_features(source: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A feature network from "bundled:NAME", a folder of `fewstep prepare features` or of a DINOv2, or an Inception file.

    Raises:
        UserError: nothing there or another kind of file.
    """
    if source.startswith(BUNDLED):
        return SmallClassifier.load(bundled_path(source.removeprefix(BUNDLED)) / "features").to(device)
    path = Path(source).expanduser()
    if path.is_dir() and _has_model_type(path):
        from fewstep.networks.dinov2 import load_dinov2  # imports transformers: only where it is asked for

        return load_dinov2(path).to(device)
    if path.is_dir():
        return SmallClassifier.load(path).to(device)
    return load_inception(path).to(device)


def extract_features(network: FeatureNetwork, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Features (N, F), float32 on the CPU, of batches of images (B, C, H, W) in [-1, 1].

    Images are rounded to 8 bit first, as files on disk would be.
    """
    return torch.cat([features_of(network, images, device) for images in batches])


def _has_model_type(folder: Path) -> bool:
    """Whether a folder's config.json is one of transformers, of whatever kind; a damaged one is none."""
    path = folder / "config.json"
    try:
        return path.is_file() and "model_type" in read_json_object(path)
    except UserError:
        return False


@torch.no_grad()
def features_of(network: FeatureNetwork, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """`extract_features` of one batch."""
    return network(as_eight_bits(images.to(device))).float().cpu()
