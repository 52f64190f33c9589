"""The benchmarks of the loader and the augmentation, with settings too small to measure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import augment, loader
from benchmarks.photographs import KINDS, NUM_CLASSES, jpeg, write_photographs
from benchmarks.reference_pipeline import SPECS, reference_dataset
from trex_models.data.image_files import FolderSource


def assert_positive(value: Any) -> None:
    if isinstance(value, dict):
        for part in value.values():
            assert_positive(part)
    else:
        assert math.isfinite(value)
        assert value > 0


@pytest.mark.parametrize("kind", ["standard", "small"])
def test_photographs_have_the_promised_sizes(kind: str, tmp_path: Path) -> None:
    write_photographs(tmp_path, 10, kind)
    files = sorted(tmp_path.glob("*/*.jpg"), key=lambda file: file.name)
    assert len({file.read_bytes() for file in files}) == 10
    for file, size in zip(files, KINDS[kind].sizes, strict=True):
        assert 900 <= file.stat().st_size / KINDS[kind].kilobytes <= 1100
        with Image.open(file) as image:
            assert image.size == size
            assert image.mode == "RGB"
    assert len(FolderSource(tmp_path).classes) == NUM_CLASSES
    assert jpeg(KINDS[kind], 1) == jpeg(KINDS[kind], 1) != jpeg(KINDS[kind], 1, seed=1)
    with pytest.raises(ValueError, match="must be at least 8, .* got 3"):
        write_photographs(tmp_path, 3, kind)


def test_reference_creates_the_recipes_crops(tmp_path: Path) -> None:
    write_photographs(tmp_path, NUM_CLASSES + 2, "standard")
    dataset = reference_dataset(tmp_path, SPECS)
    [(crops, labels)] = DataLoader(dataset, batch_size=3, sampler=[0, 1, 9])
    assert [crop.shape for crop in crops] == [(3, 3, 224, 224)] + [(3, 3, 96, 96)] * 8
    assert all(crop.dtype == torch.float32 for crop in crops)
    assert labels.tolist() == FolderSource(tmp_path).labels[[0, 1, 9]].tolist()


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("large", "huge"):  # these take seconds each
        monkeypatch.setitem(KINDS, kind, KINDS["small"])
    out = tmp_path / "results" / "loader.json"
    settings = "--rounds 1 --batch 2 --batches 1 --workers 1 --files 8 --latencies 0 9".split()
    monkeypatch.setattr(loader, "WORKERS", (1, 2))
    threads = torch.get_num_threads()
    loader.main([*settings, "--out", str(out)])
    assert torch.get_num_threads() == threads
    result = json.loads(out.read_text())
    assert result["machine"]["processor"]
    for key in ("ratio", "ratio_whole"):
        assert_positive(result[key])
    assert set(result["core"]) == {"standard", "small", "large", "huge"}
    for part in ("core", "whole", "slow", "memory_mb"):
        assert_positive(result[part])
    assert {latency: set(rates) for latency, rates in result["slow"].items()} == {
        "0 ms": {"1", "2"},
        "9 ms": {"1", "2"},
    }
    for weight in result["memory_mb"].values():
        assert set(weight) == {"peak_rss", "uss", "batch"}


def test_augment(tmp_path: Path) -> None:
    out = tmp_path / "augment.json"
    settings = "--rounds 1 --batch 1 --crops 8 --draws 200".split()
    augment.main([*settings, "--out", str(out)])
    result = json.loads(out.read_text())
    assert_positive(result["ratio"])
    assert_positive(result["speed"])
    assert len(result["differences"]) == 2 * 2 * 7
    bundled = [row for row in result["differences"] if row["photographs"] == "bundled"]
    assert all(row["within_limit"] is not False for row in bundled)
    assert len(result["draws"]) == 2 * (2 * 8 + 11)
    for row in result["draws"]:
        assert 0 < row["p"] <= 1
