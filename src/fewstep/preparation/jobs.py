"""`fewstep prepare pairs`, `features` and `statistics` from their options on: something to load, work with progress, a line."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fewstep.data.images import ImageDataset, load_images
from fewstep.data.look import look_at_pictures
from fewstep.data.noise_image_pairs import PROMPT_EMBEDDINGS
from fewstep.data.prompts import load_prompts
from fewstep.data.tables import has_split
from fewstep.devices import choose_device, choose_precision, precision_of
from fewstep.diffusion.condition import ConditionTable
from fewstep.errors import UserError
from fewstep.evaluation.asked import refuse_no_place
from fewstep.evaluation.feature_cache import weights_digest
from fewstep.evaluation.features import load_features
from fewstep.evaluation.measure import dataset_features
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.families.registry import LARGEST, largest_side
from fewstep.formats.remote import data_path
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.parallel import agreed, joined
from fewstep.preparation.embeddings import prepare_embeddings
from fewstep.preparation.features import accuracy, train_feature_network
from fewstep.preparation.pairs import prepare_pairs
from fewstep.preparation.stored_prompts import stored_prompts
from fewstep.progress import Stderr, busy, say, working
from fewstep.settings import DataSettings, parse_settings
from fewstep.shared_work import refuse_differences

console = Stderr()
NEW_NETWORK = "small"  # of own pictures' recipes, whose size features should have


@dataclass(frozen=True)
class PairsOptions:
    """The options of `fewstep prepare pairs`, as its help says."""

    num_pairs: int = 25_000
    prompts: str = ""
    truncate: bool = False
    seed: int = 0
    teacher_steps: int | None = None
    guidance_scale: float = 1.0
    batch_size: int | None = None
    loras: tuple[str, ...] = ()
    device: str = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class PicturesOptions:
    """Which pictures, and how they come to one size; 0 of resolution and channels is what follows from the pictures."""

    images: str
    split: str = "train"
    resolution: int = 0
    channels: int = 0
    fit: str = "crop"
    background: str = "white"

    def open(self, split: str = "", num_classes: int = 0) -> ImageDataset:
        """The pictures, of this split or another one."""
        settings = self.settings(split)
        return load_images(settings, resolution=self.resolution, channels=self.channels, num_classes=num_classes)

    def settings(self, split: str = "") -> DataSettings:
        """Where they are and how they are fitted."""
        values = {"images": self.images, "split": split or self.split, "fit": self.fit, "background": self.background}
        return parse_settings(DataSettings, values, "command line")


@dataclass(frozen=True)
class FeaturesOptions:
    """The options of `fewstep prepare features`, as its help says."""

    pictures: PicturesOptions
    num_classes: int = 0
    num_passes: int = 6
    flip: bool = False
    seed: int = 0
    name: str = "classifier"
    device: str = "auto"


def make_pairs(teacher: str, folder: Path, options: PairsOptions) -> None:
    """Sample noise-image pairs, in as many processes as torchrun started; an interrupted job in the folder is continued.

    Raises:
        UserError: options that do not go together, no such teacher, a folder of other pairs.
    """
    with joined(options.device):
        _make_pairs(teacher, folder, options)


def _make_pairs(teacher: str, folder: Path, options: PairsOptions) -> None:
    """`make_pairs` in one of its processes."""
    precision = agreed(precision_of(options.precision, options.device, partial(say, console)))
    with busy(console, f"Loading the teacher {teacher}"):
        model = load_teacher(teacher, device=options.device, precision=precision, loras=options.loras)
    refuse_differences(f"{teacher} {model.fingerprint} {options}", "teachers or options")
    conditions = model.conditioner.every
    if conditions is None:
        conditions = _pair_prompts(model, folder, options)
    elif options.prompts or options.truncate:
        raise UserError("--prompts and --truncate-prompts are for text-to-image teachers; this one has classes")
    with working(console, f"Making {options.num_pairs:,} pairs") as report:
        prepare_pairs(
            model, teacher, folder, num_pairs=options.num_pairs, seed=options.seed, num_steps=options.teacher_steps,
            guidance_scale=options.guidance_scale, batch_size=options.batch_size or model.family.default_batch_size,
            conditions=conditions, report=report,
        )  # fmt: skip
    print(folder)


def _pair_prompts(teacher: Model, folder: Path, options: PairsOptions) -> ConditionTable:
    """The prompts that pairs are made of; their embeddings are stored beside the pairs."""
    if not options.prompts:
        raise UserError("pairs of a text-to-image teacher need --prompts FILE")
    target, prompts = folder / PROMPT_EMBEDDINGS, load_prompts(options.prompts)
    with busy(console, "Loading the text encoders"):
        encoders = teacher.conditioner.encoders
    with working(console, f"Embedding {len(prompts):,} prompts") as report:
        prepare_embeddings(
            encoders, prompts, target, truncate=options.truncate, cut_with="--truncate-prompts",
            spare_with="give a shorter list: pairs draw their prompts from it", report=report,
        )  # fmt: skip
    return stored_prompts(teacher, target)


def make_features(folder: Path, options: FeaturesOptions) -> None:
    """Train a feature network on the split `train`, say its accuracy on `test` where there is one.

    Raises:
        UserError: pictures that are not there, without labels, or of other classes.
    """
    options = _settled(options)
    dataset = options.pictures.open("train", options.num_classes)
    precision = choose_precision("auto", choose_device(options.device), partial(say, console))
    with working(console, f"Training {options.num_passes} passes over {len(dataset):,} pictures") as report:
        model = train_feature_network(
            dataset, folder, num_classes=options.num_classes, num_passes=options.num_passes, flip=options.flip,
            seed=options.seed, device=options.device, name=options.name, precision=precision, report=report,
        )  # fmt: skip
    place = data_path(options.pictures.images)
    if place.exists() and not has_split(place, "test"):
        say(console, "no split `test`: accuracy on unseen pictures is not known")
    else:
        test = options.pictures.open("test", options.num_classes)
        test.label_as(dataset.class_names or (), "those of split train")
        with busy(console, f"Testing on {len(test):,} pictures"):
            right = accuracy(model, test)
        say(console, f"accuracy on the {len(test)} pictures of split test: {right:.4f}")
    print(folder)


def _settled(options: FeaturesOptions) -> FeaturesOptions:
    """The options with the size, colour and classes that `pretrain` would find, where they are not set.

    Raises:
        UserError: no classes, or pictures that are too small.
    """
    pictures = options.pictures
    if pictures.resolution and pictures.channels and options.num_classes:
        return options
    look = look_at_pictures(pictures.settings("train"))
    classes, channels = options.num_classes or look.num_classes, pictures.channels or look.channels
    if classes < 2:
        raise UserError(
            f"{pictures.images}: a feature network needs pictures of two classes or more, one folder a class"
            + f"; {look.unlabelled}" * bool(look.unlabelled)
        )
    side = pictures.resolution or largest_side(NEW_NETWORK, look.shortest_side, channels, classes)
    if not side:
        raise UserError(f"{pictures.images}: the smallest picture has {look.shortest_side} pixels: set --resolution")
    say(
        console,
        f"{pictures.images}: {classes} classes, {side}x{side}x{channels}, as `fewstep pretrain` would read them",
    )
    return replace(options, num_classes=classes, pictures=replace(pictures, resolution=side, channels=channels))


def make_statistics(out: Path, features: str, pictures: PicturesOptions, device: str) -> None:
    """Write the feature statistics of real pictures as .npz.

    Raises:
        UserError: features or pictures that are not there, a place that cannot be written.
    """
    refuse_no_place("prepare statistics", out)
    place = choose_device(device)
    with busy(console, f"Loading the features {features}"):
        network = load_features(features, place)
    pictures = replace(
        pictures, resolution=pictures.resolution or getattr(network, "resolution", 0) or LARGEST,
        channels=pictures.channels or getattr(network, "channels", 3),
    )  # fmt: skip
    dataset = pictures.open()
    with working(console, f"Features of {len(dataset):,} pictures") as report:
        statistics = FeatureStatistics.of(dataset_features(network, dataset, device=place, report=report))
    replace(statistics, weights=weights_digest(network)).save(out)
    size = f"{pictures.resolution}x{pictures.resolution}x{pictures.channels}"
    print(f"{out}: {statistics.num_images} images of {size}, features {network.name}")
