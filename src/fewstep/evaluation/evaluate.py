"""`fewstep evaluate` from its options on: one figure with everything beside it."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.images import load_images
from fewstep.devices import precision_of
from fewstep.errors import UserError
from fewstep.evaluation.features import FeatureNetwork, load_features
from fewstep.evaluation.measure import dataset_features, measure_model
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.atomic import replaced_file
from fewstep.models.load import load_model
from fewstep.models.model import Model
from fewstep.progress import Stderr, busy, say, working
from fewstep.settings import DataSettings, parse_settings

console = Stderr()


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `fewstep evaluate`, as its help says; empty text and None are "not given"."""

    features: str
    reference: Path | None = None
    images: str = ""
    split: str = "train"
    fit: str = "crop"
    background: str = "white"
    prompts: tuple[str, ...] = ()
    num_images: int = 50_000
    seed: int = 0
    batch_size: int | None = None
    teacher_steps: int | None = None
    guidance_scale: float | None = None
    json_out: Path | None = None
    device: str = "auto"
    precision: str = "auto"


def evaluate_model(source: str, options: EvaluateOptions) -> None:
    """Measure a model, print the figure as a sentence, write it as JSON where that was asked for.

    Raises:
        UserError: options, model, features and real pictures that are not there or do not go together.
    """
    if options.reference is None and not options.images:
        raise UserError("evaluate compares with real pictures: give --reference FILE.npz, --images FOLDER, or both")
    if options.json_out is not None and not options.json_out.absolute().parent.is_dir():
        raise UserError(
            f"--json {options.json_out}: the folder {options.json_out.parent} does not exist; make it first"
        )
    precision = precision_of(options.precision, options.device, partial(say, console))
    with busy(console, f"Loading {source}"):
        model = load_model(source, device=options.device, precision=precision)
        network = load_features(options.features, model.device)
    _refuse_what_does_not_fit(source, model, options)
    real = _real_features(model, network, options) if options.images else None
    statistics = _reference(model, network, options, real)
    for line in model.conditioner.warnings(options.prompts):
        say(console, line)
    with working(console, f"Measuring {options.num_images:,} pictures") as report:
        figure = measure_model(
            model, source, network, statistics, num_images=options.num_images, seed=options.seed,
            prompts=list(options.prompts), num_steps=options.teacher_steps, guidance_scale=options.guidance_scale,
            real_features=None if real is None else real[: options.num_images],
            batch_size=options.batch_size or model.family.default_batch_size, report=report,
        )  # fmt: skip
    print(figure.sentence())
    for line in figure.cautions():
        say(console, line)
    if options.json_out is not None:
        with replaced_file(options.json_out) as aside:
            aside.write_text(json.dumps(figure.to_dict(), indent=1), encoding="utf-8")


def _refuse_what_does_not_fit(source: str, model: Model, options: EvaluateOptions) -> None:
    if (model.conditioner.takes == "prompts") != bool(options.prompts):
        raise UserError(f"{source}: text-to-image models are measured with --prompts FILE, all others without")
    if options.guidance_scale is not None and model.is_generator:
        raise UserError(
            f"--guidance-scale {options.guidance_scale}: a generator has its guidance built in; leave it out"
        )


def _real_features(model: Model, network: FeatureNetwork, options: EvaluateOptions) -> Tensor:
    channels, resolution, _ = model.picture_shape
    place = {"images": options.images, "split": options.split, "fit": options.fit, "background": options.background}
    settings = parse_settings(DataSettings, place, "command line")
    dataset = load_images(settings, resolution=resolution, channels=channels, num_classes=0)
    with working(console, f"Features of {len(dataset):,} real pictures") as report:
        return dataset_features(network, dataset, device=model.device, report=report)


def _reference(
    model: Model, network: FeatureNetwork, options: EvaluateOptions, real: Tensor | None
) -> FeatureStatistics:
    """The statistics of real pictures, which must be of this feature network."""
    if options.reference is None:
        assert real is not None
        return FeatureStatistics.of(real)
    statistics = FeatureStatistics.load(options.reference)
    probe = network(torch.zeros(1, *model.picture_shape, device=model.device)).shape[1]
    if probe != len(statistics.mean):
        raise UserError(
            f"--reference {options.reference} has {len(statistics.mean)} features, {network.name} has {probe}: "
            "it was made with another feature network"
        )
    return statistics
