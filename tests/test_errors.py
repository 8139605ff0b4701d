"""What is said of a library's failure."""

import pytest

from fewstep.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError(), "ValueError"),
        (OSError("\n  two\nlines"), "two"),
        (KeyError("name"), "'name'"),
        (ValueError("x" * 999), "x" * 200),
    ],
)
def test_the_first_line_of_a_librarys_words(error: Exception, told: str) -> None:
    """One that says nothing is known by its kind; taking its first line was a traceback."""
    assert first_line(error) == told
