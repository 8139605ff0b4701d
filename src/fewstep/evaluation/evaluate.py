"""`fewstep evaluate` from its options on: one figure with everything beside it."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.devices import dtype_name, precision_of
from fewstep.errors import UserError
from fewstep.evaluation.asked import asked_for, refuse_no_place
from fewstep.evaluation.coco import CaptionedPictures, load_coco
from fewstep.evaluation.diversity import DiversityJudge
from fewstep.evaluation.feature_cache import network_digest, refuse_other_features
from fewstep.evaluation.features import FeatureNetwork, load_features
from fewstep.evaluation.measure import Clocked, Rows, figure_of, guidance_of, look
from fewstep.evaluation.measurement import DISTANCE, Measurement
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.evaluation.prompt_scores import TextMetric, TextScores, repeated_prompts
from fewstep.evaluation.protocols import Protocol, coco_figure, coco_look, protocol_named
from fewstep.evaluation.real_pictures import features_of_coco, features_of_images
from fewstep.evaluation.sampler import model_sampler
from fewstep.formats.atomic import replaced_file
from fewstep.formats.fingerprints import file_digest, tensors_digest
from fewstep.models.load import load_model
from fewstep.models.model import Model
from fewstep.parallel import agreed, joined, rank, world_size
from fewstep.progress import Stderr, busy, say, working
from fewstep.settings import DataSettings, parse_settings
from fewstep.shared_work import by_all, by_the_first, refuse_differences

if TYPE_CHECKING:
    from fewstep.evaluation.clip_score import ClipScore

console = Stderr()


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `fewstep evaluate`, as its help says; empty text and None are "not given"."""

    features: str
    protocol: str = "custom"
    reference: Path | None = None
    captions: Path | None = None
    images: str = ""
    split: str = "train"
    fit: str = "crop"
    background: str = "white"
    cache: bool = True
    prompts: tuple[str, ...] = ()
    clip: str = ""
    clip_prefix: str | None = None
    lpips: tuple[Path, Path] | None = None
    diversity_prompts: int = 100
    teacher: str = ""
    num_images: int | None = None
    seed: int = 0
    batch_size: int | None = None
    teacher_steps: int | None = None
    guidance_scale: float | None = None
    json_out: Path | None = None
    device: str = "auto"
    precision: str = "auto"


def evaluate_model(source: str, options: EvaluateOptions) -> None:
    """Measure a model, print the figure as a sentence, write it as JSON where that was asked for.

    As many processes as torchrun started share out the pictures batch by batch; the first computes the figure and speaks.

    Raises:
        UserError: options, model, features and real pictures that are not there or do not go together.
    """
    with joined(options.device):
        _evaluate(source, options)


def _evaluate(source: str, options: EvaluateOptions) -> None:
    """`evaluate_model` in one of its processes."""
    judge = Judge(options)
    refuse_differences(f"{__version__} {source} {judge.options}", "options")
    precision = agreed(precision_of(options.precision, options.device, partial(say, console)))
    with busy(console, f"Loading {source}"):
        model = load_model(source, device=options.device, precision=precision)
    figure = judge.figure(source, model)
    by_the_first(partial(_tell, figure, options.json_out))


