"""Adapters and quantization of complete models: equal logits, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import torchao.quantization as torchao
from optimum import quanto
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, QuantoConfig

import trex_models  # noqa: F401  # registers the models
from tests.models import quick
from trex_models.pretrained import timm_folder

pytestmark = pytest.mark.client

CLASSES = 8
PATTERNS = torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGES = F.interpolate(PATTERNS, size=64)
Change = Callable[[nn.Module, Path], Callable[[Tensor], Tensor]]


@pytest.fixture(scope="module")
@torch.no_grad()
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Timm folder of a complete model that assigns every image to a different class."""
    torch.manual_seed(0)
    model: Any = quick(timm.create_model("trex_resnet", backbone="resnet18", num_classes=CLASSES))
    for _ in range(5):  # move BatchNorm's running statistics
        model(IMAGES)
    embeddings = model.eval().forward_head(model.forward_features(IMAGES), pre_logits=True)
    common = F.normalize(embeddings.mean(0), dim=0)
    model.fc.weight.copy_(embeddings - torch.outer(embeddings @ common, common))
    logits = model(IMAGES)
    assert logits.argmax(1).tolist() == list(range(CLASSES))
    return timm_folder.write_timm_folder(
        model, tmp_path_factory.mktemp("whole") / "whole", IMAGES, logits
    )


def with_quanto(model: nn.Module, _: Path) -> nn.Module:
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def with_torchao(model: nn.Module, _: Path) -> nn.Module:
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    return model


def with_transformers(_: nn.Module, folder: Path) -> Callable[[Tensor], Tensor]:
    model: Any = AutoModelForImageClassification.from_pretrained(
        folder, quantization_config=QuantoConfig(weights="int8")
    ).eval()
    assert isinstance(model.timm_model.proj[1].fc, quanto.QLinear)
    return lambda images: model(images).logits


@pytest.mark.parametrize("change", [with_quanto, with_torchao, with_transformers])
@torch.no_grad()
def test_int8_keeps_the_logits(change: Change, whole: Path) -> None:
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    logits = model(IMAGES)
    found = change(model, whole)(IMAGES)
    assert not torch.equal(found, logits)  # the projector is quantized
    assert (found - logits).abs().max() < 0.05 * logits.abs().max()
    assert torch.equal(found.argmax(1), logits.argmax(1))


@torch.no_grad()
def test_merged_lora_keeps_the_logits_and_is_refused_on_the_classifier(whole: Path) -> None:
    model = timm.create_model(f"local-dir:{whole}", pretrained=True)
    # As after training: with the default, B = 0, there is nothing to merge.
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config).eval()
    logits = adapted(IMAGES)
    merged = adapted.merge_and_unload().eval()(IMAGES)
    torch.testing.assert_close(merged, logits, atol=1e-4, rtol=1e-4)
    model = timm.create_model(f"local-dir:{whole}", pretrained=True)
    with pytest.raises(ValueError, match=r"CosineClassifier\(256, 8, .* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc"]))
