"""Optimizers by name: training, exact resume and gradient clipping."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.models import load
from tests.runs import assert_same_state, last_state, logged, run
from trex_models import Projector
from trex_models.method import Encoder, MemoryBank, OnlineClassMeans, TReX, build_optimizer
from trex_models.method.optimizer import match_memory_format
from trex_models.precision import Precision
from trex_models.pretrained.checkpoints import load_checkpoint
from trex_models.train import build, checkpointing
from trex_models.train.config import from_dict
from trex_models.train.step import training_step

UNAVAILABLE = ["bnb*", "fused*", "kron*", "adahessian", "*adafactorbv*"]
MODELS = {
    "vit_tiny_patch16_224": "patch_size=8 embed_dim=32 depth=2 num_heads=2",
    "convnext_atto": "dims=(8,16,32,32) depths=(1,1,1,1)",
}
FP32 = Precision.from_name("fp32", "cpu")
IMAGES = torch.randn(4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4) % 3


def build_method() -> TReX:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 20, 1)
    backbone = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    objective = OnlineClassMeans(MemoryBank(8, 6, 3))
    method = TReX(Encoder(backbone, Projector(20, 1, 18, 6)), objective)
    return method.to(memory_format=torch.channels_last)


def step(method: TReX, optimizer: torch.optim.Optimizer, number: int) -> None:
    crops = [IMAGES[number].to(memory_format=torch.channels_last)]
    rate = (0.0, 0.01, 0.008, 0.004)[number]  # the warm-up starts from 0
    training_step(method, method, optimizer, FP32, crops, LABELS, LABELS, rate)


def test_every_optimizer_trains_and_resumes_exactly_or_is_refused(tmp_path: Path) -> None:
    for name in map(str, timm.optim.list_optimizers(UNAVAILABLE)):
        with pytest.raises(ValueError, match=f"^name '{name}' is not available; use an optimizer"):
            build_optimizer(nn.Linear(1, 1), name)
    for name in map(str, timm.optim.list_optimizers(exclude_filters=UNAVAILABLE)):
        method, resumed = build_method(), build_method()
        optimizer, other = (build_optimizer(m, name, lr=0.01) for m in (method, resumed))
        for number in range(2):
            step(method, optimizer, number)
        assert not any(map(torch.equal, method.encoder.parameters(), resumed.encoder.parameters()))
        state = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "saved.pt")
        parts, saved = {"method": resumed, "optimizer": other}, tmp_path / "saved.pt"
        checkpointing.restore(parts, load_checkpoint(saved), saved)
        match_memory_format(other)
        for number in range(2, 4):
            step(method, optimizer, number)
            step(resumed, other, number)
        assert_same_state(dict(resumed.state_dict()), dict(method.state_dict()), name)
        assert_same_state(other.state_dict(), optimizer.state_dict(), name)
        assert all(p.isfinite().all() for p in method.parameters()), name


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_after_they_are_unscaled(scaled: bool) -> None:
    norms = []
    for clip_grad in (0.0, 1e3, 1e-3):
        method, before = build_method(), build_method()
        optimizer = build_optimizer(method, momentum=0, weight_decay=0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        types = Precision("fp32", "cpu", scaler)
        crops = [IMAGES[0]]
        training_step(method, method, optimizer, types, crops, LABELS, LABELS, 1.0, clip_grad)
        pairs = zip(before.encoder.parameters(), method.encoder.parameters(), strict=True)
        changes = [(new - old).detach().flatten() for old, new in pairs]
        norms.append(float(torch.cat(changes).norm()))
    assert norms == [norms[0], norms[0], pytest.approx(1e-3, rel=1e-2)]
    assert norms[0] > 1e-2


def assert_resumes_exactly(finished: Path, *options: str) -> None:
    """Continue a copy of a run from the checkpoint before the last."""
    resumed = finished.with_name("resumed")
    shutil.copytree(finished, resumed)
    checkpointing.list_checkpoints(resumed)[-1].unlink()
    assert run(resumed, *options) == 0
    for part in ("method", "optimizer", "step"):
        assert_same_state(last_state(resumed)[part], last_state(finished)[part], part)


@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "adafactor"])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    options = ["--optim.name", name, "--optim.base-lr", "0.05", "--optim.clip-grad", "1"]
    assert run(tmp_path / "run", *options) == 0
    assert_resumes_exactly(tmp_path / "run", *options)


def save_stripes(root: Path, count: int) -> None:
    """Save vertical and horizontal stripes of random colors."""
    rng = np.random.default_rng(count)
    for index, (label, axis) in itertools.product(range(count), enumerate(np.indices((40, 40)))):
        wave = np.sin(axis * rng.uniform(0.6, 0.9) + rng.uniform(0, 6))[..., None]
        levels = 128 + wave * rng.uniform(-90, 90, 3) + rng.normal(0, 20, (40, 40, 3))
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        image.save(root / f"class{label}" / f"{index}.png")


@pytest.mark.parametrize("model", MODELS)
def test_small_models_learn_with_adamw(model: str, tmp_path: Path) -> None:
    save_stripes(tmp_path / "train", 32)
    save_stripes(tmp_path / "val", 16)
    options = f"""--data.source folder --data.path {tmp_path}/train --validation.path {tmp_path}/val
        --validation.images-per-class 0 --validation.neighbors 5 --validation.every 20
        --optim.name adamw --optim.base-lr 0.05 --optim.weight-decay 0.05 --optim.epochs 20
        --optim.batch-size 16 --system.save-steps 60 --objective.ema-momentum 0.9
        --crops.global-size 32 --crops.local-size 32 --crops.local-scale 0.4 1
        --crops.global-augmentation.jitter 0 --crops.local-augmentation.jitter 0
        --model.backbone {model} --model.backbone-args {MODELS[model]}""".split()
    assert run(tmp_path / "run", *options) == 0
    # Without training, they are 0.78 and 0.53 (ViT), 0.88 and 0.63 (ConvNeXt).
    assert min(logged(tmp_path / "run")[-1][key] for key in ("val_knn", "val_top1")) > 0.9
    assert_resumes_exactly(tmp_path / "run", *options)
    state = last_state(tmp_path / "run")
    method = build.build_method(from_dict(state["config"]), 2).eval()
    method.load_state_dict(state["method"])
    exported, images = load(tmp_path / "run" / "export" / "backbone"), torch.randn(2, 3, 32, 32)
    assert type(exported).__module__.startswith("timm.models.")
    torch.testing.assert_close(exported(images), method.encoder.backbone(images))
