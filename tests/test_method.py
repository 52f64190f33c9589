"""The method's parts against plain formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import TinyBackbone
from trex_models import distributed
from trex_models.heads import Projector
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.momentum import MomentumEncoder
from trex_models.method.objectives import CosineSoftmax, OnlineClassMeans
from trex_models.method.optimizer import build_optimizer, learning_rates, match_memory_format


def tiny_method(bank_size: int = 8) -> TReX:
    torch.manual_seed(0)
    encoder = Encoder(TinyBackbone(), Projector(6, 1, 7, 5))
    return TReX(encoder, OnlineClassMeans(MemoryBank(bank_size, 5, 3), 0.1), ema_momentum=0.9)


def test_bank() -> None:
    bank = MemoryBank(5, 2, 3)
    batch, labels = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2])
    bank.enqueue(batch, labels, labels)
    assert bank.pointer == 3
    torch.testing.assert_close(bank.embeddings[:3], batch)
    bank.enqueue(batch + 10, labels, labels)  # two of three fit
    assert bank.pointer == 0
    torch.testing.assert_close(bank.embeddings[3:], batch[:2] + 10)
    assert bank.labels.tolist() == [0, 1, 2, 0, 1]
    bank.enqueue(batch + 20, labels, labels)
    torch.testing.assert_close(bank.embeddings[:3], batch + 20)
    torch.manual_seed(0)
    bank = MemoryBank(4096, 4, 10)
    assert abs(bank.embeddings.mean().item()) < 0.05
    assert bank.embeddings.std().item() == pytest.approx(1, abs=0.05)
    assert bank.labels.bincount(minlength=10).min() > 300
    bank.enqueue(torch.ones(7, 4), *torch.zeros(2, 7, dtype=torch.long))
    other = MemoryBank(4096, 4, 10)
    other.load_state_dict(bank.state_dict())
    assert other.pointer == 7
    assert torch.equal(other.features, bank.embeddings)


def test_ocm_logits_and_loss_by_hand() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(6, 4, 3)
    bank.labels.copy_(torch.tensor([0, 0, 1, 1, 0, 1]))  # class 2 is absent
    z = torch.randn(4, 4, requires_grad=True)  # two images, two crops
    labels = torch.tensor([0, 1])
    loss, logits = OnlineClassMeans(bank, 0.1)(z, labels, labels)
    means = torch.stack([bank.embeddings[bank.labels == c].mean(0) for c in (0, 1)])
    torch.testing.assert_close(logits[:, :2], F.cosine_similarity(z[:, None], means, dim=2) / 0.1)
    assert torch.equal(logits[:, 2], torch.zeros(4))
    rows = torch.arange(4)
    by_hand = (logits.logsumexp(1) - logits[rows, torch.tensor([0, 1, 0, 1])]).mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert not bank.embeddings.requires_grad


def test_cosine_softmax_learns_its_weights() -> None:
    torch.manual_seed(0)
    objective = CosineSoftmax(4, 3, 0.1)
    weight = objective.classifier_weights()
    assert weight.abs().max() <= 1 / math.sqrt(4)  # nn.Linear's default
    z = torch.randn(5, 4)
    loss, logits = objective(z, torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
    torch.testing.assert_close(logits, F.cosine_similarity(z[:, None], weight, dim=2) / 0.1)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert objective.bank is None


def test_float32_islands_under_autocast() -> None:
    method = tiny_method()
    with torch.autocast("cpu", torch.bfloat16):
        labels, indices = torch.tensor([[0, 1, 2, 0], [4, 5, 6, 7]])
        loss, logits = method([torch.randn(4, 3, 8, 8)], labels, indices)
        method.update_bank(torch.randn(4, 3, 8, 8), labels, indices)
    assert method.objective.bank is not None
    assert logits.dtype == loss.dtype == method.objective.bank.embeddings.dtype == torch.float32


def test_encoder_runs_the_backbone_once_per_resolution() -> None:
    method = tiny_method()
    backbone = method.encoder.backbone
    assert isinstance(backbone, TinyBackbone)
    crops = [torch.randn(4, 3, 9, 9), torch.randn(12, 3, 6, 6)]
    together = method.encoder.eval()(crops)
    assert backbone.shapes == [(4, 3, 9, 9), (12, 3, 6, 6)]
    torch.testing.assert_close(together[4:], method.encoder(crops[1:]))
    backbone.shapes.clear()
    method.encoder([torch.randn(4, 3, 9, 9), torch.randn(8, 3, 9, 9)])
    assert backbone.shapes == [(12, 3, 9, 9)]


def test_momentum_encoder_averages_parameters_only() -> None:
    method = tiny_method()
    online = method.encoder
    average: Any = MomentumEncoder(online, 0.9)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in average.parameters()]
    online([torch.randn(4, 3, 8, 8)])  # moves the online running statistics
    average.update(online)
    for old, new, target in zip(before, average.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target)
        assert not new.requires_grad
    assert average.encoder.backbone.bn.running_mean.abs().sum() == 0
    assert not average(torch.randn(4, 3, 8, 8) + 1).requires_grad
    assert average.encoder.backbone.bn.running_mean.abs().sum() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_restored_momentum_follows_the_parameters_layout(layout: torch.memory_format) -> None:
    """A run may be continued in another memory format."""

    def build(layout: torch.memory_format) -> tuple[nn.Conv2d, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 5, 3).to(memory_format=layout)
        return model, build_optimizer(model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for p in model.parameters():
            values = torch.arange(p.numel()).view(p.shape).float() + number
            p.grad = torch.empty_like(p).copy_(values)
        optimizer.step()

    model, optimizer = build(torch.channels_last)
    step(model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer, 1)

    resumed, resumed_optimizer = build(layout)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    match_memory_format(resumed_optimizer)
    step(resumed, resumed_optimizer, 1)
    torch.testing.assert_close(resumed.weight, model.weight)


def test_synchronized_batchnorm_keeps_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's BatchNormAct2d holds an activation that torch's own conversion would drop."""
    model = timm.create_model("regnety_002", num_classes=0)
    converted: list[nn.Module] = []
    monkeypatch.setattr(
        distributed, "DistributedDataParallel", lambda module, **_: converted.append(module)
    )
    process = distributed.Process(0, 2, torch.device("cuda", 0))
    distributed.data_parallel(model, process, sync_batchnorm=True)
    norms = [m for m in converted[0].modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) > 20
    assert any(isinstance(getattr(m, "act", None), nn.ReLU) for m in norms)


def test_learning_rates() -> None:
    rates = learning_rates(peak=0.1, final=1e-6, warmup_steps=4, total_steps=12)
    np.testing.assert_allclose(rates[:4], [0, 0.1 / 3, 0.2 / 3, 0.1])
    assert rates[4] == 0.1
    assert rates[8] == pytest.approx(1e-6 + 0.5 * (0.1 - 1e-6))
    assert (np.diff(rates[4:]) < 0).all()
    assert len(learning_rates(0.1, 0.0, 0, 5)) == 5
    assert len(learning_rates(0.1, 0.0, 5, 5)) == 5
