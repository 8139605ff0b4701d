"""Whether a run's pictures are copies: the nearest real picture of each, in the features of a network."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fewstep.data.images import ImageDataset, load_images
from fewstep.data.shard_folder import is_shard_folder
from fewstep.devices import choose_device
from fewstep.errors import UserError
from fewstep.evaluation.features import extract_features, load_features
from fewstep.evaluation.measure import evenly
from fewstep.evaluation.neighbours import distances_between
from fewstep.evaluation.real_pictures import features_of_images
from fewstep.evaluation.report.run_files import Run, open_picture, sampled, single_pictures
from fewstep.evaluation.report.sections import PromptCards, Section, Table
from fewstep.formats.remote import data_path
from fewstep.progress import Stderr, busy
from fewstep.settings import DataSettings, parse_settings

SHOWN, SIDE = 12, 96  # pairs on the page, pixels of a picture there
NEAR = 0.2  # share of the usual distance
_PROBES, _BLOCK = 1000, 250


@dataclass(frozen=True)
class Nearest:
    """Of N pictures: the row of the nearest real one, (N,), and how far it is, (N,), as a share of the usual distance."""

    rows: Tensor
    ratios: Tensor


def nearest_real(made: Tensor, real: Tensor) -> Nearest:
    """The real picture nearest to each made one, as a share of what real pictures are apart.

    1 is the median distance of a real picture to the nearest other one (of 1,000 evenly spaced ones); a copy is near 0.

    Args:
        made, real: features, (N, F) and (M, F).

    Raises:
        UserError: half of the real pictures are there twice.
    """
    found = [distances_between(rows, real).min(dim=1) for rows in made.split(_BLOCK)]
    probes = evenly(real, _PROBES)
    others = torch.cat(
        [distances_between(rows, real).topk(2, dim=1, largest=False).values[:, 1] for rows in probes.split(_BLOCK)]
    )
    usual = float(others.median())
    if usual == 0:
        raise UserError(
            "half or more of the real pictures are there twice: their distances say nothing; remove the copies"
        )
    return Nearest(torch.cat([one.indices for one in found]), torch.cat([one.values for one in found]) / usual)


def memorisation_sections(run: Run, features: str, images: str = "", device: str = "auto") -> list[Section]:
    """The run's last sample pictures that are nearest to real ones, with these, and how near all are beside the teacher's.

    Args:
        run: its sample pictures are read, no model.
        features: a feature network, as for `fewstep evaluate`.
        images: real pictures; empty: the run's data.images.

    Raises:
        UserError: a run without sample pictures or without real ones; features or pictures that cannot be read.
    """
    if not run.samples:
        raise UserError(f"{run.folder} has no sample pictures yet; let the run go on, or leave --neighbours out")
    data = {name[5:]: value for name, value in run.settings.items() if name.startswith("data.")}
    data = {name: data[name] for name in DataSettings.model_fields if name in data} | (
        {"images": images} if images else {}
    )
    # runs with prompts read latents
    if not data.get("images") or (not images and is_shard_folder(data_path(data["images"]))):
        raise UserError(f"{run.folder}: its settings name no real pictures (data.images); give --images")
    settings = parse_settings(DataSettings, data, "settings.json of the run")
    step, last = run.samples[-1]
    grids = {f"step {step:,}": last} | ({} if run.teacher_samples is None else {"teacher": run.teacher_samples})
    made = {name: _stacked(run, path) for name, path in grids.items()}
    if all(torch.equal(one[:, :1].expand_as(one), one) for one in made.values()):
        made = {name: one[:, :1] for name, one in made.items()}
    place = choose_device(device)
    with busy(Stderr(), f"Loading {features}"):
        network = load_features(features, place)
    shape = tuple(next(iter(made.values())).shape[1:])
    real = features_of_images(settings, shape, network, place, Stderr())
    found = {
        name: nearest_real(extract_features(network, one.split(_BLOCK), place), real) for name, one in made.items()
    }
    dataset = load_images(settings, resolution=shape[1], channels=shape[0], num_classes=0)
    name = next(iter(made))
    table = Table(
        "How near they are", ["", "pictures", "nearest", "median", f"nearer than {NEAR}"],
        [_row(name, one) for name, one in found.items()],
        [f"Distances in the features of {network.name} to {len(real):,} real pictures of {settings.images}. 1 is the median distance of a "
         "real picture to the nearest other real one; a copy is near 0."],
    )  # fmt: skip
    return [_cards(run.name, made[name], found[name], dataset), table]


def _cards(name: str, made: Tensor, found: Nearest, dataset: ImageDataset) -> PromptCards:
    """The pictures that are nearest to a real one, the nearest first."""
    order = found.ratios.argsort()[:SHOWN]
    real = torch.cat([dataset.pixels(found.rows[order[place : place + 1]]) for place in range(len(order))])
    return PromptCards(
        f"Nearest real pictures of {name}", [f"{float(found.ratios[row]):.2f} of the usual distance" for row in order],
        {"sample": _small(made[order]), "nearest real picture": _small(real.float() / 127.5 - 1)},
    )  # fmt: skip


def _small(images: Tensor) -> Tensor:
    """At most `SIDE` pixels high and wide."""
    return images if images.shape[-1] <= SIDE else functional.interpolate(images, SIDE, mode="bilinear", antialias=True)


def _row(name: str, found: Nearest) -> list[str]:
    ratios = found.ratios
    near = int((ratios < NEAR).sum())
    return [name, str(len(ratios)), f"{float(ratios.min()):.2f}", f"{float(ratios.median()):.2f}", str(near)]


def _stacked(run: Run, path: Path) -> Tensor:
    """The single pictures of a sample grid, (N, 3, H, W) in [-1, 1]."""
    singles = single_pictures(run, open_picture(path))
    if singles[0].width != singles[0].height or len(singles) != sampled(run):
        raise UserError(f"{path} is not a grid of square pictures, as many as run.samples says; leave --neighbours out")
    return torch.stack([_tensor(one) for one in singles])


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
