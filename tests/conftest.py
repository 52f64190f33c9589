"""The order of the tests, and what several files of them stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loopback_hub import Hub, HubServer, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test by far, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.name != "test_timm_suite.py")


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def server(hub: Hub) -> Iterator[HubServer]:
    with serving(hub) as server:
        yield server
