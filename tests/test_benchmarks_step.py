"""The benchmark of the step: the reference computes the same as ours, and results are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, reference_step, step
from trex_models.method.optimizer import build_optimizer
from trex_models.precision import Precision
from trex_models.train import build
from trex_models.train.config import Config, CropsConfig, ModelConfig, ObjectiveConfig
from trex_models.train.step import training_step

CONFIG = Config(
    output="",
    crops=CropsConfig(global_size=64, local_crops=3, local_size=32),
    model=ModelConfig(backbone="resnet18", hidden_layers=1, hidden_dim=32, embedding_dim=16),
    objective=ObjectiveConfig(bank_size=20),
)
CLASSES, RATE = 5, 1e-3


def test_reference_takes_our_steps() -> None:
    method = build.build_method(CONFIG, CLASSES).train()
    bank = method.objective.bank
    assert bank is not None
    encoder = reference_step.Encoder("resnet18", 1, 32, 16).train()
    weights = list(method.encoder.parameters())
    for ours, theirs in zip(weights, encoder.parameters(), strict=True):
        theirs.data = ours.detach().clone()
    reference = reference_step.Step(encoder, CLASSES, 20, 16, torch.float32)
    reference.bank = bank.embeddings.clone()
    reference.bank_labels = bank.labels.clone()
    for group in reference.optimizer.param_groups:
        group["lr"] = RATE  # small, since large steps amplify rounding
    optimizer = build_optimizer(method)
    precision = Precision.from_name("fp32", "cpu")
    for number in range(4):  # the bank wraps around
        torch.manual_seed(number)
        crops = [torch.randn(6, 3, 64, 64), torch.randn(18, 3, 32, 32)]
        labels = torch.randint(CLASSES, (6,))
        loss, logits = training_step(
            method, method, optimizer, precision, crops, labels, torch.arange(6), RATE
        )
        expected, accuracy = reference(crops, labels)
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        assert (logits[:6].argmax(1) == labels).double().mean() == pytest.approx(accuracy)
        torch.testing.assert_close(bank.embeddings, reference.bank, rtol=1e-4, atol=1e-5)
        assert torch.equal(bank.labels, reference.bank_labels)


def test_figures(tmp_path: Path) -> None:
    sizes = ["--sizes", "32", "32", "--bank", "64", "--hidden-dim", "16", "--classes", "7"]
    out = tmp_path / "step.json"
    more = ["--backbone", "resnet18", "--batch", "2", "--rounds", "2", "--also", "nchw"]
    step.main([*sizes, *more, "--dtype", "float32", "--out", str(out)])
    result = json.loads(out.read_text())
    assert set(result["ratios"]) == {"ours", "reference", "nchw"}
    assert result["ratio"] == result["ratios"]["ours"]["median"] > 0
    assert result["ratios"]["reference"]["min"] == result["ratios"]["reference"]["max"] == 1
    assert all(spread["n"] == 2 for spread in result["images_per_second"].values())
    for name in ("ours", "reference"):
        assert sum(result[f"profile_{name}"].values()) == pytest.approx(1, abs=1e-2)
        assert result[f"profile_{name}"]["convolution"] > 0


def test_training_with_real_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "SPECS", build.crop_specs(CONFIG.crops))
    out = tmp_path / "end_to_end.json"
    small = ["--bank", "64", "--hidden-dim", "16", "--classes", "8", "--files", "8", "--batch", "2"]
    end_to_end.main([*small, "--rounds", "1", "--steps", "1", "--cores", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    (one,) = result["by_cores"]
    assert one["cores"] == 1
    assert result["ratio"] == one["ratios"]["median"] > 0
    for name in ("ours", "reference"):
        assert one["images_per_second"][name]["median"] > 0
        assert 0 <= one["waiting"][name]["median"] <= 1
    with pytest.raises(SystemExit):
        end_to_end.main(["--cores", "4096"])
