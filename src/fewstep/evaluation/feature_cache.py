"""Features of real pictures kept between evaluations, under a hash of everything they follow from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep import __version__
from fewstep.data.listing import walk_files
from fewstep.errors import UserError, first_line
from fewstep.evaluation.features import FeatureNetwork
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.atomic import replaced_file
from fewstep.formats.fingerprints import add_tensors, file_digest, tensors_digest
from fewstep.formats.remote import user_cache
from fewstep.formats.tensor_files import read_safetensors, write_tensor_file
from fewstep.progress import Report

Tell = Callable[[str], None]


def cache_folder() -> Path:
    """Where features are kept: `fewstep/features` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return user_cache("features")


def content_digest(path: Path, names: Sequence[str] | None = None, report: Report = lambda done, total: None) -> str:
    """SHA-256 over names and whole contents of files, in their order; the place of the folder does not count.

    Args:
        path: a file, or a folder.
        names: of the folder's files; None: all that are not hidden, sorted.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    if path.is_file():
        names = [""]
    elif names is None:
        names = sorted(name for name in walk_files(path) if not name.rpartition("/")[2].startswith("."))
    try:
        for number, name in enumerate(names):
            report(number, len(names))
            digest.update(f"{name}\0{file_digest(path / name)}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return digest.hexdigest()


def sizes_digest(path: Path, names: Sequence[str] | None = None) -> str:
    """SHA-256 over names and sizes of files, as `content_digest` takes them; "" where nothing lies there."""
    if path.is_dir() and names is None:
        names = sorted(walk_files(path))
    places = [path / name for name in (names or [""])]
    return hashlib.sha256(repr([(one.name, one.stat().st_size) for one in places if one.exists()]).encode()).hexdigest()


def network_digest(network: FeatureNetwork) -> str:
    """SHA-256 of a feature network's kind, name and weights; "" for one that has no weights to compare."""
    if not isinstance(network, nn.Module):
        return ""
    digest = hashlib.sha256(f"{type(network).__qualname__} {network.name} {network.extra_repr()}".encode())
    add_tensors(digest, network.state_dict())
    return digest.hexdigest()


def weights_digest(network: FeatureNetwork) -> str:
    """SHA-256 of a feature network's weights alone, wherever it lies and whatever it is called; "" for one that has none."""
    return tensors_digest(network.state_dict()) if isinstance(network, nn.Module) else ""


def refuse_other_features(reference: FeatureStatistics, network: FeatureNetwork, what: str) -> None:
    """Raise UserError where statistics say that they are of other weights than a network's; equal in number, they compare nothing.

    Args:
        what: the statistics are, for messages.
    """
    own = weights_digest(network) if reference.weights else ""
    if own and own != reference.weights:
        raise UserError(
            f"{what} was made with another feature network than {network.name}, or with one that was trained anew since; make it "
            "again with `fewstep prepare statistics`"
        )


def feature_key(network: FeatureNetwork, content: str, facts: Mapping[str, Any], device: torch.device | str) -> str:
    """What features are kept under; "" where they cannot be.

    Args:
        content: of the pictures.
        facts: how they are brought to the network; JSON-able.
    """
    weights = network_digest(network)
    if not weights or not content:
        return ""
    libraries = [__version__, PIL.__version__, torch.__version__, torch.device(device).type]
    whole = json.dumps([weights, content, dict(facts), libraries], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def kept_features(key: str, tell: Tell = lambda line: None) -> dict[str, Tensor] | None:
    """Features by name, each (N, F) float32, that were kept under a key; None where there are none, or damaged ones.

    Args:
        tell: is told of features that are read, and of damaged ones, which will be made again.
    """
    path = _place(key)
    if not key or not path.is_file():
        return None
    try:
        tensors, header = read_safetensors(path)
        if header.get("key") != key or header.get("sha256") != tensors_digest(tensors) or not tensors:
            raise ValueError("its content is not what was written")
    except (UserError, ValueError) as error:
        tell(f"{path} is damaged and made again ({first_line(error)})")
        return None
    tell(f"Features of {len(next(iter(tensors.values()))):,} real pictures from {path}")
    return tensors


def keep_features(key: str, features: Mapping[str, Tensor], tell: Tell = lambda line: None) -> None:
    """Keep features under a key, whole or not at all; a cache that cannot be written is told and stops nobody."""
    if not key:
        return
    path = _place(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as aside:
            tensors = {name: value.contiguous() for name, value in features.items()}
            write_tensor_file(aside, tensors, {"key": key, "sha256": tensors_digest(tensors)})
    except (OSError, SafetensorError, UserError) as error:
        tell(f"features are not kept in {path.parent} ({first_line(error)})")


def _place(key: str) -> Path:
    return cache_folder() / f"{key[:32]}.safetensors"
