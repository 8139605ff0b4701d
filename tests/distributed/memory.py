"""One process of the memory test: the peak of live tensor bytes of a small network's steps, as tests/estimate/memory_cases.py measures it.

python -m tests.distributed.memory OUT MODE SIZE BATCH
"""

import sys
from pathlib import Path

import torch

from fewstep.parallel import joined, rank
from tests.estimate.memory_cases import case_settings, measured_peak


def main(out: Path, mode: str, size: str, batch: int) -> None:
    torch.set_num_threads(1)
    with joined("cpu"):
        peak = measured_peak(case_settings(mode, batch), size)
        (out / f"peak-{rank()}").write_text(str(peak), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
