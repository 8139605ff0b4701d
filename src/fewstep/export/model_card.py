"""The README.md of an export: the model hub's header, code that runs as printed, pictures and figures."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from fewstep import __version__
from fewstep.evaluation.measurement import DISTANCE, Measurement
from fewstep.export.card_usage import CardFacts, hub_name
from fewstep.formats.bundled import BUNDLED
from fewstep.formats.json_files import parse_json
from fewstep.formats.model_folder import ModelCard

SAMPLES = "samples.png"


def file_header(card: ModelCard) -> dict[str, str]:
    """Metadata of the safetensors files: schedule, base model, recipe, library version, licence."""
    settings = card.made_with.get("settings", {})
    merged = {"base_loras": json.dumps(list(card.base_loras))} if card.base_loras else {}
    return merged | {
        "format": "pt", "role": card.role, "step_indices": json.dumps(list(card.step_indices)),
        "num_levels": str(card.num_levels), "base_model": hub_name(card.base) or card.base,
        "recipe": json.dumps(settings), "num_steps": str(card.made_with.get("num_steps", "")),
        "fewstep": __version__, "licence": card.licence,
    }  # fmt: skip


def render_card(facts: CardFacts) -> str:
    """The text of README.md."""
    made, steps = facts.card.made_with, list(facts.card.step_indices)
    base_import, base = _base(facts)
    text = _templates().get_template("README.md.jinja").render(
        facts=facts, steps=steps, header=_header(facts), made=made, version=__version__, samples=SAMPLES,
        settings=json.dumps(made.get("settings", {}), indent=1), base_link=_base_link(facts.base), base=base,
        base_import=base_import, where=f"snapshot_download({facts.source!r})" if facts.pushed else repr(facts.source),
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


@cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("fewstep.export"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        autoescape=False,  # Markdown: nothing to escape
    )  # fmt: skip
    found.filters["pyrepr"] = repr
    return found


def _header(facts: CardFacts) -> str:
    """YAML as the hub reads it."""
    text, base = bool(facts.base), hub_name(facts.base)
    related: dict[str, Any] = {"base_model_relation": "adapter" if "lora" in facts.kind else "finetune"} if base else {}
    return ModelCardData(
        library_name="fewstep" if facts.kind == "edm" or not text else "diffusers",
        base_model=base or None, license=facts.card.licence or "unknown",
        pipeline_tag="text-to-image" if text else "unconditional-image-generation",
        tags=["few-step", "distillation", "dmd2", "fewstep"] + (["lora"] if "lora" in facts.kind else []), **related,
    ).to_yaml()  # fmt: skip


def _base(facts: CardFacts) -> tuple[str, str]:
    """(import, expression) of what the base is loaded from: a name, a folder, or what ships with fewstep."""
    if facts.base.startswith(BUNDLED):
        name = facts.base.removeprefix(BUNDLED)
        return "from fewstep.formats.bundled import bundled_path\n", f"str(bundled_path({name!r}))"
    return "", repr(hub_name(facts.base) or facts.base)


def _base_link(base: str) -> str:
    name = hub_name(base)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{Path(base).name}`"


def run_figures(generator_folder: Path, card: ModelCard) -> list[tuple[str, str]]:
    """Measurements that lie in the generator's run: `best.json`, `report.json`, and files of `evaluate --json`."""
    folder = generator_folder.parent.parent if generator_folder.parent.name == "best" else generator_folder.parent
    found: list[tuple[str, str]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if path.name == "best.json":
            found += _best_figure(values, card)
        elif path.name != "settings.json":
            found += _measurements(values)
    return found


def _best_figure(rows: Any, card: ModelCard) -> list[tuple[str, str]]:
    """The measurement made at the step this generator is from."""
    settings = card.made_with.get("settings", {})
    best = settings.get("best", {})
    features = (best.get("files") or [best.get("features", "?")])[0]  # a setting of its own in earlier versions
    of = f"{best.get('num_images', 'unrecorded number of')} images, features {Path(str(features)).name}"
    if precision := settings.get("compute", {}).get("precision"):
        of += f", precision {precision}"
    step = card.made_with.get("num_steps")
    try:
        return [
            (f"Frechet distance at step {row['step']} ({of})", f"{row['frechet_distance']:.3f}")
            for row in rows
            if row["step"] == step
        ]
    except (TypeError, KeyError, ValueError):
        return []


def _measurements(values: Any) -> list[tuple[str, str]]:
    """Figures in a measurement's dict, or in a dict of them; the teacher's too."""
    if not isinstance(values, Mapping):
        return []
    if DISTANCE not in values:
        return [row for value in values.values() for row in _measurements(value)]
    try:
        found = Measurement.from_dict(values)
        distance = str(found.values[DISTANCE])
        of = [
            f"{found.num_images} images", f"features {values['features']}", f"{found.evaluations_per_image} evaluations an image",
            *[f"seed {found.seed}"] * ("seed" in values), *[found.dtype] * bool(found.dtype),
        ]  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError):
        return []
    way = f"{found.way}: " * bool(found.way)
    return [(f"{way}Frechet distance of {Path(str(found.model)).name} ({', '.join(of)})", distance)]
