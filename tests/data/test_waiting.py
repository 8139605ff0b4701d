"""What a step waits for on the host is counted wherever data are read, and what was read ahead is not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data import waiting
from fewstep.data.images import ImageBatches
from fewstep.data.latents import EMBEDDINGS, StoredEmbeddings
from fewstep.data.noise_image_pairs import NoiseImagePairs
from fewstep.data.waiting import WAITING
from fewstep.training.text_data import RealLatents
from tests.data.test_latents import write_folder


class Slow:
    """Pictures that take a second to read, on a clock of their own."""

    labels = None

    def __init__(self, in_memory: bool) -> None:
        self.in_memory, self.now = in_memory, 0.0

    def __len__(self) -> int:
        return 5

    def perf_counter(self) -> float:
        return self.now

    def pixels(self, rows: Tensor) -> Tensor:
        self.now += 1
        return torch.zeros(len(rows), 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(("in_memory", "seconds"), [(True, 2.0), (False, 1.0)])
def test_what_is_read_ahead_is_no_waiting(in_memory: bool, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: Any = Slow(in_memory)
    monkeypatch.setattr(waiting, "time", pictures)
    batches, before = ImageBatches(pictures, 0, 2, flip=False), WAITING.seconds
    batches.at(0, "cpu")
    if batches._ahead is not None:
        batches._ahead[1].result()
    batches.at(1, "cpu")
    assert WAITING.seconds - before == seconds


class Latents:
    """As many as are read in the test, and more."""

    def __len__(self) -> int:
        return 7

    def drawn(self, index: Tensor, draws: Any) -> Tensor:
        return torch.zeros(len(index), 4, 2, 2)


def test_every_other_reading_counts(tmp_path: Path) -> None:
    pairs = NoiseImagePairs.__new__(NoiseImagePairs)
    pairs.noise, pairs.images, pairs.labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2), torch.zeros(3)
    embeddings = StoredEmbeddings(write_folder(tmp_path, EMBEDDINGS))
    captions = SimpleNamespace(rows=lambda index, device: None)
    latents = RealLatents(Latents(), captions, 0, 2)  # type: ignore[arg-type]
    two = torch.tensor([0, 1])
    for read in (
        lambda: pairs.rows(two), lambda: embeddings.rows(two), lambda: latents.at(0, torch.device("cpu"))
    ):  # fmt: skip
        before = WAITING.seconds
        read()
        assert WAITING.seconds > before
