"""LOOK against plain loops, and against SNCA where its neighbors are the whole bank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import C, D, batch, make_bank
from trex_models.method.bank import MemoryBank
from trex_models.method.objectives import LOOK

TAU = 0.1


def loss_by_hand(bank: MemoryBank, z: Tensor, label: int, sample: int, k: int) -> Tensor:
    """The loss of one crop, from the formula."""
    scores = torch.stack(
        [F.cosine_similarity(z, entry, dim=0) / TAU for entry in bank.embeddings.unbind()]
    )
    others = [j for j in range(len(scores)) if bank.indices[j] != sample]
    ranked = sorted(others, key=lambda j: -scores[j].item())
    neighbors, rest = ranked[:k], ranked[k:]
    if not any(bank.labels[j] == label for j in neighbors):
        neighbors += [j for j in rest if bank.labels[j] == label][:1]
    alike = [j for j in neighbors if bank.labels[j] == label]
    if not alike:
        return torch.zeros((), dtype=z.dtype)
    return -torch.log(sum(scores[j].exp() for j in alike) / sum(scores[j].exp() for j in neighbors))  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2, 7, 40, 1000])
def test_loss_and_gradient_are_those_of_a_plain_loop(k: int) -> None:
    bank = make_bank()
    z, labels, indices = batch()
    bank.labels[bank.labels == labels[0]] = (labels[0] + 1) % C  # the bank has none of its class
    loss, _ = LOOK(bank, TAU, k)(z, labels, indices)
    rows = [
        loss_by_hand(bank, z[crop * 4 + image], int(labels[image]), image, k)
        for crop in range(3)
        for image in range(4)
    ]
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, z)
    (theirs,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(ours, theirs)
    absent = [row for row, label in enumerate(labels.repeat(3)) if label == labels[0]]
    assert torch.equal(ours[absent], torch.zeros(len(absent), D, dtype=z.dtype))
    assert ours.abs().sum() > 0


def test_the_complete_bank_as_neighbors_is_snca() -> None:
    """Wu, Efros, Yu 2018, Eq. 4 and 5: p_ij is a softmax over all but i; the loss -log sum p_ij."""
    bank = make_bank(size=12 * C)
    bank.indices.copy_(torch.arange(len(bank.indices)))
    images = torch.arange(8)
    z = bank.embeddings[images].clone().requires_grad_()  # as SNCA: queries are entries themselves
    labels = bank.labels[images]
    loss, _ = LOOK(bank, TAU, len(bank.labels))(z, labels, images)

    v = F.normalize(bank.embeddings, dim=1)
    logits = F.normalize(z, dim=1) @ v.T / TAU
    logits = logits.masked_fill(torch.eye(len(v))[images].bool(), -math.inf)
    p = logits.softmax(dim=1)
    same = bank.labels == labels[:, None]
    snca = -(p * same).sum(1).log().mean()
    torch.testing.assert_close(loss, snca, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, snca)))


def test_own_entries_are_excluded() -> None:
    bank = make_bank()
    z, labels, indices = batch(images=1, crops=1)
    before, votes = LOOK(bank, TAU, 5)(z, labels, indices)
    own = bank.indices == 0
    bank.embeddings[own] = z.detach()  # nearest of all, of the right class, if they counted
    bank.labels[own] = labels[0]
    after, same_votes = LOOK(bank, TAU, 5)(z, labels, indices)
    assert torch.equal(before, after)
    assert torch.equal(votes, same_votes)
    counted, _ = LOOK(bank, TAU, 5)(z, labels, indices + 100)
    assert counted < 0.5 * after
    bank = make_bank()
    bank.indices.zero_()
    z, labels, indices = batch(images=1, crops=2)
    loss, votes = LOOK(bank, TAU, 3)(z, labels, indices)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(z))
    assert (votes == -math.inf).all()


def test_votes_are_the_weighted_nearest_neighbors() -> None:
    bank = make_bank()
    z, _, _ = batch(images=100)  # 300 rows: more than are compared at a time
    votes = LOOK(bank, TAU, 7).logits(z.detach())
    for row, query in zip(votes, z.detach(), strict=True):
        scores = F.cosine_similarity(query[None], bank.embeddings) / TAU
        nearest = scores.topk(7)
        expected = torch.zeros(C, dtype=torch.float64)
        for score, entry in zip(nearest.values, nearest.indices, strict=True):
            expected[bank.labels[entry]] += score.exp()
        torch.testing.assert_close(row.exp(), expected / expected.sum())


def test_float32_under_autocast_and_no_gradient_to_the_bank() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(16, D, C)
    z = torch.randn(4, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, votes = LOOK(bank, TAU, 4)(z, torch.tensor([0, 1, 2, 3]), torch.arange(4))
    plain, _ = LOOK(bank, TAU, 4)(z, torch.tensor([0, 1, 2, 3]), torch.arange(4))
    assert loss.dtype == votes.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert not bank.embeddings.requires_grad
