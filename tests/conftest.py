"""The order of the tests, and fixtures of several files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from tests import official_files
from tests.loopback_hub import Hub, HubServer, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test by far, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.name != "test_timm_suite.py")


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the official release, small; made once for all workers, and never changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "release"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            official_files.write_release(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return folder


@pytest.fixture(scope="module")
def naver_cache(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with two backbone files, the only place that weights are loaded from."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "naver").mkdir()
    for name in ("trex.pth", "trex_2.pth"):
        shutil.copy(release / name, cache / "naver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREX_MODELS_CACHE", str(cache))
        patch.setenv("TREX_MODELS_NAVER_URL", "http://127.0.0.1:9/")  # nothing answers there
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield cache
    shutil.rmtree(cache)


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def server(hub: Hub) -> Iterator[HubServer]:
    with serving(hub) as server:
        yield server


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What is resized, and what it becomes."""
    seen: list[tuple[Tensor, Tensor]] = []
    resize = F.interpolate

    def spy(patch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((patch, resize(patch, *args, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(F, "interpolate", spy)
    return seen
