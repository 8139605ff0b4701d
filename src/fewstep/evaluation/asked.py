"""The settings block beside every figure of `fewstep evaluate`: how it was asked for, and what tells files apart."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewstep import __version__
from fewstep.errors import UserError
from fewstep.evaluation.feature_cache import network_digest
from fewstep.evaluation.features import FeatureNetwork
from fewstep.formats.bundled import resolve_path
from fewstep.formats.fingerprints import file_digest
from fewstep.models.model import Model

if TYPE_CHECKING:
    from fewstep.evaluation.evaluate import EvaluateOptions

# what may differ between figures that are compared: where files lie (their hashes tell), and the machine
PLACES = ("features", "reference", "captions", "device", "threads", "torch", "fewstep")
_LETTERS = 16  # of a sha256


def asked_for(options: "EvaluateOptions", network: FeatureNetwork, model: Model) -> dict[str, Any]:
    """Every option that decides a figure, JSON-able, by its name; what was not given is left out.

    Files are named, and told by the start of their sha256: features by their weights, the reference, captions and prompts by
    their content.
    """
    given = {
        "features": options.features, "features_sha256": network_digest(network)[:_LETTERS],
        "reference": str(options.reference or ""), "captions": str(options.captions or ""),
        "reference_sha256": _of_file(options.reference), "images": options.images,
        "clip": options.clip, "clip_prefix": options.clip_prefix or "", "lpips": [str(path) for path in options.lpips or ()],
        "teacher": options.teacher, "batch_size": options.batch_size or model.family.default_batch_size,
    }  # fmt: skip
    if options.images and options.captions is None:
        given |= {"split": options.split, "fit": options.fit, "background": options.background}
    if options.prompts:
        words = hashlib.sha256(json.dumps(options.prompts).encode())
        given |= {"num_prompts": len(options.prompts), "prompts_sha256": words.hexdigest()[:_LETTERS]}
    if options.lpips:
        given["diversity_prompts"] = options.diversity_prompts
    machine = {"device": model.device.type, "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "fewstep": __version__}
    return {name: value for name, value in given.items() if value} | machine | versions


def refuse_no_place(option: str, path: Path | None) -> None:
    """Raise UserError where a file cannot come to lie, before what it is to hold is worked for.

    Args:
        option: whose path it is.
        path: None is not given.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give the name of a file")


def _of_file(path: Path | None) -> str:
    """The start of a file's hash; "" for none."""
    return "" if path is None else file_digest(resolve_path(path))[:_LETTERS]
