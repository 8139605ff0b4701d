"""Frechet distance between two statistics files of `fewstep prepare statistics`, e.g. held-out against training pictures.

python examples/compare_statistics.py runs/cifar10_test.npz runs/cifar10_train.npz
"""

import sys
from pathlib import Path

from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance


def main(first: str, second: str) -> None:
    """Print the distance with the number of pictures behind each side."""
    a, b = FeatureStatistics.load(Path(first)), FeatureStatistics.load(Path(second))
    print(f"Frechet distance {frechet_distance(a, b):.3f} ({a.num_images} against {b.num_images} pictures)")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/compare_statistics.py A.npz B.npz")
    main(sys.argv[1], sys.argv[2])
