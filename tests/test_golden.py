"""Comparison of our modules with recorded trajectories of the official implementation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from tests import golden

DATA = Path(__file__).parent / "data"
ENTRIES = [
    entry
    for name in ("golden_trajectory", "golden_depth3")
    for entry in json.loads((DATA / f"{name}.json").read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["case"]["name"] for entry in ENTRIES])
def test_trajectory_is_reproduced(entry: dict[str, object]) -> None:
    torch.set_num_threads(1)
    errors = golden.compare(entry)
    assert set(errors) == set(entry) - {"case", "world_size"}
    assert max(errors.values()) <= golden.LIMIT, errors


def test_exit_status_tells_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = copy.deepcopy(ENTRIES[0])
    entry["case"] |= {"epochs": 1, "steps_per_epoch": 1}
    entry |= golden.replay(entry["case"])
    path = tmp_path / "one_step.json"
    path.write_text(json.dumps([entry]))
    assert golden.main(str(path)) == 0
    for loss in ([2.9119], [float("nan")], [2.9, 2.9], ["2.9"]):
        path.write_text(json.dumps([entry | {"loss": loss}]))
        assert golden.main(str(path)) == 1
        assert "TOO LARGE" in capsys.readouterr().out
