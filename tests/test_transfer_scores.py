"""Log-odds, intervals and means, compared with values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy.stats import binomtest

from trex_models.transfer.intervals import student_interval, wilson_interval
from trex_models.transfer.report import (
    accuracy,
    knn_scores,
    log_odds,
    summary,
)


def test_accuracy_of_a_dataset() -> None:
    assert log_odds(0.5, 10) == 0
    assert log_odds(0.9, 10) == pytest.approx(math.log(9))
    assert log_odds(1.0, 100) == pytest.approx(math.log(0.995 / 0.005))
    assert log_odds(0.0, 100) == pytest.approx(-math.log(0.995 / 0.005))
    assert log_odds(0.99, 100) == pytest.approx(math.log(99))  # is not clipped
    found = accuracy([0.9, 1.0], 10)
    assert found["log_odds"] == pytest.approx((math.log(9) + math.log(19)) / 2)
    assert found["top1"]["mean"] == pytest.approx(0.95)
    assert found["top1"]["seeds"] == [0.9, 1.0]
    assert found["top1"]["clipped"] is True
    assert accuracy([0.9], 10)["top1"]["clipped"] is False
    assert accuracy([0.9], 10)["top1"]["interval"] is None
    assert found["top1"]["test_interval"] == wilson_interval(0.95, 10)
    assert knn_scores(0.0, 10) == {"top1": 0.0, "log_odds": -math.log(19), "clipped": True}


def test_intervals_by_hand() -> None:
    # t with 4 degrees of freedom is 2.776; the standard deviation of 1..5 is sqrt(2.5).
    low, high = student_interval([1, 2, 3, 4, 5]) or (0, 0)
    assert (low, high) == pytest.approx((3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5), abs=1e-3)
    assert student_interval([0.7]) is None
    assert student_interval([0.5, 0.5]) == (0.5, 0.5)
    for correct in (0, 1, 25, 50):
        theirs = binomtest(correct, 50).proportion_ci(0.95, method="wilson")
        assert wilson_interval(correct / 50, 50) == pytest.approx((theirs.low, theirs.high))


def entry(seeds: list[float], knn: float, images: int) -> dict[str, Any]:
    return {"top1": {"seeds": seeds}, "knn": {"top1": knn}, "test": {"images": images}}


def test_summary_is_the_mean_over_datasets() -> None:
    found = summary({"a": entry([0.9, 0.5], 0.5, 10), "b": entry([0.5, 1.0], 0.9, 100)})
    seeds = [math.log(9) / 2, math.log(199) / 2]
    assert found["seeds"] == pytest.approx(seeds)
    assert found["mean_log_odds"] == pytest.approx(sum(seeds) / 2)
    assert found["interval"] == student_interval(found["seeds"])
    assert found["knn_mean_log_odds"] == pytest.approx(math.log(9) / 2)
    assert found["datasets"] == ["a", "b"]
    with pytest.raises(ValueError, match="zip"):
        summary({"a": entry([0.9], 0.5, 10), "b": entry([0.5, 1.0], 0.9, 100)})
