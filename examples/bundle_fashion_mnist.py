"""Make the files that ship for `fewstep quickstart` from the pictures and a finished teacher run.

    fewstep pretrain recipes/fashion_mnist_teacher.toml
    python examples/bundle_fashion_mnist.py data/fashion-mnist runs/fashion-mnist-teacher

Writes src/fewstep/assets/fashion-mnist: teacher (float16), feature network, a subset of the training pictures, the
feature statistics of all training and all test pictures, and the teacher's measured distance.
"""

import io
import json
import sys
from pathlib import Path

import datasets
import torch
from PIL import Image
from rich.console import Console

from fewstep.data.images import ImageDataset, load_images
from fewstep.demos.fashion_mnist import FACTS
from fewstep.evaluation.features import SmallClassifier, load_features
from fewstep.evaluation.measure import dataset_features, measure_model
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.model_folder import read_model_folder, write_model_folder
from fewstep.models.load import load_teacher
from fewstep.preparation.features import accuracy, train_feature_network
from fewstep.progress import lines
from fewstep.settings import DataSettings

ASSETS = Path(__file__).parents[1] / "src/fewstep/assets/fashion-mnist"
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
NUM_SUBSET, NUM_TEACHER_IMAGES = 7_000, 5_000


def open_split(data: str, split: str) -> ImageDataset:
    """One split, padded to 32x32 as the teacher was trained."""
    settings = DataSettings(images=data, split=split, fit="pad")
    return load_images(settings, resolution=32, channels=1, num_classes=10)


def bundle_teacher(run: Path) -> None:
    """The averaged teacher in float16."""
    description, weights, card = read_model_folder(run / "teacher")
    card = type(card)(**{**card.__dict__, "class_names": tuple(NAMES), "licence": "Apache-2.0"})
    write_model_folder(ASSETS / "teacher", description, weights, card, dtype=torch.float16)


def bundle_pictures(train: ImageDataset) -> None:
    """The first pictures of the training split at 28x28, lossless WebP in one parquet file."""
    rows = []
    for pixels, label in zip(train.pixels(torch.arange(NUM_SUBSET)), train.labels[:NUM_SUBSET].tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels[0, 2:30, 2:30].numpy()).save(buffer, format="WEBP", lossless=True, quality=100, method=6)
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(ASSETS / "train.parquet")


def main(data: str, run: str) -> None:
    """Make everything, print what a reader wants to know."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    train, test = open_split(data, "train"), open_split(data, "test")
    bundle_teacher(Path(run))
    bundle_pictures(train)
    train_feature_network(
        train, ASSETS / "features", num_classes=10, num_passes=6, name="fashion-mnist-classifier",
        report=lines(Console(stderr=True), "Training the feature network"),
    )  # fmt: skip
    network = load_features("bundled:fashion-mnist")
    assert isinstance(network, SmallClassifier)
    print(f"feature network: accuracy {accuracy(network, test):.4f} on the {len(test)} test pictures")
    reference = FeatureStatistics.of(dataset_features(network, train))
    reference.save(ASSETS / "reference_train.npz")
    FeatureStatistics.of(dataset_features(network, test)).save(ASSETS / "reference_test.npz")
    teacher = load_teacher("bundled:fashion-mnist", precision="auto")
    figure, on_curve = (
        measure_model(teacher, "teacher", network, reference, num_images=count, seed=0)
        for count in (NUM_TEACHER_IMAGES, FACTS.curve_images)
    )
    figures = {**figure.to_dict(), "on_curve": on_curve.to_dict()}
    (ASSETS / "teacher_measurement.json").write_text(json.dumps(figures, indent=1))
    print(figure.sentence())
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    print(f"{ASSETS}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
