"""What all tests of training take for granted."""

import pytest

from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.edm.family import EDMFamily


@pytest.fixture(autouse=True)
def _few_steps_for_the_teachers_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures of the teacher are most of a short run's time; how many steps they take is tested elsewhere."""
    for family in (DiffusersFamily, EDMFamily):
        monkeypatch.setattr(family, "default_num_steps", 3)
