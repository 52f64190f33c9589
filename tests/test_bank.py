"""What the memory bank and the losses on it refuse, from whoever writes a loop of their own."""

from __future__ import annotations

import pytest
import torch

from trex_models.method import LOOK, CosineSoftmax, MemoryBank, Objective, OnlineClassMeans

EMBEDDINGS, LABELS = torch.randn(4, 8), torch.tensor([0, 1, 2, 2])


def filled() -> MemoryBank:
    torch.manual_seed(0)
    return MemoryBank(16, dim=8, num_classes=3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, r"labels must be in \[0, 3\), got 3"),
        (LABELS - 101, r"labels must be in \[0, 3\), got -101"),
        (LABELS.float(), "labels must be integers, got torch.float32"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: torch.Tensor, message: str) -> None:
    bank = filled()
    before = bank.state_dict()
    objectives: list[Objective] = [OnlineClassMeans(bank), LOOK(bank), CosineSoftmax(8, 3)]
    for objective in objectives:
        with pytest.raises(ValueError, match=message):
            objective(EMBEDDINGS, labels)
    with pytest.raises(ValueError, match=message):
        bank.enqueue(EMBEDDINGS, labels)
    assert all(torch.equal(bank.state_dict()[name], before[name]) for name in ("labels", "written"))


def test_ids_are_one_for_each_embedding() -> None:
    for indices in (torch.tensor([7]), torch.arange(3)):
        with pytest.raises(ValueError, match=r"indices must be \(4,\) like labels, got \(.*\)"):
            filled().enqueue(EMBEDDINGS, LABELS, indices)


def test_entries_of_no_sample_are_nobodys_own() -> None:
    bank = filled()
    bank.enqueue(EMBEDDINGS, LABELS)
    look = LOOK(bank)
    loss, _ = look(EMBEDDINGS, LABELS)
    assert loss > 0
    for indices in (torch.full((4,), -1), torch.arange(4)):
        assert torch.equal(look(EMBEDDINGS, LABELS, indices)[0], loss)
    bank.enqueue(EMBEDDINGS, LABELS, torch.arange(4))
    assert look(EMBEDDINGS, LABELS)[0] < look(EMBEDDINGS, LABELS, torch.arange(4))[0]


def test_ids_of_overwritten_entries_are_forgotten() -> None:
    bank = filled()
    for first in range(0, 16, 4):
        bank.enqueue(EMBEDDINGS, LABELS, torch.arange(first, first + 4))
    bank.enqueue(EMBEDDINGS, LABELS)
    assert bank.indices.tolist() == [-1] * 4 + list(range(4, 16))
    bank.enqueue(EMBEDDINGS, LABELS, torch.arange(20, 24))
    assert bank.indices.tolist() == [-1] * 4 + list(range(20, 24)) + list(range(8, 16))
