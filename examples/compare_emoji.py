"""Teachers and generators of the bundled emoji side by side: one picture with named prompts, one table of figures.

    python examples/compare_emoji.py bundled:emoji-sd runs/emoji_dmd2_4step_lora --out compared

Writes compared.png (prompts down, models across, everything from the same noise; the first training and the first
held-out prompt of each category, in the random order they ship in) and compared.json, and prints the table. Generators
are measured here; the figures of bundled teachers ship with them (`--measure-teachers` measures those again, a quarter
of an hour each). One picture a held-out text is 153 pictures, and a share of them is known to within 0.04; with
`--held-out-seeds 5` a second table has five pictures a text, mean ± standard deviation over the seeds, teachers too.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.bench import Bench, load_bench
from fewstep.evaluation.measurement import Measurement
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import BUNDLED, bundled_path
from fewstep.formats.pixels import to_uint8
from fewstep.models.load import load_model
from fewstep.models.model import Model

COLUMNS = ("images_per_second", "frechet_distance", "held_out_distance", "agreement", "shuffled", "retrieval")
FOLLOWING = ("held_out_distance", "agreement", "retrieval")
FOLLOWING_HEAD = "| model, held-out texts | seeds | distance | right category | own picture among nearest 10 |\n| --- | --- | --- | --- | --- |"
TEXT_WIDTH, LINE, GAP = 190, 13, 4
HEAD = (
    "| model | evaluations | images/s | Frechet distance, training texts | held-out texts | right category | shuffled "
    "| own picture among nearest 10 |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def load(source: str, precision: str) -> Model:
    """A text-to-image model by path or bundled name.

    Raises:
        UserError: it is missing, or makes pictures from something else.
    """
    model = load_model(source, device="cpu", precision=precision)
    if model.conditioner.takes != "prompts":
        raise UserError(f"{source} is not a text-to-image model")
    return model


def make(model: Model, prompts: list[str], options: argparse.Namespace, seed: int) -> Tensor:
    """One picture a prompt, in the model's own way, (N, 3, H, W)."""
    guided = {"num_inference_steps": options.teacher_steps, "guidance_scale": options.guidance_scale}
    how = {} if model.is_generator else guided
    return model.sample(prompts, seed=seed, batch_size=32, output="tensor", **how)


def follow(bench: Bench, model: Model, options: argparse.Namespace) -> dict[str, list[float]]:
    """Figures of held-out texts by name, one a seed."""
    seeds = range(options.seed, options.seed + options.held_out_seeds)
    found = [bench.judge(make(model, bench.held_out, options, seed)) for seed in seeds]
    return {name: [figures[name].value for figures in found] for name in FOLLOWING}


