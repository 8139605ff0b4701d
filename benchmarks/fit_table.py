"""Print the table of docs/memory.md that says which model trains on which card: a run's estimated peak by how its base is stored.

    PYTHONPATH=src python benchmarks/fit_table.py                     every model of the page's table
    PYTHONPATH=src python benchmarks/fit_table.py --models sdxl       one of them

DMD2 in four steps at batch 1: two LoRAs of rank 64 on one frozen base, bf16 inside the network, activations recomputed, prompts
encoded beforehand, no weight average, guided teacher, one sample picture. A cell is the largest of the generator's turn, the fake score's and the sample
pictures, in GiB, and in brackets the smallest card of 12, 16, 24, 48 and 80 GiB that has a tenth left free beside it. No GPU,
no weights and no data are needed: every figure is a run rehearsed on shapes (fewstep/estimate/memory.py).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewstep.estimate.calls import Calls
from fewstep.estimate.fits import FREE_SHARE
from fewstep.estimate.memory import estimate_run
from fewstep.families.registry import build_released, family_of
from fewstep.settings import TrainSettings, parse_settings

MODELS = {
    "sdxl": "SDXL", "sd35-medium": "SD 3.5 medium", "z-image": "Z-Image", "flux2-klein-4b": "FLUX.2 klein 4B",
    "qwen-image": "Qwen-Image",
}  # fmt: skip
RESOLUTIONS = (512, 1024)
BASES = ("bf16", "int8", "nf4")
CARDS_GIB = (12, 16, 24, 48, 80)
GAN = {"gan_weights": [5e-3, 1e-2]}
_GIB = 2**30


@dataclass(frozen=True)
class Column:
    """What the runs of a column have in common."""

    title: str
    gan: bool
    offload: bool = False


COLUMNS = (
    Column("without GAN", False), Column("with GAN", True),
    Column("without GAN, blocks offloaded", False, True), Column("with GAN, blocks offloaded", True, True),
)  # fmt: skip


def peak(model: str, resolution: int, base: str, column: Column, calls: Calls | None = None) -> int:
    """A run's estimated peak in bytes."""
    settings = parse_settings(
        TrainSettings,
        {
            "teacher": {"network": model, "guidance_scale": 4.0, "resolution": resolution},
            "generator": {"step_indices": [999, 749, 499, 249]},
            "memory": {
                "mode": "shared_base", "base": base, "checkpoint_activations": True,
                "teacher": "offloaded_blocks" if column.offload else "sharded",
            },
            "losses": GAN if column.gan else {},
            "training": {"batch_size": 1},
            "run": {"samples": [1000, 1]},
        },
        "table",
    )  # fmt: skip
    denoiser = build_released(model, resolution)
    vae: dict[str, Any] = dict(family_of(denoiser.describe()).autoencoder_config)
    return max(estimate_run(settings, denoiser, autoencoder=vae, calls=calls).peaks.values())


def cell(size: int) -> str:
    """GiB, and the smallest card with room to spare."""
    card = next((str(card) for card in CARDS_GIB if size <= card * (1 - FREE_SHARE) * _GIB), "none")
    return f"{size / _GIB:.1f} ({card})"


def header() -> Iterator[str]:
    """The table's first two lines."""
    yield f"| model | pictures | `memory.base` | {' | '.join(column.title for column in COLUMNS)} |"
    yield "| --- | --- | --- |" + " --- |" * len(COLUMNS)


def row(model: str, resolution: int, base: str, calls: Calls | None = None) -> str:
    """One line of the table."""
    cells = [cell(peak(model, resolution, base, column, calls)) for column in COLUMNS]
    return f"| {MODELS[model]} | {resolution}x{resolution} | {base} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    for line in header():
        print(line)
    for model in parser.parse_args().models:
        for resolution in RESOLUTIONS:
            calls = Calls()  # shapes of one resolution are the same in every storage
            for base in BASES:
                print(row(model, resolution, base, calls), flush=True)


if __name__ == "__main__":
    main()
