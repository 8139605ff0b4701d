"""Teachers in diffusers' own format: find the folder, say which network it holds and whether it can be guided."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from fewstep.errors import UserError
from fewstep.families.family import Family
from fewstep.formats.diffusers_index import INDEX, read_json, read_model_index, read_scheduler
from fewstep.formats.hub_faults import hub_reason
from fewstep.formats.json_files import read_json_object
from fewstep.formats.source import Source, cached_id

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


def resolve_model_folder(source: str | Path | Source) -> Path:
    """A local or bundled diffusers folder as it is; a hub id ("org/name") downloaded to the hub's cache, safetensors only.

    Raises:
        UserError: none of these; or the download fails.
    """
    place = Source.parse(source)
    if place.path is not None and place.path.exists():
        read_model_index(place.path)
        return place.path
    if not place.hub_id:
        raise UserError(f"{source} does not exist and is not a hub id (org/name); give a diffusers folder or a hub id")
    from diffusers import DiffusionPipeline

    from fewstep.networks.components import quiet_loading

    try:
        with quiet_loading():
            return Path(DiffusionPipeline.download(place.hub_id, use_safetensors=True))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        raise UserError(
            f"{source} is not a local folder and cannot be fetched from the hub ({hub_reason(error)}); "
            "check the name and the network, or download it and give the folder"
        ) from error


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder has diffusers' index and a text-to-image network (our class-conditional exports have none)."""
    return (path / INDEX).is_file() and any(name.startswith("text_encoder") for name in read_model_index(path))


def has_guidance_built_in(folder: Path) -> bool:
    """Whether a folder's scheduler is one of few-step models, as our own exports have: their guidance is distilled in.

    Networks that take guidance as an input are refused on loading. Releases with the config and the scheduler of their
    base (Turbo, Lightning) are known by their names (`names_of`), or not at all.
    """
    return read_scheduler(folder).get("_class_name") in _FEW_STEP_SCHEDULERS


def names_of(folder: Path, component: str) -> Iterator[str]:
    """What a model is called: its folder, its name on the hub where it lies in the hub's cache, and what its index and the
    network's config say they were loaded from."""
    yield folder.name
    yield cached_id(folder)
    for path in (folder / INDEX, folder / component / "config.json"):
        yield str(read_json_object(path).get("_name_or_path", "")) if path.is_file() else ""


def refuse_unknown_network(folder: Path, families: Iterable[Family]) -> None:
    """Raise UserError that says what a diffusers folder holds instead of a network that some family has."""
    components = {family.component: family.network_class for family in families if family.component}
    index = read_model_index(folder)
    found = next((name for name in components if name in index), None)
    if found is None:
        raise UserError(
            f"{folder} is not a text-to-image model this library knows: its index names no {' or '.join(components)}"
        )
    kind = read_json(folder / found / "config.json", folder, found).get("_class_name")
    raise UserError(f"{folder}: a network of class {kind} is not supported; {' and '.join(components.values())} are")
