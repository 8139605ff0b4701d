"""Frechet distance, precision and recall of a class-conditional generator against real pictures.

python examples/evaluate_generator.py runs/quickstart bundled:fashion-mnist data/fashion-mnist --num-images 5000
"""

import argparse

import fewstep
from fewstep.data.images import load_images
from fewstep.evaluation.features import load_features
from fewstep.evaluation.measure import dataset_features, measure_model
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.settings import DataSettings, parse_settings


def main(arguments: list[str] | None = None) -> None:
    """One line with everything that is needed to repeat it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", help="run folder or generator folder")
    parser.add_argument("features", help="bundled:NAME, folder of `fewstep prepare features`, or an Inception file")
    parser.add_argument("images", help="real pictures: folder, parquet or hub id")
    parser.add_argument("--num-images", type=int, default=5000, help="generated ones; published figures use 50000")
    args = parser.parse_args(arguments)
    generator = fewstep.load_generator(args.generator)
    channels, resolution, _ = generator.picture_shape
    settings = parse_settings(DataSettings, {"images": args.images}, "command line")
    pictures = load_images(settings, resolution=resolution, channels=channels, num_classes=0)  # labels are not needed
    network = load_features(args.features, generator.device)
    real = dataset_features(network, pictures, device=generator.device)
    figure = measure_model(
        generator, args.generator, network, FeatureStatistics.of(real), num_images=args.num_images, seed=0,
        real_features=real,
    )  # fmt: skip
    print(figure.sentence())


if __name__ == "__main__":
    main()
