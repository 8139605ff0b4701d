"""Make the files that ship for `fewstep text-quickstart` from the emoji pictures and the finished teachers.

    python examples/train_emoji_teacher.py data/emoji runs/emoji --stage vae     # then sd, then sdxl
    python examples/bundle_emoji.py data/emoji runs/emoji

Writes into src/fewstep/assets/emoji the two teachers, the prompts, a picture of every held-out text, a feature network
that also tells the nine categories apart, the feature statistics of real pictures, and what the teachers reach. The
parts can be made one by one: `--only features` (20 minutes on 2 cores), `--only teachers` (40 minutes).
"""

import argparse
import io
import json
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from emoji_teacher_data import Pictures, Split, read_pictures
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.demos.emoji import FACTS
from fewstep.errors import UserError
from fewstep.evaluation.bench import HELD_OUT, TRAIN_PROMPTS, load_bench
from fewstep.evaluation.features import SmallClassifier, extract_features
from fewstep.evaluation.measure import measure_model
from fewstep.evaluation.measurement import Measurement
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance
from fewstep.evaluation.text_following import group_of, measure_text_following
from fewstep.models.load import load_teacher
from fewstep.networks.components import published_names
from fewstep.preparation.features import train_feature_network, vary_shape_and_colour
from fewstep.progress import lines

ASSETS = Path(__file__).parents[1] / "src/fewstep/assets/emoji"
NUM_STEPS = 50
TEACHERS = ("sd", "sdxl")
ORDER_SEED, MOST_PER_TEXT, LIMIT_BYTES = 0, 2, 30e6
PARTS = ("pictures", "features", "teachers")


@dataclass(frozen=True)
class FeaturePictures:
    """Training pictures for the classifier, at most two a text: else one in three would show one of few people."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures at these rows, (B, 3, 64, 64), uint8."""
        return self.images[indices]


