"""Models that the tests of the page share."""

import asyncio
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

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