def _following_row(name: str, figures: dict[str, list[float]]) -> str:
    cells = [f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" for values in figures.values()]
    return f"| {name} | {len(figures[FOLLOWING[0]])} | {' | '.join(cells)} |"


def measure(bench: Bench, source: str, model: Model, options: argparse.Namespace) -> Measurement:
    """Figures of one model: shipped ones of a bundled teacher, else measured."""
    if not model.is_generator and source.startswith(f"{BUNDLED}emoji-") and not options.measure_teachers:
        shipped = json.loads(bundled_path("emoji/teacher_measurement.json").read_text(encoding="utf-8"))
        return Measurement.from_dict(shipped[source.removeprefix(BUNDLED)])
    return bench.measure(
        model, Path(source).name, num_images=options.num_images, seed=options.seed, num_steps=options.teacher_steps,
        guidance_scale=options.guidance_scale,
    )  # fmt: skip


def draw(prompts: list[str], columns: dict[str, Tensor | None], first_unseen: int) -> Image.Image:
    """Prompts down, columns across; a column without a picture of a prompt stays white there.

    Args:
        prompts: those that the teachers know, then the held-out ones.
        columns: title to pictures of the last len(pictures) prompts, (N, 3, H, W).
        first_unseen: number of the first held-out prompt.
    """
    side = next(images.shape[-1] for images in columns.values() if images is not None)
    titles = [_wrap(title, side) for title in columns]
    head = max(map(len, titles)) * LINE + GAP
    height = head + len(prompts) * (side + GAP) + LINE + GAP
    sheet = Image.new("RGB", (TEXT_WIDTH + len(columns) * (side + GAP), height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, lines in enumerate(titles):
        pen.multiline_text((TEXT_WIDTH + place * (side + GAP), 0), "\n".join(lines), "black", font, spacing=2)
    for row, prompt in enumerate(prompts):
        top = head + row * (side + GAP) + (LINE + GAP) * (row >= first_unseen)
        if row == first_unseen:
            pen.text((0, top - LINE - GAP), "prompts that no teacher or generator was trained on:", "black", font)
        pen.multiline_text((0, top + 4), "\n".join(_wrap(prompt, TEXT_WIDTH - 8)), "black", font, spacing=2)
        for place, images in enumerate(columns.values()):
            number = row - (len(prompts) - len(images)) if images is not None else -1
            if images is not None and number >= 0:
                picture = to_uint8(images[number : number + 1])[0].permute(1, 2, 0).numpy()
                sheet.paste(Image.fromarray(picture), (TEXT_WIDTH + place * (side + GAP), top))
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    font, lines = ImageFont.load_default(11), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Draw and measure.

    Raises:
        UserError: a model is missing or makes no pictures from text.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="teachers and generators: folders, runs or bundled:NAME")
    parser.add_argument("--names", nargs="*", help="what to call them in picture and table")
    parser.add_argument("--out", type=Path, required=True, help="path of both files, without their endings")
    parser.add_argument("--num-images", type=int, default=1_000, help="behind the distance on training texts")
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="of teachers")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--held-out-seeds", type=int, default=0, help="pictures a held-out text for a table of them; 0: none"
    )
    parser.add_argument("--measure-teachers", action="store_true", help="do not use the shipped figures")
    options = parser.parse_args(arguments)
    if options.held_out_seeds == 1 or options.held_out_seeds < 0:
        raise UserError(
            f"--held-out-seeds={options.held_out_seeds}: a spread takes two seeds or more, or 0 for no table"
        )
    names = options.names or [Path(source).name.removeprefix(BUNDLED) for source in options.models]
    if len(names) != len(options.models) or len(set(names)) != len(names):
        raise UserError(f"--names: {len(options.models)} different names are needed, one a model; got {names}")
    bench = load_bench(bundled_path("emoji"))
    known, unseen = bench.first_of_each_group(bench.prompts), bench.first_of_each_group(bench.held_out)
    real = bench.held_out_images[[bench.held_out.index(text) for text in unseen]]
    columns: dict[str, Tensor | None] = {"real": real}
    found, followed = {}, {}
    for name, source in zip(names, options.models, strict=True):
        model = load(source, options.precision)
        columns[name] = make(model, known + unseen, options, options.seed)
        found[name] = measure(bench, source, model, options)
        if options.held_out_seeds:
            followed[name] = follow(bench, model, options)
        print(f"{name}: measured", file=sys.stderr, flush=True)
    found["real held-out pictures"] = bench.real()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(options.out.with_suffix(".png")) as aside:
        draw(known + unseen, columns, len(known)).save(aside, format="PNG")
    with replaced_file(options.out.with_suffix(".json")) as aside:
        rows = {name: {**row.to_dict(), "held_out_seeds": followed.get(name, {})} for name, row in found.items()}
        aside.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print("\n".join([HEAD, *(f"| {name} | {' | '.join(row.cells(COLUMNS))} |" for name, row in found.items())]))
    if followed:
        print("\n".join(["", FOLLOWING_HEAD, *(_following_row(name, figures) for name, figures in followed.items())]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
