"""Optimizers by name: training, exact resume and gradient clipping."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.runs import assert_same_state, last_state, run
from trex_models import Projector
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.objectives import OnlineClassMeans
from trex_models.method.optimizer import build_optimizer, match_memory_format
from trex_models.precision import Precision
from trex_models.pretrained.checkpoints import load_checkpoint
from trex_models.train import checkpointing
from trex_models.train.step import training_step

UNAVAILABLE = ("bnb*", "fused*", "kron*", "adahessian", "*adafactorbv*")
FP32 = Precision.from_name("fp32", "cpu")


def build(name: str) -> tuple[TReX, torch.optim.Optimizer]:
    """Build a network of 1x1, 3x3 and depthwise convolutions in channels-last format."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 20, 1)
    backbone = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    objective = OnlineClassMeans(MemoryBank(8, 6, 3))
    method = TReX(Encoder(backbone, Projector(20, 1, 18, 6)), objective)
    method.to(memory_format=torch.channels_last)
    return method, build_optimizer(method, name, lr=0.01, weight_decay=0.1)


def step(method: TReX, optimizer: torch.optim.Optimizer, number: int) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    crops = [images.to(memory_format=torch.channels_last)]
    labels = torch.arange(4) % 3
    rate = (0.0, 0.01, 0.008, 0.004)[number]  # the warm-up starts from 0
    loss, _ = training_step(method, method, optimizer, FP32, crops, labels, labels, rate)
    assert loss.isfinite()


def test_every_optimizer_trains_and_resumes_exactly_or_is_refused(tmp_path: Path) -> None:
    names = timm.optim.list_optimizers()
    assert {"adafactor", "adamw", "lamb", "lion", "muon", "sgd"} <= set(names)
    for name in names:
        if any(fnmatch.fnmatch(name, pattern) for pattern in UNAVAILABLE):
            with pytest.raises(ValueError, match=f"^name '{name}' is not available; use an opt"):
                build(name)
            continue
        method, optimizer = build(name)
        before = [p.clone() for p in method.encoder.parameters()]
        for number in range(2):
            step(method, optimizer, number)
        assert not any(map(torch.equal, before, method.encoder.parameters())), name
        state = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "saved.pt")
        method_2, optimizer_2 = build(name)
        parts = {"method": method_2, "optimizer": optimizer_2}
        checkpointing.restore(parts, load_checkpoint(tmp_path / "saved.pt"), tmp_path)
        match_memory_format(optimizer_2)
        for number in range(2, 4):
            step(method, optimizer, number)
            step(method_2, optimizer_2, number)
        assert_same_state(dict(method_2.state_dict()), dict(method.state_dict()), name)
        assert_same_state(optimizer_2.state_dict(), optimizer.state_dict(), name)
        assert all(p.isfinite().all() for p in method.parameters()), name


def test_only_sgd_differs_from_timm() -> None:
    sgd, timms, adamw = (build(name)[1] for name in ("sgd", "nesterov", "adamw"))
    assert [group["nesterov"] for group in (*sgd.param_groups, *timms.param_groups)] == [
        *(False, False),
        *(True, True),
    ]
    assert sgd.defaults["fused"]
    assert adamw.defaults["betas"] == (0.9, 0.999)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0]
    assert {p.ndim for p in adamw.param_groups[1]["params"]} == {1}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("clip_grad", [0.0, 1e-3, 1e3])
def test_gradients_are_clipped_after_they_are_unscaled(
    scale: float | None, clip_grad: float
) -> None:
    method, _ = build("sgd")
    optimizer = build_optimizer(method, momentum=0, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
    before = [p.clone() for p in method.encoder.parameters()]
    crops, labels = [torch.randn(4, 3, 8, 8)], torch.arange(4) % 3
    precision = Precision("fp32", "cpu", scaler)
    training_step(method, method, optimizer, precision, crops, labels, labels, 1.0, clip_grad)
    changes = zip(before, method.encoder.parameters(), strict=True)
    norm = torch.cat([(new - old).flatten() for old, new in changes]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2) if clip_grad == 1e-3 else norm > 2e-3


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "muon", "adafactor"])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    options = ["--optim.name", name, "--optim.base-lr", "0.05", "--optim.clip-grad", "1"]
    finished, resumed = tmp_path / "finished", tmp_path / "resumed"
    assert run(finished, *options) == 0
    shutil.copytree(finished, resumed)
    (resumed / "checkpoints" / "step_8.pt").unlink()
    assert run(resumed, *options) == 0
    states = last_state(resumed), last_state(finished)
    for part in ("method", "optimizer", "step"):
        assert_same_state(states[0][part], states[1][part], part)
