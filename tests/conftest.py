"""Fixtures that all rooms use."""

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time: a gate must not depend on luck. Others: `pytest --hypothesis-profile=default`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference values beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the real data and reference values in ../shared, which are not part of the project")
    return folder
