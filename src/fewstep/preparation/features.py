"""Training a small classifier of a labelled data set, whose features then measure quality on that set."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fewstep.data.images import ImageDataset, data_order
from fewstep.devices import choose_device
from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier


def train_feature_network(
    dataset: ImageDataset, folder: Path, *, num_classes: int, num_passes: int = 6, batch_size: int = 256,
    seed: int = 0, flip: bool = False, device: str = "auto", name: str = "classifier",
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> SmallClassifier:  # fmt: skip
    """Train on labelled pictures with a one-cycle rate and save the network.

    Args:
        dataset: labelled pictures.
        folder: where to save; appears whole or not at all.
        report: called with (step, steps, loss) every 50 steps.

    Raises:
        UserError: no labels.
    """
    if dataset.labels is None:
        raise UserError("a feature network needs labelled pictures: sort them into one folder a class")
    place = choose_device(device)
    torch.manual_seed(seed)
    model = SmallClassifier(dataset.channels, num_classes, name=name).to(place).train()
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
        with torch.autocast(place.type, torch.bfloat16):
            loss = F.cross_entropy(model.logits(images), dataset.labels[rows].to(place))
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            report(step + 1, steps, loss.item())
    model.eval().requires_grad_(False).save(folder)
    return model


@torch.no_grad()
def accuracy(model: SmallClassifier, dataset: ImageDataset, batch_size: int = 500) -> float:
    """Share of pictures the classifier labels right, 0..1."""
    assert dataset.labels is not None
    device, right = next(model.parameters()).device, 0
    for rows in torch.arange(len(dataset)).split(batch_size):
        images = dataset.pixels(rows).to(device).float() / 127.5 - 1
        right += int((model.logits(images).argmax(1).cpu() == dataset.labels[rows]).sum())
    return right / len(dataset)
