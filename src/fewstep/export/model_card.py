"""The README.md of an export: the model hub's header, code that runs as printed, pictures and figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.export.card_usage import CardFacts, hub_name, usage_text
from fewstep.formats.model_folder import ModelCard

SAMPLES = "samples.png"


def file_header(card: ModelCard) -> dict[str, str]:
    """Metadata of the safetensors files: schedule, base model, recipe, library version, licence."""
    settings = card.made_with.get("settings", {})
    return {
        "format": "pt", "role": card.role, "step_indices": json.dumps(list(card.step_indices)),
        "num_levels": str(card.num_levels), "base_model": hub_name(card.base) or card.base,
        "recipe": json.dumps(settings), "num_steps": str(card.made_with.get("num_steps", "")),
        "fewstep": __version__, "licence": card.licence,
    }  # fmt: skip


def render_card(facts: CardFacts) -> str:
    """The text of README.md."""
    steps = len(facts.card.step_indices)
    what = f"It makes a picture in {steps} network evaluation{'s' if steps > 1 else ''}"
    from_base = f", distilled from {_base_link(facts.base)}" if facts.base else ""
    parts = [
        _header(facts),
        f"# {facts.name}\n\nA few-step generator{from_base}. {what} (grid indices "
        f"{', '.join(map(str, facts.card.step_indices))} of {facts.card.num_levels}), without guidance.",
    ]
    if facts.num_samples:
        shown = "".join(f"\n{number}. {prompt}" for number, prompt in enumerate(facts.prompts, start=1))
        parts.append(
            f"![{facts.num_samples} samples]({SAMPLES})"
            + (f"\n\nPrompts, row by row, seed 0:\n{shown}" if shown else "")
        )
    parts.append(f"## Use\n\n{usage_text(facts)}")
    if facts.figures:
        rows = "\n".join(f"| {name} | {value} |" for name, value in facts.figures)
        parts.append(f"## Figures\n\n| measured | value |\n| --- | --- |\n{rows}")
    parts.append(f"## Origin\n\n{_origin(facts)}")
    return "\n\n".join(parts) + "\n"


def _header(facts: CardFacts) -> str:
    """YAML between dashes, as the hub reads it."""
    text = bool(facts.base)
    lines = [f"library_name: {'fewstep' if facts.kind == 'edm' or not text else 'diffusers'}"]
    if hub_name(facts.base):
        lines += [f"base_model: {hub_name(facts.base)}"]
        lines += [f"base_model_relation: {'adapter' if 'lora' in facts.kind else 'finetune'}"]
    lines += [f"license: {facts.card.licence or 'unknown'}"]
    lines += [f"pipeline_tag: {'text-to-image' if text else 'unconditional-image-generation'}"]
    tags = ["few-step", "distillation", "dmd2", "fewstep"] + (["lora"] if "lora" in facts.kind else [])
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _origin(facts: CardFacts) -> str:
    made, lines = facts.card.made_with, [f"- made with fewstep {facts.card.made_with.get('fewstep', __version__)}"]
    if made.get("num_steps"):
        lines.append(f"- training steps: {made['num_steps']}")
    if facts.base:
        lines.append(f"- base model: {_base_link(facts.base)}")
    lines.append(f"- weights stored as {facts.precision}")
    known = "unknown: that of the base model and its training data applies"
    lines.append(f"- licence: {facts.card.licence or known}")
    settings = json.dumps(made.get("settings", {}), indent=1)
    if made.get("settings"):
        lines.append(f"\n<details><summary>Settings of the run</summary>\n\n```json\n{settings}\n```\n\n</details>")
    return "\n".join(lines)


def _base_link(base: str) -> str:
    name = hub_name(base)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{Path(base).name}`"


def run_figures(generator_folder: Path, card: ModelCard) -> list[tuple[str, str]]:
    """Measurements that lie in the generator's run: `best.json`, `report.json`, and files of `evaluate --json`."""
    folder = generator_folder.parent.parent if generator_folder.parent.name == "best" else generator_folder.parent
    found: list[tuple[str, str]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if path.name == "best.json":
            found += _best_figure(values, card)
        elif path.name != "settings.json":
            found += _measurements(values)
    return found


def _best_figure(rows: Any, card: ModelCard) -> list[tuple[str, str]]:
    """The measurement made at the step this generator is from."""
    best = card.made_with.get("settings", {}).get("best", {})
    of = (
        f"{best.get('num_images', 'unrecorded number of')} images, features {Path(str(best.get('features', '?'))).name}"
    )
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
    if "frechet_distance" not in values:
        return [row for value in values.values() for row in _measurements(value)]
    try:
        of = f"{values['num_images']} images, features {values['features']}, {values['evaluations_per_image']} evaluations an image"
        return [
            (
                f"Frechet distance of {Path(str(values['model'])).name} ({of})",
                f"{float(values['frechet_distance']):.3f}",
            )
        ]
    except (KeyError, TypeError, ValueError):
        return []
