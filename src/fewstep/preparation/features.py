"""Training a small classifier of a labelled data set, whose features then measure quality on that set."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data.images import data_order
from fewstep.devices import DTYPES, choose_device, choose_precision
from fewstep.diffusion.denoiser import computing_in
from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.progress import Report

Augment = Callable[[Tensor, torch.Generator], Tensor]


class LabelledPictures(Protocol):
    """What a classifier is trained on; `data.images.ImageDataset` is one.

    Attributes:
        labels: (N,), int64, or None.
        channels: 1 or 3.
        class_names: in the order of the classes, or None.
    """

    labels: Tensor | None
    channels: int
    class_names: list[str] | None

    def __len__(self) -> int:
        """Number of pictures."""

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures at these rows, (B, C, H, W), uint8."""


def train_feature_network(
    dataset: LabelledPictures, folder: Path, *, num_classes: int, num_passes: int = 6, batch_size: int = 256,
    seed: int = 0, flip: bool = False, device: str = "auto", name: str = "classifier", width: int = 32,
    num_stages: int = 3, augment: Augment | None = None, label_smoothing: float = 0.0, precision: str = "auto",
    report: Report = lambda done, total: None,
) -> SmallClassifier:  # fmt: skip
    """Train on labelled pictures with a one-cycle rate and save the network.

    Args:
        dataset: labelled pictures.
        folder: where to save; appears whole or not at all.
        width, num_stages: of the network.
        precision: "fp32", "bf16", or "auto": what is fast on the device.
        augment: changes each batch (B, C, H, W) in [-1, 1], e.g. `vary_shape_and_colour`; small sets need it.
        report: called with (finished steps, all steps) after each.

    Raises:
        UserError: no labels.
    """
    if dataset.labels is None:
        raise UserError("a feature network needs labelled pictures: sort them into one folder a class")
    place = choose_device(device)
    dtype = DTYPES[choose_precision(precision, place)]
    torch.manual_seed(seed)
    names = dataset.class_names or ()
    side = dataset.pixels(torch.arange(1)).shape[-1]
    model = SmallClassifier(dataset.channels, num_classes, width, name, num_stages, names, side).to(place).train()
    steps = max(1, num_passes * len(dataset) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        position = torch.arange(step * batch_size, (step + 1) * batch_size)
        rows = data_order(seed, position, len(dataset))
        images = dataset.pixels(rows).to(place).float() / 127.5 - 1
        if flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored.to(place)[:, None, None, None], images.flip(3), images)
        if augment is not None:
            images = augment(images, generator)
        with computing_in(dtype, place):
            logits = model.logits(images)
            loss = F.cross_entropy(logits, dataset.labels[rows].to(place), label_smoothing=label_smoothing)
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        report(step + 1, steps)
    model.eval().requires_grad_(False).save(folder)
    return model


def vary_shape_and_colour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture turned by up to 15 degrees, scaled by 0.85 to 1.15, moved by up to a tenth, perhaps mirrored, its
    contrast and each colour's strength and brightness changed by up to a fifth; edges are continued outwards.

    Args:
        images: (B, C, H, W) in [-1, 1].
        generator: on the CPU; what is drawn does not depend on the device.

    Returns:
        the same shape, in [-1, 1].
    """
    count, channels = images.shape[:2]

    def draw(*shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape, generator=generator) - 1).to(images.device)

    angle, scale, shift = draw() * math.pi / 12, 1 + 0.15 * draw(), 0.2 * draw(2)  # the width is 2 in these units
    mirror = draw().sign()
    rows = [[angle.cos() * mirror, -angle.sin(), shift[:, 0]], [angle.sin() * mirror, angle.cos(), shift[:, 1]]]
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    matrix[:, :, :2] *= scale[:, None, None]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    strength, brightness = 1 + 0.2 * draw(channels, 1, 1), 0.2 * draw(channels, 1, 1)
    return (moved * strength + brightness).clamp(-1, 1)


@torch.no_grad()
def accuracy(model: SmallClassifier, dataset: LabelledPictures, batch_size: int = 500) -> float:
    """Share of pictures the classifier labels right, 0..1."""
    assert dataset.labels is not None
    device, right = next(model.parameters()).device, 0
    for rows in torch.arange(len(dataset)).split(batch_size):
        images = dataset.pixels(rows).to(device).float() / 127.5 - 1
        right += int((model.logits(images).argmax(1).cpu() == dataset.labels[rows]).sum())
    return right / len(dataset)