def _tell(figure: Measurement | None, json_out: Path | None) -> None:
    """The sentence with its cautions, and the JSON."""
    assert figure is not None
    print(figure.sentence())
    for line in figure.cautions():
        say(console, line)
    if json_out is not None:
        with replaced_file(json_out) as aside:
            aside.write_text(json.dumps(figure.to_dict(), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class _Side:
    """What every model is compared with.

    Attributes:
        real: features (N, F) of real pictures, by the value that is computed from them; empty where there is a reference alone.
        reference: of what is no COCO protocol; only the first process has it.
    """

    network: FeatureNetwork
    clip: "ClipScore | None"
    real: Rows
    reference: FeatureStatistics | None

    @property
    def metrics(self) -> list[TextMetric]:
        """That read prompts."""
        return [] if self.clip is None else [self.clip]


class Judge:
    """Measures models of one size, one after the other, under one set of options; what they are compared with is made once.

    Raises:
        UserError: options that do not go together, real pictures that are not there.
    """

    def __init__(self, options: EvaluateOptions) -> None:
        self.protocol = protocol_named(options.protocol)
        by_the_first(partial(refuse_no_place, "--json", options.json_out))
        self.coco = by_all(partial(_checked_options, options, self.protocol))[rank()]
        self.options = options if self.coco is None else replace(options, prompts=tuple(self.coco.captions))
        self._side: _Side | None = None
        self._diversity = _diversity_judge(self.options)

    def figure(self, source: str, model: Model) -> Measurement | None:
        """What is found of a model, under the name that its user calls it by; None on other processes than the first.

        Raises:
            UserError: model, features and real pictures do not go together.
        """
        options, protocol = self.options, self.protocol
        _refuse_what_does_not_fit(source, model, options)
        if self._side is None:
            self._side = self._made_for(model)
        num_images = options.num_images or (50_000 if protocol is None else protocol.num_images)
        coco = protocol if self.coco is not None else None
        figure = _measure(source, model, self._side, options, coco, num_images)
        values = {} if self._diversity is None else self._diversity.values(model)
        if figure is None:
            return None
        guidance = guidance_of(model, options.guidance_scale)
        settings = {**asked_for(options, self._side.network, model), **guidance}
        figure = replace(figure.having(**values), dtype=dtype_name(model.denoiser.compute_dtype), settings=settings)
        if protocol is None:
            return figure
        clip = self._side.clip
        other = "" if clip is None else clip.difference(protocol.clip_prefix)
        return protocol.labelled(figure, _sha256(options.features), model.picture_shape, other)

    def _made_for(self, model: Model) -> _Side:
        """The networks that judge, and the real side, for models as this one; what its prompts are warned of is said."""
        options, protocol, device = self.options, self.protocol, model.device
        with busy(console, f"Loading {options.features}"):
            network = load_features(options.features, device)
        clip = _load_clip(options, protocol, device)
        if world_size() > 1:
            weights = tensors_digest(model.denoiser.state_dict()), network_digest(network), model.fingerprint
            refuse_differences(repr(weights), "weights")
        warnings = repeated_prompts(options.prompts) + model.conditioner.warnings(options.prompts)
        for line in warnings + ([] if clip is None else clip.warnings(options.prompts)):
            say(console, line)
        if protocol is not None and self.coco is not None:
            real = features_of_coco(protocol, self.coco, network, device, console, options.cache)
            return _Side(network, clip, real, None)
        real = {}
        if options.images:
            place = {
                "images": options.images,
                "split": options.split,
                "fit": options.fit,
                "background": options.background,
            }
            pictures = parse_settings(DataSettings, place, "command line")
            real[DISTANCE] = features_of_images(pictures, model.picture_shape, network, device, console, options.cache)
        reference = by_the_first(partial(_reference, model, network, options, real.get(DISTANCE)))
        return _Side(network, clip, real, reference)


def _diversity_judge(options: EvaluateOptions) -> DiversityJudge | None:
    if options.lpips is None:
        return None
    return DiversityJudge(
        options.lpips, options.teacher, options.batch_size, console, num_prompts=options.diversity_prompts,
        seed=options.seed, prompts=options.prompts, num_steps=options.teacher_steps,
        guidance_scale=options.guidance_scale,
    )  # fmt: skip


def _checked_options(options: EvaluateOptions, protocol: Protocol | None) -> CaptionedPictures | None:
    """Refuse options that do not go together; COCO's pictures where the protocol is of them."""
    if options.clip_prefix is not None and not options.clip:
        raise UserError(f"--clip-prefix {options.clip_prefix!r} belongs to --clip MODEL; name one")
    if options.teacher and options.lpips is None:
        raise UserError(f"--teacher {options.teacher} belongs to --lpips VGG16 HEADS; give both files")
    if protocol is not None and protocol.side:
        if options.captions is None or not options.images or options.reference is not None or options.prompts:
            raise UserError(
                f"--protocol {protocol.name} takes --captions captions_val2014.json and --images FOLDER of its pictures, "
                "neither --reference nor --prompts"
            )
        return load_coco(options.captions, Path(options.images).expanduser())
    if options.captions is not None:
        raise UserError("--captions belongs to the COCO protocols; name one with --protocol, or give --prompts FILE")
    if protocol is not None and (options.reference is None or options.images):
        raise UserError(f"--protocol {protocol.name} takes the published --reference FILE.npz and no --images")
    if options.reference is None and not options.images:
        raise UserError("evaluate compares with real pictures: give --reference FILE.npz, --images FOLDER, or both")
    return None


def _load_clip(options: EvaluateOptions, protocol: Protocol | None, device: torch.device) -> "ClipScore | None":
    """The score of `--clip`, under the prefix of the protocol unless one was given."""
    if not options.clip:
        return None
    from fewstep.evaluation.clip_score import ClipScore  # imports transformers: only where it is asked for
    from fewstep.networks.clip import load_clip

    default = "" if protocol is None else protocol.clip_prefix
    with busy(console, f"Loading {options.clip}"):
        clip = load_clip(options.clip).to(device)
    return ClipScore(clip, options.clip, default if options.clip_prefix is None else options.clip_prefix)


def _sha256(features: str) -> str:
    """Of a feature network's file; "" for a folder or one that ships."""
    path = Path(features).expanduser()
    return file_digest(path) if path.is_file() else ""


def _measure(
    source: str, model: Model, side: _Side, options: EvaluateOptions, coco: Protocol | None, num_images: int
) -> Measurement | None:
    """What the first process finds of pictures that all make; `coco`: the protocol, where it is one of COCO's."""
    sample, evaluations = model_sampler(
        model, options.seed, prompts=options.prompts, num_steps=options.teacher_steps,
        guidance_scale=options.guidance_scale,
    )  # fmt: skip
    scores = TextScores(side.metrics, options.prompts) if side.metrics else None
    size = options.batch_size or model.family.default_batch_size
    with working(console, f"Measuring {num_images:,} pictures") as report:
        pictures = Clocked(sample, num_images, size, report, world_size())
        if coco is not None:
            rows = pictures.seen(coco_look(coco, side.network, scores, model.device))
        else:
            rows = pictures.seen(look(side.network, scores, model.device))

    def figure() -> Measurement:
        facts: dict[str, Any] = {"evaluations_per_image": evaluations, "seed": options.seed, "scores": scores}
        speed = pictures.images_per_second
        if coco is not None:
            return coco_figure(coco, source, rows, side.real, side.network, speed, **facts)
        assert side.reference is not None
        real = side.real.get(DISTANCE)
        return figure_of(source, rows, side.network, side.reference, speed, real_features=real, resamples=20, **facts)

    with busy(console, "Computing the figures"):
        return by_the_first(figure)


def _refuse_what_does_not_fit(source: str, model: Model, options: EvaluateOptions) -> None:
    if (model.conditioner.takes == "prompts") != bool(options.prompts):
        raise UserError(f"{source}: text-to-image models are measured with --prompts FILE, all others without")
    if options.clip and not options.prompts:
        raise UserError(
            f"--clip {options.clip}: {source} has no prompts that a CLIP could compare pictures with; leave it out"
        )
    if options.guidance_scale is not None and model.is_generator and options.lpips is None:
        raise UserError(
            f"--guidance-scale {options.guidance_scale}: a generator has its guidance built in; leave it out"
        )


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
    refuse_other_features(statistics, network, f"--reference {options.reference}")
    return statistics
