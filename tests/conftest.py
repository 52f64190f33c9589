"""The order of the tests, and fixtures that several files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from tests import official_files
from tests.images import save_image
from tests.loopback_hub import Hub, HubServer, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA, and begin with the longest test: no worker waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_timm_suite.py")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip("needs a CUDA device"))


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the official format, created once for all workers; must not be changed."""
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
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with eleven pictures in images/a and images/b."""
    for number in range(11):
        save_image(tmp_path / "images" / "ab"[number % 2] / f"{number}.png", number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
