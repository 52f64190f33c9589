"""The memory benchmark and the growth benchmark, with small settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth, memory

NAMES = ["fp32", "bf16", "bf16, recomputed"]
SMALL = """--backbone resnet18 --sizes 64 32 --hidden-dim 64 --classes 10 --bank 32 --batches 8 16
    --check-batch 16""".split()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("memory") / "memory.json"
    memory.main([*SMALL, "--options", *NAMES, "--out", str(out)])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.client
def test_accounting_matches_a_real_step_and_adds_up(table: dict[str, Any]) -> None:
    assert table["check"]["ratio"] == pytest.approx(1, abs=0.05)
    for row in table["rows"]:
        assert row["parameters"] == row["gradients"] == row["optimizer"]
        kinds = ("parameters", "optimizer", "averages", "inputs", "activations")
        assert row["peak"] >= sum(row[kind] for kind in kinds)
        assert row["inputs"] == row["batch"] * 4 * 3 * (64**2 + row["local_crops"] * 32**2)
    fp32, bf16, recomputed = (
        next(r["activations"] for r in table["rows"] if r["options"] == name and r["batch"] == 16)
        for name in NAMES
    )
    assert bf16 < 0.8 * fp32
    assert recomputed < 0.7 * bf16


def test_largest_batch_and_slope() -> None:
    rows = [{"options": "x", "batch": b, "peak": 10**9 + b * 10**8} for b in (16, 64)]
    (found,) = memory.fits(rows, [8])
    assert (found["fixed"], found["per_image"]) == (10**9, 10**8)
    batch = found["batch"]["8 GB"]
    usable = (8 * 2**30 - 2**30) / 1.15
    assert 10**9 + batch * 10**8 <= usable < 10**9 + (batch + 8) * 10**8
    steps = list(range(0, 200, 20))
    fit = growth.slope(steps, [5e6 + 3 * step for step in steps])
    assert fit == pytest.approx({"per_step": 3, "standard_error": 0, "r_squared": 1}, abs=1e-6)
    noisy = growth.slope(steps, [5e6 + (-1) ** step for step in range(10)])
    assert abs(noisy["per_step"]) < 3 * noisy["standard_error"]
    assert growth.slope(steps, [7] * 10)["r_squared"] == 0


def test_ledger_counts_a_storage_once_and_only_while_it_lives() -> None:
    with memory.Ledger() as ledger:
        a = torch.zeros(1000)
        view = a[10:]
        assert ledger.live == 4096  # 4000 bytes, in blocks of 512
        del a
        assert ledger.live == 4096
        del view
        assert ledger.live == 0
        torch.zeros(10)
    assert (ledger.live, ledger.peak) == (0, 4096)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_sample_sees_a_process_and_its_child() -> None:
    code = "import os, time; os.fork() or time.sleep(60); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            held = growth.sample(process.pid)
        finally:
            os.killpg(process.pid, 9)
    assert 1e6 < held["worker_bytes"] <= held["trainer_bytes"] < 1e9
    assert held["trainer_files"] >= 3
    with pytest.raises(FileNotFoundError, match="no child"):
        growth.sample(process.pid)


@pytest.mark.client
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_growth_watches_a_real_run(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    growth.main(["--steps", "80", "--seconds", "0.1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [row["share"] for row in result["rows"]] == [0.1, 0.25, 0.5, 1]
    assert all(row["trainer_bytes"] > 5e7 for row in result["rows"])
    assert result["second_half"].keys() == {"trainer_bytes", "worker_bytes"}
    assert out.with_suffix(".png").stat().st_size > 5000
