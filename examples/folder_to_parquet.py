"""Turn a folder of pictures into parquet files, one a split, which open in seconds instead of minutes.

python examples/folder_to_parquet.py data/cifar10 data/cifar10-parquet
fewstep train recipes/cifar10_small_dmd2.toml data.images=data/cifar10-parquet
"""

import sys
from pathlib import Path
from typing import Any

import datasets


def with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    """The picture's file content in place of its path, so that the parquet file stands alone."""
    path = Path(row["image"]["path"])
    return {"image": {"bytes": path.read_bytes(), "path": path.name}}


def main(source: str, target: str) -> None:
    """Write target/<split>.parquet with the pictures' own bytes inside."""
    for split, rows in datasets.load_dataset("imagefolder", data_dir=source).items():
        path = Path(target) / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = rows.cast_column("image", datasets.Image(decode=False)).map(with_bytes)
        rows.cast_column("image", datasets.Image()).to_parquet(path)
        print(f"{path}: {len(rows)} pictures, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
