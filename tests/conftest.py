"""What holds for all tests."""

import pytest
from hypothesis import settings

# Speed is measured by `make bench`; a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks first: they take longest, and the other files are tested beside them."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
