"""Two hosts train as two processes on one host do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.several_hosts import train_on_two_hosts, two_hosts


@pytest.mark.client
def test_two_hosts_give_the_result_of_one(tmp_path: Path) -> None:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is missing")
    try:
        with two_hosts():
            pass
    except PermissionError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    assert train_on_two_hosts(tmp_path) == []
