"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test by far, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.name != "test_timm_suite.py")
