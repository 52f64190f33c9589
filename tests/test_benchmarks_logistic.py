"""The benchmark of logistic regression, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import logistic


def test_reports_times_and_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "logistic.json"
    arguments = "--sizes 60x8x3 --rounds 2 --num-C 3 --compared 2 --tight-iterations 100"
    logistic.main(["--out", str(out), *arguments.split()])
    (result,) = json.loads(out.read_text())["results"]
    assert result["size"] == "60x8x3"
    assert result["ratio"]["n"] == 2
    assert 0 < result["share_of_products"] < 1
    least, most = result["compared"]
    assert (least["C"], most["C"]) == pytest.approx((1e-5, 1e6))
    assert abs(least["relative_difference"]) < 1e-5
    assert least["agreement_with_tight"] == 1
    assert "60x8x3, 3 values of C: ratio" in capsys.readouterr().out


def test_digits_are_real_features_of_ten_classes() -> None:
    x, y, test = logistic.digit_features()
    assert (x.shape, y.shape, test.shape) == ((1198, 512), (1198,), (599, 512))
    assert sorted(set(y.tolist())) == list(range(10))
