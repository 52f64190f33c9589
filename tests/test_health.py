"""Diagnostics of the head, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from trex_models.method.bank import MemoryBank
from trex_models.method.objectives import LOOK, CosineSoftmax, LinearSoftmax, OnlineClassMeans
from trex_models.train.reporting import class_directions, head_health


def fill(bank: MemoryBank, labels: list[int]) -> None:
    bank.enqueue(torch.randn(len(labels), 3), torch.tensor(labels), torch.arange(len(labels)))


def test_bank_of_noise_then_of_entries() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(6, 3, 4)
    objective = OnlineClassMeans(bank, 0.1)
    fresh = head_health(objective, class_directions(objective))
    assert fresh["bank_initial"] == 1
    assert fresh["bank_classes"] == fresh["bank_age"] == fresh["prototype_change"] == 0
    fill(bank, [0, 0])
    fill(bank, [3, 0])
    assert head_health(objective, None) == {
        "bank_classes": 2 / 4,
        "bank_age": 0.5,
        "bank_oldest": 1,
        "bank_initial": pytest.approx(2 / 6),
    }
    saved, bank = bank.state_dict(), MemoryBank(6, 3, 4)
    bank.load_state_dict(saved)  # including the ages
    objective = OnlineClassMeans(bank, 0.1)
    fill(bank, [1, 1, 1, 1])  # wraps around
    fill(bank, [1, 1])
    assert bank.written.tolist() == [3, 3, 1, 1, 2, 2]
    assert bank.indices.tolist() == [0, 1, 0, 1, 0, 1]
    health = head_health(objective, class_directions(objective))
    assert health["bank_classes"] == 3 / 4
    assert health["bank_age"] == pytest.approx((0 + 0 + 2 + 2 + 1 + 1) / 6)
    assert health["bank_oldest"] == 2
    assert health["bank_initial"] == 0
    assert health["empty_prototypes"] == 1


@pytest.mark.parametrize("objective", [CosineSoftmax(3, 4, 0.1), LinearSoftmax(3, 4)])
def test_change_of_class_vectors(objective: CosineSoftmax | LinearSoftmax) -> None:
    before = class_directions(objective)
    weight = objective.classifier.weight
    with torch.no_grad():
        weight[0] *= 2  # same direction
        weight[1] *= -1
    assert head_health(objective, before) == {
        "prototype_change": pytest.approx(2 / 4),
        "empty_prototypes": 0,
    }


def test_look_has_no_class_vectors() -> None:
    objective = LOOK(MemoryBank(6, 3, 4), 0.1, 2)
    assert class_directions(objective) is None
    assert "prototype_change" not in head_health(objective, None)
