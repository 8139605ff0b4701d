"""What the walk damages: a valid one of everything that a command reads, made from tiny models."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTINUED = ("*.json", "*.jsonl", "checkpoints/step_00000002/*")  # what a run that goes on reads
SAMPLE = ("--device", "cpu", "--precision", "fp32")
FOUR = "999,749,499,249"
PROMPTS = ("red cat", "a dog", "cat", "dog")
CLASSES = ("class0", "class1", "class2", "class3")

CLASS_RECIPE = """
[teacher]
path = "{static}/teacher"

[generator]
ema_half_life_images = 100

[data]
images = "{static}/pictures"

[losses]
gan_generator_weight = 3e-3
gan_discriminator_weight = 1e-2

[optimizer]
generator_lr = 1e-3
warmup_steps = 2

[training]
num_steps = 2
batch_size = 4
generator_every = 2

[compute]
device = "cpu"
precision = "fp32"
threads = 1

[best]
features = "{static}/features"
reference = "{static}/reference.npz"
num_images = 50

[run]
folder = "{folder}"
sample_every = 1
checkpoint_every = 1
sample_images = 4
tensorboard = false
"""

TEXT_RECIPE = """
[teacher]
path = "{static}/sd"
guidance_scale = 3.0

[generator]
step_indices = [999, 749, 499, 249]

[data]
prompts = "{static}/prompts.txt"
latents = "{latents}"

[memory]
mode = "shared_base"
lora_rank = 4

[losses]
gan_generator_weight = 5e-3
gan_discriminator_weight = 1e-2

[training]
num_steps = 2
batch_size = 2
generator_every = 2

[compute]
device = "cpu"
precision = "fp32"
threads = 1

