"""Training and export of all combinations of crops, projector and objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.models import load
from tests.runs import TINY
from trex_models.method.model import TReX
from trex_models.method.optimizer import build_optimizer
from trex_models.precision import Precision
from trex_models.train import build
from trex_models.train.__main__ import parse
from trex_models.train.config import Config
from trex_models.train.export import export_method
from trex_models.train.step import training_step

CLASSES = ["a", "b", "c", "d"]
PROJECTORS = {
    "none": ["--model.projector", "none"],
    "0 hidden": ["--model.hidden-layers", "0"],
    "2 hidden": ["--model.hidden-layers", "2"],
}


def train_a_step(config: Config) -> TReX:
    method = build.build_method(config, len(CLASSES)).train()
    before = {name: value.clone() for name, value in method.named_parameters()}
    crops = [
        torch.randn(6 * spec.count, 3, spec.size, spec.size)
        for spec in build.crop_specs(config.crops)
    ]
    labels, indices = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]])
    optimizer, precision = build_optimizer(method), Precision.from_name("fp32", "cpu")
    loss, logits = training_step(method, method, optimizer, precision, crops, labels, indices, 0.1)
    assert loss.isfinite()
    assert logits.shape == (sum(len(part) for part in crops), len(CLASSES))
    moved = [n for n, value in method.named_parameters() if not torch.equal(value, before[n])]
    # The momentum encoder is not updated yet.
    trained = {name for name in before if name.startswith("encoder.")}
    assert {name for name in trained if name.endswith("conv1.weight")} <= set(moved)
    return method


@pytest.mark.parametrize("objective", ["ocm", "cosine", "look", "softmax"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_trains_and_exports(objective: str, projector: str, tmp_path: Path) -> None:
    options = ["--objective.name", objective, *PROJECTORS[projector]]
    # Each number of crops with each objective and with some projector.
    few = projector == "none"
    options += ["--crops.global-crops", "1" if few else "2"]
    options += ["--crops.local-crops", "0" if few else "2"]
    config = parse("smoke", ["--output", str(tmp_path), *TINY, *options])
    method = train_a_step(config)
    assert (method.momentum_encoder is not None) == (objective in ("ocm", "look"))
    folders = export_method(method, config, CLASSES, tmp_path)
    names = [folder.name for folder in folders]
    head = {"look": ["proj"] if projector != "none" else []}.get(objective, ["cls"])
    assert names == ["backbone", *head]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = method.eval().encoder.backbone(images)
        embeddings = method.encoder.projector(features)
        torch.testing.assert_close(load(folders[0])(images), features)
        if head == ["proj"]:
            torch.testing.assert_close(load(folders[1])(images), embeddings)
        elif head:
            whole: Any = load(folders[1])
            torch.testing.assert_close(whole(images), method.objective.logits(embeddings))
            assert whole.pretrained_cfg["label_names"] == CLASSES
            is_stock = type(whole) is timm.models.ResNet
            assert is_stock == (objective == "softmax" and projector == "none")


def test_softmax_is_a_linear_layer_with_bias_and_cross_entropy() -> None:
    torch.manual_seed(0)
    objective: Any = build.build_method(
        parse("smoke", ["--output", "x", *TINY, "--objective.name", "softmax"]), 4
    ).objective
    with torch.no_grad():
        objective.classifier.bias.uniform_()
    z, labels = torch.randn(6, 8), torch.tensor([0, 3])
    loss, logits = objective(z, labels, labels)
    weight, bias = objective.classifier.weight, objective.classifier.bias
    torch.testing.assert_close(logits, z @ weight.T + bias)
    rows = logits.log_softmax(1)[range(6), [0, 3, 0, 3, 0, 3]]
    torch.testing.assert_close(loss, -rows.mean())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            objective(z.bfloat16(), labels, labels)[1], objective.logits(z.bfloat16())
        )
        assert objective.logits(z.bfloat16()).dtype == torch.float32
