"""transformers on t-ReX folders and backbones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from trex_models import CosineClassifier
from trex_models.data.fractals import FractalSource
from trex_models.pretrained import timm_folder

pytestmark = [pytest.mark.client, pytest.mark.usefixtures("naver_cache")]

NAMES = timm.list_models("trex*_resnet50*")
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CLASSES = 4
FRACTALS = FractalSource(CLASSES, images_per_class=2, size=64)


@pytest.fixture(scope="module")
@torch.no_grad()
def backbone(naver_cache: Path) -> Path:
    """The pretrained backbone as a folder for stock timm."""
    model: Any = timm.create_model("trex_resnet50", pretrained=True).eval()
    model.pretrained_cfg["architecture"] = "resnet50"
    return timm_folder.write_timm_folder(model, naver_cache / "backbone", IMAGES, model(IMAGES))


@pytest.fixture(scope="module")
@torch.no_grad()
def whole(naver_cache: Path) -> Path:
    """A small whole model as a folder, with sizes that are not the defaults."""
    model = timm.create_model(
        "trex_resnet", backbone="resnet18", proj_hidden_dim=64, proj_dim=32, num_classes=CLASSES
    ).eval()
    return timm_folder.write_timm_folder(model, naver_cache / "whole", IMAGES, model(IMAGES))


def picture() -> Image.Image:
    return Image.fromarray(FRACTALS.read(0)).resize((300, 240))


@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_wrapped(name: str) -> None:
    config = TimmWrapperConfig(architecture=name, num_labels=5)
    with torch.device("meta"):
        images = torch.empty(2, 3, 64, 64)
        found = AutoModel.from_config(config).eval()(images)
        logits = AutoModelForImageClassification.from_config(config)(images).logits
    assert found.pooler_output.shape == (2, 2048 if name.endswith("50") else 256)
    assert found.last_hidden_state.shape == (2, 2048, 2, 2)
    assert logits.shape == (2, 5)


@torch.no_grad()
def test_features_and_pixels_are_timms(backbone: Path) -> None:
    stock: Any = timm.create_model(f"local-dir:{backbone}", pretrained=True).eval()
    model = AutoModel.from_pretrained(backbone).eval()
    assert torch.equal(model(IMAGES).pooler_output, stock(IMAGES))
    maps = model(IMAGES).last_hidden_state
    assert torch.equal(maps, stock.forward_features(IMAGES))

    processor = AutoImageProcessor.from_pretrained(backbone)
    pixels = create_transform(**resolve_model_data_config(stock))(picture())[None]
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.equal(processor(picture())["pixel_values"], pixels)

    extract: Any = pipeline("image-feature-extraction", model=str(backbone))
    assert np.allclose(extract(picture(), pool=True)[0], stock(pixels)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_complete_models_have_all_parts(whole: Path) -> None:
    stock: Any = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    embeddings = stock.forward_head(stock.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(AutoModel.from_pretrained(whole).eval()(IMAGES).pooler_output, embeddings)
    model = AutoModelForImageClassification.from_pretrained(whole).eval()
    assert torch.equal(model(IMAGES).logits, stock(IMAGES))

    classify: Any = pipeline("image-classification", model=str(whole), top_k=CLASSES)
    pixels = create_transform(**resolve_model_data_config(stock))(picture())[None]
    expected = stock(pixels).softmax(1)[0].sort(descending=True).values
    assert np.allclose([r["score"] for r in classify(picture())], expected, atol=1e-5)


def test_a_fresh_cosine_classifier_is_initialized(whole: Path) -> None:
    model: Any = AutoModelForImageClassification.from_pretrained(
        whole, num_labels=500, ignore_mismatched_sizes=True
    )
    weight = model.timm_model.fc.weight.detach()
    assert isinstance(model.timm_model.fc, CosineClassifier)
    assert weight.shape == (500, 32)
    bound = 32**-0.5  # of nn.Linear's uniform distribution
    assert weight.abs().max() < bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    stored = timm.create_model(f"local-dir:{whole}", pretrained=True).state_dict()
    found = model.timm_model.state_dict()
    assert all(torch.equal(found[key], stored[key]) for key in stored if key != "fc.weight")


@torch.no_grad()
def test_backbones_by_name_keep_their_statistics_where_batch_norm_is_frozen() -> None:
    config = TimmBackboneConfig(
        backbone="trex_resnet50", out_indices=(1, 2, 3, 4), freeze_batch_norm_2d=True
    )
    backbone = TimmBackbone(config, pretrained=True).eval()
    stock = timm.create_model(
        "trex_resnet50", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)
    ).eval()
    assert backbone.channels == [256, 512, 1024, 2048]
    for found, wanted in zip(backbone(IMAGES).feature_maps, stock(IMAGES), strict=True):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # As the documentation warns; once transformers keeps them, this and the warning can go.
    bare: Any = TimmBackbone.from_pretrained("trex_resnet50")
    norms = [m for m in bare.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not m.running_mean.any() for m in norms if m.running_mean is not None)


def test_trainer_fine_tunes_saves_and_reloads(backbone: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForImageClassification.from_pretrained(backbone, num_labels=CLASSES)
    start = model.timm_model.layer4[0].conv1.weight.detach().clone()
    pixels = torch.stack(
        [torch.from_numpy(FRACTALS.read(i)).permute(2, 0, 1) / 255 for i in range(len(FRACTALS))]
    )
    data = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(pixels, FRACTALS.labels, strict=True)
    ]
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    machine: dict[str, Any] = {"use_cpu": True, "dataloader_pin_memory": False}
    rate: dict[str, Any] = {"learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    size = {"max_steps": 3, "per_device_train_batch_size": len(data), "logging_steps": 1}
    run = str(tmp_path / "run")
    arguments = TrainingArguments(output_dir=run, **size, **rate, **machine, **quiet)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0], losses
    assert not torch.equal(model.timm_model.layer4[0].conv1.weight, start)

    trainer.save_model(str(tmp_path / "tuned"))
    model.eval()
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    stock = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(IMAGES).logits
        assert torch.equal(reloaded(IMAGES).logits, logits)
        assert torch.equal(stock(IMAGES), logits)
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-sa-4.0"
