"""What the commands of `cli.py` do once their arguments are read: load, run, write, print."""

import json
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fewstep.data.images import ImageDataset, load_images
from fewstep.data.listing import has_split
from fewstep.data.tables import parquet_files
from fewstep.devices import choose_device, choose_precision
from fewstep.errors import UserError
from fewstep.evaluation.features import load_features
from fewstep.evaluation.measure import dataset_features, measure_model
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.atomic import replaced_file
from fewstep.models.load import load_model, load_teacher
from fewstep.preparation.features import accuracy, train_feature_network
from fewstep.preparation.pairs import prepare_pairs
from fewstep.progress import say
from fewstep.settings import DataSettings, parse_settings

console = Console(stderr=True)


def evaluate_model(
    source: str, features: str, reference: Path | None, images: str, split: str, fit: str, num_images: int, seed: int,
    batch_size: int | None, teacher_steps: int | None, guidance_scale: float | None, json_out: Path | None, device: str,
    precision: str, prompts: list[str],
) -> None:  # fmt: skip
    """`fewstep evaluate`: one figure with everything beside it."""
    if reference is None and not images:
        raise UserError("evaluate compares with real pictures: give --reference FILE.npz, --images FOLDER, or both")
    model = load_model(source, device=device, precision=_precision(precision, device))
    if (model.conditioner.takes == "prompts") != bool(prompts):
        raise UserError(f"{source}: text-to-image models are measured with --prompts FILE, all others without")
    if guidance_scale is not None and model.is_generator:
        raise UserError(f"--guidance-scale {guidance_scale}: a generator has its guidance built in; leave it out")
    network = load_features(features, model.device)
    real = None
    if images:
        channels, resolution, _ = model.picture_shape
        dataset = _open(images, split, fit, resolution, channels)
        real = dataset_features(network, dataset, device=model.device)
    statistics = FeatureStatistics.load(reference) if reference is not None else FeatureStatistics.of(real)  # type: ignore[arg-type]
    if json_out is not None and not json_out.parent.is_dir():
        raise UserError(f"--json {json_out}: the folder {json_out.parent} does not exist; make it first")
    probe = network(torch.zeros(1, *model.picture_shape, device=model.device)).shape[1]
    if probe != len(statistics.mean):
        raise UserError(
            f"--reference {reference} has {len(statistics.mean)} features, {network.name} has {probe}: "
            "it was made with another feature network"
        )
    for line in model.conditioner.warnings(prompts):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    figure = measure_model(
        model, source, network, statistics, num_images=num_images, seed=seed, prompts=prompts, num_steps=teacher_steps,
        guidance_scale=guidance_scale, real_features=None if real is None else real[:num_images],
        batch_size=batch_size or model.family.default_batch_size,
    )  # fmt: skip
    print(figure.sentence())
    for line in figure.cautions():
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if json_out is not None:
        with replaced_file(json_out) as aside:
            aside.write_text(json.dumps(figure.to_dict(), indent=1), encoding="utf-8")


def make_pairs(
    teacher: str, folder: Path, num_pairs: int, seed: int, teacher_steps: int | None, guidance_scale: float,
    batch_size: int | None, device: str, precision: str, prompts: str, truncate: bool = False,
) -> None:  # fmt: skip
    """`fewstep prepare pairs`."""
    model = load_teacher(teacher, device=device, precision=_precision(precision, device))
    conditions = model.conditioner.every
    if conditions is None:
        from fewstep.cli.commands_text import pair_prompts

        conditions = pair_prompts(model, prompts, folder, truncate)
    elif prompts or truncate:
        raise UserError("--prompts and --truncate-prompts are for text-to-image teachers; this one has classes")
    started = time.perf_counter()

    def report(done: int, total: int) -> None:
        console.print(f"{done} of {total} pairs, {time.perf_counter() - started:.0f} s")

    print(prepare_pairs(
        model, teacher, folder, num_pairs=num_pairs, seed=seed, num_steps=teacher_steps, guidance_scale=guidance_scale,
        batch_size=batch_size or model.family.default_batch_size, conditions=conditions, report=report,
    ))  # fmt: skip


def make_features(
    images: str, folder: Path, num_classes: int, resolution: int, channels: int, fit: str, num_passes: int, flip: bool,
    seed: int, name: str, device: str,
) -> None:  # fmt: skip
    """`fewstep prepare features`: train on the split `train`, report the accuracy on `test` where there is one."""
    dataset = _open(images, "train", fit, resolution, channels, num_classes)
    model = train_feature_network(
        dataset, folder, num_classes=num_classes, num_passes=num_passes, flip=flip, seed=seed, device=device, name=name,
        report=lambda step, steps, loss: console.print(f"step {step} of {steps}: loss {loss:.3f}"),
    )  # fmt: skip
    place = Path(images).expanduser()
    if place.is_dir() and not (parquet_files(place) or has_split(place, "test")):
        console.print("no split `test`: accuracy on unseen pictures is not known")
    else:
        test = _open(images, "test", fit, resolution, channels, num_classes)
        console.print(f"accuracy on the {len(test)} pictures of split test: {accuracy(model, test):.4f}")
    print(folder)


def make_statistics(
    images: str, out: Path, features: str, split: str, resolution: int, channels: int, fit: str, device: str
) -> None:
    """`fewstep prepare statistics`."""
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the folder {out.parent} does not exist; make it first")
    place = choose_device(device)
    network = load_features(features, place)
    dataset = _open(images, split, fit, resolution, channels)
    statistics = FeatureStatistics.of(dataset_features(network, dataset, device=place))
    statistics.save(out)
    print(f"{out}: {statistics.num_images} images, features {network.name}")


def _open(images: str, split: str, fit: str, resolution: int, channels: int, num_classes: int = 0) -> ImageDataset:
    values = {"images": images, "split": split, "fit": fit}
    settings = parse_settings(DataSettings, values, "command line")
    return load_images(settings, resolution=resolution, channels=channels, num_classes=num_classes)


def _precision(name: str, device: str) -> str:
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {name}: choose auto, fp32 or bf16")
    return choose_precision(name, choose_device(device), partial(say, console))