def shuffled(items: list[str]) -> list[str]:
    """In an order without meaning, so that any first part is a fair sample."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
    return [items[number] for number in order]


def rows_of(pictures: Pictures, texts: list[str], most: int) -> list[int]:
    """Rows of up to `most` pictures of every text, drawn among its pictures, text by text."""
    places: dict[str, list[int]] = {}
    for row in torch.randperm(len(pictures.texts), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist():
        places.setdefault(pictures.texts[row], []).append(row)
    return [row for text in texts for row in places[text][:most]]


def read_split(run: Path) -> Split:
    """Which texts the teachers have seen.

    Raises:
        UserError: a teacher is missing, or they have seen different ones.
    """
    splits = []
    for name in TEACHERS:
        path = run / name / "split.json"
        if not path.is_file():
            raise UserError(f"{path} is missing: train the teachers with examples/train_emoji_teacher.py first")
        splits.append(json.loads(path.read_text(encoding="utf-8")))
    if any(split != splits[0] for split in splits):
        raise UserError(f"the teachers in {run} were trained on different texts: train them again with one data set")
    return splits[0]


def bundle_pictures(pictures: Pictures, split: Split) -> None:
    """The training texts, and the held-out ones with a picture each as lossless WebP."""
    train, held_out = shuffled(list(split["train"])), shuffled(list(split["held_out"]))
    (ASSETS / TRAIN_PROMPTS).write_text("\n".join(train) + "\n", encoding="utf-8")
    rows = []
    for text, row in zip(held_out, rows_of(pictures, held_out, 1), strict=True):
        buffer = io.BytesIO()
        picture = Image.fromarray(pictures.pixels[row].permute(1, 2, 0).numpy())
        picture.save(buffer, format="WEBP", lossless=True, quality=100, method=6)
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": text, "group": group_of(text)})
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "group": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(ASSETS / HELD_OUT)


def bundle_features(pictures: Pictures, split: Split, num_passes: int) -> None:
    """The classifier, its accuracy, and the statistics of one real picture a text."""
    train = list(split["train"])
    names = sorted({group_of(text) for text in train})
    rows = rows_of(pictures, train, MOST_PER_TEXT)
    labels = torch.tensor([names.index(group_of(pictures.texts[row])) for row in rows])
    train_feature_network(
        FeaturePictures(pictures.pixels[rows], labels, names), ASSETS / "features", num_classes=len(names),
        num_passes=num_passes, batch_size=64, name="emoji-classifier", width=16, num_stages=4,
        augment=vary_shape_and_colour, label_smoothing=0.1,
        report=lines(Console(stderr=True), "Training the feature network"),
    )  # fmt: skip
    network = SmallClassifier.load(ASSETS / "features")
    found, statistics = {}, {}
    for part in ("train", "held_out"):
        texts = shuffled(list(split[part]))
        images = pictures.batch(torch.tensor(rows_of(pictures, texts, 1)))
        following = measure_text_following(network, images, [group_of(text) for text in texts])
        found[part] = {
            **{name: share.value for name, share in following.items()}, "num_images": len(texts),
            "classifier": network.name,
        }  # fmt: skip
        statistics[part] = FeatureStatistics.of(extract_features(network, images.split(250)))
        statistics[part].save(ASSETS / f"reference_{part}.npz")
        print(f"features: {part} accuracy {found[part]['agreement']:.3f}, balanced {found[part]['balanced']:.3f}")
    found["floor"] = frechet_distance(statistics["held_out"], statistics["train"])
    (ASSETS / "feature_measurement.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def write_published_names(folder: Path) -> None:
    """Text encoders with the tensor names of published files, which every version of transformers reads."""
    for config in folder.glob("text_encoder*/config.json"):
        architecture = json.loads(config.read_text(encoding="utf-8"))["architectures"][0]
        path = config.with_name("model.safetensors")
        save_file(published_names(load_file(path), architecture), path, {"format": "pt"})


def bundle_teachers(run: Path, num_images: int, seed: int) -> None:
    """Both folders as they are, and what they reach in `NUM_STEPS` DDIM steps at the recipe's guidance."""
    recipe = tomllib.loads((ASSETS / "recipe.toml").read_text(encoding="utf-8"))
    guidance = float(recipe["teacher"]["guidance_scale"])
    for name in TEACHERS:
        shutil.rmtree(ASSETS / name, ignore_errors=True)
        shutil.copytree(run / name, ASSETS / name)
        write_published_names(ASSETS / name)
    check_size()
    bench, figures = load_bench(ASSETS), {}
    for name in TEACHERS:
        teacher = load_teacher(ASSETS / name, device="cpu", precision="auto")
        found = bench.measure(
            teacher, f"emoji-{name}", num_images=num_images, seed=seed, num_steps=NUM_STEPS, guidance_scale=guidance
        )
        on_curve = measure_model(
            teacher, name, bench.classifier, bench.reference, num_images=min(FACTS.curve_images, num_images), seed=seed,
            num_steps=NUM_STEPS, guidance_scale=guidance, batch_size=32, prompts=bench.prompts,
        )  # fmt: skip
        figures[f"emoji-{name}"] = {
            **found.to_dict(), "num_steps": NUM_STEPS, "guidance_scale": guidance, "on_curve": on_curve.to_dict(),
        }  # fmt: skip
        print(found.sentence(), flush=True)
    (ASSETS / "teacher_measurement.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def write_provenance(command: str, split: Split) -> None:
    """What lies here, from where, under which licence."""
    features = json.loads((ASSETS / "feature_measurement.json").read_text(encoding="utf-8"))
    figures = json.loads((ASSETS / "teacher_measurement.json").read_text(encoding="utf-8"))
    accuracy = ", ".join(
        f"{features[part]['agreement']:.1%} ({features[part]['balanced']:.1%} when every category counts the same) of one "
        f"picture for each of the {features[part]['num_images']} {words} texts"
        for part, words in (("train", "training"), ("held_out", "held-out"))
    )
    measured = {name: Measurement.from_dict(found) for name, found in figures.items()}
    lines = [
        f"| {name.removeprefix('emoji-')} | {found.frechet_distance:.3f} ({found.num_images}) | {found['held_out_distance']:.3f} "
        f"| {found['agreement']:.3f} | {found['shuffled']:.3f} |"
        for name, found in measured.items()
    ]
    real = features["held_out"]
    lines.append(f"| real | - | {features['floor']:.3f} | {real['agreement']:.3f} | {real['shuffled']:.3f} |")
    example = next(iter(figures.values()))
    text = PROVENANCE.format(
        command=command, accuracy=accuracy, train=len(split["train"]), held_out=len(split["held_out"]),
        rows="\n".join(lines), steps=NUM_STEPS, guidance=example["guidance_scale"], seed=next(iter(measured.values())).seed,
    )  # fmt: skip
    (ASSETS / "PROVENANCE.md").write_text(text, encoding="utf-8")


def check_size() -> None:
    """Print what everything weighs.

    Raises:
        UserError: more than 30 MB in all.
    """
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    for part in sorted(ASSETS.iterdir()):
        print(f"{part.name:28} {sum(size for path, size in sizes.items() if path.is_relative_to(part)) / 1e6:6.2f} MB")
    print(f"{ASSETS}: {sum(sizes.values()) / 1e6:.2f} MB")
    if sum(sizes.values()) > LIMIT_BYTES:
        raise UserError(
            f"{ASSETS} is larger than {LIMIT_BYTES / 1e6:.0f} MB: shrink the teachers, it ships with the package"
        )


def main(arguments: list[str] | None = None) -> None:
    """Make the parts that were asked for, print what a reader wants to know.

    Raises:
        UserError: pictures or teachers are missing or do not fit, or the files are too large to ship.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the pictures and metadata.jsonl")
    parser.add_argument("run", type=Path, help="folder of train_emoji_teacher.py, with sd and sdxl in it")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="make this part alone; may be given several times"
    )
    parser.add_argument("--passes", type=int, default=60, help="of the feature network over its pictures")
    parser.add_argument(
        "--teacher-images", type=int, default=FACTS.measured, help="pictures of training texts a teacher"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the teachers' pictures")
    options = parser.parse_args(arguments)
    parts = options.only or PARTS
    pictures, split = read_pictures(options.data), read_split(options.run)
    ASSETS.mkdir(parents=True, exist_ok=True)
    if "pictures" in parts:
        bundle_pictures(pictures, split)
    if "features" in parts:
        bundle_features(pictures, split, options.passes)
    if "teachers" in parts:
        bundle_teachers(options.run, options.teacher_images, options.seed)
    if all((ASSETS / f"{name}_measurement.json").is_file() for name in ("feature", "teacher")):
        given = sys.argv[1:] if arguments is None else arguments
        write_provenance(shlex.join(["python", "examples/bundle_emoji.py", *given]), split)
    check_size()


PROVENANCE = """\
# What lies here and where it comes from

| file | what | made by |
| --- | --- | --- |
| `sd/`, `sdxl/` | text-to-image teachers in the shapes of Stable Diffusion and SDXL, 64x64, float16, as diffusers folders | `examples/train_emoji_teacher.py`; the commands are in their `README.md` |
| `prompts_train.txt` | the {train} texts that the teachers were trained on, in random order | `examples/bundle_emoji.py` |
| `held_out.parquet` | the {held_out} texts that nothing here was trained on, with their category and one real picture each (lossless WebP) | same |
| `features/` | small classifier of the categories, trained on pictures of the training texts; its 128 pooled features measure quality, its answers text following | same |
| `reference_train.npz`, `reference_held_out.npz` | mean and covariance of those features over one real picture a training text, and a held-out text | same |
| `feature_measurement.json`, `teacher_measurement.json` | what the classifier and the teachers reach | same |
| `recipe.toml` | what `fewstep text-quickstart` runs | by hand |

Last made with `{command}`.

The classifier names the category of {accuracy}. A text ends with its category ("red apple, food & drink"), so text
following by category asks little: that the end of the prompt is obeyed.

| teacher, {steps} DDIM steps, guidance {guidance:g}, seed {seed} | Frechet distance, training texts (pictures) | held-out texts | right category, held-out | with shuffled prompts |
| --- | --- | --- | --- | --- |
{rows}

Distances are in the classifier's features against one real picture of each of the {train} training texts. The column of
the held-out texts has {held_out} pictures in every row; so few make any distance larger, so compare it down the column only.

The pictures are Noto Emoji (https://github.com/googlefonts/noto-emoji), Copyright Google LLC, Apache License 2.0; their
names and categories come from the package emoji-datasource-google 16.0.0, Copyright (c) 2013 Cal Henderson, MIT licence:

> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
> persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and
> this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED
> "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
> FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY
> CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
> CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

Pictures were set on white and made 64x64. Teachers, feature network and statistics are the work of this project,
Apache-2.0.
"""


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
