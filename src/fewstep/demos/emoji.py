"""The quick start of prompts: 64x64 emoji from a text-to-image teacher of 50 guided steps, in four steps of a LoRA."""

from pathlib import Path

from rich.console import Console

from fewstep.demos import runner
from fewstep.demos.runner import DemoFacts, Result
from fewstep.evaluation.bench import NEIGHBOURS
from fewstep.evaluation.report import PromptCards, Section, Text
from fewstep.formats.pixels import Block, save_comparison


def run_text_quickstart(folder: Path, *, minutes: float = 5.0, seed: int = 0, console: Console | None = None) -> Path:
    """`fewstep text-quickstart`; returns the path of the report."""
    return runner.run_quickstart(FACTS, folder, minutes=minutes, seed=seed, console=console)


def _pictures(result: Result) -> list[Section]:
    shown, split, teacher = result.shown, len(result.shown.known), result.teacher
    guided = f"teacher, {teacher.evaluations_per_image} steps at guidance {result.settings.teacher.guidance:g}"
    few = f"generator, {result.generator.evaluations_per_image} steps"
    return [
        PromptCards(
            "Prompts the teacher was trained on", shown.known,
            {guided: shown.teacher[:split], few: shown.generator[:split]},
        ),
        PromptCards(
            "Prompts nobody was trained on", shown.unseen,
            {"real": shown.real, guided: shown.teacher[split:], few: shown.generator[split:]},
        ),
        Text([
            "Prompts are the first of each category in a random order, nobody chose them by their pictures. Teacher and generator "
            "start from the same noise and need not show the same picture: distribution matching makes distributions match."
        ]),
    ]  # fmt: skip


def _tiles(result: Result) -> list[tuple[str, str]]:
    teacher, generator = result.teacher, result.generator
    count = generator.values["agreement"].num_images
    return [
        (f"{result.speedup:.0f}x", "the teacher's pictures per second"),
        (f"{generator.evaluations_per_image}", f"evaluations without guidance instead of {teacher.evaluations_per_image} guided ones"),
        (f"{generator.frechet_distance:.2f}", f"Frechet distance; the teacher's is {teacher.frechet_distance:.2f}"),
        (
            f"{generator['agreement']:.0%}",
            f"of {count} prompts nobody was trained on are followed; by the teacher {teacher['agreement']:.0%}, shuffled prompts "
            f"would be by {generator['shuffled']:.0%}",
        ),
    ]  # fmt: skip


def _save(folder: Path, result: Result) -> None:
    """Prompts nobody was trained on with their real pictures, then prompts the teacher was trained on."""
    shown, split = result.shown, len(result.shown.known)
    guided, few = (
        f"teacher, {result.teacher.evaluations_per_image} guided steps",
        f"generator, {result.generator.evaluations_per_image} steps",
    )
    save_comparison(folder / "side_by_side.png", [
        Block(shown.unseen, {"real": shown.real, guided: shown.teacher[split:], few: shown.generator[split:]}),
        Block(shown.known, {guided: shown.teacher[:split], few: shown.generator[:split]}),
    ])  # fmt: skip


def _notes(result: Result) -> list[str]:
    generator, count = result.generator, result.generator.values["agreement"].num_images
    return [
        f"Features and categories: {generator.features}, against one real picture for each of {generator.num_reference_images:,} "
        f"training texts; seed {generator.seed}, {generator.dtype}. So few held-out texts make any distance larger: compare that column within itself.",
        "Right category: the classifier sees the category that the prompt asks for, on held-out texts; beside it the same after "
        f"the prompts changed places, on average. Own picture: the real picture of the same text is among the {NEIGHBOURS} nearest "
        f"of {count} real ones, which chance makes true for {NEIGHBOURS / count:.0%}.",
    ]


FACTS = DemoFacts(
    name="emoji",
    title="Four steps instead of 50: emoji from text, distilled on this machine",
    measurement=("emoji-sd",),
    measured=1_000, curve_points=6, curve_images=400, shown=18, sampled=20, fewest=200, batch_size=32,
    columns={
        "images_per_second": "images/s", "frechet_distance": "Frechet distance, training texts",
        "held_out_distance": "Frechet distance, held-out texts", "agreement": "right category",
        "shuffled": "shuffled prompts", "retrieval": f"own picture among nearest {NEIGHBOURS}",
    },
    tiles=_tiles,
    pictures=_pictures,
    save_pictures=_save,
    notes=_notes,
    facts=lambda result: [
        f"LoRA of rank {result.settings.memory.lora_rank}; no real picture was read, only {result.num_prompts:,} prompts.",
        "Real pictures: Noto Emoji, Google, Apache-2.0.",
    ],
    next_commands=[
        ('fewstep sample {model} --prompt "red apple, food & drink" --out apple', "make a picture of your own"),
        ("fewstep export {model} {folder}/lora --as lora", "the LoRA for diffusers, with a model card"),
        ("fewstep text-quickstart --minutes 30 --folder runs/text-quickstart-30", "the same with more patience"),
        ("fewstep train recipes/emoji_sdxl_dmd2_4step_lora.toml", "a larger teacher of the same pictures"),
        ("fewstep train recipes/sdxl_dmd2_4step_one_gpu.toml --dry-run", "what a teacher of 2.6 billion parameters would need"),
    ],
)  # fmt: skip
