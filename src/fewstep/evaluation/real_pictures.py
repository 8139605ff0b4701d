"""The real side of an evaluation: features of pictures, from the cache or made now."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.data.images import load_images
from fewstep.evaluation.coco import CaptionedPictures
from fewstep.evaluation.feature_cache import (
    content_digest,
    feature_key,
    keep_features,
    kept_features,
    sizes_digest,
)
from fewstep.evaluation.features import FeatureNetwork
from fewstep.evaluation.measure import Rows, dataset_features
from fewstep.evaluation.protocols import Protocol, coco_features
from fewstep.formats.remote import data_path
from fewstep.parallel import agreed, world_size
from fewstep.progress import Report, say, working
from fewstep.settings import DataSettings
from fewstep.shared_work import by_the_first, refuse_differences


def features_of_images(
    settings: DataSettings, picture_shape: tuple[int, ...], network: FeatureNetwork, device: torch.device,
    console: Console, cache: bool = True,
) -> Tensor:  # fmt: skip
    """Features (N, F), float32, of a data set's pictures, fitted to a model's (channels, height, width).

    All processes make them together, each some batches; on others than the first there are none.

    Raises:
        UserError: pictures that are not there, or do not decode or fit, or differ between processes.
    """
    channels, resolution, _ = picture_shape
    path = data_path(settings.images)
    facts = {"split": settings.split, "fit": settings.fit, "background": settings.background, "shape": [*picture_shape]}

    def make() -> Rows:
        dataset = load_images(settings, resolution=resolution, channels=channels, num_classes=0)
        refuse_differences(f"{len(dataset)} {sizes_digest(path)}", "pictures")
        with working(console, f"Features of {len(dataset):,} real pictures") as report:
            return {
                "features": dataset_features(network, dataset, device=device, report=report, processes=world_size())
            }

    # a set on the hub has no files here to tell it by
    content = (lambda report: content_digest(path, report=report)) if cache and path.exists() else None
    return _cached(make, content, network, facts, device, console).get("features", torch.empty(0, 0))


def features_of_coco(
    protocol: Protocol, pictures: CaptionedPictures, network: FeatureNetwork, device: torch.device, console: Console,
    cache: bool = True,
) -> Rows:  # fmt: skip
    """Features (N, F) of COCO's pictures by the value that a protocol computes from them.

    All processes make them together, each some batches; on others than the first there are none.

    Raises:
        UserError: some pictures cannot be read; the message counts and names them.
    """
    root, facts = pictures.root, {"side": protocol.side, "values": sorted(protocol.views()), "pixels": "shown"}
    names = [str(path.relative_to(root)) for path in pictures.paths]

    def make() -> Rows:
        refuse_differences(sizes_digest(root, names), "pictures")
        with working(console, f"Checking {len(pictures):,} real pictures") as report:
            by_the_first(partial(pictures.check, report))
        with working(console, f"Features of {len(pictures):,} real pictures") as report:
            return coco_features(protocol, pictures, network, device, report, world_size())

    content = (lambda report: content_digest(root, names, report)) if cache else None
    return _cached(make, content, network, facts, device, console)


def _cached(
    make: Callable[[], Rows], content: Callable[[Report], str] | None, network: FeatureNetwork,
    facts: Mapping[str, Any], device: torch.device, console: Console,
) -> Rows:  # fmt: skip
    """What was kept for this content, or is made and kept now; without content it is made."""

    def tell(line: str) -> None:
        say(console, line)

    def look_for() -> tuple[str, Rows | None]:
        assert content is not None
        with working(console, "Looking for kept features of the real pictures") as report:
            key = feature_key(network, content(report), facts, device)
        return key, kept_features(key, tell)

    key, found = ("", None) if content is None else by_the_first(look_for) or ("", None)
    if agreed(found is None):
        found = make()
        by_the_first(partial(keep_features, key, found, tell))
    return found or {}
