"""The benchmarks of evaluation and loading run and write their results; no figure is checked."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import features, loading, logistic, measure, neighbors


def recorded(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["machine"]["torch"]
    return result


def test_features(tmp_path: Path) -> None:
    out = tmp_path / "features.json"
    features.main(
        ["--out", str(out), "--rounds", "1", "--images", "8", "--batch", "4", "--workers", "0",
         "--networks", "small"]
    )  # fmt: skip
    result = recorded(out)
    assert result["ratio"] == result["core"]["transfer"]["ratio"]["median"] > 0
    assert set(result["core"]) == {"transfer", "validation"}
    assert result["ratio_whole"] == result["whole"]["small"]["compared"]["ratio"]["median"]
    assert result["whole"]["small"]["relative_distance"] < 0.05


def test_neighbors(tmp_path: Path) -> None:
    out = tmp_path / "neighbors.json"
    sizes = ["--references", "50", "--queries", "9", "--width", "8", "--k", "3"]
    neighbors.main(["--out", str(out), "--rounds", "2", *sizes])
    result = recorded(out)
    assert result["ratio"] > 0
    assert result["shape"] == {"references": 50, "queries": 9, "width": 8, "k": 3}
    assert result["seconds"]["ours"]["n"] == 2


@pytest.mark.client
def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(loading._MODELS, "untrained")  # starts one process per round
    monkeypatch.setattr(measure, "alternate", partial(measure.alternate, warm_up=0))
    out = tmp_path / "loading.json"
    loading.main(["--out", str(out), "--rounds", "1"])
    result = recorded(out)
    assert result["import_ms"] > 0
    assert "trex_models.trex" in result["import"]["added"]
    assert set(result["create"]["ratios"]) == {"file", "cache"}
    assert result["create"]["file"]["megabytes"]["median"] > 94  # size of the weights


def test_logistic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "logistic.json"
    arguments = "--sizes 60x8x3 --rounds 2 --num-C 3"
    logistic.main(["--out", str(out), *arguments.split()])
    (result,) = json.loads(out.read_text())["results"]
    assert result["size"] == "60x8x3"
    assert result["ratio"]["n"] == 2
    assert abs(result["excess"]) < 1e-4
    assert "60x8x3, 3 values of C: ratio" in capsys.readouterr().out


def test_digits_are_real_features_of_ten_classes() -> None:
    x, y = logistic.digit_features()
    assert (x.shape, y.shape) == ((1198, 512), (1198,))
    assert sorted(set(y.tolist())) == list(range(10))
