"""fastai's vision_learner and Learner with our models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.images import save_colors
from tests.models import small_model

pytestmark = pytest.mark.client

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pandas and, on Python 3.14, asyncio
    from fastai.vision.all import (
        ImageDataLoaders,
        Learner,
        accuracy,
        params,
        set_seed,
        vision_learner,
    )


@pytest.fixture
def batches(tmp_path: Path) -> Any:
    """Batches of small pictures, a class a color; always in the same order."""
    set_seed(0)
    save_colors(tmp_path / "images", 16, 32)
    return ImageDataLoaders.from_folder(
        tmp_path / "images", valid_pct=0.25, seed=0, bs=12, num_workers=0, device="cpu"
    )


def last_accuracy(learner: Any) -> float:
    return float(learner.recorder.values[-1][-1])


def test_learner_fine_tunes_a_complete_model(batches: Any) -> None:
    torch.manual_seed(0)
    model = small_model()
    learner = Learner(batches, model, metrics=accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(12, 5e-3)
    assert last_accuracy(learner) > 0.8


def test_vision_learner_tunes_a_backbone(batches: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source: Any = timm.create_model("trex_resnet50", num_classes=0)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    learner = vision_learner(
        batches, "trex_resnet50", pretrained_cfg_overlay=overlay, metrics=accuracy
    )
    body = learner.model[0].model
    torch.testing.assert_close(body.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    normalize = batches.after_batch.fs[-1]
    assert normalize.mean.flatten().tolist() == pytest.approx(source.pretrained_cfg["mean"])
    frozen = body.conv1.weight.detach().clone()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, 1e-2)
        torch.testing.assert_close(body.conv1.weight, frozen, rtol=0, atol=0)
        learner.unfreeze()
        learner.fit_one_cycle(2, slice(1e-4, 1e-2))
    assert not torch.equal(body.conv1.weight, frozen)
    assert np.isfinite(learner.recorder.values[-1]).all()


@pytest.mark.parametrize("name", ["trexstar_resnet50", "trex_resnet50_cls"])
def test_vision_learner_accepts_backbones_and_complete_models(name: str, batches: Any) -> None:
    learner = vision_learner(batches, name, pretrained=False)
    body, head = learner.splitter(learner.model)
    assert len([*body, *head]) == len(params(learner.model))
    assert not any(parameter is p for p in head for parameter in params(learner.model[0]))
    # A projector is no part of the features, on which fastai puts its own head.
    assert learner.model[1][4].in_features == 2 * 2048
