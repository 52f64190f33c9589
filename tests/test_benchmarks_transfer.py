"""The memory benchmark of the transfer evaluation, with tiny sizes; no figure is checked."""

from __future__ import annotations

import json
import mmap
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import transfer_memory
from benchmarks.transfer_memory import PARTS, Peak, Setup, TinyImages, measured, promised

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def setup(folder: Path, **changes: Any) -> Setup:
    small = Setup(
        folder=folder, images=600, queries=20, width=16, classes=5, batches=1, dtype="float16"
    )
    return replace(small, **changes)


def test_parts_work_on_the_same_features(tmp_path: Path) -> None:
    found = {part: measured(part, setup(tmp_path)) for part in PARTS}
    files = list(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 2
    sizes = sum(file.stat().st_size for file in files)
    assert 0 < sizes - setup(tmp_path).file_bytes < 4096  # the headers
    assert all(row["held_bytes"] >= 0 and row["n"] == 1 for row in found.values())
    assert found["k-NN"]["top1"] > 0.5  # chance level is 0.2
    layers = found["SGD layers"]
    assert (layers["settings"], layers["settings_at_once"]) == (30, 30)
    assert (layers["training_samples"], layers["validation_samples"]) == (480, 120)
    assert layers["best_top1"] > 0.25
    assert 1 < found["geometry"]["effective_rank"] < 16
    whole = setup(tmp_path, dtype="float32")
    assert whole.samples("train")[0].dtype == np.float32
    assert whole.file_bytes == 2 * setup(tmp_path).file_bytes


def test_images_repeat_and_promises_are_those_of_the_docstrings(tmp_path: Path) -> None:
    train, test = TinyImages(40, 5, seed=1), TinyImages(40, 5, seed=2)
    np.testing.assert_array_equal(train.read(7), TinyImages(40, 5, seed=1).read(7))
    assert not np.array_equal(train.read(7), train.read(12))  # of the same class
    assert not np.array_equal(train.read(7), test.read(7))
    assert train.digest() != test.digest()
    real = setup(tmp_path, images=10**6, queries=1000, width=2048, classes=1000, batches=12)
    assert promised("extraction", real) is None
    # 4 q r + 20 F r + 60 q K + 12 M K, and the votes
    assert promised("k-NN", real) == 16_384_000 + 167_772_160 + 1_200_000 + 240_000 + 4_000_000
    assert promised("SGD layers", real) == 30 * 1000 * 4 * (2 * 2049 + 2048)
    species = promised("SGD layers", replace(real, classes=8142))
    assert species is not None
    assert 1.5e9 < species <= 2e9  # in groups: all 30 settings would be 6 GB
    assert promised("geometry", real) == 8 * (5 * 2048**2 + 4 * 1000 * 2048 + 4 * 8192 * 2048)


def test_peak_counts_temporary_memory_but_no_mapped_pages(tmp_path: Path) -> None:
    path = tmp_path / "array"
    np.ones(48 << 20, np.uint8).tofile(path)
    with Peak() as peak:
        mapped = np.memmap(path, mode="c")
        assert mapped.max() == 1
        time.sleep(0.3)
    assert peak.held < 16 << 20
    assert peak.with_pages > 40 << 20
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # malloc could reuse free memory
    with Peak() as peak, mmap.mmap(-1, 64 << 20, flags=private) as block:
        for start in range(0, len(block), 1 << 20):
            block[start : start + (1 << 20)] = bytes(1 << 20)
        time.sleep(0.3)
    assert 60 << 20 < peak.held < 80 << 20


@pytest.mark.client
def test_a_run_records_each_part_and_no_part_holds_more_than_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """50,000 x 2048 features: 205 MB in float16, 410 MB in float32."""
    out, folder = tmp_path / "out.json", tmp_path / "features"
    folder.mkdir()
    sizes = "--images 50000 --queries 1500 --classes 10 --batches 4".split()
    transfer_memory.main([*sizes, "--folder", str(folder), "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["machine"]["torch"]
    assert result["file_bytes"] == 51_500 * 2048 * 2
    assert list(result["parts"]) == list(PARTS)
    assert not list(folder.iterdir())
    for name, row in result["parts"].items():
        assert row["imports_bytes"] > 0
        # In addition, some batches of images or of 1024 float32 features, 8 MB each.
        assert row["held_bytes"] < (row["promised_bytes"] or 0) + 96e6, name
    printed = capsys.readouterr()
    assert "[5/5] geometry" in printed.err
    assert printed.out.splitlines()[5].startswith("geometry")
