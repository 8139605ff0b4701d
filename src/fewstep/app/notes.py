"""The sentences on the page: what the model is, what its run took, what a visitor should know."""

from fewstep.app.studio import Result, Studio


def about_model(studio: Studio) -> str:
    """Heading: name, kind, size and steps of the model, in Markdown."""
    model = studio.models["model"]
    _, height, width = model.picture_shape
    kind = "text to image" if studio.takes_prompts else "classes to images" if studio.classes else "images"
    facts = [kind, f"{width}×{height}"]
    if studio.is_generator:
        indices = model.card.step_indices
        steps = "step" if len(indices) == 1 else "steps"
        facts.append(f"{len(indices)} {steps} (grid {', '.join(map(str, indices))} of {model.card.num_levels})")
    name = _plain(_short(studio.settings.model))
    return f"## {name}\n{' · '.join(facts)}"


def facts_of(result: Result) -> str:
    """Number, evaluations and latency of a result, one line."""
    count = len(result.pictures)
    pictures = f"{count} picture{'s' if count > 1 else ''}"
    evaluations = f"{result.evaluations} evaluation{'s' if result.evaluations > 1 else ''} each"
    latency = f"**{_seconds(result.seconds)}** ({_seconds(result.seconds / count)} a picture)"
    return " · ".join([pictures, evaluations, latency, *(["first run, warm-up included"] * result.first_run)])


def comparison_of(generator: Result, teacher: Result) -> str:
    """The teacher's facts, with the ratio of the two latencies where both were measured warm."""
    facts = facts_of(teacher)
    if generator.first_run or teacher.first_run:
        return facts
    return f"{facts} · generator {teacher.seconds / max(generator.seconds, 1e-9):.1f}× faster"


def notes_of(studio: Studio) -> list[str]:
    """What to know before pressing the button."""
    notes = []
    if studio.takes_prompts:
        if studio.is_generator:
            notes.append("No negative prompt: few-step generators run without guidance, so nothing could use one.")
        if studio.checker is not None:
            notes.append("Safety checker: on. Withheld pictures are grey.")
        elif studio.settings.safety_checker:
            notes.append("⚠️ **No safety checker**: this model comes without one. Pictures are shown unchecked.")
        else:
            notes.append("⚠️ **Safety checker off**: pictures are shown unchecked.")
        if not studio.has_tiny_vae:
            notes.append("Tiny VAE: none was given (`--tiny-vae FOLDER`).")
    if "teacher" in studio.models:
        notes.append("Generator and teacher start from the same noise.")
    notes.append("A seed makes the picture that `fewstep sample --seed` makes.")
    return notes


def _seconds(value: float) -> str:
    number, unit = (f"{1000 * value:.0f}", "ms") if value < 1 else (f"{value:.1f}", "s")
    return f"{number}\N{NO-BREAK SPACE}{unit}"


def _short(source: str) -> str:
    """Last part of a path: visitors need not know where the weights lie on the server."""
    parts = [part for part in source.rstrip("/").split("/") if part]
    if parts[-1:] == ["generator"] or parts[-1:] == ["teacher"]:
        parts = parts[:-1] or parts
    return parts[-1] if parts else source


def _plain(text: str) -> str:
    """Without Markdown's and HTML's special characters."""
    return "".join(letter if letter.isalnum() or letter in " .:-" else f"&#{ord(letter)};" for letter in text)
