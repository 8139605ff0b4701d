"""What a run is not told follows from what it is given: the network of `pretrain` from the pictures, how a student reads
pictures from its teacher. Once, before anything is built."""

from collections.abc import Callable
from pathlib import Path

from fewstep.data.look import Look, look_at_pictures
from fewstep.errors import UserError
from fewstep.families.registry import LARGEST, largest_side
from fewstep.models.model import Model
from fewstep.settings import NetworkSettings, PretrainSettings, TrainDataSettings, TrainSettings, parse_settings
from fewstep.training.run_folder import stored_settings


def settle_network(settings: PretrainSettings, folder: Path, tell: Callable[[str], None]) -> PretrainSettings:
    """The settings with a size, channels and classes.

    A run that goes on keeps those it began with.

    Args:
        folder: the run folder, which may not be there yet.
        tell: gets one line on what was chosen and why.

    Raises:
        UserError: no pictures, or none that a network of this name could make.
    """
    net = settings.network
    open_keys = [name for name, unset in UNSET.items() if getattr(net, name) == unset]
    if not open_keys:
        return settings
    stored = stored_settings(folder, "network")
    found = {key: stored[key] for key in open_keys if isinstance(stored.get(key), int)}
    if found.keys() != set(open_keys):
        look = look_at_pictures(settings.data)
        channels = net.img_channels or look.channels
        classes = look.num_classes if net.label_dim == UNSET["label_dim"] else net.label_dim
        found = {
            "img_channels": channels, "label_dim": classes,
            "img_resolution": net.img_resolution or _largest_size(net, look, channels, classes),
        }  # fmt: skip
        by = f" by {look.labelled_by}" * bool(look.labelled_by and "label_dim" in open_keys)
        told = ", ".join(f"network.{key}={found[key]}" for key in open_keys)
        smaller = _of_smaller_pictures(found["img_resolution"], look.shortest_side) * (not net.img_resolution)
        why = f"; no classes, because {look.unlabelled}" * bool(look.unlabelled and "label_dim" in open_keys)
        tell(f"{settings.data.images}: {told}, from the pictures{by}{smaller}{why}")
    network = net.model_copy(update={key: found[key] for key in open_keys})
    return settings.model_copy(update={"network": network})


def suppose_network(settings: PretrainSettings, tell: Callable[[str], None]) -> PretrainSettings:
    """`settle_network` for a rehearsal, which needs no pictures: without them colour pictures of 32 pixels are supposed."""
    if settings.data.images:
        return settle_network(settings, Path(settings.run.folder).expanduser(), tell)
    net, supposed = settings.network, {"img_resolution": 32, "img_channels": 3, "label_dim": 0}
    update = {key: value for key, value in supposed.items() if getattr(net, key) == UNSET[key]}
    if update:
        told = ", ".join(f"network.{key}={value}" for key, value in update.items())
        tell(f"{told} supposed: pictures would say (data.images)")
    return settings.model_copy(update={"network": net.model_copy(update=update)})


UNSET = {"img_resolution": 0, "img_channels": 0, "label_dim": -1}


def _largest_size(net: NetworkSettings, look: Look, channels: int, classes: int) -> int:
    """The side that pictures of nobody's choice get."""
    try:
        side = largest_side(net.name, look.shortest_side, channels, classes, net.sigma_data)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not side:
        raise UserError(
            f"network.img_resolution is not set and the smallest picture has {look.shortest_side} pixels: set it, or leave out "
            "such pictures"
        )
    return side


def _of_smaller_pictures(side: int, shortest_side: int) -> str:
    """What to do where pictures are made smaller only because the network cannot have their size."""
    if not side < shortest_side < LARGEST:
        return ""
    return (
        f"; pictures of {shortest_side} pixels are made smaller for it, network.img_resolution={LARGEST} with data.fit=pad keeps them as "
        "they are"
    )


def settle_data(settings: TrainSettings, teacher: Model, folder: Path, tell: Callable[[str], None]) -> TrainSettings:
    """The settings with pictures read as the teacher's were, where nothing else is set.

    A run that goes on reads them as it began.

    Args:
        folder: the run folder, which may not be there yet.
        tell: gets one line on what was taken over.
    """
    data = settings.data
    if not data.images or teacher.conditioner.takes == "prompts":
        return settings
    made_with = teacher.card.made_with.get("settings")
    before = stored_settings(folder, "data") or (made_with.get("data") if isinstance(made_with, dict) else None) or {}
    found = {
        key: before[key] for key in AS_TEACHER
        if key not in data.model_fields_set and key in before and before[key] != getattr(data, key)
    }  # fmt: skip
    if not found:
        return settings
    update = parse_settings(TrainDataSettings, {**data.model_dump(mode="json"), **found}, "the teacher's card")
    tell(", ".join(f"data.{key}={value!r}" for key, value in found.items()) + ": as the teacher's pictures were read")
    return settings.model_copy(update={"data": update})


AS_TEACHER = ("fit", "background", "column", "flip")
