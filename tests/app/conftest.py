"""Models that the tests of the page share."""

import asyncio
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.app.models import class_models, text_models


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Generator run, teacher, TAESD."""
    return text_models(tmp_path_factory.mktemp("app-text"))


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Generator, teacher."""
    return class_models(tmp_path_factory.mktemp("app-classes"))


@pytest.fixture
def _leftovers() -> Iterator[None]:
    """gradio leaves event loops unclosed; collected here, they are no other test's warning."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks are faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
