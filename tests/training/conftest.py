"""What all tests of training take for granted."""

from collections.abc import Iterator

import pytest

from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.edm.family import EDMFamily
from fewstep.training import run_folder


@pytest.fixture(autouse=True)
def _few_steps_for_the_teachers_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures of the teacher are most of a short run's time; how many steps they take is tested elsewhere."""
    for family in (DiffusersFamily, EDMFamily):
        monkeypatch.setattr(family, "default_num_steps", 3)


@pytest.fixture(autouse=True)
def _no_lock_is_left() -> Iterator[None]:
    """Run folders that a test claimed and did not train in."""
    yield
    for folder in list(run_folder._held):
        run_folder.release(folder)