[run]
folder = "{folder}"
sample_every = 100
checkpoint_every = 1
sample_images = 2
tensorboard = false
"""


@dataclass(frozen=True)
class Subject:
    """Some files and the command that reads them.

    Attributes:
        name: also of its folder below `subjects/`.
        command: (folder of the damaged copy, empty folder to write to) -> arguments.
        patterns: which of the folder's files are damaged.
        most: mutants of each file, evenly chosen, where a file is too large to damage it in every way.
    """

    name: str
    command: Callable[[Path, Path], list[object]]
    patterns: tuple[str, ...] = ("**/*",)
    most: int = 1_000_000

    def files(self, root: Path) -> list[str]:
        """The files that are damaged, sorted."""
        found = {path for pattern in self.patterns for path in root.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(root).as_posix() for path in found if path.suffix != ".png")


def build(folder: Path) -> None:
    """Write `static/` and `subjects/` below a folder; takes seconds."""
    from tests.conftest import tiny_denoiser, write_pictures
    from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder, tiny_taesd_folder

    static, subjects = folder / "static", folder / "subjects"
    static.mkdir(parents=True)
    for make, name in ((tiny_sd_folder, "sd"), (tiny_sdxl_folder, "sdxl"), (tiny_sd3_folder, "sd3")):
        make(static / name)
        shutil.copytree(static / name, subjects / name)
    tiny_taesd_folder(subjects / "taesd" / "taesd", blocks=2)
    write_pictures(static / "pictures", count=8)
    (static / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    _class_models(static, subjects, tiny_denoiser)
    _measures(static, subjects)
    _weights(static, subjects)
    _data(static, subjects)
    _prepared(static, subjects)
    _runs(static, subjects)


def command(*arguments: object) -> None:
    """A command that must succeed."""
    from tests.cli.test_main import fewstep

    answer = fewstep(*arguments)
    assert answer.code == 0, answer


def _class_models(static: Path, subjects: Path, denoiser_of: Any) -> None:
    from fewstep.formats.edm_pickle_writer import write_edm_pickle
    from fewstep.formats.model_folder import ModelCard, write_model_folder
    from tests.dmd2_files import edm_arguments, edm_network, head_for, save_dmd2

    denoiser = denoiser_of(seed=3)
    teacher = ModelCard(role="teacher", class_names=CLASSES, can_be_guided=True)
    generator = ModelCard(role="generator", step_indices=(999, 499), class_names=CLASSES)
    write_model_folder(static / "teacher", denoiser.describe(), denoiser.state_dict(), teacher)
    write_model_folder(static / "generator", denoiser.describe(), denoiser.state_dict(), generator)
    shutil.copytree(static / "generator", subjects / "class-generator")
    network = edm_network(0)
    (subjects / "edm-pickle").mkdir()
    write_edm_pickle(subjects / "edm-pickle/net.pkl", network.state_dict(), edm_arguments(network.config))
    save_dmd2(subjects / "dmd2-folder/x_checkpoint_model_1", network, edm_network(1), head_for(network))


def _measures(static: Path, subjects: Path) -> None:
    import torch

    from fewstep.evaluation.features import SmallClassifier
    from fewstep.networks.inception import inception_state_dict_shapes

    torch.manual_seed(0)
    SmallClassifier(channels=1, num_classes=4, width=4, name="four").eval().save(static / "features")
    command("prepare", "statistics", static / "pictures", static / "reference.npz", "--features", static / "features",
            "--resolution", 16, "--channels", 1, "--device", "cpu")  # fmt: skip
    shutil.copytree(static / "features", subjects / "features")
    (subjects / "reference").mkdir()
    shutil.copyfile(static / "reference.npz", subjects / "reference/reference.npz")
    (subjects / "inception").mkdir()
    weights = {name: torch.full(shape, 0.01) for name, shape in inception_state_dict_shapes().items()}
    torch.save(weights, subjects / "inception/inception.pth")


def _weights(static: Path, subjects: Path) -> None:
    """Single file, LoRAs in three spellings, a network's state dict, and a text run's generator."""
    import torch
    from safetensors.torch import save_file

    import fewstep
    from fewstep.export.single_file import single_file_tensors
    from fewstep.formats.kohya_lora import lora_from_state, write_kohya_lora, write_peft_lora
    from fewstep.formats.model_folder import ModelCard
    from fewstep.networks.adapters import LoraShape, SharedBase

    teacher = fewstep.load_teacher(static / "sd", device="cpu")
    for name in ("single-file", "kohya-lora", "peft-lora", "peft-folder", "unet-bin"):
        (subjects / name).mkdir()
    generator = teacher.student(teacher.denoiser, ModelCard("generator", (999, 749, 499, 249)))
    whole = {name: value.contiguous() for name, value in single_file_tensors(generator).items()}
    save_file(whole, subjects / "single-file/model.safetensors")
    torch.save({name: value.half() for name, value in teacher.denoiser.network.state_dict().items()},
               subjects / "unet-bin/dmd2_4step_unet.bin")  # fmt: skip
    generator.write(subjects / "text-network/generator")
    teacher = fewstep.load_teacher(static / "sd", device="cpu")
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    lora = lora_from_state(role.adapter_state(), 4, 8.0)
    write_kohya_lora(subjects / "kohya-lora/lora.safetensors", lora, {})
    write_peft_lora(subjects / "peft-lora/lora.safetensors", lora, "unet", {})
    write_peft_lora(subjects / "peft-folder/adapter_model.safetensors", lora, "unet", {})
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "target_modules": ["to_q"], "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "lora_dropout": 0.0, "base_model_name_or_path": None,
        "modules_to_save": None, "layers_to_transform": None, "fan_in_fan_out": False,
    }  # fmt: skip
    (subjects / "peft-folder/adapter_config.json").write_text(json.dumps(config))
    teacher.student(role, ModelCard("generator", (999, 749, 499, 249))).write(subjects / "text-lora/generator")


def _data(static: Path, subjects: Path) -> None:
    """Pictures with labels and captions in every layout, and prompt lists."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    from tests.data.test_captioned_images import png, write_folder, write_parquet, write_tar

    captions = list(PROMPTS)
    write_folder(subjects / "captions-jsonl", captions)
    (subjects / "captions-tar").mkdir()
    write_tar(subjects / "captions-tar/000.tar", captions)
    (subjects / "captions-parquet").mkdir()
    write_parquet(subjects / "captions-parquet/data.parquet", captions)
    beside = subjects / "captions-beside"
    beside.mkdir()
    for number, caption in enumerate(captions):
        (beside / f"{number}.png").write_bytes(png(60 * number))
        (beside / f"{number}.txt").write_text(caption)
    labelled = write_folder(subjects / "labels-jsonl", captions)
    rows = [{"file_name": f"{number:03d}.png", "label": number} for number in range(4)]
    (labelled / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = write_folder(subjects / "labels-csv", captions)
    (table / "metadata.jsonl").unlink()
    (table / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n:03d}.png,{n}\n" for n in range(4)))
    (subjects / "labels-parquet").mkdir()
    found = {"image": [{"bytes": png(60 * n), "path": None} for n in range(4)], "label": [0, 1, 2, 3]}
    datasets.Dataset.from_dict(found).cast_column("image", datasets.Image()).to_parquet(
        subjects / "labels-parquet/data.parquet"
    )
    for kind in ("txt", "jsonl", "csv", "parquet", "pkl"):
        (subjects / f"prompts-{kind}").mkdir()
    (subjects / "prompts-txt/p.txt").write_text("\n".join(PROMPTS))
    (subjects / "prompts-jsonl/p.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in PROMPTS))
    (subjects / "prompts-csv/p.csv").write_text("text\n" + "".join(p + "\n" for p in PROMPTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": list(PROMPTS)}), subjects / "prompts-parquet/p.parquet")
    (subjects / "prompts-pkl/p.pkl").write_bytes(pickle.dumps(list(PROMPTS), protocol=2))
    (subjects / "picture").mkdir()
    for number in range(4):
        (subjects / f"picture/{number}.bmp").write_bytes(png(60 * number))


def _prepared(static: Path, subjects: Path) -> None:
    """What `prepare` writes, unfinished where a command goes on with it."""
    from fewstep.formats.lmdb import LATENTS
    from tests.formats.test_lmdb import arrays_of
    from tests.lmdb_files import write_lmdb

    def twice(name: str, *arguments: object) -> None:
        command("prepare", *arguments)
        shutil.copytree(subjects / name, subjects / f"{name}-again")

    twice("pairs", "pairs", static / "teacher", subjects / "pairs", "--num-pairs", 4, "--teacher-steps", 2, "--device",
          "cpu")  # fmt: skip
    twice("latents", "latents", static / "sd", subjects / "latents", "--images", subjects / "captions-jsonl",
          "--resolution", 16, "--device", "cpu")  # fmt: skip
    twice("embeddings", "embeddings", static / "sd", static / "prompts.txt", subjects / "embeddings", "--device", "cpu")
    shutil.copytree(subjects / "latents", static / "latents")
    write_lmdb(subjects / "lmdb" / "set", arrays_of(LATENTS))


def _runs(static: Path, subjects: Path) -> None:
    """A run of classes and one of text, after two steps."""
    for name, recipe in (("class-run", CLASS_RECIPE), ("text-run", TEXT_RECIPE)):
        values = {"static": static, "folder": subjects / name, "latents": static / "latents"}
        (static / f"{name}.toml").write_text(recipe.format(**values))
        command("train", static / f"{name}.toml")
        (subjects / name / ".lock").unlink(missing_ok=True)
        shutil.copytree(subjects / name, subjects / (f"{name}-report" if name == "class-run" else f"{name}-export"))
        (subjects / f"{name}-recipe").mkdir()
        (subjects / f"{name}-recipe/recipe.toml").write_text(
            recipe.format(**{**values, "folder": "unused"}).strip() + "\n"
        )


def subjects_of(static: Path) -> list[Subject]:
    """Every kind of file with the command that reads it."""

    def convert(name: str, base: str = "", steps: str = FOUR) -> Subject:
        files = {"single-file": "model.safetensors", "edm-pickle": "net.pkl", "unet-bin": "dmd2_4step_unet.bin"}
        files |= {"kohya-lora": "lora.safetensors", "peft-lora": "lora.safetensors"}
        place = files.get(name, "x_checkpoint_model_1" if name == "dmd2-folder" else "")

        def arguments(copy: Path, out: Path) -> list[object]:
            more = [*(("--base", static / base) if base else ()), *(("--step-indices", steps) if steps else ())]
            return ["convert", copy / place, out / "model", *more]

        return Subject(name, arguments)

    def sample(name: str, *more: object, place: str = "") -> Subject:
        return Subject(name, lambda copy, out: ["sample", copy / place, "--grid", out / "g.png", *more, *SAMPLE])

    def latents(name: str) -> Subject:
        return Subject(name, lambda copy, out: [
            "prepare", "latents", static / "sd", out / "latents", "--images", copy, "--resolution", 16, "--device", "cpu",
        ])  # fmt: skip

    def pictures(name: str) -> Subject:
        return Subject(name, lambda copy, out: [
            "train", static / "class-run.toml", f"data.images={copy}", f"run.folder={out}/run", "training.num_steps=1",
            "data.fit=pad", "best.features=", "best.reference=",
        ])  # fmt: skip

    def prompts(kind: str) -> Subject:
        return Subject(f"prompts-{kind}", lambda copy, out: [
            "sample", static / "sd", "--prompts", copy / f"p.{kind}", "--teacher-steps", 1, "--grid", out / "g.png", *SAMPLE,
        ])  # fmt: skip

    def train(name: str, recipe: str, *changes: str, patterns: tuple[str, ...] = ("**/*",)) -> Subject:
        return Subject(name, lambda copy, out: [
            "train", static / f"{recipe}.toml", "training.num_steps=3",
            *(change.format(copy=copy, out=out) for change in changes),
        ], patterns)  # fmt: skip

    guided = ("--prompt", "cat", "--teacher-steps", 2)
    measure = ("--num-images", 4, "--device", "cpu", "--precision", "fp32")
    return [
        sample("sd", *guided), sample("sdxl", *guided), sample("sd3", *guided),
        sample("class-generator", "--num-images", 2),
        sample("text-network", "--prompt", "cat", place="generator"), sample("text-lora", "--prompt", "cat", place="generator"),
        Subject("taesd", lambda copy, out: ["sample", static / "sd", *guided, "--tiny-vae", copy / "taesd", "--grid", out / "g.png", *SAMPLE]),
        convert("edm-pickle", steps=""), convert("dmd2-folder", steps=""), convert("single-file", "sd", steps=""),
        convert("kohya-lora", "sd"), convert("peft-lora", "sd"), convert("peft-folder", "sd"), convert("unet-bin", "sd"),
        Subject("features", lambda copy, out: [
            "evaluate", static / "generator", "--features", copy, "--reference", static / "reference.npz", *measure]),
        Subject("reference", lambda copy, out: [
            "evaluate", static / "generator", "--features", static / "features", "--reference", copy / "reference.npz", *measure]),
        Subject("inception", lambda copy, out: [
            "prepare", "statistics", static / "pictures", out / "x.npz", "--features", copy / "inception.pth", "--resolution", 16,
            "--device", "cpu"], most=20),
        Subject("picture", lambda copy, out: [
            "prepare", "statistics", copy, out / "x.npz", "--features", static / "features", "--resolution", 16,
            "--channels", 1, "--device", "cpu"]),
        latents("captions-jsonl"), latents("captions-tar"), latents("captions-parquet"), latents("captions-beside"),
        pictures("labels-jsonl"), pictures("labels-csv"), pictures("labels-parquet"),
        *[prompts(kind) for kind in ("txt", "jsonl", "csv", "parquet", "pkl")],
        Subject("pairs", lambda copy, out: [
            "prepare", "pairs", static / "teacher", copy, "--num-pairs", 4, "--teacher-steps", 2, "--device", "cpu"]),
        train("pairs-again", "class-run", "data.pairs={copy}", "losses.regression_weight=1", "run.folder={out}/run",
              "training.num_steps=1", "best.features=", "best.reference="),
        Subject("latents", lambda copy, out: [
            "prepare", "latents", static / "sd", copy, "--images", static.parent / "subjects/captions-jsonl", "--resolution", 16,
            "--device", "cpu"]),
        train("latents-again", "text-run", "data.latents={copy}", "run.folder={out}/run", "training.num_steps=1"),
        Subject("embeddings", lambda copy, out: [
            "prepare", "embeddings", static / "sd", static / "prompts.txt", copy, "--device", "cpu"]),
        train("embeddings-again", "text-run", "data.prompts={copy}", "run.folder={out}/run", "training.num_steps=1"),
        Subject("lmdb", lambda copy, out: [
            "prepare", "latents", static / "sd", out / "latents", "--from-lmdb", copy / "set", "--device", "cpu"]),
        train("class-run", "class-run", "run.folder={copy}", patterns=CONTINUED),
        train("text-run", "text-run", "run.folder={copy}", patterns=CONTINUED),
        Subject("class-run-report", lambda copy, out: ["report", copy, "--out", out / "r.html"], ("*.json", "*.jsonl")),
        Subject("text-run-export", lambda copy, out: [
            "export", copy, out / "e", "--as", "lora", "--num-samples", 1, "--device", "cpu"], ("settings.json", "generator/*")),
        Subject("class-run-recipe", lambda copy, out: ["train", copy / "recipe.toml", f"run.folder={out}/run", "--dry-run"]),
        Subject("text-run-recipe", lambda copy, out: ["train", copy / "recipe.toml", f"run.folder={out}/run", "--dry-run"]),
    ]  # fmt: skip
